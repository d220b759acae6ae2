"""A pytest plugin: a test that leaves a thread, a socket or shared memory behind fails.

What is there after a test, and was not there before it, is a leak, unless a fixture of wider scope made it; such
fixtures are checked together at the end of the run. Hooks are used instead of a fixture, so that the check sees the
state after all fixtures of the test, event loops included, have ended. A test that failed is not checked: its
traceback keeps things alive.
"""

from __future__ import annotations

import gc
import json
import os
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

GRACE_S = 5.0  # sockets are closed by ZeroMQ's own thread, folders by processes that are ending
MORE_DESCRIPTORS = 32  # per test, beside sockets: modules and process-wide contexts open some once

_PAUSE_S = 0.002
_LOOKS_PER_COLLECTION = 10
_SHARED_MEMORY = Path("/dev/shm")
_FAILED = pytest.StashKey[bool]()
_STATE = pytest.StashKey["State"]()


@dataclass
class Snapshot:
    """Descriptions of what the process holds, by identity."""

    threads: dict[Any, str] = field(default_factory=dict)
    sockets: dict[Any, str] = field(default_factory=dict)
    shared: dict[Any, str] = field(default_factory=dict)
    descriptors: int = 0

    @classmethod
    def take(cls) -> Snapshot:
        links = _descriptors()
        return cls(
            threads={thread: repr(thread) for thread in threading.enumerate() if _counts(thread)},
            sockets={link: f"descriptor {number} {link}" for number, link in links if link.startswith("socket:")},
            shared={path: str(path) for path in _SHARED_MEMORY.glob("tq-*") if _may_be_ours(path)},
            descriptors=len(links),
        )

    def since(self, before: Snapshot, *, sockets: bool = True) -> list[str]:
        """Say what is here and was not before."""
        kinds = [(self.threads, before.threads), (self.shared, before.shared)]
        if sockets:
            kinds.append((self.sockets, before.sockets))
        leaks = [text for now, then in kinds for thing, text in now.items() if thing not in then]
        if sockets and self.descriptors > before.descriptors + MORE_DESCRIPTORS:
            leaks.append(f"{self.descriptors - before.descriptors} more open descriptors than before")
        return leaks

    def add(self, other: Snapshot) -> None:
        self.threads |= other.threads
        self.sockets |= other.sockets
        self.shared |= other.shared
        self.descriptors = max(self.descriptors, other.descriptors)


@dataclass
class State:
    at_start: Snapshot
    before_test: Snapshot


def _descriptors() -> list[tuple[str, str]]:
    links = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append((name, os.readlink(f"/proc/self/fd/{name}")))
        except OSError:  # the one that listed the folder
            continue
    return links


def _counts(thread: threading.Thread) -> bool:
    return thread.is_alive() and (not thread.daemon or thread.name.startswith(("tq-", "transfer_queue")))


def _may_be_ours(path: Path) -> bool:
    """False only for folders whose owner lives and does not descend from this process (another run beside this one)."""
    try:
        owner = int(json.loads((path / "owner").read_text())["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return True
    while owner > 1:
        if owner == os.getpid():
            return True
        try:
            owner = int(Path(f"/proc/{owner}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return True
    return False


def _leaks_since(before: Snapshot, *, sockets: bool) -> list[str]:
    leaks = Snapshot.take().since(before, sockets=sockets)
    deadline = time.monotonic() + GRACE_S
    looks = 0
    while leaks and time.monotonic() < deadline:
        time.sleep(_PAUSE_S)
        looks += 1
        if looks % _LOOKS_PER_COLLECTION == 0:  # most things end by themselves in a moment
            gc.collect()
        leaks = Snapshot.take().since(before, sockets=sockets)
    return leaks


def _uses_ray(item: pytest.Item) -> bool:
    """Ray's driver opens and closes sockets of its own when it likes."""
    return item.get_closest_marker("ray") is not None


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What modules hold by now is garbage never: a collection that leaves it out takes no quarter of a second."""
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[_STATE] = State(Snapshot.take(), Snapshot.take())


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    item.config.stash[_STATE].before_test = Snapshot.take()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any], request: Any) -> Generator[None, Any, Any]:
    """What a fixture of wider scope makes is not the test's."""
    if fixturedef.scope == "function":
        return (yield)
    before = Snapshot.take()
    value = yield
    after = Snapshot.take()
    made = Snapshot(
        {thing: text for thing, text in after.threads.items() if thing not in before.threads},
        {thing: text for thing, text in after.sockets.items() if thing not in before.sockets},
        {thing: text for thing, text in after.shared.items() if thing not in before.shared},
        after.descriptors,
    )
    request.config.stash[_STATE].before_test.add(made)
    return value


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, Any, Any]:
    value = yield
    if not item.stash.get(_FAILED, False):
        leaks = _leaks_since(item.config.stash[_STATE].before_test, sockets=not _uses_ray(item))
        if leaks:
            pytest.fail("the test left behind:\n  " + "\n  ".join(leaks), pytrace=False)
    return value


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fixtures of wider scope have ended: nothing of theirs may be left either."""
    if session.testsfailed or session.config.option.collectonly:
        return
    leaks = _leaks_since(session.config.stash[_STATE].at_start, sockets=False)
    if leaks:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print("\nthe tests together left behind:\n  " + "\n  ".join(leaks))
