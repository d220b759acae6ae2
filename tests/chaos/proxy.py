"""Between clients and a server: passes messages of `wire.stream` on, and on demand not as they are.

    drop        a message is lost, the connection lives
    duplicate   a message comes twice
    reorder     a message is overtaken by the next one of its direction, or comes late
    delay       a connection stands still for a while
    truncate    a message is cut in the middle, then the connection breaks
    cut         the connection breaks between two messages

It runs in a thread of its own, so that a test arms it by calling `arm`.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from transfer_queue.client.client import SocketConnector
from transfer_queue.messages import UnitInfo
from transfer_queue.metadata import ZMQServerInfo
from transfer_queue.wire.channel import Peer
from transfer_queue.wire.peer import AnyPeer
from transfer_queue.wire.ports import unix_address, unix_path

KINDS = ("drop", "duplicate", "reorder", "delay", "truncate", "cut")
UP, DOWN = "up", "down"  # to the server, from the server

_HELD_S = 0.5
_DELAY_S = 1.0
_COUNT = struct.Struct("<I")


class ProxyConnector(SocketConnector):
    """Reaches controller and units by the sockets of a proxy in a folder."""

    def __init__(self, info: ZMQServerInfo, folder: str) -> None:
        super().__init__(info)
        self._folder = Path(folder)

    def controller(self, client_id: str) -> AnyPeer:
        return self._through("controller", client_id)

    def unit(self, client_id: str, info: UnitInfo) -> AnyPeer:
        return self._through(info.unit_id, client_id)

    def _through(self, name: str, client_id: str) -> AnyPeer:
        return Peer.at(unix_address(str(self._folder / name)), token=self._info.token, client_id=client_id)


class Proxy:
    """One listening socket for each server. `servers`: their addresses by name."""

    def __init__(self, folder: Path, servers: dict[str, str]) -> None:
        self._folder = folder
        self._servers = servers
        self._plan: tuple[str, str, str, int, Future[str]] | None = None
        self._loop = asyncio.new_event_loop()
        self._pumps: set[asyncio.Task[None]] = set()
        self._listeners: list[asyncio.Server] = []
        self._thread = threading.Thread(target=self._loop.run_forever, name="chaos proxy", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def arm(self, kind: str, server: str, direction: str, number: int) -> Future[str]:
        """Do this to the `number`-th message from now of one direction; the result tells that it was done."""
        done: Future[str] = Future()
        self._loop.call_soon_threadsafe(self._set, (kind, server, direction, number, done))
        return done

    def disarm(self) -> None:
        self._loop.call_soon_threadsafe(self._set, None)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # ------------------------------------------------------------ in the loop

    def _set(self, plan: Any) -> None:
        self._plan = plan

    async def _listen(self) -> None:
        for name, address in self._servers.items():
            handle = self._accepting(unix_path(address), name)
            self._listeners.append(await asyncio.start_unix_server(handle, self._folder / name))

    async def _end(self) -> None:
        for listener in self._listeners:
            listener.close()
        pumps = list(self._pumps)
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)

    def _accepting(self, path: str, name: str) -> Any:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._pumps.add(task)
            ends = [writer]
            try:
                server_reader, server_writer = await asyncio.open_unix_connection(path)
                ends.append(server_writer)
                both = [self._pump(reader, server_writer, name, UP), self._pump(server_reader, writer, name, DOWN)]
                pumps = [asyncio.ensure_future(pump) for pump in both]
                try:
                    await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for pump in pumps:
                        pump.cancel()
                    await asyncio.gather(*pumps, return_exceptions=True)
            except (OSError, asyncio.CancelledError):
                pass
            finally:
                for end in ends:
                    end.transport.abort()
                self._pumps.discard(task)

        return accept

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, name: str, direction: str) -> None:
        held: list[bytes] = []
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                message = await _message(source, _HELD_S if held else None)
                fault = self._due(name, direction) if message else None
                if fault == "reorder":
                    held.append(message)
                    continue
                if not await _pass_on(message, sink, fault):
                    return
                for late in held:
                    sink.write(late)
                held.clear()
                await sink.drain()

    def _due(self, name: str, direction: str) -> str | None:
        if self._plan is None or self._plan[1:3] != (name, direction):
            return None
        kind, _, _, number, done = self._plan
        if number > 1:
            self._plan = (kind, name, direction, number - 1, done)
            return None
        self._plan = None
        done.set_result(kind)
        return kind


async def _message(source: asyncio.StreamReader, wait_s: float | None) -> bytes:
    """Read a message; nothing if none began within `wait_s`."""
    try:
        count = await asyncio.wait_for(source.readexactly(_COUNT.size), wait_s)
    except asyncio.TimeoutError:
        return b""
    sizes = await source.readexactly(_COUNT.size * _COUNT.unpack(count)[0])
    total = sum(struct.unpack(f"<{len(sizes) // _COUNT.size}I", sizes))
    return count + sizes + await source.readexactly(total)


async def _pass_on(message: bytes, sink: asyncio.StreamWriter, fault: str | None) -> bool:
    """Write a message as the fault would have it; return whether the connection goes on."""
    match fault:
        case "drop":
            return True
        case "duplicate":
            sink.write(message + message)
        case "delay":
            await asyncio.sleep(_DELAY_S)
            sink.write(message)
        case "truncate":
            sink.write(message[: max(len(message) // 2, 1)])
            await sink.drain()
            await asyncio.sleep(0)
            return False
        case "cut":
            return False
        case _:
            sink.write(message)
    return True
