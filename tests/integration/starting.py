"""Programs in processes of their own, and what a session leaves."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.forked import ROOT, TIMEOUT_S, Forked
from tests.leaks import Snapshot
from transfer_queue.wire.channel import Peer

__all__ = ["TIMEOUT_S", "folders", "impatient", "line_of", "program", "wait_until"]


@contextlib.contextmanager
def program(code: str, *arguments: str, module: str = "") -> Iterator[subprocess.Popen[str]]:
    """Run Python code, or a module, with pipes at both ends; killed at the end if it still runs."""
    what = ["-m", module] if module else ["-c", textwrap.dedent(code)]
    with subprocess.Popen(
        [sys.executable, *what, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str] | Forked) -> str:
    """Return the next line that a program prints; fails with its errors if it ended instead."""
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    assert line, process.stderr.read()
    return line.strip()


def wait_until(holds: Callable[[], Any]) -> None:
    """Wait for what another process does."""
    deadline = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def folders() -> set[str]:
    """The folders of sessions in shared memory, without those of other test runs beside this one."""
    return set(Snapshot.take().shared.values())


@contextlib.contextmanager
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever connects meanwhile waits for a server that is gone for hardly longer than the request itself may wait."""
    with monkeypatch.context() as patch:
        patch.setitem(Peer.__init__.__kwdefaults__, "grace_s", 0.3)
        yield
