"""The command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipe.grpo_tiny.config import parse


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "digit_sums"], "did you mean 'digit_sum'?"),
        (["--runtime", "mpi"], "invalid choice"),
        (["--kill", "rollout@40"], "unrecognized arguments"),
        (["--lr", "nan"], "must be finite"),
        (["--lr", "-1"], "must be finite"),
        (["--steps", "19"], "first and last 10 steps"),
        (["--steps", "0", "--smoke"], "first and last 10 steps"),
        (["--steps", "many"], "invalid int"),
        (["--prompts", "20"], "divisible by --chunk-prompts 8"),
        (["--prompts", "9", "--chunk-prompts", "3"], "divisible by the 2 trainers"),
        (["--prompts", "0"], "both at least 1"),
        (["--group-size", "1"], "at least one other"),
        (["--seed", "-1"], "--seed -1 must lie in"),
        (["--prompt-noise", "51"], "must lie in [0, 50]"),
        (["--timeout", "0"], "positive number of seconds"),
    ],
)
def test_bad_arguments_exit_2_and_say_why(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is started or written."""
    with pytest.raises(SystemExit) as caught:
        parse([*arguments, "--out", str(tmp_path / "run")])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_output_folder_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An output folder that cannot be made is a bad argument."""
    (tmp_path / "run").write_text("")
    with pytest.raises(SystemExit) as caught:
        parse(["--out", str(tmp_path / "run")])
    assert caught.value.code == 2
    assert "File exists" in capsys.readouterr().err


def test_defaults(tmp_path: Path) -> None:
    """150 steps of 192 rows in three chunks; 8 steps with --smoke."""
    settings = parse(["--out", str(tmp_path / "a" / "b")])
    assert (settings.steps, settings.rows_per_step, settings.rows_per_chunk, settings.chunks_per_step) == (
        150,
        192,
        64,
        3,
    )
    assert settings.out.is_dir()
    assert parse(["--smoke", "--out", str(tmp_path)]).steps == 8
    assert parse(["--smoke", "--steps", "3", "--out", str(tmp_path)]).steps == 3
