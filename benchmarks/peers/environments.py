"""Virtual environments for packages that are compared with this one, made once and kept in the user's cache folder."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path

TORCH = "torch>=2.6,<2.14"  # the range of this project, so that pip keeps the build that is at hand
LIBRARIES = {  # Debian's package of each
    "libibverbs.so.1": "libibverbs1",
    "librdmacm.so.1": "librdmacm1",
    "libnuma.so.1": "libnuma1",
    "liburing.so.2": "liburing2",
}
INSTALL_S = 1200.0

_COMPLETE = "complete.json"  # written last: a folder without it is what an interrupt left


class Unavailable(Exception):
    """A peer cannot be had or has failed; the text is one line that says why."""


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "transfer_queue_benchmarks"


def interpreter(name: str, requirements: Sequence[str]) -> Path:
    """The Python of an environment with the requirements; pip makes it if the cache has none. Raises `Unavailable`."""
    folder = cache_folder() / f"{name}-py{platform.python_version()}"
    python = folder / "bin" / "python"
    wanted = json.dumps(sorted(requirements))
    complete = folder / _COMPLETE
    if complete.is_file() and complete.read_text() == wanted:
        return python
    print(f"installing {' '.join(requirements)} ...", flush=True)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, symlinks=True)
        _install(python, requirements)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"cannot be installed: {last_line(str(error))}") from error
    complete.write_text(wanted)
    return python


def check_libraries(names: Sequence[str]) -> None:
    """Raises `Unavailable` with the Debian packages of the libraries that the system lacks."""
    missing = [name for name in names if not _loads(name)]
    if missing:
        named = ", ".join(f"{name} (Debian package {LIBRARIES[name]})" for name in missing)
        packages = " ".join(LIBRARIES[name] for name in missing)
        raise Unavailable(f"needs system libraries: {named}; apt-get install {packages}")


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


def clean_environment(**more: str) -> Mapping[str, str]:
    """This process's environment without what would lead Python, pip or Ray to this project or a running cluster."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "RAY_ADDRESS")
    return {**{key: value for key, value in os.environ.items() if key not in dropped}, **more}


def _install(python: Path, requirements: Sequence[str]) -> None:
    """By the pip of this environment: that of a new one costs seconds to unpack."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", *requirements]
    done = subprocess.run(
        command, env=clean_environment(), capture_output=True, text=True, timeout=INSTALL_S, check=False
    )
    if done.returncode != 0:
        raise OSError(last_line(done.stderr))


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
