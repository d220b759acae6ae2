"""The fault matrix as a Markdown table: `python -m tests.chaos.matrix FILE…`, of what `--json` wrote.

Rows that a run does not inject name the tests of the suite that do; a test holds that those exist.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A fault of the matrix, and tests of the suite that inject it."""

    words: str
    tests: tuple[str, ...] = ()


ROWS: dict[str, Row] = {
    "F01": Row("consumer killed after its draw"),
    "F02": Row("consumer killed before it acknowledges", ("test_what_a_client_that_is_gone_held_goes_back_at_once",)),
    "F03": Row("consumer killed after its acknowledgement took effect"),
    "F04": Row("producer killed while it writes"),
    "F05": Row("producer killed between write and commit"),
    "F06": Row("producer killed after the commit, before the answer"),
    "F08": Row("controller killed while idle", ("test_samples_outlive_the_process_of_their_controller",)),
    "F09": Row("controller killed under load"),
    "F10": Row("controller killed with waiting draws", ("test_a_draw_that_waits_waits_on_after_a_restart",)),
    "F11": Row("unit killed", ("test_rows_outlive_the_process_of_their_unit",)),
    "F12": Row(
        "unit lost with its memory",
        (
            "test_a_unit_that_cannot_go_on_starts_empty",
            "test_rows_of_a_lost_block_are_named_and_wait_until_they_are_written_again",
        ),
    ),
    "F13": Row(
        "client forks",
        ("test_forked_children_attach_anew", "test_a_forked_child_neither_ends_nor_keeps_the_servers"),
    ),
    "F15": Row("consumer slower than its lease", ("test_a_renewed_lease_lasts",)),
    "F16": Row("memory or limits full", ("test_full_memory_is_an_error_with_both_sizes",)),
    "F17": Row("/dev/shm full", ("test_full_memory_is_an_error_with_both_sizes",)),
    "F18": Row(
        "messages lost, doubled, reordered, late, cut",
        ("test_a_put_whose_answer_got_lost", "test_a_draw_whose_answer_got_lost"),
    ),
    "F19": Row("malformed frames", ("test_damaged_messages_give_a_message_or_a_decode_error", "tests/fuzz")),
    "F20": Row("wrong or missing token", ("test_wrong_token_is_refused", "test_many_strangers_make_room_for_clients")),
    "F21": Row("oversize frames, lengths that lie", ("test_a_flood_of_a_stranger_takes_no_memory_and_little_time",)),
    "F22": Row(
        "sampler that raises or hands out foreign rows",
        ("test_a_sampler_that_fails_for_one_waiter_fails_neither_the_put_nor_the_others",),
    ),
    "F24": Row("torn tail of the journal", ("test_a_torn_last_record_is_dropped_whole",)),
    "F25": Row("damage inside the journal", ("test_one_flipped_bit_anywhere_inside_is_found",)),
    "F26": Row(
        "disk of the journal full",
        ("test_a_full_disk_refuses_and_loses_nothing", "test_a_full_journal_refuses_grants_and_takes_what_ends_them"),
    ),
    "F27": Row("clear while others read", ("test_a_pin_keeps_bytes_until_it_ends", "test_cleared_rows_are_never_read")),
    "F28": Row("stale handle", ("test_a_handle_of_a_cleared_row_is_refused_and_the_new_row_is_unchanged",)),
    "F29": Row("several start at once", ("test_of_several_that_start_one_starts_and_the_others_attach",)),
    "F30": Row("killed while it starts", ("test_a_starter_killed_halfway_is_in_nobodys_way",)),
    "F31": Row("an attached process closes", ("test_attach_by_address",)),
    "F32": Row("SIGTERM to a server", ("test_sigterm_is_an_orderly_restart",)),
    "F33": Row("zombie: stopped beyond its lease, then continued"),
    "F34": Row("reader killed with a view", ("test_views_are_private_and_pinned_until_they_are_gone",)),
    "F35": Row("process id used again", ("test_processes_are_told_apart_by_start_time",)),
    "F36": Row("payload damaged", ("test_every_flipped_bit_is_found", "test_damage_on_the_way_is_found")),
    "F37": Row("janitor beside a server that is restarted", ("test_the_janitor_spares_what_a_supervisor_may_restart",)),
    "F38": Row(
        "process with the embedded servers killed", ("test_what_a_killed_process_leaves_goes_at_the_next_start",)
    ),
}

_ROWS_OF_CLIENT = {"put": ("F04", "F05", "F06"), "draw": ("F01",), "ack": ("F02", "F03")}
_ROWS_OF_SERVER = {"controller": ("F08",), "unit-0": ("F11",)}
_IN_TURN = "SIGKILL at each journal and message step in turn"


def matrix(found: Sequence[dict[str, Any]]) -> str:
    """Fault, injected how, outcome, runs."""
    lines = ["| fault | injected how | outcome | runs |", "| --- | --- | --- | --- |"]
    for name, row in ROWS.items():
        injected = _injected(name, found)
        how = [f"{entry['fault']}: {entry['how']}" for entry in injected]
        if row.tests:
            how.append("by " + ", ".join(f"`{test}`" for test in row.tests))
        times = sum(entry["times"] for entry in injected)
        recovered, failed = (sum(entry[what] for entry in injected) for what in ("recovered", "failed"))
        outcome = "as the tests assert" if not times else "holds"
        if failed:
            outcome = f"{failed} times in a run with a violation"
        runs = f"{times} times, {recovered} reached" if times else "in the suite"
        lines.append(f"| {name} {row.words} | {'; '.join(how)} | {outcome} | {runs} |")
    return "\n".join([*lines, "", _below(found)])


def _below(found: Sequence[dict[str, Any]]) -> str:
    seeds = ", ".join(str(each["seed"]) for each in found)
    minutes, rounds = (sum(each[what] for each in found) for what in ("minutes", "rounds"))
    violations = sum(len(each["violations"]) for each in found)
    samples, calls = (sum(each["counts"].get(what, 0) for each in found) for what in ("samples", "calls"))
    again, expired = (sum(each["counts"].get(what, 0) for each in found) for what in ("redelivered", "expired"))
    lines = [
        f"Seeds {seeds}: {rounds} sessions in {minutes:.0f} minutes, {samples} samples, {calls} calls, {violations} "
        f"violations; {expired} deliveries ran out with their lease and {again} were delivered again for it.",
    ]
    for server in ("controller", "unit"):
        for entry in (each["recovery"][server] for each in found):
            if entry["kills"]:
                lines.append(
                    f"A killed {server} serves its first call after {entry['p50_s']} s (p99 {entry['p99_s']} s of "
                    f"{entry['kills']} kills), which is {entry['beyond_restart_p50_s']} s (p99 "
                    f"{entry['beyond_restart_p99_s']} s) after Python and the library were loaded."
                )
    return "\n".join(lines)


def _injected(name: str, found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the runs did for a row of the matrix, summed up by fault."""
    by_fault: dict[str, dict[str, Any]] = {}
    for each in found:
        for fault, entry in each["faults"].items():
            if name in entry["rows"].split():
                _add(by_fault, fault, entry["how"], entry["times"], entry["recovered"], entry["in failed rounds"])
        for entry in each.get("steps", {}).get("kills", ()):
            operation, victim, kills = entry["operation"], entry["victim"], entry["kills"]
            rows = _ROWS_OF_CLIENT.get(operation, ()) if victim == "client" else _ROWS_OF_SERVER[victim]
            if name in rows:
                what = f"kill client in {operation}" if victim == "client" else f"kill idle {victim.split('-')[0]}"
                failed = sum(text.startswith(f"{operation} with {victim} ") for text in each["steps"]["violations"])
                _add(by_fault, what, _IN_TURN, kills, kills, failed)
    return list(by_fault.values())


def _add(sums: dict[str, dict[str, Any]], fault: str, how: str, times: int, recovered: int, failed: int) -> None:
    entry = sums.setdefault(fault, {"fault": fault, "how": how, "times": 0, "recovered": 0, "failed": 0})
    for what, count in (("times", times), ("recovered", recovered), ("failed", failed)):
        entry[what] += count


if __name__ == "__main__":
    sys.stdout.write(matrix([json.loads(Path(name).read_text()) for name in sys.argv[1:]]) + "\n")
