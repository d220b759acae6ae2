"""All processes of the workload of one session: started, killed, followed by a next life, drained and judged."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.chaos.caller import Caller
from tests.chaos.queue_under_test import WAIT_S, QueueUnderTest, wait_until
from tests.chaos.record import Record
from tests.chaos.roles import PARTITIONS, RANKS, SLICE, STOP, STOP_PRODUCING, TASKS, Order, put_rows, sequences_of
from tests.chaos.samples import SCORE, damaged
from tests.chaos.sidelog import OK, SideLog, read_all, read_life
from tests.chaos.zygote import Zygote

CREW = {"producer": 2, "scorer": 2, "looker": 2, "trainer": RANKS, "cleaner": 1}

NAMES = ("seq", "tokens", "body", "note", SCORE)

_EACH = 1_000_000  # sequence numbers of one producer
_DRAIN_S = 120.0
_LOOK_AGAIN_S = 0.05


class Workload:
    """`options` go into every order, `proxy` is the folder of a proxy that every other process goes through."""

    def __init__(
        self, zygote: Zygote, queue: QueueUnderTest, folder: Path, seed: int, *, proxy: str | None, **options: Any
    ) -> None:
        self.queue = queue
        self.killed: set[str] = set()
        self.stopped: dict[str, float] = {}
        self.random = random.Random(f"{seed} workload")
        self._zygote = zygote
        self._logs = folder
        self._seed = seed
        self._proxy = proxy
        self._options = options
        self._orders: dict[tuple[str, int], Order] = {}
        self._pids: dict[str, int] = {}
        self._beside: list[int] = []
        self._driver_log = SideLog(folder / "driver-0-0.log")
        self._driver_log.note("start", lease_s=0.0)
        self._caller = Caller(queue.client, self._driver_log)
        self._next_filler = 900 * _EACH

    def start(self) -> None:
        """Start everybody."""
        for role, count in CREW.items():
            for number in range(count):
                first = number * _EACH if role == "producer" else dict.fromkeys(PARTITIONS, 0)
                proxy = self._proxy if _is_proxied(role, number) else None
                self._begin(self._order(role, number, first, proxy))

    def kill(self, role: str) -> None:
        """Kill one process of a role and start its next life; returns when that was told something."""
        order = self._choose(role)
        pid = self._pids[order.name]
        self.killed.add(order.name)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: pid in self._zygote.ended, f"the end of {order.name}")
        successor = replace(order, life=order.life + 1, first=self._first_after(order))
        self._begin(successor)
        self._wait_for_answer(successor)

    def stop(self, role: str, stop_s: float) -> None:
        """Stop one process for a while, as a zombie that does not know how late it is."""
        order = self._choose(role)
        self.stopped[order.name] = self.stopped.get(order.name, 0.0) + stop_s
        os.kill(self._pids[order.name], signal.SIGSTOP)
        time.sleep(stop_s)
        os.kill(self._pids[order.name], signal.SIGCONT)

    def stop_all(self, role: str, stop_s: float) -> None:
        """Stop all processes of a role for a while."""
        orders = [order for (who, _), order in self._orders.items() if who == role]
        for order in orders:
            self.stopped[order.name] = self.stopped.get(order.name, 0.0) + stop_s
            os.kill(self._pids[order.name], signal.SIGSTOP)
        time.sleep(stop_s)
        for order in orders:
            os.kill(self._pids[order.name], signal.SIGCONT)

    def stop_everything(self, stop_s: float, meanwhile: Callable[[], None]) -> None:
        """Stop the servers and everybody else for a while, but for this process; call `meanwhile` in this time."""
        orders = list(self._orders.values())
        for order in orders:
            self.stopped[order.name] = self.stopped.get(order.name, 0.0) + stop_s
        pids = [child.pid for child in self.queue.runtime.children] + [self._pids[order.name] for order in orders]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            meanwhile()
            time.sleep(stop_s)
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def run_beside(self, role: str, number: int) -> None:
        """Run a process that is no part of the crew to its end."""
        order = self._order(role, number, None, None)
        pid = self._zygote.start(order)
        self._beside.append(pid)
        wait_until(lambda: pid in self._zygote.ended, f"the end of {order.name}", 4 * WAIT_S)

    def abandon(self) -> None:
        """Kill whoever still runs, after the round broke off."""
        for pid in {*self._pids.values(), *self._beside} - set(self._zygote.ended):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda: pid in self._zygote.ended, f"the end of process {pid}")  # noqa: B023

    def drain(self) -> dict[str, Any]:
        """Let the producers end, wait until every task has consumed everything; return the last audit."""
        self._touch(STOP_PRODUCING)
        self._wait_for_end("producer")
        deadline = time.monotonic() + _DRAIN_S
        while time.monotonic() < deadline:
            audit = self.queue.client.audit()
            if all(self._is_drained(name, audit["partitions"].get(name)) for name in PARTITIONS):
                break
            time.sleep(_LOOK_AGAIN_S)
        else:
            self._say_what_is_missing()
        return self.queue.client.audit()

    def finish(self, audit: dict[str, Any]) -> Record:
        """End all processes and collect what they were told."""
        self._touch(STOP)
        for role in CREW:
            self._wait_for_end(role)
        live = self._read_what_is_left()
        self._driver_log.close()
        crashed = [path.read_text() for path in sorted(self._logs.glob("*.error"))]
        lives = read_all(self._logs)
        proxied = {name for name in lives if self._proxy and _is_proxied(*name.split("-")[:2])}
        record = Record(lives, self.killed, self.stopped, audit, live, crashed=crashed, proxied=proxied)
        record.units = self.queue.figures()
        record.held = self.queue.held_bytes()
        return record

    # ------------------------------------------------------------ inside

    def _order(self, role: str, number: int, first: Any, proxy: str | None) -> Order:
        return Order(
            role=role,
            number=number,
            life=0,
            seed=self._seed,
            controller=self.queue.runtime.info.to_record(),
            control=str(self.queue.control),
            logs=str(self._logs),
            first=first,
            proxy=proxy,
            **self._options,
        )

    def _begin(self, order: Order) -> None:
        self._orders[order.role, order.number] = order
        self._pids[order.name] = self._zygote.start(order)

    def _choose(self, role: str) -> Order:
        return self.random.choice([order for (who, _), order in self._orders.items() if who == role])

    def _first_after(self, order: Order) -> Any:
        """Where the next life of a producer or trainer has to begin."""
        if order.role not in ("producer", "trainer"):
            return order.first
        calls = read_life(self._logs / f"{order.name}.log").calls
        if order.role == "producer":
            put = [call.facts["sequences"][-1] + 1 for call in calls if call.op == "put"]
            return max([order.first, *put])
        steps = dict(order.first)
        acknowledged = {call.facts["token"] for call in calls if call.op == "ack" and call.last.outcome == OK}
        for call in calls:
            if call.op == "draw":
                done = call.get("token") in acknowledged and call.last.outcome == OK
                steps[call.facts["partition"]] = int(call.facts["group"].split("-")[1]) + done
        return steps

    def _wait_for_answer(self, order: Order) -> None:
        path = self._logs / f"{order.name}.log"
        wait_until(lambda: path.exists() and b'"outcome"' in path.read_bytes(), f"{order.name} is told something")

    def _wait_for_end(self, role: str) -> None:
        for (who, _), order in self._orders.items():
            if who == role:
                pid, wait_s = self._pids[order.name], order.timeout_s + WAIT_S
                wait_until(lambda: pid in self._zygote.ended, f"{order.name} stops as it was told", wait_s)  # noqa: B023

    def _touch(self, name: str) -> None:
        (self.queue.control / name).touch()

    def _is_drained(self, partition: str, found: dict[str, Any] | None) -> bool:
        """Whether everything was consumed; fills up the last batch of the trainers."""
        if found is None:
            return True
        accounts = [found["tasks"].get(task) for task in TASKS]
        if any(account is None for account in accounts):
            return False
        left = [account["inserted"] - account["consumed"] for account in accounts]
        pending = accounts[-1]["pending"]
        if 0 < pending < RANKS * SLICE and left[:-1] == [0, 0] and not accounts[-1]["reserved"]:
            count = RANKS * SLICE - pending
            sequences = list(range(self._next_filler, self._next_filler + count))
            self._next_filler += count
            put_rows(self._caller, self._seed, sequences, partition, 20.0)
            return False
        return not any(left)

    def _say_what_is_missing(self) -> None:
        client = self.queue.client
        for partition in set(PARTITIONS) & set(client.get_partition_list()):
            for task in TASKS:
                if client.check_consumption_status(task, partition):
                    continue
                why = client.explain(partition, task, ["seq"], 1)
                self._driver_log.note("not drained", task=task, partition=partition, why=why)

    def _read_what_is_left(self) -> set[int]:
        """Read and check every sample that was not cleared; return their sequence numbers."""
        found: set[int] = set()
        client = self.queue.client
        for partition in set(PARTITIONS) & set(client.get_partition_list()):
            meta = client.get_meta(["seq"], 1, partition, mode="force_fetch")
            sequences = sequences_of(meta)
            found.update(sequences)
            for rows in np.array_split(np.arange(len(meta)), len(meta) // 64 + 1):
                some = meta.select_samples(rows)
                if len(some):
                    data, there = client.get_data(some, NAMES, allow_missing=True)
                    kept = some.select_samples(np.flatnonzero(there))
                    wrong = damaged(self._seed, sequences_of(kept), data)
                    if wrong:
                        self._driver_log.note("damaged", wrong=wrong[:5])
        return found


def _is_proxied(role: str, number: int | str) -> bool:
    """Half of the crew; not the cleaner, whose questions wait for a minute if they get lost."""
    return role in CREW and int(number) % 2 == 0 and role != "cleaner"
