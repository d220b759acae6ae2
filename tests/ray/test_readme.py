"""What the README shows runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import transfer_queue as tq

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_readme_program(number: int, ray_session: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Each Python block of the README runs to its end and prints something."""
    try:
        exec(compile(BLOCKS[number], f"README block {number}", "exec"), {"__name__": "__main__"})
    finally:
        tq.close()
    assert capsys.readouterr().out.strip()


def test_config_keys_have_comments() -> None:
    """Every key of the packaged configuration says what it means."""
    lines = (Path(tq.__file__).parent / "config.yaml").read_text().splitlines()
    bare = [line for line in lines if re.match(r"\s*\w+:\s*\S", line) and "#" not in line]
    assert not bare
