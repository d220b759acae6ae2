"""Between clients and a server: passes on what comes, and on demand not as it is.

Through a Unix socket it passes messages of `wire.stream`, and the fault meets one of them:

    drop        a message is lost, the connection lives
    duplicate   a message comes twice
    reorder     a message is overtaken by the next one of its direction, or comes late
    delay       a connection stands still for a while
    truncate    a message is cut in the middle, then the connection breaks
    cut         the connection breaks between two messages

Through TCP it passes bytes, whose order and number TCP itself guarantees; what can happen to them is:

    drop        from some moment on all bytes of a connection are lost, which stays open (a network that was parted)
    duplicate   what a connection has sent so far comes again, over a second one (somebody replays it)
    delay       a connection stands still for a while
    split       bytes come one by one
    truncate    the connection breaks in the middle of what is sent
    cut         the connection breaks between two sendings

It runs in a thread of its own, so that a test arms it by calling `arm`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import struct
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transfer_queue.client.client import SocketConnector
from transfer_queue.messages import UnitInfo
from transfer_queue.metadata import ZMQServerInfo
from transfer_queue.wire.channel import Peer
from transfer_queue.wire.peer import AnyPeer
from transfer_queue.wire.ports import is_unix_address, tcp_address, unix_address, unix_path

UNIX, TCP = "unix", "tcp"
KINDS = {
    UNIX: ("drop", "duplicate", "reorder", "delay", "truncate", "cut"),
    TCP: ("drop", "duplicate", "delay", "split", "truncate", "cut"),
}
UP, DOWN = "up", "down"  # to the server, from the server

_HELD_S = 0.5
_DELAY_S = 1.0
_REPLAYED_S = 2.0
_HOST = "127.0.0.1"
_MOST_BYTES = 1 << 16  # of what is taken for one sending
_SINGLE = 400  # bytes of a sending that come one by one, the headers of messages among them
_MOST_KEPT = 1 << 18  # of the beginning of a connection, to be replayed
_COUNT = struct.Struct("<I")

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Dial = Callable[[], Awaitable[Ends]]


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
        port = self._folder / f"{name}.port"
        address = tcp_address(_HOST, int(port.read_text())) if port.exists() else unix_address(str(self._folder / name))
        return Peer.at(address, token=self._info.token, client_id=client_id)


@dataclass
class _Connection:
    """One that is passed on. `sent`: the beginning of what went up; `lost`: its bytes arrive nowhere any more."""

    name: str
    dial: Dial
    sent: bytearray = field(default_factory=bytearray)
    lost: bool = False


class Proxy:
    """One listening socket for each server. `servers`: their addresses by name, `unix:` or `tcp:`."""

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
        """Do this to the `number`-th message (TCP: sending) from now of one direction; the result: it was done."""
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
            if is_unix_address(address):
                dial = functools.partial(asyncio.open_unix_connection, unix_path(address))
                accept = self._accepting(name, dial, self._pump)
                self._listeners.append(await asyncio.start_unix_server(accept, self._folder / name))
                continue
            host, _, port = address.removeprefix("tcp://").rpartition(":")
            dial = functools.partial(asyncio.open_connection, host.strip("[]"), int(port))
            accept = self._accepting(name, dial, self._pump_bytes)
            self._listeners.append(await asyncio.start_server(accept, _HOST, 0))
            own_port = self._listeners[-1].sockets[0].getsockname()[1]
            (self._folder / f"{name}.port").write_text(str(own_port))

    async def _end(self) -> None:
        for listener in self._listeners:
            listener.close()
        pumps = list(self._pumps)
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)

    def _accepting(self, name: str, dial: Dial, pump: Any) -> Any:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._pumps.add(task)
            ends = [writer]
            connection = _Connection(name, dial)
            try:
                server_reader, server_writer = await dial()
                ends.append(server_writer)
                both = [pump(reader, server_writer, connection, UP), pump(server_reader, writer, connection, DOWN)]
                pumps = [asyncio.ensure_future(one) for one in both]
                try:
                    await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for one in pumps:
                        one.cancel()
                    await asyncio.gather(*pumps, return_exceptions=True)
            except (OSError, asyncio.CancelledError):
                pass
            finally:
                for end in ends:
                    end.transport.abort()
                self._pumps.discard(task)

        return accept

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, connection: _Connection, direction: str
    ) -> None:
        held: list[bytes] = []
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                message = await _message(source, _HELD_S if held else None)
                fault = self._due(connection.name, direction) if message else None
                if fault == "reorder":
                    held.append(message)
                    continue
                if not await _pass_on(message, sink, fault):
                    return
                for late in held:
                    sink.write(late)
                held.clear()
                await sink.drain()

    async def _pump_bytes(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, connection: _Connection, direction: str
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(_MOST_BYTES):
                if direction == UP and len(connection.sent) < _MOST_KEPT:
                    connection.sent += data
                fault = self._due(connection.name, direction)
                connection.lost |= fault == "drop"
                if connection.lost:
                    continue
                if fault == "duplicate":
                    self._replay(connection)
                if not await _pass_on_bytes(data, sink, fault):
                    return
                await sink.drain()

    def _replay(self, connection: _Connection) -> None:
        """Send what the connection has sent so far over another one, whose answers go nowhere."""

        async def replay() -> None:
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                reader, writer = await connection.dial()
                try:
                    writer.write(bytes(connection.sent))
                    await writer.drain()
                    await asyncio.wait_for(reader.read(-1), _REPLAYED_S)
                finally:
                    writer.transport.abort()

        task = asyncio.ensure_future(replay())
        self._pumps.add(task)
        task.add_done_callback(self._pumps.discard)

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
        case _:
            return await _pass_on_bytes(message, sink, fault)
    return True


async def _pass_on_bytes(data: bytes, sink: asyncio.StreamWriter, fault: str | None) -> bool:
    """As `_pass_on`, for faults that a stream of bytes can have too."""
    match fault:
        case "delay":
            await asyncio.sleep(_DELAY_S)
            sink.write(data)
        case "split":
            for at in range(len(data[:_SINGLE])):
                sink.write(data[at : at + 1])
                await sink.drain()
                await asyncio.sleep(0.0005)
            sink.write(data[_SINGLE:])
        case "truncate":
            sink.write(data[: max(len(data) // 2, 1)])
            await sink.drain()
            await asyncio.sleep(0)
            return False
        case "cut":
            return False
        case _:
            sink.write(data)
    return True
