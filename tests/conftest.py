"""What all tests share. The environment is set before any library reads it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.forked import Template

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_DEDUP_LOGS"] = "0"
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # torch reads them; importing it here would slow every run
    os.environ[name] = "1"

pytest_plugins = ["tests.leaks"]

settings.register_profile(
    "tests", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("tests")


def pytest_itemcollected(item: pytest.Item) -> None:
    if "ray_session" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.ray)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with Ray come last: before them, the process has no sockets but those of the tests."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is not None)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Any]:
    """The module `ray` with a local cluster of 4 CPUs running; ends with the run. Its tests get the mark `ray`."""
    import ray

    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=256 << 20,
        log_to_driver=False,
        namespace="transfer_queue_tests",
    )
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def forked() -> Iterator[Any]:
    """Runs programs that use the client, see `Template.run`; their process has loaded torch already."""
    with contextlib.closing(Template()) as template:
        yield template.run
