"""What a server does with one message and with one answer, free of sockets and threads.

Everything here runs in the thread of the server, but for one thing: the handler answers tickets from any thread, and an
answer enters the table of requests there and then, under whatever lock the handler holds. The server passes it on to
`settle`; `settle_all` makes it do so at once. `send` delivers frames to a connection and tells whether it is still
there; `reaches` only tells.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias, TypeVar

from transfer_queue.errors import ConnectionLost, DecodeError, EncodeError, ProtocolMismatch, to_wire
from transfer_queue.messages import MESSAGE_TYPES, ONE_WAY, Cancel, ErrorReply, Reply
from transfer_queue.wire.codec import Header, decode, encode_message, read_header
from transfer_queue.wire.requests import Answered, RequestTable
from transfer_queue.wire.security import Gate, Kind, signal
from transfer_queue.wire.ticket import Answer, Handler, Ticket, guarded

T = TypeVar("T")
Send: TypeAlias = Callable[[Hashable, Sequence[Any]], bool]
Deliver: TypeAlias = Callable[[Ticket, Reply], None]

REQUESTS = frozenset(cls for code, cls in MESSAGE_TYPES.items() if 10 <= code < 60)


class Desk:
    """Requests under way: from the frames of a connection to the handler, and from its answers to frames."""

    def __init__(
        self,
        handler: Handler,
        token: bytes,
        send: Send,
        reaches: Callable[[Hashable], bool],
        deliver: Deliver,
        requests: RequestTable | None = None,
        *,
        settle_all: Callable[[], None] | None = None,
    ) -> None:
        self.gate = Gate(token)
        self.malformed = 0
        self.failures = 0
        self.waiting: dict[Ticket, float] = {}  # not settled, since when, in the order of arrival
        self.watching = False  # some wait, or hold what goes back when they are gone: `ping` is due each second
        self._handler = handler
        self._table = RequestTable() if requests is None else requests
        self._send = send
        self._reaches = reaches
        self._deliver = deliver
        self._settle_all = settle_all

    def serve_by(self, handler: Handler) -> None:
        """Give requests to another handler from now on, which shares its state with the one before."""
        self._handler = handler

    def receive(self, identity: Hashable, frames: Sequence[Any]) -> None:
        """Take the frames of one message. A failure of this server itself is answered as well."""
        _, error = self._guard(self._receive, identity, frames)
        if error is not None:
            with contextlib.suppress(DecodeError):
                self._reply(identity, read_header(frames[0]).request_id, ErrorReply(**_described(error)))

    def settle(self, ticket: Ticket, reply: Reply) -> None:
        """Send an answer to whoever waits for it; what nobody gets goes back to the handler."""
        self.waiting.pop(ticket, None)
        if ticket.abandoned or not self._reply(ticket.channel, ticket.request_id, reply):
            self._lose(ticket, reply)
        else:
            ticket.request = None  # its answer may be remembered for long

    def ping(self, waiting_s: float) -> None:
        """Ping clients that wait for longer, and those that hold something; find out who is gone."""
        before = time.monotonic() - waiting_s
        channels: dict[Hashable, list[Ticket]] = {}
        for ticket, since in self.waiting.items():
            if since <= before:
                channels.setdefault(ticket.channel, []).append(ticket)
        for channel, tickets in channels.items():
            if not self._send(channel, [signal(Kind.PING)]):
                for ticket in tickets:
                    self._lose(ticket, None)
        holding, _ = self._guard(self._handler.holding)
        for client_id in holding or ():
            self._look_for(client_id)
        self.watching = bool(self.waiting or holding)

    def due(self) -> float | None:
        """Let the handler do what is due; return the seconds until something is due again."""
        self._tell_gone()
        due_s = self._guard(self._handler.tick)[0]
        return min((each for each in (due_s, self.gate.presence.due_s()) if each is not None), default=None)

    # ------------------------------------------------------------ inside

    def _receive(self, identity: Hashable, frames: Sequence[Any]) -> None:
        client_id = self.gate.client_of(identity)
        kind = frames[0][0] if len(frames[0]) else None
        if client_id is None or kind == Kind.HELLO:
            self._send(identity, [self.gate.receive(identity, frames)])
        elif kind == Kind.MESSAGE:
            self._receive_message(identity, client_id, frames)
        elif kind == Kind.PROBE:
            self._send(identity, [signal(Kind.ALIVE)])
        else:
            self.malformed += 1

    def _look_for(self, client_id: str) -> None:
        """Forget the connections of a client that are not there any more, up to the first that is."""
        for identity in self.gate.presence.connections(client_id):
            if self._reaches(identity):
                return
            self.gate.forget(identity)

    def _tell_gone(self) -> None:
        gone = self.gate.presence.take_gone()
        for ticket in [ticket for ticket in self.waiting if ticket.client_id in gone] if gone else ():
            self._lose(ticket, None)
        for client_id in gone:
            self._guard(self._handler.gone, client_id)

    def _receive_message(self, identity: Hashable, client_id: str, frames: Sequence[Any]) -> None:
        header: Header | None = None
        try:
            header = read_header(frames[0])
            _, message = decode(frames, header)
            if type(message) not in REQUESTS:
                raise ProtocolMismatch(f"{type(message).__name__} is not a request")
            if header.request_id == 0 and not isinstance(message, ONE_WAY):
                raise ProtocolMismatch(f"{type(message).__name__} needs a request id, because it has an answer")
        except (DecodeError, ProtocolMismatch) as error:
            self.malformed += 1
            if header is not None and header.request_id:
                self._reply(identity, header.request_id, ErrorReply(**_described(error)))
            return
        if isinstance(message, Cancel):
            self._cancel(client_id, message.request_id)
        elif header.request_id == 0:
            self._submit(message, Ticket(client_id, 0, identity, message, lambda ticket, answer: None))
        else:
            self._request(identity, client_id, header, message, frames)

    def _request(self, identity: Hashable, client_id: str, header: Header, message: Any, frames: Sequence[Any]) -> None:
        """Start a request, or go on with one that came before, maybe over another connection."""
        try:
            known = self._table.find(client_id, header.request_id, header.floor)
        except ConnectionLost as error:
            self._reply(identity, header.request_id, ErrorReply(**_described(error)))
            return
        match known:
            case Ticket():
                known.channel = identity
            case Answered(ticket) if ticket in self.waiting:
                ticket.channel = identity  # its answer is about to be settled
            case Answered():
                self._reply(identity, header.request_id, known.reply)
            case None:
                ticket = Ticket(client_id, header.request_id, identity, message, self._answered)
                self._table.wait(ticket)
                self.waiting[ticket] = time.monotonic()
                ticket.frames, ticket.send = frames, self._settle_all
                self._submit(message, ticket)
                ticket.frames = ticket.send = None  # what waits does not keep what it came in

    def _answered(self, ticket: Ticket, answer: Answer) -> None:
        """Note an answer, in the thread that gave it, and have it settled."""
        reply = ErrorReply(**_described(answer)) if isinstance(answer, BaseException) else answer
        self._table.answered(ticket, reply)
        self._deliver(ticket, reply)

    def _cancel(self, client_id: str, request_id: int) -> None:
        match self._table.withdraw(client_id, request_id):
            case Ticket() as ticket:
                self._lose(ticket, None)
            case Answered(ticket) if ticket in self.waiting:
                ticket.abandoned = True  # so that the answer is lost when it is settled
            case Answered(ticket, _, reply):
                self._guard(self._handler.lost, ticket, reply)

    def _lose(self, ticket: Ticket, reply: Reply | None) -> None:
        """Nobody gets this reply (None: nobody waits). An answer that comes later is lost as well."""
        ticket.abandoned = True
        self.waiting.pop(ticket, None)
        self._table.discard(ticket)
        self._guard(self._handler.lost, ticket, reply)

    def _submit(self, message: Any, ticket: Ticket) -> None:
        _, error = self._guard(self._handler.submit, message, ticket)
        if error is not None and not ticket.answered:
            ticket.answer(error)

    def _guard(self, function: Callable[..., T], *args: Any) -> tuple[T | None, Exception | None]:
        result, error = guarded(function, *args)
        self.failures += error is not None
        return result, error

    def _reply(self, channel: Hashable, request_id: int, reply: Reply) -> bool:
        """Return whether the reply is on its way."""
        try:
            return self._send(channel, encode_message(reply, request_id))
        except EncodeError as error:
            bare = reply if isinstance(reply, ErrorReply) else ErrorReply(**_described(error))
            bare = dataclasses.replace(bare, details={})
            return self._send(channel, encode_message(bare, request_id)) and isinstance(reply, ErrorReply)


def _described(error: BaseException) -> dict[str, Any]:
    name, message, details = to_wire(error)
    return {"name": name, "message": message, "details": details}
