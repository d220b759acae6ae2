"""Tensors that the workers of a loader hand over through memory that is used again."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from torch.utils.data import DataLoader

from transfer_queue.dataloader import handover
from transfer_queue.dataloader.handover import Handover

PREFETCHED = 2
SLOTS = PREFETCHED + 3  # of a worker


def handed_over(items: list[Any], workers: int = 1, start: str = "fork") -> Iterator[Any]:
    """These items, from workers that hand them over as they are."""
    with closing(Handover(workers, PREFETCHED)) as collate:
        loader = DataLoader(
            items,  # type: ignore[arg-type]  # a list serves as a dataset
            batch_size=None,
            num_workers=workers,
            collate_fn=collate,
            multiprocessing_context=start,
            prefetch_factor=PREFETCHED,
        )
        return iter(loader)


def numbered(count: int, size: int = 1000) -> list[dict[str, torch.Tensor]]:
    return [{"x": torch.full((size,), number)} for number in range(count)]


def test_slots_are_used_again() -> None:
    """Pieces that are given up make room: a long stream lies in few places."""
    places = set()
    for number, piece in enumerate(handed_over(numbered(50))):
        assert (piece["x"] == number).all()
        places.add(piece["x"].data_ptr())
        del piece
    assert len(places) <= SLOTS


@pytest.mark.parametrize("workers", [1, 2])
def test_pieces_that_are_kept_stay_what_they_are(workers: int) -> None:
    """Also when there are more of them than slots, when views alone are left, and when they are written to."""
    kept = []
    for piece in handed_over(numbered(30), workers):
        piece["x"] += 100
        kept.append(piece.pop("x")[10:20])
    assert [set(part.tolist()) for part in kept] == [{100 + number} for number in range(30)]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_every_kind_of_column(start: str) -> None:
    """What cannot lie in a slot arrives as well."""
    jagged = torch.nested.as_nested_tensor([torch.arange(n) for n in (3, 0, 2)], layout=torch.jagged)
    columns = {
        "half": torch.arange(6).view(3, 2).bfloat16(),
        "flags": torch.tensor([True, False, True]),
        "jagged": jagged,
        "transposed": torch.arange(6).view(2, 3).T,
        "empty": torch.empty(3, 0),
        "text": NonTensorStack("a", "b", "c"),
    }
    (data,) = handed_over([TensorDict(columns, batch_size=[3])], start=start)
    for name in ("half", "flags", "transposed", "empty"):
        assert data[name].dtype == columns[name].dtype
        assert torch.equal(data[name], columns[name])
    assert data["jagged"].layout == torch.jagged
    assert [row.tolist() for row in data["jagged"].unbind()] == [row.tolist() for row in jagged.unbind()]
    assert data["text"].tolist() == ["a", "b", "c"]


def test_tensors_without_room_are_handed_over_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "SLOT_BYTES", 4096)
    items = [{"large": torch.full((1000,), number), "small": torch.tensor(number)} for number in range(10)]
    for number, piece in enumerate(handed_over(items)):
        assert (piece["large"] == number).all()
        assert piece["small"] == number


def _give_up(pieces: list[Any]) -> None:
    pieces.clear()


def test_a_forked_child_frees_no_slots() -> None:
    """What a child of the loader's process gives up is still its parent's."""
    upcoming = handed_over(numbered(30))
    kept = [next(upcoming)]
    child = multiprocessing.get_context("fork").Process(target=_give_up, args=(kept,))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    for _ in upcoming:
        assert (kept[0]["x"] == 0).all()


@pytest.mark.parametrize("piece", [{"x": lambda: None}, {"x": torch.ones(3), "f": lambda: None}])
def test_what_cannot_be_sent_raises(piece: dict[str, Callable[[], None]]) -> None:
    """Where the loop is, with the worker's traceback; and it takes no slot."""
    with pytest.raises(Exception, match="pickle"):
        next(handed_over([piece]))


def test_one_tensor_in_two_places_arrives_as_one() -> None:
    """Jagged columns with the same offsets can be added after it."""
    first = torch.nested.as_nested_tensor([torch.arange(n) for n in (3, 1, 2)], layout=torch.jagged)
    second = torch.nested.nested_tensor_from_jagged(torch.ones(6), offsets=first.offsets())
    (data,) = handed_over([TensorDict({"a": first, "b": second}, batch_size=[3])])
    assert (data["a"] + data["b"]).values().tolist() == [1, 2, 3, 1, 1, 2]
