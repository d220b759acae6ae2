"""A client whose process forks while calls are in flight in other threads of it."""

from __future__ import annotations

import faulthandler
import os
import random
import threading
import time
import traceback
from pathlib import Path

from tests.chaos.caller import Caller
from tests.chaos.roles import Order, client_of, sequences_of
from tests.chaos.samples import damaged, fields_of
from tests.chaos.sidelog import SideLog
from transfer_queue import TransferQueueClient
from transfer_queue.errors import DeadlineExceeded

FORKS = 6
CHILD_S = 30.0  # beyond which a child is taken for stuck: three calls of at most 5 s, and 5 s for the way of each
CALL_S = 5.0

_LEASE_S = 20.0
_PARKED_S = 0.3
_COUNT = 4
_TASK = "fork"


def fork_in_calls(order: Order) -> None:
    """Fork some times while one thread puts, draws and acknowledges and another one waits in a draw.

    Each child uses the client that it inherited; the parent's calls and leases are to be as if it had not forked. What
    anybody is told goes into side logs; a child that does not end is a violation.
    """
    log = SideLog(Path(order.logs) / f"{order.name}.log")
    log.note("start", lease_s=_LEASE_S)
    chance = random.Random(f"{order.seed} {order.name}")
    partition = f"forks-{order.number}"
    with client_of(order) as client:
        ended = threading.Event()
        caller = Caller(client, log)
        # Once before the first fork, or a thread may be in the middle of importing a part of torch when the process
        # forks: Python leaves such a module locked in the child for ever.
        _work(order, caller, partition, 0)
        threads = [threading.Thread(target=_guarded, args=(order, turn, caller, partition, ended))
                   for turn in (_work, _wait)]  # fmt: skip
        for thread in threads:
            thread.start()
        for number in range(FORKS):
            time.sleep(chance.uniform(0.01, 0.3))
            _fork(order, client, number, partition, log)
        ended.set()
        for thread in threads:
            thread.join()
        client.clear_partition(partition)
    log.note("stop")
    log.close()


def _guarded(order: Order, turn: object, caller: Caller, partition: str, ended: threading.Event) -> None:
    """Make turns until the end; what a thread of its own dies of is written down."""
    sequence = _COUNT
    try:
        while not ended.is_set():
            sequence = turn(order, caller, partition, sequence)  # type: ignore[operator]
    except BaseException:
        (Path(order.logs) / f"{order.name}.error").write_text(traceback.format_exc())


def _work(order: Order, caller: Caller, partition: str, sequence: int) -> int:
    """Put, draw under a lease, read, acknowledge; return the next sequence number."""
    client, sequences = caller.client, list(range(sequence, sequence + _COUNT))
    keys = [str(one) for one in sequences]

    def one_round() -> None:
        client.put(fields_of(order.seed, sequences), partition_id=partition, keys=keys, timeout=CALL_S)
        meta = client.get_meta(["seq"], _COUNT, partition, task_name=_TASK, lease=_LEASE_S, timeout=CALL_S)
        wrong = damaged(order.seed, sequences_of(meta), client.get_data(meta, timeout=CALL_S))
        if wrong:
            caller.log.note("damaged", wrong=wrong[:5])
        if client.ack(meta, timeout=CALL_S) != _COUNT:
            caller.log.note("violated", why=f"a lease of the parent was gone after a fork: {meta!r}")
        client.clear_samples(meta)

    caller.call("other", one_round, timeout_s=5 * CALL_S)
    return sequence + _COUNT


def _wait(order: Order, caller: Caller, partition: str, sequence: int) -> int:
    """Wait in vain, so that nearly always a call is in flight."""
    try:
        caller.call(
            "other",
            lambda: caller.client.get_meta(["nobody puts this"], 1, partition, task_name=_TASK, timeout=_PARKED_S),
            timeout_s=_PARKED_S,
        )
    except DeadlineExceeded:
        return sequence
    caller.log.note("violated", why="a draw was answered with samples that nobody put")
    return sequence


def _fork(order: Order, client: TransferQueueClient, number: int, partition: str, log: SideLog) -> None:
    """Fork; the child makes calls of its own and ends; wait for that."""
    pid = os.fork()
    if not pid:
        try:
            _child(order, client, number, partition)
        finally:
            os._exit(0)
    if os.waitpid(pid, 0)[1]:
        log.note("violated", why=f"forked child {number} did not end in {CHILD_S} s; its stacks are beside its log")


def _child(order: Order, client: TransferQueueClient, number: int, partition: str) -> None:
    """Put, read and clear in the forked child, by the client that the parent is using; it ends even if it is stuck."""
    name = f"forkchild-{order.number}-{number}"
    stacks = (Path(order.logs) / f"{name}.stacks").open("w")
    faulthandler.dump_traceback_later(CHILD_S, file=stacks, exit=True)
    try:
        log = SideLog(Path(order.logs) / f"{name}.log")
        log.note("start", lease_s=_LEASE_S)
        caller = Caller(client, log)
        place, sequences = f"{partition}-{number}", list(range(_COUNT))
        data = fields_of(order.seed, sequences)
        meta = caller.call("other", lambda: client.put(data, partition_id=place, timeout=CALL_S), timeout_s=CALL_S)
        found = caller.call("other", lambda: client.get_data(meta, timeout=CALL_S), timeout_s=CALL_S)
        wrong = damaged(order.seed, sequences, found)
        if wrong:
            log.note("damaged", wrong=wrong[:5])
        caller.call("other", lambda: client.clear_partition(place), timeout_s=CALL_S)
        client.close()
        log.note("stop")
    except BaseException:
        (Path(order.logs) / f"{name}.error").write_text(traceback.format_exc())
