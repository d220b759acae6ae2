"""How calls may end: in time, and with an outcome that the state or a fault explains."""

from __future__ import annotations

from collections.abc import Iterator

from tests.chaos.caller import NOTHING_OPEN
from tests.chaos.record import STOPPED, Record
from tests.chaos.sidelog import OK, Life, Told

# Beside the deadline of a call: four ways to a server and back at 5 s each, since a put asks up to four things
# (units, admission, space, commit) and each waits for its answer that long beyond what it may wait for itself.
SLACK_S = 20.0

BROKEN = ("ConnectionLost", "DeadlineExceeded")

_EARLY_S = 0.05  # a deadline counts from when the server has the request, the log from before it is sent

# What needs no fault to happen. What needs one is named by the fault, and allowed to calls that it can have met.
_ALWAYS = {
    "put": (OK,),
    "score": (OK, "LeaseExpired"),  # whether the lease was over is looked at by `leases.early_ends`
    "draw": (OK,),
    "read": (OK, "StaleSampleError"),  # then its lease must be over too, see `leases.early_ends`
    "ack": (OK, "LeaseExpired"),
    "release": (OK, "LeaseExpired"),
    "clear": (OK,),
    "status": (OK,),
    "other": (OK, "GetMetaTimeout"),
}
# A wait for room or for samples may end without them, but not before its time.
_AFTER_WAITING = frozenset({("put", "CapacityExceeded"), ("draw", "GetMetaTimeout")})
# Data that a unit lost before it was put is stored again until the deadline; then the put ends, with nothing visible.
_AFTER_LOSING = frozenset({("put", "BlockLost"), ("score", "BlockLost")})


def endings(record: Record) -> Iterator[str]:
    """Every call ended, as it may end, before its deadline."""
    for life in record.lives.values():
        for first in life.calls:
            for call in (first, *first.again):
                yield from _ending(record, life, first, call)
            if first.again and first.last.outcome == "ConnectionLost":
                yield f"the outcome of a call stayed open, {len(first.again)} times asked for: {first}"


def _ending(record: Record, life: Life, first: Told, call: Told) -> Iterator[str]:
    if call.outcome is None:
        if life.name not in record.killed:
            yield f"a call never ended: {call}"
        return
    assert call.ended is not None
    if not _may_end(record, life, first, call):
        yield f"a call ended as it must not: {call}, under {_met(record, life, call) or 'no fault'}"
    late_s = call.ended - call.began - call.timeout_s - record.stopped.get(life.name, 0.0)
    if late_s > SLACK_S:
        yield f"a call ended {late_s:.1f} s after its deadline: {call}"


def _may_end(record: Record, life: Life, first: Told, call: Told) -> bool:
    assert call.outcome is not None and call.ended is not None
    ending = (first.op, call.outcome)
    if call.outcome in _ALWAYS.get(first.op, ()):
        return True
    if call is not first and (call.outcome == NOTHING_OPEN or ending in _AFTER_WAITING):
        # Who asks for the outcome of an earlier call learns that it changed nothing, or what that call waited for.
        return True
    in_time = call.ended - call.began >= call.timeout_s - _EARLY_S
    if in_time and ending in _AFTER_WAITING:
        return True
    if in_time and ending in _AFTER_LOSING:
        return any(one.meets(call) and record.reaches(one, life.name) for one in record.disturbances)
    if call.outcome == "StaleSampleError" and _of_a_rank(life, first):
        return True
    met = [one for one in record.disturbances if one.meets(call) and record.reaches(one, life.name)]
    if call.outcome in BROKEN and any(one.whom == STOPPED for one in met):
        return True  # its own deadlines passed while it was stopped, at any moment of the fault that stopped it
    return any(ending in one.allows for one in met)


def _met(record: Record, life: Life, call: Told) -> str:
    return ", ".join(
        one.fault for one in record.disturbances if one.meets(call) and record.reaches(one, life.name)
    )  # fmt: skip


def _of_a_rank(life: Life, call: Told) -> bool:
    """A rank that does not know whether its acknowledgement took effect asks for the step again.

    If it did, the rows of the step may have been cleared since. A rank that started again does not know, nor does one
    whose call broke off.
    """
    if call.op != "draw" or call.get("task") != "train":
        return False
    started_again = not life.name.endswith("-0")
    return started_again or any(other.last.outcome != OK for other in life.calls if other.op in ("ack", "draw"))
