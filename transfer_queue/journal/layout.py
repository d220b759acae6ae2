"""The bytes of a journal's files. All numbers are little-endian.

A segment `journal-N` has its full size from the start and holds zeros where nothing was written yet::

    0   magic          8 bytes
    8   checksum       u32   of the fields from here to `durable`
    12  version        u32
    16  number         u64   N
    24  first          u64   sequence number of its first record: one more than the previous segment ended with
    32  size_bytes     u64   of the file
    40  salt           u32   random; the checksums of its records begin with it, so a copy of a record is no record
    44  sync           u32   1 if records are synced in groups
    48  durable        u64   records up to this sequence number are on the disk; kept when `sync`, else 0
    56  followed       u64   `first` of the next segment once there is one (when `sync`: once that is on the disk)
    64  records, each at a multiple of 8

A record is its header and its payload; the header is written last::

    0   checksum       u32   of the salt, the rest of the header and the payload
    4   length         u32   of the payload, in bytes
    8   sequence       u64   1 for the first record of a journal, then without gaps
    16  durable        u64   what was known to be safe when this one was written

`durable` tells damage from what a machine that stopped never wrote: pages reach a disk in any order, so records that
nobody was promised may lie behind a hole, but a record that a later one calls durable must be there. Without `sync`
a process that dies leaves no holes, and `durable` is always the record before.

A snapshot `snapshot-S` stands for all records up to the sequence number S::

    0   magic          8 bytes
    8   checksum       u32   of the rest of the header and the content
    12  version        u32
    16  sequence       u64   S
    24  segment        u64   number of the segment that record S + 1 is in, or would be
    32  size_bytes     u64   of the content
    40  content
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

VERSION = 1
SEGMENT_MAGIC = b"TQsegmt\n"
SNAPSHOT_MAGIC = b"TQsnaps\n"
SEGMENT_HEADER_BYTES = 64
RECORD_HEADER_BYTES = 24
SNAPSHOT_HEADER_BYTES = 40
MAX_PAYLOAD_BYTES = (1 << 32) - 1

DURABLE_AT = 48
FOLLOWED_AT = 56

_CHECKSUM = struct.Struct("<I")
_NUMBER = struct.Struct("<Q")
_SEGMENT = struct.Struct("<IQQQII")
_RECORD = struct.Struct("<IQQ")
_SNAPSHOT = struct.Struct("<IQQQ")


class SegmentHeader(NamedTuple):
    number: int
    first: int
    size_bytes: int
    salt: int
    sync: bool

    def pack(self) -> bytes:
        """Return the header of a segment in which nothing is durable and which nothing follows."""
        fields = _SEGMENT.pack(VERSION, *self)
        return SEGMENT_MAGIC + _CHECKSUM.pack(zlib.crc32(fields)) + fields + _NUMBER.pack(0) + _NUMBER.pack(0)


class SnapshotHeader(NamedTuple):
    sequence: int
    segment: int
    size_bytes: int

    def pack(self, content_checksum: int) -> bytes:
        fields = _SNAPSHOT.pack(VERSION, *self)
        return SNAPSHOT_MAGIC + _CHECKSUM.pack(zlib.crc32(fields, content_checksum)) + fields


def pack_number(value: int) -> bytes:
    return _NUMBER.pack(value)


def read_number(data: bytes, at: int) -> int:
    value: int = _NUMBER.unpack_from(data, at)[0]
    return value


def record_bytes(length: int) -> int:
    """Return the space that a record with a payload of `length` bytes takes."""
    return RECORD_HEADER_BYTES + (length + 7 & ~7)


def pack_record(payload: bytes, sequence: int, durable: int, salt: int) -> bytes:
    """Return the header of a record."""
    fields = _RECORD.pack(len(payload), sequence, durable)
    return _CHECKSUM.pack(zlib.crc32(payload, zlib.crc32(fields, salt))) + fields


def read_record(data: bytes, at: int, salt: int) -> tuple[int, int, bytes] | None:
    """Return (sequence, durable, payload) of the record at an offset; None if there is no whole one."""
    start = at + RECORD_HEADER_BYTES
    if start > len(data):
        return None
    length, sequence, durable = _RECORD.unpack_from(data, at + 4)
    if start + length > len(data) or sequence == 0:
        return None
    payload = data[start : start + length]
    checksum = zlib.crc32(payload, zlib.crc32(data[at + 4 : start], salt))
    return (sequence, durable, payload) if checksum == read_checksum(data, at) else None


def read_checksum(data: bytes, at: int) -> int:
    value: int = _CHECKSUM.unpack_from(data, at)[0]
    return value


def read_segment_header(data: bytes) -> SegmentHeader | str:
    """Return the header, or what is wrong with it; the size of the file is not looked at."""
    problem = _check_start(data, SEGMENT_MAGIC, SEGMENT_HEADER_BYTES)
    if problem:
        return problem
    if zlib.crc32(data[12:DURABLE_AT]) != read_checksum(data, 8):
        return "the checksum of its header is wrong"
    _, number, first, size_bytes, salt, sync = _SEGMENT.unpack_from(data, 12)
    return SegmentHeader(number, first, size_bytes, salt, bool(sync))


def read_snapshot(data: bytes) -> tuple[SnapshotHeader, bytes] | str:
    """Return header and content, or what is wrong."""
    problem = _check_start(data, SNAPSHOT_MAGIC, SNAPSHOT_HEADER_BYTES)
    if problem:
        return problem
    header = SnapshotHeader(*_SNAPSHOT.unpack_from(data, 12)[1:])
    content = data[SNAPSHOT_HEADER_BYTES:]
    if len(content) != header.size_bytes:
        return f"it has {len(content)} bytes of content and was written with {header.size_bytes}"
    if zlib.crc32(data[12:SNAPSHOT_HEADER_BYTES], zlib.crc32(content)) != read_checksum(data, 8):
        return "its checksum is wrong"
    return header, content


def _check_start(data: bytes, magic: bytes, header_bytes: int) -> str:
    if len(data) < header_bytes:
        return f"it has {len(data)} bytes, less than its header of {header_bytes}"
    if data[:8] != magic:
        return f"it begins with {data[:8]!r} and not with {magic!r}"
    version = read_checksum(data, 12)
    if version != VERSION:
        return f"its format is version {version} and this library reads version {VERSION}: use the one that wrote it"
    return ""
