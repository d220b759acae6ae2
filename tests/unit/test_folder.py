"""Folders that are found again: adopting, refusing, and what the janitor spares."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from transfer_queue.errors import DecodeError, InvalidArgument
from transfer_queue.messages import ProcessId
from transfer_queue.wire.folder import ServerFolder, folder_path, remove_abandoned, remove_left
from transfer_queue.wire.holders import from_record, host_id, identify, process_id, to_record
from transfer_queue.wire.locks import locked

DEAD = ProcessId(host=host_id(), pid=1, start_time=-1.0)  # the number lives, but it is another process


def killed(name: str, root: Path, supervisor: ProcessId | None = None) -> ServerFolder:
    """A folder with the key "k" as a server that was killed leaves it."""
    folder = ServerFolder(name, key="k", root=root, owner=DEAD, supervisor=supervisor)
    folder.leave()
    return folder


def test_a_successor_adopts_the_folder(tmp_path: Path) -> None:
    """Same path, same nonce, same files; the owner is the new process, and close removes it all."""
    first = killed("unit", tmp_path)
    first.write_record("server.json", {"port": 7})
    (first.path / "arena-1").write_bytes(b"rows")
    place = (first.path / "owner").stat().st_ino
    second = ServerFolder("unit", key="k", root=tmp_path)
    assert (second.path / "owner").stat().st_ino == place, "a successor needs no memory of its own"
    assert second.adopted and not first.adopted
    assert (second.path, second.nonce) == (first.path, first.nonce)
    assert second.read_record("server.json") == {"port": 7} and second.read_record("other.json") is None
    assert (second.path / "arena-1").read_bytes() == b"rows"
    assert json.loads((second.path / "owner").read_text())["pid"] == os.getpid()
    assert {stat.S_IMODE((second.path / name).stat().st_mode) for name in ("owner", "nonce", "server.json")} == {0o600}
    second.leave()
    third = ServerFolder("unit", key="k", root=tmp_path)
    assert third.adopted and third.nonce == first.nonce
    third.close()
    assert list(tmp_path.iterdir()) == []


def test_other_names_and_keys_are_other_folders(tmp_path: Path) -> None:
    """What is not the same key and name is not adopted, and nothing without a key is."""
    killed("unit", tmp_path, process_id())
    for name, key in (("unit", "other"), ("controller", "k"), ("unit", None)):
        with ServerFolder(name, key=key, root=tmp_path) as folder:
            assert not folder.adopted


def test_a_living_owner_is_not_replaced(tmp_path: Path) -> None:
    """The error names the process; its folder stays as it is."""
    with ServerFolder("unit", key="k", root=tmp_path) as folder:
        with pytest.raises(InvalidArgument, match=f"belongs to process {os.getpid()}, which is alive"):
            ServerFolder("unit", key="k", root=tmp_path)
        assert folder.path.is_dir() and (folder.path / "nonce").read_text() == folder.nonce


def test_a_folder_that_others_can_read_is_not_adopted(tmp_path: Path) -> None:
    """Whoever guesses a key and makes the folder first gains nothing."""
    path = folder_path("unit", "k", tmp_path)
    path.mkdir()
    path.chmod(0o755)
    with pytest.raises(InvalidArgument, match="not a private folder"):
        ServerFolder("unit", key="k", root=tmp_path)
    assert path.is_dir()


def test_a_start_that_was_cut_short_starts_over(tmp_path: Path) -> None:
    """A folder without nonce has nothing to adopt."""
    folder_path("unit", "k", tmp_path).mkdir(mode=0o700)
    with ServerFolder("unit", key="k", root=tmp_path) as folder:
        assert not folder.adopted and folder.nonce


def test_a_damaged_record_is_an_error(tmp_path: Path) -> None:
    """Half a file is named, not taken for none."""
    with ServerFolder("unit", key="k", root=tmp_path) as folder:
        (folder.path / "server.json").write_text('{"port": ')
        with pytest.raises(DecodeError, match=r"server\.json is damaged"):
            folder.read_record("server.json")


def test_the_janitor_spares_what_a_supervisor_may_restart(tmp_path: Path) -> None:
    """Between kill and restart another session starts: the folder is kept until the supervisor is dead too."""
    folder = killed("unit", tmp_path, supervisor=process_id())
    assert remove_abandoned(tmp_path) == [] and folder.path.is_dir()
    shutil.rmtree(folder.path)
    for supervisor in (None, DEAD):
        folder = killed("unit", tmp_path, supervisor)
        assert remove_abandoned(tmp_path) == [folder.path.name]


def test_the_janitor_spares_what_is_being_adopted(tmp_path: Path) -> None:
    """Whoever holds the folder's lock is about to own it; afterwards it is removed."""
    folder = killed("unit", tmp_path)
    with locked(folder.path, 1.0) as held:
        assert held and remove_abandoned(tmp_path) == []
    assert remove_abandoned(tmp_path) == [folder.path.name]


def test_what_is_left_is_removed_when_its_owner_is_dead(tmp_path: Path) -> None:
    """Not before, however long one waits."""
    with ServerFolder("unit", key="k", root=tmp_path, supervisor=process_id()) as folder:
        assert not remove_left(folder.path, 0.05) and folder.path.is_dir()
    killed("unit", tmp_path, supervisor=process_id())
    assert remove_left(folder.path, 1.0) and not folder.path.exists()
    assert remove_left(folder.path, 1.0)


def test_what_cannot_be_removed_is_tried_until_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that stays, whoever is dead, ends the wait in time."""
    folder = killed("unit", tmp_path, supervisor=process_id())
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *arguments, **options: None)
        assert not remove_left(folder.path, 0.05) and folder.path.is_dir()
    assert remove_left(folder.path, 1.0)


def test_of_several_successors_one_adopts(tmp_path: Path) -> None:
    """Processes that start at once under one key: one owner, the others are told so."""
    killed("unit", tmp_path, supervisor=process_id())
    code = """if True:
        import sys
        from pathlib import Path
        from transfer_queue.errors import InvalidArgument
        from transfer_queue.wire.folder import ServerFolder
        sys.stdin.read(1)
        try:
            print(ServerFolder("unit", key="k", root=Path(sys.argv[1])).adopted, flush=True)
        except InvalidArgument:
            print("refused", flush=True)
        sys.stdin.read()
        """
    command = [sys.executable, "-c", code, str(tmp_path)]
    racers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("!")
        racer.stdin.flush()
    outcomes = [racer.stdout.readline().strip() for racer in racers if racer.stdout is not None]
    assert sorted(outcomes) == ["True", "refused", "refused"]
    for racer in racers:
        racer.communicate(timeout=20)
        assert racer.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_processes_are_told_apart_by_start_time() -> None:
    """An identity survives its record; a number that nobody has is nobody."""
    me = process_id()
    again = from_record(json.loads(json.dumps(to_record(me))))
    assert (again.host, again.pid, again.start_time) == (me.host, me.pid, me.start_time)
    found = identify(os.getpid())
    assert found is not None and found.start_time == me.start_time
    assert identify(2**22 + 1) is None


def test_a_part_elsewhere_goes_with_the_folder(tmp_path: Path) -> None:
    """With `close`, after an adoption, and when it is removed without its owner; its name is that of the folder."""
    root, disk = tmp_path / "memory", tmp_path / "made" / "disk"
    root.mkdir()
    first = killed("unit", root)
    part = first.part_at(disk)
    assert part == disk / first.path.name and stat.S_IMODE(part.stat().st_mode) == 0o700
    (part / "spilled-1").write_bytes(b"rows")
    second = ServerFolder("unit", key="k", root=root)
    assert second.part_at(disk) == part and (part / "spilled-1").read_bytes() == b"rows"
    second.close()
    assert list(disk.iterdir()) == []
    killed("unit", root).part_at(disk)
    assert remove_abandoned(root) == [first.path.name] and list(disk.iterdir()) == []
    killed("unit", root).part_at(disk)
    assert remove_left(first.path, 1.0) and list(disk.iterdir()) == []


def test_a_part_that_moves_leaves_nothing_behind(tmp_path: Path) -> None:
    with ServerFolder("unit", root=tmp_path) as folder:
        old = folder.part_at(tmp_path / "old")
        new = folder.part_at(tmp_path / "new")
        assert new.is_dir() and not old.exists()


def test_only_a_part_of_the_same_name_is_removed(tmp_path: Path) -> None:
    """Whatever the record says."""
    other = tmp_path / "other"
    other.mkdir()
    for text in (str(other), "", "relative/" + folder_path("unit", "k").name):
        folder = ServerFolder("unit", key="k", root=tmp_path)
        (folder.path / "elsewhere").write_text(text)
        folder.close()
        assert other.is_dir() and not folder.path.exists()


def test_what_is_no_private_folder_is_no_part(tmp_path: Path) -> None:
    with ServerFolder("unit", root=tmp_path) as folder:
        (tmp_path / "disk" / folder.path.name).mkdir(parents=True, mode=0o755)
        with pytest.raises(InvalidArgument, match="not a private folder"):
            folder.part_at(tmp_path / "disk")
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="file"):
            folder.part_at(tmp_path / "file")
