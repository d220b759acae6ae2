"""The operations that are interrupted at every step: how to make one, and what may have come of it.

Each works on four samples of a partition of its own, for the task `t`. A checkpoint and its loading may also raise,
and then nothing is to have changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tests.chaos.roles import sequences_of
from tests.chaos.samples import GROUP, damaged, fields_of
from transfer_queue import TransferQueueClient
from transfer_queue.client.checkpoint_files import open_checkpoint
from transfer_queue.errors import ConnectionLost, StaleSampleError

DONE, NOT_DONE = "done once", "not done"
COUNT = 4
SEED = 11

_TASK = "t"
_WAIT_S = 40.0
_LEASE_S = 8.0  # a client that leaves while the controller is dead is not seen to leave: its lease runs out
_SEQUENCES = list(range(40 - GROUP, 40 - GROUP + COUNT))  # one of them is long
_FIELDS = ["seq", "tokens", "body", "note"]


class Violated(Exception):
    """What was found must not be."""


class Place(NamedTuple):
    """Where an operation happens: a partition and a folder of its own."""

    partition: str
    folder: Path


@dataclass(frozen=True)
class Operation:
    """`prepare` and `act` belong to the client under test; `check` looks with another client.

    act       (client, place, what `prepare` returned)
    check     (client, place, acknowledged) returns DONE or NOT_DONE, and leaves everything settled; raises `Violated`
    may_fail  it may raise because a server died, and then was not done
    files     the client writes or renames files in it
    """

    prepare: Callable[[TransferQueueClient, Place], Any]
    act: Callable[[TransferQueueClient, Place, Any], Any]
    check: Callable[[TransferQueueClient, Place, bool], str]
    may_fail: bool = False
    files: bool = False


def completed(client: TransferQueueClient, function: Callable[[], Any]) -> Any:
    """Call, and ask for the outcome for as long as the connection breaks."""
    try:
        return function()
    except ConnectionLost as error:
        for _ in range(3):
            try:
                return client.resend(error)
            except ConnectionLost as again:
                error = again
        raise


def _nothing(client: TransferQueueClient, place: Place) -> None:
    return None


def _put(client: TransferQueueClient, place: Place, prepared: Any = None) -> Any:
    keys = [str(sequence) for sequence in _SEQUENCES]
    return client.put(fields_of(SEED, _SEQUENCES), partition_id=place.partition, keys=keys, timeout=_WAIT_S)


def _draw(client: TransferQueueClient, place: Place, prepared: Any = None) -> Any:
    return client.get_meta(_FIELDS, COUNT, place.partition, task_name=_TASK, lease=_LEASE_S, timeout=_WAIT_S)


def _put_and_draw(client: TransferQueueClient, place: Place) -> Any:
    _put(client, place)
    return _draw(client, place)


def _ack(client: TransferQueueClient, place: Place, drawn: Any) -> Any:
    return client.ack(drawn, timeout=_WAIT_S)


def _clear(client: TransferQueueClient, place: Place, put: Any) -> Any:
    return client.clear_samples(put)


def _put_and_save(client: TransferQueueClient, place: Place) -> None:
    _put(client, place)
    client.save_checkpoint(place.folder / "checkpoint", metadata={"number": 1}, timeout=_WAIT_S)


def _save(client: TransferQueueClient, place: Place, prepared: Any) -> None:
    client.save_checkpoint(place.folder / "checkpoint", metadata={"number": 2}, timeout=_WAIT_S)


def _put_save_and_clear(client: TransferQueueClient, place: Place) -> None:
    _put_and_save(client, place)
    client.clear_partition(place.partition)


def _load(client: TransferQueueClient, place: Place, prepared: Any) -> int:
    return client.load_checkpoint(place.folder / "checkpoint", timeout=_WAIT_S)


# ---------------------------------------------------------------- what came of it


def _check_put(client: TransferQueueClient, place: Place, acknowledged: bool) -> str:
    found = _rows(client, place)
    _is(len(found) in ((COUNT,) if acknowledged else (0, COUNT)), f"{len(found)} of {COUNT} rows are there")
    if not len(found):
        return NOT_DONE
    wrong = damaged(SEED, sequences_of(found), client.get_data(found, _FIELDS))
    _is(not wrong, f"other bytes than were put: {wrong}")
    _settle(client, place)
    return DONE


def _check_draw(client: TransferQueueClient, place: Place, acknowledged: bool) -> str:
    """Whoever drew the rows is gone: they can be had again, and that is counted if they had been handed out."""
    _settle(client, place)
    account = _account(client, place)
    again, expired = account["redelivered"], account["leases"].get("expired", 0)
    _is(again == expired and again in ((COUNT,) if acknowledged else (0, COUNT)), f"not handed out once: {account}")
    return DONE if again else NOT_DONE


def _check_ack(client: TransferQueueClient, place: Place, acknowledged: bool) -> str:
    consumed = _account(client, place)["consumed"]
    _is(consumed in ((COUNT,) if acknowledged else (0, COUNT)), f"{consumed} of {COUNT} rows are consumed")
    if not consumed:
        _settle(client, place)
    account = _account(client, place)
    _is(account["consumed"] == account["leases"]["acked"] == COUNT, f"not consumed once: {account}")
    return DONE if consumed else NOT_DONE


def _check_clear(client: TransferQueueClient, place: Place, acknowledged: bool) -> str:
    found = _rows(client, place)
    _is(len(found) in ((0,) if acknowledged else (0, COUNT)), f"{len(found)} of {COUNT} rows are there")
    if len(found):
        client.get_data(found, _FIELDS)
        client.clear_samples(found)
        try:
            client.get_data(found, _FIELDS)
        except StaleSampleError:
            return NOT_DONE
        raise Violated("cleared rows can still be read")
    return DONE


def _check_save(client: TransferQueueClient, place: Place, acknowledged: bool) -> str:
    """There is a whole checkpoint all the time, the old one or the new one; it can be loaded."""
    found = open_checkpoint(place.folder / "checkpoint")
    found.check()
    number = found.metadata["user_metadata"]["number"]
    _is(number == 2 or not acknowledged, "the old checkpoint is there, though the new one was saved")
    _settle(client, place)
    return DONE if number == 2 else NOT_DONE


def _check_load(client: TransferQueueClient, place: Place, acknowledged: bool) -> str:
    outcome = _check_put(client, place, acknowledged)
    if outcome == NOT_DONE:
        client.load_checkpoint(place.folder / "checkpoint")
        _is(_check_put(client, place, True) == DONE, "what was not loaded cannot be loaded later")
    return outcome


def _rows(client: TransferQueueClient, place: Place) -> Any:
    if place.partition not in client.get_partition_list():
        return ()
    return client.get_meta(["seq"], 1, place.partition, mode="force_fetch")


def _settle(client: TransferQueueClient, place: Place) -> None:
    """Draw, read and acknowledge what is there."""
    drawn = _draw(client, place)
    wrong = damaged(SEED, sequences_of(drawn), client.get_data(drawn))
    _is(not wrong, f"other bytes than were put: {wrong}")
    _is(client.ack(drawn) == COUNT, "the rows could not be acknowledged")


def _account(client: TransferQueueClient, place: Place) -> dict[str, Any]:
    found = client.audit(place.partition)["partitions"][place.partition]
    account: dict[str, Any] = found["tasks"][_TASK]
    _is(account["balanced"] and found["inserted"] == COUNT, f"the accounts are wrong: {found}")
    return account


def _is(holds: bool, what: str) -> None:
    if not holds:
        raise Violated(what)


OPERATIONS = {
    "put": Operation(_nothing, _put, _check_put),
    "draw": Operation(_put, _draw, _check_draw),
    "ack": Operation(_put_and_draw, _ack, _check_ack),
    "clear": Operation(_put, _clear, _check_clear),
    "save a checkpoint": Operation(_put_and_save, _save, _check_save, may_fail=True, files=True),
    "load a checkpoint": Operation(_put_save_and_clear, _load, _check_load, may_fail=True),
}
