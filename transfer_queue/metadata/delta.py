"""What changed among the keys of a queue."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class KVDelta:
    """Keys that changed after a cursor: apply `removed`, then `changed`, and a listing of then is one of now.

    cursor   names the moment of this delta: what changed after it comes with `since=cursor`
    changed  {partition: {key: tag}}: keys that are new, were given tag entries or fields, or lost fields with a storage
             unit; with all of their tag
    removed  {partition: [key]}: keys that are not there any more
    full     `changed` is everything: what is not in it is not there
    """

    cursor: str
    changed: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    removed: dict[str, list[str]] = field(default_factory=dict)
    full: bool = False
