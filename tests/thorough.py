"""The tests that `make labs` runs, and `make test` leaves out for its time.

Each proves a further case of what a test beside it proves, in seconds of real daemons. A test that
is named on the command line is run all the same. `python -m tests.thorough` prints the files of
`make labs`: of those of the debugging commands all tests are run, of others what is left out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Final

IS_ALL: Final = os.environ.get("LABS") == "all"
"""Whether `make labs` runs."""
IS_EVERY: Final = os.environ.get("LABS") == "every"
"""Whether nothing is left out."""

DEBUGGING: Final = tuple(
    f"tests/netns/test_{name}.py"
    for name in (
        *("bugreport", "chaos", "cleanup", "doctor", "early", "explain", "handover"),
        *("handover_traffic", "hold", "hop_sockets", "kernel_stories", "matrix", "packets"),
        *("peer_tools", "peer_trace", "ping", "queues", "streams", "top", "under_load"),
    )
)
"""Files of which `make labs` runs everything."""

VARIANTS: Final[Mapping[str, tuple[str, ...]]] = {
    "tests/netns/test_life.py": ("reference",),
    "tests/netns/test_packets.py": ("mmsg",),
    "tests/netns/test_rebound.py": ("simple", "mmsg"),
    "tests/netns/test_first_packet.py": ("reference",),
    "tests/netns/test_paths.py": ("reference",),
    "tests/netns/test_peer_breaks.py": ("reference", "in silence", "answers are invalid"),
    "tests/netns/test_path_measuring.py": (
        *("simple", "1300", "1400 in silence, reference", "peer"),
        *("nft, without CAP_NET_RAW", "ufw", "firewalld"),
    ),
    "tests/netns/test_hop_sockets.py": ("simple", "mmsg", "mmsg --workers=2"),
    "tests/netns/test_sandboxed_daemon.py": ("asyncio", "iptables-legacy"),
    "tests/netns/test_notify.py": ("file",),
    "tests/netns/test_hostile_store.py": ("v2",),
    "tests/netns/test_peer_status.py": ("reference",),
    "tests/netns/test_start_after_change.py": ("udp",),
    "tests/store/test_reach.py": ("asyncio",),
    "tests/store/test_claim.py": ("asyncio",),
}
"""By file: values of parameters. Which engine, loop or API it is makes little difference there: the
tests in tests/twin and tests/engine hold the engines against each other."""

LEFT_OUT: Final[Mapping[str, tuple[str, ...]]] = {
    "tests/netns/test_handover.py": (
        "test_five_replacements_lose_nothing_and_write_nothing[reference]",
        "test_a_daemon_that_dies_while_it_hands_over_is_gone_on_for[SIGSTOP]",
        "test_a_successor_goes_on_alone_when_the_one_before_dies_or_hangs[stop-ready]",
        "test_a_successor_goes_on_alone_when_the_one_before_dies_or_hangs[die-paused]",
        "test_a_successor_goes_on_alone_when_the_one_before_dies_or_hangs[stop-paused]",
        "test_a_successor_goes_on_alone_when_the_one_before_dies_or_hangs[die-offer]",
        "test_a_successor_goes_on_alone_when_the_one_before_dies_or_hangs[hang-attached]",
        "test_a_successor_ends_when_the_one_before_goes_on",
        "test_upgrade_names_what_it_cannot_do",
    ),
    "tests/netns/test_handover_traffic.py": (
        "test_a_tcp_stream_at_full_speed_goes_on",
        "test_another_port_is_applied_and_another_network_refused",
        "test_ten_thousand_connections_hold_nothing_up",
        "test_other_flags_are_applied",
    ),
    "tests/netns/test_early.py": ("test_early_threads_lose_their_rights_with_the_rest",),
    "tests/netns/test_hold.py": (
        "test_what_other_settings_do_not_fit_is_gone_before_it_is_made_anew",
    ),
    "tests/netns/test_streams.py": (
        "test_a_stream_that_is_reset_says_so",
        "test_more_leaks_than_its_queue_has_room_for_are_counted_whole",
        "test_a_blind_decoy_is_refused",
        "test_a_path_that_does_not_answer_is_named",
    ),
    "tests/netns/test_top.py": (
        "test_rounds_add_up_to_the_packets_that_were_sent[reference]",
        "test_flows_add_up_and_the_filter_does_the_work[reference]",
        "test_what_cannot_be_read_in_time_is_counted_and_estimated",
        "test_stop_and_continue",
        "test_a_daemon_that_goes_and_comes_back",
        "test_a_daemon_that_hangs_is_named_and_holds_up_no_signal",
        "test_a_terminal_that_cannot_have_a_screen_gets_lines",
    ),
    "tests/netns/test_ping.py": (
        "test_an_interrupted_ping_prints_the_summary",
        "test_who_is_no_peer_is_refused_in_words",
        "test_a_host_that_is_gone_and_a_wrong_address_are_named",
        "test_a_tun_that_is_down_is_named_on_both_nodes",
        "test_a_black_hole_is_measured_to_the_byte",
        "test_without_a_daemon_here_the_underlay_is_asked",
        "test_a_pipe_nobody_reads_ends_it_quietly",
    ),
    "tests/netns/test_matrix.py": (
        "test_a_break_of_one_direction_between_two_peers_is_named",
        "test_peers_left_when_time_is_over_are_named_as_not_asked",
    ),
    "tests/netns/test_peer_tools.py": (
        "test_a_node_says_who_it_is[reference]",
        "test_a_node_says_how_it_reaches_its_peers[reference]",
        "test_the_other_nodes_stages_are_seen[reference]",
        "test_silence_is_no_refusal",
        "test_a_killed_reader_leaves_no_tap_on_either_node",
    ),
    "tests/netns/test_packets.py": (
        "test_wire_is_bare_ipv4_in_udp_8285_with_valid_checksums[reference]",
    ),
    "tests/netns/test_peer_trace.py": (
        "test_what_is_lost_between_the_nodes_is_said",
        "test_both_halves_of_both_ways_are_shown[reference]",
        "test_a_node_without_peer_tools_is_named",
        "test_a_killed_trace_leaves_no_tap_on_either_node",
    ),
    "tests/netns/test_hop_sockets.py": tuple(
        f"{name}[{engine}]"
        for name in (
            "test_a_slow_class_of_the_uplink_slows_its_own_peer_alone",
            "test_silent_neighbours_take_nothing_from_a_live_peer",
            "test_more_silent_neighbours_than_sockets",
            "test_a_blackhole_route_is_its_own_peers_loss",
        )
        for engine in ("reference", "simple", "mmsg", "mmsg --workers=2", "gso --workers=2")
    ),
    "tests/netns/test_explain.py": ("test_the_command_tells_by_its_exit_code",),
    "tests/netns/test_cleanup.py": ("test_sockets_of_killed_daemons_go_and_live_ones_stay",),
    "tests/netns/test_chaos.py": (
        "test_it_is_said_everywhere[auto]",
        "test_tools_that_ask_a_peer_do_not_blame_it[auto]",
        "test_its_end[auto]",
        "test_what_is_lost_is_what_is_missing[reference]",
        "test_copies_flips_sizes_and_order[reference]",
        "test_delay_and_the_peer_beside_it[reference]",
        "test_a_black_hole_narrows_the_path",
        "test_a_lease_that_moves_ends_it",
    ),
    "tests/netns/test_kernel_stories.py": (
        "test_a_datagram_that_never_left_is_the_sent_packets_story",
        "test_a_legacy_rule_is_named_by_its_counter",
        "test_a_flood_of_drops_does_not_stall_a_trace",
        "test_without_bpf_the_trace_goes_on_and_says_so",
    ),
    "tests/netns/test_bugreport.py": (
        "test_offline_with_pseudonyms",
        "test_without_a_daemon_root_or_programs",
        "test_to_a_pipe",
        "test_an_older_daemon",
    ),
    "tests/netns/test_queues.py": ("test_a_gap_is_bridged_as_long_as_is_said_and_no_longer",),
    "tests/netns/test_under_load.py": ("test_each_and_ten_at_once", "test_killed_at_any_moment"),
    "tests/netns/test_name_server.py": ("test_silent_name_server_and_a_lost_connection",),
    "tests/netns/test_full_disk.py": ("test_leases_on_disk_follow_again_once_there_is_room",),
    "tests/netns/test_lease_life.py": (
        "test_etcd_away_at_a_start_or_silent",
        "test_two_nodes_with_one_public_ip",
    ),
    "tests/netns/test_whose_lease.py": (
        "test_clones_of_a_machine_that_is_down_and_comes_back",
        "test_a_clone_that_starts_from_its_copied_lease_cache_writes_nothing_over",
    ),
    "tests/netns/test_sandboxed_daemon.py": (
        "test_the_admin_socket_comes_back_by_its_second_name",
    ),
    "tests/netns/test_capture.py": ("test_ten_captures_at_once_and_what_is_left_of_them",),
    "tests/netns/test_bugs.py": (
        "test_bug_in_the_reference_engine_costs_one_packet[_encapsulate-encap-send_failed]",
    ),
    "tests/netns/test_start.py": (
        "test_demo_interrupted_leaves_nothing[ping]",
        "test_demo_interrupted_leaves_nothing[daemons]",
    ),
    "tests/bench/test_bench.py": ("test_every_workload_and_pods_work",),
    "tests/store/test_manager.py": ("test_cached_leases_are_not_confirmed_by_a_store_that_hangs",),
}
"""By file: names, with their parameters or without."""


def is_left_out(node_id: str) -> bool:
    """Whether `make test` leaves a test out."""
    path, _, name = node_id.partition("::")
    left_out = LEFT_OUT.get(path, ())
    if name in left_out or name.partition("[")[0] in left_out:
        return True
    parameters = name.partition("[")[2].removesuffix("]")
    return any(
        re.search(rf"(^|-){re.escape(each)}(-|$)", parameters) for each in VARIANTS.get(path, ())
    )


def is_of_labs(node_id: str) -> bool:
    """Whether `make labs` runs a test."""
    return node_id.partition("::")[0] in DEBUGGING or is_left_out(node_id)


if __name__ == "__main__":
    print(*sorted({*DEBUGGING, *LEFT_OUT, *VARIANTS}))
