"""What the command lines of the recipes share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar


class Checked(Protocol):
    def problem(self) -> str | None:
        """Say why these settings cannot be run, if so."""


S = TypeVar("S", bound=Checked)


def read(
    parser: argparse.ArgumentParser, kind: Callable[..., S], argv: Sequence[str] | None, smoke_steps: int | None = None
) -> S:
    """The settings that a command line gives; a bad one exits with status 2 and says why.

    `smoke_steps` stand for the steps with `--smoke`, unless `--steps` is given, which has no default in the parser.
    """
    arguments = vars(parser.parse_args(argv))
    if arguments.get("smoke"):
        arguments = {"steps": smoke_steps} | arguments
    settings = kind(**arguments)
    problem = settings.problem()
    if problem is not None:
        parser.error(problem)
    return settings
