"""Real processes beside that of the tests, for call patterns of frameworks that need several."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT_S = 60.0

CONTEXT = multiprocessing.get_context("forkserver")  # the libraries are imported once, in the server
CONTEXT.set_forkserver_preload(["torch", "tensordict", "omegaconf", "pytest", "hypothesis", "transfer_queue.session"])


@contextlib.contextmanager
def working(target: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Iterator[Callable[[], list[Any]]]:
    """One process per call of `target`, with these arguments; yields what waits for all of them and gives the results.

    The function and the arguments are pickled: nothing is inherited. A call that raised fails the test with its
    traceback.
    """
    begun = []
    try:
        for arguments in calls:
            here, there = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_work, args=(there, target, arguments))
            process.start()
            there.close()
            begun.append((process, here))
        yield lambda: [_result(pipe) for _, pipe in begun]
    finally:
        for process, pipe in begun:
            pipe.close()
            process.join(TIMEOUT_S)
            process.close()


def in_processes(target: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The results of `target`, called at once in one process each."""
    with working(target, calls) as results:
        return results()


def descriptors() -> int:
    """How many this process has open."""
    return len(os.listdir("/proc/self/fd"))


def threads() -> int:
    """How many this process has, those that no Python code started among them."""
    return len(list(Path("/proc/self/task").iterdir()))


def _work(pipe: Connection, target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        answer = True, target(*arguments)
    except BaseException:
        answer = False, traceback.format_exc()
    pipe.send_bytes(pickle.dumps(answer))  # plainly: tensors would be shared, and their owner ends here
    pipe.close()


def _result(pipe: Connection) -> Any:
    assert pipe.poll(TIMEOUT_S), "a process did not answer in time"
    done, answer = pickle.loads(pipe.recv_bytes())
    assert done, f"in another process:\n{answer}"
    return answer
