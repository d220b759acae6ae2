"""The configuration: what is read, and which values are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from transfer_queue import config
from transfer_queue.config import Limits
from transfer_queue.errors import InvalidArgument


def read(conf: dict[str, Any]) -> config.Settings:
    return config.settings(config.merged(conf))


def test_defaults() -> None:
    """Journal on, in shared memory; no limits, no encryption, no checksums."""
    settings = read({})
    assert (settings.journal_enabled, settings.journal_path) == (True, None)
    assert settings.limits == Limits() and not settings.encrypt and not settings.checksums


def test_given_values_arrive() -> None:
    """Each key has its place in the settings."""
    settings = read(
        {
            "runtime": "processes",
            "journal": {"enabled": False, "path": "/tmp/j"},
            "limits": {"total_bytes": 100, "partition_samples": 7, "producer_bytes": 50, "max_deliveries": 3},
            "security": {"encrypt": True},
            "checksums": True,
        }
    )
    assert settings.runtime == "processes"
    assert (settings.journal_enabled, settings.journal_path) == (False, "/tmp/j")
    assert settings.limits == Limits(total_bytes=100, partition_samples=7, producer_bytes=50, max_deliveries=3)
    assert settings.encrypt and settings.checksums


@pytest.mark.parametrize(
    ("conf", "match"),
    [
        ({"journal": {"enabled": "yes"}}, "journal.enabled must be true or false, not 'yes'"),
        ({"journal": {"path": 3}}, "journal.path must be a path or null, not 3"),
        ({"journal": {"path": ""}}, "journal.path must be a path or null, not ''"),
        ({"limits": {"total_bytes": 0}}, "limits.total_bytes must be a positive int, not 0"),
        ({"limits": {"producer_samples": 1.5}}, "limits.producer_samples must be a positive int, not 1.5"),
        ({"limits": {"max_deliveries": True}}, "limits.max_deliveries must be a positive int, not True"),
        ({"limits": {"max_staleness": -1}}, "limits.max_staleness must be an int of at least 0, not -1"),
        ({"limits": {"max_staleness": False}}, "limits.max_staleness must be an int of at least 0, not False"),
        (
            {"limits": {"total_bytes": 5, "partition_bytes": 6}},
            "limits.partition_bytes is 6 and could never be reached",
        ),
        ({"security": {"encrypt": 1}}, "security.encrypt must be true or false, not 1"),
        ({"allow_pickle": "false"}, "allow_pickle must be true or false, not 'false'"),
        ({"checksums": "crc"}, "checksums must be true or false, not 'crc'"),
        ({"runtime": "process"}, "did you mean 'processes'"),
        ({"limits": 3}, "limits must be a section of keys, not 3"),
        ({"journal": None}, "journal must be a section of keys, not None"),
    ],
)
def test_bad_values_are_named(conf: dict[str, Any], match: str) -> None:
    """The error says which key, and what it may be."""
    with pytest.raises(ValueError, match=match):
        read(conf)


def test_a_section_is_a_section() -> None:
    """What is no mapping is refused where keys are expected."""
    with pytest.raises(InvalidArgument, match="security must be a section"):
        read({"security": "on"})
