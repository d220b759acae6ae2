"""Starting, attaching and ending embedded sessions, also halfway and by force."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import transfer_queue as tq
from tests.integration.starting import TIMEOUT_S, folders, impatient, line_of, program
from transfer_queue.client.client import TransferQueueClient
from transfer_queue.errors import ConnectionLost, DeadlineExceeded, NotAuthorized, TransferQueueError
from transfer_queue.ledger import Ledger
from transfer_queue.runtime.controller_server import ControllerServer
from transfer_queue.runtime.endpoint import EndpointFile
from transfer_queue.runtime.inherited import Inherited
from transfer_queue.runtime.unit_server import UnitServer

SMALL = {"backend": {"SimpleStorage": {"capacity_bytes": 1 << 20, "arena_bytes": 1 << 16}}}
STAGES = {
    "controller": (ControllerServer, "_start"),
    "unit": (UnitServer, "_start"),
    "endpoint": (EndpointFile, "write"),
    "client": (TransferQueueClient, "storage_infos"),
}


def test_starting_and_stopping_many_times_leaves_nothing() -> None:
    """After 200 sessions the process has the descriptors, threads and files that it had after the first."""

    def cycle() -> None:
        tq.init({"runtime": "embedded", **SMALL})
        tq.close()

    for _ in range(3):
        cycle()
    before = _resources()
    for _ in range(200):
        cycle()
    assert _resources() == before


def _resources() -> tuple[int, int, set[str]]:
    return len(os.listdir("/proc/self/fd")), threading.active_count(), _own_folders()


def _own_folders() -> set[str]:
    """Those of this very process: other runs come and go meanwhile."""
    own = set()
    for folder in folders():
        with contextlib.suppress(FileNotFoundError):
            if json.loads((Path(folder) / "owner").read_text())["pid"] == os.getpid():
                own.add(folder)
    return own


@pytest.mark.parametrize("stage", STAGES)
def test_a_start_that_fails_is_rolled_back(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever stage raises: no folder, no session, and the next start succeeds."""
    before = folders()
    with monkeypatch.context() as patch:
        patch.setattr(*STAGES[stage], _fail)
        with pytest.raises(TransferQueueError, match="this stage fails"):
            tq.init({"runtime": "embedded", **SMALL})
    assert folders() == before
    tq.init({"runtime": "embedded", **SMALL})
    tq.close()
    assert folders() == before


def _fail(*arguments: Any, **options: Any) -> Any:
    raise TransferQueueError("this stage fails")


@pytest.mark.parametrize(
    ("runtime", "stage"), [("embedded", "unit"), ("embedded", "client"), ("processes", "endpoint")]
)
def test_a_starter_killed_halfway_is_in_nobodys_way(runtime: str, stage: str, tmp_path: Path, forked: Any) -> None:
    """SIGKILL at each stage of a start: the next start succeeds by its deadline, and nothing is left after it."""
    code = """
        import os, sys
        import transfer_queue as tq
        from tests.integration.test_lifecycle import STAGES
        owner, name = STAGES[sys.argv[2]]
        setattr(owner, name, lambda *arguments: os.kill(os.getpid(), 9))
        conf = {"runtime": sys.argv[1]}
        if sys.argv[1] == "processes":
            conf["address"] = sys.argv[3]
        tq.init(conf)
        """
    before = folders()
    address = tmp_path / "queue.json"
    with forked(code, runtime, stage, str(address)) as process:
        assert process.wait(TIMEOUT_S) == -9, process.stderr.read()
    conf = {"runtime": runtime, "attach_timeout_s": 20, **SMALL}
    if runtime == "processes":
        conf["address"] = str(address)
    tq.init(conf)
    tq.close()
    assert folders() <= before or _gone_soon(before)


def _gone_soon(before: set[str]) -> bool:
    """Servers that lost their supervisor need a moment to end."""
    deadline = time.monotonic() + 10
    while not folders() <= before and time.monotonic() < deadline:
        time.sleep(0.01)
    return folders() <= before


def test_the_death_of_the_process_ends_its_embedded_session(forked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL of the owner: attached clients with waiting draws get `ConnectionLost` by their deadlines; the next
    start removes what was left."""
    code = """
        import sys, torch
        import transfer_queue as tq
        conf = tq.init({"runtime": "embedded"})
        tq.get_client().put({"x": torch.arange(4)}, partition_id="p")
        print(conf.address, flush=True)
        sys.stdin.read()
        """
    ended: list[str] = []
    with forked(code) as process:
        address = line_of(process)
        info = EndpointFile(address).read()
        with impatient(monkeypatch):
            clients = [TransferQueueClient("c", info, transport=transport) for transport in ("auto", "tcp")]
        view = clients[0].get_data(clients[0].get_meta(["x"], 4, "p", task_name="t"), copy=False)["x"]

        def draw(client: TransferQueueClient) -> None:
            try:
                client.get_meta(["x"], 1, "p", task_name="t", timeout=0.5)
            except ConnectionLost as error:
                ended.append(str(error))

        threads = [threading.Thread(target=draw, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        process.kill()
        for thread in threads:
            thread.join(TIMEOUT_S)
    assert len(ended) == 2 and all("is the server alive" in text for text in ended)
    assert view.tolist() == [0, 1, 2, 3]
    for client in clients:
        client.close()
    del view
    tq.init({"runtime": "embedded", **SMALL})
    tq.close()
    assert not Path(info.folder).exists()


def test_attaching_to_what_does_not_answer_ends_by_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says what was looked for, what was found, and how long it was waited for."""
    session = tq.init({"runtime": "embedded", **SMALL})
    record = session.controller.zmq_info.to_record()
    tq.close()
    file = EndpointFile(tmp_path / "queue.json")
    file.write(type(session.controller.zmq_info).from_record(record))
    began = time.monotonic()
    waited = pytest.raises(DeadlineExceeded, match=r"attach: found the session of .* and waited 0.2 s for it to answer")
    with impatient(monkeypatch), waited:
        tq.init({"address": str(file.path), "attach_timeout_s": 0.2})
    assert time.monotonic() - began < 10


def test_attaching_while_another_process_starts_is_bounded(tmp_path: Path) -> None:
    """The one that starts holds the lock; who waits for it says so when its time is over."""
    file = EndpointFile(tmp_path / "queue.json")
    with file.starting(1.0), pytest.raises(DeadlineExceeded, match="another process has been starting the session"):
        tq.init({"runtime": "processes", "address": str(file.path), "attach_timeout_s": 0.1})


def test_a_damaged_endpoint_file_is_named(tmp_path: Path) -> None:
    """Half a file, or one of something else."""
    for text in ("", "{", "[]", '{"controller": 3}'):
        (tmp_path / "queue.json").write_text(text)
        (tmp_path / "queue.json").chmod(0o600)
        with pytest.raises(ConnectionLost, match=r"no endpoint file at .*queue\.json"):
            tq.init({"address": str(tmp_path / "queue.json")})


def test_an_endpoint_file_that_others_may_have_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Open to others, a link, a pipe, another user's: the error says what to do. `~` is the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    file = EndpointFile("~/queue.json")
    assert file.path == tmp_path / "queue.json"
    with ControllerServer(Ledger(), host="127.0.0.1") as server:
        file.write(server.info)
    assert file.read() == server.info
    file.path.chmod(0o644)
    with pytest.raises(NotAuthorized, match=r"mode 0644.*chmod 600"):
        tq.init({"address": "~/queue.json"})
    file.path.chmod(0o600)
    (tmp_path / "link.json").symlink_to(file.path)
    os.mkfifo(tmp_path / "pipe.json", 0o600)
    for name, reason in (("link.json", "is a symbolic link"), ("pipe.json", "is no file")):
        with pytest.raises(NotAuthorized, match=reason):
            EndpointFile(tmp_path / name).read()
    user = os.getuid()
    real = os.fstat

    def of_another(descriptor: int) -> os.stat_result:
        status = real(descriptor)
        return os.stat_result((*status[:4], user + 1, *status[5:])) if stat.S_ISREG(status.st_mode) else status

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", of_another)
        with pytest.raises(NotAuthorized, match=f"belongs to user {user + 1}: attach as that user"):
            file.read()
        file.remove(server.info)
    assert file.path.exists(), "what is not trusted is left alone"


def test_the_folder_of_the_journal_is_private(tmp_path: Path) -> None:
    """`journal.path` is made 0700 where it is not there; one that cannot be made is an error of the journal."""
    path = tmp_path / "journal"
    ControllerServer(Ledger(), host="127.0.0.1", journal=True, journal_path=str(path)).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    (tmp_path / "file").write_text("")
    with pytest.raises(TransferQueueError, match="journal"):
        ControllerServer(Ledger(), host="127.0.0.1", journal=True, journal_path=str(tmp_path / "file"))


def test_what_a_server_takes_over_does_not_show_its_token() -> None:
    """In a traceback or a log."""
    shown = repr(Inherited(7, b"secret", "s", None))
    assert "secret" not in shown and "session s, port 7" in shown


def test_a_successor_that_does_not_find_the_folder_fails() -> None:
    """A controller that is started again on another machine must not start empty."""
    before = folders()
    with pytest.raises(ConnectionLost, match="does not have its journal"):
        ControllerServer(Ledger(), host="127.0.0.1", key="elsewhere", journal=True, successor=True)
    assert folders() == before


def test_other_protocol_versions_do_not_take_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """An upgrade between death and restart is an error that names both versions, and leaves the folder alone."""
    from transfer_queue.wire.folder import folder_path
    from transfer_queue.wire.holders import process_id

    key = f"v-{os.getpid()}"
    code = """
        import os, sys
        from transfer_queue.ledger import Ledger
        from transfer_queue.runtime.controller_server import ControllerServer
        from transfer_queue.wire.holders import identify
        supervisor = identify(int(sys.argv[1]))
        ControllerServer(Ledger(), host="127.0.0.1", key=sys.argv[2], supervisor=supervisor, journal=True)
        os.kill(os.getpid(), 9)
        """
    with program(code, str(os.getpid()), key) as process:
        assert process.wait(TIMEOUT_S) == -9
    monkeypatch.setattr("transfer_queue.runtime.inherited.PROTOCOL_VERSION", 999)
    folder = folder_path("controller", key)
    with pytest.raises(TransferQueueError, match=r"was left by protocol version \d+, this is 999"):
        ControllerServer(Ledger(), host="127.0.0.1", key=key, supervisor=process_id(), journal=True)
    assert (folder / "server.json").exists()
    monkeypatch.undo()
    ControllerServer(Ledger(), host="127.0.0.1", key=key, journal=True).close()
    assert not folder.exists()
