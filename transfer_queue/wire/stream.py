"""Messages of several frames over a Unix socket: no thread in between, no copy of large frames.

    u32 number of frames · u32 size of each · the frames, one behind the other

A stream never blocks. What the socket does not take at once waits in a backlog, for `flush`.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from transfer_queue.wire.codec import MAX_FRAME_BYTES, MAX_MESSAGE_BYTES, frame_bytes

HIGH_WATER_MARK = 16384  # messages that may wait for the other end
LINGER_S = 0.25

MOST_BYTES = MAX_MESSAGE_BYTES + (1 << 20)  # a message and the sizes of its frames

_READ_BYTES = 1 << 16
_JOINED_BYTES = 1 << 14  # smaller messages are sent in one piece
_MOST_FRAMES = 1 << 16
_MOST_HELD = 8  # one piece for all would let the two ends work in turn instead of side by side
_MOST_PARTS = 512  # at once; the system takes 1024
_COUNT = struct.Struct("<I")
_ONE = struct.Struct("<2I")
_TWO = struct.Struct("<3I")
_OUT_OF_BAND = 2  # header and body come as bytes, the frames behind them as views if they are large


class Stream:
    """One end of a connection. `limit_bytes`: larger messages of the other end break it.

    full     the socket took no more; `flush` when it does again
    deaf     the other end takes nothing any more; what it sent before can still be read
    broken   the other end is gone, or sent what is no message; nothing comes any more
    """

    def __init__(self, connected: socket.socket, limit_bytes: int = MOST_BYTES) -> None:
        connected.setblocking(False)
        self.limit_bytes = limit_bytes
        self.broken = False
        self.deaf = False
        self.full = False
        self._socket = connected
        self._backlog: deque[Any] = deque()
        self._behind = 0  # messages since the backlog was empty
        self._data = b""
        self._at = 0
        self._large: memoryview | None = None  # a message longer than one read, and how much of it is here
        self._filled = 0

    def __repr__(self) -> str:
        return f"<Stream {self.fd}: {'broken' if self.broken else f'{len(self._backlog)} parts to send'}>"

    @property
    def fd(self) -> int:
        return self._socket.fileno()

    # ------------------------------------------------------------ sending

    def send(self, frames: Sequence[Any], *, hold: bool = False) -> bool:
        """Send a message; `hold`: with some that follow, or the next `flush`.

        False: nobody takes it. What was taken may still be lost if the connection breaks.
        """
        if self.deaf or self.broken or self._behind >= HIGH_WATER_MARK:
            return False
        self._behind += 1
        sizes = [frame_bytes(frame) for frame in frames]
        head = struct.pack(f"<{len(sizes) + 1}I", len(sizes), *sizes)
        if sum(sizes) <= _JOINED_BYTES:
            self._backlog.append(b"".join((head, *frames)))
        else:
            self._backlog.extend(filter(frame_bytes, (head, *frames)))
        if not hold or len(self._backlog) >= _MOST_HELD:
            self.flush()
        return not self.deaf

    def flush(self) -> None:
        """Send as much as the socket takes."""
        backlog = self._backlog
        self.full = False
        try:
            while backlog:
                if len(backlog) == 1:
                    sent = self._socket.send(backlog[0])
                else:
                    sent = self._socket.sendmsg(list(itertools.islice(backlog, _MOST_PARTS)))
                self._drop_sent(sent)
            self._behind = 0
        except BlockingIOError:
            self.full = True
        except OSError:
            self.deaf = True
            backlog.clear()
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)  # so that the other end ends it, whatever the reason was

    def _drop_sent(self, sent: int) -> None:
        while sent:
            first = self._backlog.popleft()
            size = frame_bytes(first)
            if size > sent:
                self._backlog.appendleft(memoryview(first).cast("B")[sent:])
                return
            sent -= size

    # ------------------------------------------------------------ receiving

    def read(self) -> bool:
        """Read once from the socket; return whether anything came."""
        try:
            if self._large is not None:
                count = self._socket.recv_into(self._large[self._filled :])
                self._filled += count
            else:
                data = self._socket.recv(_READ_BYTES)
                count = len(data)
                self._data = self._data[self._at :] + data if self._at < len(self._data) else data
                self._at = 0
        except BlockingIOError:
            return False
        except OSError:
            count = 0
        if count == 0:
            self._break()
        return count > 0

    def next(self) -> list[Any] | None:
        """Return the frames of the next message of what was read; None: it is not complete."""
        if self._large is not None:
            return self._take_large(self._large) if self._filled == len(self._large) else None
        data, at = self._data, self._at
        here = len(data) - at
        if here < _COUNT.size:
            return None
        count: int = _COUNT.unpack_from(data, at)[0]
        head = _COUNT.size * (count + 1)
        if not 0 < count <= _MOST_FRAMES or head > self.limit_bytes:
            self._break()
            return None
        if here < head:
            return None
        sizes = _sizes(data, at, count)
        total = head + sum(sizes)
        if total > self.limit_bytes or max(sizes) > MAX_FRAME_BYTES:
            self._break()
            return None
        if here < total:
            if total > _READ_BYTES:
                self._large = memoryview(bytearray(total))
                self._large[:here] = data[at:]
                self._filled = here
                self._data, self._at = b"", 0
            return None
        self._at = at + total
        ends = itertools.accumulate(sizes, initial=at + head)
        return [data[begin:end] for begin, end in itertools.pairwise(ends)]

    def _take_large(self, message: memoryview) -> list[Any]:
        count: int = _COUNT.unpack_from(message)[0]
        sizes = _sizes(message, 0, count)
        cuts = list(itertools.pairwise(itertools.accumulate(sizes, initial=_COUNT.size * (count + 1))))
        self._large = None
        whole = message.toreadonly()
        return [
            bytes(whole[begin:end]) if number < _OUT_OF_BAND else whole[begin:end]
            for number, (begin, end) in enumerate(cuts)
        ]

    # ------------------------------------------------------------ the end

    def close(self, linger_s: float = 0.0) -> None:
        """Close the socket, after at most `linger_s` of sending what waits. May be called twice."""
        deadline = time.monotonic() + linger_s
        with contextlib.suppress(OSError):
            while self._backlog and (left_s := deadline - time.monotonic()) > 0:
                self._socket.settimeout(left_s)
                self._drop_sent(self._socket.send(self._backlog[0]))
        self._break()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # also where a forked child holds it
        self._socket.close()

    def _break(self) -> None:
        self.broken = True
        self._backlog.clear()
        self._data, self._at, self._large = b"", 0, None


def _sizes(data: bytes | memoryview, at: int, count: int) -> tuple[int, ...]:
    if count == 2:
        return _TWO.unpack_from(data, at)[1:]
    if count == 1:
        return _ONE.unpack_from(data, at)[1:]
    return struct.unpack_from(f"<{count}I", data, at + _COUNT.size)
