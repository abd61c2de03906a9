"""What `nft monitor trace` says of packets, and how much of it is left out."""

from __future__ import annotations

import asyncio

import pytest

from tundp.linux.nft_trace import IDLE_NS, LATE_NS, PATHS_MAX, NftTrace, Path, Paths


def lines(number: int, *, end: str = "drop") -> list[str]:
    """Those of one packet, as nft 1.0 writes them."""
    head = f"trace id {number:08x} ip filter FORWARD"
    return [
        f'{head} packet: iif "cni0" oif "flannel0" ip saddr 10.5.1.2 ip daddr 10.5.2.3'
        f" ip id {number} ip protocol udp ip length 29 udp sport 7000 udp dport 53 udp length 9",
        f"{head} rule ip daddr 10.5.2.3 {end} # handle 4 (verdict {end})",
    ]


async def paths_of(text: bytes, *, limit: int = 1 << 16) -> tuple[NftTrace, list[Path]]:
    reader = asyncio.StreamReader(limit=limit)
    reader.feed_data(text)
    reader.feed_eof()
    trace = NftTrace(reader, "tundp_trace_1")
    return trace, [path async for path in trace.paths()]


async def test_a_line_too_long_is_left_out_and_counted() -> None:
    """A rule may hold thousands of addresses."""
    (packet, rule), after = lines(1), lines(2)
    long = rule.replace("10.5.2.3", "{ " + ", ".join(["10.5.2.3"] * 1000) + " }")
    text = "".join(f"{line}\n" for line in (packet, long, *after))
    trace, found = await paths_of(text.encode(), limit=1000)
    assert [path.key[2] for path in found] == [2]
    assert trace.unread >= 1
    trace, found = await paths_of(text.encode())
    assert [path.key[2] for path in found] == [1, 2]
    assert trace.unread == 0


def test_packets_beyond_those_that_are_followed_are_counted_once() -> None:
    paths = Paths("tundp_trace_1")
    for number in range(PATHS_MAX + 3):
        paths.add(lines(number, end="accept")[0], 0)
    for number in range(PATHS_MAX + 3):
        paths.add(lines(number, end="accept")[1], 0)
    assert paths.lost == 3
    assert len(paths.idle(10**9)) == PATHS_MAX


def test_late_words_of_a_packet_are_put_to_it() -> None:
    """A busy machine's nft speaks of the rule long after it spoke of the packet."""
    paths = Paths("tundp_trace_1")
    packet, rule = lines(1)
    assert paths.add(packet, 0) is None
    (seen,) = paths.idle(IDLE_NS)
    assert seen.drop is None
    assert paths.add(rule, 5 * IDLE_NS) is seen
    assert seen.drop is not None and seen.key[2] == 1
    assert paths.idle(10 * IDLE_NS) == []


@pytest.mark.parametrize("what", ["10.5.0.0/16", "{ 10.5.2.3, 10.5.2.4 }", "!= 10.6.0.1"])
def test_a_rule_that_names_others_is_of_the_packet_all_the_same(what: str) -> None:
    paths = Paths("tundp_trace_1")
    packet, rule = lines(1)
    paths.add(packet, 0)
    (seen,) = paths.idle(IDLE_NS)
    assert paths.add(rule.replace("ip daddr 10.5.2.3", f"ip daddr {what}"), 5 * IDLE_NS) is seen
    assert seen.drop is not None


def test_packets_with_one_number_and_no_id_are_not_one_path() -> None:
    """The IP id of many is 0; those of a flow differ by nothing but their length, or not at all."""
    paths = Paths("tundp_trace_1")
    packet, rule = lines(1, end="accept")
    echo = packet.split(" ip protocol")[0].replace("ip id 1", "ip id 0")
    seen: list[Path] = []
    for number in range(1, 20):
        now = number * 1_000_000_000
        words = " ip protocol icmp ip length 84 icmp type echo-request icmp id 7 icmp sequence"
        paths.add(f"{echo}{words} {number}", now)
        paths.add(rule, now)
        seen += paths.idle(now + IDLE_NS)
    assert [each.fields["sequence"] for each in seen] == [str(n) for n in range(1, 20)]
    assert {len(each.steps) for each in seen} == {1}
    # Those that do not differ are one for LATE_NS at most.
    seen.clear()
    for number in range(40):
        now = (100 + number) * 1_000_000_000
        paths.add(packet, now)
        paths.add(rule, now)
        seen += paths.idle(now + IDLE_NS)
    assert max(len(each.steps) for each in seen) <= LATE_NS // 1_000_000_000 + 1


def test_another_packet_of_the_same_number_is_another_path() -> None:
    """Their numbers are made of addresses of kernel memory, which come again."""
    paths = Paths("tundp_trace_1")
    packet, rule = lines(1)
    paths.add(packet, 0)
    (first,) = paths.idle(IDLE_NS)
    paths.add(packet.replace("ip id 1", "ip id 2"), 2 * IDLE_NS)
    second = paths.add(rule, 2 * IDLE_NS)
    assert second is not None and second is not first
    assert (first.key[2], second.key[2], first.drop) == (1, 2, None)
    paths.add(packet, 3 * IDLE_NS)
    (third,) = paths.idle(4 * IDLE_NS)
    late = paths.add(rule, 3 * IDLE_NS + LATE_NS + 1)  # its first mention was at 3 * IDLE_NS
    assert late is not None and late is not third
    assert late.key == (0, 0, 0)
