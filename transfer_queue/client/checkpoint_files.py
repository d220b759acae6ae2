"""The files of a checkpoint: what the controller knows, the bytes of the blocks, and how both are found to be whole.

    metadata.json   format, versions, what the caller adds, and size and checksum of each other file
    state.bin       the state of the controller, as it gave it
    blocks.bin      the blocks, one behind the other, as they are stored
    index.bin       int64 [4, n]: id, offset, size and checksum (xxh3, 64 bits) of each block

A checkpoint is written into `NAME.tmp` and takes the place of the one that was there by renaming, the old one through
`NAME.old`: at each moment one of the two is whole. Nothing in it is ever executed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from transfer_queue.errors import CapacityExceeded, DecodeError, InvalidArgument, TransferQueueError, WrongType
from transfer_queue.journal.aside import sync_tree
from transfer_queue.journal.files import REAL_FILES

Bytes: TypeAlias = NDArray[np.uint8]
Int64s: TypeAlias = NDArray[np.int64]

FORMAT = 1
METADATA, STATE, BLOCKS, INDEX = "metadata.json", "state.bin", "blocks.bin", "index.bin"

_PIECE_BYTES = 8 << 20


class NoCheckpoint(InvalidArgument, FileNotFoundError):
    """There is no checkpoint where one was looked for."""


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `path` when the block ends well; else nothing has changed."""
    fresh, old = path.with_name(f"{path.name}.tmp"), path.with_name(f"{path.name}.old")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(mode=0o700, parents=True)
        yield fresh
        sync_tree(fresh)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        fresh.rename(path)
        REAL_FILES.fsync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        take_back(path)
        if isinstance(error, TransferQueueError):
            raise
        text = f"the checkpoint {str(path)!r} was not written, an older one is as it was: {error}"
        raise CapacityExceeded(f"{text}; is there capacity left on the disk?") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def take_back(path: Path) -> None:
    """If a save was interrupted while it changed the names, the older checkpoint gets its name back."""
    old = path.with_name(f"{path.name}.old")
    if not path.exists() and old.exists():
        old.rename(path)


# ---------------------------------------------------------------- writing


def check_json(metadata: dict[str, Any] | None) -> dict[str, Any]:
    """The caller's metadata; raises `WrongType` for what JSON cannot hold."""
    try:
        json.dumps(metadata or {})
    except (TypeError, ValueError) as error:
        raise WrongType(f"the metadata of a checkpoint must be what JSON can hold: {error}") from error
    return dict(metadata or {})


class CheckpointWriter:
    """Writes the files into an empty folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entries: list[tuple[int, int, int, int]] = []
        self._blocks = _created(folder / BLOCKS)
        self._whole = xxhash.xxh3_64()

    def add(self, block: int, pieces: Iterator[Bytes] | Sequence[Bytes]) -> None:
        """Write a block, whose bytes are the pieces joined."""
        own, offset = xxhash.xxh3_64(), self._blocks.tell()
        for piece in pieces:
            for at in range(0, piece.nbytes, _PIECE_BYTES):
                # a copy: bytes of cleared rows may be written to by somebody else meanwhile
                data = piece[at : at + _PIECE_BYTES].tobytes()
                own.update(data)
                self._whole.update(data)
                self._blocks.write(data)
        self._entries.append((block, offset, self._blocks.tell() - offset, _signed(own.intdigest())))

    def finish(self, state: Sequence[bytes | memoryview], metadata: dict[str, Any]) -> None:
        """Write what names and describes the blocks; `metadata` becomes part of `metadata.json`."""
        blocks_bytes = self._blocks.tell()
        self._blocks.close()
        index = np.array(self._entries, np.int64).reshape(-1, 4).T.copy()
        files = {BLOCKS: (blocks_bytes, self._whole.hexdigest())}
        for name, parts in ((STATE, state), (INDEX, (index.tobytes(),))):
            files[name] = _write(self._folder / name, parts)
        content = {"format": FORMAT, "storage_saved": True, "files": files, **metadata}
        _write(self._folder / METADATA, (json.dumps(content, indent=2).encode(),))

    def close(self) -> None:
        """May be called twice."""
        self._blocks.close()


def _write(path: Path, parts: Sequence[bytes | memoryview]) -> tuple[int, str]:
    whole, size = xxhash.xxh3_64(), 0
    with _created(path) as file:
        for part in parts:
            file.write(part)
            whole.update(part)
            size += memoryview(part).nbytes
    return size, whole.hexdigest()


def _created(path: Path) -> BinaryIO:
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are all there and of the right size; `check` reads them."""

    path: Path
    metadata: dict[str, Any]
    blocks: Int64s  # [n] ids
    offsets: Int64s  # [n]
    sizes: Int64s  # [n]
    checksums: Int64s  # [n]

    def check(self) -> None:
        """Read everything; raises `DecodeError` naming file, offset and how much of it is good."""
        known = zip(self.offsets.tolist(), self.checksums.tolist(), strict=True)
        for number, (offset, checksum) in enumerate(known):
            if _signed(xxhash.xxh3_64_intdigest(self.image(number).data)) != checksum:
                bad = f"block {int(self.blocks[number])} at byte {offset} of {BLOCKS} is damaged"
                raise self._damaged(f"{bad}; {number} of {len(self.blocks)} blocks before it are good", offset=offset)
        self.state()

    def image(self, number: int) -> Bytes:
        """The bytes of one block; a view of the file."""
        if self.sizes[number] == 0:
            return np.empty(0, np.uint8)
        return np.memmap(self.path / BLOCKS, np.uint8, "c", int(self.offsets[number]), (int(self.sizes[number]),))

    def state(self) -> bytes:
        """What the controller gave."""
        data = (self.path / STATE).read_bytes()
        if xxhash.xxh3_64_hexdigest(data) != self.metadata["files"][STATE][1]:
            raise self._damaged(f"{STATE} is damaged", offset=0)
        return data

    def _damaged(self, text: str, **details: Any) -> DecodeError:
        return DecodeError(f"the checkpoint {str(self.path)!r} cannot be loaded: {text}", **details)


def open_checkpoint(path: Path) -> Checkpoint:
    """Raises `NoCheckpoint`, which is a `FileNotFoundError`, or `DecodeError` naming what is missing or too short."""
    take_back(path)
    try:
        metadata = json.loads((path / METADATA).read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NoCheckpoint(f"there is no checkpoint in {str(path)!r}: it has no {METADATA}") from error
    except ValueError as error:
        raise DecodeError(f"{METADATA} of the checkpoint {str(path)!r} is damaged: {error}") from error
    if metadata.get("format") != FORMAT:
        raise DecodeError(
            f"the checkpoint {str(path)!r} has format {metadata.get('format')!r}, this version of transfer_queue reads "
            f"{FORMAT}: load it with the version that wrote it, {metadata.get('version')!r}"
        )
    for name, (size, _) in metadata["files"].items():
        found = (path / name).stat().st_size if (path / name).exists() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise DecodeError(f"the checkpoint {str(path)!r} cannot be loaded: {name} {what}", file=name)
    raw = (path / INDEX).read_bytes()
    if xxhash.xxh3_64_hexdigest(raw) != metadata["files"][INDEX][1]:
        raise DecodeError(f"the checkpoint {str(path)!r} cannot be loaded: {INDEX} is damaged", file=INDEX)
    return Checkpoint(path, metadata, *np.frombuffer(raw, np.int64).reshape(4, -1))
