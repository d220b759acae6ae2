"""Peers: chosen by name, run by a Python of their own, asked line by line, reported when they cannot be had."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import floors
from benchmarks.__main__ import INTERRUPTED, main
from benchmarks.figures import Report
from benchmarks.peers import child, environments, table
from benchmarks.peers.child import Child
from benchmarks.peers.environments import Unavailable
from benchmarks.peers.table import PEERS, PeerKind, Variant, chosen

STANDING_IN = """
import os, sys, time
from benchmarks.peers.peer import Peer

class Words(Peer):
    def __init__(self, starts=True, clears=True, batch=False):
        self.starts, self.clears, self.batch = starts, clears, batch

    def open(self):
        print("libraries may print")
        if not self.starts:
            sys.exit("first line\\nno such device")
        return {"words": "1.0"}

    def prepare(self, workload, scale):
        from benchmarks import scale as scales
        scale = scales.Scale(**scale)
        if self.batch:  # needs torch
            from benchmarks import batches
            self.rows = batches.BATCHES[workload](scale).batch_size[0]

    def clear(self):
        if not self.clears:
            raise ValueError("first line\\nnothing to clear")

    def close(self): pass
    def put(self): return 0.5
    def read(self): return 0.1, 0.2
    def sleep(self): time.sleep(60)
    def end(self): os._exit(3)
"""

Start = Callable[..., Child]


@pytest.fixture(autouse=True)
def _no_floors(monkeypatch: pytest.MonkeyPatch) -> None:
    """No series of a peer is compared with a floor; that floors are measured is shown by `test_benchmarks`."""
    monkeypatch.setattr(floors, "measure", lambda report, scale: None)


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts the process of a stand-in for a peer."""
    (tmp_path / "words.py").write_text(STANDING_IN)
    environment = {"PYTHONPATH": str(tmp_path)}
    return lambda **options: Child(Path(sys.executable), ["words", "Words", json.dumps(options)], environment)


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pip finds nothing, and the cache of environments is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


# ---------------------------------------------------------------- the process


def test_answers(start: Start) -> None:
    """Each command gets the value of its method; an error comes as its last line, and the process goes on."""
    with start(clears=False) as words:
        assert words.call("open") == {"words": "1.0"}
        assert words.call("read") == [0.1, 0.2]
        with pytest.raises(Unavailable, match="clear: nothing to clear"):
            words.call("clear")
        assert words.call("put") == 0.5
        with pytest.raises(Unavailable, match="ended with status 3"):
            words.call("end")


def test_a_peer_that_does_not_start_tells_its_last_words(start: Start) -> None:
    with start(starts=False) as words, pytest.raises(Unavailable, match="ended with status 1: no such device"):
        words.call("open")


def test_a_peer_that_hangs_is_ended(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_END_S", 0.1)
    with start() as words:
        words.call("open")
        with pytest.raises(Unavailable, match="sleep: no answer"):
            words.call("sleep", timeout_s=0.05)
    assert not Path(f"/proc/{words.pid}").exists()


# ---------------------------------------------------------------- environments and names


@pytest.mark.usefixtures("no_index")
def test_an_environment_is_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The packages are there for its Python; once it is complete pip is not asked again."""
    info = "tiny-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny.py", "words = 'here'")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    python = environments.interpreter("tiny", ["tiny"])
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert environments.interpreter("tiny", ["tiny"]) == python
    done = subprocess.run([python, "-c", "import tiny; print(tiny.words)"], capture_output=True, text=True, check=True)
    assert done.stdout == "here\n"
    with pytest.raises(Unavailable, match="No matching distribution found for other"):
        environments.interpreter("tiny", ["other"])


def test_missing_libraries_are_named_with_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(environments.LIBRARIES, "libnone.so.9", "libnone9")
    with pytest.raises(Unavailable, match=r"libnone\.so\.9 \(Debian package libnone9\); apt-get install libnone9"):
        environments.check_libraries(["libnone.so.9"])


def test_names() -> None:
    """A version may follow the name of a package; a wrong name is answered with the known ones."""
    assert chosen("transferqueue==0.2").label(PEERS["transferqueue"].variants[0]) == "transferqueue 0.2"
    assert chosen("ray") is PEERS["ray"]
    with pytest.raises(ValueError, match="no peer 'rya'; known: ray, transferqueue, mooncake"):
        chosen("rya")
    with pytest.raises(ValueError, match="takes no"):
        chosen("ray==2.40")


# ---------------------------------------------------------------- in a run


class StandingIn(PeerKind):
    """A kind of peer whose process is the stand-in."""

    start: Start

    @contextlib.contextmanager
    def running(self, variant: Variant, report: Report) -> Iterator[Child]:
        with self.start(**dict(variant.arguments)) as words:
            report.peer(self.label(variant), versions=words.call("open"))
            yield words


def run(tmp_path: Path, peers: str, status: int = 0) -> dict[str, Any]:
    file = tmp_path / "out.json"
    arguments = ["kv", "--scale", "tiny", "--runtime", "embedded", "--workloads", "small", "--json", str(file)]
    assert main([*arguments, "--peers", peers]) == status
    return dict(json.loads(file.read_text()))


def test_ours_and_a_peer_in_turn(start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both sides have series of the same rounds, and their ratios are compared round by round."""
    kind = StandingIn("words", (Variant("words", "words", "Words", ("small",), (("batch", True),)),))
    monkeypatch.setattr(StandingIn, "start", staticmethod(start), raising=False)
    monkeypatch.setitem(table.PEERS, "words", kind)
    record = run(tmp_path, "words")
    rounds = {(one["case"], one["measure"]): one for one in record["measurements"]}
    assert rounds["small, words", "put"]["p50_ms"] == 500
    assert rounds["small, words", "put + draw + get + touch"]["n"] == rounds["small beside words", "put"]["n"] == 2
    compared = {(one["case"], one["measure"]): one for one in record["comparisons"]}
    ratio = 0.8 / (rounds["small beside words, copied", "put + draw + get + touch"]["p50_ms"] / 1e3)
    assert compared["small, copied", "put + draw + get + touch"]["median"] == pytest.approx(ratio, rel=0.2)
    assert record["peers"] == [{"benchmark": "kv", "peer": "words", "versions": {"words": "1.0"}, "reason": None}]


def test_a_peer_that_fails_is_reported(start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What it did until then is kept."""
    kind = StandingIn("words", (Variant("words", "words", "Words", ("small",), (("clears", False),)),))
    monkeypatch.setattr(StandingIn, "start", staticmethod(start), raising=False)
    monkeypatch.setitem(table.PEERS, "words", kind)
    record = run(tmp_path, "words")
    assert record["peers"][-1]["reason"] == "clear: nothing to clear"
    assert record["complete"]


def test_an_interrupt_beside_a_peer(start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The rounds that both sides have finished are written, and the peer's process ends."""
    monkeypatch.setattr(StandingIn, "start", staticmethod(start), raising=False)
    monkeypatch.setitem(table.PEERS, "words", StandingIn("words", (Variant("words", "words", "Words", ("small",)),)))
    reads: list[Child] = []
    call = Child.call

    def interrupted(self: Child, command: str, *arguments: Any, **options: Any) -> Any:
        if command == "read":
            reads.append(self)
            if len(reads) == 3:
                raise KeyboardInterrupt
        return call(self, command, *arguments, **options)

    monkeypatch.setattr(Child, "call", interrupted)
    record = run(tmp_path, "words", status=INTERRUPTED)
    assert not record["complete"]
    rounds = {(one["case"], one["measure"]): one["n"] for one in record["measurements"]}
    assert rounds["small, words", "get to a view"] == 1
    assert not Path(f"/proc/{reads[0].pid}").exists()


@pytest.mark.usefixtures("no_index")
def test_a_peer_that_cannot_be_installed_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = run(tmp_path, "transferqueue==0.0.1")
    (peer,) = record["peers"]
    assert peer["peer"] == "transferqueue 0.0.1"
    assert "No matching distribution found for TransferQueue==0.0.1" in peer["reason"]
    assert peer["reason"] in capsys.readouterr().out


@pytest.mark.slow
def test_the_object_store_of_ray(tmp_path: Path) -> None:
    """Both ways to use it, in clusters of their own."""
    record = run(tmp_path, "ray")
    assert [one["reason"] for one in record["peers"]] == [None]
    assert any(one["against"] == "ray" for one in record["comparisons"])
