"""Prometheus metrics as a scraper sees them."""

from __future__ import annotations

import contextlib
import http.client
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from transfer_queue.metrics import FAMILIES

SMALL = {"SimpleStorage": {"capacity_bytes": 1 << 22, "arena_bytes": 1 << 20}}
METERED: dict[str, Any] = {"runtime": "embedded", "metrics": {"enabled": True}, "backend": SMALL}


class Scrape:
    """One answer of an endpoint."""

    def __init__(self, endpoint: str | None) -> None:
        assert endpoint is not None
        status, text = get(endpoint, "/metrics")
        assert status == 200
        families = text_string_to_metric_families(text)
        self.samples = [sample for family in families for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        """The one value of a name with these labels."""
        (found,) = [each.value for each in self.samples if each.name == name and labels.items() <= each.labels.items()]
        return float(found)

    def has(self, name: str, **labels: str) -> bool:
        return any(each.name == name and labels.items() <= each.labels.items() for each in self.samples)

    @property
    def families(self) -> set[str]:
        names = {each.name for each in self.samples}
        return {name for name in FAMILIES if {name, f"{name}_count"} & names}


def get(endpoint: str, path: str) -> tuple[int, str]:
    with contextlib.closing(http.client.HTTPConnection(endpoint, timeout=20)) as connection:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
