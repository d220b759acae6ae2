"""A queue with a staleness bound of one version, inside the test's process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from transfer_queue import TransferQueueClient
from transfer_queue.config import merged, settings
from transfer_queue.runtime.embedded import EmbeddedRuntime

CONF = {"runtime": "embedded", "limits": {"max_staleness": 1}}


@pytest.fixture
def client() -> Iterator[TransferQueueClient]:
    runtime = EmbeddedRuntime(settings(merged(CONF)))
    with TransferQueueClient("test", runtime.info, connector=runtime) as connected:
        yield connected
    runtime.close()
