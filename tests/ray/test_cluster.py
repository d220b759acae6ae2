"""The local cluster that tests with Ray share."""

from __future__ import annotations

import os
from typing import Any


def test_actors_run_beside_the_test(ray_session: Any) -> None:
    """The shared cluster runs actors in processes of their own and lets the test talk to them."""

    @ray_session.remote(num_cpus=0)
    class Process:
        def pid(self) -> int:
            return os.getpid()

    actors = [Process.remote() for _ in range(2)]
    pids = set(ray_session.get([actor.pid.remote() for actor in actors], timeout=30))
    assert len(pids) == 2
    assert os.getpid() not in pids
