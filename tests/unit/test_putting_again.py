"""A put whose block is lost before it is committed: stored and put again, within the time of the call."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from transfer_queue.client import columns, writing
from transfer_queue.client.core import ClientCore
from transfer_queue.client.outcomes import OpenOutcomes
from transfer_queue.client.steps import Call, Notify, Operation, Wait
from transfer_queue.client.transfer import Transfer
from transfer_queue.errors import BlockLost
from transfer_queue.messages import (
    AbortBlocks,
    Admit,
    Admitted,
    ListUnits,
    Put,
    PutDone,
    Reserved,
    ReturnSpan,
    UnitInfo,
    Units,
    Withdraw,
)

SPAN = 1 << 48 | 7 << 16


class Peer:
    """A connection to a unit; what it is told once it is closed does not reach the unit that is there now."""

    def __init__(self) -> None:
        self.unput: set[int] = set()
        self.told: list[Any] = []
        self.closed = False

    def notify(self, request: Any) -> None:
        if not self.closed:
            self.told.append(request)

    def close(self) -> None:
        self.closed = True


class World:
    """Does the steps of a put; the first `losses` of its blocks are refused."""

    def __init__(self, losses: int, stay: bool = True) -> None:
        self.controller = SimpleNamespace()
        self.losses = losses
        self.stay = stay  # the unit keeps its number
        self.steps: list[Any] = []
        self.stored = 0
        self.peers: list[Peer] = []
        self.transfer = Transfer(cast(Any, self.controller), self.connect)
        self.transfer.units.update([self.info(1)])
        unit = self.transfer.units.best()
        assert unit is not None
        self.unit = unit
        span = Reserved(span=7, first_block=SPAN, arena="", offset=0, size_bytes=4096)
        unit.span.replace(span, np.zeros(4096, np.uint8))

    def connect(self, info: UnitInfo, local: bool) -> Any:
        self.peers.append(Peer())
        return self.peers[-1]

    def info(self, number: int) -> UnitInfo:
        return UnitInfo(number=number, unit_id="u", address="a", local_address="", folder="", nonce="")

    def store(self, transfer: Transfer, plan: Any, timeout_s: float) -> Operation[Any]:
        self.stored += 1
        self.steps.append("store")
        yield Notify(cast(Any, self.unit.peer), ReturnSpan(span=99))
        return self.unit.peer, SPAN + self.stored

    def do(self, step: Any) -> Any:
        request = step.request if isinstance(step, Call | Notify) else step
        self.steps.append(request)
        match request:
            case ListUnits():
                return Units(units=(self.info(1 if self.stay else 2),), admit_from_bytes=0)
            case Admit():
                return Admitted(admission=self.stored)
            case Put() if self.stored <= self.losses:
                raise BlockLost("lost", block=request.block_id)
            case Put():
                return PutDone(partition_id="p", indexes=np.arange(2), generations=np.zeros(2, np.int64))

    def put(self, timeout_s: float) -> Any:
        fake = SimpleNamespace(controller=self.controller, transfer=self.transfer, outcomes=OpenOutcomes())
        _, encoded = columns.encode({"x": torch.ones(2)})
        request = writing.new_rows("p", None, 2)
        operation = writing.put_rows(cast(ClientCore, fake), request, encoded, timeout_s, lambda put, done: done)
        error: BaseException | None = None
        value: Any = None
        while True:
            try:
                step = operation.send(value) if error is None else operation.throw(error)
            except StopIteration as stop:
                return stop.value
            value = error = None
            try:
                value = self.do(step)
            except BlockLost as raised:
                error = raised

    def count(self, kind: type) -> int:
        return sum(isinstance(step, kind) for step in self.steps)


def test_it_is_stored_until_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time with new room and a new block; the span that lost one is used no more, and goes back once."""
    world = World(losses=3)
    monkeypatch.setattr(writing, "store", world.store)
    assert isinstance(world.put(60.0), PutDone)
    assert world.stored == 4
    assert [put.block_id for put in world.steps if isinstance(put, Put)] == [SPAN + n for n in (1, 2, 3, 4)]
    assert (world.count(AbortBlocks), world.count(Withdraw), world.count(Admit)) == (3, 3, 4)
    assert [step.span for step in world.steps if isinstance(step, ReturnSpan) and step.span != 99] == [7]
    assert world.count(Wait) == 2  # the first time there is no reason to
    world.transfer.close()


def test_a_unit_with_another_number_is_not_given_a_span_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have lent one of the same number since."""
    world = World(losses=1, stay=False)
    monkeypatch.setattr(writing, "store", world.store)
    world.put(60.0)
    assert [step.span for step in world.steps if isinstance(step, ReturnSpan) and step.span != 99] == []
    assert [peer.told for peer in world.peers] == [[], []]
    found = world.transfer.units.best()
    assert found is not None and found.info.number == 2
    world.transfer.close()


def test_without_time_left_it_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """And then says what happened, with everything given back."""
    world = World(losses=9)
    monkeypatch.setattr(writing, "store", world.store)
    with pytest.raises(BlockLost):
        world.put(0.0)
    assert world.stored == 2 and (world.count(AbortBlocks), world.count(Withdraw)) == (2, 2)
    world.transfer.close()
