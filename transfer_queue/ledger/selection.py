"""Which sampler serves a draw, and one guarded call of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import InvalidArgument, SamplerError, WrongType
from transfer_queue.ledger.guarding import guarded, state_of
from transfer_queue.ledger.partition import Partition
from transfer_queue.ledger.ready import GroupHeadsView, ReadySet, RowsView
from transfer_queue.ledger.table import NO_VERSION, RowTable
from transfer_queue.messages import Draw
from transfer_queue.samplers import BaseSampler, DPSampler, SequentialSampler, as_sampler, create_sampler
from transfer_queue.samplers.dp import check_rank
from transfer_queue.samplers.registry import SamplerLike, accepted_names

Int64s: TypeAlias = NDArray[np.int64]

_MOST_PLANS = 1024
_OWN_PARAMETERS = ("sampler", "dp_rank", "dp_size", "dp_group_id")  # for the controller, not for samplers


@dataclass(frozen=True)
class Split:
    """The data-parallel part of a draw."""

    rank: int
    size: int
    group: str | int | None
    batch_index: int


@dataclass(frozen=True)
class Plan:
    """How a draw will be served: by which sampler, over whole groups or not, split over ranks or not."""

    sampler: BaseSampler
    group_size: int | None  # rows of a group, where whole groups are handed out
    by_heads: bool  # whole groups on top of a sampler that knows none: it chooses among their first rows
    split: Split | None
    want: int  # rows of all ranks together

    @cached_property
    def least(self) -> int:
        """With fewer ready rows the sampler need not be asked. Groups may have fewer rows than `group_size`."""
        return 1 if self.sampler.accepts_partial or self.filters or self.group_size is not None else self.want

    def sampler_state(self) -> dict[str, Any] | None:
        """What a sampler that keeps state has to be given back after a restart. Raises `SamplerError`."""
        return state_of(self.sampler)

    @property
    def filters(self) -> bool:
        """The sampler looks at more than the ready rows."""
        return has_filter(self.sampler)


class SamplerBook:
    """The samplers of the tasks: a request's own, else the task's, else the default."""

    def __init__(self, default: SamplerLike | None, num_n_samples: int) -> None:
        self._default = SequentialSampler() if default is None else as_sampler(default)
        self._by_task: dict[str, BaseSampler] = {}
        self._by_request: dict[tuple[str, str], BaseSampler] = {}
        self._plans: dict[tuple[str, int, bool], Plan] = {}  # of draws without parameters of their own
        self.made: dict[str | None, str | tuple[str, dict[str, Any]]] = {}  # by task: a description, or how to make it
        self.lost: dict[str | None, str] = {}  # samplers given as objects, before a restart
        self.states: dict[
            str | None, dict[str, Any]
        ] = {}  # by task: what its sampler last remembered, before a restart
        self.num_n_samples = num_n_samples

    def register(
        self, task: str | None, sampler: SamplerLike, by: tuple[str, dict[str, Any]] | None = None
    ) -> BaseSampler:
        """From now on this sampler serves the task, or all without their own. `by`: (name, arguments) it is made by."""
        made = as_sampler(sampler)
        self._plans.clear()
        self.lost.pop(task, None)
        self._give_state(task, made)
        self.made[task] = by or repr(made)
        if task is None:
            self._default = made
        else:
            self._by_task[task] = made
        return made

    def lose(self, task: str | None, described: str) -> None:
        """A sampler was given as an object, which nothing has kept: until it is given again, its draws raise."""
        self.lost[task] = described
        self.made.pop(task, None)
        self._plans.clear()

    def restore_state(self, draw: Draw, state: dict[str, Any] | None) -> None:
        """Note what the sampler of this draw remembered; given to it now, or when it is registered again."""
        if state is None or "sampler" in draw.sampler_params:
            return
        task = draw.task_name if draw.task_name in self._by_task or draw.task_name in self.lost else None
        self.states[task] = state
        if task not in self.lost:
            self._give_state(task, self._by_task[task] if task is not None else self._default)

    def _give_state(self, task: str | None, sampler: BaseSampler) -> None:
        load = getattr(sampler, "load_state_dict", None)
        state = self.states.pop(task, None)
        if load is not None and state is not None:
            guarded(sampler, lambda: load(state))

    def state(self) -> dict[str, Any]:
        """Which tasks have samplers of their own and how to get them back, and what samplers remember."""
        samplers: list[tuple[str | None, Any]] = [(None, self._default), *self._by_task.items()]
        states = {task: state for task, made in samplers if (state := state_of(made)) is not None}
        states |= self.states
        made = [(task, how) for task, how in self.made.items() if isinstance(how, tuple)]
        objects = {task: how for task, how in self.made.items() if isinstance(how, str)}
        return {"made": made, "lost": sorted((self.lost | objects).items(), key=repr), "states": list(states.items())}

    def load(self, state: dict[str, Any]) -> None:
        """Make the samplers that were registered by name again; the others are lost until they are given again."""
        self.lost = {task: described for task, described in state["lost"] if task not in self.made}
        self.states = dict(state["states"])
        for task in list(self.states):
            if task is None or task in self._by_task:
                self._give_state(task, self._by_task[task] if task is not None else self._default)
        for task, (name, arguments) in state["made"]:
            self.register(task, create_sampler(name, **arguments), (name, arguments))

    def names(self) -> dict[str, str]:
        """What serves whom, for people."""
        return {"": repr(self._default), **{task: repr(sampler) for task, sampler in self._by_task.items()}}

    def plan(self, draw: Draw) -> Plan:
        """Raise for a request that no state of the queue could serve."""
        if draw.sampler_params:
            return self._make_plan(draw)
        key = (draw.task_name, draw.batch_size, draw.get_n_samples)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._make_plan(draw)
            if len(self._plans) < _MOST_PLANS:
                self._plans[key] = plan
        return plan

    def _make_plan(self, draw: Draw) -> Plan:
        sampler = self._choose(draw)
        split = _split(draw.sampler_params, sampler)
        if isinstance(sampler, DPSampler):
            sampler = sampler.inner
        group_size = self._group_size(draw, sampler)
        arguments = _fitting(sampler.check_request, self._offered(draw))
        guarded(sampler, lambda: sampler.check_request(draw.batch_size, **arguments))
        if group_size is not None and draw.batch_size % group_size:
            raise InvalidArgument(
                f"batch_size ({draw.batch_size}) must be divisible by num_n_samples ({group_size}) "
                "when whole groups are asked for"
            )
        by_heads = group_size is not None and not sampler.whole_groups
        return Plan(sampler, group_size, by_heads, split, draw.batch_size * (split.size if split else 1))

    def _group_size(self, draw: Draw, sampler: BaseSampler) -> int | None:
        if not draw.get_n_samples and not sampler.whole_groups:
            return None
        own = getattr(sampler, "num_n_samples", None) if sampler.whole_groups else None
        size = own or draw.sampler_params.get("num_n_samples", self.num_n_samples)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InvalidArgument(f"num_n_samples must be a whole number of at least 1, not {size!r}")
        return size

    def _choose(self, draw: Draw) -> BaseSampler:
        name = draw.sampler_params.get("sampler")
        if name is None:
            self._check_lost(draw.task_name)
            return self._by_task.get(draw.task_name, self._default)
        if not isinstance(name, str):
            raise WrongType(f"sampler_params['sampler'] must be a registered name, not {name!r}")
        key = (draw.task_name, name)
        if key not in self._by_request:
            self._by_request[key] = create_sampler(name)
        return self._by_request[key]

    def _check_lost(self, task: str) -> None:
        missing = task if task in self.lost else None if None in self.lost and task not in self._by_task else ""
        if missing != "":
            which = "the default sampler" if missing is None else f"the sampler of task {task!r}"
            raise InvalidArgument(
                f"{which}, {self.lost[missing]}, was given as an object and is gone since the controller was started "
                "again: register it again"
            )

    def _offered(self, draw: Draw) -> dict[str, Any]:
        offered: dict[str, Any] = {"num_n_samples": self.num_n_samples}
        if draw.sampler_params:
            offered.update(draw.sampler_params)
            for name in _OWN_PARAMETERS:
                offered.pop(name, None)
        offered["task_name"] = draw.task_name
        return offered

    def select(self, plan: Plan, draw: Draw, ready: ReadySet, table: RowTable) -> tuple[Int64s, Int64s] | None:
        """Ask the sampler once; None: it cannot serve now. Returns (handed out, marked consumed), checked."""
        sampler = plan.sampler
        view = GroupHeadsView(ready, plan.group_size) if plan.by_heads and plan.group_size else RowsView(ready)
        want = plan.want // plan.group_size if plan.by_heads and plan.group_size else plan.want
        candidates = _candidates(plan, draw, view, ready, table)
        if len(candidates) < want and not sampler.accepts_partial:
            return None
        views = _RowViews(ready.partition, table)
        offered = self._offered(draw)
        offered.update(
            partition_id=ready.partition.name,
            global_step=ready.partition.step,
            group_ids=views.group_ids,
            tags=views.tags,
            seqlens=views.seqlens,
            versions=views.versions,
        )
        offered = _fitting(sampler.sample, offered)
        chosen = guarded(sampler, lambda: sampler.sample(candidates, want, **offered))
        if chosen is None:
            return None
        handed_out, marked = _pair(chosen)
        sampled = _checked(sampler, handed_out, candidates, view)
        consumed = sampled if marked is handed_out else _checked(sampler, marked, candidates, view)
        if len(sampled) == 0:
            return None
        if plan.by_heads and plan.group_size:
            same = consumed is sampled
            sampled = _expand(sampled, plan.group_size, ready, table)
            consumed = sampled if same else _expand(consumed, plan.group_size, ready, table)
        return sampled, consumed


def _split(params: Mapping[str, Any], sampler: BaseSampler) -> Split | None:
    own = sampler if isinstance(sampler, DPSampler) else None
    if own is None and "dp_size" not in params:
        return None
    rank = params.get("dp_rank", own.dp_rank if own else None)
    size = params.get("dp_size", own.dp_size if own else None)
    if rank is None:
        raise InvalidArgument("sampler_params gives dp_size without dp_rank; give both")
    check_rank(rank, size)
    group, batch_index = params.get("dp_group_id"), params.get("batch_index", 0)
    if group is not None and (isinstance(group, bool) or not isinstance(group, str | int)):
        raise WrongType(f"dp_group_id must be a str or int, not {group!r}")
    if isinstance(batch_index, bool) or not isinstance(batch_index, int):
        raise WrongType(f"batch_index must be an int, not {batch_index!r}")
    return Split(rank, size, group, batch_index)


def has_filter(sampler: BaseSampler) -> bool:
    """Has the sampler a filter of its own?"""
    return type(sampler).filter_ready_indices is not BaseSampler.filter_ready_indices


def _candidates(plan: Plan, draw: Draw, view: RowsView, ready: ReadySet, table: RowTable) -> Sequence[int]:
    """What the sampler chooses from."""
    if not has_filter(plan.sampler):
        return view if plan.sampler.lazy else view[:].tolist()
    passed = _filtered(plan.sampler, draw, ready, table)
    return passed[view.holds(passed)].tolist() if plan.by_heads else passed.tolist()  # type: ignore[no-any-return]


def _filtered(sampler: BaseSampler, draw: Draw, ready: ReadySet, table: RowTable) -> Int64s:
    """The slow path: a sampler with a filter of its own gets copies of the status arrays.

    Where whole groups are asked for, the sampler chooses among the first rows of the complete ones that it lets pass.
    """
    import torch  # only here: processes that meet no such sampler never load it

    task = table.task(draw.task_name)
    production = np.stack([column.ready for column in table.columns.values()], axis=1) if table.columns else None
    if production is None:
        production = np.zeros((table.capacity, 0), dtype=np.int8)
    consumption = task.consumed | (task.reserved | table.outdated()).astype(np.int8)
    offered = {"partition_id": ready.partition.name, "task_name": draw.task_name, **draw.sampler_params}
    found = guarded(
        sampler,
        lambda: sampler.filter_ready_indices(
            ready.partition.rows().tolist(),
            torch.from_numpy(production),
            torch.from_numpy(consumption),
            list(draw.fields),
            {name: column.number for name, column in table.columns.items()},
            **_fitting(sampler.filter_ready_indices, offered),
        ),
    )
    return _as_rows(sampler, [] if found is None else found)


def _pair(chosen: Any) -> tuple[Any, Any]:
    """(handed out, marked consumed): what a sampler returned, or the same rows twice."""
    if isinstance(chosen, tuple) and len(chosen) == 2 and not isinstance(chosen[0], int | np.integer):
        return chosen
    return chosen, chosen


def _as_rows(sampler: BaseSampler, chosen: Any) -> Int64s:
    try:
        rows = np.asarray(chosen)
    except (TypeError, ValueError):
        rows = np.empty((0, 0))
    if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
        raise SamplerError(f"sampler {sampler!r} returned {chosen!r:.200}, not a flat sequence of indices")
    return rows.astype(np.int64, copy=False)


def _checked(sampler: BaseSampler, chosen: Any, candidates: Sequence[int], view: RowsView) -> Int64s:
    """A row may be handed out once per draw, if it is one of those that the sampler was given."""
    rows = _as_rows(sampler, chosen)
    if rows is view.given:
        return rows
    fits = view.holds(rows)
    if has_filter(sampler):
        fits &= np.isin(rows, np.asarray(candidates, dtype=np.int64))
    if not fits.all():
        raise SamplerError(
            f"sampler {sampler!r} returned rows that are not ready for this draw in partition "
            f"{view.partition.name!r}: {rows[~fits][:10].tolist()}"
        )
    if len(set(rows.tolist())) < len(rows):
        found, counts = np.unique(rows, return_counts=True)
        raise SamplerError(f"sampler {sampler!r} returned rows more than once: {found[counts > 1][:10].tolist()}")
    return rows


def _expand(heads: Int64s, size: int, ready: ReadySet, table: RowTable) -> Int64s:
    """Replace the first row of each group by the whole group."""
    partition = ready.partition
    rows = []
    for row in heads.tolist():
        number = int(table.group[row])
        ordinal = int(table.ordinal[row])
        first = ordinal - ordinal % size
        ordinals = partition.groups[number].ordinals if number >= 0 else partition.groups.by_position(first, size)
        rows.append(partition.rows_at(ordinals))
    return np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)


class _ByIndex(Mapping[int, Any]):
    """A lazy view: global index → value, only of the rows that have one."""

    def __init__(self, partition: Partition, table: RowTable, look: Callable[[int], Any]) -> None:
        self._partition, self._table, self._look = partition, table, look

    def __getitem__(self, row: int) -> Any:
        own = 0 <= row < self._table.capacity and self._table.partition[row] == self._partition.number
        value = self._look(row) if own else None
        if value is None:
            raise KeyError(row)
        return value

    def __iter__(self) -> Iterator[int]:
        return (row for row in self._partition.rows().tolist() if self._look(row) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class _RowViews:
    """What samplers may know about rows beside that they are ready."""

    def __init__(self, partition: Partition, table: RowTable) -> None:
        self.group_ids = _ByIndex(partition, table, partition.group_id)
        self.tags = _ByIndex(partition, table, lambda row: dict(table.tags[row]) if row in table.tags else None)
        self.seqlens = _ByIndex(partition, table, lambda row: table.tags.get(row, {}).get("seq_len"))
        self.versions = _ByIndex(partition, table, lambda row: _version(table, row))


def _version(table: RowTable, row: int) -> int | None:
    version = int(table.version[row])
    return None if version == NO_VERSION else version


def _fitting(function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """The offered keywords that the function takes."""
    accepted = accepted_names(function)
    return offered if accepted is None else {name: value for name, value in offered.items() if name in accepted}
