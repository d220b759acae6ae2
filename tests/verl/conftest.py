"""A queue as verl starts it, and the stand-ins for what is not on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
from omegaconf import OmegaConf

import transfer_queue as tq


@pytest.fixture(scope="session")
def standins(ray_session: Any) -> Any:
    """The module, which Ray's workers get as a value: verl's wheel brings a package `tests` of its own."""
    from tests.verl import standins

    ray_session.cloudpickle.register_pickle_by_value(standins)
    return standins


@pytest.fixture
def forgetful() -> None:
    """Makes verl's modules in this process take the queue for one they have not seen, as in a new process."""
    from verl.utils import transferqueue_utils

    transferqueue_utils.TQ_INITIALIZED = False


@pytest.fixture
def queue(ray_session: Any, forgetful: None) -> Iterator[Any]:
    """A queue from the section that verl ships, with the layout that it expects."""
    section = OmegaConf.load(str(files("verl") / "trainer" / "config" / "transfer_queue" / "transfer_queue.yaml"))
    section.backend.SimpleStorage.num_data_storage_units = 2
    yield tq.init(OmegaConf.merge(section, {"enable": True, "layout": "jagged"}))
    tq.close()
