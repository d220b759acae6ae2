"""The shape of one step of reinforcement learning: prompts, rollouts, rewards, log-probs of a reference, four trainers.

Every stage draws, "computes" and puts, all at once, in micro-batches; computing takes no time here, what a model would
produce lies ready or is a trivial function of what was drawn. What remains is what a trainer waits for because of the
queue. Time of a stage is split in waiting (draws) and moving (gets and puts). Values are compared in the steps before
and after those that count; that every response came out once, in each.

G responses per prompt · T tokens of a response, other for each · R ranks of the trainer
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks import batches
from benchmarks.accounting import processes, watched
from benchmarks.figures import Report
from benchmarks.placement import PATIENCE_S, Answer, Placement
from benchmarks.scale import Scale

if TYPE_CHECKING:
    from tensordict import TensorDict

    from transfer_queue import TransferQueueClient

CASE = "rl_step"
GROUP = 8
ROLLOUTS = 2
RANKS = 4
FRACTIONS = 8  # micro-batches of the scorers, and of each rank

PROMPT_FIELDS = ("prompt_ids", "uid")
RESPONSE_FIELDS = ("input_ids", "response_mask", "old_log_probs", "uid")
TRAINER_FIELDS = (*RESPONSE_FIELDS, "reward", "ref_log_probs")

_PROMPT_TOKENS = 256  # at most
_WAIT_S = 60.0
_PER_TOKEN = 1e-6  # log-prob of a token: minus its id times this


@dataclass
class Spent:
    """What one stage did in a step: seconds in draws, gets and puts; bytes got and put; rows seen."""

    wait_s: float = 0.0
    get_s: float = 0.0
    put_s: float = 0.0
    moved_bytes: int = 0
    rows: int = 0
    uids: list[int] = field(default_factory=list)  # of the rows, for trainers


class _Worker:
    """A stage with a client, and a clock for what it does with it."""

    def __init__(self, client: TransferQueueClient) -> None:
        self._client = client
        self._spent = Spent()

    def _draw(self, fields: tuple[str, ...], rows: int, partition: str, task: str, **options: Any) -> Any:
        """Return meta and data of a micro-batch."""
        with self._timed("wait_s"):
            meta = self._client.get_meta(list(fields), rows, partition, task_name=task, timeout=_WAIT_S, **options)
        with self._timed("get_s"):
            data = self._client.get_data(meta)
        self._count(data)
        self._spent.rows += rows
        return meta, data

    def _put(self, data: TensorDict | dict[str, Any], **options: Any) -> None:
        with self._timed("put_s"):
            self._client.put(data, **options)
        self._count(data)

    def _count(self, data: Any) -> None:
        self._spent.moved_bytes += batches.size_bytes(data)

    def _done(self) -> Spent:
        """What was spent since the last time."""
        spent, self._spent = self._spent, Spent()
        return spent

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        setattr(self._spent, name, getattr(self._spent, name) + time.perf_counter() - begin)


class Prompter(_Worker):
    """Puts the prompts of a step, and removes it when it is over."""

    def step(self, name: str, prompts: int) -> Spent:
        make = torch.Generator().manual_seed(0)
        lengths = torch.randint(1, _PROMPT_TOKENS + 1, (prompts,), generator=make)
        tokens = torch.randint(0, 150_000, (int(lengths.sum()),), generator=make)
        column = torch.nested.nested_tensor_from_jagged(tokens, _offsets(lengths))
        self._put({"prompt_ids": column, "uid": torch.arange(prompts)}, partition_id=f"prompts-{name}")
        return self._done()

    def clear(self, name: str) -> None:
        for kind in ("prompts", "responses"):
            self._client.clear_partition(f"{kind}-{name}")


class Rollout(_Worker):
    """Draws some prompts, puts G responses to each."""

    def __init__(self, client: TransferQueueClient, prompts: int, tokens: int) -> None:
        super().__init__(client)
        self._ready = responses(prompts * GROUP, tokens)

    def step(self, name: str, prompts: int, chunk: int) -> Spent:
        for _ in range(prompts // chunk):
            _, data = self._draw(PROMPT_FIELDS, chunk, f"prompts-{name}", "rollout")
            uids = data["uid"].repeat_interleave(GROUP)
            self._put(
                {**self._ready, "uid": uids},
                partition_id=f"responses-{name}",
                group_ids=uids.tolist(),
                group_size=GROUP,
            )
        return self._done()


class Reward(_Worker):
    """Adds the number of tokens as the reward of each response."""

    def step(self, name: str, rows: int) -> Spent:
        for _ in range(FRACTIONS):
            fields = ("input_ids", "response_mask")
            meta, data = self._draw(fields, rows // FRACTIONS, f"responses-{name}", "reward")
            self._put({"reward": data["input_ids"].offsets().diff().float()}, metadata=meta)
        return self._done()


class Reference(_Worker):
    """Adds log-probs per token."""

    def step(self, name: str, rows: int) -> Spent:
        for _ in range(FRACTIONS):
            meta, data = self._draw(("input_ids",), rows // FRACTIONS, f"responses-{name}", "reference")
            ids = data["input_ids"]
            column = torch.nested.nested_tensor_from_jagged(_log_probs(ids.values()), offsets=ids.offsets())
            self._put({"ref_log_probs": column}, metadata=meta)
        return self._done()


class Trainer(_Worker):
    """One rank: draws its slice of every micro-batch and compares it with what was put."""

    def step(self, name: str, rows: int, rank: int, compare: bool) -> Spent:
        """Raises `ValueError` if values are to be compared and one differs."""
        uids: list[int] = []
        for number in range(FRACTIONS):
            split = {"dp_rank": rank, "dp_size": RANKS, "dp_group_id": f"{name}-{number}"}
            _, data = self._draw(
                TRAINER_FIELDS, rows // RANKS // FRACTIONS, f"responses-{name}", "train", sampler_params=split
            )
            if compare:
                check(data)
            uids += data["uid"].tolist()
        spent = self._done()
        spent.uids = uids
        return spent


def measure(report: Report, scale: Scale, placement: Placement) -> None:
    """Add the time of a step, and per kind of stage (the slowest of its kind) what it waited and moved."""
    prompts, chunk = scale.step_prompts, scale.step_prompts // ROLLOUTS // FRACTIONS
    rows = prompts * GROUP
    prompter = placement.stage(Prompter)
    rollout = partial(Rollout, prompts=chunk, tokens=scale.step_tokens)
    rollouts = [placement.stage(rollout) for _ in range(ROLLOUTS)]
    reward, reference = placement.stage(Reward), placement.stage(Reference)
    trainers = [placement.stage(Trainer) for _ in range(RANKS)]
    stages = {
        "prompts": prompter,
        **{f"rollout {n}": stage for n, stage in enumerate(rollouts)},
        "reward": reward,
        "reference": reference,
        **{f"trainer {n}": stage for n, stage in enumerate(trainers)},
    }
    names = processes(stages)
    arguments: dict[str, tuple[int, ...]] = {"prompts": (prompts,), "reward": (rows,), "reference": (rows,)}
    arguments |= {f"rollout {n}": (prompts // ROLLOUTS, chunk) for n in range(ROLLOUTS)}

    def step(name: str, compare: bool) -> tuple[float, dict[str, Spent]]:
        """Let all stages work at once; return the seconds, and what each of them spent."""
        ranks = {f"trainer {n}": (rows, n, compare) for n in range(RANKS)}
        begin = time.perf_counter()
        answers: dict[str, Answer] = {
            one: stage.begin("step", name, *(ranks | arguments)[one]) for one, stage in stages.items()
        }
        spent: dict[str, Spent] = {one: answer.result(PATIENCE_S) for one, answer in answers.items()}
        duration_s = time.perf_counter() - begin
        check_complete([spent[rank].uids for rank in ranks], prompts)
        prompter.call("clear", name)
        return duration_s, spent

    case = f"{CASE}, {prompts} prompts × {GROUP}"
    for number in range(scale.warm_up):
        step(f"warm-up-{number}", compare=True)
    total, moved = report.series(case, "step"), 0
    with watched(names) as watch:
        for number in range(scale.rounds):
            duration_s, spent = step(str(number), compare=False)
            total.add(duration_s)
            _add(report, case, spent)
            moved += sum(one.moved_bytes for one in spent.values())
    step("last", compare=True)
    report.quantity(case, "moved per step, puts and gets", moved / 1e6 / scale.rounds, "MB")
    report.quantity(case, "rows compared, before and after", rows * (scale.warm_up + 1), "rows")
    watch.report(report, case, moved_bytes=moved)


def _add(report: Report, case: str, spent: dict[str, Spent]) -> None:
    for kind in dict.fromkeys(name.partition(" ")[0] for name in spent):
        alike = [one for name, one in spent.items() if name.partition(" ")[0] == kind]
        for what, seconds in (
            ("waits", max(one.wait_s for one in alike)),
            ("gets", max(one.get_s for one in alike)),
            ("puts", max(one.put_s for one in alike)),
        ):
            if not seconds:  # prompts are not drawn, trainers put nothing
                continue
            measure = f"{kind} {what}"
            (report.find(case, measure) or report.series(case, measure)).add(seconds)


# ---------------------------------------------------------------- data


def responses(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """Columns [rows, T] of responses of 1 to `tokens` tokens."""
    make = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, tokens + 1, (rows,), generator=make)
    offsets = _offsets(lengths)
    ids = torch.randint(0, 150_000, (int(offsets[-1]),), generator=make)
    values = {"input_ids": ids, "response_mask": (ids % 2).int(), "old_log_probs": _log_probs(ids)}
    return {name: torch.nested.nested_tensor_from_jagged(column, offsets) for name, column in values.items()}


def _offsets(lengths: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def _log_probs(ids: torch.Tensor) -> torch.Tensor:
    return ids.float() * -_PER_TOKEN


def check(data: Any) -> None:
    """Every column is a function of the tokens."""
    ids = data["input_ids"]
    lengths, tokens = ids.offsets().diff(), ids.values()
    expected = {
        "response_mask": (tokens % 2).int(),
        "old_log_probs": _log_probs(tokens),
        "ref_log_probs": _log_probs(tokens),
    }
    wrong = [name for name, values in expected.items() if not torch.equal(data[name].values(), values)]
    if wrong or not torch.equal(data["reward"], lengths.float()):
        raise ValueError(f"a trainer got other values than were put in {wrong or 'reward'}")


def check_complete(uids: list[list[int]], prompts: int) -> None:
    counts = np.bincount(np.concatenate(uids), minlength=prompts)
    if len(counts) != prompts or (counts != GROUP).any():
        raise ValueError(
            f"the trainers got {counts.sum()} responses to {np.count_nonzero(counts)} of {prompts} prompts"
        )
