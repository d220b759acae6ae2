"""Leases as their users see them, by every route and both faces; and calls whose connection broke."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.contract.conftest import AwaitableFace
from tests.integration.starting import wait_until
from transfer_queue.errors import GetMetaTimeout, InvalidArgument, LeaseExpired, StaleSampleError, WrongType
from transfer_queue.messages import GetUnitStats
from transfer_queue.metadata import BatchMeta

WAIT_S = 20.0
SHORT_S = 0.1

Use = Callable[..., Any]


@pytest.fixture
def use(queue: Any) -> Use:
    """Runs `body(meta, data)` in a leased block of either face."""

    def blocking(body: Callable[[Any, Any], Any], *args: Any, **kwargs: Any) -> Any:
        with queue.leased(*args, **kwargs) as (meta, data):
            return body(meta, data)

    async def awaitable(body: Callable[[Any, Any], Any], *args: Any, **kwargs: Any) -> Any:
        async with queue._client.async_leased(*args, **kwargs) as (meta, data):
            return body(meta, data)

    if isinstance(queue, AwaitableFace):
        return lambda *args, **kwargs: asyncio.run(awaitable(*args, **kwargs))
    return blocking


def account(queue: Any, partition: str, task: str = "t") -> dict[str, Any]:
    entries: dict[str, Any] = queue.audit(partition)["partitions"][partition]["tasks"][task]
    return entries


def expired(client: Any, partition: str) -> None:
    """Wait until no lease of the partition is open."""
    deadline = time.monotonic() + WAIT_S
    while account(client, partition)["leases"]["open"]:
        assert time.monotonic() < deadline, "the lease does not end"
        time.sleep(0.01)


def bytes_live(client: Any) -> int:
    return int(client._core.transfer.units.get(1).peer.begin(GetUnitStats()).result(WAIT_S).entries["bytes_live"])


# ---------------------------------------------------------------- settling


def test_leased_samples_are_consumed_by_ack(queue: Any, partition: str) -> None:
    """Nobody else gets them meanwhile; a second acknowledgement is no error and counts nothing."""
    queue.put({"x": torch.arange(4)}, partition_id=partition)
    asked_s = time.monotonic()
    meta = queue.get_meta(["x"], 3, partition, task_name="t", lease=30)
    assert meta.lease_token is not None and "lease" in repr(meta)
    assert asked_s + 30 <= meta.lease_deadline_s <= time.monotonic() + 30
    assert (account(queue, partition)["reserved"], account(queue, partition)["consumed"]) == (3, 0)
    with pytest.raises(GetMetaTimeout):
        queue.get_meta(["x"], 2, partition, task_name="t", timeout=0)
    assert queue.ack(meta) == 3
    assert queue.ack(meta) == 0
    assert (account(queue, partition)["reserved"], account(queue, partition)["consumed"]) == (0, 3)


def test_released_samples_are_drawn_again(queue: Any, partition: str) -> None:
    """At once, and not counted as duplicates."""
    queue.put({"x": torch.arange(4)}, partition_id=partition)
    meta = queue.get_meta(["x"], 4, partition, task_name="t", lease=30)
    assert queue.release(meta) == 4
    again = queue.get_meta(["x"], 4, partition, task_name="t", lease=30, timeout=0)
    assert again.global_indexes == meta.global_indexes and again.lease_token != meta.lease_token
    with pytest.raises(LeaseExpired):
        queue.ack(meta)
    assert queue.ack(again) == 4


def test_samples_of_an_overdue_lease_go_to_who_waits(queue: Any, partition: str) -> None:
    """The late acknowledgement is refused, that of the new holder counts."""
    queue.put({"x": torch.arange(2)}, partition_id=partition)
    late = queue.get_meta(["x"], 2, partition, task_name="t", lease=SHORT_S)
    new = queue.get_meta(["x"], 2, partition, task_name="t", lease=30, timeout=WAIT_S)
    assert new.global_indexes == late.global_indexes
    for call in (queue.ack, queue.release, queue.renew):
        with pytest.raises(LeaseExpired, match="draw again"):
            call(late)
    assert queue.ack(new) == 2


@pytest.mark.parametrize("connect", ["in_process", pytest.param("ray_tcp", marks=pytest.mark.ray)], indirect=True)
def test_a_renewed_lease_lasts(queue: Any, partition: str) -> None:
    """For as long as asked, or as it was granted for; the meta knows until when."""
    queue.put({"x": torch.arange(2)}, partition_id=partition)
    meta = queue.get_meta(["x"], 2, partition, task_name="t", lease=0.5)
    first = meta.lease_deadline_s
    queue.renew(meta)
    assert first < meta.lease_deadline_s <= time.monotonic() + 0.5
    queue.renew(meta, 30)
    assert meta.lease_deadline_s > time.monotonic() + 20
    with pytest.raises(GetMetaTimeout, match="lease"):
        queue.get_meta(["x"], 2, partition, task_name="t", timeout=0.6)
    assert queue.ack(meta) == 2


def test_parts_of_leases_are_settled_by_themselves(queue: Any, partition: str) -> None:
    """A chunk is acknowledged, another released; rows of several leases, joined, go to each; repeats count once."""
    queue.put({"x": torch.arange(8)}, partition_id=partition)
    first, second = (queue.get_meta(["x"], 4, partition, task_name="t", lease=30) for _ in range(2))
    head, tail = first.chunk(2)
    assert queue.ack(head) == 2
    joined = BatchMeta.concat([second, tail.select_samples([0, 1, 0])])
    assert joined.lease_token is None
    queue.renew(joined, 60)
    assert joined.lease_deadline_s is not None and joined.lease_deadline_s > time.monotonic() + 40
    assert queue.ack(joined.select_samples([1, 0, 2, 4, 6])) == 3 + 1
    assert queue.release(joined.select_samples([3])) == 1
    assert (account(queue, partition)["consumed"], account(queue, partition)["reserved"]) == (2 + 4, 1)


def test_what_cannot_be_settled(queue: Any, partition: str) -> None:
    """Rows without a lease, leases without a length, drops without a reason."""
    meta = queue.put({"x": torch.arange(2)}, partition_id=partition)
    for call in (queue.ack, queue.release, queue.renew):
        with pytest.raises(InvalidArgument, match=r"2 of 2 samples are not leased: draw them with get_meta.*lease="):
            call(meta)
        with pytest.raises(WrongType, match="must be a BatchMeta"):
            call([0])
    for lease in (0, -1, float("inf"), float("nan")):
        with pytest.raises(InvalidArgument, match="lease must be a finite number of seconds"):
            queue.get_meta(["x"], 2, partition, task_name="t", lease=lease)
    with pytest.raises(WrongType, match="lease must be a number"):
        queue.get_meta(["x"], 2, partition, task_name="t", lease="1")
    with pytest.raises(InvalidArgument, match="'insert' takes no lease"):
        queue.get_meta(["x"], 2, partition, mode="insert", lease=1)
    with pytest.raises(InvalidArgument, match="reason"):
        queue.drop(meta, "")
    assert [call(BatchMeta()) for call in (queue.ack, queue.release, queue.renew)] == [0, 0, None]


def test_dropped_samples_are_gone_for_good(queue: Any, partition: str) -> None:
    """They are accounted under the reason, and a handle on them is stale."""
    meta = queue.put({"x": torch.arange(4)}, partition_id=partition)
    queue.get_meta(["x"], 1, partition, task_name="t")
    assert queue.drop(meta[1:3], "too long") == 2
    assert queue.get_data(queue.get_meta(["x"], 1, partition, task_name="t"))["x"].tolist() == [3]
    with pytest.raises(StaleSampleError):
        queue.drop(meta[1:], "too long")
    assert account(queue, partition)["dropped"] == {"too long": 2}


# ---------------------------------------------------------------- writing under a lease


def test_a_put_under_a_lease_that_is_over_writes_nothing(queue: Any, client: Any, partition: str) -> None:
    """The field of the new holder stands, and the space of the late put comes back."""
    queue.put({"x": torch.arange(2)}, partition_id=partition)
    late = queue.get_meta(["x"], 2, partition, task_name="t", lease=SHORT_S)
    new = queue.get_meta(["x"], 2, partition, task_name="t", lease=30, timeout=WAIT_S)
    queue.put({"reward": torch.ones(2)}, metadata=new)
    live = bytes_live(client)
    with pytest.raises(LeaseExpired):
        queue.put({"reward": torch.full((2, 1000), 9.0)}, metadata=late)
    assert late.field_names == ["x"]
    assert bytes_live(client) <= live
    assert queue.get_data(new)["reward"].tolist() == [1.0, 1.0]
    assert queue.ack(new) == 2


def test_a_put_names_one_lease(queue: Any, partition: str) -> None:
    """Rows of several leases are put lease by lease."""
    queue.put({"x": torch.arange(4)}, partition_id=partition)
    pieces = [queue.get_meta(["x"], 2, partition, task_name="t", lease=30) for _ in range(2)]
    joined = BatchMeta.concat(pieces)
    with pytest.raises(InvalidArgument, match="several leases.*rows_by_lease"):
        queue.put({"y": torch.zeros(4)}, metadata=joined)
    for rows in joined.rows_by_lease().values():
        queue.put({"y": torch.zeros(2)}, metadata=joined.select_samples(rows))
    assert queue.ack(joined) == 4


# ---------------------------------------------------------------- blocks


def test_a_block_that_ends_well_acknowledges(queue: Any, use: Use, partition: str) -> None:
    """The data is read, the samples are consumed when the block ends."""
    queue.put({"x": torch.arange(2), "y": torch.zeros(2)}, partition_id=partition)

    def body(meta: Any, data: Any) -> list[int]:
        assert account(queue, partition)["reserved"] == 2 if not isinstance(queue, AwaitableFace) else True
        assert list(data.keys()) == ["x"] and meta.lease_token is not None
        return list(data["x"].tolist())

    assert use(body, ["x", "y"], 2, partition, task_name="t", fields=["x"]) == [0, 1]
    assert account(queue, partition)["consumed"] == 2


def test_a_block_that_raises_gives_back(queue: Any, use: Use, partition: str) -> None:
    """The error goes on as it is, and the samples are there for the next one."""
    queue.put({"x": torch.arange(2)}, partition_id=partition)
    error = ValueError("the work failed")

    def body(meta: Any, data: Any) -> None:
        raise error

    with pytest.raises(ValueError, match="the work failed") as caught:
        use(body, ["x"], 2, partition, task_name="t")
    assert caught.value is error and not hasattr(error, "__notes__")
    assert queue.get_meta(["x"], 2, partition, task_name="t", timeout=0).size == 2


def test_samples_go_back_if_their_data_cannot_be_read(queue: Any, use: Use, partition: str) -> None:
    """A field that nobody produced: the block is not entered."""
    queue.put({"x": torch.arange(2)}, partition_id=partition)
    with pytest.raises(LookupError, match="nowhere"):
        use(lambda meta, data: pytest.fail("entered"), ["x"], 2, partition, task_name="t", fields=["nowhere"])
    assert queue.get_meta(["x"], 2, partition, task_name="t", timeout=0).size == 2


def test_leaving_a_block_too_late_says_that_the_work_may_be_done_twice(client: Any, use: Use, partition: str) -> None:
    """An error of the block itself goes before, and carries a note."""
    client.put({"x": torch.arange(2)}, partition_id=partition)
    with pytest.raises(LeaseExpired, match=r"may be done twice.*0\.1 s.*renew=True"):
        use(lambda meta, data: expired(client, partition), ["x"], 2, partition, task_name="t", lease=SHORT_S)

    def body(meta: Any, data: Any) -> None:
        expired(client, partition)
        raise ValueError("the work failed")

    with pytest.raises(ValueError, match="the work failed") as caught:
        use(body, ["x"], 2, partition, task_name="t", lease=SHORT_S)
    assert "could not be given back: LeaseExpired" in caught.value.__notes__[0]


@pytest.mark.parametrize("connect", ["unix", "tcp"], indirect=True)
def test_a_block_that_renews_may_take_long(queue: Any, use: Use, partition: str) -> None:
    """Longer than its lease, while nobody else gets the samples; its thread ends with it."""
    queue.put({"x": torch.arange(2)}, partition_id=partition)

    def body(meta: Any, data: Any) -> None:
        first = meta.lease_deadline_s
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < min(first + 0.1, deadline):
            time.sleep(0.02)
        assert meta.lease_deadline_s > first

    use(body, ["x"], 2, partition, task_name="t", lease=0.8, renew=True)
    assert account(queue, partition)["consumed"] == 2
    wait_until(lambda: "tq-renewal" not in [thread.name for thread in threading.enumerate()])


def test_a_cancelled_block_gives_back(client: Any, partition: str) -> None:
    """As any error does."""
    client.put({"x": torch.arange(2)}, partition_id=partition)

    async def work(inside: asyncio.Event) -> None:
        async with client.async_leased(["x"], 2, partition, task_name="t"):
            inside.set()
            await asyncio.sleep(WAIT_S)

    async def main() -> None:
        inside = asyncio.Event()
        task = asyncio.ensure_future(work(inside))
        await asyncio.wait_for(inside.wait(), WAIT_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert client.get_meta(["x"], 2, partition, task_name="t", timeout=0).size == 2


# ---------------------------------------------------------------- acknowledging without waiting


def test_what_is_asked_after_an_acknowledgement_sees_it(queue: Any, partition: str) -> None:
    """Though nobody waited for it: an audit, another acknowledgement, a clear."""
    queue.put({"x": torch.arange(9)}, partition_id=partition)
    for number in range(3):
        meta = queue.get_meta(["x"], 2, partition, task_name="t", lease=30)
        assert queue.ack(meta, wait=False) == 0
        assert account(queue, partition)["consumed"] == 2 * (number + 1)
    assert queue.ack(meta) == 0
    last = queue.get_meta(["x"], 3, partition, task_name="t", lease=30, timeout=0)
    queue.ack(last, wait=False)
    queue.clear_samples(last)
    assert account(queue, partition)["leases"]["acked"] == 9


def test_a_draw_that_waits_is_woken_by_an_acknowledgement(queue: Any, partition: str) -> None:
    """The one that this client did not wait for."""
    queue.put({"x": torch.arange(2)}, partition_id=partition)
    queue.put({"x": torch.arange(2)}, partition_id=partition, is_last=True)
    for _ in range(2):
        queue.ack(queue.get_meta(["x"], 2, partition, task_name="t", lease=30), wait=False)
    assert queue.get_meta(["x"], 2, partition, task_name="t", lease=30, timeout=WAIT_S).extra_info["end_of_stream"]


def test_an_acknowledgement_that_comes_too_late_is_told(
    client: Any, queue: Any, partition: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It raises nowhere; a warning is logged, and the samples are counted. What is wrong in the call raises."""
    queue.put({"x": torch.arange(2)}, partition_id=partition)
    late = queue.get_meta(["x"], 2, partition, task_name="t", lease=SHORT_S)
    new = queue.get_meta(["x"], 2, partition, task_name="t", lease=30, timeout=WAIT_S)
    assert queue.ack(late, wait=False) == 0
    assert queue.ack(new) == 2
    assert client.late_acks == 2
    assert "2 samples are not acknowledged and may be handed out again: lease" in caplog.text
    with pytest.raises(InvalidArgument, match="not leased"):
        queue.ack(queue.put({"x": torch.arange(1)}, partition_id=partition), wait=False)
    assert client.late_acks == 2


def test_a_block_that_does_not_wait_for_its_acknowledgement(queue: Any, use: Use, partition: str) -> None:
    """It acknowledges when it ends, also if it renewed, and gives back if it raises."""
    queue.put({"x": torch.arange(4)}, partition_id=partition)
    use(lambda meta, data: None, ["x"], 2, partition, task_name="t", wait=False, renew=True)
    assert account(queue, partition)["consumed"] == 2

    def body(meta: Any, data: Any) -> None:
        raise ValueError("the work failed")

    with pytest.raises(ValueError, match="the work failed"):
        use(body, ["x"], 2, partition, task_name="t", wait=False)
    assert queue.get_meta(["x"], 2, partition, task_name="t", timeout=0).size == 2


@pytest.mark.parametrize("how", ["close", "async_close"])
def test_closing_waits_for_acknowledgements(connect: Any, client: Any, partition: str, how: str) -> None:
    """So a consumer may end right after its last one."""
    client.put({"x": torch.arange(6)}, partition_id=partition)
    consumer = connect("consumer")
    for _ in range(3):
        consumer.ack(consumer.get_meta(["x"], 2, partition, task_name="t", lease=30), wait=False)
    if how == "close":
        consumer.close()
    else:
        asyncio.run(consumer.async_close())
    assert account(client, partition)["consumed"] == 6
    assert consumer.late_acks == 0


# ---------------------------------------------------------------- who holds them


def test_the_leases_of_a_client_that_leaves_end(connect: Any, client: Any, partition: str) -> None:
    """Before their time; what it drew without a lease stays consumed."""
    client.put({"x": torch.arange(3)}, partition_id=partition)
    other = connect("other")
    other.get_meta(["x"], 1, partition, task_name="t")
    other.get_meta(["x"], 2, partition, task_name="t", lease=600)
    other.close()
    assert client.get_data(client.get_meta(["x"], 2, partition, task_name="t", timeout=WAIT_S))["x"].tolist() == [1, 2]


def test_ranks_hold_their_slices(queue: Any, partition: str) -> None:
    """Peers of one rank share a lease; released, a slice goes to its rank again."""
    queue.put({"x": torch.arange(4)}, partition_id=partition)

    def draw(rank: int) -> Any:
        params = {"dp_rank": rank, "dp_size": 2, "dp_group_id": "g"}
        return queue.get_meta(["x"], 2, partition, task_name="t", lease=30, sampler_params=params)

    metas = {rank: draw(rank) for rank in (0, 1)}
    peer = draw(0)
    assert peer.lease_token == metas[0].lease_token != metas[1].lease_token
    assert queue.ack(metas[0]) + queue.ack(peer) == 2
    assert queue.release(metas[1]) == 2
    again = draw(1)
    assert again.global_indexes == metas[1].global_indexes
    assert queue.ack(again) == 2
    assert queue.check_consumption_status("t", partition)


def test_many_consumers_share_the_samples(connect: Any, client: Any, partition: str) -> None:
    """Every sample is consumed once, though blocks fail now and then."""
    total = 60
    client.put({"x": torch.arange(total)}, partition_id=partition)
    seen: list[int] = []

    def consume(number: int) -> None:
        consumer = connect(f"consumer-{number}")
        turn = 0
        while not client.check_consumption_status("t", partition):
            turn += 1
            try:
                with consumer.leased(["x"], 2, partition, task_name="t", timeout=0.05) as (_, data):
                    if (turn + number) % 3 == 0:
                        raise ValueError("the work failed")
                    values = data["x"].tolist()
            except (GetMetaTimeout, ValueError):
                continue
            seen.extend(values)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(consume, range(4)))
    assert sorted(seen) == list(range(total))


# ---------------------------------------------------------------- what is there


def test_data_with_gaps(queue: Any, partition: str) -> None:
    """With `allow_missing`, the rows that have the fields, and which those are; otherwise an error names what lacks."""
    meta = queue.put({"x": torch.arange(4)}, partition_id=partition)
    queue.put({"y": torch.tensor([10, 30])}, metadata=meta.select_samples([1, 3]))
    with pytest.raises(InvalidArgument, match="'y' is not produced for 2 of 4 samples"):
        queue.get_data(meta, ["x", "y"])
    data, mask = queue.get_data(meta, ["x", "y"], allow_missing=True)
    assert mask.tolist() == [False, True, False, True]
    assert (data["x"].tolist(), data["y"].tolist()) == ([1, 3], [10, 30])
    data, mask = queue.get_data(meta, ["z"], allow_missing=True)
    assert mask.tolist() == [False] * 4 and data.batch_size == torch.Size([0])
    data, mask = queue.get_data(meta, allow_missing=True)
    assert mask.all() and data["x"].tolist() == [0, 1, 2, 3]
