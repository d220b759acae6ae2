"""GRPO on a tiny random Qwen2, on a CPU, with every row going through the queue: `python -m recipe.grpo_tiny`."""
