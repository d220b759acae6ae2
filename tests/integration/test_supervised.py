"""Controller and units as child processes: killed, started again, ended."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import transfer_queue as tq
from tests.integration.starting import TIMEOUT_S, folders, line_of, program, wait_until
from transfer_queue.config import merged, settings
from transfer_queue.errors import ConnectionLost, InvalidArgument, TransferQueueError
from transfer_queue.journal.lock import FolderLock
from transfer_queue.messages import ListPartitions
from transfer_queue.runtime.endpoint import EndpointFile
from transfer_queue.runtime.processes import ProcessesRuntime
from transfer_queue.samplers import GRPOSampler, SequentialSampler, as_sampler
from transfer_queue.wire.channel import Peer
from transfer_queue.wire.folder import remove_abandoned
from transfer_queue.wire.holders import identify

SMALL = {"backend": {"SimpleStorage": {"capacity_bytes": 64 << 20, "arena_bytes": 1 << 20}}}


def start(**conf: Any) -> ProcessesRuntime:
    return ProcessesRuntime(settings(merged({"runtime": "processes", **SMALL, **conf})))


@pytest.fixture
def queue() -> Iterator[Any]:
    """A session with one unit, both servers child processes of the test."""
    yield tq.init({"runtime": "processes", **SMALL})
    tq.close()


def status(address: str) -> dict[str, Any]:
    return EndpointFile(address).status()


def kill(address: str, name: str, number: int = signal.SIGKILL) -> None:
    """Send a signal to a server and wait until its successor runs."""
    before = status(address)[name]
    os.kill(before["pid"], number)
    wait_until(lambda: status(address)[name]["state"] == "running" and status(address)[name]["pid"] != before["pid"])


def test_children_work_without_torch_and_ray(queue: Any) -> None:
    """Puts and draws pass through two processes that have loaded neither; the token is on no command line."""
    client = tq.get_client()
    client.put({"x": torch.arange(4)}, partition_id="p")
    assert client.get_data(client.get_meta(["x"], 4, "p", task_name="t"))["x"].tolist() == [0, 1, 2, 3]
    for process in status(queue.address).values():
        maps = Path(f"/proc/{process['pid']}/maps").read_text()
        assert "libtorch" not in maps and "_raylet" not in maps
        assert queue.controller.zmq_info.token.hex() not in Path(f"/proc/{process['pid']}/cmdline").read_text()


def test_a_controller_that_was_killed_comes_back_where_it_was(queue: Any) -> None:
    """Same socket, port, token and session: a client that was connected, by either way, needs to do nothing."""
    info = queue.controller.zmq_info
    with tq.TransferQueueClient("remote", info, transport="tcp") as remote:
        remote.get_partition_list()
        kill(queue.address, "controller")
        for client in (tq.get_client(), remote):
            client.put({"x": torch.arange(4)}, partition_id="p")
        assert tq.get_client().get_partition_list() == ["p"]
    assert status(queue.address)["controller"]["restarts"] == 1
    assert EndpointFile(queue.address).read() == info


def test_a_draw_that_waits_waits_on_after_a_restart(queue: Any) -> None:
    """The controller dies under a parked draw; the draw is served by its successor."""
    sizes: list[int] = []
    client = tq.get_client()
    waiting = threading.Thread(
        target=lambda: sizes.append(client.get_meta(["x"], 2, "p", task_name="t", timeout=TIMEOUT_S).size)
    )
    waiting.start()
    kill(queue.address, "controller")
    client.put({"x": torch.arange(2)}, partition_id="p")
    waiting.join(TIMEOUT_S)
    assert sizes == [2]


def test_sigterm_is_an_orderly_restart(queue: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A server asked to stop ends with code 0 and leaves what its successor needs."""
    for name in ("controller", "unit-0"):
        kill(queue.address, name, signal.SIGTERM)
    assert caplog.messages == [
        "controller ended with exit code 0 and is started again",
        "unit-0 ended with exit code 0 and is started again",
    ]
    tq.get_client().put({"x": torch.arange(2)}, partition_id="p")


def test_the_janitor_of_another_session_spares_a_server_that_is_restarted(queue: Any) -> None:
    """Folders of dead servers whose supervisor lives are kept."""
    before = folders()
    pid = status(queue.address)["controller"]["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: identify(pid) is None)
    remove_abandoned()
    assert folders() == before
    tq.get_client().get_partition_list()


def test_what_dies_again_and_again_is_not_started_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    """After five restarts within a minute: the log and the status say so, and `close` still leaves nothing."""
    others = folders()
    with caplog.at_level("ERROR"):
        runtime = start()
        before = folders() - others
        for _ in range(5):
            kill(runtime.address, "unit-0")
        os.kill(status(runtime.address)["unit-0"]["pid"], signal.SIGKILL)
        wait_until(lambda: status(runtime.address)["unit-0"]["state"].startswith("not started again"))
        state = status(runtime.address)["unit-0"]["state"]
        assert state == "not started again: it ended with signal 9 after 5 restarts within 60 s"
        runtime.close()
    assert caplog.messages == [f"unit-0 is {state}"]
    assert not before & folders()


class TestWhatKeepsAServerFromStarting:
    """Another process has its journal: the starts fail, and it comes back once that is over."""

    @pytest.fixture
    def runtime(self, tmp_path: Path) -> Iterator[ProcessesRuntime]:
        runtime = start(journal={"path": str(tmp_path)})
        yield runtime
        runtime.close()

    def occupy(self, runtime: ProcessesRuntime, folder: Path) -> FolderLock:
        """Kill the controller and take its journal before its successor does."""
        child = next(child for child in runtime.children if child.name == "controller")
        lock = next(path for path in folder.rglob("lock"))
        with child._lock:  # nothing starts meanwhile
            os.kill(child.pid, signal.SIGKILL)
            child._process.wait(TIMEOUT_S)
            return FolderLock(lock.parent)

    def test_it_is_tried_again_until_it_runs(self, runtime: ProcessesRuntime, tmp_path: Path) -> None:
        """More often than a server may die, without counting as deaths; the state tells the last error."""
        with tq.TransferQueueClient("c", runtime.info) as client:
            client.put({"x": torch.arange(2)}, partition_id="p")
            with contextlib.closing(self.occupy(runtime, tmp_path)):
                wait_until(lambda: "2 starts failed" in status(runtime.address)["controller"]["state"])
                assert "is in use by process" in status(runtime.address)["controller"]["state"]
            wait_until(lambda: status(runtime.address)["controller"]["state"] == "running")
            assert status(runtime.address)["controller"]["restarts"] == 1
            assert client.get_partition_list() == ["p"]

    def test_patience_ends(self, runtime: ProcessesRuntime, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """The error that ends it is the last one."""
        next(child for child in runtime.children if child.name == "controller").starts.patience_s = 0.2
        with caplog.at_level("ERROR"), contextlib.closing(self.occupy(runtime, tmp_path)):
            wait_until(lambda: status(runtime.address)["controller"]["state"].startswith("not started again"))
        state = status(runtime.address)["controller"]["state"]
        assert "starts failed within 0 s, the last one with: controller:" in state and "is in use by process" in state
        assert caplog.messages == [f"controller is {state}"]


def test_a_controller_without_journal_is_not_started_again() -> None:
    """Never into an empty ledger: its death ends the session, and calls say that nobody answers."""
    runtime = start(journal={"enabled": False})
    with contextlib.closing(
        Peer.at(runtime.info.local_address, token=runtime.info.token, client_id="c", grace_s=0.1)
    ) as client:
        client.begin(ListPartitions()).result(TIMEOUT_S)
        os.kill(status(runtime.address)["controller"]["pid"], signal.SIGKILL)
        wait_until(lambda: status(runtime.address)["controller"]["state"].startswith("not started again"))
        assert "kept no journal" in status(runtime.address)["controller"]["state"]
        with pytest.raises(ConnectionLost, match="is the server alive"):
            client.begin(ListPartitions()).result(0.1)
    runtime.close()


def test_children_end_with_their_supervisor() -> None:
    """The process that started the session is killed: its servers end by themselves, and take their folders along."""
    code = """
        import sys
        from transfer_queue.config import merged, settings
        from transfer_queue.runtime.processes import ProcessesRuntime
        print(ProcessesRuntime(settings(merged({"runtime": "processes"}))).address, flush=True)
        sys.stdin.read()
        """
    with program(code) as process:
        address = line_of(process)
        pids = [server["pid"] for server in status(address).values()]
        session = Path(address).parent
        process.kill()
        wait_until(lambda: all(identify(pid) is None for pid in pids))
    with pytest.raises(ConnectionLost, match=rf"is of process {process.pid}, which is dead|no endpoint file"):
        tq.init({"address": address})
    remove_abandoned()
    assert not session.exists()


def test_exit_without_close_ends_the_children(forked: Any) -> None:
    """A program that ends by itself leaves no process and no file."""
    code = """
        import json, torch
        import transfer_queue as tq
        from transfer_queue.runtime.endpoint import EndpointFile
        address = tq.init({"runtime": "processes"}).address
        tq.get_client().put({"x": torch.zeros(4)}, partition_id="p")
        print(json.dumps([address, [server["pid"] for server in EndpointFile(address).status().values()]]))
        """
    before = folders()
    with forked(code) as process:
        output, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors
    address, pids = json.loads(output)
    assert not Path(address).exists() and folders() == before
    assert [identify(pid) for pid in pids] == [None, None]


def test_of_several_that_start_one_starts_and_the_others_attach(tmp_path: Path, forked: Any) -> None:
    """Two processes with one address file, at once, then a third: one session, and its end is not theirs to decide."""
    code = """
        import sys
        import transfer_queue as tq
        from transfer_queue import session
        sys.stdin.readline()
        conf = tq.init({"runtime": "processes", "address": sys.argv[1]})
        tq.get_client().get_partition_list()
        print(conf.controller.zmq_info.session_id, session._session.owned is not None, flush=True)
        sys.stdin.readline()
        tq.close()
        """
    address = tmp_path / "queue.json"
    with forked(code, str(address)) as a, forked(code, str(address)) as b:
        for racer in (a, b):
            _send(racer)
        answers = {racer: line_of(racer).split() for racer in (a, b)}
        third = tq.init({"runtime": "processes", "address": str(address)})
        assert {session for session, _ in answers.values()} == {third.controller.zmq_info.session_id}
        assert sorted(owns for _, owns in answers.values()) == ["False", "True"]
        assert address.stat().st_mode & 0o777 == 0o600
        for racer in sorted(answers, key=lambda racer: answers[racer][1]):  # who started it ends last
            tq.get_client().get_partition_list()
            _send(racer)
            assert racer.wait(TIMEOUT_S) == 0
        tq.close()
    assert list(tmp_path.iterdir()) == []


def _send(process: Any) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.parametrize("stage", ["_start_controller", "_start_units", "status"])
def test_a_start_that_fails_leaves_nothing(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever stage raises, the processes and folders of the earlier ones are gone; the next start succeeds."""
    before = folders()
    with monkeypatch.context() as patch:
        patch.setattr(ProcessesRuntime, stage, _fail)
        with pytest.raises(TransferQueueError, match="this stage fails"):
            start()
    assert folders() == before
    runtime = start()
    runtime.close()
    assert folders() == before


def _fail(*arguments: Any) -> Any:
    raise TransferQueueError("this stage fails")


def test_a_server_that_cannot_start_says_why() -> None:
    """The error of the child is the error of the start."""
    before = folders()
    with pytest.raises(ConnectionLost, match=r"controller: cannot listen at .*no\.such\.host"):
        start(controller={"host": "no.such.host"})
    assert folders() == before


@pytest.mark.parametrize("given", [SequentialSampler, GRPOSampler(2), lambda: GRPOSampler(2)])
def test_samplers_are_imported(given: Any) -> None:
    """A class of a module is found by its name, and so is that of an instance, with what the instance holds."""
    runtime = start(controller={"sampler": given})
    with tq.TransferQueueClient("c", runtime.info) as client:
        assert client.audit()["samplers"][""] == repr(as_sampler(given))
    runtime.close()


def test_a_sampler_that_only_this_program_knows_is_refused() -> None:
    """The controller could not import its class."""

    class Local(SequentialSampler):
        pass

    with pytest.raises(InvalidArgument, match="imports its sampler"):
        start(controller={"sampler": Local})


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_rows_outlive_the_process_of_their_unit(queue: Any, number: signal.Signals) -> None:
    """What was put is read after a restart, byte for byte, by whoever was connected; views stay valid."""
    client = tq.get_client()
    values = torch.randn(64, 1024)
    client.put({"x": values, "name": [f"row {k}" for k in range(64)]}, partition_id="p")
    meta = client.get_meta(["x", "name"], 64, "p", task_name="t")
    view = client.get_data(meta, copy=False)["x"]
    kill(queue.address, "unit-0", number)
    found = client.get_data(meta)
    assert torch.equal(found["x"], values) and list(found["name"])[63] == "row 63"
    assert torch.equal(view, values)
    client.put({"x": values + 1}, partition_id="q")
    assert torch.equal(client.get_data(client.get_meta(["x"], 64, "q", task_name="t"))["x"], values + 1)
    assert torch.equal(view, values)


def test_a_forked_child_neither_ends_nor_keeps_the_servers(forked: Any) -> None:
    """A child that `close`s ends nothing of its parent's; one that outlives it does not hold the servers back."""
    code = """
        import os, signal, sys
        import transfer_queue as tq
        address = tq.init({"runtime": "processes"}).address
        if os.fork() == 0:
            tq.close()
            sys.exit(0)
        os.wait()
        tq.get_client().get_partition_list()
        child = os.fork()
        if child == 0:
            signal.pause()
        print(address, child, flush=True)
        sys.stdin.read()
        """
    with forked(code) as process:
        address, child = line_of(process).split()
        pids = [server["pid"] for server in status(address).values()]
        process.kill()
        process.wait()
        wait_until(lambda: all(identify(pid) is None for pid in pids))
        assert identify(int(child)) is not None
        os.kill(int(child), signal.SIGKILL)
    remove_abandoned()
    assert not Path(address).parent.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_samples_outlive_the_process_of_their_controller(queue: Any, number: signal.Signals) -> None:
    """After a restart: the same rows, what was consumed stays consumed, and old handles are good."""
    client = tq.get_client()
    meta = client.put({"x": torch.arange(8)}, partition_id="p", keys=[f"k{i}" for i in range(8)])
    assert client.get_data(client.get_meta(["x"], 3, "p", task_name="t"))["x"].tolist() == [0, 1, 2]
    kill(queue.address, "controller", number)
    assert client.get_data(client.get_meta(["x"], 5, "p", task_name="t"))["x"].tolist() == [3, 4, 5, 6, 7]
    assert client.get_data(meta)["x"].tolist() == list(range(8))
    assert client.get_data(client.kv_retrieve_meta(["k4"], "p"))["x"].tolist() == [4]
    account = client.audit("p")["partitions"]["p"]["tasks"]["t"]
    assert account["consumed"] == 8 and account["balanced"]


def test_controller_and_unit_may_die_together(queue: Any) -> None:
    """Both are killed at once, the whole session comes back."""
    client = tq.get_client()
    meta = client.put({"x": torch.arange(8)}, partition_id="p")
    before = {name: server["pid"] for name, server in status(queue.address).items()}
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)
    assert client.get_data(meta)["x"].tolist() == list(range(8))
    client.put({"x": torch.arange(8)}, partition_id="p")
    assert client.get_meta(["x"], 16, "p", task_name="t").size == 16
    wait_until(lambda: all(server["state"] == "running" for server in status(queue.address).values()))


def test_a_journal_on_disk(tmp_path: Path) -> None:
    """It is where it was asked for, serves one session at a time, and goes with the session's orderly end."""
    runtime = start(journal={"path": str(tmp_path)})
    with tq.TransferQueueClient("c", runtime.info) as client:
        client.put({"x": torch.arange(8)}, partition_id="p")
        kill(runtime.address, "controller")
        assert client.get_meta(["x"], 8, "p", task_name="t").size == 8
    assert [path.name for path in tmp_path.iterdir()] == ["controller"]
    with pytest.raises(TransferQueueError, match=str(tmp_path)):
        start(journal={"path": str(tmp_path)})
    with tq.TransferQueueClient("c", runtime.info) as client:
        assert client.get_partition_list() == ["p"]
    runtime.close()
    assert list(tmp_path.iterdir()) == []


def test_a_journal_on_disk_that_outlived_the_machine(tmp_path: Path) -> None:
    """A new session on it knows every sample and names those whose data is gone."""
    conf = {"path": str(tmp_path / "journal")}
    runtime = start(journal=conf)
    with tq.TransferQueueClient("c", runtime.info) as client:
        client.put({"x": torch.arange(3)}, partition_id="p")
        shutil.copytree(tmp_path / "journal", tmp_path / "copy")
    runtime.close()
    runtime = start(journal={"path": str(tmp_path / "copy")})
    with tq.TransferQueueClient("c", runtime.info) as client:
        audit = client.audit("p")["partitions"]["p"]
        assert audit["inserted"] == 3
        assert not client.check_production_status(["x"], "p")
    runtime.close()


def test_nobody_else_can_read_the_files(queue: Any) -> None:
    """Folders 0700; arenas, journals, sockets and records 0600."""
    tq.get_client().put({"x": torch.arange(4)}, partition_id="p")
    places = [queue.controller.zmq_info.folder, Path(queue.address).parent]
    places += [info.folder for info in queue.backend.SimpleStorage.zmq_info.values()]
    for place in places:
        modes = {path: path.lstat().st_mode & 0o777 for path in [Path(place), *Path(place).rglob("*")]}
        assert all(mode in (0o600, 0o700) for mode in modes.values()), modes
