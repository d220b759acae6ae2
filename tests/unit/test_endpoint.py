"""Endpoints: how a process learns to reach a server."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
from omegaconf import OmegaConf

from transfer_queue.errors import InvalidArgument, UnknownName
from transfer_queue.metadata import Role, ZMQServerInfo


def endpoint(**changes: Any) -> ZMQServerInfo:
    arguments: dict[str, Any] = {
        "role": Role.CONTROLLER,
        "id": "c-1",
        "ip": "10.0.0.1",
        "ports": {"requests": 4711},
        "token": b"secret-token",
        "local_address": "unix:///dev/shm/x",
        "folder": "/dev/shm/x",
        "nonce": "n",
        "session_id": "s",
        "curve_key": "k" * 40,
    }
    return ZMQServerInfo(**{**arguments, **changes})


def test_an_endpoint_tells_how_to_reach_a_server() -> None:
    """Role, id, ip and ports come back as plain values; addresses are found by the name of the socket."""
    info = endpoint()
    assert (info.role, info.id, info.ip, info.ports) == (
        "TransferQueueController",
        "c-1",
        "10.0.0.1",
        {"requests": 4711},
    )
    assert type(info.role) is str
    assert info.to_addr("requests") == "tcp://10.0.0.1:4711"
    assert endpoint(ip="fe80::1").to_addr("requests") == "tcp://[fe80::1]:4711"
    assert info.to_dict() == {"role": info.role, "id": "c-1", "ip": "10.0.0.1", "ports": {"requests": 4711}}
    with pytest.raises(UnknownName, match="did you mean 'requests'"):
        info.to_addr("request")


def test_an_endpoint_does_not_show_its_token() -> None:
    """Neither `repr` nor `to_dict` has the secret; the record for private files has it."""
    info = endpoint()
    shown = f"{info!r} {info} {info.to_dict()}"
    assert "secret" not in shown
    assert b"secret".hex() not in shown
    assert "tcp://10.0.0.1:4711" in repr(info)
    record = json.loads(json.dumps(info.to_record()))
    assert ZMQServerInfo.from_record(record) == info
    assert ZMQServerInfo.from_record(record).token == b"secret-token"


def test_an_endpoint_travels() -> None:
    """It survives pickling, copying and a place in a configuration, as an object of its own class."""
    info = endpoint()
    conf = OmegaConf.create({"controller": {"zmq_info": info}}, flags={"allow_objects": True})
    for back in (pickle.loads(pickle.dumps(info)), copy.deepcopy(info), conf.controller.zmq_info):
        assert isinstance(back, ZMQServerInfo)
        assert back == info
        assert back.token == b"secret-token"
    assert hash(endpoint()) == hash(info)
    assert endpoint(id="c-2") != info


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"role": 3}, TypeError),
        ({"ip": None}, TypeError),
        ({"ports": [4711]}, TypeError),
        ({"ports": {"requests": 0}}, ValueError),
        ({"ports": {"requests": "4711"}}, ValueError),
        ({"token": "text"}, TypeError),
    ],
)
def test_an_endpoint_refuses_what_it_cannot_be(changes: dict[str, Any], error: type[Exception]) -> None:
    """Wrong types and impossible ports are refused when the endpoint is made, and so are broken records."""
    with pytest.raises(error):
        endpoint(**changes)
    with pytest.raises(InvalidArgument, match="no record of a server"):
        ZMQServerInfo.from_record({"role": "x"})


def test_roles_are_strings() -> None:
    """The names of roles are usable as values of an enumeration and as text."""
    assert [role.value for role in Role] == ["TransferQueueController", "TransferQueueStorage", "TransferQueueClient"]
    assert f"{Role.STORAGE}" == str(Role.STORAGE) == Role.STORAGE == "TransferQueueStorage"
