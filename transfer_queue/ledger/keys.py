"""Keys and tags as their users see them: listings, what changed since a cursor, and waiting for either."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import GetMetaTimeout, InvalidArgument, TransferQueueError
from transfer_queue.ledger.feed import Feed
from transfer_queue.ledger.matching import Match, Matches, Wish
from transfer_queue.ledger.rows import Rows
from transfer_queue.ledger.waiting import Ticket, WaitingKeys, WaitingRoom
from transfer_queue.messages import GetKeys, Keys, WaitKeys

Int64s: TypeAlias = NDArray[np.int64]
Answer: TypeAlias = "tuple[Ticket, Keys | TransferQueueError]"

_SHOWN = 10


@dataclass(eq=False)
class _Wait:
    """One parked request: it waits for keys by name, or for enough rows of a match."""

    parked: WaitingKeys
    wish: Wish
    match: Match | None = None
    pending: set[str] = field(default_factory=set)


@dataclass(eq=False)
class _Watched:
    """Who waits for keys of one partition."""

    matches: Matches
    waits: dict[int, _Wait] = field(default_factory=dict)  # by order of arrival
    by_key: dict[str, set[int]] = field(default_factory=dict)  # who waits for a key by name
    removals: set[int] = field(default_factory=set)  # whom a removal wakes


class KeyBook:
    """Answers `GetKeys` at once, and `WaitKeys` when a change made it possible."""

    def __init__(self, rows: Rows, waiting: WaitingRoom) -> None:
        self._rows = rows
        self._waiting = waiting
        self._watched: dict[str, _Watched] = {}

    @property
    def feed(self) -> Feed:
        return self._rows.feed

    # ------------------------------------------------------------ listings

    def listing(self, request: GetKeys) -> Keys:
        """All keys in order of creation, or in order of change those that changed after a cursor."""
        since = None if request.since is None else self.feed.read(request.since)
        if since is None:
            names = self._rows.partitions if request.partition_id is None else (request.partition_id,)
            parts = [(name, self._every(name)) for name in names if name in self._rows.partitions]
            return self._reply(parts, full=True)
        parts = self._by_partition(self.feed.changed_after(since), request.partition_id)
        return self._reply(parts, removed=self._removed(since, request.partition_id))

    def _every(self, name: str) -> Int64s:
        keys = self._rows.partitions[name].keys
        return np.fromiter(keys.values(), np.int64, len(keys))

    def _by_partition(self, rows: Int64s, only: str | None) -> list[tuple[str, Int64s]]:
        """Rows by partition, in order of creation; those without a key are left out."""
        keys = self._rows.table.keys
        rows = rows[np.fromiter((row in keys for row in rows.tolist()), np.bool_, len(rows))]
        owners = self._rows.owners(rows) if len(rows) else []
        return [(owner.name, rows[positions]) for owner, positions in owners if only in (None, owner.name)]

    def _removed(self, since: int, only: str | None) -> list[tuple[str, str]]:
        """(partition, key) of those that are not there any more, and were at that time."""
        partitions = self._rows.partitions
        found = {(one.partition, one.key): None for one in self.feed.removed_after(since, only)}
        return [(name, key) for name, key in found if name not in partitions or key not in partitions[name].keys]

    def _reply(
        self, parts: Sequence[tuple[str, Int64s]], *, full: bool = False, removed: Iterable[tuple[str, str]] = ()
    ) -> Keys:
        table = self._rows.table
        every = [row for _, rows in parts for row in rows.tolist()]
        gone = list(removed)
        return Keys(
            cursor=self.feed.cursor,
            full=full,
            partitions=tuple(name for name, _ in parts),
            counts=np.array([len(rows) for _, rows in parts], np.int64),
            keys=tuple(map(table.keys.__getitem__, every)),
            tags=tuple(map(table.tags.get, every)),
            removed=tuple(key for _, key in gone),
            removed_from=tuple(name for name, _ in gone),
        )

    # ------------------------------------------------------------ waiting

    def wait(self, request: WaitKeys, ticket: Ticket, now: float) -> Keys | None:
        """Answer, or park the request until a change answers it."""
        if request.count is not None and request.keys is not None:
            raise InvalidArgument("give keys, all of which are waited for, or the count of others, not both")
        if not all(isinstance(values, list | tuple) for values in request.where.values()):
            raise InvalidArgument(f"where must have a list of values per tag entry, not {request.where!r:.200}")
        name = request.partition_id
        wish = Wish.of(request, None if request.since is None else self.feed.read(request.since))
        watched = self._watched.get(name) or _Watched(Matches(self._rows, name))
        wait = self._begin(request, wish, watched, WaitingKeys(ticket, request, now, now, -1, self._end))
        reply = self._attempt(wait, watched, removals=True)
        if reply is not None or request.timeout_s <= 0:
            if reply is None:
                raise self._timeout(wait, 0.0)
            return reply
        wait.parked = self._waiting.park_keys(ticket, request, self._end, now)
        self._keep(wait, watched)
        return None

    def _begin(self, request: WaitKeys, wish: Wish, watched: _Watched, parked: WaitingKeys) -> _Wait:
        if request.keys is not None:
            return _Wait(parked, wish)
        current = request.partition_id not in self.feed.stirred
        match = watched.matches.find(wish) if current else None
        if match is None:
            match = Match(wish)
            watched.matches.fill(match)
        return _Wait(parked, wish, match)

    def _keep(self, wait: _Wait, watched: _Watched) -> None:
        request, order = wait.parked.request, wait.parked.order
        self._watched[request.partition_id] = watched
        self.feed.dirty.setdefault(request.partition_id, [])
        watched.waits[order] = wait
        for key in request.keys or ():
            watched.by_key.setdefault(key, set()).add(order)
        if wait.match is not None:
            if not wait.match.waiting:
                watched.matches.add(wait.match)
            wait.match.waiting.add(order)
        if _wakes_by_removal(request):
            watched.removals.add(order)

    def _end(self, parked: WaitingKeys) -> None:
        """Somebody does not wait any more."""
        name, order = parked.request.partition_id, parked.order
        watched = self._watched[name]
        wait = watched.waits.pop(order)
        for key in set(wait.parked.request.keys or ()):
            watched.by_key[key].discard(order)
            if not watched.by_key[key]:
                del watched.by_key[key]
        if wait.match is not None:
            wait.match.waiting.discard(order)
            if not wait.match.waiting:
                watched.matches.discard(wait.match)
        watched.removals.discard(order)
        if not watched.waits:
            del self._watched[name], self.feed.dirty[name]
            for names in (self.feed.stirred, self.feed.shrunk, self.feed.anew):
                names.discard(name)

    def serve(self) -> list[Answer]:
        """Answer whom the changes since the last call satisfied, in order of arrival."""
        feed = self.feed
        stirred, feed.stirred = feed.stirred, set()
        answers: list[Answer] = []
        for name in sorted(stirred):
            watched = self._watched[name]
            changes, feed.dirty[name] = feed.dirty[name], []
            rows, anew = {row for change in changes for row in change.tolist()}, name in feed.anew
            woken = self._all_anew(watched) if anew else self._woken(watched, rows)
            removals = anew or name in feed.shrunk
            feed.shrunk.discard(name)
            feed.anew.discard(name)
            for order in sorted(woken.union(watched.removals) if removals else woken):
                wait = watched.waits[order]
                reply = self._attempt(wait, watched, removals=removals)
                if reply is not None:
                    self._waiting.remove(wait.parked.ticket)
                    answers.append((wait.parked.ticket, reply))
        return answers

    def _woken(self, watched: _Watched, rows: set[int]) -> set[int]:
        """Whom a change of these rows may satisfy."""
        woken: set[int] = set()
        if watched.matches:
            for match in watched.matches.update(rows):
                woken |= match.waiting
        if watched.by_key:
            keys = self._rows.table.keys
            for row in rows:
                woken.update(watched.by_key.get(keys.get(row, ""), ()))
        return woken

    def _all_anew(self, watched: _Watched) -> set[int]:
        """Everything may be different, and counts as changed."""
        watched.matches.refill()
        for wait in watched.waits.values():
            wait.wish = wait.match.wish if wait.match is not None else dataclasses.replace(wait.wish, since=None)
        return set(watched.waits)

    # ------------------------------------------------------------ one request

    def _attempt(self, wait: _Wait, watched: _Watched, *, removals: bool) -> Keys | None:
        """The answer, if the wish is fulfilled. `removals`: keys may be gone since it was looked at last."""
        request, wish = wait.parked.request, wait.wish
        since = wish.since
        full = request.since is not None and since is None
        gone: list[tuple[str, str]] = []
        if removals and _wakes_by_removal(request):
            if full and request.since:  # what was removed since then is not known
                return self._found(wait, watched, full=True)
            gone = [] if since is None else self._removed(since, request.partition_id)
        if wait.match is None:
            if not self._all_there(wait, watched):
                return None
        elif not gone:
            count = 1 if request.count is None else request.count
            if len(wait.match.rows) < count or len(watched.matches.verified(wait.match)) < count:
                return None
        return self._found(wait, watched, full=full)

    def _all_there(self, wait: _Wait, watched: _Watched) -> bool:
        """Whether all keys are as they should be; looks at those first that were not when it looked last."""
        partition = self._rows.partitions.get(wait.parked.request.partition_id)
        keys = wait.parked.request.keys or ()
        if partition is None:
            wait.pending = set(keys)
            return False
        first = next(iter(wait.pending), None)
        if first is not None and not watched.matches.fits(wait.wish, partition, first):
            return False
        wait.pending = {key for key in keys if not watched.matches.fits(wait.wish, partition, key)}
        return not wait.pending

    def _found(self, wait: _Wait, watched: _Watched, *, full: bool) -> Keys:
        request, since = wait.parked.request, wait.wish.since
        if wait.match is not None:
            rows = watched.matches.verified(wait.match)
        else:
            known = self._rows.partitions[request.partition_id].keys
            rows = np.array([known[key] for key in set(request.keys or ())], np.int64)
            rows = rows[np.argsort(self._rows.table.ordinal[rows], kind="stable")]
        removed = () if since is None else self._removed(since, request.partition_id)
        there = request.partition_id in self._rows.partitions and (full or len(rows) > 0)
        parts = [(request.partition_id, rows)] if there else []
        return self._reply(parts, full=full, removed=removed)

    # ------------------------------------------------------------ waiting in vain

    def too_late(self, parked: WaitingKeys, waited_s: float) -> GetMetaTimeout:
        """The error of a request whose deadline came; it is not parked any more."""
        since = None if parked.request.since is None else self.feed.read(parked.request.since)
        return self._timeout(_Wait(parked, Wish.of(parked.request, since)), waited_s)

    def _timeout(self, wait: _Wait, waited_s: float) -> GetMetaTimeout:
        request = wait.parked.request
        name = request.partition_id
        partition = self._rows.partitions.get(name)
        there = f"which has {len(partition.keys)} keys" if partition is not None else "which does not exist yet"
        if request.keys is not None:
            pending = self._pending(wait)
            listed = ", ".join(f"{key!r} ({why})" for key, why in list(pending.items())[:_SHOWN])
            more = ", …" if len(pending) > _SHOWN else ""
            text = f"{len(pending)} of {len(request.keys)} keys are pending in partition {name!r}: {listed}{more}"
            return GetMetaTimeout(f"after {waited_s:.1f} s: {text}", pending=list(pending))
        match = Match(wait.wish)
        Matches(self._rows, name).fill(match)
        wanted = " and ".join(_described(request)) or "are there"
        text = f"{len(match.rows)} of {request.count or 1} keys {wanted} in partition {name!r}, {there}"
        return GetMetaTimeout(f"after {waited_s:.1f} s: {text}")

    def _pending(self, wait: _Wait) -> dict[str, str]:
        """What keeps each key from being as it should be."""
        request = wait.parked.request
        partition = self._rows.partitions.get(request.partition_id)
        matches, table, pending = Matches(self._rows, request.partition_id), self._rows.table, {}
        for key in request.keys or ():
            row = None if partition is None else partition.keys.get(key)
            if partition is None or row is None:
                pending[key] = "not there"
            elif not matches.fits(wait.wish, partition, key):
                at = np.array([row], np.int64)
                lacking = [name for name in request.fields if not table.produced(at, (name,)).all()]
                wrong = not wait.wish.fits(table.tags.get(row, {}))
                pending[key] = f"lacks {', '.join(lacking)}" if lacking else "other tag" if wrong else "unchanged"
        return pending


def _wakes_by_removal(request: WaitKeys) -> bool:
    return request.since is not None and request.keys is None and request.count is None


def _described(request: WaitKeys) -> Iterable[str]:
    if request.fields:
        yield f"have {', '.join(request.fields)}"
    if request.where:
        yield "match " + ", ".join(f"{name}={' or '.join(map(repr, each))}" for name, each in request.where.items())
    if request.since:
        yield "changed"
