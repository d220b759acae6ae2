"""Key-value functions; the numbers are those of the drop-in checklist."""

from __future__ import annotations

import inspect
import io
import itertools
import logging
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict

import transfer_queue as tq
from tests.dropin.columns import batch
from transfer_queue import KVBatchMeta, TransferQueueClient
from transfer_queue.config import merged, settings
from transfer_queue.errors import NotInitialized
from transfer_queue.metadata import ZMQServerInfo
from transfer_queue.runtime.embedded import EmbeddedRuntime

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")

NAMES = ("kv_put", "kv_batch_put", "kv_batch_get", "kv_batch_get_by_meta", "kv_list", "kv_clear", "kv_wait")


def tags_of(client: TransferQueueClient, partition: str) -> dict[str, dict[str, Any]]:
    return client.kv_list(partition).get(partition, {})


# ---------------------------------------------------------------- module level


def test_07_before_init_nothing_is_listed() -> None:
    """Without a queue every function raises an error that is an AssertionError and a RuntimeError."""
    for kind in (AssertionError, RuntimeError, NotInitialized):
        with pytest.raises(kind, match="init"):
            tq.kv_list()
    with pytest.raises(AssertionError):
        tq.kv_put("a", "p", tag={})


def test_07_functions_of_the_module_are_those_of_the_client() -> None:
    """Same names, same arguments, a twin for `await`; they find the queue of this process."""
    tq.init({"runtime": "embedded"})
    try:
        tq.kv_put(key="a", partition_id="p", fields={"x": torch.ones(2)}, tag={"s": 1})
        assert tq.kv_list(partition_id="p") == {"p": {"a": {"s": 1}}} == tq.get_client().kv_list()
        assert next(tq.kv_watch("p", timeout=1)).changed == {"p": {"a": {"s": 1}}}
    finally:
        tq.close()
    for name in NAMES:
        function, twin = getattr(tq, name), getattr(tq, f"async_{name}")
        assert inspect.signature(function).parameters == inspect.signature(twin).parameters, name
        assert inspect.iscoroutinefunction(twin) and twin.__name__ == f"async_{name}"
        assert "core" not in inspect.signature(function).parameters


# ---------------------------------------------------------------- puts


def test_10_put_of_a_dict(client: TransferQueueClient, partition: str) -> None:
    """A tensor is the row; everything else is one object, never unpacked."""
    given = {"dict": {"a": [1]}, "list": [1, 2], "text": "ab", "number": 7, "none": None, "array": np.arange(3)}
    tensor = torch.arange(6).reshape(2, 3)
    meta = client.kv_put("k", partition, {"tensor": tensor, "scalar": torch.tensor(5), **given})
    assert meta.fields == sorted(["tensor", "scalar", *given])
    got = client.kv_batch_get("k", partition)
    assert torch.equal(got["tensor"], tensor[None]) and torch.equal(got["scalar"], torch.tensor([5]))
    for name, value in given.items():
        (back,) = got[name].tolist() if isinstance(got.get(name), NonTensorStack) else list(got[name])
        assert type(back) is type(value) and np.array_equal(back, value), name
    one = client.kv_put("m", partition, TensorDict({"tensor": tensor[None]}, [1]))
    assert one.fields == ["tensor"]
    payload = client.kv_put("o", partition, {"list": NonTensorData([3, 4])})
    assert client.kv_batch_get_by_meta(payload)["list"].tolist() == [[3, 4]]


def test_11_tags_merge_at_the_server(client: TransferQueueClient, partition: str) -> None:
    """Tag-only puts make keys, puts without a tag keep it; of two writers of different entries both survive."""
    client.kv_put("a", partition, tag={"is_prompt": True, "status": "pending"})
    client.kv_put("a", partition, {"x": torch.ones(1)})
    first = threading.Thread(target=lambda: [client.kv_put("a", partition, tag={"one": i}) for i in range(200)])
    first.start()
    for i in range(200):
        client.kv_put("a", partition, tag={"two": i, "status": "running"})
    first.join()
    expected = {"is_prompt": True, "status": "running", "one": 199, "two": 199}
    assert tags_of(client, partition) == {"a": expected}
    value = {"list": [1, {"a": None}], "flag": True, "ratio": 0.5}
    assert client.kv_put("a", partition, tag=value).tags == [expected | value]
    value["list"].append("of the caller")
    assert tags_of(client, partition)["a"]["list"] == [1, {"a": None}]


def _put_prompts(info: ZMQServerInfo, partition: str, writer: int, count: int) -> None:
    client = TransferQueueClient(f"writer{writer}", info)
    for i in range(0, count, 2):
        keys = [f"{writer}_{i}", f"{writer}_{i + 1}"]
        client.kv_batch_put(keys=keys, partition_id=partition, tags=[{"is_prompt": True}, {"is_prompt": False}])
    client.close()


def test_12_no_key_without_its_tag(queue: EmbeddedRuntime, client: TransferQueueClient, partition: str) -> None:
    """A reader in a loop, while processes and threads put thousands of keys with tags."""
    fork = multiprocessing.get_context("fork")
    count = 400
    writers = [fork.Process(target=_put_prompts, args=(queue.info, partition, n, count)) for n in (1, 2)]
    for process in writers:
        process.start()
    here = threading.Thread(target=lambda: [_one_prompt(client, partition, n) for n in range(1000)])
    here.start()
    looks = 0
    while any(process.is_alive() for process in writers) or here.is_alive():
        seen = tags_of(client, partition)
        assert all("is_prompt" in tag for tag in seen.values())
        per_writer = [[key for key in seen if key.startswith(f"{n}_")] for n in (1, 2)]
        assert all(len(keys) % 2 == 0 for keys in per_writer), "half a put was seen"
        looks += 1
        time.sleep(0.002)
    for process in writers:
        process.join()
        assert process.exitcode == 0
    here.join()
    assert len(tags_of(client, partition)) == 1000 + 2 * count and looks


def _one_prompt(client: TransferQueueClient, partition: str, number: int) -> None:
    client.kv_put(f"here_{number}", partition, tag={"is_prompt": True})


def test_13_who_sees_the_status_sees_the_data(client: TransferQueueClient, partition: str) -> None:
    """A prompt is marked finished after its rows were put: whoever sees the mark can read all rows."""
    done = threading.Event()
    client.kv_put("prompt_0", partition, tag={"status": "running"})

    def produce(writer: int) -> None:
        for i in range(500):
            rows = [f"{writer}_{i}_{k}" for k in range(2)]
            client.kv_batch_put(rows, partition, batch(2, x=torch.full((2, 3), i)), [{"row": True}] * 2)
            client.kv_put(f"prompt_{writer}_{i}", partition, tag={"status": "finished", "rows": rows})

    def read() -> None:
        while not done.is_set():
            finished = [tag for tag in tags_of(client, partition).values() if tag.get("status") == "finished"]
            for tag in finished[-3:]:
                number = int(tag["rows"][0].split("_")[1])
                assert client.kv_batch_get(tag["rows"], partition, "x")["x"].eq(number).all()
                checked.append(number)

    checked: list[int] = []
    errors: list[BaseException] = []
    reader = threading.Thread(target=_collecting(read, errors))
    writers = [threading.Thread(target=_collecting(lambda n=n: produce(n), errors)) for n in (1, 2)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert not errors and checked


def _collecting(work: Callable[[], None], errors: list[BaseException]) -> Callable[[], None]:
    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    return run


def test_14_order_of_a_listing(client: TransferQueueClient, partition: str) -> None:
    """By creation, in list order within a batch; an update keeps the place, clear and re-put goes last."""
    client.kv_batch_put(["c", "a"], partition, tags=[{}, {}])
    client.kv_batch_put(["b", "a", "d"], partition, tags=[{}, {"n": 1}, {}])
    assert list(tags_of(client, partition)) == ["c", "a", "b", "d"]
    client.kv_put("c", partition, {"x": torch.ones(1)})
    client.kv_clear("a", partition)
    client.kv_put("a", partition, tag={})
    assert list(tags_of(client, partition)) == ["c", "b", "d", "a"]
    other = f"{partition}_other"
    client.kv_put("z", other, tag={})
    names = [name for name in client.kv_list() if name in (partition, other)]
    assert names == [partition, other]
    client.clear_partition(other)


def test_15_content_of_a_listing(client: TransferQueueClient, partition: str) -> None:
    """Unknown: {}; emptied: {pid: {}}; untagged: {}; the dicts are the caller's own."""
    assert client.kv_list(partition) == {} == client.kv_list(f"{partition}_unknown")
    client.kv_put("a", partition, {"x": torch.ones(1)})
    client.kv_put("b", partition, tag={"nested": {"list": [1]}})
    listing = client.kv_list(partition)
    assert listing == {partition: {"a": {}, "b": {"nested": {"list": [1]}}}}
    listing[partition]["b"]["nested"]["list"].append(2)
    listing[partition]["a"]["mine"] = True
    assert client.kv_list(partition) == {partition: {"a": {}, "b": {"nested": {"list": [1]}}}}
    client.kv_clear(["a", "b"], partition)
    assert client.kv_list(partition) == {partition: {}}


def test_rows_of_keys_are_drawn(client: TransferQueueClient, partition: str) -> None:
    """A key is a sample that has one: `get_meta` draws it, its tag is the row's `custom_meta`."""
    client.kv_batch_put(["a", "b"], partition, batch(2), [{"len": 1}, {"len": 2}])
    meta = client.get_meta(["x"], 2, partition, task_name="t")
    assert client.kv_retrieve_keys(meta.global_indexes, partition) == ["a", "b"]
    assert meta.custom_meta == [{"len": 1}, {"len": 2}]
    with pytest.raises(ValueError, match="empty"):
        client.kv_retrieve_keys([], partition)


# ---------------------------------------------------------------- gets


def test_16_rows_of_a_get(client: TransferQueueClient, partition: str) -> None:
    """Key order, one row per occurrence, `[1]` for a single key; the result is free to be changed and saved."""
    client.kv_batch_put(["a", "b", "c"], partition, batch(3, x=torch.arange(3), s=NonTensorStack("a", "b", "c")))
    got = client.kv_batch_get(["c", "a", "c", "b"], partition)
    assert got["x"].tolist() == [2, 0, 2, 1] and list(got["s"]) == ["c", "a", "c", "b"]
    assert got.batch_size == torch.Size([4]) and not got.is_locked and got.device in (None, torch.device("cpu"))
    one = client.kv_batch_get("b", partition, "x")
    assert one.batch_size == torch.Size([1]) and set(one.keys()) == {"x"}
    got["y"] = got.pop("x")
    got["y"][0] = 9
    assert got["y"].tolist() == [9, 0, 2, 1] and got.select("y")[1]["y"] == 0
    torch.save(got, io.BytesIO())
    assert client.kv_batch_get(("c",), partition)["x"].tolist() == [2]


def test_17_what_is_missing(client: TransferQueueClient, partition: str, caplog: pytest.LogCaptureFixture) -> None:
    """Some keys: left out, one warning; all: ValueError. Columns: silently, with a warning, or ValueError by name."""
    client.kv_batch_put(["a", "b"], partition, batch(2))
    client.kv_put("b", partition, {"late": torch.ones(1)})
    with caplog.at_level(logging.WARNING, "transfer_queue"):
        assert client.kv_batch_get(["a", "nobody", "b"], partition)["x"].tolist() == [[0], [1]]
        assert len(caplog.records) == 1 and "nobody" in caplog.text
        caplog.clear()
        assert set(client.kv_batch_get(["a", "b"], partition, ["x", "values"]).keys()) == {"x"}
        assert not caplog.records
        assert set(client.kv_batch_get(["a", "b"], partition, ["x", "late"]).keys()) == {"x"}
        assert len(caplog.records) == 1 and "late" in caplog.text
    for keys, where in ((["nobody", "no"], partition), (["a"], f"{partition}_unknown")):
        for kind in (ValueError, KeyError, RuntimeError):
            with pytest.raises(kind, match="not found"):
                client.kv_batch_get(keys, where)
    for wanted in (["routed_experts"], ["routed_experts", "late"]):
        with pytest.raises(ValueError, match="routed_experts"):
            client.kv_batch_get(["a", "b"], partition, wanted)
    client.kv_put("bare", partition, tag={})
    with pytest.raises(ValueError, match="bare"):
        client.kv_batch_get(["bare", "a"], partition)


def test_18_default_columns(client: TransferQueueClient, partition: str) -> None:
    """Those that all requested rows have, with prompts and trajectories in one partition."""
    client.kv_batch_put(["p0", "p1"], partition, batch(2, uid=torch.arange(2), prompt=torch.ones(2, 3)))
    client.kv_put("t0", partition, {"uid": torch.tensor(0), "response": torch.ones(4)})
    assert set(client.kv_batch_get(["p0", "p1"], partition).keys()) == {"uid", "prompt"}
    assert set(client.kv_batch_get(["p0", "t0"], partition).keys()) == {"uid"}


def test_19_returned_meta(client: TransferQueueClient, partition: str) -> None:
    """Keys as given, merged tags, all columns that all these keys have by now."""
    first = client.kv_batch_put(["a", "b"], partition, batch(2), [{"s": 1}, {}])
    assert (first.keys, first.tags, first.fields) == (["a", "b"], [{"s": 1}, {}], ["x"])
    client.kv_put("b", partition, {"only_b": torch.ones(1)})
    second = client.kv_batch_put(["b", "a"], partition, batch(2, aa=torch.ones(2)), [{"t": 2}, {"t": 3}])
    assert isinstance(second, KVBatchMeta) and second.partition_id == partition and second.extra_info == {}
    assert (second.keys, second.tags, second.fields) == (["b", "a"], [{"t": 2}, {"s": 1, "t": 3}], ["aa", "x"])
    assert set(client.kv_batch_get_by_meta(second).keys()) == {"aa", "x"}
    assert client.kv_put("b", partition, tag={}).fields == ["aa", "only_b", "x"]


# ---------------------------------------------------------------- clears


@pytest.fixture(scope="module")
def small() -> Iterator[TransferQueueClient]:
    """A queue that holds four rows."""
    conf = {"runtime": "embedded", "backend": {"SimpleStorage": {"total_storage_size": 4}}}
    runtime = EmbeddedRuntime(settings(merged(conf)))
    with TransferQueueClient("tester", runtime.info, connector=runtime, polling_mode=True) as client:
        yield client
    runtime.close()


def test_21_clear(small: TransferQueueClient) -> None:
    """Unknown keys and partitions, duplicates: no error. Capacity is free on return, a thousand times."""
    small.kv_clear(["a", "a"], "unknown")
    small.kv_clear([], "p")
    data = batch(4)
    for _ in range(1000):
        keys = small.kv_batch_put(["a", "b", "c", "d"], "p", data).keys
        small.kv_clear([*keys, "a", "unknown"], "p")
    assert small.kv_list("p") == {"p": {}}
    small.clear_partition("p")


def test_22_dtype_is_forgotten_with_its_last_row(client: TransferQueueClient, partition: str) -> None:
    """A dummy row registers columns; once it is cleared, they may have any other type."""
    client.kv_batch_put(["warm"], partition, batch(1, x=torch.zeros(1), y=torch.zeros(1)), [{}])
    client.kv_clear(["warm"], partition)
    client.kv_batch_put(["a"], partition, batch(1, x=torch.arange(1), y=NonTensorStack({"b": 1})))
    got = client.kv_batch_get("a", partition)
    assert got["x"].dtype == torch.int64 and list(got["y"]) == [{"b": 1}]


def test_23_a_put_that_can_never_fit(small: TransferQueueClient) -> None:
    """Refused at once, with "capacity" in the text; nothing of it is there, and the room is still free."""
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="capacity"):
        small.kv_batch_put([f"k{n}" for n in range(5)], "big", batch(5), [{"s": 1}] * 5)
    assert time.monotonic() - begun < 5
    assert len(small.get_meta(["x"], 1, "big", task_name="t")) == 0
    assert small.kv_list("big").get("big", {}) == {}
    small.kv_batch_put(list("abcd"), "big", batch(4), timeout=5)
    small.clear_partition("big")


def test_gets_are_whole_while_a_clear_runs(client: TransferQueueClient, partition: str) -> None:
    """Each row of a get is of one life of its key, whatever is cleared and put meanwhile."""
    stop = threading.Event()

    def churn() -> None:
        for n in itertools.count():
            if stop.is_set():
                return
            client.kv_batch_put(["a", "b"], partition, batch(2, x=torch.full((2, 500), n), y=torch.full((2,), n)))
            client.kv_clear("a", partition)

    client.kv_batch_put(["b"], partition, batch(1, x=torch.full((1, 500), -1), y=torch.full((1,), -1)))
    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(150):
            got = client.kv_batch_get(["b", "a"], partition)
            assert (got["x"] == got["y"][:, None]).all()
    finally:
        stop.set()
        thread.join()
