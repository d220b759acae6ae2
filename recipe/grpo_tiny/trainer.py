"""One data-parallel rank of the optimiser: the gradient of its rows, summed over the ranks, and the step.

Legend: B rows of this rank, R response tokens, N parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import FileStore, ProcessGroupGloo
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from recipe.grpo_tiny import ragged
from recipe.grpo_tiny.loss import grpo_loss
from recipe.grpo_tiny.model import Model, response_log_probs

MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class Update:
    """What one optimiser step did. `max_gap` and `finite` are of this rank's rows, the rest of all ranks' tokens."""

    max_gap: float  # largest |log-prob of the trainer - log-prob of the rollout| of a trainable token
    finite: bool  # all advantages are
    num_tokens: int
    loss: float
    kl: float
    gradient_norm: float
    weights_sum: float  # equal on all ranks, or they have drifted apart


@dataclass(frozen=True)
class TrainReport:
    """The rows a rank trained on in a step, by name, and what came of it."""

    groups: NDArray[np.int64]  # [B]
    sessions: NDArray[np.int64]  # [B]
    targets: NDArray[np.int64]  # [B]
    versions: NDArray[np.int64]  # [B, 2] policy version before and after generation
    reward_sum: float
    num_exact: int
    update: Update


class Trainer:
    """`all_reduce` adds a vector up over the ranks, in place; None: this is the only rank."""

    def __init__(
        self, model: Model, *, lr: float, kl: float, all_reduce: Callable[[Tensor], None] | None = None
    ) -> None:
        self._model = model
        self._kl = kl
        self._all_reduce = all_reduce
        self._parameters = list(model.parameters())
        self._optimizer = torch.optim.AdamW(self._parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(self, rows: ragged.Columns) -> Update:
        """Train on the rows of this rank and on those the other ranks train on at the same time.

        Without a field `old_log_probs` the behaviour policy is the one being trained (one update per batch), so its
        log-probs are the new ones, detached: the ratio is 1, its gradient is not 0.
        """
        mask = ragged.padded(rows["response_mask"], 0).bool()
        new = response_log_probs(self._model, rows["prompts"], rows["responses"], rows["temperature"])
        gap = (new.detach() - ragged.padded(rows["rollout_log_probs"], 0)).masked_fill(~mask, 0).abs().max()
        ref = ragged.padded(rows["ref_log_probs"], 0)
        given = rows.get("old_log_probs", None)
        old = new.detach() if given is None else ragged.padded(given, 0)
        loss_sum, metrics = grpo_loss(new, old, rows["advantages"], mask, ref=ref, beta=self._kl, denom=1.0)
        tokens, total_loss, total_kl = self._backward(loss_sum, int(mask.sum()), metrics.kl)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, MAX_GRADIENT_NORM)
        self._optimizer.step()
        return Update(
            max_gap=float(gap),
            finite=bool(rows["advantages"].isfinite().all()),
            num_tokens=tokens,
            loss=total_loss,
            kl=total_kl,
            gradient_norm=float(norm),
            weights_sum=float(parameters_to_vector(self._parameters).detach().double().sum()),
        )

    def _backward(self, loss_sum: Tensor, num_tokens: int, kl: float) -> tuple[int, float, float]:
        """Set the gradients to those of the mean over all ranks' tokens; return their number, the mean loss and KL."""
        self._optimizer.zero_grad()
        loss_sum.backward()
        counts = torch.tensor([num_tokens, float(loss_sum.detach()), kl * num_tokens])
        shared = torch.cat((parameters_to_vector([p.grad for p in self._parameters if p.grad is not None]), counts))
        if self._all_reduce is not None:
            self._all_reduce(shared)
        tokens = float(shared[-3])
        shared /= max(tokens, 1.0)
        vector_to_parameters(shared[:-3], [p.grad for p in self._parameters if p.grad is not None])
        return int(tokens), float(shared[-2]), float(shared[-1])


class GlooSum:
    """Adds vectors up over `size` ranks, in place. The ranks may also be threads of one process: the process group is
    made directly instead of by `init_process_group`, which allows one per process."""

    def __init__(self, rank: int, size: int, timeout_s: float) -> None:
        self._rank = rank
        self._size = size
        self._timeout = timedelta(seconds=timeout_s)
        self._group: ProcessGroupGloo | None = None

    def join(self, meeting_file: Path) -> None:
        """Wait until all ranks named this file; it is made by the first."""
        store = FileStore(str(meeting_file), self._size)
        self._group = ProcessGroupGloo(store, self._rank, self._size, self._timeout)

    def __call__(self, vector: Tensor) -> None:
        assert self._group is not None, "join first"
        self._group.allreduce([vector]).wait()

    def close(self) -> None:
        self._group = None
