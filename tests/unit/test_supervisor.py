"""When a process is started again, and when no more."""

from __future__ import annotations

from transfer_queue.ledger import Ledger
from transfer_queue.runtime.controller_server import ControllerServer
from transfer_queue.runtime.supervisor import PATIENCE_S, RETURN_S, START_TIMEOUT_S, Restarts, Starts


def test_the_first_restart_is_at_once_and_later_ones_wait_longer() -> None:
    """Pauses double; the sixth death within the window is the last."""
    restarts = Restarts(most=5, window_s=60.0)
    assert [restarts.next_pause_s(float(k)) for k in range(6)] == [0.0, 0.1, 0.2, 0.4, 0.8, None]
    assert restarts.total == 5


def test_old_restarts_are_forgotten() -> None:
    """A process that dies now and then is started again for ever, at once."""
    restarts = Restarts(most=5, window_s=60.0)
    assert [restarts.next_pause_s(61.0 * k) for k in range(20)] == [0.0] * 20
    assert restarts.total == 20


def test_none_at_all() -> None:
    """What cannot go on where it was is not started again."""
    assert Restarts(most=0).next_pause_s(0.0) is None


def test_failed_starts_are_tried_for_a_minute_with_longer_and_longer_pauses() -> None:
    """They count apart from deaths; the last try comes when the patience ends, and the last error is known."""
    starts, now, pauses = Starts(), 0.0, []
    while (pause_s := starts.next_pause_s(f"port taken at {now:.1f}", now)) is not None:
        pauses.append(pause_s)
        now += pause_s + 0.25  # how long a start takes
    assert pauses[:5] == [0.1, 0.2, 0.4, 0.8, 1.6]
    assert pauses[:-1] == sorted(pauses[:-1]) and max(pauses) == 10.0
    assert 60.0 <= now < 61.0
    assert starts.failed == len(pauses) + 1 and starts.last_error == f"port taken at {now:.1f}"


def test_a_start_that_succeeds_makes_patience_new() -> None:
    """What goes wrong the next time has its own minute."""
    starts = Starts(patience_s=60.0)
    assert starts.next_pause_s("full", 0.0) == 0.1
    starts.succeeded()
    assert (starts.failed, starts.last_error) == (0, "")
    assert starts.next_pause_s("full", 100.0) == 0.1


def test_a_unit_that_may_yet_be_started_is_not_given_up() -> None:
    """The controller waits for as long as the supervisor tries, and for the last start."""
    assert RETURN_S >= PATIENCE_S + START_TIMEOUT_S
    server = ControllerServer(Ledger(), host="127.0.0.1")
    try:
        assert server.service._unit_return_s == RETURN_S
    finally:
        server.close()
