"""TQ_LOGGING_LEVEL of the process that starts a queue holds in its actors (checklist 48)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

import transfer_queue as tq
from transfer_queue.runtime.actors import SimpleStorageUnit, TransferQueueController


@pytest.fixture(autouse=True)
def _nothing_runs() -> Iterator[None]:
    own = logging.getLogger("transfer_queue")
    level = own.level
    tq.close()
    yield
    tq.close()
    own.setLevel(level)


def level_of(cluster: Any, actor: Any) -> Any:
    return cluster.get(actor.__ray_call__.remote(lambda _: logging.getLogger("transfer_queue").level), timeout=60)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The handles of the units that `init` starts."""
    units: list[Any] = []
    original = SimpleStorageUnit.options

    def noting(**options: Any) -> Any:
        made = original(**options)
        start = made.remote

        def remote(**given: Any) -> Any:
            units.append(start(**given))
            return units[-1]

        made.remote = remote
        return made

    monkeypatch.setattr(SimpleStorageUnit, "options", noting)
    return units


def test_48_the_level_of_the_starter_holds_in_its_actors(
    ray_session: Any, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQ_LOGGING_LEVEL", "error")
    tq.init({"runtime": "ray"})
    controller = ray_session.get_actor("TransferQueueController", namespace="transfer_queue")
    assert [level_of(ray_session, actor) for actor in (controller, *started)] == [logging.ERROR] * 2
    assert logging.getLogger("transfer_queue").level == logging.ERROR


def test_48_an_actor_made_by_hand_takes_a_level_too(ray_session: Any) -> None:
    controller = TransferQueueController.remote(logging_level=logging.DEBUG)
    assert level_of(ray_session, controller) == logging.DEBUG
    ray_session.get(controller.shutdown.remote(), timeout=60)
    ray_session.kill(controller)
