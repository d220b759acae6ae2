"""Prometheus metrics: the endpoint, and what it says after each kind of call (checklist 44)."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

import transfer_queue as tq
from tests.dropin.processes import in_processes
from tests.dropin.scraping import METERED, SMALL, Scrape, get
from tests.integration.starting import wait_until
from transfer_queue.controller import ControllerService
from transfer_queue.errors import ConnectionLost, InvalidArgument, NotInitialized
from transfer_queue.ledger import Ledger
from transfer_queue.messages import ListPartitions
from transfer_queue.metrics import Durations, Endpoint, Page
from transfer_queue.runtime.metering import Meter
from transfer_queue.wire.local import LocalPeer

REFERENCE = {
    "tq_controller_request_total": {"op_type"},
    "tq_controller_request_duration_seconds_count": {"op_type"},
    "tq_controller_request_duration_seconds_sum": {"op_type"},
    "tq_controller_request_duration_seconds_bucket": {"op_type", "le"},
    "tq_controller_uptime_seconds": set(),
    "tq_partitions_total": set(),
    "tq_partition_samples_total": {"partition_id"},
    "tq_partition_production_progress": {"partition_id", "task_name"},
    "tq_partition_consumption_progress": {"partition_id", "task_name"},
    "tq_storage_active_keys_total": {"storage_unit_id"},
    "tq_storage_memory_rss_bytes": {"storage_unit_id"},
}


@pytest.fixture(autouse=True)
def _nothing_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TQ_METRICS_COLLECT_INTERVAL", "0.001")
    tq.close()
    yield
    tq.close()


@pytest.fixture
def scrape() -> Callable[[], Scrape]:
    tq.init(METERED)
    return lambda: Scrape(tq.get_metrics_endpoint())


def scraped_elsewhere(conf: Any) -> tuple[str | None, float]:
    if isinstance(conf, str):
        os.environ["TQ_ADDRESS"] = conf
    else:
        tq.init(conf)
    endpoint = tq.get_metrics_endpoint()
    samples = Scrape(endpoint)("tq_partition_samples_total", partition_id="p")
    tq.close()
    return endpoint, samples


# ---------------------------------------------------------------- the endpoint


def test_44_the_endpoint_is_host_and_port_and_answers_scrapes() -> None:
    conf = tq.init(METERED)
    endpoint = tq.get_metrics_endpoint()
    assert endpoint is not None and re.fullmatch(r"127\.0\.0\.1:\d+", endpoint)
    assert conf.metrics.endpoint == endpoint
    scrape = Scrape(endpoint)
    labels = {each.name: set(each.labels) for each in scrape.samples}
    tq.get_client().put({"x": torch.zeros(2)}, partition_id="p")
    tq.get_client().get_meta(["x"], 1, "p", task_name="t")
    labels = {each.name: set(each.labels) for each in Scrape(endpoint).samples}
    assert {name: labels.get(name) for name in REFERENCE} == REFERENCE
    assert get(endpoint, "/")[0] == 404
    assert labels["process_resident_memory_bytes"] == set()


def test_44_there_is_none_when_metrics_are_off() -> None:
    with pytest.raises(NotInitialized):
        tq.get_metrics_endpoint()
    conf = tq.init({**METERED, "metrics": {"enabled": False}})
    assert tq.get_metrics_endpoint() is None
    assert conf.metrics.endpoint is None
    assert not any(thread.name.startswith("transfer_queue metrics") for thread in threading.enumerate())


def test_44_other_processes_learn_it_from_the_configuration_or_the_address() -> None:
    conf = tq.init(METERED)
    tq.get_client().put({"x": torch.zeros(3)}, partition_id="p")
    here = (tq.get_metrics_endpoint(), 3.0)
    assert in_processes(scraped_elsewhere, [(conf,), ({"address": conf.address},), (conf.address,)]) == [here] * 3


def test_44_a_port_may_be_given() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConnectionLost, match=rf"{port}.*choose another metrics\.port"):
            tq.init({**METERED, "metrics": {"enabled": True, "port": port}})
        with pytest.raises(NotInitialized):
            tq.get_client()
    tq.init({**METERED, "metrics": {"enabled": True, "port": port}})
    assert tq.get_metrics_endpoint() == f"127.0.0.1:{port}"


def test_44_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(InvalidArgument, match=r"pip install 'transfer-queue\[metrics\]'"):
        tq.init(METERED)
    tq.init({**METERED, "metrics": {"enabled": False}})


def test_44_nothing_of_it_is_imported_when_metrics_are_off() -> None:
    code = (
        "import sys\n"
        "from transfer_queue.ledger import Ledger\n"
        "from transfer_queue.runtime.controller_server import ControllerServer\n"
        "ControllerServer(Ledger(), host='127.0.0.1').close()\n"
        "assert not {'prometheus_client', 'http.server', 'transfer_queue.metrics'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("value", ["soon", "0", "-1"])
def test_48_a_malformed_interval_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TQ_METRICS_COLLECT_INTERVAL", value)
    with pytest.raises(ValueError, match="TQ_METRICS_COLLECT_INTERVAL"):
        tq.init(METERED)


def test_a_client_that_sends_nothing_holds_nobody_up(scrape: Callable[[], Scrape]) -> None:
    host, port = str(tq.get_metrics_endpoint()).split(":")
    with socket.create_connection((host, int(port))):
        assert scrape()("tq_partitions_total") == 0


def test_an_endpoint_that_is_closed_twice_is_closed() -> None:
    endpoint = Endpoint("127.0.0.1", [0], lambda: b"")
    assert get(f"127.0.0.1:{endpoint.port}", "/metrics") == (200, "")
    endpoint.close()
    endpoint.close()
    with pytest.raises(ConnectionRefusedError):
        get(f"127.0.0.1:{endpoint.port}", "/metrics")


def test_a_page_that_cannot_be_made_is_logged_and_the_next_one_served(caplog: pytest.LogCaptureFixture) -> None:
    pages: list[bytes] = []
    with contextlib.closing(Endpoint("127.0.0.1", [0], pages.pop)) as endpoint:
        with pytest.raises(http.client.RemoteDisconnected):
            get(f"127.0.0.1:{endpoint.port}", "/metrics")
        pages.append(b"next")
        assert get(f"127.0.0.1:{endpoint.port}", "/metrics") == (200, "next")
    assert caplog.messages == ["a scrape of the metrics failed"]


def test_labels_are_quoted() -> None:
    page, waits = Page(), Durations((0.5, 2.0))
    name = 'a "name"\\ of\ntwo lines'
    page.add("tq_partition_samples_total", 3, name)
    for seconds in (0.1, 1.0, 9.0):
        waits.add(seconds)
    page.add_histogram("tq_draw_wait_seconds", waits, name)
    samples = {
        (each.name, each.labels.get("le")): each
        for family in text_string_to_metric_families(page.text().decode())
        for each in family.samples
    }
    assert {next(iter(set(each.labels.values()) - {"0.5", "2.0", "+Inf"})) for each in samples.values()} == {name}
    assert {key: each.value for key, each in samples.items()} == {
        ("tq_partition_samples_total", None): 3,
        ("tq_draw_wait_seconds_bucket", "0.5"): 1,
        ("tq_draw_wait_seconds_bucket", "2.0"): 2,
        ("tq_draw_wait_seconds_bucket", "+Inf"): 3,
        ("tq_draw_wait_seconds_count", None): 3,
        ("tq_draw_wait_seconds_sum", None): pytest.approx(10.1),
    }


# ---------------------------------------------------------------- values


def test_44_samples_by_state_and_progress(scrape: Callable[[], Scrape]) -> None:
    client = tq.get_client()
    meta = client.put({"x": torch.arange(8)}, partition_id="p")
    client.put({"y": torch.arange(2)}, metadata=meta[:2])
    client.get_meta(["x"], 3, "p", task_name="a")
    client.get_meta(["x", "y"], 1, "p", task_name="b", lease=60)
    now = scrape()
    assert now("tq_partitions_total") == 1
    assert now("tq_partition_samples_total", partition_id="p") == 8
    for task, states in (("a", (5, 0, 3)), ("b", (7, 1, 0))):
        found = [now("tq_partition_task_samples", task_name=task, state=s) for s in ("pending", "reserved", "consumed")]
        assert tuple(found) == states
    assert now("tq_partition_production_progress", task_name="a") == 1
    assert now("tq_partition_production_progress", task_name="b") == 10 / 16
    assert now("tq_partition_consumption_progress", task_name="a") == 3 / 8
    assert now("tq_put_samples_total") == 10
    assert now("tq_drawn_samples_total", task_name="a") == 3
    assert now("tq_leases_open") == now("tq_leased_samples") == 1
    client.clear_samples(meta[2:])
    now = scrape()
    assert now("tq_partition_samples_total", partition_id="p") == 2
    assert now("tq_partition_production_progress", task_name="b") == 1
    client.clear_partition("p")
    now = scrape()
    assert now("tq_partitions_total") == 0
    assert not now.has("tq_partition_samples_total")
    assert now("tq_leases_open") == 0
    assert now("tq_leases_ended_total", outcome="cleared") == 1


def test_44_samples_that_are_to_come_count(scrape: Callable[[], Scrape], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQ_PRE_ALLOC_SAMPLE_NUM", "8")
    client = tq.get_client()
    client.put({"x": torch.arange(4)}, partition_id="p")
    client.get_meta(["x"], 2, "p", task_name="t")
    now = scrape()
    assert now("tq_partition_production_progress", task_name="t") == 4 / 8
    assert now("tq_partition_consumption_progress", task_name="t") == 2 / 8


def test_44_requests_are_counted_by_type_and_failures_as_such(scrape: Callable[[], Scrape]) -> None:
    client = tq.get_client()
    for _ in range(3):
        client.put({"x": torch.arange(2)}, partition_id="p")
    with pytest.raises(ValueError, match="float32"):
        client.put({"x": torch.zeros(2)}, partition_id="p")
    with pytest.raises(TimeoutError):
        client.get_meta(["x"], 99, "p", task_name="t", timeout=0.05)
    now = scrape()
    assert now("tq_controller_request_total", op_type="Put") == 4
    assert now("tq_controller_request_duration_seconds_count", op_type="Put") == 4
    assert now("tq_controller_request_failures_total", op_type="Put", error="InvalidArgument") == 1
    assert now("tq_controller_request_failures_total", op_type="Draw", error="GetMetaTimeout") == 1
    assert now("tq_controller_request_wait_seconds_count", op_type="Draw") == 1
    assert now("tq_controller_request_wait_seconds_sum", op_type="Draw") >= 0.04
    assert now("tq_controller_request_duration_seconds_sum", op_type="Draw") < 0.04
    assert now("tq_put_samples_total") == 6
    assert now("tq_put_bytes_total") >= 3 * 16


def test_44_a_bug_in_the_handler_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(ControllerService(Ledger())) as service:
        meter, page = Meter(service), Page()
        monkeypatch.setattr(service, "submit", lambda request, ticket: 1 // 0)
        with contextlib.closing(LocalPeer(meter, "tester")) as peer, pytest.raises(RuntimeError, match="ZeroDivision"):
            peer.begin(ListPartitions()).result(1.0)
        meter.show(page)
    assert b'request_failures_total{op_type="ListPartitions",error="ZeroDivisionError"} 1.0' in page.text()
    assert b'request_duration_seconds_count{op_type="ListPartitions"} 1.0' in page.text()


def test_44_draws_that_wait_are_shown_by_the_field_they_lack(scrape: Callable[[], Scrape]) -> None:
    client = tq.get_client()
    meta = client.put({"x": torch.arange(4)}, partition_id="p")

    def draw(task: str, size: int, *fields: str) -> threading.Thread:
        arguments = {"task_name": task, "timeout": 30.0}
        thread = threading.Thread(target=client.get_meta, args=(list(fields), size, "p"), kwargs=arguments)
        thread.start()
        return thread

    threads = [draw("a", 4, "x", "y"), draw("a", 4, "y"), draw("b", 5, "x")]
    wait_until(lambda: scrape()("tq_controller_waiting_requests") == 3)
    now = scrape()
    assert now("tq_waiting_draws", task_name="a", missing_field="y") == 2
    assert now("tq_waiting_draws", task_name="b", missing_field="") == 1
    assert not now.has("tq_waiting_draws", missing_field="x")
    assert 0 < now("tq_waiting_draws_oldest_seconds", task_name="a", missing_field="y") < 30
    client.put({"y": torch.arange(4)}, metadata=meta)
    client.put({"x": torch.arange(1), "y": torch.arange(1)}, partition_id="p")
    client.put({"x": torch.arange(3), "y": torch.arange(3)}, partition_id="p")
    for thread in threads:
        thread.join(30)
    now = scrape()
    assert not now.has("tq_waiting_draws")
    assert now("tq_draw_wait_seconds_count", task_name="a") == 2
    assert now("tq_draw_wait_seconds_count", task_name="b") == 1
    assert now("tq_drawn_samples_total", task_name="a") == 8


def test_44_leases_that_run_out_and_what_is_handed_out_again(scrape: Callable[[], Scrape]) -> None:
    client = tq.get_client()
    client.put({"x": torch.arange(4)}, partition_id="p")
    client.get_meta(["x"], 4, "p", task_name="t", lease=0.05)
    wait_until(lambda: scrape()("tq_leases_ended_total", outcome="expired") == 1)
    assert not scrape().has("tq_redelivered_samples_total")
    client.ack(client.get_meta(["x"], 3, "p", task_name="t", lease=30.0))
    now = scrape()
    assert now("tq_redelivered_samples_total", task_name="t") == 3
    assert now("tq_leases_ended_total", outcome="acknowledged") == 1
    assert now("tq_leases_open") == 0


def test_44_staleness() -> None:
    tq.init({**METERED, "limits": {"max_staleness": 2}})
    client = tq.get_client()
    client.put({"x": torch.arange(4)}, partition_id="p", policy_version=[0, 1, 1, 2])
    client.put({"x": torch.arange(4)}, partition_id="q")
    client.set_policy_version(2)
    now = Scrape(tq.get_metrics_endpoint())
    assert now("tq_policy_version") == 2
    assert now("tq_partition_staleness_versions", partition_id="p") == 2
    assert not now.has("tq_partition_staleness_versions", partition_id="q")
    client.set_policy_version(3)
    now = Scrape(tq.get_metrics_endpoint())
    assert now("tq_stale_samples_total") == 1
    assert now("tq_partition_samples_total", partition_id="p") == 3
    assert now("tq_partition_staleness_versions", partition_id="p") == 2


def test_44_storage_units() -> None:
    tq.init({**METERED, "backend": {"SimpleStorage": {**SMALL["SimpleStorage"], "num_data_storage_units": 2}}})
    client = tq.get_client()
    metas = [client.put({"x": torch.zeros(4, 1000), "y": torch.zeros(4)}, partition_id="p") for _ in range(2)]
    client.put({"tag_only": torch.zeros(4)}, metadata=metas[0])
    now = Scrape(tq.get_metrics_endpoint())
    units = ("unit-0", "unit-1")
    keys = [now("tq_storage_active_keys_total", storage_unit_id=unit) for unit in units]
    assert keys == [4, 4] or sorted(keys) == [4, 8]  # the third put is where there is least
    for unit in units:
        assert now("tq_storage_unit_up", storage_unit_id=unit) == 1
        assert now("tq_storage_bytes", storage_unit_id=unit, state="live") >= 4 * 4000
        assert now("tq_storage_capacity_bytes", storage_unit_id=unit) == 1 << 22
        assert now("tq_storage_memory_rss_bytes", storage_unit_id=unit) > 1 << 20
    client.clear_partition("p")
    wait_until(
        lambda: Scrape(tq.get_metrics_endpoint())("tq_storage_bytes", storage_unit_id="unit-0", state="live") == 0
    )
    assert Scrape(tq.get_metrics_endpoint())("tq_storage_active_keys_total", storage_unit_id="unit-0") == 0


def test_44_counts_agree_with_the_audit_while_the_queue_is_busy(scrape: Callable[[], Scrape]) -> None:
    """However a scrape falls between puts, draws and clears, no partition has a negative or impossible count."""
    client, stop = tq.get_client(), threading.Event()

    def work() -> None:
        for step in range(10_000):
            if stop.is_set():
                return
            meta = client.put({"x": torch.arange(16)}, partition_id=f"p{step % 3}")
            client.get_meta(["x"], 8, f"p{step % 3}", task_name="t")
            client.clear_samples(meta)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(20):
            now = scrape()
            counts = [each for each in now.samples if each.name == "tq_partition_task_samples"]
            assert all(0 <= each.value <= 32 for each in counts)
    finally:
        stop.set()
        worker.join(30)
    client.get_meta(["x"], 1, client.put({"x": torch.arange(5)}, partition_id="p0").partition_ids[0], task_name="t")
    now, audit = scrape(), client.audit()["partitions"]
    for name, partition in audit.items():
        assert now("tq_partition_samples_total", partition_id=name) == partition["live"]
        pending = partition["tasks"]["t"]["pending"]
        assert now("tq_partition_task_samples", partition_id=name, state="pending") == pending
