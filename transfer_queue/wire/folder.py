"""The folder of a server process in shared memory: its owner, its nonce, its sockets, its arenas.

`tq-<uid>-<name>-<random>` under /dev/shm, mode 0700. Whoever can read `nonce` is on the same host and the same user.
The folder goes away with `close`, at exit, or, after a kill, when the next server of the user starts: then `owner`
names a process that is dead.
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import shutil
import time
from pathlib import Path

from transfer_queue.errors import CapacityExceeded, InvalidArgument
from transfer_queue.messages import ProcessId
from transfer_queue.wire.holders import is_alive, process_id

SHARED_MEMORY = Path("/dev/shm")
MAX_SOCKET_PATH = 100

_NEVER_OWNED_S = 60.0


class ServerFolder:
    """A folder that lives as long as this process; a forked child never removes it."""

    def __init__(self, name: str, *, root: Path = SHARED_MEMORY, owner: ProcessId | None = None) -> None:
        """Create a folder under `root` that is abandoned when `owner` (None: this process) dies; remove such ones."""
        remove_abandoned(root)
        if not name or not name.replace("_", "").replace("-", "").isalnum() or len(name) > 32:
            raise InvalidArgument(f"the name of a folder is 1 to 32 letters, digits, '-' or '_', not {name!r}")
        self.path = root / f"tq-{os.getuid()}-{name}-{secrets.token_hex(6)}"
        self.nonce = secrets.token_hex(16)
        self._pid = os.getpid()
        try:
            self.path.mkdir(mode=0o700)
            self._write("nonce", self.nonce)
            owner = owner or process_id()
            self._write("owner", json.dumps({"host": owner.host, "pid": owner.pid, "start_time": owner.start_time}))
        except OSError as error:
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

    def close(self) -> None:
        """Remove the folder with all that is in it. Mappings of its files stay valid. May be called twice."""
        atexit.unregister(self.close)
        if os.getpid() == self._pid:
            shutil.rmtree(self.path, ignore_errors=True)

    def _write(self, name: str, text: str) -> None:
        partial = self.path / f".{name}"
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
        partial.rename(self.path / name)


def same_host(folder: str, nonce: str) -> bool:
    """Whether this process can read the folder of a server, so that it may use its sockets and arenas."""
    try:
        return bool(nonce) and (Path(folder) / "nonce").read_text() == nonce
    except (OSError, ValueError):
        return False


def remove_abandoned(root: Path = SHARED_MEMORY) -> list[str]:
    """Remove the folders under `root` whose owner, of the same user, is dead; return their names."""
    removed = []
    for path in root.glob(f"tq-{os.getuid()}-*"):
        if _abandoned(path):
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path.name)
    return removed


def _abandoned(path: Path) -> bool:
    try:
        status = path.lstat()
        if status.st_uid != os.getuid() or path.is_symlink() or not path.is_dir():
            return False
        owner = json.loads((path / "owner").read_text())
        return not is_alive(ProcessId(host=owner["host"], pid=owner["pid"], start_time=owner["start_time"]))
    except FileNotFoundError:
        return path.exists() and time.time() - status.st_mtime > _NEVER_OWNED_S
    except (OSError, ValueError, KeyError, TypeError):
        return False
