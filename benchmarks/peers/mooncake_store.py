"""Mooncake's store over TCP, between two processes: each field is one raw buffer.

The writer lends the store its memory, so that its puts stay in its process and the reader's gets cross the socket. Both
use registered buffers, which are as large as the batch and made once.
"""

from __future__ import annotations

import importlib
import multiprocessing
import socket
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import batches
from benchmarks.peers.peer import Peer
from benchmarks.scale import Scale

SEGMENT_BYTES = 1 << 30
_PACKAGE = "mooncake-transfer-engine-non-cuda"
_LOCAL_BYTES = 64 << 20
_START_S = 30.0

_store: Any = None  # of this process: a writer or a reader
_buffers: dict[str, np.ndarray] = {}


def _connect(name: str, master: str, segment_bytes: int) -> None:
    global _store  # noqa: PLW0603  one store per process, which outlives the calls
    Path("/proc/self/comm").write_text(name)
    _store = importlib.import_module("mooncake.store").MooncakeDistributedStore()
    _done(_store.setup("127.0.0.1", "P2PHANDSHAKE", segment_bytes, _LOCAL_BYTES, "tcp", "", master), "setup")


def _register(fields: dict[str, np.ndarray]) -> None:
    for buffer in _buffers.values():
        _done(_store.unregister_buffer(buffer.ctypes.data), "unregister_buffer")
    _buffers.clear()
    for name, buffer in fields.items():
        _done(_store.register_buffer(buffer.ctypes.data, buffer.nbytes), "register_buffer")
        _buffers[name] = buffer


def _prepare_writer(workload: str, scale: dict[str, Any]) -> dict[str, Any]:
    batch = batches.BATCHES[workload](Scale(**scale))
    _register({str(name): batch[name].numpy() for name in batch.keys()})  # noqa: SIM118  iterating yields rows
    return {"checksums": batches.touch(batch), "sizes": {name: buffer.nbytes for name, buffer in _buffers.items()}}


def _put() -> float:
    begin = time.perf_counter()
    for name, buffer in _buffers.items():
        _done(_store.put_from(name, buffer.ctypes.data, buffer.nbytes), "put_from")
    return time.perf_counter() - begin


def _clear() -> None:
    for name in _buffers:
        _done(_store.remove(name, True), "remove")


def _prepare_reader(sizes: dict[str, int]) -> None:
    _register({name: np.zeros(size, np.uint8) for name, size in sizes.items()})


def _read(checksums: dict[str, int]) -> tuple[float, float]:
    begin = time.perf_counter()
    for name, buffer in _buffers.items():
        if _store.get_into(name, buffer.ctypes.data, buffer.nbytes) != buffer.nbytes:
            raise RuntimeError(f"get_into of {name} failed")
    got = time.perf_counter()
    found = batches.touch({name: buffer.view(np.float32) for name, buffer in _buffers.items()})
    touched = time.perf_counter()
    batches.check(found, checksums)
    return got - begin, touched - got


def _done(status: int, call: str) -> None:
    if status != 0:
        raise RuntimeError(f"{call} failed with status {status}")


class MooncakeStore(Peer):
    def __init__(self) -> None:
        self._master: subprocess.Popen[bytes] | None = None
        self._processes: list[ProcessPoolExecutor] = []

    def open(self) -> dict[str, str]:
        rpc, metrics = _free_ports(2)
        program = Path(sys.executable).parent / "mooncake_master"
        options = [f"--rpc_port={rpc}", "--rpc_address=127.0.0.1", f"--metrics_port={metrics}"]
        self._master = subprocess.Popen([str(program), *options], stdout=sys.stderr)
        _await_port(rpc, self._master)
        address = f"127.0.0.1:{rpc}"
        self._writer = self._start("writer", address, SEGMENT_BYTES)
        self._reader = self._start("reader", address, 0)
        return {_PACKAGE: metadata.version(_PACKAGE)}

    def close(self) -> None:
        for process in reversed(self._processes):
            process.shutdown()
        self._processes.clear()
        if self._master is not None:
            self._master.terminate()
            self._master.wait()
            self._master = None

    def prepare(self, workload: str, scale: dict[str, Any]) -> None:
        facts = self._writer.submit(_prepare_writer, workload, scale).result()
        self._checksums = facts["checksums"]
        self._reader.submit(_prepare_reader, facts["sizes"]).result()

    def put(self) -> float:
        return self._writer.submit(_put).result()

    def read(self) -> tuple[float, ...]:
        return self._reader.submit(_read, self._checksums).result()

    def clear(self) -> None:
        self._writer.submit(_clear).result()

    def _start(self, *place: Any) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        process = ProcessPoolExecutor(1, mp_context=context, initializer=_connect, initargs=place)
        self._processes.append(process)
        return process


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _await_port(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError("mooncake_master does not answer")
