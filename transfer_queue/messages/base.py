"""How a message type is declared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import dataclass_transform

Int64s: TypeAlias = NDArray[np.int64]
Frames: TypeAlias = tuple[Any, ...]  # buffers: bytes or memoryview

PROTOCOL_VERSION = 4
ANY_GENERATION = -1
UNIT_SHIFT = 48
SPAN_SHIFT = 16

MESSAGE_TYPES: dict[int, type[Any]] = {}
_T = TypeVar("_T")


def int64s_of(numbers: Iterable[int]) -> Int64s:
    return np.fromiter(numbers, np.int64)


@dataclass_transform(kw_only_default=True, frozen_default=True, eq_default=False)
def message(code: int) -> Callable[[type[_T]], type[_T]]:
    """Declare a message type; `code` names it on the wire and is never given to another one."""

    def declare(cls: type[_T]) -> type[_T]:
        made = dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)(cls)
        assert code not in MESSAGE_TYPES, f"message code {code} is taken by {MESSAGE_TYPES[code].__name__}"
        MESSAGE_TYPES[code] = made
        return made

    return declare
