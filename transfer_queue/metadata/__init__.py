"""Handles on samples, and how to reach a queue."""

from __future__ import annotations

from transfer_queue.metadata.batch import BatchMeta
from transfer_queue.metadata.columns import Coded
from transfer_queue.metadata.delta import KVDelta
from transfer_queue.metadata.endpoint import Role, ZMQServerInfo
from transfer_queue.metadata.keys import KVBatchMeta
from transfer_queue.metadata.locations import FieldLocation
from transfer_queue.metadata.rows import Sample, Samples
from transfer_queue.metadata.schema import FieldSchema, FieldView, UnknownField, schema_of
from transfer_queue.metadata.table import UNKNOWN_GENERATION

__all__ = [
    "UNKNOWN_GENERATION",
    "BatchMeta",
    "Coded",
    "FieldLocation",
    "FieldSchema",
    "FieldView",
    "KVBatchMeta",
    "KVDelta",
    "Role",
    "Sample",
    "Samples",
    "UnknownField",
    "ZMQServerInfo",
    "schema_of",
]
