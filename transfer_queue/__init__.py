"""A data queue for RL post-training: producers write fields of samples, tasks draw the samples that are ready."""

from __future__ import annotations

__version__ = "0.2.0"
