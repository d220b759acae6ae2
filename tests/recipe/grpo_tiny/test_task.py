"""Prompts and rewards."""

from __future__ import annotations

import pytest
import torch

from recipe.grpo_tiny import ragged
from recipe.grpo_tiny.stages import prompt_rows
from recipe.grpo_tiny.task import (
    BOS,
    EOS,
    EQUALS,
    FIRST_DIGIT,
    FIRST_FILLER,
    FIRST_SUM,
    PAD,
    TASKS,
    VOCAB_SIZE,
    draw_prompts,
)

DIGIT_SUM, ECHO = TASKS["digit_sum"], TASKS["echo"]


def answer(text: str) -> list[int]:
    """Digits as they are, x a filler, p the padding token, . the end token."""
    known = {"x": FIRST_FILLER, ".": EOS, "p": PAD}
    return [known[letter] if letter in known else FIRST_DIGIT + int(letter) for letter in text]


@pytest.mark.parametrize(
    ("text", "reward", "exact"),
    [
        ("98.", 1.0, True),
        ("953", 1.0, True),
        ("950", 0.8, False),
        ("x98", 0.4 * 2 / 3, False),
        (".", 0.0, False),
        ("0.", 0.4, False),
        ("x.", 0.0, False),
        ("98p", 0.4 * 2 / 3, False),
        ("000", 0.4, False),
    ],
)
def test_digit_sum_reward_of_target_17(text: str, reward: float, exact: bool) -> None:
    """The share of digits counts 0.4, the distance of an all-digit sum 0.6, and an empty answer nothing."""
    tokens = torch.tensor(answer(text))
    scores = DIGIT_SUM.score(ragged.jagged(tokens, torch.tensor([len(tokens)])), torch.tensor([17]))
    assert scores.rewards.tolist() == pytest.approx([reward], abs=1e-6)
    assert scores.rewards.dtype == torch.float32
    assert scores.exact.tolist() == [exact]


@pytest.mark.parametrize(("text", "reward", "exact"), [("5.", 1.0, True), ("555", 1.0, True), ("51.", 0.7, False)])
def test_echo_reward_of_digit_5(text: str, reward: float, exact: bool) -> None:
    """Echo pays for the share of digits that are the shown one."""
    tokens = torch.tensor(answer(text))
    scores = ECHO.score(ragged.jagged(tokens, torch.tensor([len(tokens)])), torch.tensor([5]))
    assert scores.rewards.tolist() == pytest.approx([reward])
    assert scores.exact.tolist() == [exact]


def test_rows_are_scored_each_against_its_own_target() -> None:
    """Answers of different lengths in one batch do not touch each other."""
    answers = [answer("98."), answer("."), answer("12.")]
    values = torch.tensor([token for row in answers for token in row])
    scores = DIGIT_SUM.score(ragged.jagged(values, torch.tensor([3, 1, 3])), torch.tensor([17, 0, 3]))
    assert scores.rewards.tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("noise", [0, 2])
def test_prompts_are_repeatable_and_show_their_targets(task: object, noise: int) -> None:
    """The same step gives the same prompts, another step others; targets are read back behind any fillers."""
    assert isinstance(task, type(DIGIT_SUM))
    prompts = draw_prompts(task, seed=3, step=5, count=24, noise=noise)
    assert prompts == draw_prompts(task, seed=3, step=5, count=24, noise=noise)
    assert prompts.tokens != draw_prompts(task, seed=3, step=6, count=24, noise=noise).tokens
    assert prompts.group_ids == tuple(range(120, 144))
    assert {len(tokens) for tokens in prompts.tokens} == set(range(3, 4 + noise))
    assert max(token for tokens in prompts.tokens for token in tokens) < VOCAB_SIZE
    rows, groups = prompt_rows(prompts, group_size=2)
    assert groups == [group for group in prompts.group_ids for _ in range(2)] == rows["group_id"].tolist()
    assert rows["session_id"].tolist() == [0, 1] * 24
    assert task.targets_of(rows["prompts"]).tolist() == [target for target in prompts.targets for _ in range(2)]


def test_prompt_tokens() -> None:
    """The prompt of 17 is begin, target 17, equals."""
    assert DIGIT_SUM.prompt(17) == [BOS, FIRST_SUM + 17, EQUALS]
