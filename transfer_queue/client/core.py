"""What every operation of a client works with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from transfer_queue.client.acking import Acknowledger, Behind
from transfer_queue.client.arguments import DEFAULT_TIMEOUT_S
from transfer_queue.client.outcomes import OpenOutcomes, concluded
from transfer_queue.client.steps import Call, Operation
from transfer_queue.client.transfer import Transfer
from transfer_queue.errors import ConnectionLost, InvalidArgument, WrongType
from transfer_queue.messages import Done, Request

T = TypeVar("T")


@dataclass(frozen=True)
class Defaults:
    """What a client does where a call does not say. `None` as an argument of the client: what its session says."""

    layout: str = "as_put"
    strict: bool = False
    allow_pickle: bool = False
    polling_mode: bool = False
    get_meta_timeout_s: float = DEFAULT_TIMEOUT_S
    checksums: bool = False

    @classmethod
    def of(cls, session: Mapping[str, Any], **given: Any) -> Defaults:
        """The session's, unless they are given; what a newer session says and this class does not know is left out."""
        known = {one.name: session[one.name] for one in fields(cls) if one.name in session}
        return cls(**known | {name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class ClientCore:
    """The connections and settings of one client. `acks` are those that nobody waits for."""

    client_id: str
    controller: Behind
    acks: Acknowledger
    transfer: Transfer
    defaults: Defaults
    outcomes: OpenOutcomes = field(default_factory=OpenOutcomes)

    @property
    def layout(self) -> str:
        return self.defaults.layout

    @property
    def allow_pickle(self) -> bool:
        return self.defaults.allow_pickle


def changed(core: ClientCore, request: Request, timeout_s: float = DEFAULT_TIMEOUT_S) -> Operation[int]:
    """Ask the controller for a change that is answered at once; returns how many rows it concerned."""

    def ending(request_id: int | None) -> Operation[int]:
        done: Done = yield Call(core.controller, request, timeout_s, request_id)
        return done.count

    return (yield from concluded(core.outcomes, ending))


def resend(core: ClientCore, error: ConnectionLost) -> Operation[Any]:
    """Learn how a call ended whose `ConnectionLost` left that open; returns or raises what the call would have.

    The request is sent again under its id, and the data of a `put` is not written again: what was done is not done a
    second time, what was not done is done now. If the connection breaks again, the new `ConnectionLost` can be given to
    `resend` in turn. Raises `InvalidArgument` for an error that left nothing open: the call changed nothing and may
    simply be repeated.

        try:
            meta = client.put(data, partition_id="train_0")
        except ConnectionLost as error:
            meta = client.resend(error)
    """
    if not isinstance(error, ConnectionLost):
        raise WrongType(f"resend takes the ConnectionLost of an earlier call, not {type(error).__name__} {error!r}")
    number = error.details.get("request_id")
    ending = core.outcomes.take(number)
    if ending is None:
        raise InvalidArgument(
            "this error left no outcome open at this client: the call changed nothing, or was settled; repeat the call"
        )
    return (yield from concluded(core.outcomes, ending, number))
