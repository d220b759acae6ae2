"""A file descriptor that any thread can make readable, so that a thread that polls wakes up."""

from __future__ import annotations

import os
import threading


class Bell:
    """`ring()` from any thread wakes whoever polls `fd`, until `hush()`."""

    def __init__(self) -> None:
        self.fd, self._inlet = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._inlet, False)
        self._lock = threading.Lock()
        self._ringing = False
        self._closed = False

    def ring(self) -> None:
        """Make `fd` readable."""
        with self._lock:
            if not self._ringing and not self._closed:
                self._ringing = True
                os.write(self._inlet, b"!")

    def hush(self) -> None:
        """Make `fd` quiet again. What rings from now on is heard by the next poll."""
        with self._lock:
            if self._ringing and not self._closed:
                os.read(self.fd, 1)
                self._ringing = False

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._inlet)
                os.close(self.fd)
