"""Checksums of blocks: whatever bit of what was written changes, at rest or in transit, it is found and named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.asking_unit import MIB, clear, ids, rows
from tests.unit.returning_unit import ReturningUnit
from tests.unit.test_transfer import Host, located
from tests.unit.whole_block import write_block
from transfer_queue.client import columns
from transfer_queue.client.drivers import run
from transfer_queue.client.storing import store
from transfer_queue.client.transfer import Transfer, load
from transfer_queue.errors import DecodeError
from transfer_queue.messages import ColumnSpec, Fetched, Location, Pin, Unpin, Write
from transfer_queue.storage.block import (
    Directories,
    EncodedColumn,
    carve,
    fill_block,
    image_parts,
    plan_block,
)
from transfer_queue.storage.checksums import Suspect, verify
from transfer_queue.storage.digests import CHUNK_BYTES
from transfer_queue.wire.holders import process_id
from transfer_queue.wire.local import LocalPeer

BLOCK = 77


def some_columns() -> list[EncodedColumn]:
    """A column of every kind: dense, ragged, shaped, text, shared."""
    values = np.arange(96, dtype=np.uint8)
    return [
        EncodedColumn(ColumnSpec(name="dense", layout="dense", dtype="uint8", shape=(24,)), [values]),
        EncodedColumn(
            ColumnSpec(name="ragged", layout="ragged", dtype="uint8", shape=()), [values[:10]], ids(0, 3, 3, 7, 10)
        ),
        EncodedColumn(
            ColumnSpec(name="shaped", layout="shaped", dtype="uint8", shape=None),
            [values[:6], values[6:8]],
            ids(0, 2, 4, 6, 8),
            np.array([[1, 2], [2, 1], [1, 2], [2, 1]]),
        ),
        EncodedColumn(
            ColumnSpec(name="text", layout="text", dtype=None, shape=None), [values[40:50]], ids(0, 1, 2, 3, 10)
        ),
        EncodedColumn(
            ColumnSpec(name="shared", layout="dense", dtype="uint8", shape=(5,)),
            [values[:10]],
            references=ids(0, 1, 1, 0),
        ),
    ]


def open_and_verify(image: np.ndarray[Any, Any]) -> None:
    verify([Suspect(Directories().open_block(image, 0, BLOCK))])


def test_every_flipped_bit_is_found() -> None:
    """Each bit of header, directory, checksums and pieces, one after the other; only gaps between pieces are free."""
    plan = plan_block(some_columns(), 4, checked=True)
    image = np.zeros(plan.size_bytes, np.uint8)
    write_block(plan, image, BLOCK)
    open_and_verify(image)
    head = len(plan.head(BLOCK, np.zeros(len(plan.chunks or ()), np.uint64)))
    covered = [*range(head), *(at for start, buffer in plan.pieces for at in range(start, start + buffer.nbytes))]
    messages = []
    for at in covered:
        for bit in range(8):
            image[at] ^= 1 << bit
            with pytest.raises(DecodeError) as caught:
                open_and_verify(image)
            messages.append(caught.value.message)
            image[at] ^= 1 << bit
    assert len(messages) == 8 * len(covered) and all(f"block {BLOCK}" in message for message in messages)
    open_and_verify(image)


@pytest.mark.parametrize("field", ["dense", "ragged", "shaped", "text", "shared"])
def test_the_error_names_block_and_field(field: str) -> None:
    """A damaged value is found in its own field, and other fields of the block still verify."""
    plan = plan_block(some_columns(), 4, checked=True)
    image = np.zeros(plan.size_bytes, np.uint8)
    write_block(plan, image, BLOCK)
    block = Directories().open_block(image, 0, BLOCK)
    image[block.columns[field].values_at] ^= 1
    with pytest.raises(DecodeError, match=f"field '{field}' of block {BLOCK} is damaged") as caught:
        verify([Suspect(block)])
    assert caught.value.details["blocks"] == [BLOCK] and caught.value.details["field"] == field
    verify([Suspect(block, [name for name in block.columns if name != field])])


def large_block() -> tuple[Any, list[np.ndarray[Any, Any]]]:
    """Two fields of 40 rows of 100 kB, one of them as many buffers; a chunk holds parts of four rows."""
    values = np.random.default_rng(1).integers(0, 256, (40, 100_000), np.uint8)
    spec = ColumnSpec(name="x", layout="dense", dtype="uint8", shape=(100_000,))
    pieces = [
        EncodedColumn(spec, [values.reshape(-1)]),
        EncodedColumn(dataclasses.replace(spec, name="y"), list(values[::-1].copy())),
    ]
    return plan_block(pieces, 40, checked=True), [values, values[::-1]]


def test_chunks_are_the_same_however_they_are_written() -> None:
    """Copied by several threads, from one buffer or many, or sent in parts: one image, which verifies."""
    plan, (_, backwards) = large_block()
    assert plan.chunks is not None and len(plan.chunks) == 2 * -(-4_000_000 // CHUNK_BYTES)
    memory = np.zeros(plan.size_bytes, np.uint8)
    carve(plan, memory, BLOCK)
    with pytest.raises(DecodeError):
        open_and_verify(memory)
    fill_block(plan, memory)
    open_and_verify(memory)
    assert b"".join(part.tobytes() for part in image_parts(plan, BLOCK)) == memory.tobytes()
    column = Directories().open_block(memory).columns["y"]
    np.testing.assert_array_equal(memory[column.values_at :][:100_000], backwards[0])


def test_only_the_chunks_of_the_rows_are_read() -> None:
    """Damage in a row far away does not matter to a reader of others; in the row or its chunk it does."""
    plan, _ = large_block()
    image = np.zeros(plan.size_bytes, np.uint8)
    write_block(plan, image, BLOCK)
    block = Directories().open_block(image, 0, BLOCK)
    image[block.columns["y"].values_at + 30 * 100_000] ^= 1
    verify([Suspect(block, ["x", "y"], ids(0, 3, 39)), Suspect(block, ["x"])])
    with pytest.raises(DecodeError, match="field 'y'"):
        verify([Suspect(block, ["x", "y"], ids(0, 30))])


def test_bytes_of_cleared_rows_are_not_looked_at() -> None:
    """Bytes that went back to the unit may change; every chunk without such bytes is still checked."""
    plan, _ = large_block()
    image = np.zeros(plan.size_bytes, np.uint8)
    write_block(plan, image, BLOCK)
    block = Directories().open_block(image, 0, BLOCK)
    start, cleared = block.columns["x"].values_at, np.arange(10, 20)
    image[start + 1_000_000 : start + 2_000_000] = 0
    verify([Suspect(block, cleared=cleared), Suspect(block, slots=ids(0, 25, 39), cleared=cleared)])
    image[start + 30 * 100_000] ^= 1
    with pytest.raises(DecodeError, match="field 'x'"):
        verify([Suspect(block, cleared=cleared)])


def test_a_block_without_checksums_cannot_be_verified() -> None:
    """Who asks for verification is told that there is nothing to verify with."""
    plan = plan_block(some_columns(), 4)
    image = np.zeros(plan.size_bytes, np.uint8)
    write_block(plan, image, BLOCK)
    with pytest.raises(DecodeError, match=f"block {BLOCK} has no checksums"):
        open_and_verify(image)


# ---------------------------------------------------------------- clients


@pytest.fixture(params=["auto", "tcp"])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    made = Host(2, request.param)
    yield made
    made.close()


def put(host: Host, client: Transfer, data: dict[str, Any]) -> Location:
    count, encoded = columns.encode(data)
    _, block = run(store(client, plan_block(encoded, count, checked=client.checksums), 5.0))
    return located(block, count, tuple(data))


def checking_client(host: Host) -> Transfer:
    return Transfer(LocalPeer(host.list, "checking"), host.connect, transport=host.transport, checksums=True)


def damage(host: Host, block: int, needle: bytes) -> None:
    """Flip a bit of a stored block where `needle` lies."""
    peer = LocalPeer(host.services[(block >> 48) - 1], "damager")
    pinned: Any = peer.begin(Pin(blocks=ids(block), holder=process_id())).result(5.0)
    memory = np.memmap(pinned.arenas[0], np.uint8, "r+", int(pinned.offsets[0]), (int(pinned.sizes[0]),))
    memory[memory.tobytes().index(needle)] ^= 2
    peer.notify(Unpin(pin=pinned.pin))


@pytest.mark.parametrize("width", [10, 1_200_000])
@pytest.mark.parametrize("copy", [True, False])
def test_verified_reads_return_what_was_put_or_raise(host: Host, width: int, copy: bool) -> None:
    """On the same host and through messages, small and in many frames: equal while intact, an error when not."""
    client = checking_client(host)
    data = {"a": torch.arange(4 * width, dtype=torch.int32).reshape(4, width), "text": ["x", "yy", "", "needle"]}
    places = [put(host, client, data), put(host, client, data)]
    for place in places:
        found = columns.decode(run(load(client, [place], ["a", "text"], 5.0, copy=copy, verify=True)), 4)
        assert torch.equal(found["a"], data["a"]) and found["text"] == data["text"]
        del found
    damage(host, int(places[1].blocks[0]), b"needle")
    run(load(client, places[:1], ["a", "text"], 5.0, copy=copy, verify=True))
    run(load(client, places[1:], ["a"], 5.0, copy=copy, verify=True))
    run(load(client, places[1:], ["text"], 5.0, copy=copy))
    with pytest.raises(DecodeError, match=rf"field 'text' of block {places[1].blocks[0]} is damaged"):
        run(load(client, places[1:], ["a", "text"], 5.0, copy=copy, verify=True))
    client.close()
    assert host.stats("pins") == 0


def test_a_client_without_checksums_writes_none(host: Host) -> None:
    """A verified read of its rows says that they cannot be verified; a plain one returns them."""
    place = put(host, host.transfer, {"a": torch.arange(4)})
    with pytest.raises(DecodeError, match="has no checksums"):
        run(load(host.transfer, [place], ["a"], 5.0, verify=True))
    assert run(load(host.transfer, [place], ["a"], 5.0))["a"][0].rows == 4


def flipped(frame: bytes) -> bytes:
    return frame[:-65] + bytes([frame[-65] ^ 1]) + frame[-64:]


def cut_short(frame: bytes) -> bytes:
    return frame[:400]


@pytest.mark.parametrize("change", [flipped, cut_short])
def test_damage_on_the_way_is_found(change: Callable[[bytes], bytes]) -> None:
    """A frame of a reply that changes between unit and client raises; a block cut short does, too."""
    host = Host(1, "tcp")
    client = checking_client(host)
    place = put(host, client, {"a": torch.arange(1000)})

    class Damaged(LocalPeer):
        """A connection that changes what it carries."""

        def begin(self, request: Any, *args: Any, **options: Any) -> Any:
            pending = super().begin(request, *args, **options)
            reply = pending.result(5.0)
            if isinstance(reply, Fetched):
                object.__setattr__(reply, "frames", (change(bytes(reply.frames[0])),))
            return pending

    other = Transfer(
        LocalPeer(host.list, "other"), lambda info, local: Damaged(host.services[0], "other"), transport="tcp"
    )
    with pytest.raises(DecodeError):
        run(load(other, [place], ["a"], 5.0, verify=True))
    other.close()
    client.close()
    host.close()


# ---------------------------------------------------------------- recovery


def put_checked(unit: ReturningUnit, values: np.ndarray[Any, Any]) -> int:
    spec = ColumnSpec(name="x", layout="dense", dtype="uint8", shape=values.shape[1:])
    plan = plan_block([EncodedColumn(spec, [values.reshape(-1)])], len(values), checked=True)
    span = unit.reserve(plan.size_bytes)
    unit.ask(Write(span=span.span, offset=0, frames=tuple(image_parts(plan, span.first_block))))
    unit.controller.committed.add(span.first_block)
    return span.first_block


def flip_value(unit: ReturningUnit, block: int, at: int) -> None:
    pinned = unit.ask(Pin(blocks=ids(block), holder=process_id()))
    memory = np.memmap(pinned.arenas[0], np.uint8, "r+", int(pinned.offsets[0]), (int(pinned.sizes[0]),))
    memory[Directories().open_block(memory).columns["x"].values_at + at] ^= 1
    unit.tell(Unpin(pin=pinned.pin))


def test_a_unit_that_comes_back_verifies_what_has_checksums(folder: Path) -> None:
    """Damaged blocks are lost, also partly cleared ones; damage in bytes that were given back is none."""
    unit = ReturningUnit(folder, capacity_bytes=32 * MIB, arena_bytes=16 * MIB)
    values = rows(20, 100_000)
    whole, whole_bad, partial, partial_bad = (put_checked(unit, values) for _ in range(4))
    for block in (partial, partial_bad):
        unit.controller.cleared[block] = set(range(5, 10))
        unit.tell(clear(block, list(range(5, 10))))
    flip_value(unit, whole_bad, 1_999_999)
    flip_value(unit, partial, 700_000)
    flip_value(unit, partial_bad, 15 * 100_000)
    unit.come_back()
    assert sorted(unit.service.lost_blocks) == [whole_bad, partial_bad]
    assert all("field 'x'" in reason for reason in unit.service.lost_blocks.values())
    first, second = ([block for block in told if block & 0xFFFF == 0] for told in unit.controller.told[-2:])
    assert first == [whole, partial, partial_bad] and second == [whole, partial]
    np.testing.assert_array_equal(unit.read(whole, [0, 19]), values[[0, 19]])
    np.testing.assert_array_equal(unit.read(partial, [0, 19]), values[[0, 19]])
    unit.close()
