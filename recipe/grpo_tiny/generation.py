"""Drawing answers from the policy, each row from its own noise.

A row's random numbers come from its name alone, so that a row drawn again, in another batch or by another worker, gets
the same answer: adding Gumbel noise to the log-probs and taking the largest is an exact categorical draw (Gumbel 1954).

Legend: B rows, P prompt tokens, T most new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recipe.grpo_tiny import ragged
from recipe.grpo_tiny.model import Model
from recipe.grpo_tiny.task import EOS, MAX_NEW_TOKENS, PAD, VOCAB_SIZE


@dataclass(frozen=True)
class Generated:
    responses: Tensor  # jagged [B, R] int64, up to and including the first end token
    log_probs: Tensor  # jagged [B, R] float32, full vocabulary, at the temperature of the draw
    ended: Tensor  # [B] bool: False where the token limit cut the answer


def row_seeds(base_seed: int, group_ids: Sequence[int], session_ids: Sequence[int]) -> NDArray[np.uint64]:
    """Return [B]: 63 bits per row, from the row's name and nothing else."""
    names = (f"{base_seed}/{group}/{session}" for group, session in zip(group_ids, session_ids, strict=True))
    digests = b"".join(blake2b(name.encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, np.uint64) >> np.uint64(1)


def gumbel_noise(seeds: NDArray[np.uint64], num_tokens: int = MAX_NEW_TOKENS) -> Tensor:
    """Return [B, T, V] float32 standard Gumbel noise; row i depends on `seeds[i]` only.

    Element j is output j of SplitMix64 (Steele, Lea, Flood 2014) started at the seed.
    """
    counters = np.arange(1, num_tokens * VOCAB_SIZE + 1, dtype=np.uint64)
    bits = seeds[:, None] + counters * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    noise = -np.log(-np.log(uniform)).astype(np.float32)
    return torch.from_numpy(noise.reshape(len(seeds), num_tokens, VOCAB_SIZE))


@torch.no_grad()
def generate(model: Model, prompts: Tensor, noise: Tensor | None, temperature: float = 1.0) -> Generated:
    """Answer jagged `prompts` [B, P] with at most `MAX_NEW_TOKENS` tokens; without `noise` [B, T, V] greedily."""
    from transformers import DynamicCache

    ids = ragged.padded(prompts, PAD, left=True)
    attention = ragged.valid(ragged.row_lengths(prompts)).flip(1).long()
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    one_more = torch.ones(len(ids), 1, dtype=torch.int64)
    cache = DynamicCache()
    tokens, log_probs = [], []
    for turn in range(MAX_NEW_TOKENS):
        output = model(
            input_ids=ids, attention_mask=attention, position_ids=positions, past_key_values=cache, use_cache=True
        )
        over_vocabulary = (output.logits[:, -1].float() / temperature).log_softmax(-1)
        scores = over_vocabulary if noise is None else over_vocabulary + noise[:, turn]
        ids = scores.argmax(-1, keepdim=True)
        tokens.append(ids)
        log_probs.append(over_vocabulary.gather(1, ids))
        attention = torch.cat((attention, one_more), 1)
        positions = positions[:, -1:] + 1
    return _cut_at_end(torch.cat(tokens, 1), torch.cat(log_probs, 1))


def _cut_at_end(tokens: Tensor, log_probs: Tensor) -> Generated:
    """Keep of [B, T] what comes before the first end token, and that token."""
    is_end = tokens == EOS
    ended = is_end.any(1)
    lengths = torch.where(ended, is_end.int().argmax(1) + 1, tokens.shape[1])
    keep = ragged.valid(lengths, tokens.shape[1])
    return Generated(ragged.jagged(tokens[keep], lengths), ragged.jagged(log_probs[keep], lengths), ended)
