"""Who holds which bytes of a unit: spans, blocks and pins over its arenas.

Decides, and does what is decided at once; never waits, sends or looks at a clock. What has to outlive the process it
leaves in `facts`, for its caller to write down before anybody is answered.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass

import numpy as np

from transfer_queue.errors import BlockLost, DecodeError, InvalidArgument, StaleSampleError
from transfer_queue.messages import SPAN_SHIFT, UNIT_SHIFT, FreeBlocks, Int64s, Pinned, ProcessId, Reserved
from transfer_queue.storage.arena import Arenas
from transfer_queue.storage.block import ALIGNMENT, Block, Directories, aligned
from transfer_queue.storage.facts import NOBODY, SPAN_MASK, Asked, Kind, pin_fact
from transfer_queue.storage.ranges import Bytes
from transfer_queue.storage.spans import Span, StoredBlock
from transfer_queue.wire.holders import is_remote

_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Hold:
    """A pin."""

    holder: ProcessId
    blocks: tuple[StoredBlock, ...]
    asked: Asked


class UnitSpace:
    """Not thread-safe. `number` is the unit's own, known once it announced itself.

    facts        what happened since they were last taken away; the arenas add theirs
    unconfirmed  blocks some of whose bytes were given back, and nobody knows yet which: not to be read
    next_span    the number of the first span to be lent; a unit that forgot its spans starts anywhere, as with pins
    life         a name for this index: who has it knows every span that was ever lent under it
    lost         blocks whose bytes are gone, which their writers might still commit until the controller is `told`
    lost_spans   the first blocks of spans of which the same is true, for all that was and will be carved from them
    """

    def __init__(self, arenas: Arenas, life: str = "", *, next_span: int = 1, next_pin: int = 1) -> None:
        self.arenas = arenas
        self.facts = arenas.facts
        self.number = 0
        self.life = life
        self.lost: set[int] = set()
        self.lost_spans: set[int] = set()
        self.spans: dict[int, Span] = {}
        self.pins: dict[int, Hold] = {}
        self._granted: dict[str, dict[int, Span | int]] = {}  # open spans and numbers of pins, by client and request
        self.unconfirmed: set[int] = set()
        self.directories = Directories()
        self.next_span = next_span
        self.next_pin = next_pin

    # ------------------------------------------------------------ writers

    def reserve(self, size_bytes: int, holder: ProcessId, asked: Asked = NOBODY) -> Reserved | None:
        """Lend a span, or None if no arena has so much in one piece."""
        size = aligned(size_bytes)
        place = self.arenas.allocate(size, ALIGNMENT)
        if place is None:
            return None
        arena, offset = place
        number = self.next_span
        self.next_span = number % SPAN_MASK + 1
        first = self.number << UNIT_SHIFT | number << SPAN_SHIFT
        self.spans[number] = Span(number, first, arena, offset, size, holder, asked, self.facts)
        self.facts.append(self.spans[number].fact())
        self._note_granted(asked, self.spans[number])
        return Reserved(span=number, first_block=first, arena=arena.path, offset=offset, size_bytes=size)

    def write(self, number: int, offset: int, frames: Iterable[Bytes], client: str) -> int:
        """Copy frames into an open span that was lent to this client; return the bytes written."""
        span = self.spans.get(number)
        if span is None or not span.open or not _is_of(span, client):
            raise BlockLost(f"span {number} is not lent any more: its writer was taken for dead; put again")
        if span.end[0] > len(span.blocks):  # bytes of it may be another's by now
            raise BlockLost(f"a block of span {number} was given up, so nothing is written there any more; put again")
        parts = list(frames)
        size = sum(part.nbytes for part in parts)
        if offset < 0 or offset + size > span.size_bytes:
            raise InvalidArgument(f"{size} bytes at {offset} do not fit into span {number} of {span.size_bytes} bytes")
        at = span.start + offset
        for part in parts:
            span.arena.memory[at : at + part.nbytes] = part
            at += part.nbytes
        return size

    def return_span(self, number: int, client: str | None = None) -> None:
        """The holder carves no more. Ignored if there is no such span, or if it is not of this client (None: any)."""
        span = self.spans.get(number)
        if span is not None and _is_of(span, client):
            self._finish(span)
            self._forget_empty(span)

    def abort(self, client: str, blocks: Int64s) -> None:
        """A client will not put these blocks; those in spans of others, and unknown ones, are ignored."""
        for block_id in blocks.tolist():
            found = self.find(block_id)
            if found is not None and _is_of(found[0], client):
                self._free(*found)

    def free(self, blocks: Int64s) -> None:
        """Nobody points to these blocks any more; unknown ones are ignored."""
        for block_id in blocks.tolist():
            found = self.find(block_id)
            if found is not None:
                self._free(*found)

    def free_slots(self, message: FreeBlocks) -> None:
        """Nobody points to these rows any more; unknown ones are ignored.

        Rows of a damaged block cannot be found: they stay with the block. `DecodeError` says so, after all the others.
        """
        damage: DecodeError | None = None
        if len(message.partial_blocks) != len(message.partial_slots):
            raise InvalidArgument(
                f"{len(message.partial_blocks)} blocks and {len(message.partial_slots)} slots are no pairs"
            )
        order = np.argsort(message.partial_blocks, kind="stable")
        blocks, first = np.unique(message.partial_blocks[order], return_index=True)
        for block_id, slots in zip(blocks.tolist(), np.split(message.partial_slots[order], first[1:]), strict=False):
            found = self.find(block_id)
            if found is not None and not found[1].freed:
                block, whole = found[1], not found[1].partial
                try:
                    block.clear(self.directories, slots)
                except DecodeError as error:
                    damage = error
                self._note_partial(block, whole)
        if damage is not None:
            raise damage

    # ------------------------------------------------------------ readers

    def open_blocks(self, blocks: Sequence[int]) -> list[tuple[Block, Int64s]]:
        """Return readable blocks, each with its cleared slots; valid until something is freed. Raises as `pin`."""
        opened = []
        for block in self._live(blocks):
            readable = self.directories.open_block(block.arena.memory, block.start, block.block_id)
            opened.append((readable, block.cleared_slots()))
        return opened

    def pin(self, blocks: Int64s, holder: ProcessId, asked: Asked = NOBODY) -> Pinned:
        """Keep the bytes of these blocks. Raises `StaleSampleError` with the ids of those that are gone."""
        held = self._live(blocks.tolist())
        for block in held:
            block.pins += 1
        number = self.next_pin
        self.next_pin += 1
        self.pins[number] = Hold(holder, tuple(held), asked)
        self.facts.append(pin_fact(number, holder, asked, blocks))
        self._note_granted(asked, number)
        arenas = {block.arena.path: None for block in held}
        number_of = {path: position for position, path in enumerate(arenas)}
        cleared = {block.block_id: block.cleared_slots() for block in held if block.cleared is not None}
        return Pinned(
            pin=number,
            arenas=tuple(arenas),
            arena_of=np.array([number_of[block.arena.path] for block in held], np.int64),
            offsets=np.array([block.start for block in held], np.int64),
            sizes=np.array([block.size_bytes for block in held], np.int64),
            freed_blocks=np.repeat(
                np.array(list(cleared), np.int64), np.array([len(slots) for slots in cleared.values()], np.int64)
            ),
            freed_slots=np.concatenate([np.empty(0, np.int64), *cleared.values()]),
        )

    def unpin(self, number: int, client: str | None = None) -> None:
        """The end of a pin. Ignored if there is no such pin, or if it is not of this client (None: any)."""
        hold = self.pins.get(number)
        if hold is None or not _is_of(hold, client):
            return
        del self.pins[number]
        self.facts.append((Kind.UNPIN, number))
        self._forget_granted(hold.asked)
        for block in hold.blocks:
            block.pins -= 1
            if block.pins:
                continue
            if not block.freed:
                whole = not block.partial
                block.give_back_cleared(self.directories)
                self._note_partial(block, whole)
            elif (found := self.find(block.block_id)) is not None:
                self._drop(*found)

    # ------------------------------------------------------------ whom it was granted to

    def find_granted(self) -> None:
        """The spans and pins came from elsewhere: note whom they were granted to."""
        self._granted = {}
        for span in self.spans.values():
            if span.open:
                self._note_granted(span.asked, span)
        for number, hold in self.pins.items():
            self._note_granted(hold.asked, number)

    def take_back(self, asked: Asked) -> None:
        """End the span or the pin that was granted to this request, if there is one."""
        client, request = asked
        match self._granted.get(client, {}).get(request):
            case Span(number=number):
                self.return_span(number)
            case int() as pin:
                self.unpin(pin)

    def keep_only(self, client: str, before: int, requests: Set[int]) -> None:
        """End what was granted to requests of a client below `before`, but to these."""
        for request in list(self._granted.get(client, ())):
            if request < before and request not in requests:
                self.take_back((client, request))

    # ------------------------------------------------------------ the dead

    def holders(self) -> tuple[set[ProcessId], set[str]]:
        """Return all who hold a pin or wrote a block whose fate is open: processes, and clients that are elsewhere."""
        writers = (span for span in self.spans.values() if span.holder is not None and not span.settling)
        every: Iterator[Span | Hold] = itertools.chain(writers, self.pins.values())
        processes, clients = {}, set()
        for held in every:
            who = held.holder
            if is_remote(who):
                clients.add(held.asked[0])
            elif who is not None:
                processes[who.host, who.pid, who.start_time] = who
        return set(processes.values()), clients

    def release(self, dead: ProcessId) -> list[Span]:
        """Release all that a dead process held, but its sealed blocks; return the spans where those lie."""
        return self._release(lambda held: _same(held.holder, dead))

    def release_client(self, client: str) -> list[Span]:
        """The same of a client that is elsewhere, and gone."""
        return self._release(lambda held: held.asked[0] == client and is_remote(held.holder))

    def _release(self, theirs: Callable[[Span | Hold], bool]) -> list[Span]:
        for number in [number for number, hold in self.pins.items() if theirs(hold)]:
            self.unpin(number)
        open_fate = []
        for span in [span for span in self.spans.values() if theirs(span) and not span.settling]:
            self._finish(span)
            self.free(np.array([block.block_id for block in span.blocks.values() if not block.sealed], np.int64))
            if span.blocks:
                span.settling = True
                open_fate.append(span)
            self._forget_empty(span)
        return open_fate

    def settle(self, spans: Iterable[Span], lost: Int64s | None) -> None:
        """Free the blocks of these spans that were never committed; None: it could not be learnt, ask again."""
        for span in spans:
            span.settling = False
            if lost is not None:
                span.holder = None
        if lost is not None:
            self.free(lost)

    # ------------------------------------------------------------ what is lost

    def lose(self, blocks: Int64s) -> None:
        """The bytes of these blocks are not what was written: free them."""
        new = [block_id for block_id in blocks.tolist() if block_id not in self.lost]
        self.facts += [(Kind.LOST, block_id) for block_id in new]
        self.lost.update(new)
        self.free(blocks)

    def lose_span(self, first_block: int) -> None:
        """Blocks of this span cannot be found any more, whatever its holder carves."""
        if first_block not in self.lost_spans:
            self.facts.append((Kind.SPAN_LOST, first_block))
            self.lost_spans.add(first_block)

    def told(self) -> None:
        """The controller knows what is lost, and refuses it."""
        if self.lost or self.lost_spans:
            self.facts.append((Kind.TOLD,))
            self.lost.clear()
            self.lost_spans.clear()

    # ------------------------------------------------------------ all of it

    def blocks(self) -> Iterator[StoredBlock]:
        """Every block there is by now, also those that are freed and pinned."""
        for span in self.spans.values():
            span.walk()
            yield from span.blocks.values()

    def find(self, block_id: int) -> tuple[Span, StoredBlock] | None:
        """Return a block that is stored, and its span."""
        span = self.spans.get(block_id >> SPAN_SHIFT & SPAN_MASK)
        block = None if span is None else span.find(block_id)
        return None if span is None or block is None else (span, block)

    # ------------------------------------------------------------ inside

    def _note_granted(self, asked: Asked, what: Span | int) -> None:
        client, request = asked
        if client:
            self._granted.setdefault(client, {})[request] = what

    def _forget_granted(self, asked: Asked) -> None:
        client, request = asked
        known = self._granted.get(client, {})
        known.pop(request, None)
        if not known:
            self._granted.pop(client, None)

    def _finish(self, span: Span) -> None:
        if span.open:
            self._forget_granted(span.asked)
        span.finish()

    def _live(self, blocks: Sequence[int]) -> list[StoredBlock]:
        found = {block_id: self.find(block_id) for block_id in blocks}
        gone = [block_id for block_id, place in found.items() if place is None or place[1].freed]
        if gone:
            shown = ", ".join(map(str, gone[:_SHOWN])) + (", …" if len(gone) > _SHOWN else "")
            raise StaleSampleError(
                f"{len(gone)} of {len(found)} blocks are not stored any more (their samples were cleared): {shown}",
                blocks=gone,
            )
        places = [found[block_id] for block_id in blocks]
        return [place[1] for place in places if place is not None]

    def _free(self, span: Span, block: StoredBlock) -> None:
        if block.freed:
            return
        block.freed = True
        if block.pins:
            self.facts.append((Kind.FREED, block.block_id))
        else:
            self._drop(span, block)

    def _drop(self, span: Span, block: StoredBlock) -> None:
        block.give_back_all()
        self.facts.append((Kind.DROPPED, block.block_id))
        self.unconfirmed.discard(block.block_id)
        del span.blocks[block.block_id - span.first_block]
        self._forget_empty(span)

    def _note_partial(self, block: StoredBlock, whole: bool) -> None:
        """`whole`: until now, no byte of it had been given back."""
        if whole and block.partial:
            self.facts.append((Kind.PARTIAL, block.block_id))

    def _forget_empty(self, span: Span) -> None:
        if not span.open and not span.blocks:
            self.spans.pop(span.number, None)


def _same(one: ProcessId | None, other: ProcessId) -> bool:
    return one is not None and (one.host, one.pid, one.start_time) == (other.host, other.pid, other.start_time)


def _is_of(what: Span | Hold, client: str | None) -> bool:
    """Whether this was granted to the client; a forked child, which is another one, may name what its parent has."""
    return client is None or what.asked[0] == client
