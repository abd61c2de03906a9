"""What `nft monitor trace` says of packets, and how much of it is left out."""

from __future__ import annotations

import asyncio

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
    late = paths.add(rule, 3 * IDLE_NS + LATE_NS + 1)
    assert late is not None and late is not third
    assert late.key == (0, 0, 0)
