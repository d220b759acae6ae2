"""How many rows one request may name by their number alone: few bytes must not claim much memory."""

from __future__ import annotations

from transfer_queue.errors import InvalidArgument
from transfer_queue.messages import Admit, Draw, Put, Request

MOST_ROWS = 1 << 22


def check_counts(request: Request) -> None:
    """Raise `InvalidArgument` for more rows than one request can be about."""
    match request:
        case Put(num_rows=count) | Admit(num_rows=count) | Draw(batch_size=count) if count > MOST_ROWS:
            raise InvalidArgument(
                f"a {type(request).__name__} of {count} rows: at most {MOST_ROWS} are possible at once"
            )
