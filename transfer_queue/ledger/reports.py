"""What people and programs are told about the state: status, audit, and why a draw is not served."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import GetMetaTimeout, UnknownName, nearest
from transfer_queue.ledger.drawing import Drawing
from transfer_queue.ledger.figures import Figures
from transfer_queue.ledger.gate import Gate
from transfer_queue.ledger.leases import shown
from transfer_queue.ledger.partition import Partition, ready_key
from transfer_queue.ledger.rows import Rows
from transfer_queue.ledger.selection import Plan, has_filter
from transfer_queue.ledger.versions import Versions
from transfer_queue.ledger.waiting import WaitingRoom
from transfer_queue.messages import Draw, GetAdmission, GetExplanation, GetStatus, Status

Int64s: TypeAlias = NDArray[np.int64]

_SHOWN = 5
_UNITS = ("samples", "bytes")


class Reports:
    """Read-only views of the ledger."""

    def __init__(self, rows: Rows, drawing: Drawing, waiting: WaitingRoom, gate: Gate, versions: Versions) -> None:
        self._rows = rows
        self._versions = versions
        self._drawing = drawing
        self._waiting = waiting
        self._gate = gate
        self._leases = drawing.leasing.book
        self.figures = Figures(rows, drawing, waiting, versions)

    def partitions(self) -> tuple[str, ...]:
        """Names in creation order."""
        return tuple(self._rows.partitions)

    def production_status(self) -> NDArray[np.int8]:
        """[capacity, num_fields] int8, a copy."""
        table = self._rows.table
        if not table.columns:
            return np.zeros((table.capacity, 0), dtype=np.int8)
        return np.stack([column.ready for column in table.columns.values()], axis=1)

    def consumption_status(self, task: str) -> NDArray[np.int8]:
        """[capacity] int8, a copy; all zero for a task that never drew."""
        found = self._rows.table.tasks.get(task)
        return np.zeros(self._rows.table.capacity, dtype=np.int8) if found is None else found.consumed.copy()

    def field_mapping(self) -> dict[str, int]:
        """Column number of each field in `production_status`."""
        return {name: column.number for name, column in self._rows.table.columns.items()}

    def status(self, request: GetStatus) -> Status:
        """Production and consumption of the rows of one partition, in allocation order; fields as they first came."""
        name = self._rows.name(request.partition_id, request.global_step)
        partition = self._rows.partitions.get(name)
        table = self._rows.table
        rows = np.empty(0, dtype=np.int64) if partition is None else partition.rows()
        known = {} if partition is None else {field: number for number, field in enumerate(partition.fields)}
        asked = known if request.fields is None else request.fields
        fields = tuple(sorted(asked, key=lambda field: known.get(field, len(known))))
        production = [table.produced(rows, (field,)).astype(np.int64) for field in fields]
        consumption = None
        if request.task_name is not None:
            task = table.tasks.get(request.task_name)
            consumption = np.zeros(len(rows), np.int64) if task is None else task.consumed[rows].astype(np.int64)
        return Status(
            partition_id=name,
            exists=partition is not None,
            indexes=rows,
            fields=fields,
            production=np.stack(production, axis=1).ravel() if production else np.empty(0, dtype=np.int64),
            consumption=consumption,
            sealed=partition is not None and partition.sealed,
            to_come=0 if partition is None else max(0, partition.expected - partition.inserted),
        )

    def admission(self, request: GetAdmission, producer: str) -> dict[str, Any]:
        """How much more this producer may put: the least of what the limits and the version window leave."""
        left = self._gate.left(request.partition_id, producer)
        bounds = {unit: [(much, limit.name) for limit, much in left.items() if limit.unit == unit] for unit in _UNITS}
        window = self._versions.left()
        if window is not None:
            bounds["samples"].append((window, "max_staleness"))
        least = {unit: min(found, default=None) for unit, found in bounds.items()}
        tight = [bound for bound in least.values() if bound is not None]
        named = next((bound for bound in tight if bound[0] == 0), tight[0] if tight else None)
        return {
            "policy_version": self._versions.current,
            **{unit: None if bound is None else bound[0] for unit, bound in least.items()},
            "bounded_by": None if named is None else f"limits.{named[1]}",
        }

    # ------------------------------------------------------------ audit

    def audit(self, name: str | None = None) -> dict[str, Any]:
        """Accounting per partition and task: inserted = pending + reserved + consumed + dropped."""
        if name is not None and name not in self._rows.partitions:
            raise UnknownName(f"no partition {name!r}{nearest(name, self._rows.partitions)}")
        chosen = self._rows.partitions.values() if name is None else [self._rows.partitions[name]]
        return {
            "partitions": {partition.name: self._audit(partition) for partition in chosen},
            "samplers": self._drawing.samplers.names(),
            "waiting": len(self._waiting),
            "blocks": len(self._rows.blocks),
        }

    def _audit(self, partition: Partition) -> dict[str, Any]:
        rows = partition.rows()
        missing = {name: partition.live - state.rows for name, state in partition.fields.items()}
        return {
            "inserted": partition.inserted,
            "live": partition.live,
            "dropped": dict(partition.dropped),
            "fields": {name: state.rows for name, state in partition.fields.items()},
            "lost": {name: sorted(rows) for name, rows in partition.lost.items()},
            "quarantined": list(partition.quarantined),
            "stale": {by: dict(counts) for by, counts in partition.stale.items()},
            "missing": {name: count for name, count in missing.items() if count},
            "groups": len(partition.groups),
            "tasks": {task: self._audit_task(partition, task, rows) for task in partition.accounts},
        }

    def _audit_task(self, partition: Partition, task: str, rows: Int64s) -> dict[str, Any]:
        column, account = self._rows.table.task(task), partition.accounts[task]
        consumed = int(column.consumed[rows].sum())
        reserved = int(column.reserved[rows].sum())
        found: dict[str, Any] = {
            "inserted": partition.inserted,
            "pending": len(rows) - consumed - reserved,
            "reserved": reserved,
            "consumed": consumed + account.consumed_and_cleared,
            "dropped": dict(account.dropped),
        }
        settled = dict(account.leases)
        granted = settled.pop("granted", 0)
        still = sum(int(lease.open.sum()) for lease in self._leases.of_partition(partition.name, task))
        if granted:
            found["leases"] = {"granted": granted, **settled, "open": still}
            found["redelivered"] = account.redelivered
        accounted = found["pending"] + found["reserved"] + found["consumed"] + sum(account.dropped.values())
        balanced = accounted == partition.inserted and granted == sum(settled.values()) + still
        return found | {"balanced": balanced}

    # ------------------------------------------------------------ explanation

    def timeout(self, draw: Draw, plan: Plan, name: str, waited_s: float, now: float) -> GetMetaTimeout:
        """The error of a draw that waited in vain."""
        text = self._explain(name, draw.task_name, draw.fields, plan.want, now, plan)
        return GetMetaTimeout(f"after {waited_s:.1f} s: {text}")

    def explain(self, request: GetExplanation, now: float) -> str:
        """Why such a draw is not served now."""
        name = self._rows.name(request.partition_id, request.global_step)
        return self._explain(name, request.task_name, request.fields, request.batch_size, now, None)

    def _explain(self, name: str, task: str, fields: tuple[str, ...], want: int, now: float, plan: Plan | None) -> str:
        partition = self._rows.partitions.get(name)
        if partition is None:
            text = f"there is no partition {name!r} yet{nearest(name, self._rows.partitions)}; nothing was put into it"
            return "; ".join([text, *self._kept_out(name, now)])
        ready = self._ready(partition, task, fields)
        parts = [f"{ready} of {want} samples ready in partition {name!r} for task {task!r}"]
        parts += ["its last rows were put (is_last)"] if partition.sealed else []
        parts += self._missing_fields(partition, fields, now)
        parts += self._lost(partition, fields)
        parts += self._taken(partition, task)
        parts += self._leased(partition, task, now)
        parts += filter(None, [self._versions.explained(partition)])
        parts += self._kept_out(name, now)
        if plan is not None:
            parts += self._incomplete_groups(partition, task, fields, plan)
            rule = " lets rows pass by a filter of its own" if has_filter(plan.sampler) else ""
            parts.append(f"sampler {plan.sampler!r}{rule}")
        if task not in self._rows.table.tasks or not self._rows.table.tasks[task].consumed.any():
            others = [known for known in self._rows.table.tasks if known != task]
            if close := nearest(task, others).partition("did you mean ")[2]:
                parts.append(f"task {task!r} has consumed nothing so far (did you mean {close}")
        return "; ".join(parts)

    def _ready(self, partition: Partition, task: str, fields: tuple[str, ...]) -> int:
        """Number of ready rows; by a scan where no draw of this kind was seen, which leaves no trace."""
        known = partition.ready.get(ready_key(task, fields))
        if known is not None:
            return len(known)
        rows, table = partition.rows(), self._rows.table
        column = table.tasks.get(task)
        if column is None:
            return int((table.produced(rows, fields) & ~table.outdated(rows)).sum())
        return int(table.available(rows, fields, column).sum())

    def _missing_fields(self, partition: Partition, fields: tuple[str, ...], now: float) -> Iterable[str]:
        for field in fields:
            state = partition.fields.get(field)
            if state is None:
                yield f"field {field!r} was not produced by anyone{nearest(field, partition.fields)}"
            elif state.rows < partition.live:
                yield (
                    f"{partition.live - state.rows} wait for field {field!r} "
                    f"(last produced {max(now - state.produced_at, 0.0):.1f} s ago by client {state.produced_by!r})"
                )

    def _lost(self, partition: Partition, fields: tuple[str, ...]) -> Iterable[str]:
        for field in fields:
            if field in partition.lost:
                rows = sorted(partition.lost[field])
                shown = f"{', '.join(map(str, rows[:_SHOWN]))}{', …' if len(rows) > _SHOWN else ''}"
                yield f"field {field!r} of {len(rows)} samples was lost with a storage unit (global indexes {shown})"

    def _leased(self, partition: Partition, task: str, now: float) -> Iterable[str]:
        open_leases = self._leases.of_partition(partition.name, task)
        if open_leases:
            held = ", ".join(
                f"{lease.held} by client {shown(lease.client)!r} for {max(lease.deadline - now, 0.0):.1f} s more"
                for lease in open_leases[:_SHOWN]
            )
            more = ", …" if len(open_leases) > _SHOWN else ""
            yield f"{sum(lease.held for lease in open_leases)} are leased: {held}{more}"

    def _kept_out(self, name: str, now: float) -> Iterable[str]:
        """Rows that a draw may wait for in vain: they wait themselves until others are cleared."""
        puts = [waiting for waiting in self._waiting.puts() if waiting.partition == name]
        if puts:
            first = puts[0]
            reason = self._gate.too_late(first.put, name, first.client, now - first.since)
            yield f"{len(puts)} puts into it wait until samples are cleared ({reason})"

    def _taken(self, partition: Partition, task: str) -> Iterable[str]:
        column = self._rows.table.tasks.get(task)
        if column is None:
            return
        consumed = int(column.consumed[partition.rows()].sum())
        if consumed:
            yield f"{consumed} of {partition.live} are consumed already"
        for name, assignment in self._drawing.assignments.of_partition(partition.name):
            missing = assignment.missing
            if name == task and missing:
                kind, group, number = assignment.key
                if kind == "kept":
                    which = f"the sampler for dp_rank {group!r}, batch_index {number!r}"
                else:
                    which = f"dp_group_id {group!r}" if kind == "named" else f"unnamed dp group {number}"
                held = len(self._rows.table.alive(assignment.held))
                served = sorted(assignment.deliveries)
                yield f"{held} are reserved by {which} (served ranks {served}, waits for ranks {missing})"

    def _incomplete_groups(self, partition: Partition, task: str, fields: tuple[str, ...], plan: Plan) -> Iterable[str]:
        size = plan.group_size
        if size is None:
            return
        yield f"{partition.ready_set(task, fields).groups(size).total} complete groups of {size}"
        short = [group for group in partition.groups.values() if group.size < group.expected]
        if short:
            shown = ", ".join(f"{g.group_id!r} has {g.size} of {g.expected}" for g in short[:_SHOWN])
            yield f"{len(short)} groups lack rows: {shown}{', …' if len(short) > _SHOWN else ''}"
