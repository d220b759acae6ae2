"""What every user of a queue relies on, by every route and both faces."""

from __future__ import annotations

import math
import pickle
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from transfer_queue.errors import (
    GetMetaTimeout,
    InvalidArgument,
    StaleSampleError,
    UnknownName,
    WrongType,
)
from transfer_queue.messages import GetUnitStats


def jagged(*lengths: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    rows = [torch.arange(length).to(dtype) + 10 * i for i, length in enumerate(lengths)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def test_what_was_put_comes_back(queue: Any, partition: str) -> None:
    """Dense, ragged and object fields of one put are drawn once and read back equal, in layout and dtype."""
    ids = torch.randint(0, 1000, (4, 7))
    data = TensorDict(
        {"ids": ids, "scores": torch.rand(4, dtype=torch.bfloat16), "tokens": jagged(3, 0, 5, 1)}, batch_size=[4]
    )
    data["text"] = ["a", "", "ccc", "ü"]
    queue.put(data, partition_id=partition)
    meta = queue.get_meta(["ids", "scores", "tokens", "text"], 4, partition, task_name="train")
    got = queue.get_data(meta)
    assert got.batch_size == torch.Size([4])
    assert torch.equal(got["ids"], ids)
    assert torch.equal(got["scores"], data["scores"]) and got["scores"].dtype == torch.bfloat16
    assert got["tokens"].layout == torch.jagged
    assert [row.tolist() for row in got["tokens"].unbind()] == [row.tolist() for row in data["tokens"].unbind()]
    assert got["text"].tolist() == ["a", "", "ccc", "ü"]


def test_tensors_of_inference_mode(queue: Any, partition: str) -> None:
    """What a worker made under `inference_mode` is stored, and what is read back may need gradients."""
    with torch.inference_mode():
        data = {"dense": torch.rand(2, 3), "ragged": jagged(3, 2, dtype=torch.float32)}
    meta = queue.put(data, partition_id=partition)
    got = queue.get_data(meta)
    assert torch.equal(got["dense"], data["dense"]) and len(got["ragged"].unbind()[0]) == 3
    got["dense"].requires_grad_().sum().backward()


def test_fields_by_several_producers(queue: Any, partition: str) -> None:
    """Rows become ready for a task when their last field is put, and only those rows."""
    meta = queue.put({"prompt": torch.arange(6)}, partition_id=partition)
    late = meta[2:4]
    assert queue.put({"reward": torch.tensor([0.5, 1.5])}, metadata=late) is late
    assert late.field_names == ["prompt", "reward"] and late.is_ready
    drawn = queue.get_meta(["prompt", "reward"], 2, partition, task_name="train", timeout=5)
    assert drawn.global_indexes == late.global_indexes
    assert queue.get_data(drawn)["reward"].tolist() == [0.5, 1.5]
    with pytest.raises(GetMetaTimeout, match=r"4 wait for field 'reward' \(last produced .* by client 'tester'\)"):
        queue.get_meta(["prompt", "reward"], 1, partition, task_name="train", timeout=0.05)


def test_tasks_consume_independently(queue: Any, partition: str) -> None:
    """Each task gets each row once, in allocation order; resetting one gives its rows back."""
    queue.put({"x": torch.arange(4)}, partition_id=partition)
    for task in ("a", "b"):
        rows = [queue.get_data(queue.get_meta(["x"], 2, partition, task_name=task))["x"].tolist() for _ in range(2)]
        assert rows == [[0, 1], [2, 3]]
        assert queue.check_consumption_status(task, partition)
    queue.reset_consumption(partition, "a")
    assert not queue.check_consumption_status("a", partition) and queue.check_consumption_status("b", partition)
    assert queue.get_meta(["x"], 4, partition, task_name="a").size == 4


def test_a_waiting_draw_is_woken(queue: Any, partition: str, client: Any) -> None:
    """A draw that finds nothing waits on the server and returns once the missing rows are there."""
    found: list[Any] = []
    waiting = threading.Thread(
        target=lambda: found.append(queue.get_meta(["x"], 2, partition, task_name="t", timeout=math.inf))
    )
    waiting.start()
    client.put({"x": torch.zeros(1)}, partition_id=partition)
    assert not found
    client.put({"x": torch.ones(1)}, partition_id=partition)
    waiting.join(10)
    assert found and found[0].size == 2


def test_a_waiting_draw_delays_nobody(queue: Any, partition: str, connect: Any) -> None:
    """While draws wait, requests of other clients, and of the same one, are answered at once."""
    found: list[int] = []

    def wait() -> None:
        found.append(queue.get_meta(["late"], 1, partition, task_name="t").size)

    waiting = [threading.Thread(target=wait) for _ in range(3)]
    for thread in waiting:
        thread.start()
    started = time.perf_counter()
    other = connect("other")
    for k in range(10):
        other.put({"x": torch.tensor([k])}, partition_id=partition)
    assert queue.get_meta(["x"], 10, partition, task_name="t").size == 10
    assert time.perf_counter() - started < 0.9
    assert not found
    other.put({"late": torch.zeros(3)}, partition_id=partition)
    for thread in waiting:
        thread.join(10)
    assert found == [1, 1, 1]


def test_stale_handles_are_refused(queue: Any, partition: str) -> None:
    """After a clear, old handles raise at get and put, clear nothing, and never touch rows that took their slots."""
    old = queue.put({"x": torch.arange(3)}, partition_id=partition)
    assert queue.clear_samples(old) == 3
    new = queue.put({"x": torch.arange(3) + 10}, partition_id=partition)
    for call in (
        lambda: queue.get_data(old),
        lambda: queue.put({"y": torch.zeros(3)}, metadata=old),
    ):
        with pytest.raises(StaleSampleError, match="cleared"):
            call()
    assert new.global_indexes == old.global_indexes
    assert queue.clear_samples(old) == 0
    assert queue.get_data(new)["x"].tolist() == [10, 11, 12]


def test_metas_travel(queue: Any, partition: str, connect: Any) -> None:
    """A pickled, cut, reordered and joined meta reads the rows it names, in its order, with repeats."""
    queue.put({"x": torch.arange(5)}, partition_id=partition)
    queue.put({"x": torch.arange(5) + 5}, partition_id=partition)
    meta = pickle.loads(pickle.dumps(queue.get_meta(["x"], 10, partition, task_name="t")))
    first, second = meta.chunk(2)
    joined = type(meta).concat([second, first])
    assert connect("reader").get_data(joined)["x"].tolist() == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]
    assert queue.get_data(meta.select_samples([9, 0, 0]))["x"].tolist() == [9, 0, 0]


def test_results_are_private(queue: Any, partition: str) -> None:
    """Writing into what was read changes neither the stored rows nor another reader's copy."""
    meta = queue.put({"x": torch.arange(2000).reshape(2, 1000), "r": jagged(500, 700)}, partition_id=partition)
    for copy in (True, False):
        mine, other = queue.get_data(meta, copy=copy), queue.get_data(meta, copy=copy)
        mine["x"].fill_(-1)
        mine["r"].values().fill_(-1)
        for data in (other, queue.get_data(meta)):
            assert data["x"].flatten().tolist() == list(range(2000))
            assert data["r"].unbind()[1].tolist() == list(range(10, 710))


def test_groups_by_id(queue: Any, partition: str) -> None:
    """Whole groups are drawn, adjacent, whatever the order in which their rows came; a sealed one counts as whole."""
    queue.put({"x": torch.arange(4)}, partition_id=partition, group_ids=["a", "b", "a", "b"], group_size=3)
    queue.put({"x": torch.tensor([4])}, partition_id=partition, group_ids=["b"], group_size=3)
    queue.register_sampler(f"grpo-{partition}", "GRPOSampler", num_n_samples=3)
    meta = queue.get_meta(["x"], 3, partition, task_name=f"grpo-{partition}")
    assert queue.get_data(meta)["x"].tolist() == [1, 3, 4] and meta.group_ids == ["b"] * 3
    queue.seal_group("a", partition)
    assert queue.get_data(queue.get_meta(["x"], 3, partition, task_name=f"grpo-{partition}"))["x"].tolist() == [0, 2]


def test_ranks_share_one_selection(queue: Any, partition: str) -> None:
    """Ranks of one group get disjoint slices; one that asks again gets its slice again, marked as replayed."""
    queue.put({"x": torch.arange(8)}, partition_id=partition)

    def ask(rank: int, **more: Any) -> Any:
        params = {"dp_rank": rank, "dp_size": 2, "dp_group_id": "g", **more}
        return queue.get_meta(["x"], 2, partition, task_name="train", sampler_params=params)

    slices = {rank: queue.get_data(ask(rank))["x"].tolist() for rank in (1, 0)}
    assert slices == {0: [0, 1], 1: [2, 3]}
    again = ask(1)
    assert again.extra_info["replayed"] and queue.get_data(again)["x"].tolist() == [2, 3]
    with pytest.raises(InvalidArgument, match="disagree on dp_size"):
        ask(0, dp_size=4)
    alone = queue.get_meta(["x"], 2, partition, task_name="train", sampler_params={"dp_rank": 1})
    assert queue.get_data(alone)["x"].tolist() == [4, 5], "a rank without dp_size draws for itself"


def test_keys_and_tags(queue: Any, partition: str) -> None:
    """A put by key inserts or updates; tags merge and show on metas and in the listing."""
    queue.put({"x": torch.arange(2)}, partition_id=partition, keys=["k0", "k1"], tags=[{"n": 1}, None])
    queue.put({"x": torch.arange(2) + 5}, partition_id=partition, keys=["k1", "k2"], tags=[{"n": 2}, {"n": 3}])
    assert queue.kv_list(partition) == {partition: {"k0": {"n": 1}, "k1": {"n": 2}, "k2": {"n": 3}}}
    meta = queue.kv_retrieve_meta(["k2", "k0", "k1"], partition)
    assert queue.get_data(meta)["x"].tolist() == [6, 0, 5]
    assert [tag["n"] for tag in meta.custom_meta] == [3, 1, 2]
    assert queue.kv_retrieve_keys(meta.global_indexes, partition) == ["k2", "k0", "k1"]
    meta.update_custom_meta([{"done": True}, {}, {}])
    queue.set_custom_meta(meta)
    assert queue.kv_list(partition)[partition]["k2"] == {"n": 3, "done": True}


def test_modes(queue: Any, partition: str) -> None:
    """`insert` allocates rows without data, `force_fetch` shows all rows with their status and consumes nothing."""
    made = queue.get_meta(["x"], 3, partition, mode="insert")
    assert made.size == 3 and not made.is_ready
    queue.put({"x": torch.arange(2)}, metadata=made[:2])
    seen = queue.get_meta(["x"], 1, partition, mode="force_fetch")
    assert seen.production_status.tolist() == [1, 1, 0]
    assert queue.get_meta(["x"], 2, partition, task_name="t").size == 2
    with pytest.raises(InvalidArgument, match="unknown mode 'peek'"):
        queue.get_meta(["x"], 1, partition, mode="peek")


def test_status_audit_and_explanation(queue: Any, partition: str) -> None:
    """Status tensors, the accounting identity and the explanation agree with what was done."""
    meta = queue.put({"x": torch.arange(4)}, partition_id=partition)
    queue.put({"y": torch.arange(2)}, metadata=meta[:2])
    queue.get_meta(["x"], 3, partition, task_name="t")
    indexes, produced = queue.get_production_status(["x", "y"], partition)
    assert indexes.tolist() == sorted(meta.global_indexes) and produced.tolist() == [[1, 1], [1, 1], [1, 0], [1, 0]]
    assert queue.get_consumption_status("t", partition)[1].tolist() == [1, 1, 1, 0]
    assert queue.get_consumption_status("t", "nowhere") == (None, None)
    account = queue.audit(partition)["partitions"][partition]
    assert account["missing"] == {"y": 2}
    task = account["tasks"]["t"]
    assert task["balanced"] and (task["pending"], task["consumed"]) == (1, 3)
    assert "1 of 2 samples ready" in queue.explain(partition, "t", ["x"], 2)
    assert partition in queue.get_partition_list()


def test_bad_input_is_named_at_once(queue: Any, partition: str) -> None:
    """Calls that can never succeed raise at once, say what is wrong, and change nothing."""
    meta = queue.put({"x": torch.arange(4)}, partition_id=partition)
    started = time.perf_counter()
    for error, match, call in [
        (
            InvalidArgument,
            "batch_size must be at least 1, not 0",
            lambda: queue.get_meta(["x"], 0, partition, task_name="t"),
        ),
        (WrongType, "batch_size must be an int", lambda: queue.get_meta(["x"], "4", partition, task_name="t")),
        (WrongType, "data_fields must be a list", lambda: queue.get_meta("x", 1, partition, task_name="t")),
        (
            InvalidArgument,
            "exactly one of partition_id and global_step",
            lambda: queue.get_meta(["x"], 1, task_name="t"),
        ),
        (InvalidArgument, "task_name", lambda: queue.get_meta(["x"], 1, partition)),
        (UnknownName, "did you mean 'GRPOSampler'", lambda: queue.register_sampler("t", "GRPOSample")),
        (
            UnknownName,
            "unknown sampler",
            lambda: queue.get_meta(["x"], 1, partition, task_name="t", sampler_params={"sampler": "no"}),
        ),
        (
            InvalidArgument,
            "must be divisible by",
            lambda: queue.get_meta(
                ["x"], 3, partition, task_name="t", sampler_params={"sampler": "GRPOSampler", "num_n_samples": 2}
            ),
        ),
        (
            InvalidArgument,
            "dp_rank must lie in",
            lambda: queue.get_meta(["x"], 1, partition, task_name="t", sampler_params={"dp_rank": 2, "dp_size": 2}),
        ),
        (
            InvalidArgument,
            "dp_size without dp_rank",
            lambda: queue.get_meta(["x"], 1, partition, task_name="t", sampler_params={"dp_size": 2}),
        ),
        (UnknownName, "no field 'z'.*known: x", lambda: queue.get_data(meta, fields=["z"])),
        (InvalidArgument, "int64, this put brings float32", lambda: queue.put({"x": torch.zeros(4)}, metadata=meta)),
        (
            InvalidArgument,
            "length|rows",
            lambda: queue.put({"x": torch.zeros(4), "y": torch.zeros(3)}, partition_id=partition),
        ),
        (InvalidArgument, "nothing to put", lambda: queue.put(partition_id=partition)),
        (InvalidArgument, "twice", lambda: queue.put({"x": torch.arange(2)}, partition_id=partition, keys=["a", "a"])),
        (InvalidArgument, "timeout", lambda: queue.get_meta(["x"], 1, partition, task_name="t", timeout=-1)),
        (WrongType, "partition_id", lambda: queue.put({"x": torch.arange(2)}, partition_id=3.5)),
    ]:
        with pytest.raises(error, match=match):
            call()
    assert time.perf_counter() - started < 10
    assert queue.audit(partition)["partitions"][partition]["inserted"] == 4
    assert queue.get_meta(["x"], 4, partition, task_name="t").global_indexes == meta.global_indexes


def test_timeouts_name_the_nearest(queue: Any, partition: str) -> None:
    """A draw on an unknown partition, field or task waits, and its timeout names what comes near."""
    queue.put({"responses": torch.arange(2)}, partition_id=partition)
    with pytest.raises(GetMetaTimeout, match=f"no partition '{partition}x'.*did you mean"):
        queue.get_meta(["responses"], 1, partition + "x", task_name="t", timeout=0.05)
    with pytest.raises(GetMetaTimeout, match="field 'response' was not produced.*did you mean 'responses'"):
        queue.get_meta(["response"], 1, partition, task_name="t", timeout=0)


def test_many_shapes_of_puts_join(queue: Any, partition: str) -> None:
    """A draw over several puts of one field joins dense rows of one shape to dense, others to jagged."""
    queue.put({"d": torch.zeros(2, 3), "r": torch.zeros(2, 3)}, partition_id=partition)
    queue.put({"d": torch.ones(1, 3), "r": torch.ones(1, 5)}, partition_id=partition)
    got = queue.get_data(queue.get_meta(["d", "r"], 3, partition, task_name="t"))
    assert torch.equal(got["d"], torch.tensor([[0.0] * 3, [0.0] * 3, [1.0] * 3]))
    assert got["r"].layout == torch.jagged and [len(row) for row in got["r"].unbind()] == [3, 3, 5]


def test_large_and_small_puts_free_their_space(queue: Any, partition: str) -> None:
    """More than fits into the unit passes through it, piece by piece."""
    for round_ in range(5):
        meta = queue.put(
            {"big": torch.full((64, 1 << 16), float(round_)), "n": torch.arange(64)}, partition_id=partition
        )
        assert float(queue.get_data(meta, ["big"])["big"].sum()) == round_ * (64 << 16)
        queue.clear_samples(meta)


def test_fields_shared_by_groups(queue: Any, partition: str, client: Any) -> None:
    """A field declared shared is stored once per group; every row has its value, in memory of its own."""
    images = torch.randint(0, 255, (3, 40_000), dtype=torch.uint8)
    groups, of_rows = ["a"] * 4 + ["b"] * 4 + ["c"] * 4, [0] * 4 + [1] * 4 + [2] * 4
    notes = [{"size": (2, n), "mean": images[n].float().mean()} for n in range(3)]
    queue.put({"x": torch.arange(2)}, partition_id=partition)
    stored = _bytes_live(client)
    put = queue.put(
        {"x": torch.arange(12), "image": images[of_rows], "note": notes},
        partition_id=partition,
        group_ids=groups,
        group_size=4,
        shared_fields=["image", "note"],
    )
    assert queue.put({"mask": images > 99}, metadata=put, shared_fields=["mask"]) is put
    assert _bytes_live(client) - stored < 1.1 * 2 * images.nbytes
    order = [11, 0, 4, 4, 1, 8]
    for copy in (True, False):
        for meta in (put, put.select_samples(order), put.select_samples([0, 4, 8]), put[5:7]):
            rows = [of_rows[row] for row in queue.get_data(meta, ["x"])["x"].tolist()]
            got = queue.get_data(meta, copy=copy)
            assert torch.equal(got["image"], images[rows]) and torch.equal(got["mask"], images[rows] > 99)
            assert [note["size"] for note in got["note"].tolist()] == [(2, row) for row in rows]
            got["image"][0] = 7
            assert torch.equal(got["image"][1:], images[rows[1:]])
    gone, left = put.select_samples([0, 1, 2, 4, 5, 6, 7]), put.select_samples([3, 10])
    queue.clear_samples(gone)
    assert torch.equal(queue.get_data(left, ["image"])["image"], images[[0, 2]])
    for field in ("image", "mask", "note"):
        with pytest.raises(StaleSampleError):
            queue.get_data(gone[:1], [field])
    assert _bytes_live(client) - stored < 1.1 * 2 * images[:2].nbytes
    queue.put({"image": images[1].repeat(2, 1)}, metadata=left)
    assert torch.equal(queue.get_data(left, ["image", "mask"])["image"], images[[1, 1]])
    assert torch.equal(queue.get_data(left)["mask"], images[[0, 2]] > 99)
    queue.clear_partition(partition)
    assert _bytes_live(client) <= stored


def _bytes_live(client: Any) -> int:
    """Bytes of live rows in the one unit of the queue, which the client met when it put."""
    report = client._core.transfer.units.get(1).peer.begin(GetUnitStats()).result(10)
    return int(report.entries["bytes_live"])


def test_shared_fields_need_groups_and_names(queue: Any, partition: str) -> None:
    """A wrong declaration is refused with what is missing, and nothing is put."""
    plain = queue.put({"x": torch.arange(2)}, partition_id=partition)
    put = {"partition_id": partition, "group_ids": ["g", "g"], "group_size": 2}
    for error, match, data, options in [
        (InvalidArgument, "give group_ids as well", {"image": torch.zeros(2)}, {"partition_id": partition}),
        (InvalidArgument, "2 of 2 rows of metadata have no group_id", {"image": torch.zeros(2)}, {"metadata": plain}),
        (UnknownName, "'image', which data does not have.*did you mean 'images'", {"images": torch.zeros(2)}, put),
        (WrongType, "must be a list of str, not 'image'", {"image": torch.zeros(2)}, put | {"shared_fields": "image"}),
        (InvalidArgument, "3 entries for 2 rows of 1 groups", {"image": torch.zeros(3)}, put),
        (InvalidArgument, "row 0 is str of length 1, row 1 is int", {"image": ["a", 2]}, put),
    ]:
        with pytest.raises(error, match=match):
            queue.put(data, **({"shared_fields": ["image"]} | options))
    assert queue.audit(partition)["partitions"][partition]["inserted"] == 2


def test_empty_metas(queue: Any) -> None:
    """Reading no rows gives an empty TensorDict."""
    from transfer_queue import BatchMeta

    got = queue.get_data(BatchMeta())
    assert got.batch_size == torch.Size([0]) and not list(got.keys())


def test_numpy_and_lists(queue: Any, partition: str) -> None:
    """NumPy arrays come back as tensors, lists of objects as the same objects."""
    objects = [{"a": (1, 2)}, [None, "x"]]
    queue.put({"n": np.arange(6, dtype=np.float64).reshape(2, 3), "o": objects}, partition_id=partition)
    got = queue.get_data(queue.get_meta(["n", "o"], 2, partition, task_name="t"))
    assert got["n"].dtype == torch.float64 and got["o"].tolist() == objects
