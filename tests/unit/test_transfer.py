"""Storing and loading through units: mapped on the same host, in messages elsewhere; cleaned up however it ends."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from transfer_queue.client import columns
from transfer_queue.client.drivers import arun, run
from transfer_queue.client.steps import Call, Notify
from transfer_queue.client.storing import store
from transfer_queue.client.transfer import Transfer, load
from transfer_queue.errors import CapacityExceeded, ConnectionLost, EncodeError, StaleSampleError
from transfer_queue.messages import AbortBlocks, FreeBlocks, GetUnitStats, ListUnits, Location, UnitInfo, Units
from transfer_queue.storage.block import plan_block
from transfer_queue.storage.unit import UnitService
from transfer_queue.wire.folder import ServerFolder
from transfer_queue.wire.local import LocalPeer
from transfer_queue.wire.ticket import Ticket

MIB = 1 << 20
NONE = np.empty(0, np.int64)


class UnitList:
    """Answers which units there are."""

    def __init__(self) -> None:
        self.infos: list[UnitInfo] = []

    def submit(self, request: Any, ticket: Ticket) -> None:
        assert isinstance(request, ListUnits)
        ticket.answer(Units(units=tuple(self.infos)))

    def tick(self) -> float | None:
        return None

    def lost(self, ticket: Ticket, reply: Any) -> None:
        raise AssertionError("nothing is granted here")

    def gone(self, client_id: str) -> None: ...

    def holding(self) -> tuple[str, ...]:
        return ()


class Host:
    """Some units, and clients of them."""

    def __init__(self, units: int, transport: str, capacity_bytes: int = 64 * MIB) -> None:
        self.transport = transport
        self.list = UnitList()
        self.folders = [ServerFolder(f"unit-{number}") for number in range(units)]
        self.services = [UnitService(folder.path, capacity_bytes=capacity_bytes) for folder in self.folders]
        for number, (folder, service) in enumerate(zip(self.folders, self.services, strict=True), start=1):
            service.number = number
            self.list.infos.append(
                UnitInfo(
                    number=number,
                    unit_id=f"unit-{number}",
                    address=f"tcp://here:{number}",
                    local_address="",
                    folder=str(folder.path),
                    nonce=folder.nonce,
                )
            )
        self.transfer = self.client()

    def client(self) -> Transfer:
        return Transfer(LocalPeer(self.list, "client"), self.connect, transport=self.transport)

    def connect(self, info: UnitInfo, local: bool) -> LocalPeer:
        assert local == (self.transport == "auto")
        return LocalPeer(self.services[info.number - 1], "client")

    def put(self, data: Any) -> Location:
        """Store rows; return where they are."""
        count, encoded = columns.encode(data)
        _, block = run(store(self.transfer, plan_block(encoded, count), 5.0))
        return located(block, count, tuple(data))

    def get(self, *locations: Location, copy: bool = True) -> Any:
        names = [name for location in locations for name in location.fields]
        found = run(load(self.transfer, locations, names, 5.0, copy=copy))
        return columns.decode(found, len(locations[0].blocks))

    def stats(self, key: str) -> int:
        total = 0
        for service in self.services:
            peer = LocalPeer(service, "observer")
            total += peer.begin(GetUnitStats()).result(5.0).entries[key]  # type: ignore[union-attr]
        return total

    def tell(self, message: Any) -> None:
        for service in self.services:
            LocalPeer(service, "observer").notify(message)

    def free(self, *blocks: int, slots: list[int] | None = None) -> None:
        whole = np.array(blocks if slots is None else [], np.int64)
        part = NONE if slots is None else np.repeat(np.array(blocks, np.int64), len(slots))
        freed = np.array((slots or []) * len(blocks) if slots is not None else [], np.int64)
        self.tell(FreeBlocks(sequence=1, blocks=whole, partial_blocks=part, partial_slots=freed))

    def close(self) -> None:
        self.transfer.close()
        for service, folder in zip(self.services, self.folders, strict=True):
            service.close()
            folder.close()


def located(block: int, count: int, fields: tuple[str, ...]) -> Location:
    return Location(fields=fields, blocks=np.full(count, block, np.int64), slots=np.arange(count, dtype=np.int64))


def joined(*locations: Location, order: list[int] | None = None) -> Location:
    """Rows of several locations with the same fields, in any order."""
    blocks, slots = (np.concatenate([getattr(one, name) for one in locations]) for name in ("blocks", "slots"))
    chosen = np.arange(len(blocks)) if order is None else np.array(order, np.int64)
    return Location(fields=locations[0].fields, blocks=blocks[chosen], slots=slots[chosen])


@pytest.fixture(params=["auto", "tcp"])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    made = Host(1, request.param)
    yield made
    made.close()


@pytest.fixture
def here() -> Iterator[Host]:
    made = Host(1, "auto", capacity_bytes=16 * MIB)
    yield made
    made.close()


@pytest.mark.parametrize("width", [3, 5000, 600_000], ids=["small", "medium", "large"])
def test_rows_of_several_puts_are_loaded_in_any_order(host: Host, width: int) -> None:
    """Three puts of two fields, read with repetition, by copy over either path."""
    puts = [{"x": torch.rand(4, width), "t": [f"{number}-{row}" for row in range(4)]} for number in range(3)]
    places = [host.put(data) for data in puts]
    order = [11, 0, 5, 5, 3, 7]
    found = host.get(joined(*places, order=order))
    assert torch.equal(found["x"], torch.cat([data["x"] for data in puts])[order])
    assert found["t"].tolist() == [f"{row // 4}-{row % 4}" for row in order]
    assert host.stats("pins") == 0


def test_rows_of_many_puts_and_kinds_come_in_the_order_asked_for(host: Host) -> None:
    """Single rows put one by one, dense, ragged, of other rank and as objects, are read in several steps if need be."""
    made: list[Any] = [torch.full((1, number % 7), float(number)) for number in range(1200)]
    made += [torch.zeros(1, 2, 2), ["text"], torch.ones(1, 3), [{"a": 1}]]
    places = [host.put({"x": data}) for data in made]
    order = np.random.default_rng(1).permutation(len(made)).tolist()
    found = host.get(joined(*places, order=order))["x"].tolist()
    for value, position in zip(found, order, strict=True):
        wanted = made[position][0]
        assert torch.equal(value, wanted) if isinstance(wanted, torch.Tensor) else value == wanted
    ragged = host.get(joined(*places[:1200], order=order_below(order, 1200)))["x"]
    assert [float(row.sum()) for row in ragged.unbind(0)] == [float(n * (n % 7)) for n in order_below(order, 1200)]


def order_below(order: list[int], limit: int) -> list[int]:
    return [position for position in order if position < limit]


def test_fields_of_several_locations_come_together(host: Host) -> None:
    """Fields that were put later lie in other blocks; one load reads all."""
    first = host.put({"x": torch.arange(3), "unused": torch.zeros(3, 10_000)})
    second = host.put(
        {"y": torch.nested.nested_tensor([torch.ones(2), torch.ones(0), torch.ones(1)], layout=torch.jagged)}
    )
    first = Location(fields=("x",), blocks=first.blocks, slots=first.slots)
    found = host.get(first, second)
    assert found["x"].tolist() == [0, 1, 2] and [len(row) for row in found["y"].unbind(0)] == [2, 0, 1]


@pytest.mark.parametrize("transport", ["auto", "tcp"])
def test_rows_of_several_units_are_one_batch(transport: str) -> None:
    """Puts go to the unit that got least; rows of all units are loaded in the order of the request."""
    host = Host(3, transport)
    try:
        puts = [{"x": torch.full((2, 100), float(number))} for number in range(6)]
        places = [host.put(data) for data in puts]
        assert {int(place.blocks[0]) >> 48 for place in places} == {1, 2, 3}
        order = [11, 2, 0, 9, 6, 4, 4]
        found = host.get(joined(*places, order=order))
        assert found["x"][:, 0].tolist() == [float(row // 2) for row in order]
        host.free(int(places[1].blocks[0]))
        with pytest.raises(StaleSampleError, match="not stored any more"):
            host.get(joined(*places))
        assert host.stats("pins") == 0
    finally:
        host.close()


def test_small_puts_share_a_span_and_large_ones_have_their_own(here: Host) -> None:
    """Many small puts take one reservation; what a large one did not need is free as soon as it is written."""
    here.put({"x": torch.zeros(1, MIB)})  # waits until the unit has made its first arena
    places = [here.put({"x": torch.full((1, 10), float(number))}) for number in range(100)]
    assert len({int(place.blocks[0]) >> 16 for place in places}) == 1
    assert here.stats("spans") == 1 and here.stats("blocks") == 101
    for _ in range(300):
        here.put({"x": torch.zeros(2, 1000)})
    assert here.stats("spans") == 1
    here.transfer.close()
    assert here.stats("spans") == 0 and here.stats("bytes_reserved") == 0


def test_a_small_put_finds_room_where_a_shared_span_does_not(here: Host) -> None:
    """When the unit is almost full, a small put takes just what it needs; a full one makes it wait and raise."""
    filler = here.put({"x": torch.zeros(1, (15 * MIB + MIB // 2) // 4)})
    place = here.put({"x": torch.ones(1, 100)})
    assert here.get(place)["x"].sum() == 100
    with pytest.raises(CapacityExceeded, match="exceeds the capacity"):
        here.put({"x": torch.zeros(1, 16 * MIB)})
    here.free(int(filler.blocks[0]))
    assert here.stats("bytes_live") < 10_000


def test_a_put_that_fails_leaves_nothing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt in the middle of a copy, or of a message, gives the place back."""
    data = {"x": torch.zeros(10, 300_000)}
    count, encoded = columns.encode(data)
    operation = store(host.transfer, plan_block(encoded, count), 5.0)
    step: Any = next(operation)
    while isinstance(step, Call | Notify):  # up to the copy, or to the first messages that carry data
        step = operation.send(perform(step))
    if isinstance(step, list):
        perform(step[0])
    step = operation.throw(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        finish(operation, step)
    assert (host.stats("blocks"), host.stats("spans"), host.stats("bytes_live")) == (0, 0, 0)


def perform(step: Call | Notify) -> Any:
    if isinstance(step, Call):
        return step.peer.begin(step.request).result(step.timeout_s)
    return step.peer.notify(step.request)


def finish(operation: Any, step: Any) -> None:
    while True:
        step = operation.send(perform(step))


def test_aborted_blocks_are_gone(host: Host) -> None:
    """A block whose commit failed is freed by the peer that `store` returned."""
    count, encoded = columns.encode({"x": torch.zeros(10, 300_000)})
    peer, block = run(store(host.transfer, plan_block(encoded, count), 5.0))
    peer.notify(AbortBlocks(blocks=np.array([block], np.int64)))
    assert host.stats("blocks") == 0


def test_cleared_rows_are_never_read(host: Host) -> None:
    """Rows of a block that is partly cleared: the others are read, the cleared ones refused, no pin is left."""
    place = host.put({"x": torch.arange(8.0).reshape(8, 1).repeat(1, 2000)})
    host.free(int(place.blocks[0]), slots=[2, 3, 4])
    assert host.get(joined(place, order=[7, 1]))["x"][:, 0].tolist() == [7.0, 1.0]
    with pytest.raises(StaleSampleError, match="1 rows"):
        host.get(joined(place, order=[1, 3]))
    assert host.stats("pins") == 0


def test_views_are_private_and_pinned_until_they_are_gone(here: Host) -> None:
    """Without copy, rows that lie together are views: writable, unharmed by a clear, and their space waits for them."""
    data = {"x": torch.arange(400_000.0).reshape(4, -1), "s": torch.arange(4)}
    place = here.put(data)
    one, two = here.get(place, copy=False), here.get(place, copy=False)
    assert here.stats("pins") == 2
    one["x"][0, 0] = -1.0
    assert two["x"][0, 0] == 0.0 and here.get(place)["x"][0, 0] == 0.0
    here.free(int(place.blocks[0]))
    assert here.stats("bytes_pinned") > 400_000 * 4
    here.put({"x": torch.full((4, 100_000), 9.0)})
    assert torch.equal(two["x"], data["x"]) and two["s"].tolist() == [0, 1, 2, 3]
    row = two["x"][1]
    del one, two
    gc.collect()
    assert torch.equal(row, data["x"][1])
    del row
    gc.collect()
    here.transfer.close()
    assert here.stats("pins") == 0 and here.stats("bytes_pinned") == 0


def test_scattered_rows_are_copied_also_without_copy(here: Host) -> None:
    """What does not lie in one piece cannot be a view; it holds no pin."""
    place = here.put({"x": torch.arange(400_000.0).reshape(4, -1)})
    found = here.get(joined(place, order=[2, 0]), copy=False)
    assert found["x"][:, 0].tolist() == [200_000.0, 0.0]
    here.transfer.close()
    assert here.stats("pins") == 0


def test_results_outlive_client_and_unit() -> None:
    """Copies and views stay readable and writable after everything was closed."""
    host = Host(1, "auto")
    place = host.put({"x": torch.arange(400_000.0).reshape(4, -1)})
    copied, viewed = host.get(place), host.get(place, copy=False)
    host.close()
    viewed["x"] += 1
    assert torch.equal(viewed["x"], copied["x"] + 1)


def test_a_cancelled_put_stops_before_its_place_is_reused(here: Host) -> None:
    """In an event loop, cancelling a put gives its space back, and only after the copy has ended."""

    async def main() -> None:
        count, encoded = columns.encode({"x": torch.zeros(10, 300_000)})
        task = asyncio.ensure_future(arun(store(here.transfer, plan_block(encoded, count), 5.0)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert here.stats("blocks") == 0 and here.stats("bytes_reserved") <= MIB


def test_threads_share_a_client(here: Host) -> None:
    """Puts and gets of several threads at once keep their rows apart."""
    failures = []

    def work(number: int) -> None:
        for count in range(20):
            value = float(number * 100 + count)
            place = here.put({"x": torch.full((3, 50 + 40_000 * (count % 2)), value)})
            if not bool((here.get(place)["x"] == value).all()):
                failures.append(value)
            here.free(int(place.blocks[0]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and here.stats("bytes_live") == 0


def test_units_may_come_and_go(here: Host) -> None:
    """A client asks again for a unit it does not know, and says which one is missing."""
    place = here.put({"x": torch.ones(1)})
    stranger = here.client()
    found = run(load(stranger, [place], ["x"], 5.0))
    assert columns.decode(found, 1)["x"].tolist() == [1.0]
    missing = located(9 << 48 | 1 << 16, 1, ("x",))
    with pytest.raises(StaleSampleError, match=r"storage units \[9\]"):
        run(load(stranger, [missing], ["x"], 5.0))
    here.list.infos.clear()
    newcomer = here.client()
    count, encoded = columns.encode({"x": torch.ones(1)})
    with pytest.raises(ConnectionLost, match="knows no storage unit"):
        run(store(newcomer, plan_block(encoded, count), 0.0))
    for client in (stranger, newcomer):
        client.close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_does_not_carve_from_its_parents_span(here: Host) -> None:
    """After a fork the child knows no unit and no span; the parent goes on with its own."""
    here.put({"x": torch.ones(1)})
    child = os.fork()
    if child == 0:
        os._exit(0 if here.transfer.units.best() is None else 1)
    assert os.waitpid(child, 0)[1] == 0
    unit = here.transfer.units.best()
    assert unit is not None and here.get(here.put({"x": torch.ones(1)}))["x"].tolist() == [1.0]


def test_a_pin_of_a_vanished_block_names_it(here: Host) -> None:
    """A block that was never written cannot be pinned."""
    here.put({"x": torch.ones(1)})
    never = 1 << 48 | 1 << 16 | 73
    with pytest.raises(StaleSampleError, match=str(never)):
        run(load(here.transfer, [located(never, 1, ("x",))], ["x"], 5.0))
    assert "unit-1" in repr(here.transfer)


def test_what_cannot_be_encoded_reserves_nothing(here: Host) -> None:
    """An error in one field comes before any space is taken."""
    with pytest.raises(EncodeError):
        here.put({"x": torch.ones(1), "y": [object()]})
    assert here.stats("spans") == 0
