"""Consumption samplers: which ready samples a draw gets."""

from transfer_queue.samplers.base import BaseSampler, ReadyView
from transfer_queue.samplers.dp import DPSampler
from transfer_queue.samplers.group_n import GRPOGroupNSampler
from transfer_queue.samplers.grpo import GRPOSampler
from transfer_queue.samplers.rank_aware import RankAwareSampler
from transfer_queue.samplers.registry import as_sampler, create_sampler, register_sampler_class
from transfer_queue.samplers.seqlen_balanced import SeqlenBalancedSampler
from transfer_queue.samplers.sequential import SequentialSampler

__all__ = [
    "BaseSampler",
    "DPSampler",
    "GRPOGroupNSampler",
    "GRPOSampler",
    "RankAwareSampler",
    "ReadyView",
    "SeqlenBalancedSampler",
    "SequentialSampler",
    "as_sampler",
    "create_sampler",
    "register_sampler_class",
]
