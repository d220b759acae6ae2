"""A queue inside this process, shared by the tests of a module: one that nobody but them knows, or `init`'s."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

import transfer_queue as tq
from tests.dropin.streams import CONF
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


@pytest.fixture(scope="module")
def conf() -> Iterator[Any]:
    """What `init` returned; modules that need another configuration have their own."""
    tq.close()
    yield tq.init(CONF)
    tq.close()


@pytest.fixture
def partition(request: pytest.FixtureRequest) -> Iterator[str]:
    """A name; what is put under it is cleared, from the queue of `conf` for tests that use that."""
    by_init = "conf" in request.fixturenames
    queue = request.getfixturevalue("conf" if by_init else "client")  # before this, so that it ends after it
    name = f"dropin_{next(_partitions)}"
    yield name
    (tq.get_client() if by_init else queue).clear_partition(name)
