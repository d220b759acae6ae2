"""What the machine can do at best: copies, pages, plain sockets. Measured in the run whose figures they stand beside.

Nothing of the queue is used here.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import zmq

from benchmarks.figures import Report
from benchmarks.interrupts import held_back
from benchmarks.scale import Scale

CASE = "floor"
MEMCPY = "memcpy, warm pages"
GATHER = "gather of random 32 KiB rows, reused buffer"
UNIX_ROUND_TRIP = "Unix socket round trip, 0.1 ms of work at either end"

_ROW_BYTES = 32 << 10
_PATIENCE_MS = 30_000
_WORK = b"w"
_WORK_S = 1e-4


def measure(report: Report, scale: Scale) -> None:
    """Add every floor to the report."""
    _measure_memory(report, scale)
    _measure_shared_memory(report, scale)
    with _echo() as (context, addresses):
        for transport, address in addresses.items():
            _measure_sockets(report, scale, context, transport, address)
    _measure_unix_socket(report, scale)


def _repeat(report: Report, scale: Scale, measure: str, size_bytes: int, step: Callable[[], object]) -> None:
    series = report.series(CASE, measure, size_bytes=size_bytes, skip=scale.warm_up)
    for _ in range(scale.warm_up + scale.rounds):
        begin = time.perf_counter()
        step()
        series.add(time.perf_counter() - begin)


# ---------------------------------------------------------------- memory


def _measure_memory(report: Report, scale: Scale) -> None:
    source = np.ones(scale.floor_bytes // _ROW_BYTES * _ROW_BYTES, np.uint8).reshape(-1, _ROW_BYTES)
    out = np.ones_like(source)
    order = np.random.default_rng(0).permutation(len(source))
    words = source.reshape(-1).view(np.int64)
    size = source.nbytes
    _repeat(report, scale, MEMCPY, size, lambda: np.copyto(out, source))
    _repeat(report, scale, "read all, xor of the words", size, lambda: np.bitwise_xor.reduce(words))
    _repeat(report, scale, GATHER, size, lambda: np.take(source, order, axis=0, out=out, mode="clip"))
    fresh = GATHER.replace("reused", "fresh")
    _repeat(report, scale, fresh, size, lambda: np.take(source, order, axis=0, mode="clip"))


def _measure_shared_memory(report: Report, scale: Scale) -> None:
    source = np.ones(scale.floor_bytes, np.uint8)
    size = source.nbytes
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.posix_fallocate(file.fileno(), 0, size)

        def write(memory: mmap.mmap) -> None:
            np.frombuffer(memory, np.uint8)[:] = source

        def write_by_fresh_map() -> None:
            with mmap.mmap(file.fileno(), size) as memory:
                write(memory)

        def write_fresh_pages() -> None:
            os.ftruncate(file.fileno(), 0)
            os.ftruncate(file.fileno(), size)
            write_by_fresh_map()

        _repeat(report, scale, "write to /dev/shm, fresh pages", size, write_fresh_pages)
        _repeat(report, scale, "write to /dev/shm, warm pages, fresh map", size, write_by_fresh_map)
        with mmap.mmap(file.fileno(), size) as memory:
            _repeat(report, scale, "write to /dev/shm, warm pages, kept map", size, lambda: write(memory))


# ---------------------------------------------------------------- sockets


@contextlib.contextmanager
def _echo() -> Iterator[tuple[zmq.Context[zmq.Socket[bytes]], dict[str, str]]]:
    """Another process that answers each message with an empty one, at once or after some work, and its addresses."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    spawning = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="tq-benchmark-") as folder:
        ours, theirs = spawning.Pipe()
        process = spawning.Process(target=_answer, args=(f"ipc://{Path(folder) / 'echo'}", theirs), daemon=True)
        with held_back():
            process.start()
        try:
            theirs.close()
            yield context, ours.recv()
        finally:
            process.terminate()
            process.join()
            ours.close()
            context.destroy(linger=0)


def _answer(ipc: str, pipe: multiprocessing.connection.Connection) -> None:
    answering = zmq.Context().socket(zmq.REP)
    answering.bind(ipc)
    port = answering.bind_to_random_port("tcp://127.0.0.1")
    pipe.send({"ipc": ipc, "tcp": f"tcp://127.0.0.1:{port}"})
    while True:
        if bytes(answering.recv(copy=False).buffer[:1]) == _WORK:
            _work()
        answering.send(b"")


def _work() -> None:
    end = time.perf_counter() + _WORK_S
    while time.perf_counter() < end:
        pass


def _measure_sockets(
    report: Report, scale: Scale, context: zmq.Context[zmq.Socket[bytes]], transport: str, address: str
) -> None:
    with context.socket(zmq.REQ) as asking:
        asking.setsockopt(zmq.RCVTIMEO, _PATIENCE_MS)
        asking.connect(address)

        def round_trip(message: bytes) -> None:
            asking.send(message, copy=False)
            asking.recv()

        large = bytes(scale.frame_bytes)
        frame = f"ZeroMQ frame of {scale.frame_bytes >> 20} MiB, {transport}"
        _repeat(report, scale, frame, len(large), lambda: round_trip(large))
        _measure_round_trips(report, scale, f"ZeroMQ round trip, {transport}", round_trip)


def _measure_round_trips(report: Report, scale: Scale, measure: str, round_trip: Callable[[bytes], object]) -> None:
    """Cores that went to sleep in between wake up slowly: a server and a client that do something show it."""
    for first, name in ((b"\0", ""), (_WORK, f", {1e3 * _WORK_S:.1f} ms of work at either end")):
        small = first.ljust(64)
        series = report.series(CASE, f"{measure}{name}", skip=scale.calls // 10)
        for _ in range(scale.calls + series.skip):
            if first == _WORK:
                _work()
            begin = time.perf_counter()
            round_trip(small)
            series.add(time.perf_counter() - begin)


def _measure_unix_socket(report: Report, scale: Scale) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    process = multiprocessing.get_context("fork").Process(target=_echo_bytes, args=(theirs, ours), daemon=True)
    with held_back():
        process.start()
    with theirs, ours:
        ours.settimeout(_PATIENCE_MS / 1e3)

        def round_trip(message: bytes) -> None:
            ours.sendall(message)
            ours.recv(len(message))

        _measure_round_trips(report, scale, "Unix socket round trip", round_trip)
        ours.shutdown(socket.SHUT_RDWR)
        process.join()


def _echo_bytes(theirs: socket.socket, ours: socket.socket) -> None:
    ours.close()
    while message := theirs.recv(64):
        if message[:1] == _WORK:
            _work()
        theirs.sendall(message)
