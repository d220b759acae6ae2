"""`init`, attaching, forking and `close` as other frameworks call them, without Ray (checklist 3 to 9, 47)."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import transfer_queue as tq
from tests.dropin.processes import in_processes
from transfer_queue.errors import NotInitialized
from transfer_queue.samplers import BaseSampler

EMBEDDED = {"runtime": "embedded", "backend": {"SimpleStorage": {"capacity_bytes": 1 << 22, "arena_bytes": 1 << 20}}}


class LastFirst(BaseSampler):
    """Of the other dialect."""

    def __init__(self) -> None:
        super().__init__()

    def sample(self, ready_indexes: list[int], batch_size: int) -> tuple[list[int], list[int]]:
        chosen = ready_indexes[-batch_size:]
        return chosen, chosen


@pytest.fixture(autouse=True)
def _nothing_runs() -> Iterator[None]:
    tq.close()
    yield
    tq.close()


def with_sampler(sampler: Any) -> dict[str, Any]:
    return {**EMBEDDED, "controller": {"sampler": sampler}}


def test_03_unknown_keys_are_kept_and_the_callers_conf_is_left_alone() -> None:
    given = OmegaConf.create({**EMBEDDED, "enable": True, "controller": {"token": "x"}, "backend": {"own": {"a": 1}}})
    OmegaConf.set_struct(given, True)
    OmegaConf.set_readonly(given, True)
    before = copy.deepcopy(given)
    conf = tq.init(given)
    assert given == before
    assert conf.enable is True
    assert conf["controller"]["token"] == "x"
    assert conf.backend.own.a == 1
    assert conf.controller.zmq_info.to_addr("request").startswith("tcp://")
    storage = conf.backend[conf.backend.storage_backend]
    assert list(storage.zmq_info) == ["TransferQueueStorageUnit#0"]
    again = pickle.loads(pickle.dumps(conf))
    assert again.controller.zmq_info == conf.controller.zmq_info
    assert again.backend.SimpleStorage.zmq_info == storage.zmq_info


def last_first() -> LastFirst:
    return LastFirst()


@pytest.mark.parametrize("sampler", [LastFirst(), LastFirst, "SequentialSampler", last_first])
def test_04_a_sampler_as_instance_class_name_or_callable(sampler: Any) -> None:
    tq.init(with_sampler(sampler))
    client = tq.get_client()
    client.put({"x": torch.arange(4)}, partition_id="p")
    meta = client.get_meta(["x"], 2, "p", task_name="t")
    assert client.get_data(meta)["x"].tolist() == ([0, 1] if sampler == "SequentialSampler" else [2, 3])


def test_04_an_unknown_sampler_is_named() -> None:
    for natural in (ValueError, LookupError):
        with pytest.raises(natural, match="NoSuchSampler"):
            tq.init(with_sampler("NoSuchSampler"))
    with pytest.raises(NotInitialized):
        tq.get_client()


def test_05_init_from_16_threads_starts_one_instance() -> None:
    found = []
    threads = [threading.Thread(target=lambda: found.append(tq.init(EMBEDDED))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16
    assert all(conf is found[0] for conf in found)


def test_05_a_second_init_warns_of_what_is_not_in_force(caplog: pytest.LogCaptureFixture) -> None:
    tq.init({**EMBEDDED, "layout": "dense"})
    with caplog.at_level(logging.WARNING, "transfer_queue"):
        tq.init()
        tq.init({**EMBEDDED, "layout": "dense"})
        assert caplog.messages == []
        conf = tq.init({"layout": "jagged", "controller": {"polling_mode": True}})
    assert conf.layout == "dense"
    assert len(caplog.messages) == 1
    assert "layout is 'dense', not 'jagged'" in caplog.messages[0]
    assert "controller.polling_mode is False, not True" in caplog.messages[0]


def test_05_a_queue_that_is_started_warns_of_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQ_LAYOUT", "dense")
    with caplog.at_level(logging.WARNING, "transfer_queue"):
        assert tq.init({**EMBEDDED, "layout": "jagged"}).layout == "dense"
    assert caplog.messages == []


def test_06_attaching_returns_the_live_configuration() -> None:
    conf = tq.init({**EMBEDDED, "layout": "jagged", "mine": {"a": 1}, "controller": {"polling_mode": True}})
    tq.get_client().put({"x": torch.arange(4)}, partition_id="p")
    [there] = in_processes(_attach, [({"address": conf.address, "layout": "dense"},)])
    assert there == ("jagged", 1, True, conf.controller.zmq_info.session_id, ["p"])
    assert in_processes(_attach, [(conf,)]) == [there]


def test_06_attaching_to_nothing_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match=r"cannot attach: no endpoint file at .*/nothing\.json"):
        tq.init({"address": str(tmp_path / "nothing.json")})


def test_07_get_client_before_init() -> None:
    for natural in (AssertionError, RuntimeError):
        with pytest.raises(natural, match=r"not initialized.*init\(\)"):
            tq.get_client()
    for call in (lambda: tq.kv_list("p"), lambda: tq.kv_clear(["a"], "p"), lambda: tq.save_checkpoint("/nowhere")):
        with pytest.raises(NotInitialized, match="not initialized"):
            call()
    tq.init(EMBEDDED)
    assert tq.get_client() is tq.get_client()


def test_08_close_before_init_and_twice_and_start_again() -> None:
    tq.close()
    tq.init(EMBEDDED)
    tq.get_client().put({"x": torch.arange(4)}, partition_id="p")
    tq.close()
    tq.close()
    conf = tq.init({**EMBEDDED, "backend": {"SimpleStorage": {"total_storage_size": 2, "capacity_bytes": 1 << 22}}})
    assert conf.backend.SimpleStorage.total_storage_size == 2
    assert tq.get_client().get_partition_list() == []
    with pytest.raises(RuntimeError, match="capacity"):
        tq.get_client().put({"x": torch.arange(3)}, partition_id="p")


def test_08_an_attached_process_that_closes_stops_nobody() -> None:
    conf = tq.init(EMBEDDED)
    tq.get_client().put({"x": torch.arange(4)}, partition_id="p")
    for _ in range(2):
        in_processes(_attach, [({"address": conf.address},)])
    assert tq.get_client().get_partition_list() == ["p"]


def test_09_a_forked_child_attaches_again_and_the_parent_goes_on() -> None:
    tq.init(EMBEDDED)
    client = tq.get_client()
    client.put({"x": torch.arange(4)}, partition_id="p")
    tq.kv_put("a", "q", {"y": torch.ones(2)}, {"n": 1})
    for child in (_child_that_inits, _child_that_gets):
        pid = os.fork()
        if pid == 0:
            os._exit(child())
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert tq.get_client() is client
    assert client.get_meta(["x"], 4, "p", task_name="t").size == 4


def test_09_a_fork_while_another_thread_starts_a_queue_does_not_hang_the_child() -> None:
    from transfer_queue import session

    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with session._lock:
            held.set()
            over.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    try:
        pid = os.fork()
        if pid == 0:
            threading.Timer(10.0, os._exit, (3,)).start()
            code = 2
            try:
                tq.kv_list("p")
            except NotInitialized:
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        over.set()
        holder.join()


def test_47_assigning_none_to_the_client_detaches() -> None:
    from transfer_queue import interface

    assert interface._TQ_CLIENT is None
    tq.init(EMBEDDED)
    assert interface._TQ_CLIENT is tq.get_client()
    assert interface._TQ_CONTROLLER is None  # there is no actor
    with pytest.raises(AttributeError, match="None only"):
        interface._TQ_CLIENT = 3
    interface._TQ_CLIENT = None
    with pytest.raises(NotInitialized):
        tq.get_client()
    tq.init(EMBEDDED)
    assert tq.get_client().get_partition_list() == []


# ---------------------------------------------------------------- in other processes


def _attach(conf: Any) -> tuple[Any, ...]:
    live = tq.init(conf)
    own = live.get("mine", {}).get("a")
    session = live.controller.zmq_info.session_id
    found = live.layout, own, live.controller.polling_mode, session, tq.get_client().get_partition_list()
    tq.close()
    tq.close()
    return found


def _child_that_inits() -> int:
    try:
        tq.get_client()
    except AssertionError:
        tq.init()
        data = tq.kv_batch_get("a", "q")
        tq.close()
        return 0 if data["y"].tolist() == [[1.0, 1.0]] else 1
    return 2


def _child_that_gets() -> int:
    found = tq.kv_list("q")
    tq.close()
    return 0 if found == {"q": {"a": {"n": 1}}} else 1
