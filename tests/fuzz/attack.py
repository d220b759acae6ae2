"""Sends broken frames to real servers, as a stranger and as a client, and checks what has to hold all the while.

After each batch the servers live and answer a good request; good requests between broken ones are answered, each once.
A stranger hears nothing beyond the introduction. At the end memory has not grown, and no smuggled code ran.
"""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.servers import Servers
from tests.fuzz.traffic import Traffic, as_stream, as_zmtp
from transfer_queue.errors import DecodeError, ProtocolMismatch
from transfer_queue.messages import GetAudit, GetUnitStats
from transfer_queue.wire.bell import Bell
from transfer_queue.wire.codec import decode, encode_message
from transfer_queue.wire.line import open_line
from transfer_queue.wire.security import Introduction, Kind

BATCH = 500
WAIT_S = 20.0

_GOOD_EACH = 25  # frames
_FIRST_ID = 0x6B8F31D4 << 32  # no broken request has it by chance
_TO_STRANGERS = {Kind.CHALLENGE, Kind.MISMATCH, Kind.REFUSED, Kind.WHO}
_GREETING = b"\xff" + b"\0" * 8 + b"\x7f\3\0" + b"NULL".ljust(20, b"\0") + b"\0" * 32
_READY = b"\4\x19\5READY\13Socket-Type\0\0\0\6DEALER"


@dataclass
class Report:
    """What was sent, and what was found wrong."""

    sent: Counter[str] = field(default_factory=Counter)
    good: int = 0
    wrong: list[str] = field(default_factory=list)


class Connection:
    """One connection that may send anything."""

    def __init__(self, address: str, token: bytes, name: str) -> None:
        self._bell = Bell()
        self.line = open_line(address, self._bell.fd)
        self._introduction = Introduction(token, name)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *error: object) -> None:
        self.line.close(linger=False)
        self._bell.close()

    def introduce(self) -> Connection:
        """Prove the token."""
        frame: bytes | None = self._introduction.hello()
        while not self._introduction.welcomed:
            if frame is not None:
                self.line.send([frame])
            frame = self._introduction.receive(next(self.received(lambda: True))[0])
        return self

    def received(self, wanted: Callable[[], bool], wait_s: float = WAIT_S) -> Iterator[list[Any]]:
        """Yield what arrives while more is wanted and the connection is there. Raises `TimeoutError`."""
        deadline = time.monotonic() + wait_s
        while wanted():
            frames = self.line.next()
            if frames is not None:
                yield frames
            elif not self.line.connected:
                return
            elif time.monotonic() > deadline:
                raise TimeoutError("nothing came")
            else:
                self.line.wait(0.05)
                self.line.read()

    def drain(self) -> Iterator[list[Any]]:
        """Yield what has arrived."""
        self.line.read()
        while (frames := self.line.next()) is not None:
            yield frames


class Attack:
    """One run against one pair of servers."""

    def __init__(self, servers: Servers, seed: int, folder: Path) -> None:
        self.report = Report()
        self._servers = servers
        self._random = Random(seed)
        self._canary = folder / "canary"
        self._traffic = Traffic(self._random, str(self._canary))
        self._names = itertools.count()

    def run(self, frames: int) -> Report:
        """Send about so many broken frames, in turn to each server in each way."""
        ways = [self._as_client, self._as_stranger, self._as_bytes]
        places = list(self._servers.addresses.items())
        turns = itertools.cycle([(way, *place) for way in ways for place in places])
        before = None
        while self.report.sent.total() < frames and not self.report.wrong:
            way, (server, transport), address = next(turns)
            way(server, transport, address)
            self._check(server, address)
            if before is None and self.report.sent.total() > frames // 10:
                before = self._servers.resident_bytes()
        if before is not None and self._servers.alive:
            grown = self._servers.resident_bytes() - before
            self.report.sent["MB of growth"] = grown >> 20
            self._hold(grown < 50 << 20, f"memory grew by {grown >> 20} MB")
        self._hold(not self._canary.exists(), "smuggled code ran")
        return self.report

    # ------------------------------------------------------------ three ways

    def _as_client(self, server: str, transport: str, address: str) -> None:
        """Broken messages, and good requests between them, over a connection that has proved the token."""
        good: set[int] = set()
        with Connection(address, self._servers.token, self._name()) as connection:
            connection.introduce()
            for number in range(BATCH):
                if number % _GOOD_EACH == 0:
                    self._ask(connection, server, _FIRST_ID + number)
                    good.add(_FIRST_ID + number)
                frames = self._traffic.broken(1 + number)
                if not frames[0] or frames[0][0] != Kind.HELLO:  # which would end what was proved
                    connection.line.send(frames, hold=True)
            connection.line.flush()
            self._answered(connection, good, f"{server} over {transport}")
        self.report.sent[f"{server} {transport} client"] += BATCH

    def _as_stranger(self, server: str, transport: str, address: str) -> None:
        """The same without a proof, or after one with a wrong token: answered by the introduction and nothing else."""
        with Connection(address, b"wrong" * 8, self._name()) as connection:
            for number in range(BATCH):
                if transport == "unix" and not connection.line.connected:
                    connection.line.reconnect()
                frames = self._traffic.broken(1 + number)
                if number % 50 == 0:
                    frames = [connection._introduction.hello()]
                connection.line.send(frames, hold=transport == "unix")
                if number % 50 == 1:
                    self._prove_wrongly(connection)
                self._overheard(connection)
            connection.line.flush()
            deadline = time.monotonic() + 0.05
            while time.monotonic() < deadline and connection.line.connected:
                connection.line.wait(0.01)
                self._overheard(connection)
        self.report.sent[f"{server} {transport} stranger"] += BATCH

    def _as_bytes(self, server: str, transport: str, address: str) -> None:
        """Bytes that no library of ours wrote: framing with lengths that lie, and noise."""
        random, unix = self._random, transport == "unix"
        for _ in range(BATCH // 50):
            frame = as_stream if unix else as_zmtp
            data = b"".join(frame(self._traffic.broken(1), random) for _ in range(50))
            if not unix and random.random() < 0.8:
                data = _GREETING + _READY + data
            elif random.random() < 0.2:
                data = random.randbytes(500) + data
            self._send_bytes(address, data)
        self.report.sent[f"{server} {transport} bytes"] += BATCH

    # ------------------------------------------------------------ inside

    def _name(self) -> str:
        return f"fuzz/{next(self._names)}"

    def _ask(self, connection: Connection, server: str, request_id: int) -> None:
        request = GetAudit(partition_id=None) if server == "controller" else GetUnitStats()
        connection.line.send(encode_message(request, request_id, 1), hold=True)

    def _answered(self, connection: Connection, good: set[int], where: str) -> None:
        """Every good request gets one answer."""
        left = set(good)
        try:
            for frames in connection.received(lambda: bool(left)):
                if not frames[0] or frames[0][0] != Kind.MESSAGE:
                    continue
                request_id = decode(frames)[0]
                self._hold(request_id not in good or request_id in left, f"{where}: two answers to {request_id}")
                left.discard(request_id)
        except (TimeoutError, DecodeError) as error:
            self._hold(False, f"{where}: {error!r}")
        self._hold(not left, f"{where}: {len(left)} of {len(good)} good requests had no answer")
        self.report.good += len(good)

    def _prove_wrongly(self, connection: Connection) -> None:
        connection.line.flush()
        with contextlib.suppress(TimeoutError, DecodeError, ProtocolMismatch):
            for frames in connection.received(lambda: True, 0.2):
                if frames[0] and frames[0][0] == Kind.CHALLENGE:
                    proof = connection._introduction.receive(frames[0])
                    connection.line.send([proof or b""])
                    return

    def _overheard(self, connection: Connection) -> None:
        for frames in connection.drain():
            kind = frames[0][0] if frames[0] else Kind.WHO
            self._hold(len(frames) == 1 and kind in _TO_STRANGERS, f"a stranger was told {frames!r:.100}")

    def _send_bytes(self, address: str, data: bytes) -> None:
        unix = address.startswith("unix://")
        with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as connected, contextlib.suppress(OSError):
            connected.settimeout(WAIT_S)
            host, _, port = address.removeprefix("tcp://").partition(":")
            connected.connect(address.removeprefix("unix://") if unix else (host, int(port)))
            connected.setblocking(False)
            deadline = time.monotonic() + 0.5
            while data and time.monotonic() < deadline:
                readable, writable, _ = select.select([connected], [connected], [], 0.1)
                if writable:
                    data = data[connected.send(data) :]
                if readable and not connected.recv(1 << 16):
                    return

    def _check(self, server: str, address: str) -> None:
        """The server lives, and serves a client that comes now."""
        if not self._servers.alive:
            self._hold(False, "the process of the servers died")
            return
        with Connection(address, self._servers.token, self._name()) as connection:
            try:
                connection.introduce()
                self._ask(connection, server, 1)
                connection.line.flush()
                self._answered(connection, {1}, f"{server} afterwards")
            except (TimeoutError, StopIteration) as error:
                self._hold(False, f"{server} does not serve a new client: {error!r}")

    def _hold(self, true: bool, text: str) -> None:
        if not true:
            self.report.wrong.append(text)
