"""Packets followed through a real netfilter: a long rule, and more packets than are followed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from ipaddress import IPv4Network
from pathlib import Path

from tests.netns.firewall_box import MakeBox
from tests.nodes import must_run
from tests.wait import until
from tundp.lab.lab import Host
from tundp.linux.nft_trace import Path as Way
from tundp.linux.nft_trace import nft_trace

NETWORK = IPv4Network("10.5.0.0/16")
TARGET = ("10.5.9.9", 9)
LISTED = 9000
BURST = 3000


async def make_ready(host: Host, folder: Path) -> None:
    """A way out for packets of the network, and a rule with many addresses that drops them."""
    await must_run(host, "ip", "link", "add", "way", "type", "veth", "peer", "name", "end")
    await must_run(host, "ip", "link", "set", "end", "up")
    await host.configure("way", "192.0.2.1/24")
    await must_run(host, "ip", "route", "add", str(NETWORK), "dev", "way")
    listed = ", ".join(f"10.7.{each >> 8}.{each & 255}" for each in range(0, 2 * LISTED, 2))
    rules = folder / "rules"
    rules.write_text(
        "table ip t { chain c { type filter hook output priority 0;"
        f" udp dport 9 ip daddr != {{ {listed} }} drop; }}; }}\n"
    )
    await must_run(host, "nft", "-f", str(rules))


async def test_a_long_rule_is_read_and_what_is_not_followed_is_counted(
    box: MakeBox, tmp_path: Path
) -> None:
    """A rule of 100 KB ends no trace; of 3,000 packets at once most are not marked."""
    found: list[Way] = []

    async def collect(ways: AsyncIterator[Way]) -> None:
        async for way in ways:
            found.append(way)  # noqa: PERF401  (as they come)

    async def follow(sender: socket.socket) -> int | None:
        async with nft_trace(NETWORK) as trace:
            collecting = asyncio.ensure_future(collect(trace.paths()))
            try:

                def is_seen() -> bool:
                    if collecting.done():
                        collecting.result()
                    send(sender, 1)  # nft may not listen yet
                    # A busy machine's nft names the rule long after the packet.
                    return bool(found) and found[0].drop is not None

                await until(is_seen, "a packet to meet the rule", deadline_s=30)
                send(sender, BURST)
                return await trace.unmarked()
            finally:
                collecting.cancel()
                await asyncio.gather(collecting, return_exceptions=True)

    async with box() as made:
        await make_ready(made.host, tmp_path)
        with await made.host.socket(socket.SOCK_DGRAM) as sender:
            unmarked = await made.do(follow, sender)
    assert found[0].drop is not None
    assert len(found[0].drop.text) > LISTED * len("10.7.0.0, "), found[0].drop.text[:200]
    assert unmarked is not None
    assert 0 < unmarked < BURST


def send(sender: socket.socket, count: int) -> None:
    for _ in range(count):
        with contextlib.suppress(PermissionError):  # what the kernel says of a rule's drop
            sender.sendto(b"x", TARGET)
