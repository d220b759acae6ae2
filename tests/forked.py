"""Programs that use the client, in processes that need not load torch: one process has, and forks for each program.

`python -m tests.forked NUMBER` reads orders from the socket with this descriptor number, each with four
descriptors: those that are to be standard input, output and error of the program, and one for what becomes of it, its
process id and then its exit status, as lines. Between the two stands a process that waits for the program.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

TIMEOUT_S = 50.0
ROOT = Path(__file__).parents[1]

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
_ORDER_BYTES = 1 << 16
_SAID_BYTES = 1 << 20  # what a program may say that nobody reads before its end


class Forked:
    """A running program, with pipes at both ends; has what the tests use of `subprocess.Popen`."""

    def __init__(self, template: socket.socket, *order: str) -> None:
        pipes = [os.pipe() for _ in range(4)]
        (theirs_in, mine_in), *outward = pipes
        theirs = [theirs_in, *(write for _, write in outward)]
        for write in theirs[1:]:
            fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, _SAID_BYTES)
        try:
            socket.send_fds(template, [json.dumps(order).encode()], theirs)
        finally:
            for number in theirs:
                os.close(number)
        self.stdin = os.fdopen(mine_in, "w")
        self.stdout, self.stderr, self._fate = (os.fdopen(read) for read, _ in outward)
        self.returncode: int | None = None
        self.pid = int(self._fate.readline())

    def wait(self, timeout: float = TIMEOUT_S) -> int:
        """Return the exit status; negative: a signal. Raises `subprocess.TimeoutExpired`."""
        if self.returncode is None:
            if not select.select([self._fate], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a forked program", timeout)
            self.returncode = int(self._fate.readline())
        return self.returncode

    def kill(self) -> None:
        """SIGKILL, and wait; nothing if it has ended."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def communicate(self, text: str = "", timeout: float = TIMEOUT_S) -> tuple[str, str]:
        """Say something, end the input, and return all that is said until the end."""
        with contextlib.suppress(BrokenPipeError), self.stdin:
            self.stdin.write(text)
        self.wait(timeout)
        return self.stdout.read(), self.stderr.read()

    def close(self) -> None:
        """End the program and close the pipes."""
        self.kill()
        for end in (self.stdin, self.stdout, self.stderr, self._fate):
            with contextlib.suppress(BrokenPipeError):
                end.close()


class Template:
    """The process that forks. Programs end with their blocks, it ends with its own."""

    def __init__(self) -> None:
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forked", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
                env={**os.environ, **_ONE_THREAD},
            )

    @contextlib.contextmanager
    def run(self, code: str, *arguments: str, module: str = "") -> Iterator[Forked]:
        """Run Python code, or a module; torch and the client are loaded and unused. Killed if it runs at the end."""
        with contextlib.closing(Forked(self._orders, module, textwrap.dedent(code), *arguments)) as process:
            yield process

    def close(self) -> None:
        self._orders.close()
        self._process.wait(TIMEOUT_S)


# ---------------------------------------------------------------- the process that forks


def main() -> None:
    """Fork for each order until nobody is there to give one; returns in the processes of programs only."""
    import tensordict  # noqa: F401
    import torch  # noqa: F401

    import transfer_queue.client.client
    import transfer_queue.runtime.embedded
    import transfer_queue.runtime.processes  # noqa: F401

    gc.freeze()  # programs neither look through what is loaded nor copy it, also when they end
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who waits for programs is waited for by nobody
    orders = socket.socket(fileno=int(sys.argv[1]))
    while True:
        order, descriptors, *_ = socket.recv_fds(orders, _ORDER_BYTES, 4)
        if not order:
            os._exit(0)
        if os.fork() == 0:
            orders.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            program = os.fork()
            if program == 0:
                _run(descriptors, *json.loads(order))
                return
            _attend(program, descriptors)
        for number in descriptors:
            os.close(number)


def _run(descriptors: list[int], module: str, code: str, *arguments: str) -> None:
    """Be the program. What it raises ends the process as it does any other."""
    for number, descriptor in enumerate(descriptors[:3]):
        os.dup2(descriptor, number)
    for descriptor in descriptors:
        os.close(descriptor)
    sys.argv = [module or "-c", *arguments]
    if module:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), vars(main))


def _attend(program: int, descriptors: list[int]) -> NoReturn:
    """Tell what becomes of a program."""
    for descriptor in descriptors[:3]:
        os.close(descriptor)
    os.write(descriptors[3], f"{program}\n".encode())
    _, status = os.waitpid(program, 0)
    os.write(descriptors[3], f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


if __name__ == "__main__":
    main()
