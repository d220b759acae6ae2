"""The leak check itself, run on small test files of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

LEAKS = """
    import os, socket, threading

    def test_leaves_a_thread(request):
        stop = threading.Event()
        threading.Thread(target=stop.wait, name="tq-forgotten", daemon=True).start()
        request.config.stop = stop

    def test_leaves_a_socket(request):
        request.config.kept = socket.socket()

    def test_leaves_shared_memory(request):
        os.mkdir("/dev/shm/" + os.environ["LEAKED_NAME"])
    """
NO_LEAKS = """
    import asyncio, socket, threading
    from concurrent.futures import ThreadPoolExecutor
    import pytest

    @pytest.fixture(scope="session")
    def wide():
        with socket.socket() as one:
            stop = threading.Event()
            thread = threading.Thread(target=stop.wait, name="tq-wide")
            thread.start()
            yield one
            stop.set()
            thread.join()

    def test_uses_a_wider_fixture(wide):
        assert wide.fileno() > 0

    def test_closes_what_it_opens():
        with socket.socket(), ThreadPoolExecutor(1) as pool:
            assert pool.submit(int, 7).result() == 7

    async def test_runs_an_event_loop():
        assert await asyncio.to_thread(int, 7) == 7
    """
CONFTEST = """
    import pytest
    from tests import leaks
    leaks.GRACE_S = 0.2
    pytest_plugins = ["tests.leaks"]
    """


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    pytester.makeconftest(CONFTEST)
    pytester.makeini("[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function")
    return pytester


def test_a_leak_fails_the_test(run: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread, a socket or shared memory that outlives its test is an error of that test, which names it alone."""
    leaked = Path("/dev/shm") / f"tq-leaktest-{os.getpid()}"
    monkeypatch.setenv("LEAKED_NAME", leaked.name)
    run.makepyfile(LEAKS)
    result = run.runpytest_subprocess("-p", "no:randomly")
    leaked.rmdir()
    for test, named in (
        ("test_leaves_a_thread", "*tq-forgotten*"),
        ("test_leaves_a_socket", "*socket:*"),
        ("test_leaves_shared_memory", f"*{leaked}*"),
    ):
        result.stdout.fnmatch_lines([f"*at teardown of {test} *", "the test left behind:", named], consecutive=True)
    result.assert_outcomes(passed=3, errors=3)


def test_what_is_closed_is_no_leak(run: pytest.Pytester) -> None:
    """Things of fixtures with a wider scope, of executors and of event loops are not held against a test."""
    run.makepyfile(NO_LEAKS)
    result = run.runpytest_subprocess("-p", "no:randomly")
    result.assert_outcomes(passed=3)
    assert result.ret == 0


def test_a_wider_fixture_that_leaks_fails_the_run(run: pytest.Pytester) -> None:
    """What fixtures of a wider scope leave behind is found when all tests have ended."""
    run.makepyfile(
        """
        import threading, pytest

        @pytest.fixture(scope="session")
        def wide():
            threading.Thread(target=threading.Event().wait, name="tq-wide", daemon=True).start()

        def test_uses_it(wide):
            pass
        """
    )
    result = run.runpytest_subprocess("-p", "no:randomly")
    result.stdout.fnmatch_lines(["*the tests together left behind:*", "*tq-wide*"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED
