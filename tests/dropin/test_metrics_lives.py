"""Metrics where the controller dies, a unit is stuck or they are started late, and their dashboard (checklist 44)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

import transfer_queue as tq
from tests.dropin.scraping import METERED, SMALL, Scrape
from tests.integration.starting import wait_until
from transfer_queue.ledger import Ledger
from transfer_queue.messages import ListPartitions, Names
from transfer_queue.metrics import FAMILIES
from transfer_queue.runtime.controller_server import ControllerServer
from transfer_queue.runtime.endpoint import EndpointFile


@pytest.fixture(autouse=True)
def _nothing_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TQ_METRICS_COLLECT_INTERVAL", "0.001")
    tq.close()
    yield
    tq.close()


def test_44_a_killed_controller_serves_at_the_same_endpoint_again(tmp_path: Path) -> None:
    conf = tq.init({**METERED, "runtime": "processes", "journal": {"path": str(tmp_path)}})
    endpoint = tq.get_metrics_endpoint()
    client = tq.get_client()
    client.put({"x": torch.arange(4)}, partition_id="p")
    client.get_meta(["x"], 2, "p", task_name="t", lease=60)
    before = Scrape(endpoint)
    assert before("tq_journal_records_total") > 2
    assert before("tq_journal_size_bytes") > 1 << 20
    assert before("tq_journal_unwritten_records") == 0
    assert before("tq_storage_unit_up", storage_unit_id="unit-0") == 1
    processes = EndpointFile(conf.address).status()
    os.kill(processes["controller"]["pid"], signal.SIGKILL)
    client.put({"x": torch.arange(2)}, partition_id="p")
    after = Scrape(endpoint)
    assert tq.get_metrics_endpoint() == endpoint
    assert after("tq_partition_samples_total", partition_id="p") == 6
    assert after("tq_partition_task_samples", state="reserved", partition_id="p") == 2
    assert after("tq_put_samples_total") == 2  # counters begin anew with the process, as Prometheus expects
    assert after("tq_journal_records_total") > before("tq_journal_records_total")


def test_44_a_unit_that_is_stuck_does_not_hold_a_scrape_up() -> None:
    conf = tq.init({**METERED, "runtime": "processes"})
    endpoint = tq.get_metrics_endpoint()
    pid = EndpointFile(conf.address).status()["unit-0"]["pid"]
    assert Scrape(endpoint)("tq_storage_unit_up", storage_unit_id="unit-0") == 1
    os.kill(pid, signal.SIGSTOP)
    try:
        assert Scrape(endpoint)("tq_storage_unit_up", storage_unit_id="unit-0") == 1  # as it was last known
        wait_until(lambda: Scrape(endpoint)("tq_storage_unit_up", storage_unit_id="unit-0") == 0)
        assert not Scrape(endpoint).has("tq_storage_memory_rss_bytes")
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: Scrape(endpoint)("tq_storage_unit_up", storage_unit_id="unit-0") == 1)


def test_44_metrics_that_are_started_later_come_back_after_a_restart() -> None:
    with ControllerServer(Ledger(), host="127.0.0.1", key="metrics-test", journal=True) as first:
        assert first.info.metrics_endpoint is None
        endpoint = first.start_metrics()
        assert first.start_metrics() == endpoint == first.info.metrics_endpoint
        peer = first.connect("tester")
        assert isinstance(peer.begin(ListPartitions()).result(1.0), Names)
        peer.close()
        assert Scrape(endpoint)("tq_controller_request_total", op_type="ListPartitions") == 1
        first.leave()
        with ControllerServer(Ledger(), host="127.0.0.1", key="metrics-test", journal=True, successor=True) as second:
            assert second.info.metrics_endpoint == endpoint
            assert Scrape(endpoint)("tq_controller_uptime_seconds") < 10


def test_44_a_successor_whose_port_is_taken_serves_the_queue_without_metrics(caplog: pytest.LogCaptureFixture) -> None:
    with ControllerServer(Ledger(), host="127.0.0.1", key="taken-test", journal=True) as first:
        port = int(first.start_metrics().rpartition(":")[2])
        first.leave()
        with (
            socket.create_server(("127.0.0.1", port)),
            ControllerServer(Ledger(), host="127.0.0.1", key="taken-test", journal=True, successor=True) as second,
            contextlib.closing(second.connect("tester")) as peer,
        ):
            assert second.info.metrics_endpoint is None
            assert isinstance(peer.begin(ListPartitions()).result(1.0), Names)
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("metrics are not served any more")


def test_44_an_actor_starts_metrics_later(ray_session: Any) -> None:
    tq.init({"runtime": "ray", "backend": SMALL})
    assert tq.get_metrics_endpoint() is None
    controller = ray_session.get_actor("TransferQueueController", namespace="transfer_queue")
    endpoint = ray_session.get(controller.start_metrics.remote(port=0))
    assert tq.get_metrics_endpoint() == endpoint
    assert ray_session.get(controller.get_config.remote()).metrics.endpoint == endpoint
    info = ray_session.get(controller.get_zmq_server_info.remote())
    os.kill(json.loads((Path(info.folder) / "owner").read_text())["pid"], signal.SIGKILL)
    tq.get_client().put({"x": torch.arange(2)}, partition_id="p")
    assert Scrape(endpoint)("tq_partition_samples_total", partition_id="p") == 2


# ---------------------------------------------------------------- the dashboard


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(resources.files("transfer_queue").joinpath("grafana.json").read_text())
    return loaded


def test_44_the_dashboard_loads_without_edits() -> None:
    board = dashboard()
    assert board["uid"] and board["title"] and board["schemaVersion"] >= 36 and board["id"] is None
    assert "__inputs" not in board
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    sources = [
        each["datasource"] for panel in panels for each in (panel, *panel.get("targets", [])) if "datasource" in each
    ]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(board)))
    assert used <= {*variables, "__rate_interval", "__all"}
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in panels)
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24


def test_44_the_dashboard_is_part_of_the_package() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert re.search(r'^"transfer_queue" = \["grafana\.json"\]', project, re.MULTILINE)


def test_44_the_dashboard_shows_what_a_live_session_exports(tmp_path: Path) -> None:
    """Every metric and label in its queries is exported by a session in which everything happened."""
    conf = {"journal": {"path": str(tmp_path)}, "limits": {"max_staleness": 2}}
    tq.init({**METERED, **conf, "runtime": "processes"})
    client = tq.get_client()
    client.put({"x": torch.arange(8)}, partition_id="p", policy_version=0)
    client.get_meta(["x"], 4, "p", task_name="t", lease=0.01)
    client.get_meta(["x"], 8, "p", task_name="t", timeout=30, lease=30)
    with pytest.raises(TimeoutError):
        client.get_meta(["x"], 1, "p", task_name="t", timeout=0)
    waiting = threading.Thread(target=client.get_meta, args=(["y"], 1, "q"), kwargs={"task_name": "t", "timeout": 30.0})
    waiting.start()
    wait_until(lambda: Scrape(tq.get_metrics_endpoint()).has("tq_waiting_draws"))
    now = Scrape(tq.get_metrics_endpoint())
    client.put({"y": torch.arange(1)}, partition_id="q")
    waiting.join(30)
    assert now.families == set(FAMILIES)
    panels = [panel for panel in dashboard()["panels"] if panel["type"] != "row"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    exported = {each.name: set(each.labels) for each in now.samples}
    shown = {name for query in queries for name in re.findall(r"\b(?:tq|process)_\w+", query)}
    assert shown <= set(exported)
    assert {name.removesuffix("_bucket") for name in shown if name.startswith("tq")} == set(FAMILIES)
    for query in queries:
        (metric, *_), labels = re.findall(r"\b(?:tq|process)_\w+", query), re.findall(r"(\w+)(?:=~|!=)", query)
        assert set(labels) - {"instance"} <= exported[metric], query
        legend = re.findall(r"by \(([^)]+)\)", query)
        assert {name.strip() for group in legend for name in group.split(",")} <= exported[metric], query
