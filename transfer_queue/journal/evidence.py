"""Whether a journal that stops once went on: what is left behind its end is searched for records and marks."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transfer_queue.journal.layout import (
    DURABLE_AT,
    FOLLOWED_AT,
    RECORD_HEADER_BYTES,
    SEGMENT_HEADER_BYTES,
    SegmentHeader,
    read_number,
    read_record,
    read_segment_header,
    record_bytes,
)

_NUMBER = struct.Struct("<Q")


@dataclass(frozen=True)
class Scanned:
    """A segment whose header is good. `records` are (sequence, payload); they end at the offset `end`."""

    path: Path
    data: bytes
    header: SegmentHeader
    records: list[tuple[int, bytes]]
    end: int

    @property
    def next_sequence(self) -> int:
        return self.header.first + len(self.records)

    @property
    def followed(self) -> int:
        """The first record of the segment that came next; 0 if none is known."""
        return read_number(self.data, FOLLOWED_AT)

    def remains(self) -> int:
        """Return how many bytes from `end` on are not untouched."""
        return len(self.data[self.end :].rstrip(b"\0"))


def scan(path: Path, data: bytes, header: SegmentHeader) -> Scanned:
    """Read the records of a segment up to the first that is not whole or not the next one."""
    at, sequence, records = SEGMENT_HEADER_BYTES, header.first, []
    while (record := read_record(data, at, header.salt)) is not None and record[0] == sequence:
        records.append((sequence, record[2]))
        at += record_bytes(len(record[2]))
        sequence += 1
    return Scanned(path, data, header, records, at)


def known_durable(segment: Scanned) -> int:
    """Return the last record that the segment's own marks, or records behind its end, say was there and safe."""
    behind = max(_records_behind(segment), default=0)
    return max(read_number(segment.data, DURABLE_AT), segment.followed - 1, behind)


def durable_by_later(path: Path) -> int:
    """Return the last record that a segment behind the end of the journal says was there and safe."""
    data = path.read_bytes()
    header = read_segment_header(data)
    if isinstance(header, str):
        return 0
    before = 0 if header.sync else header.first - 1
    return max(before, known_durable(Scanned(path, data, header, [], SEGMENT_HEADER_BYTES)))


def _records_behind(segment: Scanned) -> Iterator[int]:
    """Yield what each valid record behind the end of a segment says was safe when it was written."""
    data, salt, least = segment.data, segment.header.salt, segment.next_sequence
    last = segment.end + segment.remains()
    searched = memoryview(data)[segment.end : min(-(-last // 8) * 8, len(data) // 8 * 8)]
    for index, (number,) in enumerate(_NUMBER.iter_unpack(searched)):
        at = segment.end + index * 8 - 8  # if this number is the sequence number of a record
        if least <= number < least + len(data) // RECORD_HEADER_BYTES and at >= segment.end:
            record = read_record(data, at, salt)
            if record is not None:
                yield record[1]
