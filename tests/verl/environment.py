"""What the tests of the public package verl 0.9.1 need; they import its modules and drive them as they are.

verl is not among the packages of the tests. These two commands make an environment, and the third runs the tests:

    pip install -e '.[test]' 'torch==2.13.0' 'tensordict==0.10.0' 'transformers>=5.5.3,<5.11' accelerate aiohttp \\
        cachetools codetiming datasets dill fastapi hydra-core pandas peft pillow torchdata uvicorn
    pip install --no-deps 'verl==0.9.1'
    pytest -m slow tests/verl

What needs an accelerator is replaced on verl's side, see `standins`: the language model and its servers, and what the
training engines compute.
"""

from __future__ import annotations

import importlib.util

import pytest

NEEDS_VERL = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="verl is not installed"),
    pytest.mark.filterwarnings("ignore"),  # those of verl and of what it imports
    pytest.mark.timeout(300),
]
