"""For those who start the actors by hand, as frameworks did before there was `init`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group

from transfer_queue.errors import InvalidArgument
from transfer_queue.metadata import ZMQServerInfo


def get_placement_group(num_ray_actors: int, num_cpus_per_actor: int = 1) -> PlacementGroup:
    """Reserve a bundle per actor, spread over the nodes, and wait until it is there."""
    if num_ray_actors < 1:
        raise InvalidArgument(f"num_ray_actors must be at least 1, not {num_ray_actors}")
    bundles = [{"CPU": float(num_cpus_per_actor)} for _ in range(num_ray_actors)]
    group: PlacementGroup = placement_group(bundles, strategy="SPREAD")
    ray.get(group.ready())
    return group


def process_zmq_server_info(servers: Any) -> Any:
    """What a client needs to reach an actor: a `ZMQServerInfo`, or {name: ZMQServerInfo} for {name: actor}."""
    if not isinstance(servers, Mapping):
        info: ZMQServerInfo = ray.get(servers.get_zmq_server_info.remote())
        return info
    infos = ray.get([actor.get_zmq_server_info.remote() for actor in servers.values()])
    return dict(zip(servers, infos, strict=True))
