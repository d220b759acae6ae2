"""Consumption samplers: which ready samples a draw gets."""

from transfer_queue.samplers.base import BaseSampler, ReadyView
from transfer_queue.samplers.dp import DPSampler
from transfer_queue.samplers.grpo import GRPOSampler
from transfer_queue.samplers.registry import as_sampler, create_sampler, register_sampler_class
from transfer_queue.samplers.sequential import SequentialSampler

__all__ = [
    "BaseSampler",
    "DPSampler",
    "GRPOSampler",
    "ReadyView",
    "SequentialSampler",
    "as_sampler",
    "create_sampler",
    "register_sampler_class",
]
