"""The parent's end of a peer's process."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers.environments import Unavailable, clean_environment, last_line

if TYPE_CHECKING:
    from typing_extensions import Self

ANSWER_S = 300.0
_END_S = 30.0  # for a peer to stop what it started


class Child:
    """A process that answers commands. Terminal interrupts do not reach it; close it in any case."""

    def __init__(self, python: Path, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._ending = contextlib.ExitStack()
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  closed with the rest
        self._ending.callback(self._errors.close)
        folder = self._ending.enter_context(tempfile.TemporaryDirectory(prefix="tq-peer-"))
        # The only thing of this project that a peer may import: next to it lies a package of the name of some peers.
        Path(folder, "benchmarks").symlink_to(Path(__file__).parents[1])
        self._process = subprocess.Popen(
            [str(python), "-m", "benchmarks.peers.serving", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=folder,
            env={**clean_environment(PYTHONPATH=folder), **(environment or {})},
            start_new_session=True,
        )
        self._received = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, command: str, *arguments: Any, timeout_s: float = ANSWER_S) -> Any:
        """The value of the answer. Raises `Unavailable` if it is an error, or if none comes."""
        assert self._process.stdin is not None
        line = json.dumps({"command": command, "arguments": arguments}) + "\n"
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Unavailable(self._why_ended()) from None
        answer = json.loads(self._line(command, timeout_s))
        if "error" in answer:
            raise Unavailable(f"{command}: {last_line(answer['error'])}")
        return answer["value"]

    def close(self) -> None:
        """May be called twice."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        for end in (None, self._process.terminate):
            if end is not None:
                end()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
                break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # what it left in its session
        self._process.wait()
        self._process.stdout.close()
        self._ending.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _line(self, command: str, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        file = self._process.stdout.fileno()
        end = time.monotonic() + timeout_s
        while b"\n" not in self._received:
            if not select.select([file], [], [], max(0.0, end - time.monotonic()))[0]:
                raise Unavailable(f"{command}: no answer in {timeout_s:.0f} s")
            chunk = os.read(file, 1 << 16)
            if not chunk:
                raise Unavailable(self._why_ended())
            self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _why_ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        self._errors.seek(0)
        return f"ended with status {self._process.returncode}: {last_line(self._errors.read())}"
