"""Environment variables: read when they are used, never at import, and named when they cannot be understood."""

from __future__ import annotations

import logging
import math
import os

from transfer_queue.errors import InvalidArgument


def text(name: str) -> str | None:
    """The variable, None if it is not set or empty."""
    return os.environ.get(name) or None


def whole_number(name: str, *, at_least: int) -> int | None:
    """The variable as an int, None if it is not set. Raises `InvalidArgument`, a `ValueError`."""
    given = text(name)
    if given is None:
        return None
    try:
        number = int(given)
    except ValueError:
        number = at_least - 1
    if number < at_least:
        raise InvalidArgument(f"environment variable {name} must be a whole number of at least {at_least}: {given!r}")
    return number


def seconds(name: str) -> float | None:
    """The variable as a positive number of seconds, None if it is not set. Raises `InvalidArgument`."""
    given = text(name)
    if given is None:
        return None
    try:
        number = float(given)
    except ValueError:
        number = math.nan
    if not number > 0:
        raise InvalidArgument(f"environment variable {name} must be a positive number of seconds: {given!r}")
    return number


def set_logging_level(level: int | None = None) -> None:
    """Give the logger of this library this level; None: that which TQ_LOGGING_LEVEL names, if it is set."""
    level = logging_level("TQ_LOGGING_LEVEL") if level is None else level
    if level is not None:
        logging.getLogger("transfer_queue").setLevel(level)


def logging_level(name: str) -> int | None:
    """The variable as a level of `logging`, by name or number; None if it is not set. Raises `InvalidArgument`."""
    given = text(name)
    if given is None:
        return None
    level = int(given) if given.isdecimal() else logging.getLevelName(given.upper())
    if not isinstance(level, int):
        raise InvalidArgument(f"environment variable {name} must be a logging level, by name or number: {given!r}")
    return level
