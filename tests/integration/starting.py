"""Programs in processes of their own, and what a session leaves."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.leaks import Snapshot

TIMEOUT_S = 50.0
ROOT = Path(__file__).parents[2]


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


def line_of(process: subprocess.Popen[str]) -> str:
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
