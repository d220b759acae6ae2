"""What a caller attaches to a whole batch."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from transfer_queue.errors import InvalidArgument, WrongType
from transfer_queue.metadata.values import same_value


class HasExtraInfo:
    """`extra_info`: a dict of the caller's own entries, never None; given dicts are copied (one level deep)."""

    _extra_info: dict[str, Any]

    @property
    def extra_info(self) -> dict[str, Any]:
        return self._extra_info

    @extra_info.setter
    def extra_info(self, entries: Mapping[str, Any] | None) -> None:
        self._extra_info = checked(entries)

    def get_extra_info(self, key: str, default: Any = None) -> Any:
        return self._extra_info.get(key, default)

    def set_extra_info(self, key: str, value: Any) -> None:
        self._extra_info[key] = value

    def update_extra_info(self, entries: Mapping[str, Any]) -> None:
        self._extra_info.update(checked(entries))

    def remove_extra_info(self, key: str) -> Any:
        """Take the entry out and return it; None if there is none."""
        return self._extra_info.pop(key, None)

    def has_extra_info(self, key: str) -> bool:
        return key in self._extra_info

    def clear_extra_info(self) -> None:
        self._extra_info.clear()

    def get_all_extra_info(self) -> dict[str, Any]:
        """Return a deep copy."""
        return copy.deepcopy(self._extra_info)


def join(pieces: Iterable[Mapping[str, Any]], validate: bool) -> dict[str, Any]:
    """Unite entries. Two values of one key must be equal; without `validate` the last one wins."""
    joined: dict[str, Any] = {}
    for piece in pieces:
        for key, value in piece.items():
            if validate and key in joined and not same_value(joined[key], value):
                raise InvalidArgument(
                    f"extra_info[{key!r}] has conflicting values {joined[key]!r} and {value!r}: "
                    "make them equal or remove the entry before joining"
                )
            joined[key] = value
    return joined


def checked(entries: Any) -> dict[str, Any]:
    """Copy the entries one level deep; None: none."""
    if entries is None:
        return {}
    if not isinstance(entries, Mapping):
        raise WrongType(f"extra_info must be a dict, not {type(entries).__name__} {entries!r}")
    return dict(entries)
