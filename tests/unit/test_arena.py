"""Folders and files in shared memory: private, reserved, removed with their owner."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from transfer_queue.errors import CapacityExceeded, InvalidArgument
from transfer_queue.messages import ProcessId
from transfer_queue.storage.arena import Arena, Arenas, Planned
from transfer_queue.wire.folder import ServerFolder, remove_abandoned, same_host
from transfer_queue.wire.holders import is_alive, process_id

MIB = 1 << 20


def dead_process() -> ProcessId:
    """Return the id of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start_time = float(Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    identity = ProcessId(host=process_id().host, pid=child.pid, start_time=start_time)
    assert is_alive(identity)
    child.kill()
    child.wait()
    child.communicate()
    return identity


def test_this_process_is_alive_and_other_lives_of_its_id_are_not() -> None:
    """A process is known by id and start time; what runs on another host is never called dead."""
    me = process_id()
    assert is_alive(me) and process_id() is me
    assert not is_alive(ProcessId(host=me.host, pid=me.pid, start_time=me.start_time - 1))
    assert not is_alive(dead_process())
    assert is_alive(ProcessId(host="elsewhere", pid=1 << 22, start_time=0.0))


def test_a_forked_child_has_its_own_identity() -> None:
    """The identity is that of the process that asks, also after a fork."""
    parent = process_id()
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, str(process_id().pid).encode())
        os._exit(0)
    os.wait()
    child_pid = int(os.read(read, 32))
    os.close(read), os.close(write)
    assert child_pid != parent.pid


def test_a_folder_is_private_and_goes_away_with_close(tmp_path: Path) -> None:
    """Folder 0700, files 0600, nothing left after close, which may be repeated."""
    folder = ServerFolder("unit-0", root=tmp_path)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.path.iterdir()} == {0o600}
    assert folder.path.name.startswith(f"tq-{os.getuid()}-unit-0-")
    assert same_host(str(folder.path), folder.nonce)
    assert not same_host(str(folder.path), "another") and not same_host(str(tmp_path / "none"), folder.nonce)
    folder.close()
    folder.close()
    assert list(tmp_path.iterdir()) == []


def test_a_socket_path_is_short_enough(tmp_path: Path) -> None:
    """Paths beyond what the operating system takes are refused with the path."""
    with ServerFolder("u", root=Path("/dev/shm")) as folder:
        assert folder.socket_path("control.sock").endswith("/control.sock")
        with pytest.raises(InvalidArgument, match="at most 100 bytes"):
            folder.socket_path("s" * 100)
    with pytest.raises(InvalidArgument, match="letters"):
        ServerFolder("../x", root=tmp_path)


def test_leftovers_of_dead_owners_are_removed_and_living_ones_kept(tmp_path: Path) -> None:
    """The next start removes folders of dead owners; the living, the unreadable and the very young stay."""
    living = ServerFolder("living", root=tmp_path)
    elsewhere = ServerFolder("far", root=tmp_path, owner=ProcessId(host="elsewhere", pid=1, start_time=1.0))
    dead = ServerFolder("dead", root=tmp_path, owner=dead_process())
    prefix = f"tq-{os.getuid()}-"
    young, old, broken = (tmp_path / f"{prefix}{name}" for name in ("young", "old", "broken"))
    for path in (young, old, broken):
        path.mkdir()
    os.utime(old, (time.time() - 3600,) * 2)
    (broken / "owner").write_text(json.dumps({"pid": "?"}))
    assert sorted(remove_abandoned(tmp_path)) == sorted([dead.path.name, old.name])
    assert {path.name for path in tmp_path.iterdir()} == {
        living.path.name,
        elsewhere.path.name,
        young.name,
        broken.name,
    }


def test_an_arena_is_reserved_private_and_zero(tmp_path: Path) -> None:
    """The file has all its blocks before it is used, mode 0600, and is mapped shared."""
    arena = Arena(tmp_path / "arena-1", 4 * MIB)
    arena.fill()
    status = os.stat(arena.path)
    assert stat.S_IMODE(status.st_mode) == 0o600 and status.st_blocks * 512 >= 4 * MIB
    arena.memory[5] = 7
    assert Path(arena.path).read_bytes()[:8] == bytes([0, 0, 0, 0, 0, 7, 0, 0])
    arena.close()
    arena.close()
    assert arena.memory[5] == 7 and not Path(arena.path).exists()


def test_an_arena_is_opened_again_as_it_was_or_not_at_all(tmp_path: Path) -> None:
    """Its bytes are there and none of them free; a file of another size is refused, a file nobody knows removed."""
    first = Arenas(tmp_path, 4 * MIB, arena_bytes=MIB)
    for _ in range(2):
        grow(first, 1)
    whole, cut = first.members
    whole.memory[7] = 9
    os.truncate(cut.path, 4096)
    (tmp_path / "arena-unknown").touch()
    second = Arenas(tmp_path, 4 * MIB, arena_bytes=MIB)
    missing = second.reopen({arena.name: arena.size_bytes for arena in first.members} | {"arena-gone": MIB})
    assert missing == {cut.name: f"it has 4096 bytes instead of {MIB}", "arena-gone": missing["arena-gone"]}
    [again] = second.members
    assert (
        again.memory[7] == 9 and again.extents.free_total == 0 and list(tmp_path.iterdir()) == [tmp_path / whole.name]
    )
    grow(second, 1)
    assert len({arena.name for arena in (*first.members, *second.members)}) == 3


def test_full_memory_is_an_error_with_both_sizes() -> None:
    """A file that shared memory cannot hold raises at once and leaves nothing."""
    with ServerFolder("full") as folder:
        free = os.statvfs(folder.path).f_bavail * os.statvfs(folder.path).f_frsize
        before = set(folder.path.iterdir())
        with pytest.raises(CapacityExceeded, match=rf"no capacity for {1 << 50} more bytes") as caught:
            Arena(folder.path / "arena-1", 1 << 50)
        assert caught.value.details["needed_bytes"] == 1 << 50
        assert caught.value.details["free_bytes"] <= free + 64 * MIB
        assert set(folder.path.iterdir()) == before


def grow(arenas: Arenas, size_bytes: int) -> int | None:
    """Grow as a unit does; return the size of the new arena."""
    planned = arenas.plan_growth(size_bytes)
    if planned is None:
        return None
    arenas.add(arenas.create(planned))
    return planned.size_bytes


def test_arenas_grow_up_to_their_capacity(tmp_path: Path) -> None:
    """New arenas have the usual size or that of the request, and never exceed the capacity in all."""
    arenas = Arenas(tmp_path, 10 * MIB, arena_bytes=2 * MIB)
    assert grow(arenas, 100) == 2 * MIB
    assert arenas.allocate(2 * MIB, 64) is not None
    assert grow(arenas, 3 * MIB + 1) == 3 * MIB + 4096
    assert arenas.allocate(3 * MIB, 64) is not None
    assert arenas.plan_growth(4 * MIB) == Planned(4 * MIB, on_disk=False)
    assert arenas.plan_growth(MIB) is None
    assert arenas.plan_growth(100) == Planned(MIB - 4096, on_disk=False)
    assert arenas.plan_growth(1) is None
    assert arenas.total_bytes + arenas.growing_bytes == 10 * MIB
    arenas.close()
    assert list(tmp_path.iterdir()) == []


def test_empty_arenas_make_room_for_a_larger_one(tmp_path: Path) -> None:
    """A request as large as the whole capacity is served when nothing else is held; held arenas stay."""
    arenas = Arenas(tmp_path, 4 * MIB, arena_bytes=MIB)
    for _ in range(4):
        grow(arenas, 1)
    held = arenas.allocate(64, 64)
    assert held is not None
    assert arenas.plan_growth(4 * MIB) is None and len(arenas.members) == 4
    assert grow(arenas, 3 * MIB) == 3 * MIB
    assert [arena.size_bytes for arena in arenas.members] == [MIB, 3 * MIB]
    held[0].extents.free(held[1], 64)
    assert grow(arenas, 4 * MIB) == 4 * MIB
    assert len(list(tmp_path.iterdir())) == 1
