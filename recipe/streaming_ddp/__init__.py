"""Data-parallel training on a stream: `python -m recipe.streaming_ddp`."""
