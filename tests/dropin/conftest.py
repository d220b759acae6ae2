"""A queue inside this process, shared by the tests of a module."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from transfer_queue import TransferQueueClient
from transfer_queue.config import merged, settings
from transfer_queue.runtime.embedded import EmbeddedRuntime

_partitions = itertools.count()


@pytest.fixture(scope="module")
def queue() -> Iterator[EmbeddedRuntime]:
    runtime = EmbeddedRuntime(settings(merged({"runtime": "embedded"})))
    yield runtime
    runtime.close()


@pytest.fixture
def client(queue: EmbeddedRuntime) -> Iterator[TransferQueueClient]:
    with TransferQueueClient("tester", queue.info, connector=queue) as connected:
        yield connected


@pytest.fixture
def partition(client: TransferQueueClient) -> Iterator[str]:
    name = f"dropin_{next(_partitions)}"
    yield name
    client.clear_partition(name)
