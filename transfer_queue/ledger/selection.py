"""Which sampler serves a draw, and one guarded call of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import InvalidArgument, WrongType
from transfer_queue.ledger.choices import as_rows, checked, checked_again, expanded, pair_of
from transfer_queue.ledger.guarding import guarded, has_own_state, state_of
from transfer_queue.ledger.partition import Partition
from transfer_queue.ledger.ready import GroupHeadsView, ReadySet, RowsView
from transfer_queue.ledger.registered import RegisteredSamplers
from transfer_queue.ledger.table import RowTable
from transfer_queue.ledger.views import PartitionView, RowViews
from transfer_queue.messages import Draw
from transfer_queue.samplers import BaseSampler, DPSampler, SequentialSampler
from transfer_queue.samplers.dialect import returns_pairs
from transfer_queue.samplers.dp import check_rank
from transfer_queue.samplers.pairs import BatchKeeper
from transfer_queue.samplers.registry import SamplerLike, accepted_names

if TYPE_CHECKING:
    from transfer_queue.ledger.assignments import Assignment

Int64s: TypeAlias = NDArray[np.int64]

_MOST_PLANS = 1024
_OFFERED = {"num_n_samples", "task_name", "partition", "partition_id", "global_step", *RowViews.NAMES}
_OWN_PARAMETERS = ("sampler", "dp_rank", "dp_size", "dp_group_id")  # for the controller, not for samplers


@dataclass(frozen=True)
class Split:
    """The data-parallel part of a draw.

    `group` is what the request calls it, None if it does not, or `(dp_rank,)` for the whole batch that a sampler
    keeps for this one rank under `batch_index`.
    """

    rank: int
    size: int
    group: str | int | tuple[str | int] | None
    batch_index: Any

    @property
    def kept(self) -> bool:
        """The batch is one that a sampler keeps."""
        return isinstance(self.group, tuple)


@dataclass(frozen=True)
class Plan:
    """How a draw will be served: by which sampler, over whole groups or not, split over ranks or not."""

    sampler: BaseSampler
    group_size: int | None  # rows of a group, where whole groups are handed out
    by_heads: bool  # whole groups on top of a sampler that knows none: it chooses among their first rows
    split: Split | None
    want: int  # rows of all ranks together
    pairs: bool  # the sampler returns (handed out, marked consumed), and may keep batches

    @cached_property
    def least(self) -> int:
        """With fewer ready rows the sampler need not be asked. Groups may have fewer rows than `group_size`."""
        return 1 if self.sampler.accepts_partial or self.filters or self.group_size is not None else self.want

    def sampler_state(self) -> dict[str, Any] | None:
        """What the sampler has to be given back after a restart. Raises `SamplerError`.

        Batches that it keeps for ranks are not in it, unless it says itself what it keeps.
        """
        if has_own_state(type(self.sampler)):
            return state_of(self.sampler)
        by_rank = self.split is not None and self.split.kept
        if not self.pairs or by_rank or isinstance(self.sampler, BatchKeeper):
            return None
        return state_of(self.sampler)

    @property
    def filters(self) -> bool:
        """The sampler looks at more than the ready rows."""
        return has_filter(self.sampler)

    @cached_property
    def is_told(self) -> bool:
        """The sampler looks at something of what it is offered beside rows and their number."""
        if type(self.sampler).sample is SequentialSampler.sample:
            return False
        accepted = accepted_names(self.sampler.sample)
        return accepted is None or not accepted.isdisjoint(_OFFERED)


class SamplerBook(RegisteredSamplers):
    """The samplers of the tasks, and how a draw uses its own."""

    def __init__(self, default: SamplerLike | None, num_n_samples: int) -> None:
        super().__init__(default)
        self._plans: dict[tuple[str, int, bool], Plan] = {}  # of draws without parameters of their own
        self.num_n_samples = num_n_samples

    def register(
        self, task: str | None, sampler: SamplerLike, by: tuple[str, dict[str, Any]] | None = None
    ) -> BaseSampler:
        made = super().register(task, sampler, by)
        self._plans.clear()
        return made

    def lose(self, task: str | None, described: str) -> None:
        super().lose(task, described)
        self._plans.clear()

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
        name = draw.sampler_params.get("sampler")
        if name is not None and not isinstance(name, str):
            raise WrongType(f"sampler_params['sampler'] must be a registered name, not {name!r}")
        sampler = self.choose(draw)
        pairs = returns_pairs(sampler)
        split = _split(draw.sampler_params, sampler, pairs)
        if isinstance(sampler, DPSampler):
            sampler = sampler.inner
            pairs = returns_pairs(sampler)
        group_size = self._group_size(draw, sampler)
        arguments = _fitting(sampler.check_request, self._offered(draw, pairs, split))
        guarded(sampler, lambda: sampler.check_request(draw.batch_size, **arguments))
        if group_size is not None and draw.batch_size % group_size:
            raise InvalidArgument(
                f"batch_size ({draw.batch_size}) must be divisible by num_n_samples ({group_size}) "
                "when whole groups are asked for"
            )
        by_heads = group_size is not None and not sampler.whole_groups
        return Plan(sampler, group_size, by_heads, split, draw.batch_size * (split.size if split else 1), pairs)

    def _group_size(self, draw: Draw, sampler: BaseSampler) -> int | None:
        if not draw.get_n_samples and not sampler.whole_groups:
            return None
        own = getattr(sampler, "num_n_samples", None) if sampler.whole_groups else None
        size = own or draw.sampler_params.get("num_n_samples", self.num_n_samples)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InvalidArgument(f"num_n_samples must be a whole number of at least 1, not {size!r}")
        return size

    def _offered(self, draw: Draw, pairs: bool, split: Split | None) -> dict[str, Any]:
        offered: dict[str, Any] = {} if pairs else {"num_n_samples": self.num_n_samples}
        if draw.sampler_params:
            offered.update(draw.sampler_params)
            for name in () if pairs and (split is None or split.kept) else _OWN_PARAMETERS:
                offered.pop(name, None)
        offered["task_name"] = draw.task_name
        return offered

    def select(
        self, plan: Plan, draw: Draw, ready: ReadySet, table: RowTable, before: Assignment | None = None
    ) -> tuple[Int64s, Int64s] | None:
        """Ask the sampler once; None: it cannot serve now. Returns (handed out, marked consumed), checked.

        `before`: the batch that the rank has from this sampler; if it is returned again, as the arrays of `before`.
        """
        sampler = plan.sampler
        view = GroupHeadsView(ready, plan.group_size) if plan.by_heads and plan.group_size else RowsView(ready)
        want = plan.want // plan.group_size if plan.by_heads and plan.group_size else plan.want
        candidates = _candidates(plan, draw, view, ready, table)
        short = len(ready) < plan.least or (len(candidates) < want and not sampler.accepts_partial)
        if short and not self.has_cached_result(plan, draw, ready.partition.name):
            return None
        offered: dict[str, Any] = {}
        if plan.is_told or draw.sampler_params:
            offered = self._offered(draw, plan.pairs, plan.split)
            offered.update(_described(plan, ready.partition, table))
            offered = _fitting(sampler.sample, offered)
        chosen = guarded(sampler, lambda: pair_of(sampler, sampler.sample(candidates, want, **offered)))
        if chosen is None:
            return None
        handed_out, marked = chosen
        rows = as_rows(sampler, handed_out)
        if len(rows) == 0:
            return None
        if before is not None and self._is_again(plan, rows, ready.partition, table, before):
            checked_again(sampler, marked, before.chosen.rows, before.consumed)
            return before.chosen.rows, before.consumed
        given = candidates if has_filter(sampler) else None
        sampled = checked(sampler, rows, given, view)
        consumed = sampled if marked is handed_out else checked(sampler, as_rows(sampler, marked), given, view)
        if plan.by_heads and plan.group_size:
            same = consumed is sampled
            sampled = expanded(sampled, plan.group_size, ready.partition, table)
            consumed = sampled if same else expanded(consumed, plan.group_size, ready.partition, table)
        return sampled, consumed

    def has_cached_result(self, plan: Plan, draw: Draw, partition: str) -> bool:
        """Does the sampler keep a batch for this request? None of the native ones does."""
        if not plan.pairs:
            return False
        sampler = plan.sampler
        config = dict(draw.sampler_params)
        return bool(guarded(sampler, lambda: sampler.has_cached_result(partition, draw.task_name, config)))

    @staticmethod
    def _is_again(plan: Plan, rows: Int64s, partition: Partition, table: RowTable, before: Assignment) -> bool:
        batch = before.chosen.rows
        if not np.isin(rows, batch).all():
            return False
        whole = expanded(rows, plan.group_size, partition, table) if plan.by_heads and plan.group_size else rows
        return np.array_equal(whole, batch)


def _described(plan: Plan, partition: Partition, table: RowTable) -> dict[str, Any]:
    """What a sampler is told of the place where it draws."""
    if plan.pairs:
        return {"partition": PartitionView(partition, table), "partition_id": partition.name}
    views = RowViews(partition, table)
    told = {"partition_id": partition.name, "global_step": partition.step}
    return told | {name: getattr(views, name) for name in RowViews.NAMES}


def _split(params: Mapping[str, Any], sampler: BaseSampler, pairs: bool) -> Split | None:
    own = sampler if isinstance(sampler, DPSampler) else None
    if pairs:
        rank, kept_by = params.get("dp_rank"), params.get("batch_index")
        if not isinstance(rank, int | str) or not isinstance(kept_by, int | str | None):
            return None
        return Split(0, 1, (rank,), kept_by)
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
    arguments = (
        ready.partition.rows().tolist(),
        torch.from_numpy(production),
        torch.from_numpy(consumption),
        list(draw.fields),
        {name: column.number for name, column in table.columns.items()},
    )
    fitting = _fitting(sampler.filter_ready_indices, offered)
    found = guarded(sampler, lambda: as_rows(sampler, sampler.filter_ready_indices(*arguments, **fitting)))
    return np.empty(0, np.int64) if found is None else found


def _fitting(function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """The offered keywords that the function takes."""
    accepted = accepted_names(function)
    return offered if accepted is None else {name: value for name, value in offered.items() if name in accepted}
