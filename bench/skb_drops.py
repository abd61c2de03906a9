"""What looking at the kernel's drops costs: `python -m bench.skb_drops [PACKETS [ROUNDS]]`, root.

A namespace whose loopback is sent PACKETS (50,000) UDP datagrams with the overlay's addresses, by
one thread, in each of ROUNDS (7) rounds and each row in turn; CPU time of a sendto in nanoseconds,
median, and the ratio to the same row without a look in the same round.

    dropped             nobody listens: each is dropped (NO_SOCKET)
    dropped, elsewhere  the same with addresses outside the overlay: the program turns them away
    received            a socket takes each: none is dropped, the program never runs
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import statistics
import sys
import time
from ipaddress import IPv4Network
from typing import Final

from tundp.lab.lab import Host, Lab
from tundp.linux.skb_drops import SkbDrops

NETWORK: Final = IPv4Network("10.5.0.0/16")
PORT: Final = 8285
ROWS: Final = {
    "dropped": ("10.5.1.1", False),
    "dropped, elsewhere": ("192.0.2.1", False),
    "received": ("10.5.1.1", True),
}


def burst(address: str, packets: int, *, has_reader: bool) -> float:
    """Nanoseconds a packet."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as reader,
    ):
        target = (address, 9)
        if has_reader:
            reader.bind(target)
            reader.setblocking(False)
        began = time.thread_time_ns()
        for at in range(packets):
            with contextlib.suppress(ConnectionRefusedError):
                sender.sendto(b"x" * 64, target)
            if has_reader and at % 16 == 15:
                for _ in range(16):
                    reader.recv(100)
        return (time.thread_time_ns() - began) / packets


async def measure(host: Host, packets: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Without and with a look, by row, of each round."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ROWS}
    for _ in range(rounds):
        for name, (address, has_reader) in ROWS.items():
            without = await host.call(burst, address, packets, has_reader=has_reader)
            drops = await host.call(SkbDrops, NETWORK, PORT)
            try:
                looking = asyncio.ensure_future(look(drops))
                looked = await host.call(burst, address, packets, has_reader=has_reader)
                looking.cancel()
            finally:
                drops.close()
            found[name].append((without, looked))
    return found


async def look(drops: SkbDrops) -> None:
    """As the commands do."""
    while True:
        await asyncio.to_thread(drops.read)
        await asyncio.sleep(0.05)


async def main(packets: int = 50_000, rounds: int = 7) -> None:
    """Measure and print."""
    async with Lab("skbdrops") as lab:
        host = await lab.host("h")
        for address in ("10.5.1.1/32", "192.0.2.1/32"):
            await host.run("ip", "addr", "add", address, "dev", "lo")
        found = await measure(host, packets, rounds)
    print(f"{'':<20} {'off ns':>8} {'on ns':>8} {'ratio':>7}")
    for name, pairs in found.items():
        off, on = (statistics.median(pair[at] for pair in pairs) for at in (0, 1))
        ratio = statistics.median(pair[1] / pair[0] for pair in pairs)
        print(f"{name:<20} {off:>8.0f} {on:>8.0f} {ratio:>7.3f}")


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:])))
