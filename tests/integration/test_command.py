"""The command line, as a person uses it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch

import transfer_queue as tq
from tests.integration.starting import TIMEOUT_S, folders, line_of, program
from transfer_queue.cli import main
from transfer_queue.runtime.endpoint import EndpointFile
from transfer_queue.wire.holders import identify


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_until_told_to_stop(number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Serves with what was asked for, answers the other commands, stops with code 0, leaves nothing."""
    address = str(tmp_path / "queue.json")
    before = folders()
    options = ["serve", "--address", address, "--units", "2", "--capacity", "16MiB"]
    with program("", *options, module="transfer_queue.cli") as server:
        assert address in line_of(server)
        tq.init({"address": address})
        tq.get_client().put({"x": torch.arange(4)}, partition_id="p")
        tq.close()
        assert main(["status", "--address", address]) == 0
        shown = capsys.readouterr().out
        assert "unit-1     process" in shown and "units      2 announced" in shown and "partitions p" in shown
        assert main(["audit", "--address", address, "--partition", "p"]) == 0
        assert json.loads(capsys.readouterr().out)["partitions"]["p"]["inserted"] == 4
        assert main(["explain", "--address", address, "--partition", "p", "--task", "t", "--fields", "x,y"]) == 0
        assert "field 'y' was not produced" in capsys.readouterr().out
        assert main(["serve", "--address", address]) == 1
        assert "is running already" in capsys.readouterr().err
        pids = [process["pid"] for process in EndpointFile(address).status().values()]
        server.send_signal(number)
        assert server.wait(TIMEOUT_S) == 0
    assert list(tmp_path.iterdir()) == [] and folders() == before
    assert [identify(pid) for pid in pids] == [None] * 3


def test_serve_reads_a_file_and_the_options_override_it(tmp_path: Path) -> None:
    """--config is laid over the defaults, options over both."""
    (tmp_path / "conf.yaml").write_text(
        "controller: {num_n_samples: 4}\nbackend: {SimpleStorage: {num_data_storage_units: 3, capacity_bytes: 8388608}}"
    )
    options = ["serve", "--config", str(tmp_path / "conf.yaml"), "--units", "1"]
    with program("", *options, module="transfer_queue.cli") as server:
        address = line_of(server).split("'")[3]
        assert list(EndpointFile(address).status()) == ["controller", "unit-0"]
        server.send_signal(signal.SIGTERM)
        assert server.wait(TIMEOUT_S) == 0


def test_status_of_an_embedded_session(capsys: pytest.CaptureFixture[str]) -> None:
    """There are no processes to show."""
    address = tq.init({"runtime": "embedded"}).address
    assert main(["status", "--address", address]) == 0
    assert "in the process that started the session" in capsys.readouterr().out
    tq.close()


def test_mistakes_are_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line to the error output and a code that is not 0."""
    assert main(["status", "--address", str(tmp_path / "none.json")]) == 1
    assert "no endpoint file at" in capsys.readouterr().err
    assert main(["audit"]) == 1
    assert "give --address FILE, or set TQ_ADDRESS" in capsys.readouterr().err
    assert main(["serve", "--units", "0"]) == 1
    assert "num_data_storage_units must be a positive int, not 0" in capsys.readouterr().err
    assert main(["serve", "--config", str(tmp_path / "none.yaml")]) == 1
    assert "cannot read --config" in capsys.readouterr().err
    for size in ("much", "inf", "nan"):
        with pytest.raises(SystemExit):
            main(["serve", "--capacity", size])
        assert f"'{size}' is not a size: write e.g. 8GiB" in capsys.readouterr().err
    assert main(["serve", "--address", str(tmp_path / "none" / "queue.json")]) == 1
    assert "cannot write the endpoint file" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"a: [", b"- a\n- b", b"\xff\xfe\x00", b"namespace: ${nothing}", b"a: 1\na: 2"])
def test_a_bad_configuration_file_is_one_line(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No YAML, no mapping, no text, no such reference, a key twice."""
    (tmp_path / "conf.yaml").write_bytes(content)
    address = str(tmp_path / "none" / "queue.json")  # nothing starts, should the file be taken
    assert main(["serve", "--config", str(tmp_path / "conf.yaml"), "--address", address]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "cannot read --config" in line


def test_help_shows_examples() -> None:
    """The help of the program is complete, and it is there without torch."""
    code = """
        import sys
        from transfer_queue.cli import main
        try:
            main(["--help"])
        finally:
            assert not {"torch", "ray"} & set(sys.modules)
        """
    with program(code) as process:
        output, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors
    for command in ("serve", "status", "audit", "explain", "examples:", "transfer_queue.init("):
        assert command in output


@pytest.mark.parametrize("metered", [True, False])
def test_serve_says_where_metrics_are(metered: bool, tmp_path: Path) -> None:
    """On a line of its own, as the address to scrape; without metrics there is no such line."""
    (tmp_path / "conf.yaml").write_text(f"metrics: {{enabled: {str(metered).lower()}}}")
    options = ["serve", "--config", str(tmp_path / "conf.yaml"), "--capacity", "16MiB"]
    with program("", *options, module="transfer_queue.cli") as server:
        assert line_of(server).startswith("serving")
        if metered:
            assert b"tq_partitions_total" in urlopen(line_of(server).removeprefix("metrics at "), timeout=30).read()
        server.send_signal(signal.SIGTERM)
        assert line_of(server) == "stopping"
        assert server.wait(TIMEOUT_S) == 0
