"""Who gets the last send sockets: real sockets, silent neighbours, a clock of our own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from ipaddress import IPv4Address

import pytest

from tundp.engine import hop_slots
from tundp.engine.hop_sockets import HopSockets
from tundp.lab.lab import Lab
from tundp.linux.udp import open_udp

MS = 1_000_000
PACKET = bytes(1400)


def endpoint(hop_id: int) -> tuple[str, int]:
    return str(IPv4Address("198.18.1.0") + hop_id), 8285


async def test_who_asks_often_puts_off_nobody(make_lab: Callable[[], Lab]) -> None:
    """A hop gets a stuck one's socket although others ask all the time."""
    async with make_lab() as lab, contextlib.AsyncExitStack() as stack:
        left, right = await lab.host("left"), await lab.host("right")
        await lab.cable(left, "eth0", right, "eth0")
        await left.configure("eth0", "198.18.0.1/16")
        # The kernel gives up a silent neighbour after three requests, and what waits for it, too:
        # on a busy machine that is before the sockets are full.
        await left.sysctl("ipv4/neigh/eth0/mcast_solicit", 1000)
        with await left.call(open_udp, IPv4Address("198.18.0.1"), 8285) as shared:
            sockets = HopSockets(shared)
            stack.callback(sockets.close)

            def fill() -> None:
                hop_id = 2
                while len(sockets) < hop_slots.SOCKETS_MAX:
                    for _ in range(1 if len(sockets) else 90):
                        sockets.send(PACKET, hop_id, endpoint(hop_id), 0)
                    hop_id += 1

            await left.call(fill)
            asking = endpoint(5000)
            # Twice a LOOK_NS, up to when the queues count as stuck.
            now_ns = 0
            while now_ns < hop_slots.STUCK_NS:
                with pytest.raises(BlockingIOError):
                    sockets.send(PACKET, 5000, asking, now_ns)
                now_ns += hop_slots.LOOK_NS // 2
            opened = sockets.opened
            for _ in range(4):
                with contextlib.suppress(BlockingIOError):
                    await left.call(sockets.send, PACKET, 5000, asking, now_ns)
                now_ns += hop_slots.LOOK_NS // 2
            assert sockets.opened == opened + 1, "no socket though some have been stuck for 0.1 s"
