"""What a unit takes back although nobody gave it back: from the dead, from clients that are gone, after a restart.

Three rules, each exact by itself:

- Who has memory of the unit mapped holds it as long as its process lives, whatever becomes of its connections.
- Who only asks (`ELSEWHERE`) holds it as long as the server knows of a connection, and some seconds more. After a
  restart of the unit it has as long to come back. What it asks later is refused (`BlockLost`), and it puts again.
- One-way messages may get lost with a unit. So on each connection a client first tells what it still has (`StillHeld`).
  It names requests, and tells it of all below a number that it reached: what it does not name then it never names
  again. So it does not matter over which connection this comes, how often, how late, or what was granted meanwhile.
  For a block it is not enough that the client has nothing more to do with it, for it may be in a put. Those that were
  there when the unit was started, and in no put when it agreed with the controller, are settled once their client has
  told, and did not name them. Blocks carved later do not count: the client may have told before.

The blocks of the dead and those that nobody names are settled alike: the controller says which are in a put, and
refuses the others from then on; these are freed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from transfer_queue.errors import TransferQueueError
from transfer_queue.messages import Int64s, Reconcile, Reconciled, StillHeld
from transfer_queue.storage.beside import Beside
from transfer_queue.storage.returning import AskController
from transfer_queue.storage.space import UnitSpace
from transfer_queue.storage.spans import Span
from transfer_queue.wire.holders import is_alive
from transfer_queue.wire.presence import GRACE_S

Settle: TypeAlias = Callable[[Int64s], Int64s]


class Reaper:
    """Every method but `agree` is called with `lock` held; `settle`, which may wait, and `freed` without it.

    settle   given blocks, returns 0/1 for each: is it in a put? None: keep them all
    clients  that hold something and are elsewhere, as of the last `reap`
    """

    def __init__(
        self, space: UnitSpace, lock: threading.Lock, beside: Beside, settle: Settle | None, freed: Callable[[], None]
    ) -> None:
        self.clients = space.holders()[1]
        self._space = space
        self._lock = lock
        self._beside = beside
        self._settle = settle
        self._freed = freed
        self._gone: set[str] = set()
        self._missed = set(self.clients)  # they had something before the restart, and did not come back yet
        self._missed_until: float | None = None
        self._found = {span.number: span.end[0] for span in space.spans.values()}  # blocks that were there at the start
        self._unput: set[int] | None = None if self._found else set()  # those that were in no put; None: not known yet
        self._settling: set[int] = set()  # of these, the ones that the controller is asked about
        self._told: dict[str, frozenset[int]] = {}  # blocks that clients named

    def reap(self, now: float) -> None:
        """Look who died, and what is to be settled."""
        processes, self.clients = self._space.holders()
        for holder in processes:
            if not is_alive(holder):
                self._settle_spans(self._space.release(holder))
        if self._missed_until is None:
            self._missed_until = now + GRACE_S
        elif now >= self._missed_until:
            self._gone |= self._missed
            self._missed.clear()
        for client in self._gone & self.clients:
            self._settle_spans(self._space.release_client(client))
        self._gone.clear()
        self._settle_unput()

    def gone(self, client: str) -> None:
        """A client has no connection any more."""
        self._gone.add(client)
        self._told.pop(client, None)

    def came(self, client: str) -> None:
        """A client is there: from now on the server notices when it is gone."""
        if self._missed or self._gone:
            self._missed.discard(client)
            self._gone.discard(client)

    def take(self, client: str, told: StillHeld) -> None:
        """A client tells what it still has."""
        self._space.keep_only(client, told.before, frozenset(told.requests.tolist()))
        if self._unput is None or self._unput:
            self._told[client] = frozenset(told.blocks.tolist())

    def agree(self, question: Reconcile, ask: AskController) -> Reconciled:
        """Ask the controller, without the lock, and learn what is in no put. Only the first time matters."""
        answer = ask(question)
        with self._lock:
            if self._unput is None:
                unused = question.blocks[np.asarray(answer.committed) < 1].tolist()
                self._unput = {block_id for block_id in unused if self._was_found(block_id)}
                self._found.clear()
        return answer

    # ------------------------------------------------------------ inside

    def _was_found(self, block_id: int) -> bool:
        place = self._space.find(block_id)
        return place is not None and block_id - place[0].first_block < self._found.get(place[0].number, 0)

    def _settle_unput(self) -> None:
        if not self._unput:
            return
        unnamed = []
        for block_id in self._unput - self._settling:
            place = self._space.find(block_id)
            told = None if place is None else self._told.get(place[0].asked[0])
            if place is None or place[1].freed or place[0].holder is None:
                self._unput.discard(block_id)
            elif told is not None and block_id not in told:
                unnamed.append(block_id)
        if unnamed:
            self._settling.update(unnamed)
            self._beside.submit(self._settle_blocks, np.array(unnamed, np.int64))
        if not self._unput:
            self._told.clear()

    def _settle_spans(self, spans: list[Span]) -> None:
        if spans:
            self._beside.submit(self._settle_dead, spans)

    # ------------------------------------------------------------ beside, without the lock

    def _settle_dead(self, spans: list[Span]) -> None:
        """Free what a dead writer sealed and never committed; if that cannot be learnt now, it is asked again."""
        with self._lock:
            blocks = np.array([block.block_id for span in spans for block in span.blocks.values()], np.int64)
        lost = None
        try:
            lost = self._not_put(blocks)
        finally:
            with self._lock:
                self._space.settle(spans, lost)
        self._freed()

    def _settle_blocks(self, blocks: Int64s) -> None:
        """The same for blocks that living writers do not name."""
        lost = None
        try:
            lost = self._not_put(blocks)
        finally:
            with self._lock:
                self._settling.difference_update(blocks.tolist())
                if lost is not None and self._unput is not None:
                    self._unput.difference_update(blocks.tolist())
                    self._space.free(lost)
        self._freed()

    def _not_put(self, blocks: Int64s) -> Int64s | None:
        """Return the blocks that never will be in a put; None if that could not be learnt."""
        if self._settle is None:
            return blocks[:0]
        try:
            lost: Int64s = blocks[np.asarray(self._settle(blocks)) == 0]
            return lost
        except (TransferQueueError, OSError):
            return None
