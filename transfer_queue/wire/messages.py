"""Moved: import from `transfer_queue.messages`. (This file goes away at integration.)"""

from transfer_queue.messages import *  # noqa: F403
from transfer_queue.messages import Frames, Int64s  # noqa: F401
