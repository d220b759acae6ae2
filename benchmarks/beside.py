"""Ours and a peer in turn: a round of ours, a round of the peer, and so on, with the same batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.figures import Report, Series
from benchmarks.peers.child import Child
from benchmarks.peers.environments import Unavailable
from benchmarks.peers.table import PeerKind
from benchmarks.peers.usage import watched_family
from benchmarks.placement import Stage
from benchmarks.scale import Scale
from benchmarks.whole import FETCH, TOTAL, WAYS, Facts, Reading

# Times as fast as the peer: batch, way of reading, measure, label of the peer's variant.
AIMS = {
    ("dense", "copied", TOTAL, "ray-numpy"): 0.8,
    ("dense", "copy=False", TOTAL, "ray-numpy"): 1.0,
    ("dense", "copied", TOTAL, "ray"): 15.0,
    ("dense", "copied", TOTAL, "transferqueue"): 15.0,
    ("ragged", "copied", TOTAL, "transferqueue"): 12.0,
    ("small", "copied", FETCH, "transferqueue"): 60.0,
    ("small", "", "put", "transferqueue"): 8.0,
}

_WAYS = [way for way in WAYS if not way.shuffled]


def measure(
    report: Report, scale: Scale, writer: Stage, reader: Stage, names: Sequence[str], peers: Sequence[PeerKind]
) -> None:
    """Add the series of both sides and their comparisons. A peer that fails is reported, and the next one comes."""
    for kind in peers:
        for variant in kind.variants:
            both = [name for name in names if name in variant.workloads]
            if not both:
                continue
            label = kind.label(variant)
            try:
                with kind.running(variant, report) as child:
                    for name in both:
                        print(f"measuring {name} beside {label} ...", flush=True)
                        aims = {key[:3]: aim for key, aim in AIMS.items() if key[3] == variant.label}
                        _Turns(report, scale, name, label, aims, variant.finds).take(writer, reader, child)
            except Unavailable as error:
                print(f"{label}: {error}", flush=True)
                report.peer(label, reason=str(error))


class _Turns:
    def __init__(
        self,
        report: Report,
        scale: Scale,
        name: str,
        label: str,
        aims: dict[tuple[str, str, str], float],
        finds: bool,
    ) -> None:
        self._report = report
        self._scale = scale
        self._name = name
        self._label = label
        self._aims = aims
        self._finds = finds

    def take(self, writer: Stage, reader: Stage, child: Child) -> None:
        facts: Facts = writer.call("prepare", self._name, self._scale)
        child.call("prepare", self._name, asdict(self._scale))
        beside = f"{self._name} beside {self._label}"
        moving: dict[str, Any] = {"size_bytes": facts.size_bytes, "skip": self._scale.warm_up}
        our_puts = self._report.series(beside, "put", **moving)
        ours = {way: Reading(self._report, f"{beside}, {way.name}", **moving) for way in _WAYS}
        case = f"{self._name}, {self._label}"
        moving |= {"workload": self._name, "label": self._label}
        their_puts = self._report.series(case, "put", **moving)
        theirs = Reading(self._report, case, draws=self._finds, **moving)
        self._compare("", "put", [our_puts], [their_puts])
        for way, reading in ours.items():
            self._compare(way.name, FETCH, reading.steps, theirs.steps)
            self._compare(way.name, TOTAL, [reading.total], [theirs.total])
        rounds = self._scale.warm_up + self._scale.rounds
        with watched_family(child.pid) as usage:
            for _ in range(rounds):
                put_s = writer.call("put", self._name)
                our_puts.add(put_s)
                for way, reading in ours.items():
                    reading.add(put_s, reader.call("read", facts, way))
                writer.call("clear")
                put_s = child.call("put")
                their_puts.add(put_s)
                theirs.add(put_s, child.call("read"))
                child.call("clear")
        writer.call("forget")
        usage.report(self._report, case, moved_bytes=2 * facts.size_bytes * rounds)

    def _compare(self, way: str, measure: str, ours: Sequence[Series], theirs: Sequence[Series]) -> None:
        case = f"{self._name}, {way}" if way else self._name
        aim = self._aims.get((self._name, way, measure))
        self._report.compare(case, measure, self._label, ours, theirs, at_least=aim)
