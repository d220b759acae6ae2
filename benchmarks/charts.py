"""A record of a run as one picture: bars of bytes per second, bars of latencies, curves.

Needs matplotlib, of the extra `rollout`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from benchmarks.figures import FASTER
from benchmarks.tables import commits, machine_line
from benchmarks.workloads import SAFETY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

Entry: TypeAlias = "dict[str, Any]"
Panel: TypeAlias = "tuple[float, Callable[[SubFigure], None]]"  # its height in inches, and what draws it

BLUES = ("#0b559f", "#4a98c9", "#94c4df")  # ours, one per way of reading
OTHER = "#e08214"
FLOOR = "#70757a"

_WIDTH_INCHES = 13.0
_BAR_INCHES = 0.3
_HEAD_INCHES = 1.1  # title and axis of a panel
_CURVES_INCHES = 3.8
_ACROSS = 3  # panels of curves in a row
_LINES = 8  # at most, in one of them
_COLUMNS = {  # of a panel of bytes per second: the durations that are added up
    "put, commit included": ("put",),
    "get, every byte touched": ("draw", "get to a view", "touch every byte"),
    "put and get": ("put + draw + get + touch",),
}
_NOT_CURVES = ("draw", "touch every byte")  # parts of what is drawn
_SPAN = 10.0  # the least ratio of the ends of an axis
_ROOF = "memcpy, warm pages"
_SAFETY = {  # panels of latencies: how the names of the benchmarks begin, and the measures
    "recovery": (
        (f"{SAFETY}/controller", f"{SAFETY}/unit"),
        ("kill to the first call served", "start of a bare process"),
    ),
    "new connections": ((f"{SAFETY}/connections",), ("connect, proof and first request", "second request")),
    "checkpoints": (
        (f"{SAFETY}/checkpoint",),
        ("save", "write of a plain file, synced", "load", "read of a plain file", "while a checkpoint is saved"),
    ),
}
_PLAIN = ("start of a bare process", "write of a plain file, synced", "read of a plain file")  # to compare with
_TICKS = (0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 7)
_ROUND_TRIP = "Unix socket round trip, 0.1 ms of work at either end"


def draw(record: Entry, file: Path) -> None:
    """Write the picture. Raises `ValueError` if the record has nothing to draw."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    panels = [*_rate_panels(record), *_latency_panels(record), *_ratio_panels(record), *_curve_panels(record)]
    if not panels:
        raise ValueError("nothing was measured that could be drawn")
    heights = [height for height, _ in panels]
    figure = pyplot.figure(figsize=(_WIDTH_INCHES, sum(heights) + 0.6), layout="constrained")
    parts = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for (_, paint), part in zip(panels, parts, strict=True):
        paint(part)
    settings = ", ".join(f"{key} {value}" for key, value in record["settings"].items())
    figure.suptitle(
        f"transfer_queue {commits(record)} · {record['benchmark']} · {settings} · {machine_line(record['machine'])}",
        fontsize=9,
        color="#444444",
    )
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


# ---------------------------------------------------------------- bytes per second


def _rate_panels(record: Entry) -> list[Panel]:
    """A panel per batch of `kv`: ours and the peers', with the floor as a line."""
    bars = [one for one in record["measurements"] if one["workload"] is not None]
    return [_rate_panel(record, workload, bars) for workload in dict.fromkeys(one["workload"] for one in bars)]


def _rate_panel(record: Entry, workload: str, bars: Sequence[Entry]) -> Panel:
    of_workload = [one for one in bars if one["workload"] == workload]
    roof = _find(record, _ROOF)
    fastest = max(max(_rates(of_workload, measures).values(), default=0.0) for measures in _COLUMNS.values())
    unit, scale = ("GB/s", 1.0) if fastest > 0.5 else ("MB/s", 1e3)

    def paint(part: SubFigure) -> None:
        part.suptitle(f"{workload}: {of_workload[0]['size_bytes'] / 1e6:.4g} MB", fontweight="bold")
        for axes, (title, measures) in zip(part.subplots(1, len(_COLUMNS)), _COLUMNS.items(), strict=True):
            rates = {label: rate * scale for label, rate in _rates(of_workload, measures).items()}
            if not rates:  # an interrupted run
                axes.set_visible(False)
                continue
            _paint_rates(axes, rates, None if roof is None else roof["gb_per_s"] * scale)
            axes.set_title(title, fontsize=10, pad=12)
            axes.set_xlabel(f"{unit} (bytes once ÷ median time; longer is better)", fontsize=8)

    labels = {one["label"] for one in of_workload}
    return _HEAD_INCHES + 0.2 + _BAR_INCHES * len(labels), paint


def _rates(bars: Sequence[Entry], measures: Sequence[str]) -> dict[str, float]:
    """GB/s by label."""
    rates = {}
    for label in dict.fromkeys(one["label"] for one in bars):
        added = [one for one in bars if one["label"] == label and one["measure"] in measures]
        if added:
            rates[label] = bars[0]["size_bytes"] / 1e6 / sum(one["p50_ms"] for one in added)
    return rates


def _paint_rates(axes: Axes, rates: dict[str, float], roof: float | None) -> None:
    ours = [label for label in rates if label.startswith("ours")]
    colors = [BLUES[ours.index(label) % len(BLUES)] if label in ours else OTHER for label in rates]
    _paint_bars(axes, list(rates), list(rates.values()), colors)
    if roof is not None and roof < 4 * max(rates.values()):
        axes.axvline(roof, color=FLOOR, linestyle="--", linewidth=1)
        axes.annotate(
            "memcpy",
            (roof, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 1),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=7,
            color=FLOOR,
        )
        axes.set_xlim(0, max(axes.get_xlim()[1], 1.05 * roof))


def _paint_bars(axes: Axes, labels: Sequence[str], values: Sequence[float], colors: Sequence[str]) -> None:
    """From the top down, each with its value at its end."""
    bars = axes.barh(range(len(labels)), values, color=colors, height=0.7)
    told = axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
    for text in told:  # readable across the line of the floor
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85})
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


# ---------------------------------------------------------------- latencies


def _latency_panels(record: Entry) -> list[Panel]:
    """Medians of `control`, and what `safety` measured in time alone."""
    timed = [one for one in record["measurements"] if one["p50_ms"] > 0]  # the axis has no place for 0
    calls = [one for one in timed if one["benchmark"] == "control" and one["x"] is None and one["case"] != "floor"]
    if calls:
        calls += [one for one in [_find(record, _ROUND_TRIP)] if one is not None]
    panels = [_latency_panel(record, "small calls", calls)] if calls else []
    for title, (parts, measures) in _SAFETY.items():
        shown = [one for one in timed if one["benchmark"].startswith(parts) and one["measure"] in measures]
        panels += [_latency_panel(record, title, shown)] if shown else []
    return panels


def _latency_panel(record: Entry, title: str, shown: Sequence[Entry]) -> Panel:
    """Bars to the medians, with a line to the 99th percentile, on a logarithmic axis."""
    peers = tuple(f", {one['peer']}" for one in record["peers"])

    def color(one: Entry) -> str:
        if one["case"] == "floor" or one["measure"] in _PLAIN:
            return FLOOR
        return OTHER if peers and one["case"].endswith(peers) else BLUES[0]

    def paint(part: SubFigure) -> None:
        part.suptitle(title, fontweight="bold")
        axes = part.subplots()
        medians = [one["p50_ms"] for one in shown]
        worst = [max(one["p99_ms"], one["p50_ms"]) for one in shown]
        for row, (median, high) in enumerate(zip(medians, worst, strict=True)):
            axes.plot([median, high], [row, row], color="#444444", linewidth=1, marker="|", markevery=[1], zorder=3)
            _annotate(axes, f"{median:.3g}", (high, row))
        axes.barh(range(len(shown)), medians, color=[color(one) for one in shown], height=0.7)
        axes.set_xscale("log")
        low = 10 ** math.floor(math.log10(max(1e-3, min(medians))))
        axes.set_xlim(low, 2 * max(worst))
        axes.tick_params(which="minor", labelbottom=False)
        _name_rows(
            axes, [one["measure"] if one["case"] == "floor" else f"{one['case']}, {one['measure']}" for one in shown]
        )
        axes.set_xlabel("ms: bar and number are the median, the line ends at the 99th percentile; shorter is better")

    return _HEAD_INCHES + _BAR_INCHES * len(shown), paint


def _annotate(axes: Axes, text: str, place: tuple[float, float]) -> None:
    axes.annotate(text, place, xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)


def _name_rows(axes: Axes, labels: Sequence[str]) -> None:
    """From the top down."""
    axes.set_ylim(-0.7, len(labels) - 0.3)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


# ---------------------------------------------------------------- ratios


def _ratio_panels(record: Entry) -> list[Panel]:
    """What `safety` compared, each as a multiple of the time of the same without it."""
    shown = [one for one in record["comparisons"] if one["benchmark"].startswith(f"{SAFETY}/")]
    shown = [one for one in shown if not one["benchmark"].endswith("/checkpoint")]  # compared with plain files
    if not shown:
        return []

    def paint(part: SubFigure) -> None:
        part.suptitle("what safety costs: times as long as without", fontweight="bold")
        axes = part.subplots()
        for row, one in enumerate(shown):
            low, median, high = sorted(_as_time(one, one[key]) for key in ("p10", "median", "p90"))
            axes.plot([low, high], [row, row], color="#444444", linewidth=1)
            axes.plot([median], [row], "o", color=OTHER if one["met"] is False else BLUES[0], markersize=6, zorder=3)
            _annotate(axes, f"{median:.3g}", (high, row))
            bound = one["at_most"] if one["at_most"] is not None else one["at_least"]
            if bound is not None:
                axes.plot([_as_time(one, bound)], [row], "|", color=FLOOR, markersize=12, markeredgewidth=2)
        axes.axvline(1.0, color=FLOOR, linestyle="--", linewidth=1)
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        ticks = [tick for tick in _TICKS if low <= tick <= high]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        _name_rows(axes, [f"{one['measure']} · {one['case']}" for one in shown])
        axes.set_xlabel(
            "median of the rounds, line from the 10th to the 90th percentile; grey tick: aim, orange: missed"
        )

    return [(_HEAD_INCHES + _BAR_INCHES * len(shown), paint)]


def _as_time(one: Entry, ratio: float) -> float:
    """Some are the inverse, of throughput."""
    return 1 / ratio if one["unit"] == FASTER else ratio


# ---------------------------------------------------------------- curves


def _curve_panels(record: Entry) -> list[Panel]:
    """One panel per thing that grows and what is done with it; a line per measure."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for one in record["measurements"]:
        if one["x"] is not None and one["p50_ms"] > 0 and one["measure"] not in _NOT_CURVES:
            groups.setdefault((one["benchmark"], one["axis"]), []).append(one)
    rows = [list(groups.items())[at : at + _ACROSS] for at in range(0, len(groups), _ACROSS)]
    return [(_CURVES_INCHES, _curves_painter(row, min(_ACROSS, max(2, len(groups))))) for row in rows]


def _curves_painter(groups: Sequence[tuple[tuple[str, str], list[Entry]]], across: int) -> Callable[[SubFigure], None]:
    def paint(part: SubFigure) -> None:
        grid = part.subplots(1, across, squeeze=False)[0]
        for axes, ((benchmark, axis), entries) in zip(grid, groups, strict=False):
            _paint_curves(axes, entries)
            axes.set_title(f"{benchmark}: time by {axis}", fontsize=10)
            axes.set_xlabel(axis, fontsize=9)
            axes.set_ylabel("ms, median", fontsize=9)
        for axes in grid[len(groups) :]:
            axes.set_visible(False)

    return paint


def _paint_curves(axes: Axes, entries: Sequence[Entry]) -> None:
    lines: dict[str, list[Entry]] = {}
    for one in entries:
        lines.setdefault(_line(one), []).append(one)
    for name, points in list(lines.items())[:_LINES]:
        points.sort(key=lambda one: float(one["x"]))
        xs, ys = [one["x"] for one in points], [one["p50_ms"] for one in points]
        axes.plot(xs, ys, marker="o", markersize=3.5, linewidth=1.4, label=name)
    axes.set_yscale("log")
    low, high = min(one["p50_ms"] for one in entries), max(one["p50_ms"] for one in entries)
    spare = max(1.3, math.sqrt(_SPAN / (high / low)))  # what is flat should look flat
    axes.set_ylim(low / spare, high * spare)
    axes.yaxis.set_major_formatter(_plain)
    axes.yaxis.set_minor_formatter(_plain if high / low < 5 else "")
    axes.set_xscale("log")
    ticks = sorted({one["x"] for one in entries})
    axes.set_xticks(ticks, [_short(x) for x in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(which="major", color="#dddddd", linewidth=0.6)
    axes.tick_params(labelsize=8)
    axes.tick_params(which="minor", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)


def _plain(value: float, _place: float) -> str:
    return f"{value:g}"


def _short(count: float) -> str:
    """1000 as 1k, and so on; powers of 2 in the same letters."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            binary = 1 << round(math.log2(count)) == count
            divisor = 1024 ** {"G": 3, "M": 2, "k": 1}[letter] if binary and count >= 1024 else unit
            return f"{count / divisor:.3g}{letter}"
    return f"{count:g}"


def _line(one: Entry) -> str:
    """Series of one line differ in their place on the axis, which some name in their case."""
    case = one["case"].partition(", ")[2] if one["benchmark"] == "kv" else one["case"]
    way = case.partition(", ")[2]
    return f"{one['measure']}, {way}" if way else str(one["measure"])


def _find(record: Entry, measure: str) -> Entry | None:
    return next((one for one in record["measurements"] if one["measure"] == measure), None)
