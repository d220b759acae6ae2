"""The rows of the fault matrix, by their names there, and the tests of the suite that inject them (file::test)."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """A fault, tests that inject it, and what of it nobody injects."""

    words: str
    tests: tuple[str, ...] = ()
    but: str = ""


_UNIT = "tests/unit"
_SUPERVISED = "tests/integration/test_supervised.py"
_PROCESSES = "tests/integration/test_processes.py"
_LEASES = f"{_UNIT}/ledger/test_leases.py"

ROWS: dict[str, Row] = {
    "F01": Row("consumer killed after its draw"),
    "F02": Row(
        "consumer killed before it acknowledges",
        (f"{_LEASES}::test_what_a_client_that_is_gone_held_goes_back_at_once",),
    ),
    "F03": Row(
        "consumer killed after its acknowledgement took effect",
        (f"{_LEASES}::test_an_acknowledgement_may_come_twice_and_counts_once",),
    ),
    "F04": Row("producer killed while it writes"),
    "F05": Row("producer killed between write and commit"),
    "F06": Row("producer killed after the commit, before the answer"),
    "F07": Row(
        "one unit of several fails in puts (a put is one block, at one unit)",
        (f"{_UNIT}/test_transfer.py::test_a_put_that_fails_leaves_nothing",),
    ),
    "F08": Row(
        "controller killed while idle",
        (
            f"{_SUPERVISED}::test_a_controller_that_was_killed_comes_back_where_it_was",
            f"{_SUPERVISED}::test_samples_outlive_the_process_of_their_controller",
        ),
    ),
    "F09": Row("controller killed under load"),
    "F10": Row(
        "controller killed with waiting draws", (f"{_SUPERVISED}::test_a_draw_that_waits_waits_on_after_a_restart",)
    ),
    "F11": Row(
        "unit killed",
        (
            f"{_SUPERVISED}::test_rows_outlive_the_process_of_their_unit",
            f"{_UNIT}/test_unit_recovery.py::test_a_kill_between_any_two_steps_changes_nothing",
        ),
    ),
    "F12": Row(
        "unit lost with its memory",
        (
            f"{_UNIT}/test_unit_recovery.py::test_a_unit_that_cannot_go_on_starts_empty",
            f"{_UNIT}/controller/test_recovery.py::"
            "test_rows_of_a_lost_block_are_named_and_wait_until_they_are_written_again",
        ),
    ),
    "F13": Row(
        "client forks",
        (
            f"{_PROCESSES}::test_forked_children_attach_anew",
            f"{_SUPERVISED}::test_a_forked_child_neither_ends_nor_keeps_the_servers",
        ),
    ),
    "F14": Row(
        "client forks while a call is in flight in another thread",
        (f"{_UNIT}/test_channel.py::test_a_forked_child_opens_its_own_connection",),
    ),
    "F15": Row(
        "consumer slower than its lease",
        (
            "tests/contract/test_leases.py::test_a_renewed_lease_lasts",
            f"{_LEASES}::test_an_overdue_lease_gives_its_rows_to_the_next_and_refuses_the_late_holder",
        ),
    ),
    "F16": Row(
        "memory or limits full",
        (
            "tests/contract/test_limits.py::test_a_put_that_waits_in_vain",
            "tests/contract/test_limits.py::test_memory_stays_bounded_when_producers_are_faster",
        ),
    ),
    "F17": Row("/dev/shm full", (f"{_UNIT}/test_arena.py::test_full_memory_is_an_error_with_both_sizes",)),
    "F18": Row(
        "messages lost, doubled, reordered, late, cut",
        (
            "tests/contract/test_outcomes.py::test_a_put_whose_answer_got_lost",
            "tests/contract/test_outcomes.py::test_a_draw_whose_answer_got_lost",
        ),
    ),
    "F19": Row(
        "malformed frames",
        (
            f"{_UNIT}/test_codec.py::test_damaged_messages_give_a_message_or_a_decode_error",
            "tests/fuzz/test_fuzz.py::test_broken_frames_harm_nobody",
        ),
    ),
    "F20": Row(
        "wrong or missing token, replayed introduction",
        (
            f"{_PROCESSES}::test_wrong_token_is_refused",
            f"{_UNIT}/test_security.py::test_a_recorded_introduction_opens_nothing",
            f"{_UNIT}/test_security.py::test_many_strangers_make_room_for_clients",
        ),
    ),
    "F21": Row(
        "oversize frames, lengths that lie",
        (
            f"{_UNIT}/test_connections.py::test_a_flood_of_a_stranger_takes_no_memory_and_little_time",
            "tests/fuzz/test_fuzz.py::test_numbers_of_rows_that_lie_claim_no_memory",
        ),
    ),
    "F22": Row(
        "sampler that raises or hands out foreign rows",
        (
            f"{_UNIT}/ledger/test_waiting.py::"
            "test_a_sampler_that_fails_for_one_waiter_fails_neither_the_put_nor_the_others",
            "tests/test_samplers.py::test_a_result_that_no_draw_may_have_fails_the_request_alone",
        ),
        "a sampler that never returns is not injected",
    ),
    "F23": Row("wall clock jumps, all processes stand still"),
    "F24": Row(
        "torn tail of the journal", (f"{_UNIT}/journal/test_damage.py::test_a_torn_last_record_is_dropped_whole",)
    ),
    "F25": Row(
        "damage inside the journal",
        (f"{_UNIT}/journal/test_damage.py::test_one_flipped_bit_anywhere_inside_is_found",),
    ),
    "F26": Row(
        "disk of journal or checkpoint full",
        (
            f"{_UNIT}/journal/test_space.py::test_a_full_disk_refuses_and_loses_nothing",
            f"{_UNIT}/test_unit_recovery.py::test_a_full_journal_refuses_grants_and_takes_what_ends_them",
            "tests/integration/test_checkpoint.py::TestInterrupted::test_a_save_that_fails_changes_nothing",
        ),
    ),
    "F27": Row(
        "clear while others read",
        (
            f"{_UNIT}/test_unit.py::test_a_pin_keeps_bytes_until_it_ends",
            f"{_UNIT}/test_transfer.py::test_cleared_rows_are_never_read",
        ),
    ),
    "F28": Row(
        "stale handle",
        (f"{_UNIT}/ledger/test_put.py::test_a_handle_of_a_cleared_row_is_refused_and_the_new_row_is_unchanged",),
    ),
    "F29": Row(
        "several start at once", (f"{_SUPERVISED}::test_of_several_that_start_one_starts_and_the_others_attach",)
    ),
    "F30": Row(
        "killed while it starts",
        ("tests/integration/test_lifecycle.py::test_a_starter_killed_halfway_is_in_nobodys_way",),
    ),
    "F31": Row("an attached process closes", (f"{_PROCESSES}::test_attach_by_address",)),
    "F32": Row("SIGTERM to a server", (f"{_SUPERVISED}::test_sigterm_is_an_orderly_restart",)),
    "F33": Row("zombie: stopped beyond its lease, then continued"),
    "F34": Row(
        "reader killed with a view",
        (
            f"{_UNIT}/test_unit_recovery.py::test_a_pin_outlives_the_unit_as_long_as_its_holder",
            f"{_UNIT}/test_transfer.py::test_views_are_private_and_pinned_until_they_are_gone",
        ),
    ),
    "F35": Row("process id used again", (f"{_UNIT}/test_folder.py::test_processes_are_told_apart_by_start_time",)),
    "F36": Row(
        "payload damaged",
        (
            f"{_UNIT}/test_checksums.py::test_every_flipped_bit_is_found",
            f"{_UNIT}/test_checksums.py::test_damage_on_the_way_is_found",
        ),
    ),
    "F37": Row(
        "janitor beside a server that is restarted",
        (
            f"{_UNIT}/test_folder.py::test_the_janitor_spares_what_a_supervisor_may_restart",
            f"{_SUPERVISED}::test_the_janitor_of_another_session_spares_a_server_that_is_restarted",
        ),
    ),
    "F38": Row(
        "process with the embedded servers killed",
        (
            f"{_PROCESSES}::test_what_a_killed_process_leaves_goes_at_the_next_start",
            "tests/integration/test_lifecycle.py::test_the_death_of_the_process_ends_its_embedded_session",
        ),
    ),
}
