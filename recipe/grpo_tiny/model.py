"""The policy: a Qwen2 of 94 784 parameters, and its log-probs.

Legend: B rows, P prompt tokens, R response tokens, W widest response, V vocabulary.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from recipe.grpo_tiny import ragged, task

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM

Model: TypeAlias = "Qwen2ForCausalLM"


@dataclass(frozen=True)
class Weights:
    """All parameters of the policy in one vector, and the number of optimiser steps that made them."""

    version: int
    values: NDArray[np.float32]  # [94 784]


def tiny_model(seed: int) -> Model:
    """Build the untrained policy. The same seed gives the same weights; the global random state is left as it was."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=task.VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=task.BOS,
        eos_token_id=task.EOS,
        pad_token_id=task.PAD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config).eval()


def weights_of(model: Model, version: int) -> Weights:
    """Copy the parameters out."""
    return Weights(version, parameters_to_vector(model.parameters()).detach().numpy().copy())


def load_weights(model: Model, weights: Weights) -> None:
    """Copy the parameters in; a read-only array is accepted."""
    with torch.no_grad():
        vector_to_parameters(torch.tensor(weights.values), model.parameters())


def response_log_probs(model: Model, prompts: Tensor, responses: Tensor, temperature: Tensor) -> Tensor:
    """Return [B, W] float32: the log-prob of every response token, full vocabulary, at the row's temperature [B].

    Prompts [B, P] and responses [B, R] are jagged. Positions behind a row's response hold values without meaning.
    """
    prompt_lengths, lengths = ragged.row_lengths(prompts), ragged.row_lengths(responses)
    width = int(lengths.max())
    tokens = _joined(prompts, responses)
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    before = prompt_lengths[:, None] - 1 + torch.arange(width)
    before = before.clamp(max=logits.shape[1] - 1)
    rows = torch.arange(len(lengths))[:, None]
    log_probs = (logits[rows, before].float() / temperature[:, None, None]).log_softmax(-1)
    return log_probs.gather(2, ragged.padded(responses, task.PAD)[:, :, None])[:, :, 0]


def _joined(prompts: Tensor, responses: Tensor) -> Tensor:
    """Return [B, widest sum] int64: prompt and response of each row, then padding, which no real token attends to."""
    prompt_lengths, lengths = ragged.row_lengths(prompts), ragged.row_lengths(responses)
    in_row = ragged.valid(prompt_lengths + lengths)
    in_prompt = ragged.valid(prompt_lengths, in_row.shape[1])
    tokens = torch.full(in_row.shape, task.PAD, dtype=torch.int64)
    tokens[in_prompt] = prompts.values()
    tokens[in_row & ~in_prompt] = responses.values()
    return tokens


def save(model: Model, folder: Path) -> None:
    """Write a folder that `Qwen2ForCausalLM.from_pretrained` reads."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model.save_pretrained(folder)
