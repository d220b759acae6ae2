"""The optimiser step, and its data-parallel form."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tensordict import TensorDict

from recipe.grpo_tiny.model import tiny_model, weights_of
from recipe.grpo_tiny.trainer import GlooSum, Trainer
from tests.recipe.grpo_tiny.loop import Loop


def test_gradient_of_two_ranks_is_that_of_one(tmp_path: Path) -> None:
    """Ranks with different numbers of tokens, adding up over gloo, step as one rank with all rows does."""
    rows = Loop(prompt_noise=2).rows_of(0)
    split = [rows[:40], rows[40:]]
    one = Trainer(alone := tiny_model(0), lr=1e-3, kl=0.01)
    whole = one.step(rows)

    models = [tiny_model(0), tiny_model(0)]

    def train(rank: int) -> tuple[object, float]:
        ranks_sum = GlooSum(rank, 2, timeout_s=20)
        ranks_sum.join(tmp_path / "meeting")
        update = Trainer(models[rank], lr=1e-3, kl=0.01, all_reduce=ranks_sum).step(split[rank])
        ranks_sum.close()
        return update.num_tokens, update.gradient_norm

    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(train, range(2)))
    for num_tokens, norm in results:
        assert num_tokens == whole.num_tokens == len(rows["responses"].values())
        assert abs(norm - whole.gradient_norm) < 1e-6
    for model in models:
        for mine, theirs in zip(model.parameters(), alone.parameters(), strict=True):
            assert mine.grad is not None
            assert theirs.grad is not None
            assert (mine.grad - theirs.grad).abs().max() < 1e-6
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_step_raises_the_probability_of_rewarded_answers() -> None:
    """After one step the rows with positive advantage are more likely than before, relative to the others."""
    loop = Loop(lr=1e-3)
    rows = loop.rows_of(0)
    before = _signed_log_prob(loop, rows)
    update = loop.trainer.step(rows)
    assert _signed_log_prob(loop, rows) > before
    assert update.finite
    assert update.max_gap < 1e-4
    assert update.kl == 0  # the first step starts from the reference itself


def _signed_log_prob(loop: Loop, rows: TensorDict) -> float:
    loop.reference.model = loop.model
    per_row = torch.stack([row.sum() for row in loop.reference(rows)["ref_log_probs"].unbind()])
    return float((per_row * rows["advantages"]).sum())


def test_learning_rate_zero_changes_nothing() -> None:
    """The weights stay, whatever the gradient."""
    loop = Loop(lr=0.0)
    before = weights_of(loop.model, 0).values
    assert loop.step(0).gradient_norm > 0
    assert (weights_of(loop.model, 0).values == before).all()


def test_stale_weights_are_seen() -> None:
    """Log-probs of a rollout by older weights differ from the trainer's by more than rounding."""
    loop = Loop()
    loop.step(0)
    loop.rollout.load(weights_of(tiny_model(0), 0))
    assert loop.step(1).max_gap > 1e-3
