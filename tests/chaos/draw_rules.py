"""What must be true of what draws returned: whole groups, slices that stay as they are, and nothing that is gone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise

from tests.chaos.record import Record
from tests.chaos.roles import PARTITIONS, SLICE, TASKS
from tests.chaos.samples import GROUP
from tests.chaos.sidelog import OK, Told

_UNKNOWN = (None, "ConnectionLost")  # the call may have taken effect


def groups(record: Record) -> Iterator[str]:
    """Who draws whole groups gets them whole, their samples side by side; nobody gets a sample twice in one draw."""
    for call in _draws(record):
        keys = [int(key) for key in call.get("keys")]
        if len(set(keys)) < len(keys):
            yield f"a draw returned a sample more than once: {call}"
        if call.facts["task"] == "look":
            torn = [keys[at : at + GROUP] for at in range(0, len(keys), GROUP)]
            if any(found != list(range(found[0] - found[0] % GROUP, found[0] - found[0] % GROUP + GROUP))
                   for found in map(sorted, torn)):  # fmt: skip
                yield f"a draw returned groups that are not whole: {call}"


def slices(record: Record) -> Iterator[str]:
    """The rows of a step are those of one rank each, and a rank that asks again gets the same ones."""
    ranks: dict[tuple[str, str], dict[str, set[str]]] = defaultdict(dict)
    for call in _draws(record):
        if call.facts["task"] != "train":
            continue
        rank, step = call.life.split("-")[1], (call.facts["partition"], call.facts["group"])
        keys = set(call.get("keys"))
        first = ranks[step].setdefault(rank, keys)
        if len(keys) != SLICE:
            yield f"a rank got {len(keys)} samples for {step}, not {SLICE}: {call}"
        if keys != first:
            yield f"rank {rank} got {sorted(keys)} for {step}, and {sorted(first)} before: {call}"
    for step, by_rank in ranks.items():
        twice = [key for key, times in Counter(key for keys in by_rank.values() for key in keys).items() if times > 1]
        if twice:
            yield f"samples {sorted(twice)} went to several ranks for {step}"


def grants(record: Record) -> Iterator[str]:
    """Each grant has a token of its own, and a sample that was given back has a higher number at its next delivery."""
    for task in TASKS:
        by_sample: dict[str, dict[int, int]] = defaultdict(dict)
        drawn: dict[int, Told] = {}
        for call in _draws(record):
            if call.facts["task"] != task or call.get("replayed"):
                continue
            token, keys = call.get("token"), call.get("keys")
            other = drawn.setdefault(token, call)
            if other is not call:
                yield f"task {task}: lease {token} was granted twice: {other}; {call}"
            for key, number in zip(keys, call.get("deliveries") or [1] * len(keys), strict=True):
                by_sample[key][token] = number
        for key, numbers in by_sample.items():
            told = [number for _, number in sorted(numbers.items())]
            if any(later <= earlier for earlier, later in pairwise(told)):
                yield f"task {task}: the deliveries of sample {key} have numbers {told}: {record.story(int(key))}"


def counted(record: Record) -> Iterator[str]:
    """What acknowledgements said that they consumed, and releases gave back, is what the accounts say."""
    for task in TASKS:
        accounts = [found["tasks"].get(task, {}) for name, found in record.audit["partitions"].items()
                    if name in PARTITIONS]  # fmt: skip
        consumed = sum(each.get("consumed", 0) for each in accounts)
        acked, released = (sum(each.get("leases", {}).get(what, 0) for each in accounts)
                           for what in ("acked", "released"))  # fmt: skip
        calls = [call for call in record.calls("ack", "release") if call.facts["task"] == task]
        told = sum(call.get("count") or 0 for call in calls if call.op == "ack" and call.last.outcome == OK)
        back = sum(len(call.facts["sequences"]) for call in calls
                   if call.op == "release" and call.last.outcome in (OK, *_UNKNOWN))  # fmt: skip
        if acked != consumed:
            yield f"task {task}: {consumed} samples are consumed, and {acked} were acknowledged"
        if told > consumed:
            yield f"task {task}: acknowledgements counted {told} samples, and {consumed} are consumed"
        if released > back:
            yield f"task {task}: {released} samples count as given back, and their holders gave back {back}"


def clears(record: Record) -> Iterator[str]:
    """What was cleared is gone for good, and each sample was cleared once at most."""
    over = {sequence: call.last.ended or 0.0 for call in record.calls("clear") if call.last.outcome == OK
            for sequence in call.facts["sequences"]}  # fmt: skip
    for sequence in sorted(set(over) & record.live):
        yield f"sample {sequence} was cleared and is there: {record.story(sequence)}"
    for call in _draws(record):
        if not call.again:
            back = [key for key in call.get("keys") if over.get(int(key), call.began) < call.began]
            if back:
                yield f"samples {back} were cleared before this draw was asked for: {call}"
    told = sum(call.get("count") or 0 for call in record.calls("clear") if call.last.outcome == OK)
    found = [found for name, found in record.audit["partitions"].items() if name in PARTITIONS]
    inserted = sum(each["inserted"] for each in found)
    dropped = sum(count for each in found for count in each["dropped"].values())
    if told > inserted - len(record.live):
        yield f"{told} samples were cleared, of {inserted} that were put, and {len(record.live)} are there"
    if dropped > inserted - len(record.live):
        yield f"{dropped} samples count as dropped, of {inserted} that were put, and {len(record.live)} are there"


def _draws(record: Record) -> Iterator[Told]:
    yield from (call for call in record.calls("draw") if call.last.outcome == OK)
