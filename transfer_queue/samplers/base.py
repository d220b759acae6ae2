"""What a consumption sampler is: indices and status arrays in, indices out."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.samplers.states import States, ranks_of, states_of

if TYPE_CHECKING:
    from torch import Tensor

Int64s: TypeAlias = NDArray[np.int64]
Selection: TypeAlias = "Sequence[int] | Int64s"


class ReadyView(Sequence[int], ABC):
    """The ready rows of one draw in allocation order, read lazily: a slice costs its own length, not the view's.

    Samplers with `lazy = True` get this instead of a list. It is only valid during the call; its slices
    are read-only arrays.
    """

    @abstractmethod
    def groups(self, count: int, size: int) -> tuple[int, Int64s]:
        """Return (number of groups found, their rows): the first complete groups, `count` of them or all there are.

        Rows of a group are adjacent. Groups are those declared by id; rows without an id form groups by position,
        blocks of `size` ordinals counted from the partition's start.
        """


class BaseSampler(ABC):
    """Decides which ready rows a draw gets.

    A sampler must not keep or change what it is given, has to be picklable, and is called by one thread at a time.

    There are two dialects, told apart by the signature of `sample` (`samplers.dialect`). The native one is described
    at `sample`; the other is `sample(ready_indexes, batch_size, *args, **kwargs) -> (sampled, consumed)`. It is told
    `partition`, `partition_id`, `task_name` and every entry of the request's `sampler_params`, and may
    keep the batch of a rank in `self._states[partition_id][task_name][dp_rank][batch_index]`: the controller reserves
    what is kept there, lets that rank have it again, and forgets it when one of its rows is cleared.
    """

    lazy: bool = False
    """`sample` takes a `ReadyView` instead of a plain list."""
    accepts_partial: bool = False
    """`sample` is asked also while fewer rows are ready than were asked for."""
    whole_groups: bool = False
    """`sample` hands out complete groups only, the rows of a group adjacent."""

    def __init__(self) -> None:
        self._states: States = {}

    def filter_ready_indices(
        self,
        all_indices: list[int],
        production_status: Tensor,  # [capacity, num_fields] int8
        consumption_status: Tensor,  # [capacity] int8, reserved rows shown as consumed
        data_fields: list[str],
        field_mapping: dict[str, int],
        **kwargs: Any,
    ) -> list[int]:
        """Return the indices that may be drawn, in the order of `all_indices` (a whole partition in allocation order).

        The default: every named field is there and the row is not consumed; an unknown field means that nothing is
        ready. A sampler that overrides this gets copies of the status arrays at each draw, which costs O(partition).
        """
        import torch

        if any(name not in field_mapping for name in data_fields):
            return []
        rows = torch.as_tensor(all_indices, dtype=torch.int64)
        columns = torch.as_tensor([field_mapping[name] for name in data_fields], dtype=torch.int64)
        produced = (production_status[rows][:, columns] == 1).all(dim=1)
        ready: list[int] = rows[produced & (consumption_status[rows] == 0)].tolist()
        return ready

    @abstractmethod
    def sample(
        self, ready_indices: Sequence[int], batch_size: int, **kwargs: Any
    ) -> Selection | tuple[Selection, Selection]:
        """Choose rows for one draw.

        Returns the chosen indices in the order they are handed out, or a pair (handed out, marked consumed). An empty
        result or `InsufficientSamples` means "not yet": the draw waits. `kwargs` hold `partition_id`, `global_step`,
        `task_name`, `num_n_samples`, `group_ids`, `tags`, `seqlens` and `versions` (views by index), and every entry
        of the request's `sampler_params`.
        """

    def check_request(self, batch_size: int, **kwargs: Any) -> None:  # noqa: B027  most samplers serve any size
        """Raise `InvalidArgument` for a request that can never be served, whatever becomes ready."""

    # ------------------------------------------------------------ batches that are kept

    def has_cached_result(self, partition_id: str, task_name: str, sampling_config: Mapping[str, Any] | None) -> bool:
        """Is a batch kept for this `dp_rank` and `batch_index`? Then `sample` is asked whatever is ready."""
        config = sampling_config or {}
        rank = config.get("dp_rank")
        kept = None if rank is None else ranks_of(states_of(self), partition_id, task_name).get(rank)
        return isinstance(kept, dict) and config.get("batch_index") in kept

    def clear_cache(self, partition_id: str) -> None:
        """The partition is gone: forget what was kept for it. Unknown: no-op."""
        states_of(self).pop(partition_id, None)

    def save_checkpoint(self) -> dict[str, Any]:
        """What has to come back after a restart: numbers, texts, bytes, arrays, and lists, tuples, dicts of those."""
        return {"_states": copy.deepcopy(states_of(self))}

    def load_checkpoint(self, state: dict[str, Any]) -> None:
        """Take what `save_checkpoint` returned, in place of what is there."""
        self._states = copy.deepcopy(state.get("_states", {}))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.sample(*args, **kwargs)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if not name.startswith("_"))
        return f"{type(self).__name__}({shown})"
