"""Production and consumption as a whole, and rows that are still to come (checklist 34, 43, 48)."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch

from transfer_queue import TransferQueueClient
from transfer_queue.config import merged, settings
from transfer_queue.runtime.embedded import EmbeddedRuntime


def put(client: TransferQueueClient, partition: str, count: int, *fields: str) -> object:
    return client.put({name: torch.arange(count) for name in fields or ("x",)}, partition_id=partition)


def status(client: TransferQueueClient, partition: str, field: str = "x") -> tuple[bool, bool]:
    """(produced, consumed)."""
    produced = client.check_production_status([field], partition)
    return produced, client.check_consumption_status("t", partition)


def test_34_without_rows_nothing_is_complete(client: TransferQueueClient, partition: str) -> None:
    assert status(client, partition) == (False, False)
    assert client.get_production_status(["x"], partition) == (None, None)
    assert client.get_consumption_status("t", partition) == (None, None)


def test_34_with_one_expected_row_complete_is_what_is_there(
    client: TransferQueueClient, partition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQ_PRE_ALLOC_SAMPLE_NUM", "1")
    put(client, partition, 4)
    assert status(client, partition) == (True, False)
    assert status(client, partition, "unknown")[0] is False
    client.get_meta(["x"], 4, partition, task_name="t")
    assert status(client, partition) == (True, True)
    put(client, partition, 2)
    assert status(client, partition) == (True, False)
    client.get_meta(["x"], 2, partition, task_name="t")
    assert client.reset_consumption(partition, "t") is True
    assert status(client, partition) == (True, False)


def test_34_with_a_global_batch_expected_it_is_unfinished_until_the_last_row(
    client: TransferQueueClient, partition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQ_PRE_ALLOC_SAMPLE_NUM", "8")
    put(client, partition, 6)
    monkeypatch.delenv("TQ_PRE_ALLOC_SAMPLE_NUM")  # it counts when the partition begins
    client.get_meta(["x"], 6, partition, task_name="t")
    assert status(client, partition) == (False, False)
    put(client, partition, 2)
    assert status(client, partition) == (True, False)
    meta = client.get_meta(["x"], 2, partition, task_name="t")
    assert status(client, partition) == (True, True)
    client.clear_samples(meta)  # what was cleared is not to come again
    assert status(client, partition) == (True, True)
    client.clear_partition(partition)
    put(client, partition, 1)
    assert status(client, partition) == (True, False)


def test_34_what_is_expected_is_in_a_checkpoint(
    client: TransferQueueClient, partition: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQ_PRE_ALLOC_SAMPLE_NUM", "3")
    put(client, partition, 2)
    monkeypatch.delenv("TQ_PRE_ALLOC_SAMPLE_NUM")
    client.save_checkpoint(tmp_path / "saved")
    with closing(EmbeddedRuntime(settings(merged({"runtime": "embedded"})))) as other:
        loaded = TransferQueueClient("other", other.info, connector=other)
        loaded.load_checkpoint(tmp_path / "saved")
        assert status(loaded, partition) == (False, False)
        put(loaded, partition, 1)
        assert status(loaded, partition) == (True, False)
        loaded.close()


def test_48_a_malformed_number_is_named_and_nothing_is_put(
    client: TransferQueueClient, partition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQ_PRE_ALLOC_SAMPLE_NUM", "many")
    with pytest.raises(ValueError, match=r"TQ_PRE_ALLOC_SAMPLE_NUM must be a whole number of at least 0: 'many'"):
        put(client, partition, 1)
    assert partition not in client.get_partition_list()
