"""What changed, and waiting for it; the numbers are those of the drop-in checklist."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transfer_queue import KVDelta, TransferQueueClient
from transfer_queue.config import merged
from transfer_queue.config import settings as settings_of
from transfer_queue.errors import ConnectionLost, GetMetaTimeout
from transfer_queue.ledger import feed
from transfer_queue.runtime.embedded import EmbeddedRuntime

Listing = dict[str, dict[str, dict[str, Any]]]

KEYS = st.lists(st.sampled_from("abcde"), min_size=1, max_size=3, unique=True)
PARTITIONS = st.sampled_from(["p", "q"])
OPERATIONS = st.one_of(
    st.tuples(st.just("tag"), PARTITIONS, KEYS, st.integers(0, 2)),
    st.tuples(st.just("write"), PARTITIONS, KEYS, st.just(0)),
    st.tuples(st.just("clear"), PARTITIONS, KEYS, st.just(0)),
    st.tuples(st.just("clear all"), PARTITIONS, st.just(["a"]), st.just(0)),
    st.tuples(st.just("look"), PARTITIONS, st.just(["a"]), st.just(0)),
)


@pytest.fixture(scope="module")
def empty_queue() -> Iterator[EmbeddedRuntime]:
    """A queue in which nobody else puts anything."""
    runtime = EmbeddedRuntime(settings_of(merged({"runtime": "embedded"})))
    yield runtime
    runtime.close()


@pytest.fixture
def alone(empty_queue: EmbeddedRuntime) -> Iterator[TransferQueueClient]:
    with TransferQueueClient("alone", empty_queue.info, connector=empty_queue) as client:
        for name in client.get_partition_list():
            client.clear_partition(name)
        yield client


def listed(listing: Listing) -> Listing:
    """Without partitions that have no keys: deltas tell of keys."""
    return {name: keys for name, keys in listing.items() if keys}


def applied(delta: KVDelta, listing: Listing) -> Listing:
    new = {name: dict(keys) for name, keys in ({} if delta.full else listing).items()}
    for name, gone in delta.removed.items():
        for key in gone:
            del new[name][key]
    for name, keys in delta.changed.items():
        new.setdefault(name, {}).update(keys)
    return listed(new)


def perform(client: TransferQueueClient, what: str, partition: str, keys: list[str], number: int) -> None:
    if what == "tag":
        client.kv_batch_put(keys, partition, tags=[{"n": number}] * len(keys))
    elif what == "write":
        for key in keys:
            client.kv_put(key, partition, {"x": torch.zeros(1)})
    elif what == "clear":
        client.kv_clear(keys, partition)
    else:
        client.clear_partition(partition)


@settings(max_examples=100)
@given(operations=st.lists(OPERATIONS, max_size=40))
def test_50_deltas_are_the_difference_of_two_listings(
    empty_queue: EmbeddedRuntime, operations: list[tuple[str, str, list[str], int]]
) -> None:
    """At each look: what is removed was there and is not, what is changed was put since, and nothing is forgotten."""
    client = TransferQueueClient("alone", empty_queue.info, connector=empty_queue)
    for name in ("p", "q"):
        client.clear_partition(name)
    start = client.kv_list(since="")
    assert start.full and start.changed == {}
    views = [(start.cursor, client.kv_list(), set[tuple[str, str]]())]  # cursor, listing then, keys put since
    for what, partition, keys, number in operations:
        if what == "look":
            now = client.kv_list(since="")
            views.append((now.cursor, client.kv_list(), set()))
            continue
        perform(client, what, partition, keys, number)
        for _, _, put_since in views:
            put_since.update((partition, key) for key in keys if what in ("tag", "write"))
    now = client.kv_list()
    for cursor, then, put_since in views:
        delta = client.kv_list(since=cursor)
        changed = {(name, key) for name, keys in delta.changed.items() for key in keys}
        removed = {(name, key) for name, gone in delta.removed.items() for key in gone}
        before = {(name, key) for name, keys in then.items() for key in keys}
        after = {(name, key) for name, keys in now.items() for key in keys}
        assert applied(delta, then) == listed(now) and not delta.full
        assert removed == before - after and changed == put_since & after
        assert client.kv_list("p", since=cursor).changed.get("p") == delta.changed.get("p")
        assert client.kv_list(since=delta.cursor) == KVDelta(delta.cursor)
    client.close()


def test_50_order_and_removals(alone: TransferQueueClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes come in the order in which they were made; a cursor older than the removals that are known: all."""
    start = alone.kv_list(since="")
    alone.kv_batch_put(["a", "b", "c"], "p", tags=[{}, {}, {}])
    alone.kv_put("a", "p", tag={"n": 1})
    assert list(alone.kv_list(since=start.cursor).changed["p"]) == ["b", "c", "a"]
    assert list(alone.kv_list(since="").changed["p"]) == ["a", "b", "c"]
    middle = alone.kv_list(since="")
    alone.kv_put("d", "p", tag={})
    alone.kv_clear(["b", "d"], "p")
    delta = alone.kv_list(since=middle.cursor)
    assert (delta.changed, delta.removed) == ({}, {"p": ["b"]})
    monkeypatch.setattr(feed, "RING", 1)
    alone.kv_clear(["a"], "p")
    for old in (start.cursor, middle.cursor, "of another queue.0.3", "..", middle.cursor + "000"):
        delta = alone.kv_list(since=old)
        assert delta.full and delta.changed == {"p": {"c": {}}} and not delta.removed
    with pytest.raises(TypeError):
        alone.kv_list(since=3)


def test_50_full_after_load(tmp_path: Path) -> None:
    """A cursor from before the load of a checkpoint gives everything; so does one that a wait holds."""
    runtime = EmbeddedRuntime(settings_of(merged({"runtime": "embedded"})))
    with TransferQueueClient("c", runtime.info, connector=runtime) as client:
        client.kv_batch_put(["a", "b"], "p", tags=[{"n": 1}, {}])
        client.save_checkpoint(tmp_path / "saved")
        client.kv_put("c", "p", tag={})
        before = client.kv_list(since="")
        with waiting(lambda: client.kv_wait("p", since=before.cursor, timeout=10), client) as found:
            client.load_checkpoint(tmp_path / "saved")
        assert found[0].full and found[0].changed == {"p": {"a": {"n": 1}, "b": {}}}
        delta = client.kv_list(since=before.cursor)
        assert delta.full and delta.changed == {"p": {"a": {"n": 1}, "b": {}}}
        client.kv_clear("a", "p")
        assert client.kv_list(since=delta.cursor).removed == {"p": ["a"]}
    runtime.close()


# ---------------------------------------------------------------- waiting


class waiting:
    """Runs a call in a thread; the block begins once it waits, and ends when it has ended. Gives its result, listed."""

    def __init__(self, call: Callable[[], Any], client: TransferQueueClient) -> None:
        self.found: list[Any] = []
        self._client, self._before = client, client.audit()["waiting"]
        self._thread = threading.Thread(target=lambda: self._run(call))

    def _run(self, call: Callable[[], Any]) -> None:
        try:
            self.found.append(call())
        except BaseException as error:
            self.found.append(error)

    def __enter__(self) -> list[Any]:
        self._thread.start()
        deadline = time.monotonic() + 5
        while self._client.audit()["waiting"] == self._before and time.monotonic() < deadline:
            time.sleep(0.001)
        return self.found

    def __exit__(self, *error: object) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture(params=["in process", "by socket"])
def waiter(request: pytest.FixtureRequest, queue: EmbeddedRuntime) -> Iterator[TransferQueueClient]:
    connector = queue if request.param == "in process" else None
    with TransferQueueClient("waiter", queue.info, connector=connector) as client:
        yield client


def test_51_keys_and_fields(waiter: TransferQueueClient, client: TransferQueueClient, partition: str) -> None:
    """Until all keys are there and have the fields, in whatever order; the result is in the order of a listing."""
    wanted = {"keys": ["b", "a"], "fields": ["x", "y"]}
    with waiting(lambda: waiter.kv_wait(partition, **wanted, timeout=10), client) as found:
        client.kv_batch_put(["a", "c", "b"], partition, tags=[{"n": 1}, {}, {}])
        for key, field in (("a", "x"), ("b", "y"), ("b", "x")):
            client.kv_put(key, partition, {field: torch.ones(1)})
        time.sleep(0.02)
        assert not found
        client.kv_clear("b", partition)
        client.kv_put("a", partition, {"y": torch.ones(1)})
        time.sleep(0.02)
        assert not found, "a key is gone again"
        client.kv_put("b", partition, {"x": torch.ones(1), "y": torch.ones(1)})
    (delta,) = found
    assert delta.changed == {partition: {"a": {"n": 1}, "b": {}}} and list(delta.changed[partition]) == ["a", "b"]
    assert not delta.full and delta.cursor == client.kv_list(since="").cursor
    assert waiter.kv_wait(partition, keys="c").changed == {partition: {"c": {}}}


def test_51_where_and_count(waiter: TransferQueueClient, client: TransferQueueClient, partition: str) -> None:
    """Until so many keys match; all that do come back."""
    where = {"status": ["finished", "failure"], "group": 1}
    with waiting(lambda: waiter.kv_wait(partition, where=where, count=2, timeout=10), client) as found:
        for key, tag in (("a", {"status": "running", "group": 1}), ("b", {"status": "finished", "group": 1})):
            client.kv_put(key, partition, tag=tag)
        client.kv_put("c", partition, tag={"status": "finished", "group": 2})
        client.kv_put("d", partition, tag={"status": "failure", "group": 1})
        client.kv_batch_put(["b", "a"], partition, tags=[{"status": "running"}, {"status": "finished"}])
    assert list(found[0].changed[partition]) == ["b", "d"]
    assert list(waiter.kv_wait(partition, where=where).changed[partition]) == ["a", "d"]
    assert list(waiter.kv_wait(partition, where={"group": [2, 3]}, timeout=0).changed[partition]) == ["c"]
    client.kv_put("e", partition, tag={"list": [1, 2]})
    assert list(waiter.kv_wait(partition, where={"list": [[1, 2]]}).changed[partition]) == ["e"]
    assert len(waiter.kv_wait(partition, count=5).changed[partition]) == 5


def test_51_since(waiter: TransferQueueClient, client: TransferQueueClient, partition: str) -> None:
    """Until anything changed after a cursor, also if a key was removed."""
    client.kv_batch_put(["a", "b"], partition, tags=[{"s": 1}, {"s": 1}])
    first = waiter.kv_wait(partition, since="")
    assert first.full and list(first.changed[partition]) == ["a", "b"]
    with waiting(lambda: waiter.kv_wait(partition, since=first.cursor, timeout=10), client) as found:
        client.kv_put("elsewhere", f"{partition}_other", tag={})
        client.kv_put("b", partition, {"x": torch.ones(1)})
    assert found[0].changed == {partition: {"b": {"s": 1}}}
    with waiting(lambda: waiter.kv_wait(partition, since=found[0].cursor, timeout=10), client) as gone:
        client.kv_clear("a", partition)
    assert (gone[0].changed, gone[0].removed) == ({}, {partition: ["a"]})
    only = {"where": {"s": 2}, "count": 1, "since": gone[0].cursor}
    with waiting(lambda: waiter.kv_wait(partition, **only, timeout=10), client) as matching:
        client.kv_put("c", partition, tag={"s": 1})
        client.kv_clear("c", partition)
        client.kv_put("b", partition, tag={"s": 2})
    assert matching[0].changed == {partition: {"b": {"s": 2}}}
    client.clear_partition(f"{partition}_other")


def test_51_timeout_names_what_is_pending(waiter: TransferQueueClient, partition: str) -> None:
    waiter.kv_put("a", partition, tag={"s": 1})
    cases = [
        ({"keys": ["a", "b"], "fields": "x"}, ["2 of 2", "'a' (lacks x)", "'b' (not there)"]),
        ({"keys": ["a"], "where": {"s": 2}}, ["'a' (other tag)"]),
        ({"where": {"s": [2, 3]}, "count": 2}, ["0 of 2", "s=2 or 3", "1 keys"]),
        ({"since": waiter.kv_list(since="").cursor}, ["0 of 1", "changed"]),
    ]
    for timeout in (0, 0.02):
        for wanted, texts in cases:
            with pytest.raises(GetMetaTimeout) as caught:
                waiter.kv_wait(partition, **wanted, timeout=timeout)
            assert isinstance(caught.value, TimeoutError) and all(text in str(caught.value) for text in texts)
    with pytest.raises(TimeoutError, match="does not exist"):
        waiter.kv_wait(f"{partition}_unknown", timeout=0)
    assert waiter.audit()["waiting"] == 0


def test_51_bad_input(client: TransferQueueClient, partition: str) -> None:
    wrong: list[tuple[type[Exception], dict[str, Any]]] = [
        (ValueError, {"keys": []}),
        (ValueError, {"keys": ["a"], "count": 1}),
        (ValueError, {"count": 0}),
        (ValueError, {"timeout": math.nan}),
        (TypeError, {"count": "2"}),
        (TypeError, {"keys": {"a"}}),
        (TypeError, {"fields": 3}),
        (TypeError, {"where": ["status"]}),
        (TypeError, {"since": 3}),
    ]
    for kind, wanted in wrong:
        with pytest.raises(kind):
            client.kv_wait(partition, **wanted)


def test_51_wakes_at_once(waiter: TransferQueueClient, client: TransferQueueClient, partition: str) -> None:
    """Within 50 ms of the commit, best of five."""
    taken = []
    for n in range(5):
        call = lambda n=n: (waiter.kv_wait(partition, keys=[f"k{n}"], timeout=10), time.monotonic())  # noqa: E731
        with waiting(call, client) as found:
            begun = time.monotonic()
            client.kv_put(f"k{n}", partition, tag={})
        taken.append(found[0][1] - begun)
    assert min(taken) < 0.05


def test_51_who_is_gone_is_forgotten(queue: EmbeddedRuntime, client: TransferQueueClient, partition: str) -> None:
    """A client that closes, and a coroutine that is cancelled, do not wait any more."""
    leaving = TransferQueueClient("leaving", queue.info)
    with waiting(lambda: leaving.kv_wait(partition, keys=["a"], timeout=60), client) as found:
        leaving.close()
    assert isinstance(found[0], ConnectionLost)

    async def cancelled() -> None:
        task = asyncio.ensure_future(client.async_kv_wait(partition, where={"s": 1}, timeout=60))
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(cancelled())
    deadline = time.monotonic() + 5
    while client.audit()["waiting"] and time.monotonic() < deadline:
        time.sleep(0.005)
    assert client.audit()["waiting"] == 0
    client.kv_put("a", partition, tag={"s": 1})


def test_watch(waiter: TransferQueueClient, client: TransferQueueClient, partition: str) -> None:
    """A replay buffer fed by a watch has at any time what a listing has."""
    buffer: dict[str, Any] = {}

    def feed_buffer() -> None:
        for delta in waiter.kv_watch(partition, timeout=10):
            for key in delta.removed.get(partition, []):
                del buffer[key]
            buffer.update(delta.changed.get(partition, {}))
            if "last" in buffer:
                return

    with waiting(feed_buffer, client) as found:
        for n in range(100):
            client.kv_put(f"k{n % 20}", partition, tag={"n": n})
            client.kv_clear(f"k{(n * 7) % 20}", partition)
        client.kv_put("last", partition, tag={})
    assert found == [None] and buffer == client.kv_list()[partition]


async def test_watch_in_an_event_loop(client: TransferQueueClient, partition: str) -> None:
    """Of those that match; it goes on from its cursor after a timeout."""
    watch = client.async_kv_watch(partition, where={"s": "done"}, timeout=0.05)
    await client.async_kv_put("a", partition, tag={"s": "new"})
    with pytest.raises(GetMetaTimeout):
        await anext(watch)
    await client.async_kv_put("a", partition, tag={"s": "done"})
    seen = []
    async for delta in watch:
        seen.append(delta)
        if len(seen) == 2:
            break
        await client.async_kv_batch_put(["b", "c"], partition, tags=[{"s": "new"}, {"s": "done"}])
    assert [delta.changed[partition] for delta in seen] == [{"a": {"s": "done"}}, {"c": {"s": "done"}}]
    assert seen[1].cursor == watch.cursor
