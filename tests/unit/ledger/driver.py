"""A ledger with a clock that stands still, block ids that count up, and short calls with defaults."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from transfer_queue.errors import TransferQueueError
from transfer_queue.ledger import Ledger
from transfer_queue.ledger.replaying import replay
from transfer_queue.messages import (
    AbortGroup,
    Ack,
    Clear,
    ColumnSpec,
    Draw,
    Drawn,
    Drop,
    GetAdmission,
    GetExplanation,
    GetStatus,
    Locate,
    Put,
    PutDone,
    Release,
    Renew,
    ResetConsumption,
    SealGroup,
    SetTags,
    SetVersion,
    Status,
)
from transfer_queue.wire.codec import pack_value, unpack_value

UNIT = 1 << 48


class Driver:
    """Drives one ledger as the controller does: after each change it wakes, and keeps the answers by ticket.

    Beside it, a shadow makes the same changes from the records alone, and must have the same state after each call.
    """

    def __init__(self, **options: Any) -> None:
        self.ledger = Ledger(**options)
        self.ledger.records.keep = True
        self.shadow = Ledger(**options)
        self._options = options
        self.compared = 0
        self.now = 100.0
        self.answers: dict[int, PutDone | Drawn | TransferQueueError] = {}
        self.freed: list[int] = []  # whole blocks, in the order in which they became free
        self.freed_slots: list[tuple[int, int]] = []
        self.ticket = 0
        self.blocks = itertools.count(UNIT + 1)
        self.latest_block = 0

    # ------------------------------------------------------------ requests

    def put(self, count: int = 1, fields: Sequence[str] = ("x",), *, client: str = "writer", **options: Any) -> Any:
        """Insert rows, or with `to=` (a reply) add fields to its rows. None: parked."""
        to = options.pop("to", None)
        if to is not None:
            count, options["indexes"], options["generations"] = len(to.indexes), to.indexes, to.generations
        self.latest_block = next(self.blocks) if fields else 0
        request = put_request(count, fields, self.latest_block, **options)
        return self.after(self.ledger.put, request, self._next(), client, self.now)

    def draw(
        self, count: int = 1, fields: Sequence[str] = ("x",), task: str = "t", *, client: str = "reader", **options: Any
    ) -> Drawn | None:
        """None: parked, unless `timeout_s=0`."""
        request = draw_request(count, fields, task, **options)
        drawn: Drawn | None = self.after(self.ledger.draw, request, self._next(), self.now, client)
        return drawn

    def rank(self, rank: int, size: int, count: int = 1, *, group: Any = None, **options: Any) -> Drawn | None:
        """The draw of one data-parallel rank."""
        params = {"dp_rank": rank, "dp_size": size} | options.pop("params", {})
        if group is not None:
            params["dp_group_id"] = group
        return self.draw(count, sampler_params=params, **options)

    def clear(self, what: Any = "p") -> int:
        """Clear a partition by name, or the rows of a reply."""
        if isinstance(what, str):
            request = Clear(partition_id=what, global_step=None, indexes=None, generations=None)
        else:
            request = Clear(partition_id=None, global_step=None, indexes=what.indexes, generations=what.generations)
        return int(self.after(self.ledger.clear, request, self.now))

    def clear_rows(self, *rows: int) -> int:
        """Clear rows whatever their generation."""
        request = Clear(partition_id=None, global_step=None, indexes=ints(*rows), generations=None)
        return int(self.after(self.ledger.clear, request, self.now))

    def reset(self, task: str | None = None, partition: str = "p") -> None:
        request = ResetConsumption(partition_id=partition, global_step=None, task_name=task)
        self.after(self.ledger.reset, request, self.now)

    def seal(self, group: int | str, partition: str = "p") -> None:
        self.after(self.ledger.seal_group, SealGroup(partition_id=partition, group_id=group), self.now)

    def abort(self, group: int | str, partition: str = "p") -> int:
        request = AbortGroup(partition_id=partition, group_id=group, reason="bad")
        return int(self.after(self.ledger.abort_group, request, self.now))

    def set_tags(self, rows: Any, *tags: dict[str, Any] | None) -> None:
        request = SetTags(indexes=rows.indexes, generations=rows.generations, tags=tags)
        self.after(self.ledger.set_tags, request, self.now)

    def cancel(self, ticket: int | None = None) -> bool:
        """Cancel the latest request, or another one."""
        return bool(self.after(self.ledger.cancel, self.ticket if ticket is None else ticket, self.now))

    def lease(self, count: int = 1, seconds: float = 10.0, **options: Any) -> Drawn | None:
        """A draw that has to be acknowledged."""
        return self.draw(count, lease_s=seconds, **options)

    def ack(self, drawn: Drawn, rows: Any = None) -> int:
        """Acknowledge a leased draw, or the rows of another reply under its lease."""
        return int(self.after(self.ledger.ack, Ack(lease_token=token_of(drawn), **handle_of(rows or drawn)), self.now))

    def release(self, drawn: Drawn, rows: Any = None) -> int:
        request = Release(lease_token=token_of(drawn), **handle_of(rows or drawn))
        return int(self.after(self.ledger.release, request, self.now))

    def renew(self, drawn: Drawn, seconds: float | None = None) -> float:
        return float(self.after(self.ledger.renew, Renew(lease_token=token_of(drawn), lease_s=seconds), self.now))

    def drop(self, rows: Any, reason: str = "bad") -> int:
        return int(self.after(self.ledger.drop, Drop(reason=reason, **handle_of(rows)), self.now))

    def raise_version(self, version: int) -> int:
        """The policy has this version now."""
        return int(self.after(self.ledger.set_policy_version, SetVersion(version=version), self.now))

    def gone(self, client: str) -> None:
        self.after(self.ledger.client_gone, client, self.now)

    def register(self, task: str | None, sampler: Any) -> None:
        self.after(self.ledger.register_sampler, task, sampler)

    def later(self, seconds: float) -> None:
        self.now += seconds
        self.wake()

    # ------------------------------------------------------------ looking

    def locate(self, rows: Any = None, fields: Sequence[str] | None = None, **options: Any) -> Drawn:
        """Rows of a reply, of `keys=`, or all of the partition."""
        body: dict[str, Any] = {"partition_id": "p", "global_step": None, "keys": None, "indexes": None}
        body |= {"generations": None, "fields": None if fields is None else tuple(fields)} | options
        if rows is not None:
            body |= {"indexes": rows.indexes, "generations": rows.generations}
        return self.ledger.locate(Locate(**body))

    def status(self, task: str | None = None, fields: Sequence[str] | None = None, partition: str = "p") -> Status:
        chosen = None if fields is None else tuple(fields)
        request = GetStatus(partition_id=partition, global_step=None, task_name=task, fields=chosen)
        return self.ledger.reports.status(request)

    def account(self, task: str = "t", partition: str = "p") -> dict[str, Any]:
        found: dict[str, Any] = self.ledger.reports.audit(partition)["partitions"][partition]["tasks"][task]
        assert found["balanced"], found
        return found

    def explain(self, count: int = 1, fields: Sequence[str] = ("x",), task: str = "t", partition: str = "p") -> str:
        request = GetExplanation(
            partition_id=partition, global_step=None, task_name=task, fields=tuple(fields), batch_size=count
        )
        return self.ledger.reports.explain(request, self.now)

    def snapshot(self) -> dict[str, Any]:
        """All that a caller can see of the state."""
        reports = self.ledger.reports
        partitions = reports.partitions()
        tasks = {task for found in reports.audit()["partitions"].values() for task in found["tasks"]}
        return {
            "audit": copy.deepcopy(reports.audit()),
            "partitions": partitions,
            "production": reports.production_status().tolist(),
            "consumption": {task: reports.consumption_status(task).tolist() for task in sorted(tasks)},
            "fields": reports.field_mapping(),
            "rows": [_plain(self.locate(partition_id=name, allow_missing=True)) for name in partitions],
            "freed": (list(self.freed), list(self.freed_slots)),
            "answers": sorted(self.answers),
            "deadline": self.ledger.next_deadline(),
        }

    # ------------------------------------------------------------ inside

    def after(self, call: Any, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        finally:
            self.wake()

    def restart(self) -> None:
        """Go on with a ledger that was made from the state of this one; nobody waits in it."""
        state = unpack_value(pack_value(self.ledger.state()))
        self.ledger = Ledger(**self._options)
        self.ledger.load(state)
        self.ledger.records.keep = True
        self.follow()

    def follow(self) -> None:
        """Let the shadow make the changes, and compare."""
        for record in self.ledger.records.take():
            replay(self.shadow, record)
        for unit, order in self.shadow.blocks.take_orders():
            self.shadow.blocks.confirm(unit, order.sequence)
        self.compared += 1
        if self.compared < 400 or self.compared % 500 == 0:  # the states of long runs are large
            mine, shadowed = self.ledger.state(), self.shadow.state()
            differences = [] if same(mine, shadowed) else list(differ(mine, shadowed))
            assert not differences, str(differences)[:500]

    def wake(self) -> None:
        for ticket, answer in self.ledger.wake(self.now):
            assert ticket not in self.answers, f"ticket {ticket} was answered twice"
            self.answers[int(str(ticket))] = answer
        for unit, order in self.ledger.blocks.take_orders():
            self.ledger.blocks.confirm(unit, order.sequence)
            self.freed += order.blocks.tolist()
            self.freed_slots += list(zip(order.partial_blocks.tolist(), order.partial_slots.tolist(), strict=True))
        self.follow()

    def _next(self) -> int:
        self.ticket += 1
        return self.ticket


def put_request(count: int, fields: Sequence[str], block: int, **options: Any) -> Put:
    columns = options.pop("columns", None) or tuple(column(name) for name in fields)
    body: dict[str, Any] = {"partition_id": "p", "global_step": None, "indexes": None, "generations": None}
    body |= {"keys": None, "tags": None, "group_ids": None, "group_size": None, "timeout_s": 0.0} | options
    if body["global_step"] is not None:
        body["partition_id"] = None
    for name in ("keys", "tags", "group_ids"):
        body[name] = None if body[name] is None else tuple(body[name])
    version = body.pop("version", None)  # of all rows, or one per row
    body["versions"] = None if version is None else np.broadcast_to(np.array(version, np.int64), count).copy()
    return Put(num_rows=count, block_id=block, columns=columns, **body)


def draw_request(count: int, fields: Sequence[str] = ("x",), task: str = "t", **options: Any) -> Draw:
    body: dict[str, Any] = {"partition_id": "p", "global_step": None, "get_n_samples": False, "timeout_s": 60.0}
    body |= {"sampler_params": {}} | options
    if body["global_step"] is not None:
        body["partition_id"] = None
    return Draw(task_name=task, fields=tuple(fields), batch_size=count, **body)


def handle_of(rows: Any) -> dict[str, Any]:
    return {"indexes": rows.indexes, "generations": rows.generations}


def token_of(drawn: Drawn) -> int:
    assert drawn.lease_token is not None, "the draw was not leased"
    return drawn.lease_token


def same(one: Any, other: Any) -> bool:
    """Whether `differ` has nothing to tell, found several times faster; where types differ it is left to `differ`."""
    kind = type(one)
    if kind is not type(other):
        return False
    if kind is dict:
        return list(one) == list(other) and all(map(same, one.values(), other.values()))
    if kind is list or kind is tuple:
        return len(one) == len(other) and all(map(same, one, other))
    if kind is np.ndarray:
        return bool(one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes())
    return bool(one == other)


def differ(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Where two states differ."""
    if isinstance(one, dict) and isinstance(other, dict) and list(one) == list(other):
        for key in one:
            yield from differ(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for number, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            yield from differ(mine, theirs, f"{path}[{number}]")
    elif isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        if one.dtype != other.dtype or not np.array_equal(one, other):
            yield f"{path}: {one} is not {other}"
    elif one != other:
        yield f"{path}: {one!r} is not {other!r}"


def column(name: str, dtype: str | None = "float32", layout: str = "dense", shape: Any = (3,)) -> ColumnSpec:
    return ColumnSpec(name=name, layout=layout, dtype=dtype, shape=shape)


def ints(*values: int) -> Any:
    return np.array(values, dtype=np.int64)


def rows(reply: Any) -> list[int]:
    """Global indexes of a reply."""
    assert reply is not None, "the request was parked"
    assert not isinstance(reply, BaseException), repr(reply)
    found: list[int] = reply.indexes.tolist()
    return found


def part(queue: Driver, partition: str = "p") -> dict[str, Any]:
    """The audit of a partition."""
    found: dict[str, Any] = queue.ledger.reports.audit(partition)["partitions"][partition]
    return found


def admission(queue: Driver, partition: str | None = None, producer: str = "writer") -> dict[str, Any]:
    return queue.ledger.reports.admission(GetAdmission(partition_id=partition), producer)


def _plain(drawn: Drawn) -> tuple[Any, ...]:
    places = [(place.fields, place.blocks.tolist(), place.slots.tolist()) for place in drawn.locations]
    return drawn.indexes.tolist(), drawn.generations.tolist(), places, drawn.keys, drawn.tags, drawn.group_ids
