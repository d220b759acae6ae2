"""The endpoint file of a session: how other processes of the host find it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transfer_queue.errors import ConnectionLost, DeadlineExceeded, NotAuthorized
from transfer_queue.messages import ProcessId
from transfer_queue.metadata import ZMQServerInfo
from transfer_queue.wire.holders import from_record, is_alive, process_id, to_record
from transfer_queue.wire.locks import locked

ENDPOINT_FILE = "endpoint.json"


class EndpointFile:
    """A file that only its owner can read: the controller's address and token, and who keeps the session.

    Whoever wrote it chooses whom this process talks to: one that others may have written is not read but refused with
    `NotAuthorized`. `~` in the path is the home folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(os.path.expanduser(path))

    def __repr__(self) -> str:
        return f"<EndpointFile {self.path}>"

    def write(self, info: ZMQServerInfo, status: str = "", conf: Mapping[str, Any] | None = None) -> None:
        """Name this process as the one whose death ends the session.

        status   file that tells how it is
        conf     configuration of the session, as plain values
        """
        record = {"controller": info.to_record(), "owner": to_record(process_id()), "status": status, "conf": conf}
        partial = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        try:
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                json.dump(record, file)
            partial.rename(self.path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise ConnectionLost(f"cannot write the endpoint file {self.path}: {error}") from error

    def read(self) -> ZMQServerInfo:
        """Return what it takes to attach. Raises `ConnectionLost` if there is no such file, or its owner is dead."""
        record = self._record()
        owner = _owner(record)
        if owner is not None and not is_alive(owner):
            raise ConnectionLost(
                f"cannot attach: the endpoint file {str(self.path)!r} is of process {owner.pid}, which is dead; "
                "start the session again"
            )
        return ZMQServerInfo.from_record(record["controller"])

    def conf(self) -> dict[str, Any] | None:
        """Return the configuration of the session, None if it is not written there. Raises as `read`."""
        conf: dict[str, Any] | None = self._record().get("conf")
        return conf

    def status(self) -> dict[str, Any]:
        """Return what the owner says of its processes; empty if it keeps none. Raises as `read`."""
        self.read()
        path = self._record()["status"]
        try:
            status: dict[str, Any] = json.loads(Path(path).read_text()) if path else {}
        except FileNotFoundError as error:
            raise ConnectionLost(f"the session of {self.path} has just ended") from error
        return status

    def find(self) -> ZMQServerInfo | None:
        """Return what `read` returns; None if there is no file, or its owner is dead."""
        if not self.path.exists():
            return None
        owner = _owner(self._record())
        return self.read() if owner is None or is_alive(owner) else None

    def remove(self, info: ZMQServerInfo) -> None:
        """Remove the file if it is still that of this session."""
        with contextlib.suppress(ConnectionLost, NotAuthorized):
            if self._record()["controller"]["session_id"] == info.session_id:
                self.path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def starting(self, timeout_s: float) -> Iterator[None]:
        """Within the block, no other process starts a session with this file.

        Raises `DeadlineExceeded`, or `ConnectionLost` if there can be no such file.
        """
        lock = self.path.with_name(f"{self.path.name}.lock")
        with contextlib.ExitStack() as stack:
            try:
                held = stack.enter_context(locked(lock, timeout_s, create=True))
            except OSError as error:
                raise ConnectionLost(f"cannot write the endpoint file {self.path}: {error}") from error
            if not held:
                raise DeadlineExceeded(
                    f"attach: another process has been starting the session of {self.path} for {timeout_s:g} s "
                    f"(it holds {lock})"
                )
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)

    def _record(self) -> dict[str, Any]:
        try:
            record = json.loads(self._text())
            record["controller"]["session_id"]
        except NotAuthorized:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConnectionLost(
                f"cannot attach: no endpoint file at {str(self.path)!r} ({error}); "
                "is the process that started it still running?"
            ) from error
        assert isinstance(record, dict)
        return record

    def _text(self) -> str:
        """Return what is in the file, if nobody but this user (or root) can have written it."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise self._refused("is a symbolic link: give the path of the file itself") from error
            raise
        with open(descriptor) as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise self._refused("is no file: give the path of the file that the session wrote")
            if status.st_uid not in (os.getuid(), 0):
                raise self._refused(
                    f"belongs to user {status.st_uid}: attach as that user, or give the path of your own session's file"
                )
            if status.st_mode & 0o077:
                raise self._refused(
                    f"is open to other users (mode {stat.S_IMODE(status.st_mode):04o}): if it is of your own session, "
                    "chmod 600 it"
                )
            return file.read()

    def _refused(self, why: str) -> NotAuthorized:
        return NotAuthorized(f"the endpoint file {str(self.path)!r} is not to be trusted: it {why}")


def _owner(record: dict[str, Any]) -> ProcessId | None:
    try:
        return from_record(record["owner"])
    except (KeyError, TypeError):
        return None
