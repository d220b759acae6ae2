"""Advantages and loss of GRPO (Shao et al. 2024, "DeepSeekMath"), with the clip of PPO and the k3 estimate of the KL
divergence (Schulman 2020, "Approximating KL divergence").

Legend: B rows, R response tokens (padded), G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STD_FLOOR = 1e-4


@dataclass(frozen=True)
class LossMetrics:
    """Means over the tokens of this batch with mask 1, except `masked_share`: the share of positions with mask 0."""

    clip_share: float
    kl: float
    mean_ratio: float
    masked_share: float


def group_advantages(rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, int]:
    """Return `(r - mean) / (std + 1e-4)` by group, [B] float32, and the number of groups without any signal.

    NaN rewards count neither into mean nor std (n - 1) and get 0. A group without signal has fewer than two rewards, or
    equal ones; its rows get 0. Groups may be scattered and of any sizes.
    """
    groups, group_of = torch.unique(group_ids, return_inverse=True)
    scored = ~rewards.isnan()
    values = torch.where(scored, rewards, 0).double()

    def total(rows: Tensor) -> Tensor:
        return torch.zeros(len(groups), dtype=torch.float64).index_add_(0, group_of, rows)

    def extreme(missing: float, reduce: str) -> Tensor:
        start = torch.full((len(groups),), missing, dtype=torch.float64)
        return start.scatter_reduce_(0, group_of, torch.where(scored, values, missing), reduce)

    count = total(scored.double())
    centred = torch.where(scored, values - (total(values) / count.clamp(min=1))[group_of], 0)
    std = (total(centred**2) / (count - 1).clamp(min=1)).sqrt()
    has_signal = extreme(torch.inf, "amin") < extreme(-torch.inf, "amax")
    advantages = torch.where(has_signal[group_of], centred / (std + STD_FLOOR)[group_of], 0)
    return advantages.float(), int((~has_signal).sum())


def kl_estimate(new: Tensor, ref: Tensor) -> Tensor:
    """Return `exp(d) - d - 1` with `d = ref - new`, elementwise: never negative, its mean is KL(new || ref)."""
    difference = ref - new
    return difference.exp() - difference - 1


def grpo_loss(
    new: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    ref: Tensor | None = None,
    beta: float = 0.0,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    aggregation: str = "token",
    denom: float | None = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, LossMetrics]:
    """Return `-min(r A, clip(r, 1 - eps_low, 1 + eps_high) A) + beta KL(new || ref)`, `r = exp(new - old)`, aggregated.

    `new`, `old`, `ref`, `weight` and `mask` are [B, R], `advantages` [B] or [B, R]; what lies under mask 0 may be
    anything. Aggregation "token": sum / tokens; "sequence": mean over rows of the rows' means; "fixed": sum / (B R).
    `denom` replaces that divisor (tokens, rows, B R), e.g. by the count over all data-parallel ranks.
    """
    keep = mask.bool()

    def masked(values: Tensor) -> Tensor:
        return values.masked_fill(~keep, 0)

    new = masked(new)
    ratio = (new - masked(old)).exp()
    per_position = masked(advantages if advantages.dim() == 2 else advantages[:, None].expand_as(new))
    bounded = ratio.clamp(1 - eps_low, 1 + eps_high)
    per_token = -torch.minimum(ratio * per_position, bounded * per_position)
    if weight is not None:
        per_token = per_token * masked(weight)
    divergence = torch.zeros_like(new) if ref is None else kl_estimate(new, masked(ref))
    per_token = masked(per_token + beta * divergence)
    metrics = _metrics(ratio.detach(), ratio != bounded, divergence.detach(), keep)
    return _aggregate(per_token, keep, aggregation, denom), metrics


def _metrics(ratio: Tensor, clipped: Tensor, divergence: Tensor, keep: Tensor) -> LossMetrics:
    tokens = keep.sum().clamp(min=1)
    return LossMetrics(
        clip_share=float((clipped & keep).sum() / tokens),
        kl=float(divergence.sum() / tokens),
        mean_ratio=float((ratio * keep).sum() / tokens),
        masked_share=float(1 - keep.float().mean()),
    )


def _aggregate(per_token: Tensor, keep: Tensor, aggregation: str, denom: float | None) -> Tensor:
    match aggregation:
        case "token":
            total, local = per_token.sum(), int(keep.sum())
        case "sequence":
            total, local = (per_token.sum(1) / keep.sum(1).clamp(min=1)).sum(), len(keep)
        case "fixed":
            total, local = per_token.sum(), keep.numel()
        case _:
            raise ValueError(f"aggregation {aggregation!r} is none of token, sequence, fixed")
    return total / (max(local, 1) if denom is None else denom)
