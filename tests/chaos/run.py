"""A run: rounds of some seconds, each with a session, a workload and faults of its own, and a judgement at its end."""

from __future__ import annotations

import json
import queue as queues
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.chaos.faults import FAULTS, Fault, Scene
from tests.chaos.judge import judge
from tests.chaos.operations import Violated
from tests.chaos.proxy import TCP, UNIX, Proxy
from tests.chaos.queue_under_test import QueueUnderTest
from tests.chaos.record import Disturbance, Record
from tests.chaos.workload import Workload
from tests.chaos.zygote import Zygote
from transfer_queue.errors import TransferQueueError

BROKE_OFF = (TransferQueueError, Violated, OSError, AssertionError, LookupError, ValueError, queues.Empty)
"""What a round may die of, so that it counts as a violation and the next round begins."""

ROUND_S = 45.0
SAMPLES = 400  # of a partition that may be there at once

_LEASE_S = 4.0
_LONGEST_PAUSE_S = 1.5  # between the recovery from one fault and the next fault


@dataclass
class Round:
    """What came of one round. `evidence`: the folder where that of its violations was kept."""

    seed: int
    setting: dict[str, Any]
    seconds: float = 0.0
    drain_s: float = 0.0
    outcomes: list[tuple[str, str]] = field(default_factory=list)
    recoveries: list[dict[str, Any]] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    disturbances: list[Disturbance] = field(default_factory=list)
    audit: dict[str, Any] = field(default_factory=dict)
    evidence: str = ""


def run_round(
    seed: int,
    faults: Sequence[Fault],
    seconds: float,
    zygote: Zygote,
    keep: Path | None = None,
    *,
    samples: int = SAMPLES,
) -> Round:
    """Run one session for about so many seconds of faults.

    samples  how many a partition has room for; what is there in the end takes its time to be consumed
    keep     a folder for the evidence of a round that failed, in a folder of its own: the logs of all, what the
             servers said, the round with its faults, and the last audit
    """
    chance = random.Random(f"{seed} round")
    result = Round(seed, _setting(chance, faults) | {"samples": samples})
    began = time.monotonic()
    with TemporaryDirectory(prefix="tq-chaos-") as name:
        folder = Path(name)
        for part in ("control", "logs", "proxy", "journal", "rows"):
            (folder / part).mkdir()
        try:
            record = _in_session(result, folder, chance, faults, seconds, zygote)
            record.keep(folder / "logs")
            verdict = judge(record)
            result.violations += verdict.violations
            result.counts = verdict.counts
            result.audit = record.audit
        except BROKE_OFF:
            result.violations.append(f"the round broke off: {traceback.format_exc()}")
        result.seconds = time.monotonic() - began
        if result.violations and keep is not None:
            _keep(folder / "logs", keep / f"seed-{seed}", result)
    return result


def _in_session(
    result: Round, folder: Path, chance: random.Random, faults: Sequence[Fault], seconds: float, zygote: Zygote
) -> Record:
    queue = QueueUnderTest(folder / "control", _conf(result.setting, folder), folder / "logs" / "servers.txt")
    left: list[str] = []
    with ExitStack() as stack:
        stack.callback(lambda: left.extend([*queue.close(), *map(str, (folder / "rows").iterdir())]))
        proxy = _proxy(result.setting, queue, folder / "proxy")
        if proxy is not None:
            stack.callback(proxy.close)
        workload = _workload(result, queue, folder, zygote)
        stack.callback(workload.abandon)
        workload.start()
        scene = Scene(queue, workload, proxy, chance, _LEASE_S, result.recoveries)
        _inject(result, scene, faults, seconds)
        injected = time.monotonic()
        record = workload.finish(workload.drain())
        result.drain_s = round(time.monotonic() - injected, 1)
    record.left = left
    record.disturbances = result.disturbances
    return record


def _proxy(setting: dict[str, Any], queue: QueueUnderTest, folder: Path) -> Proxy | None:
    info, units = queue.runtime.info, queue.client.storage_infos().values()
    if setting["proxy"] == UNIX:
        return Proxy(folder, {"controller": info.local_address} | {unit.id: unit.local_address for unit in units})
    if setting["proxy"] == TCP:
        addresses = {unit.id: unit.to_addr("request") for unit in units}
        return Proxy(folder, {"controller": info.to_addr("request")} | addresses)
    return None


def _workload(result: Round, queue: QueueUnderTest, folder: Path, zygote: Zygote) -> Workload:
    setting = result.setting
    return Workload(
        zygote,
        queue,
        folder / "logs",
        result.seed,
        proxy=str(folder / "proxy") if setting["proxy"] else None,
        lease_s=_LEASE_S,
        timeout_s=5.0 if setting["proxy"] else 20.0,
        transport=setting["transport"],
        checksums=setting["checksums"],
    )


def _inject(result: Round, scene: Scene, faults: Sequence[Fault], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    setting = result.setting
    usable = [one for one in faults if one.through in (None, setting["proxy"]) and one.units <= setting["units"]]
    order = [fault for _ in range(50) for fault in scene.random.sample(usable, len(usable))]
    for fault in order:
        if time.monotonic() > deadline:
            return
        time.sleep(scene.random.uniform(0.0, _LONGEST_PAUSE_S))
        began = time.monotonic()
        try:
            outcome = fault.inject(scene)
        except (TimeoutError, TransferQueueError, Violated) as error:
            result.violations.append(f"{fault.name!r} did not end well: {type(error).__name__}: {error}")
            outcome = "stuck"
        result.outcomes.append((fault.name, outcome))
        result.disturbances.append(Disturbance(fault.name, began, time.monotonic(), fault.allows, fault.whom))


def _setting(chance: random.Random, faults: Sequence[Fault]) -> dict[str, Any]:
    """How the session of a round is configured, so that at least one of the faults can be injected."""
    least_units = min(fault.units for fault in faults)
    kinds = sorted({fault.through for fault in faults if fault.through is not None})
    through = [*kinds, *([None] * max(len(kinds), 1) if any(fault.through is None for fault in faults) else [])]
    proxy = chance.choice(through)
    if proxy is None:
        transport = chance.choice(["auto", "auto", "tcp"])
    else:
        transport = "tcp" if proxy == TCP else "auto"
    return {
        "units": chance.choice([least_units, 2]),
        "proxy": proxy,
        "transport": transport,
        "checksums": chance.random() < 0.3,
        "journal": chance.choice(["memory", "memory", "disk"]),
        "rows": chance.choice(["memory", "memory", "disk"]),
    }


def _conf(setting: dict[str, Any], folder: Path) -> dict[str, Any]:
    sizes = {"capacity_bytes": 256 << 20, "arena_bytes": 8 << 20}
    if setting["rows"] == "disk":  # all but the first of them
        sizes = {"capacity_bytes": 1 << 20, "arena_bytes": 1 << 20}
    offload = {"enabled": setting["rows"] == "disk", "path": str(folder / "rows"), "capacity_bytes": 256 << 20}
    storage = {"num_data_storage_units": setting["units"], "ssd_offload": offload, **sizes}
    return {
        "backend": {"SimpleStorage": storage},
        "checksums": setting["checksums"],
        "controller": {"num_n_samples": 2},
        "limits": {"partition_samples": setting["samples"]},
        "journal": {"path": str(folder / "journal") if setting["journal"] == "disk" else None},
    }


def _keep(logs: Path, target: Path, result: Round) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in logs.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    disturbances = [one.as_plain() for one in result.disturbances]
    (target / "round.json").write_text(json.dumps(vars(result) | {"disturbances": disturbances}, indent=1))
    result.evidence = str(target)


# ---------------------------------------------------------------- many rounds


def run(
    minutes: float,
    seed: int,
    faults: Sequence[Fault],
    keep: Path,
    tell: Callable[[str], None],
    save: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Run rounds for so long; return the summary that the table and the matrix are made of.

    A violation ends nothing. `tell` gets progress in words; `save` gets the summary of what was run so far after each
    round.
    """
    began = time.monotonic()
    rounds: list[Round] = []
    found = summary(seed, 0.0, rounds)
    with Zygote() as zygote:
        while (left_s := 60.0 * minutes - (time.monotonic() - began)) > 0:
            done = run_round(seed * 1000 + len(rounds), faults, min(ROUND_S, left_s), zygote, keep)
            rounds.append(done)
            passed_s = time.monotonic() - began
            tell(f"{passed_s / 60:.1f} of {minutes:g} minutes, round {done.seed}: {len(done.outcomes)} faults in "
                 f"{done.seconds:.0f} s (drained in {done.drain_s:.0f} s), {done.setting}, "
                 f"{len(done.violations)} violations{f', see {done.evidence}' if done.evidence else ''}")  # fmt: skip
            for violation in done.violations[:10]:
                tell(f"  {violation}")
            found = summary(seed, passed_s, rounds)
            save(found)
    return found


def summary(seed: int, seconds: float, rounds: Sequence[Round]) -> dict[str, Any]:
    """Plain values that say all that a run has shown."""
    times: Counter[str] = Counter()
    reached: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for each in rounds:
        counts.update(each.counts)
        for name, outcome in each.outcomes:
            times[name] += 1
            reached[name] += outcome == "recovered"
            failed[name] += bool(each.violations)
    rows = {fault.name: {"rows": fault.rows, "how": fault.how} for fault in FAULTS}
    return {
        "seed": seed,
        "minutes": round(seconds / 60, 1),
        "rounds": len(rounds),
        "faults": {
            name: {**rows[name], "times": times[name], "recovered": reached[name], "in failed rounds": failed[name]}
            for name in times
        },
        "recovery": {server: _recovery(server, rounds) for server in ("controller", "unit")},
        "counts": dict(sorted(counts.items())),
        "violations": [f"seed {each.seed}: {violation}" for each in rounds for violation in each.violations],
        "evidence": [each.evidence for each in rounds if each.evidence],
    }


def _recovery(server: str, rounds: Sequence[Round]) -> dict[str, Any]:
    found = [entry for each in rounds for entry in each.recoveries if entry["server"] == server]
    took = sorted(entry["took_s"] for entry in found)
    beyond = sorted(entry["beyond_s"] for entry in found)
    return {
        "kills": len(found),
        "p50_s": _quantile(took, 0.5),
        "p99_s": _quantile(took, 0.99),
        "beyond_restart_p50_s": _quantile(beyond, 0.5),
        "beyond_restart_p99_s": _quantile(beyond, 0.99),
    }


def _quantile(values: Sequence[float], share: float) -> float | None:
    return round(values[min(int(share * len(values)), len(values) - 1)], 3) if values else None
