"""What counts as lost or repeated, and which settings are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from recipe.grpo_tiny.checks import ConservationError
from recipe.sparkline import sparkline
from recipe.streaming_ddp.config import Settings, parse
from recipe.streaming_ddp.job import check_rows, check_weights
from recipe.streaming_ddp.rank import processor_ticks, timed
from recipe.streaming_ddp.stream import Source

FINE = {"consumed": 4, "redelivered": 0}


def test_every_row_once_is_fine() -> None:
    check_rows(4, torch.tensor([3, 0, 2, 1]), FINE)
    check_weights(torch.ones(2, 3))


@pytest.mark.parametrize(
    ("seen", "accounts", "text"),
    [
        ([0, 1, 3], {}, r"1 rows never trained on: \[2\]"),
        ([0, 1, 2, 3, 1], {}, r"1 rows trained on more than once: \[1\]"),
        ([0, 1, 2, 3], {"consumed": 3}, "4 rows were put and trained on, the queue counts"),
        ([0, 1, 2, 3], {"redelivered": 1}, "the queue counts"),
    ],
)
def test_rows_that_are_lost_or_repeated(seen: list[int], accounts: dict[str, Any], text: str) -> None:
    with pytest.raises(ConservationError, match=text):
        check_rows(4, torch.tensor(seen), FINE | accounts)


def test_ranks_that_drifted_apart() -> None:
    with pytest.raises(ConservationError, match="different weights"):
        check_weights(torch.tensor([[1.0, 2.0], [1.0, 2.5]]))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rows": 1500}, "--rows 1500 must be divisible by 2 ranks times --batch-size 512"),
        ({"batch_size": 0}, "--batch-size"),
        ({"num_workers": -1}, "--num-workers -1"),
        ({"lease_s": float("nan")}, "--lease nan"),
    ],
)
def test_what_cannot_be_run(changes: dict[str, Any], text: str) -> None:
    problem = Settings(**changes).problem()
    assert problem is not None
    assert text in problem


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--rows", "2048", "--num-workers", "0"]) == Settings(rows=2048, num_workers=0)
    with pytest.raises(SystemExit, match="2"):
        parse(["--rows", "1"])
    assert "must be divisible" in capsys.readouterr().err


def test_rows_of_a_source_are_the_same_each_time() -> None:
    """And their answers have mean 0 and variance 1, about, so that a loss of 1 means nothing learned."""
    rows, again = Source(16, seed=1).rows(100, 2000), Source(16, seed=1).rows(100, 2000)
    assert all(torch.equal(rows[name], again[name]) for name in rows)
    assert rows["row_id"].tolist() == list(range(100, 2100))
    assert abs(float(rows["y"].mean())) < 0.1
    assert abs(float(rows["y"].var()) - 1) < 0.1
    assert not torch.equal(rows["x"], Source(16, seed=2).rows(100, 2000)["x"])


def test_ticks_of_the_processors() -> None:
    """No processor works for more than all of its time."""
    worked, total = processor_ticks()
    assert 0 < worked < total


def test_waits_are_told_with_what_came() -> None:
    pairs = list(timed(["a", "b"]))
    assert [batch for batch, _ in pairs] == ["a", "b"]
    assert all(waited_s >= 0 for _, waited_s in pairs)


def test_a_sparkline_has_a_bar_per_value_or_mean() -> None:
    assert sparkline([0.0, 0.5, 1.0, 7.0, -1.0]) == "▁▅██▁"
    assert sparkline([1.0, 3.0, 4.0, 4.0], top=4.0, width=2) == "▅█"
