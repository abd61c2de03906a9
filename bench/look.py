"""What one look for obstacles costs: `python -m bench.look [PAIRS [ROUTES [RULES]]]`, root.

A namespace with PAIRS veth pairs (400), ROUTES routes (10,000) and RULES nft rules (2,000), of
which each drops one address. Of ten looks the median and the longest: time; the longest time the
event loop was held (CPU time of its thread between two wakes of a task that asks for one every
millisecond, so that other load does not count); CPU time of this process. Then the dumps and other
requests to the kernel of one look.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from tundp.lab.lab import Host, Lab
from tundp.linux.netlink import Netlink
from tundp.linux.obstacles.look import look
from tundp.linux.obstacles.scene import PeerPlace, Scene

LOOKS = 10
TICK_S = 0.001
SCENE = Scene(
    network=IPv4Network("10.5.0.0/16"),
    subnet=IPv4Network("10.5.1.0/24"),
    device="flannel0",
    is_open=True,
    is_tunnel=True,
    uplink="eth0",
    address=IPv4Address("192.0.2.1"),
    port=8285,
    peers=tuple(
        PeerPlace(IPv4Network((f"10.5.{n}.0", 24)), IPv4Address(f"192.0.2.{n}"))
        for n in range(2, 66)
    ),
    peer_count=64,
    accepts=True,
)


def ip(lines: Iterable[str]) -> None:
    """Carry out many `ip` commands in the calling thread's namespace."""
    with tempfile.NamedTemporaryFile("w") as batch:
        batch.writelines(f"{line}\n" for line in lines)
        batch.flush()
        subprocess.run(["ip", "-batch", batch.name], check=True)


def build(pairs: int, routes: int, rules: int) -> None:
    """Make the devices, routes and rules."""
    ip(
        [
            "link add eth0 type veth peer name far",
            "link set eth0 up",
            "link set far up",
            "addr add 192.0.2.1/24 dev eth0",
            "tuntap add dev flannel0 mode tun",
            "link set flannel0 up",
            "route add 10.5.0.0/16 dev flannel0",
            "link add cni0 type bridge",
            "addr add 10.5.1.1/24 dev cni0",
            "link set cni0 up",
        ]
    )
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1\n")
    ip(f"link add a{n} type veth peer name b{n}" for n in range(pairs))
    ip(f"link set a{n} up" for n in range(pairs))
    ip(f"route add 11.{n // 256}.{n % 256}.0/24 via 192.0.2.254" for n in range(routes))
    text = "\n".join(
        f"ip saddr 10.{6 + n // 65536}.{n // 256 % 256}.{n % 256} counter drop"
        for n in range(rules)
    )
    ruleset = (
        f"table inet many {{ chain f {{ type filter hook forward priority 0; {text}\n }}\n}}\n"
    )
    subprocess.run(["nft", "-f", "-"], input=ruleset, text=True, check=True)


async def held_s(done: asyncio.Event) -> float:
    """The most CPU time the loop's thread took between two wakes, until `done`."""
    longest = 0.0
    while not done.is_set():
        began = time.thread_time()
        await asyncio.sleep(TICK_S)
        longest = max(longest, time.thread_time() - began)
    return longest


async def measure() -> None:
    """Look, and print the figures."""
    rows: list[tuple[float, float, float]] = []
    async with Netlink() as netlink:
        await look(netlink, SCENE)
        dumps, requests = netlink.dumps, netlink.requests
        looked = await look(netlink, SCENE)
        dumps, requests = netlink.dumps - dumps, netlink.requests - requests
        for _ in range(LOOKS):
            done = asyncio.Event()
            watching = asyncio.ensure_future(held_s(done))
            began, cpu = time.monotonic(), time.process_time()
            await look(netlink, SCENE)
            took, cpu = time.monotonic() - began, time.process_time() - cpu
            done.set()
            rows.append((took, await watching, cpu))
    print(looked.summary.evidence)
    for name, values in zip(("look", "loop held", "CPU"), zip(*rows, strict=True), strict=True):
        print(f"{name:<12}{statistics.median(values) * 1e3:>8.1f}{max(values) * 1e3:>8.1f} ms")
    print(f"dumps {dumps}, other requests {requests}")


async def run(pairs: int, routes: int, rules: int) -> None:
    """Build the host, and measure inside it."""
    async with Lab(f"tundp-look-{os.getpid()}") as lab:
        host: Host = await lab.host("a")
        await host.call(build, pairs, routes, rules)
        print(f"{pairs} veth pairs, {routes} routes, {rules} nft rules")
        await host.call(lambda: asyncio.run(measure()))


def main() -> None:
    """See the module."""
    counts = [int(text) for text in sys.argv[1:]]
    asyncio.run(run(*(counts + [400, 10_000, 2_000][len(counts) :])))


if __name__ == "__main__":
    main()
