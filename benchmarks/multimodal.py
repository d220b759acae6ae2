"""Rows that are dicts of tensors and strings, one image for all responses to a prompt.

Put twice: once as it is, each row with its own copy of the image, and once with the image declared as shared by its
group. Bytes stored are what the units say, beside one copy of the image per group and of the rest per row.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import floors
from benchmarks.accounting import unit_stats
from benchmarks.figures import Report
from benchmarks.placement import Placement
from benchmarks.scale import Scale

if TYPE_CHECKING:
    from transfer_queue import TransferQueueClient

PARTITION = "multimodal"
GROUP = 8
SHARED = "image"
FIELDS = (SHARED, "response_ids", "prompt")
WAYS = {"a copy per row": (), "shared by the group": (SHARED,)}

_TOKENS = 512  # at most, of a response


@dataclass(frozen=True)
class Sizes:
    """Bytes of one copy of all images, of one per row, and of everything else."""

    images: int
    repeated: int
    rest: int


class Writer:
    def __init__(self, client: TransferQueueClient) -> None:
        self._client = client
        self._batch: dict[str, Any] = {}
        self._groups: list[str] = []

    def prepare(self, scale: Scale) -> Sizes:
        self._batch, self._groups = rows_of(scale)
        images = [_image_bytes(image) for image in self._batch[SHARED]]
        tokens = self._batch["response_ids"]
        prompts = sum(len(prompt.encode()) for prompt in self._batch["prompt"])
        rest = tokens.values().nbytes + tokens.offsets().nbytes + prompts
        return Sizes(sum(images[::GROUP]), sum(images), rest)

    def put(self, shared: tuple[str, ...]) -> float:
        """Return the seconds of the put."""
        options: dict[str, Any] = {"shared_fields": list(shared)} if shared else {}
        begin = time.perf_counter()
        self._client.put(self._batch, partition_id=PARTITION, group_ids=self._groups, group_size=GROUP, **options)
        return time.perf_counter() - begin

    def clear(self) -> None:
        self._client.clear_partition(PARTITION)


class Reader:
    def __init__(self, client: TransferQueueClient) -> None:
        self._client = client
        self._expected: dict[str, Any] = {}

    def prepare(self, scale: Scale) -> None:
        self._expected, _ = rows_of(scale)

    def read(self, rows: int) -> float:
        """Return the seconds of a get of all rows. Raises `ValueError` if other values come out than were put."""
        meta = self._client.get_meta(list(FIELDS), rows, PARTITION, task_name="reader")
        begin = time.perf_counter()
        batch = self._client.get_data(meta)
        duration_s = time.perf_counter() - begin
        expected, order = self._expected, [index - min(meta.global_indexes) for index in meta.global_indexes]
        tokens, prompts = batch["response_ids"].unbind(), batch["prompt"]
        for place, row in enumerate(order):
            same = _same(batch[SHARED][place], expected[SHARED][row]) and prompts[place] == expected["prompt"][row]
            if not same or not torch.equal(tokens[place], expected["response_ids"][row]):
                raise ValueError(f"row {row} differs from what was put")
        return duration_s


def measure(report: Report, scale: Scale, placement: Placement) -> None:
    """Add put and get for both ways, and the bytes that the units stored, beside those that they had to."""
    writer, reader = placement.stage(Writer), placement.stage(Reader)
    sizes: Sizes = writer.call("prepare", scale)
    reader.call("prepare", scale)
    rows = scale.image_groups * GROUP
    roof = report.find(floors.CASE, floors.MEMCPY)
    for way, shared in WAYS.items():
        case = f"multimodal, {way}"
        options = {"size_bytes": sizes.repeated + sizes.rest, "skip": scale.warm_up, "against": roof}
        puts, gets = report.series(case, "put", **options), report.series(case, "get", **options)
        before = unit_stats()["bytes_live"]
        stored = 0
        for _ in range(scale.warm_up + scale.rounds):
            puts.add(writer.call("put", shared))
            stored = unit_stats()["bytes_live"] - before
            gets.add(reader.call("read", rows))
            writer.call("clear")
        report.quantity(case, "bytes stored", stored / 1e6, "MB")
        report.quantity(case, "bytes stored", stored / (sizes.images + sizes.rest), "× one copy")
        report.quantity(case, "rows compared", rows * (scale.warm_up + scale.rounds), "rows")


# ---------------------------------------------------------------- data


def rows_of(scale: Scale) -> tuple[dict[str, Any], list[str]]:
    """Return columns and group ids: `GROUP` rows of one group follow each other and have equal images."""
    make = torch.Generator().manual_seed(0)
    images: list[dict[str, Any]] = []
    for number in range(scale.image_groups):
        size = (3, scale.image_pixels, scale.image_pixels)
        pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=make)
        image = {"pixels": pixels, "grid": torch.tensor([1, 16, 16]), "path": f"images/{number:06}.png"}
        images += [image] * GROUP
    rows = len(images)
    lengths = torch.randint(1, _TOKENS + 1, (rows,), generator=make)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    tokens = torch.randint(0, 150_000, (int(offsets[-1]),), generator=make)
    columns = {
        SHARED: images,
        "response_ids": torch.nested.nested_tensor_from_jagged(tokens, offsets),
        "prompt": [f"What is in image {row // GROUP}?" for row in range(rows)],
    }
    return columns, [f"group-{row // GROUP}" for row in range(rows)]


def _image_bytes(image: dict[str, Any]) -> int:
    return int(image["pixels"].nbytes + image["grid"].nbytes) + len(image["path"].encode())


def _same(found: Any, expected: dict[str, Any]) -> bool:
    tensors = ("pixels", "grid")
    return found["path"] == expected["path"] and all(torch.equal(found[name], expected[name]) for name in tensors)
