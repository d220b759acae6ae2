"""One connection of a client: a line, the introduction, and the requests that wait on it.

A link has one owner at a time (a thread or an event loop), and only the owner calls it. Requests are kept until they
are answered: when the server asks who we are (it is new, it forgot us, the connection was made anew), we introduce
ourselves again and send them again; the server knows by their ids which it has seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from transfer_queue.errors import ConnectionLost, DecodeError, NotAuthorized, ProtocolMismatch, TransferQueueError
from transfer_queue.messages import Cancel
from transfer_queue.wire.codec import decode, encode_message, read_header
from transfer_queue.wire.line import open_line
from transfer_queue.wire.security import Introduction, Kind, signal
from transfer_queue.wire.stream import HIGH_WATER_MARK
from transfer_queue.wire.ticket import Answer

Resolve: TypeAlias = Callable[[Answer], None]

MOST_IN_FLIGHT = 4096
PROBE_AFTER_S = 1.5  # a server that works pings a waiting client each second
RECONNECT_S = 0.05
EXAMINE_S = 0.1
RECEIVE_BATCH = 256

_MOST_UNANSWERED = 5  # probes


class _Sent(NamedTuple):
    frames: list[Any]
    resolve: Resolve
    kept: int  # how many messages were to be kept before it was sent


class Link:
    """`on_push` takes one-way messages of the server, `on_welcome` is called whenever the server knows us (again).

    `preface` makes a message for the server that is sent before all others whenever it knows us (again); None: none.
    `bell_fd` ends a wait when it becomes readable. `owner` is for whoever lends the link. Raises `ConnectionLost` if
    the process has no socket left.
    """

    def __init__(
        self,
        address: str,
        token: bytes,
        client_id: str,
        *,
        bell_fd: int,
        curve_key: str = "",
        preface: Callable[[], list[Any] | None] = lambda: None,
        on_push: Callable[[Any], None] = lambda message: None,
        on_welcome: Callable[[], None] = lambda: None,
    ) -> None:
        self.failure: TransferQueueError | None = None
        self.owner: int | None = None
        self.torn = False  # interrupted within a message: of no use any more
        self._introduction = Introduction(token, client_id)
        self._address = address
        self._preface = preface
        self._on_push = on_push
        self._on_welcome = on_welcome
        self._waiting: dict[int, _Sent] = {}
        self._unsent: list[list[Any]] = []
        self._kept: list[list[Any]] = []  # one-way messages that may not have arrived, and are sent again if need be
        self._kept_ever = 0
        self._line = open_line(address, bell_fd, curve_key)
        self._heard = self._probed = time.monotonic()
        self._unanswered = 0  # probes since something was heard
        self._greet()

    @property
    def in_flight(self) -> int:
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Something waits for the server: an answer, or a message that could not be sent yet."""
        return bool(self._waiting or self._unsent) or self._line.sending

    @property
    def introduced(self) -> bool:
        """The server knows us, so what is posted goes out at once; or it never will."""
        return self._introduction.welcomed or self.failure is not None

    @property
    def fd(self) -> int:
        """The descriptor an event loop watches."""
        return self._line.fd

    @property
    def edge_triggered(self) -> bool:
        """Sending may swallow the signal of `fd`, so `receive` after each call here."""
        return self._line.edge_triggered

    @property
    def patience_s(self) -> float:
        """How long the server may be quiet before `probe` is due."""
        if not self._line.connected:
            return RECONNECT_S
        return EXAMINE_S if self._line.examining and not self._introduction.welcomed else PROBE_AFTER_S

    def post(self, request_id: int, frames: list[Any], resolve: Resolve, *, hold: bool = False) -> None:
        """Send a request (`hold`: with the next `flush`); `resolve` gets its reply, or what ended the link."""
        if self.failure is not None:
            resolve(self.failure)
            return
        self._waiting[request_id] = _Sent(frames, resolve, self._kept_ever)
        if self._introduction.welcomed:
            self._send(frames, hold=hold)

    def notify(self, frames: list[Any], *, keep: bool = False) -> None:
        """Send a one-way message, at once or after the introduction.

        With `keep` it is sent again on each new connection, behind the preface, until the answer to a later request
        shows that it arrived.
        """
        if keep:
            self._keep(frames)
        if self._introduction.welcomed:
            self._send(frames)
        elif self.failure is None:
            self._unsent.append(frames)

    def take_over(self, kept: list[list[Any]]) -> None:
        """Keep what another link had to keep: send it at once, or behind the preface whenever that is."""
        for frames in kept:
            self._keep(frames)
            if self._introduction.welcomed:
                self._send(frames)

    def take_kept(self) -> list[list[Any]]:
        """Return the messages that may not have arrived; from now on they are the caller's to keep."""
        kept, self._kept = self._kept, []
        return kept

    def flush(self) -> None:
        """Send what was held."""
        if not self.torn:
            self.torn = True
            self._line.flush()
            self.torn = False

    def drop(self, request_id: int, *, cancel: bool) -> None:
        """Do not wait for this request any more; `cancel`: tell the server."""
        if self._waiting.pop(request_id, None) is not None and cancel and self._introduction.welcomed:
            self._send(encode_message(Cancel(request_id=request_id)))

    def wait(self, timeout_s: float) -> None:
        """Wait for input, for the bell, or for as long as the server may be quiet; then receive."""
        if self._line.wait(max(0.0, min(timeout_s, self.patience_s))):
            while self.receive():
                pass
        else:
            self.probe()

    def receive(self, batch: int = RECEIVE_BATCH) -> bool:
        """Take what has arrived, at most `batch` messages; return whether more may be there."""
        if self.torn:
            return False
        self.torn = True
        self._line.read()
        for _ in range(batch):
            self.torn = True
            frames = self._line.next()
            self.torn = False
            if frames is None:
                if not self._line.connected:
                    self._introduction.lost()
                return False
            self._heard = time.monotonic()
            self._unanswered = 0
            try:
                self._take(frames)
            except (NotAuthorized, ProtocolMismatch, DecodeError) as error:
                self.fail(error)
                return False
        return True

    def probe(self) -> None:
        """If the server is quiet, find out whether it still knows us. An introduction without answer starts over.

        A connection that stays quiet is given up for a new one: a forked child may hold the other end of it after the
        server was killed. One-way messages are not kept for a server that is not there, unless a request waits for it
        as well.
        """
        now = time.monotonic()
        if self.failure is not None or self.torn:
            return
        if self._line.examining and not self._introduction.welcomed and self._refused():
            return
        quiet = now - max(self._heard, self._probed) >= PROBE_AFTER_S
        if self._line.connected and quiet and (self._unanswered > _MOST_UNANSWERED or self._line.orphaned):
            self._line.give_up()
            self._introduction.lost()
        if not self._line.connected and self._line.reconnect():
            self._greet()
            self._unanswered = 0
        elif not quiet:
            return
        elif self._introduction.welcomed:
            self._send([signal(Kind.PROBE)])
            self._unanswered += 1
        elif not (self._unanswered and self._refused()):
            self._greet()
            self._unanswered += 1
            if not self._waiting:
                self._unsent.clear()
        self._probed = now

    def finish_sending(self, timeout_s: float) -> None:
        """Wait until the connection has taken what was sent."""
        deadline = time.monotonic() + timeout_s
        while self._line.sending and not self.torn and (left_s := deadline - time.monotonic()) > 0:
            self.wait(left_s)

    def fail(self, error: TransferQueueError) -> None:
        """End all requests with this error; the link is of no use any more."""
        self.failure = error
        self._unsent.clear()
        while self._waiting:
            self._waiting.pop(next(iter(self._waiting))).resolve(error)

    def close(self) -> None:
        self._line.close(linger=not self.torn)

    # ------------------------------------------------------------ inside

    def _refused(self) -> bool:
        """Find out whether the server lets no connection in that is made like this one."""
        reason = self._line.examine()
        if reason is not None:
            self.fail(NotAuthorized(f"{self._address} refuses the connection: {reason}"))
        return reason is not None

    def _keep(self, frames: list[Any]) -> None:
        self._kept.append(frames)
        self._kept_ever += 1

    def _greet(self) -> None:
        self._line.send([self._introduction.hello()])

    def _take(self, frames: Sequence[Any]) -> None:
        kind = frames[0][0] if len(frames[0]) else None
        if kind == Kind.MESSAGE:
            self._take_message(frames)
        elif kind not in (Kind.PING, Kind.ALIVE):
            answer = self._introduction.receive(frames[0])
            if answer is not None:
                self._send([answer])
            elif kind == Kind.WELCOME and self._introduction.welcomed:
                self._go_on()

    def _take_message(self, frames: Sequence[Any]) -> None:
        header = read_header(frames[0])
        request_id = header.request_id
        try:
            message: Any = decode(frames, header)[1]
        except DecodeError as error:
            message = error
        if request_id == 0:
            if not isinstance(message, DecodeError):
                self._on_push(message)
            return
        sent = self._waiting.pop(request_id, None)
        if sent is not None:
            later = self._kept_ever - sent.kept
            del self._kept[: max(0, len(self._kept) - later)]
            sent.resolve(message)

    def _go_on(self) -> None:
        """Send what waits for the welcome: the preface, what may be lost, the requests in their order, the rest."""
        kept = set(map(id, self._kept))
        unsent, self._unsent = [frames for frames in self._unsent if id(frames) not in kept], []
        preface = self._preface()
        if preface is not None:
            self._send(preface)
        for number, sent in self._waiting.items():
            self._waiting[number] = sent._replace(kept=self._kept_ever)
        for frames in [*self._kept, *(sent.frames for sent in self._waiting.values()), *unsent]:
            self._send(frames)
        self._on_welcome()

    def _send(self, frames: Sequence[Any], *, hold: bool = False) -> None:
        if self.torn:
            return
        self.torn = True
        sent = self._line.send(frames, hold=hold)
        self.torn = False
        if not sent and self._line.connected:
            self.fail(ConnectionLost(f"{HIGH_WATER_MARK} messages wait for the server; it does not read them"))
