"""The names of the files in a journal's folder."""

from __future__ import annotations

import re
from pathlib import Path

LOCK = "lock"

_NUMBERED = re.compile(r"(journal|snapshot)-([1-9][0-9]*|0)")


def segment_path(folder: Path, number: int) -> Path:
    return folder / f"journal-{number}"


def snapshot_path(folder: Path, sequence: int) -> Path:
    return folder / f"snapshot-{sequence}"


def spare_path(folder: Path, count: int) -> Path:
    """Return the name of a segment that is allocated and not in use yet."""
    return folder / f"spare-{count}"


def list_segments(folder: Path) -> dict[int, Path]:
    """Return the segments in use by number, in order."""
    return _numbered(folder, "journal")


def list_snapshots(folder: Path) -> dict[int, Path]:
    """Return the snapshots by sequence number, in order."""
    return _numbered(folder, "snapshot")


def list_unfinished(folder: Path) -> list[Path]:
    """Return the spare segments and what a writer has left that died."""
    return sorted([*folder.glob("spare-*"), *folder.glob(".snapshot-*.partial")])


def _numbered(folder: Path, kind: str) -> dict[int, Path]:
    found = {}
    for path in folder.iterdir():
        match = _NUMBERED.fullmatch(path.name)
        if match and match[1] == kind:
            found[int(match[2])] = path
    return dict(sorted(found.items()))
