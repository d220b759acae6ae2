"""A session whose TCP is encrypted: data goes to and fro, and who lacks the keys is told so."""

from __future__ import annotations

import json

import pytest
import torch

from transfer_queue.client.client import TransferQueueClient
from transfer_queue.errors import NotAuthorized
from transfer_queue.ledger import Ledger
from transfer_queue.metadata import ZMQServerInfo
from transfer_queue.runtime.controller_server import ControllerServer
from transfer_queue.runtime.unit_server import UnitServer
from transfer_queue.wire import link


@pytest.mark.parametrize("transport", ["auto", "tcp"])
def test_data_crosses_an_encrypted_session(monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    """Over Unix sockets as ever, over TCP with the keys of controller and unit, which differ."""
    monkeypatch.setattr(link, "PROBE_AFTER_S", 0.3)
    with ControllerServer(Ledger(), host="127.0.0.1", encrypt=True) as controller:
        unit = UnitServer(
            controller.info,
            unit_id="u",
            host="127.0.0.1",
            capacity_bytes=64 << 20,
            arena_bytes=8 << 20,
            transport="tcp",
        )
        assert len({controller.info.curve_key, unit.info.curve_key, ""}) == 3
        info = ZMQServerInfo.from_record(json.loads(json.dumps(controller.info.to_record())))
        client = TransferQueueClient("c", info, transport=transport)
        tokens = torch.arange(12).reshape(3, 4)
        client.put({"tokens": tokens}, partition_id="p")
        meta = client.get_meta(["tokens"], 3, partition_id="p", task_name="t")
        assert torch.equal(client.get_data(meta)["tokens"], tokens)
        client.close()
        without = ZMQServerInfo.from_record({**info.to_record(), "curve_key": ""})
        if transport == "tcp":
            stranger = TransferQueueClient("s", without, transport=transport)
            with pytest.raises(NotAuthorized, match="curve_key"):
                stranger.audit()
            stranger.close()
        unit.close()
