"""The workloads run on a queue, compare what comes out with what was put, and report what they promise."""

from __future__ import annotations

import importlib
import mmap
import os
import time
from typing import Any

import pytest
import torch

from benchmarks import costs, large, rl_step
from benchmarks.accounting import private_bytes, process_usage, processes, reset_peak, unit_stats, watched
from benchmarks.figures import Report
from benchmarks.placement import EmbeddedPlacement, ProcessPlacement
from benchmarks.scale import SCALES

TINY = SCALES["tiny"]
MEASURED = {
    "stream": {"put of one 12 KiB sample", "from put to draw", "draw and get of 64"},
    "rl_step": {"step", "rollout puts", "reward waits", "reference gets", "trainer waits", "trainer gets"},
    "large": {"put", "get, view", "touch, view", "get, copy", "touch, copy"},
    "multimodal": {"put", "get"},
    "control": {"64 in flight all the time", "since the put began"},
}
COMPARED = {
    "stream": ("samples compared", TINY.stream_producers * TINY.stream_coroutines * TINY.stream_each),
    "rl_step": ("rows compared, before and after", TINY.step_prompts * rl_step.GROUP * (TINY.warm_up + 1)),
    "multimodal": ("rows compared", TINY.image_groups * 8 * (TINY.warm_up + TINY.rounds)),
}


def run(name: str) -> dict[str, Any]:
    report = Report(name, {})
    with EmbeddedPlacement() as placement:
        importlib.import_module(f"benchmarks.{name}").measure(report, TINY, placement)
    return report.record()


@pytest.mark.parametrize("name", list(MEASURED))
def test_workload(name: str) -> None:
    """Each workload has its series, and says how much of what came out was compared."""
    record = run(name)
    assert {one["measure"] for one in record["measurements"]} >= MEASURED[name]
    assert all(one["n"] > 0 and 0 <= one["p50_ms"] <= one["p99_ms"] for one in record["measurements"])
    if name in COMPARED:
        measure, count = COMPARED[name]
        assert {one["value"] for one in record["quantities"] if one["measure"] == measure} == {count}


def test_rows_of_a_group_share_an_image() -> None:
    """A field declared as shared by its group is stored about once per group, else once per row."""
    stored = {
        one["case"]: one["value"]
        for one in run("multimodal")["quantities"]
        if one["measure"] == "bytes stored" and one["unit"] == "× one copy"
    }
    assert stored["multimodal, shared by the group"] < 1.3
    assert stored["multimodal, a copy per row"] > 3


def test_waiters_are_parked() -> None:
    """Wake-ups are also timed while others wait: elsewhere, and for the same samples."""
    cases = {one["case"] for one in run("control")["measurements"]}
    assert {case for case in cases if f"{TINY.crowd} others" in case} == {
        f"parked get_meta(1), {TINY.crowd} others wait elsewhere",
        f"parked get_meta(1), {TINY.crowd} others wait for the same samples",
    }


def test_curves() -> None:
    """Every curve has all of its points, in ascending order."""
    points: dict[str, list[float]] = {}
    for one in run("curves")["measurements"]:
        points.setdefault(one["axis"], []).append(one["x"])
    expected = {
        "bytes per put": TINY.curve_bytes,
        "fields": TINY.curve_fields,
        "samples per partition": TINY.curve_samples,
        "partitions": TINY.curve_partitions,
        "tasks": TINY.curve_tasks,
        "waiters": TINY.curve_waiters,
        "clients": TINY.curve_clients,
    }
    assert {axis: tuple(dict.fromkeys(places)) for axis, places in points.items()} == expected


def test_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start, idle time and memory are reported; that the start is timed in a fresh process is left out here."""
    monkeypatch.setattr(costs, "_in_fresh_process", lambda function, *arguments: [0.01])
    record = run("costs")
    assert [one["measure"] for one in record["measurements"]] == ["start of an embedded session beyond imports"]
    assert {one["unit"] for one in record["quantities"]} == {"%", "MB"}


# ---------------------------------------------------------------- what the comparisons would find


@pytest.mark.parametrize("at", [0, -1])
def test_large_finds_a_wrong_word(at: int) -> None:
    """A wrong first or last word does not go unnoticed, nor do missing ones."""
    values = large.pattern(1 << 12)
    assert large.check(values, 1 << 12) == sum(range(1 << 9))
    with pytest.raises(ValueError, match="words came out"):
        large.check(values, 1 << 13)
    values.view(-1)[at] += 1
    with pytest.raises(ValueError, match="word"):
        large.check(values, 1 << 12)


def test_a_step_finds_a_wrong_value() -> None:
    """Trainers notice columns that do not belong together, and responses that are missing."""
    data = rl_step.responses(8, 16)
    data["ref_log_probs"] = data["old_log_probs"]
    data["reward"] = data["input_ids"].offsets().diff().float()
    rl_step.check(data)
    with pytest.raises(ValueError, match="reward"):
        rl_step.check({**data, "reward": data["reward"] + 1})
    with pytest.raises(ValueError, match="ref_log_probs"):
        rl_step.check({**data, "ref_log_probs": rl_step.responses(8, 16)["response_mask"].float()})
    whole = [[0] * rl_step.GROUP, [1] * rl_step.GROUP]
    rl_step.check_complete(whole, 2)
    with pytest.raises(ValueError, match="the trainers got"):
        rl_step.check_complete([whole[0], whole[1][1:]], 2)


# ---------------------------------------------------------------- accounting


def test_usage_of_this_process() -> None:
    """Memory that was touched and given back stays in the peak until it is reset; work shows as processor time."""
    pid = os.getpid()
    reset_peak(pid)
    before = process_usage(pid)
    private = private_bytes(pid)
    with mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        assert private_bytes(pid) - private > 50 << 20
    assert process_usage(pid).peak_bytes - before.peak_bytes > 50 << 20
    reset_peak(pid)
    assert process_usage(pid).peak_bytes - before.peak_bytes < 30 << 20
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    assert process_usage(pid).cpu_s - before.cpu_s > 0.05


class _Holder:
    def __init__(self, client: Any) -> None:
        self._client = client

    def put(self, size_bytes: int) -> None:
        self._client.put({"x": torch.ones(4, size_bytes // 4, dtype=torch.uint8)}, partition_id="some")


def test_processes_are_told_apart() -> None:
    """What a stage in a process of its own does is charged to it, and bytes in arenas to the units."""
    with ProcessPlacement() as placement:
        stage = placement.stage(_Holder)
        names = processes({"holder": stage})
        assert names == {os.getpid(): "controller + unit 0", stage.pid: "holder"}
        with watched(names, sample=True) as watch:
            stage.call("put", 80 << 20)
        assert watch.resident_bytes["holder"] > 80 << 20
        assert watch.private_bytes["holder"] > watch.private_bytes["controller + unit 0"]
        assert watch.arena_bytes >= 80 << 20
        assert unit_stats()["bytes_live"] >= 80 << 20
        report = Report("some", {})
        watch.report(report, "case", moved_bytes=80 << 20)
        measured = {one["measure"] for one in report.record()["quantities"]}
        assert measured >= {"peak resident memory, holder", "processor time, holder", "processor time, all"}


def test_one_process_has_one_name() -> None:
    """Where everything shares a process, it is named so."""
    with EmbeddedPlacement() as placement:
        assert processes({"holder": placement.stage(_Holder)}) == {os.getpid(): "all"}
