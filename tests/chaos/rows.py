"""The rows of the fault matrix, by their names there, and the tests of the suite that inject them."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """A fault, what is to come of it, names of tests that inject it, and what of it nobody injects."""

    words: str
    outcome: str
    tests: tuple[str, ...] = ()
    but: str = ""


ROWS: dict[str, Row] = {
    "F01": Row("consumer killed after its draw", "its samples go to the next draw, counted as delivered again"),
    "F02": Row(
        "consumer killed before it acknowledges",
        "as F01; its views keep no memory",
        ("test_what_a_client_that_is_gone_held_goes_back_at_once",),
    ),
    "F03": Row(
        "consumer killed after its acknowledgement took effect",
        "stays consumed, nobody gets it again",
        ("test_an_acknowledgement_may_come_twice_and_counts_once",),
    ),
    "F04": Row("producer killed while it writes", "nothing of the put is visible, its bytes come back"),
    "F05": Row("producer killed between write and commit", "nothing of the put is visible, its bytes come back"),
    "F06": Row("producer killed after the commit, before the answer", "the put is there, whole"),
    "F07": Row(
        "one unit of several fails in puts (a put is one block, at one unit)",
        "that put raises and nothing of it is there; repeated, it is there once",
        ("test_a_put_that_fails_leaves_nothing",),
    ),
    "F08": Row(
        "controller killed while idle",
        "comes back where it was; clients reconnect by themselves",
        (
            "test_a_controller_that_was_killed_comes_back_where_it_was",
            "test_samples_outlive_the_process_of_their_controller",
        ),
    ),
    "F09": Row(
        "controller killed under load",
        "nothing acknowledged is lost, nothing is done twice, every call that broke off learns its outcome",
    ),
    "F10": Row(
        "controller killed with waiting draws",
        "they wait on and are served once",
        ("test_a_draw_that_waits_waits_on_after_a_restart",),
    ),
    "F11": Row(
        "unit killed",
        "takes over its memory; every committed sample reads as it was put",
        (
            "test_rows_outlive_the_process_of_their_unit",
            "test_a_kill_between_any_two_steps_changes_nothing",
        ),
    ),
    "F12": Row(
        "unit lost with its memory",
        "its samples are named by `audit()`, not ready, and waited for by nobody",
        (
            "test_a_unit_that_cannot_go_on_starts_empty",
            "test_rows_of_a_lost_block_are_named_and_wait_until_they_are_written_again",
        ),
    ),
    "F13": Row(
        "client forks",
        "the child has a connection of its own, the parent keeps its leases and views",
        (
            "test_forked_children_attach_anew",
            "test_a_forked_child_neither_ends_nor_keeps_the_servers",
        ),
    ),
    "F14": Row(
        "client forks while a call is in flight in another thread",
        "the child's and the parent's calls end in time",
        ("test_a_forked_child_opens_its_own_connection",),
    ),
    "F15": Row(
        "consumer slower than its lease",
        "renewed, the lease lasts; else it is delivered again, once and counted",
        (
            "test_a_renewed_lease_lasts",
            "test_an_overdue_lease_gives_its_rows_to_the_next_and_refuses_the_late_holder",
        ),
    ),
    "F16": Row(
        "memory or limits full",
        "puts wait, then raise `CapacityExceeded`; memory stays within its limit, acks and clears pass",
        (
            "test_a_put_that_waits_in_vain",
            "test_memory_stays_bounded_when_producers_are_faster",
        ),
    ),
    "F17": Row(
        "/dev/shm full",
        "`CapacityExceeded` with both sizes, never SIGBUS; what was there stays readable",
        ("test_full_memory_is_an_error_with_both_sizes",),
    ),
    "F18": Row(
        "messages lost, doubled, reordered, late, cut",
        "the same end as without",
        (
            "test_a_put_whose_answer_got_lost",
            "test_a_draw_whose_answer_got_lost",
        ),
    ),
    "F19": Row(
        "malformed frames",
        "refused, the next good request is served, no code runs",
        (
            "test_damaged_messages_give_a_message_or_a_decode_error",
            "test_broken_frames_harm_nobody",
        ),
    ),
    "F20": Row(
        "wrong or missing token, replayed introduction",
        "no answer; `NotAuthorized` at the own client",
        (
            "test_wrong_token_is_refused",
            "test_a_recorded_introduction_opens_nothing",
            "test_many_strangers_make_room_for_clients",
        ),
    ),
    "F21": Row(
        "oversize frames, lengths that lie",
        "refused before memory is taken",
        (
            "test_a_flood_of_a_stranger_takes_no_memory_and_little_time",
            "test_numbers_of_rows_that_lie_claim_no_memory",
        ),
    ),
    "F22": Row(
        "sampler that raises or hands out foreign rows",
        "fails that request alone",
        (
            "test_a_sampler_that_fails_for_one_waiter_fails_neither_the_put_nor_the_others",
            "test_a_result_that_no_draw_may_have_fails_the_request_alone",
        ),
        "a sampler that never returns is not injected",
    ),
    "F23": Row("wall clock jumps, all processes stand still", "nothing expires early or late"),
    "F24": Row(
        "torn tail of the journal",
        "cut at the last whole record, everything before it is there",
        ("test_a_torn_last_record_is_dropped_whole",),
    ),
    "F25": Row(
        "damage inside the journal",
        "refused, with the offset",
        ("test_one_flipped_bit_anywhere_inside_is_found",),
    ),
    "F26": Row(
        "disk of journal or checkpoint full",
        "`CapacityExceeded`, nothing done in part; goes on when there is space",
        (
            "test_a_full_disk_refuses_and_loses_nothing",
            "test_a_full_journal_refuses_grants_and_takes_what_ends_them",
            "test_a_save_that_fails_changes_nothing",
        ),
    ),
    "F27": Row(
        "clear while others read",
        "the old bytes or `StaleSampleError`, never another sample's",
        (
            "test_a_pin_keeps_bytes_until_it_ends",
            "test_cleared_rows_are_never_read",
        ),
    ),
    "F28": Row(
        "stale handle",
        "`StaleSampleError`, the new sample is untouched",
        ("test_a_handle_of_a_cleared_row_is_refused_and_the_new_row_is_unchanged",),
    ),
    "F29": Row(
        "several start at once",
        "one starts, the others attach",
        ("test_of_several_that_start_one_starts_and_the_others_attach",),
    ),
    "F30": Row(
        "killed while it starts",
        "the next start cleans up and succeeds",
        ("test_a_starter_killed_halfway_is_in_nobodys_way",),
    ),
    "F31": Row("an attached process closes", "the others work on", ("test_attach_by_address",)),
    "F32": Row("SIGTERM to a server", "an orderly restart", ("test_sigterm_is_an_orderly_restart",)),
    "F33": Row(
        "zombie: stopped beyond its lease, then continued",
        "`LeaseExpired`, nothing is written; the next holder's work stands",
    ),
    "F34": Row(
        "reader killed with a view",
        "its view stays as it was while it lives, then the bytes come back",
        (
            "test_a_pin_outlives_the_unit_as_long_as_its_holder",
            "test_views_are_private_and_pinned_until_they_are_gone",
        ),
    ),
    "F35": Row(
        "process id used again",
        "told apart by its start time",
        ("test_processes_are_told_apart_by_start_time",),
    ),
    "F36": Row(
        "payload damaged",
        "`DecodeError` with sample and field, where checksums are on",
        (
            "test_every_flipped_bit_is_found",
            "test_damage_on_the_way_is_found",
        ),
    ),
    "F37": Row(
        "janitor beside a server that is restarted",
        "what is being restarted is spared",
        (
            "test_the_janitor_spares_what_a_supervisor_may_restart",
            "test_the_janitor_of_another_session_spares_a_server_that_is_restarted",
        ),
    ),
    "F38": Row(
        "process with the embedded servers killed",
        "attached clients get `ConnectionLost`; the next start removes what is left",
        (
            "test_what_a_killed_process_leaves_goes_at_the_next_start",
            "test_the_death_of_the_process_ends_its_embedded_session",
        ),
    ),
}
