"""What `safety` measured, as the README shows it. Parts that were not measured are left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias

from benchmarks.tables import markdown, short
from benchmarks.workloads import PARTS, SAFETY

Entry: TypeAlias = "dict[str, Any]"
Value: TypeAlias = "Callable[[str], str]"  # writes a measured value into the text

_JOURNAL, _DISK = "journal in shared memory", "journal on a disk"
_CALLS = {
    "get_meta(64)": "`get_meta` of 64",
    "ack of 64": "`ack` of 64",
    "put of one 12 KiB sample": "put of one 12 KiB sample",
    "put of one 12 KiB sample, 64 in flight": "64 such puts in flight",
    "a request that changes nothing": "a request that changes nothing",
}
_ALL = "put + draw + get + touch"
_BATCHES = ("dense", "ragged", "small")
_RECOVERY = ("controller-idle", "controller-loaded", "unit-idle", "unit-loaded")
_SERVED, _BARE, _BEYOND = "kill to the first call served", "start of a bare process", "beyond a bare start"
_SAVE, _LOAD, _WRITE, _READ = "save", "load", "write of a plain file, synced", "read of a plain file"
_PAUSE = "longest call, while a checkpoint is saved"


class Results(Protocol):
    def entries(self, kind: str, benchmark: str) -> list[Entry]: ...

    def find(self, kind: str, benchmark: str, case: str, measure: str, **more: str) -> Entry | None: ...


def ratios(results: Results, value: Value) -> str:
    """Each safety against the same run without it."""
    rows = []
    for text, part, case, side in _compared():
        one = results.find("comparisons", f"{SAFETY}/{part}", case, side)
        if one is not None:
            spread = f"{value(short(one['p10']))} – {value(short(one['p90']))}"
            rows.append((text, f"{value(short(one['median']))} {one['unit']} {one['against']}", spread, _aim(one)))
    if not rows:
        return ""
    told = (
        "What safety costs: the same without it in turn, median, 10th and 90th percentile of the ratios of each round:"
    )
    lines = [f"{told}\n\n{markdown(('', 'median', '10 % – 90 %', 'aim'), rows)}"]
    lines += _proof(results, value)
    return "\n\n".join(lines)


def _compared() -> Iterator[tuple[str, str, str, str]]:
    """Text, part, case and side of each row."""
    for case, text in _CALLS.items():
        yield f"{_JOURNAL}: {text}", "journal", f"calls: {case}", _JOURNAL
    for batch in _BATCHES:
        yield f"{_JOURNAL}: {batch}, {_ALL}", "journal-data", f"data: {batch}, {_ALL}", _JOURNAL
    for case, text in _CALLS.items():
        yield f"{_DISK}, synced: {text}", "journal", f"calls: {case}", _DISK
    for side in ("checksums written", "checksums written and verified"):
        for batch in _BATCHES:
            yield f"{side}: {batch}, {_ALL}", "checksums", f"data: {batch}, {_ALL}", side
        yield f"{side}: dense, put alone", "checksums", "data: dense, put", side
        yield f"{side}: dense, draw and get alone", "checksums", "data: dense, draw + get", side
    for case, text in _CALLS.items():
        yield f"CURVE: {text}", "encryption", f"calls: {case}", "TCP with CURVE"
    for batch in ("dense", "small"):
        yield f"CURVE: {batch}, {_ALL}", "encryption", f"data: {batch}, {_ALL}", "TCP with CURVE"
    for what in ("64 ragged samples drawn and read", "64 12 KiB samples drawn and read", "64 samples drawn"):
        yield f"lease and `ack`, waited for: {what}", "leases", what, "leased and acknowledged"
        yield f"lease and `ack`, not waited for: {what}", "leases", what, "leased, acknowledged without waiting"


def _aim(one: Entry) -> str:
    if one["met"] is None:
        return ""
    bound = f"≥ {one['at_least']:g}" if one["at_least"] is not None else f"≤ {one['at_most']:g}"
    return bound


def _proof(results: Results, value: Value) -> Iterator[str]:
    benchmark = f"{SAFETY}/connections"
    proof = results.find("measurements", benchmark, "proof of the token", "both ends computing, no socket")
    if proof is None:
        return
    rows = []
    for one in results.entries("measurements", benchmark):
        if one["measure"] == "connect, proof and first request":
            second = results.find("measurements", benchmark, one["case"], "second request")
            rows.append((one["case"], _ms(one, value), "" if second is None else _ms(second, value)))
    yield (
        "A connection proves the token once, which cannot be switched off: both ends together compute for\n"
        f"{_ms(proof, value)}. Messages carry nothing of it afterwards.\n\n"
        f"{markdown(('', 'connects, proves and has its first answer', 'its second'), rows)}"
    )


def recovery(results: Results, value: Value) -> str:
    """From SIGKILL to the first call that is served again."""
    rows = []
    for part in _RECOVERY:
        for one in results.entries("measurements", f"{SAFETY}/{part}"):
            if one["measure"] == _SERVED:
                others = [results.find("measurements", f"{SAFETY}/{part}", one["case"], name)
                          for name in (_BARE, _BEYOND)]  # fmt: skip
                cells = [
                    f"{_ms(entry, value)} / {value(short(entry['p99_ms']))} ms" if entry else ""
                    for entry in (one, *others)
                ]
                rows.append((f"{one['case']}, {one['n']} kills", *cells))
    if not rows:
        return ""
    told = (
        "From SIGKILL to the first call that is served again, median / 99th percentile. A bare start, right before\n"
        "each kill, is that of a process of the same kind that has nothing to recover; the last column is of the\n"
        "differences of such pairs (aim: at most 1 s):"
    )
    return f"{told}\n\n{markdown(('', _SERVED, _BARE, _BEYOND), rows)}"


def checkpoints(results: Results, value: Value) -> str:
    """Save and load, and what others saw meanwhile."""
    benchmark = f"{SAFETY}/checkpoint"
    rows = []
    for save in results.entries("measurements", benchmark):
        if save["measure"] != _SAVE:
            continue
        content = save["case"]
        found = [results.find("measurements", benchmark, content, name) for name in (_WRITE, _LOAD, _READ)]
        others = [one for one in results.entries("quantities", benchmark) if one["case"].startswith(f"{content}, ")]
        pauses = [one["value"] for one in others if one["measure"] == _PAUSE]
        longest = f"{value(short(max(pauses)))} ms" if pauses else ""
        rows.append((content, *(_ms(one, value) if one else "" for one in (save, *found)), longest))
    if not rows:
        return ""
    told = (
        "Checkpoints, on a disk, in turn with plain files of the same bytes; the longest call is that of other clients:"
    )
    return f"{told}\n\n{markdown(('', _SAVE, _WRITE, _LOAD, _READ, 'longest call meanwhile'), rows)}"


def _ms(entry: Entry, value: Value) -> str:
    return f"{value(short(entry['p50_ms']))} ms"


assert set(_RECOVERY) < PARTS.keys()
