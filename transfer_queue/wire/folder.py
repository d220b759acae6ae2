"""The folder of a server process in shared memory: its owner, its nonce, its sockets, its arenas.

`tq-<uid>-<name>-<random or key>` under /dev/shm, mode 0700. Whoever can read `nonce` is on the same host and the same
user. A folder with a key can be found again: the server that takes the place of a dead one *adopts* it, with the
nonce, the sockets and all other files. The folder goes away with `close`, at exit, or, after a kill, when the next
server of the user starts: then `owner` names a process that is dead, and so is the supervisor that could have started
it again. It may have a *part* of the same name elsewhere, on disk, which goes with it: `elsewhere` says where.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import stat
import time
from pathlib import Path
from typing import Any

from transfer_queue.errors import CapacityExceeded, DecodeError, InvalidArgument
from transfer_queue.messages import ProcessId
from transfer_queue.wire.holders import from_record, is_alive, process_id, to_record
from transfer_queue.wire.locks import locked

SHARED_MEMORY = Path("/dev/shm")
MAX_SOCKET_PATH = 100

_OWNER = "owner"
_ELSEWHERE = "elsewhere"
_OWNER_BYTES = 1024
_NOBODY = -1.0  # start time of no process
_NEVER_OWNED_S = 60.0
_LOCK_S = 10.0
_LOOK_AGAIN_S = 0.02


class ServerFolder:
    """A folder that lives as long as this process; a forked child never removes it."""

    def __init__(
        self,
        name: str,
        *,
        key: str | None = None,
        root: Path = SHARED_MEMORY,
        owner: ProcessId | None = None,
        supervisor: ProcessId | None = None,
    ) -> None:
        """Create a folder under `root`, or adopt the one of this `name` and `key`; remove what others abandoned.

        owner       the folder is abandoned when this process dies (None: this process) ...
        supervisor  ... and this one too: while it lives, it may start the owner anew

        Raises `InvalidArgument` if the owner of a folder with this key is alive.
        """
        if not name or not name.replace("_", "").replace("-", "").isalnum() or len(name) > 32:
            raise InvalidArgument(f"the name of a folder is 1 to 32 letters, digits, '-' or '_', not {name!r}")
        self.path = folder_path(name, key, root)
        self._pid = os.getpid()
        remove_abandoned(root, spare=self.path)
        self._owners = {
            "key": key,
            "supervisor": None if supervisor is None else to_record(supervisor),
            **to_record(owner or process_id()),
        }
        self.adopted = False
        try:
            self._enter()
        except OSError as error:
            if not self.adopted:
                shutil.rmtree(self.path, ignore_errors=True)
            raise CapacityExceeded(f"cannot create {self.path}: {error}; is there capacity left in {root}?") from error
        atexit.register(self.close)

    def __repr__(self) -> str:
        return f"<ServerFolder {self.path}>"

    def __enter__(self) -> ServerFolder:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def socket_path(self, name: str) -> str:
        """Return a path for a socket, short enough for the operating system."""
        path = str(self.path / name)
        if len(os.fsencode(path)) > MAX_SOCKET_PATH:
            raise InvalidArgument(f"a socket path has at most {MAX_SOCKET_PATH} bytes, not {len(path)}: {path}")
        return path

    def part_at(self, root: Path) -> Path:
        """Return a private folder under `root` that goes away with this one; after an adoption, the one of before.

        Raises `OSError` or `InvalidArgument` if there can be none.
        """
        part = root.absolute() / self.path.name
        if _part_of(self.path) != part:
            _remove_part(self.path)
            self._write(_ELSEWHERE, str(part))
        root.mkdir(parents=True, exist_ok=True)
        part.mkdir(mode=0o700, exist_ok=True)
        _check_private(part)
        return part

    def write_record(self, name: str, record: dict[str, Any]) -> None:
        """Write a small JSON file that only this user can read; it appears or is replaced as a whole."""
        try:
            self._write(name, json.dumps(record))
        except OSError as error:
            raise CapacityExceeded(f"cannot write {self.path / name}: {error}; is there capacity left?") from error

    def read_record(self, name: str) -> dict[str, Any] | None:
        """Return what `write_record` wrote, maybe in an earlier process; None if nothing was."""
        try:
            record = json.loads((self.path / name).read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise DecodeError(f"{self.path / name} is damaged: {error}") from error
        assert isinstance(record, dict)
        return record

    def leave(self) -> None:
        """Leave the folder as it is, for the process that takes the place of this one."""
        atexit.unregister(self.close)
        if os.getpid() == self._pid:
            self._write_owner(self._owners | {"start_time": _NOBODY})

    def close(self) -> None:
        """Remove the folder with all that is in it. Mappings of its files stay valid. May be called twice."""
        atexit.unregister(self.close)
        if os.getpid() == self._pid:
            remove_folder(self.path)

    def _enter(self) -> None:
        while True:
            with contextlib.suppress(FileExistsError):
                self.path.mkdir(mode=0o700)
            with locked(self.path, _LOCK_S) as held:
                if held:
                    self._settle_in()
                    return
            if self.path.exists():
                raise InvalidArgument(f"{self.path} is being used by another process that starts")

    def _settle_in(self) -> None:
        _check_private(self.path)
        last = _owner(self.path)
        if last is not None and is_alive(last):
            raise InvalidArgument(f"{self.path} belongs to process {last.pid}, which is alive: stop it first")
        nonce = self.path / "nonce"
        self.adopted = nonce.exists()
        if not self.adopted:
            self._write("nonce", secrets.token_hex(16))
        self.nonce = nonce.read_text()
        self._write_owner(self._owners)

    def _write_owner(self, owners: dict[str, Any]) -> None:
        """Name the owner; where there was one, without any new space: a successor may find the memory full."""
        text = json.dumps(owners).ljust(_OWNER_BYTES)
        assert len(text) == _OWNER_BYTES
        try:
            descriptor = os.open(self.path / _OWNER, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            self._write(_OWNER, text)
            return
        try:
            os.pwrite(descriptor, text.encode(), 0)
        finally:
            os.close(descriptor)

    def _write(self, name: str, text: str) -> None:
        partial = self.path / f".{name}"
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)
        partial.rename(self.path / name)


def folder_path(name: str, key: str | None, root: Path = SHARED_MEMORY) -> Path:
    """Return where the folder of this name and key is; without a key, a new place each time."""
    mark = secrets.token_hex(6) if key is None else hashlib.sha256(key.encode()).hexdigest()[:16]
    return root / f"tq-{os.getuid()}-{name}-{mark}"


def same_host(folder: str, nonce: str) -> bool:
    """Whether this process can read the folder of a server, so that it may use its sockets and arenas."""
    try:
        return bool(nonce) and (Path(folder) / "nonce").read_text() == nonce
    except (OSError, ValueError):
        return False


def remove_abandoned(root: Path = SHARED_MEMORY, *, spare: Path | None = None) -> list[str]:
    """Remove the folders under `root` whose owner and supervisor, of the same user, are dead; return their names."""
    removed = []
    for path in root.glob(f"tq-{os.getuid()}-*"):
        if path != spare and _abandoned(path):
            with locked(path, 0.0) as held:
                if held and _abandoned(path):  # nobody adopted it meanwhile
                    remove_folder(path)
                    removed.append(path.name)
    return removed


def waiting_for_successors(root: Path = SHARED_MEMORY) -> list[tuple[str, Path]]:
    """Return the folders under `root`, each with its key, whose owner is dead while its supervisor lives."""
    found = []
    for path in root.glob(f"tq-{os.getuid()}-*"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            owners = json.loads((path / _OWNER).read_text())
            if owners["key"] is not None and not is_alive(from_record(owners)):
                found.append((owners["key"], path))
    return found


def remove_left(path: Path, timeout_s: float) -> bool:
    """Remove a folder that nobody will adopt any more, as soon as its owner is dead; return whether it is gone."""
    deadline = time.monotonic() + timeout_s
    while path.exists():
        with contextlib.suppress(DecodeError):
            owner = _owner(path)
            if owner is None or not is_alive(owner):
                remove_folder(path)
                if not path.exists():
                    break
        if time.monotonic() >= deadline:
            return False
        time.sleep(_LOOK_AGAIN_S)
    return True


def remove_folder(path: Path) -> None:
    """Remove the folder of a server with all that is in it, and its part elsewhere. Nothing happens if it is gone."""
    _remove_part(path)
    shutil.rmtree(path, ignore_errors=True)


def _remove_part(path: Path) -> None:
    part = _part_of(path)
    if part is not None:
        shutil.rmtree(part, ignore_errors=True)


def _part_of(path: Path) -> Path | None:
    with contextlib.suppress(OSError, ValueError):
        part = Path((path / _ELSEWHERE).read_text())
        if part.is_absolute() and part.name == path.name:
            return part
    return None


def _check_private(path: Path) -> None:
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise InvalidArgument(f"{path} is not a private folder of this user")


def _abandoned(path: Path) -> bool:
    try:
        status = path.lstat()
        if status.st_uid != os.getuid() or path.is_symlink() or not path.is_dir():
            return False
        owners = json.loads((path / _OWNER).read_text())
        supervisor = owners.get("supervisor")
        return not is_alive(from_record(owners)) and (supervisor is None or not is_alive(from_record(supervisor)))
    except FileNotFoundError:
        return path.exists() and time.time() - status.st_mtime > _NEVER_OWNED_S
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _owner(path: Path) -> ProcessId | None:
    """Return the last owner of a folder; None if it never had one."""
    try:
        return from_record(json.loads((path / _OWNER).read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DecodeError(f"{path / _OWNER} is damaged: {error}") from error
