"""The three consumption samplers without Ray or a running queue: what each would hand out, and why.

python -m recipe.samplers_simple_demo
"""

from __future__ import annotations

from transfer_queue.errors import InsufficientSamples, InvalidArgument
from transfer_queue.samplers import BaseSampler, DPSampler, GRPOSampler, SequentialSampler


def show(sampler: BaseSampler, ready: list[int], batch_size: int, why: str, **params: int) -> None:
    """Ask the sampler once and print the question, the answer and the reason."""
    given = "".join(f", {name}={value}" for name, value in params.items())
    print(f"  ready {ready}\n  sample(ready, {batch_size}{given})")
    try:
        chosen = [int(index) for index in sampler.sample(ready, batch_size, **params)]
        answer = f"-> {chosen}" if chosen else "waits: []"
    except InsufficientSamples as error:
        answer = f"waits: {error}"
    except InvalidArgument as error:
        answer = f"refused: {error}"
    print(f"    {answer}\n    {why}\n")


def sequential() -> None:
    sampler = SequentialSampler()
    print("SequentialSampler(): rows in the order they were put")
    show(sampler, [0, 1, 2, 3, 4, 5], 4, "the first four that are ready")
    show(sampler, [1, 4, 5], 2, "rows 0, 2 and 3 still miss a field or were consumed: nobody waits for them")


def grpo() -> None:
    sampler = GRPOSampler(num_n_samples=4)
    print("GRPOSampler(num_n_samples=4): whole groups, here rows 0-3, 4-7, 8-11 for three prompts")
    show(sampler, [0, 1, 2, 3, 4, 5, 6, 7], 4, "one complete group")
    show(
        sampler, [0, 1, 3, 4, 5, 6, 7, 8], 4, "row 2 is missing, so the group of rows 0-3 stays; the next one is whole"
    )
    show(sampler, [2, 3, 4, 5], 4, "four rows are ready, but of two prompts: a window never straddles two groups")
    show(sampler, [0, 1, 2, 3], 6, "no number of groups of 4 makes 6 rows")


def data_parallel() -> None:
    print("DPSampler(dp_rank, dp_size=2): one selection, split over the ranks")
    for rank in range(2):
        sampler = DPSampler(dp_rank=rank, dp_size=2)
        show(sampler, [0, 1, 2, 3, 4, 5, 6, 7], 2, f"rank {rank} gets slice {rank} of the first 2 x 2 rows")
    show(DPSampler(dp_size=2), [0, 1, 2], 2, "rank 0 gets its share when there is enough for both ranks")
    over_groups = DPSampler(dp_size=2, inner=GRPOSampler(num_n_samples=2))
    print("DPSampler(dp_rank, dp_size=2, inner=GRPOSampler(num_n_samples=2)): each rank gets whole groups")
    for rank in range(2):
        show(over_groups, [0, 1, 3, 4, 5, 6, 7], 2, "the group of rows 2-3 is incomplete", dp_rank=rank)
    print("  In a running queue the split of a dp_group_id is fixed by the first rank that asks, and its rows are")
    print("  consumed when every rank has its share.")


if __name__ == "__main__":
    sequential()
    grpo()
    data_parallel()
