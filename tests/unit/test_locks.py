"""Locks between processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from transfer_queue.wire.locks import locked


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    """A second one waits for as long as it was told to, and gets the lock when the first is done."""
    path = tmp_path / "lock"
    with locked(path, 0.0, create=True) as held:
        assert held and path.stat().st_mode & 0o777 == 0o600
        began = time.monotonic()
        with locked(path, 0.1) as again:
            assert not again
        assert time.monotonic() - began >= 0.1
    with locked(path, 0.0) as held:
        assert held


def test_no_path_no_lock(tmp_path: Path) -> None:
    """What is not there cannot be locked, unless it is to be made."""
    with locked(tmp_path / "none", 1.0) as held:
        assert not held


def test_a_path_that_was_removed_meanwhile(tmp_path: Path) -> None:
    """The lock of a file that the last holder removed is worth nothing: the next one is made anew."""
    path = tmp_path / "lock"
    with locked(path, 0.0, create=True):
        path.unlink()
        with locked(path, 0.0, create=True) as held:
            assert held


def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    """Killed holders hold nothing."""
    path = tmp_path / "lock"
    code = """if True:
        import sys, time
        from pathlib import Path
        from transfer_queue.wire.locks import locked
        with locked(Path(sys.argv[1]), 0.0, create=True):
            print("held", flush=True)
            time.sleep(60)
        """
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with locked(path, 0.0) as held:
            assert not held
        os.kill(holder.pid, 9)
    with locked(path, 1.0) as held:
        assert held
