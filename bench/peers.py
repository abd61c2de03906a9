"""What a packet costs by the number of peers that are sent to: `python -m bench.peers [SECONDS
[ROUNDS]]`, root.

One engine (gso) with its TUN and socket in a namespace, and a sender beside it whose packets go to
1, 10, 100 and 1,000 peers in turn, one packet each. CPU time of the packet thread for each packet,
in nanoseconds, median of ROUNDS (5) rounds of SECONDS (1) each, all rows in turn in every round,
and the ratio to one peer in the same round. The peers are addresses behind one router, so that the
kernel's neighbour table is none of it.

`super` rows are packets of 512 bytes that come as super-packets of 32, each one train to one peer.
`sent` rows come one by one, and leave so, with trains switched off: neighbours of one peer would
share a send with one peer, and never with several.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from bench.events import PAYLOAD, SUPER, UDP_SEGMENT, thread_cpu_ns
from tundp.choices import Engine, SourceCheck
from tundp.engine.base import EngineContext
from tundp.engine.native.engine import EngineSettings, NativeEngine
from tundp.lab.lab import Lab
from tundp.lease.fib import FIRST_HOP_ID, build_fib
from tundp.lease.model import Endpoint, Peer
from tundp.linux.offload import Offload
from tundp.linux.tun import Tun
from tundp.linux.udp import open_udp
from tundp.wire.policy import Policy

PORT: Final = 8285
COUNTS: Final = (1, 10, 100, 1000)
NETWORK: Final = IPv4Network("10.0.0.0/8")
OWN: Final = IPv4Network("10.0.0.0/24")
BEHIND: Final = IPv4Network("198.18.0.0/15")


def peers() -> list[Peer]:
    """The most there are: 10.0.1.0/24 at 198.18.0.1, and so on."""
    return [
        Peer(
            subnet=IPv4Network((int(OWN.network_address) + number * 256, 24)),
            endpoint=Endpoint(BEHIND[number], PORT),
            hop_id=FIRST_HOP_ID + number,
        )
        for number in range(1, max(COUNTS) + 1)
    ]


class Rig:
    """The engine, and who sends."""

    def __init__(self, engine: NativeEngine, sender: socket.socket) -> None:
        self._engine = engine
        self._sender = sender

    async def run(self, count: int, seconds: float, *, is_super: bool) -> float:
        """CPU nanoseconds of the packet thread a packet, sent to so many peers in turn."""
        targets = [(str(peer.subnet[9]), 9) for peer in peers()[:count]]
        sending = asyncio.create_task(
            asyncio.to_thread(self._send, targets, seconds, is_super=is_super)
        )
        await asyncio.sleep(seconds / 5)
        before, cpu_before = self._engine.counters(), thread_cpu_ns()
        await sending
        after, cpu_ns = self._engine.counters(), thread_cpu_ns() - cpu_before
        packets = after.encap.packets_in - before.encap.packets_in
        dropped = after.encap.dropped - before.encap.dropped
        if packets < 1000 or dropped > packets / 100:
            raise SystemExit(f"{count} peers: {packets} packets, {dropped} dropped")
        return cpu_ns / packets

    def _send(self, targets: Sequence[tuple[str, int]], seconds: float, *, is_super: bool) -> None:
        sock = self._sender
        sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, PAYLOAD if is_super else 0)
        data = bytes(PAYLOAD * (SUPER if is_super else 1))
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for target in targets:
                with contextlib.suppress(OSError):
                    sock.sendto(data, target)


@contextlib.asynccontextmanager
async def rig(disabled: frozenset[Offload] = frozenset()) -> AsyncIterator[Rig]:
    """An engine with all the peers; they take everything and answer nothing."""
    fib = build_fib(peers(), own_subnet=OWN, generation=1)
    async with Lab(f"bq{time.time_ns() % 100000}") as lab:
        left, right = await lab.host("left"), await lab.host("right")
        await lab.cable(left, "eth0", right, "eth0")
        await left.configure("eth0", "192.0.2.1/24")
        await right.configure("eth0", "192.0.2.2/24")
        await left.route(str(BEHIND), via="192.0.2.2")
        await right.run("ip", "route", "add", "local", str(BEHIND), "dev", "lo")
        with contextlib.ExitStack() as stack:
            stack.enter_context(await right.call(open_udp, IPv4Address("0.0.0.0"), PORT))
            sock = stack.enter_context(await left.call(open_udp, IPv4Address("192.0.2.1"), PORT))
            engine = NativeEngine(
                Engine.GSO,
                [sock],
                EngineContext(
                    fib=fib,
                    policy=Policy(
                        tun_address=int(OWN.network_address),
                        source_check=SourceCheck.COUNT,
                        port=PORT,
                    ),
                    loop=asyncio.get_running_loop(),
                ),
                EngineSettings(disabled=disabled),
            )
            stack.callback(engine.stop)
            tun = await left.call(Tun, "flannel%d", engine.tun_mode)
            stack.callback(tun.close)
            await left.sysctl(f"ipv6/conf/{tun.name}/disable_ipv6", 1)
            await left.configure(tun.name, "10.0.0.0/32", mtu=1472)
            await left.netlink.ensure_route(await left.index(tun.name), NETWORK)
            sender = stack.enter_context(await left.socket(socket.SOCK_DGRAM))
            engine.attach(tun)
            yield Rig(engine, sender)


async def measure(seconds: float, rounds: int) -> dict[str, list[float]]:
    """Every row, in turn, `rounds` times."""
    kinds = [
        ("super", True, frozenset[Offload]()),
        ("sent", False, frozenset({Offload.UDP_SEGMENT})),
    ]
    found: dict[str, list[float]] = {f"{kind} {n}": [] for kind, _, _ in kinds for n in COUNTS}
    for kind, is_super, disabled in kinds:
        async with rig(disabled) as used:
            for number in range(rounds):
                for count in COUNTS if number % 2 == 0 else reversed(COUNTS):
                    cost = await used.run(count, seconds, is_super=is_super)
                    found[f"{kind} {count}"].append(cost)
    return found


def main() -> None:
    """Measure and print."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    found = asyncio.run(measure(seconds, rounds))
    print(f"{'row':<12} {'ns a packet':>12} {'of one peer':>12}")
    for name, costs in found.items():
        ratios = [a / b for a, b in zip(costs, found[f"{name.split()[0]} 1"], strict=True)]
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        print(
            f"{name:<12} {statistics.median(costs):>12.0f} {statistics.median(ratios):>12.2f}"
            f"  ({spread})"
        )


if __name__ == "__main__":
    main()
