"""A run: rounds of some seconds, each with a session, a workload and faults of its own, and a judgement at its end."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.chaos.faults import FAULTS, Fault, Scene
from tests.chaos.judge import Verdict, judge
from tests.chaos.proxy import Proxy
from tests.chaos.queue_under_test import QueueUnderTest
from tests.chaos.workload import Workload
from tests.chaos.zygote import Zygote

ROUND_S = 45.0

_LEASE_S = 4.0
_LONGEST_PAUSE_S = 1.5  # between the recovery from one fault and the next fault
_SAMPLES = 400  # of a partition that may be there at once


@dataclass
class Round:
    """What came of one round."""

    seed: int
    setting: dict[str, Any]
    seconds: float = 0.0
    drain_s: float = 0.0
    outcomes: list[tuple[str, str]] = field(default_factory=list)
    recoveries: list[dict[str, Any]] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


def run_round(seed: int, faults: Sequence[Fault], seconds: float, zygote: Zygote, keep: Path | None = None) -> Round:
    """Run one session for about so many seconds of faults. `keep`: a folder for the logs of a round that failed."""
    chance = random.Random(f"{seed} round")
    setting = _setting(chance, faults)
    result = Round(seed, setting)
    began = time.monotonic()
    with TemporaryDirectory(prefix="tq-chaos-") as name:
        folder = Path(name)
        for part in ("control", "logs", "proxy", "journal"):
            (folder / part).mkdir()
        verdict = _in_session(result, folder, chance, faults, seconds, zygote)
        result.violations += verdict.violations
        result.counts = verdict.counts
        if result.violations and keep is not None:
            _keep(folder / "logs", keep / f"seed-{seed}", result)
    result.seconds = time.monotonic() - began
    return result


def _in_session(
    result: Round, folder: Path, chance: random.Random, faults: Sequence[Fault], seconds: float, zygote: Zygote
) -> Verdict:
    setting = result.setting
    queue = QueueUnderTest(folder / "control", _conf(setting, folder))
    proxy: Proxy | None = None
    try:
        if setting["proxy"]:
            units = queue.client.storage_infos().values()
            servers = {"controller": queue.runtime.info.local_address} | {info.id: info.local_address for info in units}
            proxy = Proxy(folder / "proxy", servers)
        workload = Workload(
            zygote,
            queue,
            folder / "logs",
            result.seed,
            proxy=str(folder / "proxy") if proxy else None,
            lease_s=_LEASE_S,
            timeout_s=5.0 if proxy else 20.0,
            transport=setting["transport"],
            checksums=setting["checksums"],
        )
        workload.start()
        scene = Scene(queue, workload, proxy, chance, _LEASE_S, result.recoveries)
        _inject(result, scene, faults, seconds)
        injected = time.monotonic()
        record = workload.finish(workload.drain())
        result.drain_s = round(time.monotonic() - injected, 1)
    finally:
        if proxy is not None:
            proxy.close()
        left = queue.close()
    record.left = left
    record.full_disk = any("full disk" in name for name, _ in result.outcomes)
    return judge(record)


def _inject(result: Round, scene: Scene, faults: Sequence[Fault], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    usable = [fault for fault in faults if scene.proxy is not None or not fault.needs_proxy]
    order = [fault for _ in range(50) for fault in scene.random.sample(usable, len(usable))]
    for fault in order:
        if time.monotonic() > deadline:
            return
        time.sleep(scene.random.uniform(0.0, _LONGEST_PAUSE_S))
        try:
            outcome = fault.inject(scene)
        except TimeoutError as error:
            result.violations.append(f"no recovery from {fault.name!r}: {error}")
            outcome = "stuck"
        result.outcomes.append((fault.name, outcome))


def _setting(chance: random.Random, faults: Sequence[Fault]) -> dict[str, Any]:
    """How the session of a round is configured."""
    proxy = any(fault.needs_proxy for fault in faults) and (
        chance.random() < 0.5 or all(fault.needs_proxy for fault in faults)
    )
    return {
        "units": chance.choice([1, 1, 2]),
        "proxy": proxy,
        "transport": "auto" if proxy else chance.choice(["auto", "auto", "tcp"]),
        "checksums": chance.random() < 0.3,
        "journal": chance.choice(["memory", "memory", "disk"]),
    }


def _conf(setting: dict[str, Any], folder: Path) -> dict[str, Any]:
    storage = {"num_data_storage_units": setting["units"], "capacity_bytes": 256 << 20, "arena_bytes": 8 << 20}
    return {
        "backend": {"SimpleStorage": storage},
        "checksums": setting["checksums"],
        "controller": {"num_n_samples": 2},
        "limits": {"partition_samples": _SAMPLES},
        "journal": {"path": str(folder / "journal") if setting["journal"] == "disk" else None},
    }


def _keep(logs: Path, target: Path, result: Round) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in logs.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    (target / "round.json").write_text(json.dumps(vars(result), indent=1))


# ---------------------------------------------------------------- many rounds


def run(minutes: float, seed: int, faults: Sequence[Fault], keep: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """Run rounds for so long; return the summary that the table and the matrix are made of."""
    began = time.monotonic()
    rounds: list[Round] = []
    with Zygote() as zygote:
        while (left_s := 60.0 * minutes - (time.monotonic() - began)) > 0:
            number = len(rounds)
            done = run_round(seed * 1000 + number, faults, min(ROUND_S, left_s), zygote, keep)
            rounds.append(done)
            tell(f"round {done.seed}: {len(done.outcomes)} faults in {done.seconds:.0f} s "
                 f"(drained in {done.drain_s:.0f} s), {done.setting}, "
                 f"{len(done.violations)} violations")  # fmt: skip
            for violation in done.violations[:10]:
                tell(f"  {violation}")
    return summary(seed, time.monotonic() - began, rounds)


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
