"""When a process is started again, and when no more."""

from __future__ import annotations

from transfer_queue.runtime.supervisor import Restarts


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
