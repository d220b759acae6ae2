"""Advantages and loss: check values, masks, odd groups."""

from __future__ import annotations

import math

import pytest
import torch

from recipe.grpo_tiny.loss import group_advantages, grpo_loss, kl_estimate

NAN = math.nan


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0.0, 1.0, 0.0, 1.0], [-0.86588, 0.86588, -0.86588, 0.86588]),
        ([1.0, NAN, 0.0], [0.70701, 0.0, -0.70701]),
        ([0.3], [0.0]),
        ([0.1, 0.1, 0.1], [0.0, 0.0, 0.0]),
        ([NAN, NAN], [0.0, 0.0]),
        ([0.7, NAN], [0.0, 0.0]),
    ],
)
def test_advantages_of_one_group(rewards: list[float], expected: list[float]) -> None:
    """Mean and std of the scored rewards, with n - 1; a group without signal gives zeros and is counted."""
    advantages, without_signal = group_advantages(torch.tensor(rewards), torch.zeros(len(rewards), dtype=torch.int64))
    assert advantages.tolist() == pytest.approx(expected, abs=1e-5)
    assert advantages.dtype == torch.float32
    assert without_signal == (not any(expected))


def test_advantages_of_scattered_groups_of_any_size() -> None:
    """Each row is compared with its own group, wherever its members stand."""
    rewards = torch.tensor([0.0, 5.0, 1.0, 7.0, 0.0, 2.0, 1.0])
    groups = torch.tensor([8, 3, 8, 3, 8, 9, 8])
    advantages, without_signal = group_advantages(rewards, groups)
    assert advantages[groups == 8].tolist() == pytest.approx([-0.86588, 0.86588, -0.86588, 0.86588], abs=1e-5)
    assert advantages[groups == 3].tolist() == pytest.approx([-0.70706, 0.70706], abs=1e-5)
    assert advantages[groups == 9].tolist() == [0.0]
    assert without_signal == 1


def test_kl_estimate() -> None:
    """k3 of d = -0.5 is 0.10653, of equal policies 0."""
    new = torch.tensor([0.5, 1.0])
    assert kl_estimate(new, torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.10653, 0.0], abs=1e-5)


def test_ratio_one_gives_minus_the_advantage_and_its_gradient() -> None:
    """With old = new the loss is -A, and its gradient that of -A log p."""
    new = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    loss, metrics = grpo_loss(new, new.detach(), torch.tensor([2.0, -1.0]), torch.ones(2, 2))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-0.5)
    assert new.grad is not None
    assert new.grad.tolist() == [[-0.5, -0.5], [0.25, 0.25]]
    assert (metrics.clip_share, metrics.mean_ratio, metrics.kl, metrics.masked_share) == (0, 1, 0, 0)


def test_clip_is_pessimistic() -> None:
    """A ratio beyond the bounds is cut where that lowers the objective, and only there."""
    new = torch.log(torch.tensor([[1.5, 0.5, 1.5, 0.5]]))
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    loss, metrics = grpo_loss(new, torch.zeros(1, 4), advantages, torch.ones(1, 4), eps_low=0.1, eps_high=0.3)
    assert float(loss) * 4 == pytest.approx(-1.3 - 0.5 + 1.5 + 0.9)
    assert metrics.clip_share == 1


def test_masked_positions_may_hold_anything() -> None:
    """NaN and infinities under mask 0 reach neither the loss nor its gradient nor the metrics."""
    garbage = torch.tensor([[-1.0, NAN, math.inf]])
    new = garbage.clone().requires_grad_()
    mask = torch.tensor([[1, 0, 0]], dtype=torch.int8)
    loss, metrics = grpo_loss(new, garbage, garbage, mask, ref=garbage, beta=0.1, weight=garbage)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-1.0)
    assert new.grad is not None
    assert new.grad.isfinite().all()
    assert new.grad[0, 1:].tolist() == [0, 0]
    assert metrics.masked_share == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("aggregation", "denom", "expected"),
    [
        ("token", None, -(3 * 1.0 + 1 * 3.0) / 4),
        ("token", 10, -0.6),
        ("sequence", None, -2.0),
        ("fixed", None, -(3 * 1.0 + 1 * 3.0) / 6),
    ],
)
def test_aggregations(aggregation: str, denom: float | None, expected: float) -> None:
    """A row of three tokens with A = 1 and one of one token with A = 3, by token, row and position."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    zeros = torch.zeros(2, 3)
    loss, _ = grpo_loss(zeros, zeros, torch.tensor([1.0, 3.0]), mask, aggregation=aggregation, denom=denom)
    assert float(loss.detach()) == pytest.approx(expected)


def test_unknown_aggregation_names_the_known_ones() -> None:
    """A misspelt aggregation is refused."""
    zeros = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="none of token, sequence, fixed"):
        grpo_loss(zeros, zeros, zeros, torch.ones(1, 1), aggregation="tokens")


def test_weight_and_kl_enter_per_token() -> None:
    """An importance weight scales the policy term, not the KL term."""
    zeros = torch.zeros(1, 1)
    ref = torch.full((1, 1), -0.5)
    loss, metrics = grpo_loss(
        zeros, zeros, torch.tensor([1.0]), torch.ones(1, 1), ref=ref, beta=2.0, weight=torch.tensor([[3.0]])
    )
    assert float(loss.detach()) == pytest.approx(-3.0 + 2 * 0.10653, abs=1e-4)
    assert metrics.kl == pytest.approx(0.10653, abs=1e-5)
