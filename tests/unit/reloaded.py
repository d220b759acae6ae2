"""A table of requests as it is after a restart, for tests."""

from __future__ import annotations

from typing import Any

from transfer_queue.wire.codec import decode, encode_message
from transfer_queue.wire.requests import RequestTable


def plain(dumped: list[Any]) -> list[Any]:
    """A dump with replies as bytes, as a file has them."""
    return [
        (client_id, floor, forgotten, [(number, code, encode_message(reply)) for number, code, reply in answers])
        for client_id, floor, forgotten, answers in dumped
    ]


def reloaded(table: RequestTable, **limits: int) -> RequestTable:
    """The table after a restart: what it dumped went through bytes."""
    made = RequestTable(**limits)
    made.load(
        (client_id, floor, forgotten, [(number, code, decode(reply)[1]) for number, code, reply in answers])
        for client_id, floor, forgotten, answers in plain(table.dump())
    )
    return made
