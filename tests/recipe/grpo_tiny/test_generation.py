"""Drawing answers: exact, repeatable by row, with the log-probs that scoring gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recipe.grpo_tiny import generation, ragged
from recipe.grpo_tiny.model import load_weights, response_log_probs, save, tiny_model, weights_of
from recipe.grpo_tiny.stages import Rollout, prompt_rows
from recipe.grpo_tiny.task import EOS, MAX_NEW_TOKENS, TASKS, VOCAB_SIZE, draw_prompts


def rows_with_fillers(count: int = 24) -> object:
    prompts = draw_prompts(TASKS["digit_sum"], seed=1, step=0, count=count, noise=2)
    return prompt_rows(prompts, group_size=4)[0]


def test_model_has_the_stated_size_and_is_made_by_its_seed() -> None:
    """94 784 parameters; one seed gives one model, and the global random state stays as it was."""
    state = torch.get_rng_state()
    weights = weights_of(tiny_model(5), version=0).values
    assert weights.shape == (94_784,)
    assert np.array_equal(weights, weights_of(tiny_model(5), 0).values)
    assert not np.array_equal(weights, weights_of(tiny_model(6), 0).values)
    assert torch.equal(state, torch.get_rng_state())


def test_weights_travel_between_models() -> None:
    """A model that loads the weights of another one, from a read-only array, equals it; a saved one loads again."""
    source, target = tiny_model(0), tiny_model(1)
    weights = weights_of(source, version=4)
    weights.values.setflags(write=False)
    load_weights(target, weights)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


def test_saved_model_loads_again(tmp_path: object) -> None:
    """The folder is one that transformers reads."""
    from pathlib import Path

    from transformers import Qwen2ForCausalLM

    folder = Path(str(tmp_path)) / "model"
    model = tiny_model(0)
    save(model, folder)
    loaded = Qwen2ForCausalLM.from_pretrained(folder)
    assert np.array_equal(weights_of(loaded, 0).values, weights_of(model, 0).values)


def test_seeds_come_from_the_row_name_alone() -> None:
    """A row has its seed in any batch and order; other rows and base seeds have others."""
    seeds = generation.row_seeds(0, [3, 4, 3], [0, 0, 1])
    assert seeds.dtype == np.uint64
    assert seeds.max() < 2**63
    assert len(set(seeds.tolist())) == 3
    assert generation.row_seeds(0, [4], [0])[0] == seeds[1]
    assert generation.row_seeds(1, [4], [0])[0] != seeds[1]
    noise = generation.gumbel_noise(seeds)
    assert noise.shape == (3, MAX_NEW_TOKENS, VOCAB_SIZE)
    assert torch.equal(generation.gumbel_noise(seeds[1:2])[0], noise[1])


def test_an_answer_does_not_depend_on_its_batch() -> None:
    """The same row, drawn alone among longer or shorter prompts or in reverse order, gets the same answer."""
    rows = rows_with_fillers()
    rollout = Rollout(tiny_model(0), seed=7)
    whole = rollout(rows)
    backwards = rollout(rows[torch.arange(len(rows)).flip(0)])
    for field in ("responses", "rollout_log_probs"):
        a = [row.tolist() for row in whole[field].unbind()]
        b = [row.tolist() for row in backwards[field].unbind()][::-1]
        assert all(one == pytest.approx(other, abs=1e-5) for one, other in zip(a, b, strict=True))
    half = rollout(rows[:31])["responses"].unbind()
    assert [row.tolist() for row in half] == [row.tolist() for row in whole["responses"].unbind()][:31]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_generation_and_scoring_agree(temperature: float) -> None:
    """Left-padded generation with a cache and right-padded scoring give the same log-probs for ragged prompts."""
    rows = rows_with_fillers()
    model = tiny_model(0)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    answers = Rollout(model, seed=7, temperature=temperature)(rows)
    with torch.no_grad():
        scored = response_log_probs(model, rows["prompts"], answers["responses"], answers["temperature"])
    mask = ragged.padded(answers["response_mask"], 0).bool()
    gap = (scored - ragged.padded(answers["rollout_log_probs"], 0))[mask].abs().max()
    assert gap < 1e-4
    assert answers["policy_version"].tolist() == [[0, 0]] * len(rows)


def test_answers_end_at_the_first_end_token() -> None:
    """The end token is kept, nothing follows it, and an answer without one has the full length."""
    rows = rows_with_fillers(count=96)
    model = tiny_model(0)
    with torch.no_grad():
        model.lm_head.weight[EOS] += 0.4 * torch.ones(64)
    answers = Rollout(model, seed=7)(rows)
    seen = set()
    for row, reason in zip(answers["responses"].unbind(), answers["finish_reason"].tolist(), strict=True):
        tokens = row.tolist()
        assert EOS not in tokens[:-1]
        assert (tokens[-1] == EOS) == (reason == 0)
        assert reason == 0 or len(tokens) == MAX_NEW_TOKENS
        seen.add((len(tokens), reason))
    assert {(3, 1), (1, 0), (2, 0)} <= seen


def test_draws_follow_the_policy() -> None:
    """Over 20 000 rows the first token is distributed as the softmax says (chi-square, 63 degrees of freedom)."""
    count = 20_000
    log_probs = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    noise = generation.gumbel_noise(generation.row_seeds(0, range(count), [0] * count), num_tokens=1)
    drawn = torch.bincount((log_probs + noise[:, 0]).argmax(-1), minlength=VOCAB_SIZE)
    expected = log_probs.double().exp() * count
    chi_square = float(((drawn - expected) ** 2 / expected).sum())
    assert 35 < chi_square < 100  # 63 ± 3.3 standard deviations of 11.2


def test_greedy_answers_take_the_most_likely_token() -> None:
    """Without noise the first token is the argmax of the prompt's last logits."""
    rows = rows_with_fillers(count=4)
    model = tiny_model(0)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        answers = generation.generate(model, rows["prompts"], noise=None)
        for prompt, response in zip(rows["prompts"].unbind(), answers.responses.unbind(), strict=True):
            assert response[0] == model(input_ids=prompt[None]).logits[0, -1].argmax()
