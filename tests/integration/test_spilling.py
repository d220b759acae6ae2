"""Sessions whose rows go to disk when shared memory is full (`ssd_offload`)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

import transfer_queue as tq
from tests.integration.starting import wait_until
from transfer_queue.errors import InvalidArgument
from transfer_queue.runtime.endpoint import EndpointFile

MIB = 1 << 20
KEYS = [f"k{number}" for number in range(12)]


def conf(runtime: str, path: Path) -> dict[str, Any]:
    storage = {
        "capacity_bytes": 8 * MIB,
        "arena_bytes": 4 * MIB,
        "ssd_offload": {"enabled": True, "path": str(path)},
    }
    return {"runtime": runtime, "backend": {"SimpleStorage": storage}}


def rows() -> TensorDict:
    """12 rows of 2 MiB, three times what the unit has in memory."""
    x = torch.arange(12).repeat_interleave(MIB // 4).view(12, -1) * 7
    return TensorDict({"x": x}, batch_size=[12])


def on_disk(path: Path) -> list[Path]:
    return sorted(path.glob("tq-*/spilled-*"))


@pytest.fixture(params=["embedded", "processes"])
def queue(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    yield tq.init(conf(request.param, tmp_path / "made" / "here"))
    tq.close()


def put_one_by_one() -> None:
    """Each row is a block, so that some lie in memory and some on disk."""
    for number, key in enumerate(KEYS):
        tq.kv_put(key, "p", fields=rows()[number], tag=None)


def test_three_times_the_memory(queue: Any, tmp_path: Path) -> None:
    """Copies and views of it, in any order; after a clear the space is used again; `close` leaves nothing."""
    folder = tmp_path / "made" / "here"
    files: list[list[Path]] = []
    for _ in range(2):
        put_one_by_one()
        files.append(on_disk(folder))
        back = tq.kv_batch_get(list(reversed(KEYS)), "p")
        assert torch.equal(back["x"], rows()["x"].flip(0))
        client = tq.get_client()
        meta = client.kv_retrieve_meta(KEYS, "p")
        assert torch.equal(client.get_data(meta, copy=False)["x"], rows()["x"])
        del back
        tq.kv_clear(KEYS, "p")
    assert files[0] == files[1] and sum(path.stat().st_size for path in files[0]) >= 16 * MIB
    [arenas] = {len(list(Path(unit.folder).glob("arena-*"))) for unit in queue.backend.SimpleStorage.zmq_info.values()}
    assert arenas == 2  # the memory is full as well
    tq.kv_batch_put(KEYS, "p", fields=rows())  # a block larger than all memory
    assert torch.equal(tq.kv_batch_get(KEYS, "p")["x"], rows()["x"])
    tq.close()
    assert list(folder.iterdir()) == []


def test_a_killed_unit_has_them_again(tmp_path: Path) -> None:
    queue = tq.init(conf("processes", tmp_path))
    try:
        put_one_by_one()
        status = EndpointFile(queue.address).status
        pid = status()["unit-0"]["pid"]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: status()["unit-0"]["state"] == "running" and status()["unit-0"]["pid"] != pid)
        assert torch.equal(tq.kv_batch_get(KEYS, "p")["x"], rows()["x"])
        assert on_disk(tmp_path)
        [folder] = tmp_path.iterdir()
        os.kill(status()["unit-0"]["pid"], signal.SIGKILL)  # dead, or not quite there, when the session is closed
    finally:
        tq.close()
    assert not folder.exists()


def test_what_a_killed_session_left_goes_with_the_next_start(tmp_path: Path) -> None:
    """Whether or not that one has a folder on disk."""
    text = f"""
        import os, signal
        from pathlib import Path
        import transfer_queue as tq
        from tests.integration.test_spilling import conf, put_one_by_one
        tq.init(conf("embedded", Path({str(tmp_path)!r})))
        put_one_by_one()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(text)], timeout=60, check=False)
    assert on_disk(tmp_path)
    tq.init({"runtime": "embedded"})
    tq.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("runtime", ["embedded", "processes"])
def test_a_folder_in_shared_memory_is_refused(runtime: str) -> None:
    path = Path("/dev/shm/no-disk")
    try:
        with pytest.raises(InvalidArgument, match=f"ssd_offload.path: {path} is in shared memory"):
            tq.init(conf(runtime, path))
        assert list(path.iterdir()) == []
    finally:
        path.rmdir()


@pytest.mark.parametrize("runtime", ["embedded", "processes"])
def test_a_path_that_can_be_no_folder(runtime: str, tmp_path: Path) -> None:
    """Says the key and the path; nothing is left of the start."""
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InvalidArgument, match=rf"ssd_offload.path.*{file}") as caught:
        tq.init(conf(runtime, file / "below"))
    assert "Not a directory" in str(caught.value) and not on_disk(tmp_path)
