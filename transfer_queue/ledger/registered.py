"""The samplers of the tasks, what they remember, and how both come back after a restart."""

from __future__ import annotations

import copy
from typing import Any, TypeAlias

from transfer_queue.errors import InvalidArgument
from transfer_queue.ledger.guarding import guarded, state_of
from transfer_queue.messages import Draw
from transfer_queue.samplers import BaseSampler, SequentialSampler, as_sampler, create_sampler
from transfer_queue.samplers.registry import SamplerLike
from transfer_queue.samplers.states import forget, keep, states_of

Owner: TypeAlias = "str | tuple[str, str] | None"
"""Whom a sampler serves: a task, a task whose requests name it, or every task without its own."""


class RegisteredSamplers:
    """A request's own sampler, else that of the task, else the default."""

    def __init__(self, default: SamplerLike | None) -> None:
        self._default = SequentialSampler() if default is None else as_sampler(default)
        self._by_task: dict[str, BaseSampler] = {}
        self._by_request: dict[tuple[str, str], BaseSampler] = {}
        self.made: dict[str | None, str | tuple[str, dict[str, Any]]] = {}  # by task: a description, or how to make it
        self.lost: dict[str | None, str] = {}  # samplers given as objects, before a restart
        self.states: dict[Owner, dict[str, Any]] = {}  # what those last remembered that are not here yet
        states_of(self._default).clear()  # an object that served another queue before

    def register(
        self, task: str | None, sampler: SamplerLike, by: tuple[str, dict[str, Any]] | None = None
    ) -> BaseSampler:
        """From now on this sampler serves the task, or all without their own. `by`: (name, arguments) it is made by."""
        made = as_sampler(sampler)
        if not any(made is known for known in self._live().values()):
            states_of(made).clear()
        self.lost.pop(task, None)
        self._give_state(task, made)
        self.made[task] = by or repr(made)
        if task is None:
            self._default = made
        else:
            self._by_task[task] = made
        return made

    def lose(self, task: str | None, described: str) -> None:
        """A sampler was given as an object, which nothing has kept: until it is given again, its draws raise."""
        self.lost[task] = described
        self.made.pop(task, None)

    def names(self) -> dict[str, str]:
        """What serves whom, for people."""
        return {"": repr(self._default), **{task: repr(sampler) for task, sampler in self._by_task.items()}}

    def choose(self, draw: Draw) -> BaseSampler:
        """The sampler of a draw. Raises if it is lost, or unknown."""
        name = draw.sampler_params.get("sampler")
        if name is None:
            self._check_lost(draw.task_name)
            return self._by_task.get(draw.task_name, self._default)
        owner = (draw.task_name, name)
        if owner not in self._by_request:
            made = create_sampler(name)
            self._give_state(owner, made)
            self._by_request[owner] = made
        return self._by_request[owner]

    def _check_lost(self, task: str) -> None:
        if not self.lost:
            return
        missing = task if task in self.lost else None if None in self.lost and task not in self._by_task else ""
        if missing != "":
            which = "the default sampler" if missing is None else f"the sampler of task {task!r}"
            raise InvalidArgument(
                f"{which}, {self.lost[missing]}, was given as an object and is gone since the controller was started "
                "again: register it again"
            )

    # ------------------------------------------------------------ what samplers remember

    def restore(self, draw: Draw, state: dict[str, Any] | None) -> None:
        """Note what the sampler of this draw remembered; given to it now, or when it is here again."""
        if state is not None:
            owner = self._owner(draw)
            self.states[owner] = state
            sampler = self._live().get(owner)
            if sampler is not None:
                self._give_state(owner, sampler)

    def restore_kept(self, draw: Draw, partition: str, batch_index: Any, kept: list[tuple[Any, Any]]) -> None:
        """Note which batches the sampler of this draw kept for ranks under one batch index."""
        owner = self._owner(draw)
        sampler = self._live().get(owner)
        states = self.states.setdefault(owner, {}).setdefault("_states", {}) if sampler is None else states_of(sampler)
        for rank, value in kept:
            keep(states, (partition, draw.task_name, rank, batch_index), copy.deepcopy(value))

    def forget_kept(self, partition: str, task: str, rank: Any, batch_index: Any) -> None:
        """A batch that is kept for a rank cannot be handed out again."""
        for states in self._all_states():
            forget(states, (partition, task, rank, batch_index))
        self._drop_empty()

    def clear_caches(self, partition: str) -> None:
        """The partition goes. Raises `SamplerError` if a sampler does."""
        for sampler in self._live().values():
            guarded(sampler, lambda sampler=sampler: sampler.clear_cache(partition))  # type: ignore[misc]
        for state in self.states.values():
            state.get("_states", {}).pop(partition, None)
        self._drop_empty()

    def state(self) -> dict[str, Any]:
        """Which tasks have samplers of their own and how to get them back, and what samplers remember."""
        states = {owner: state for owner, made in self._live().items() if (state := state_of(made)) is not None}
        states |= self.states
        made = [(task, how) for task, how in self.made.items() if isinstance(how, tuple)]
        objects = {task: how for task, how in self.made.items() if isinstance(how, str)}
        return {
            "made": made,
            "lost": sorted((self.lost | objects).items(), key=repr),
            "states": sorted(states.items(), key=lambda entry: repr(entry[0])),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Make the samplers that were registered by name again; the others are lost until they are given again."""
        self.lost = {task: described for task, described in state["lost"] if task not in self.made}
        self.states = dict(state["states"])
        for owner, sampler in self._live().items():
            if owner in self.states:
                self._give_state(owner, sampler)
            else:
                states_of(sampler).clear()
        for task, (name, arguments) in state["made"]:
            self.register(task, create_sampler(name, **arguments), (name, arguments))

    # ------------------------------------------------------------ inside

    def _owner(self, draw: Draw) -> Owner:
        name = draw.sampler_params.get("sampler")
        if name is not None:
            return draw.task_name, name
        return draw.task_name if draw.task_name in self._by_task or draw.task_name in self.lost else None

    def _live(self) -> dict[Owner, BaseSampler]:
        """The samplers that are here, by whom they serve."""
        known: dict[Owner, BaseSampler] = {None: self._default}
        for task, sampler in self._by_task.items():
            known[task] = sampler
        for lost in self.lost:
            known.pop(lost, None)
        for named, sampler in self._by_request.items():
            known[named] = sampler
        return known

    def _give_state(self, owner: Owner, sampler: BaseSampler) -> None:
        state = self.states.pop(owner, None)
        if state is not None:
            load = getattr(sampler, "load_state_dict", sampler.load_checkpoint)
            guarded(sampler, lambda: load(state))

    def _all_states(self) -> list[dict[Any, Any]]:
        known = [states_of(sampler) for sampler in self._live().values()]
        return known + [state["_states"] for state in self.states.values() if isinstance(state.get("_states"), dict)]

    def _drop_empty(self) -> None:
        for owner in [owner for owner, state in self.states.items() if state == {"_states": {}}]:
            del self.states[owner]
