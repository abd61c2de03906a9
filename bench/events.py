"""What looking at packets costs the engine: `python -m bench.events [SECONDS [ROUNDS]]`, root.

One engine (gso) with its TUN and socket in a namespace, and a sender beside it that writes UDP
packets into the overlay. CPU time of the packet thread for each packet, in nanoseconds, median of
ROUNDS (5) rounds of SECONDS (1) each, all rows in turn in every round; and the ratio to the first
row of the same round.

    off            nobody looks on: as it always is
    filter         a tap whose filter no packet passes
    trace          a tap of everything, 128 bytes of each packet, read as the daemon reads it
    capture        the same with whole packets
    drops          packets no lease covers, without a flight recorder ...
    drops-kept     ... and with one

`sent` rows are packets of 512 bytes that come one by one, `super` rows come as super-packets of 32.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Final

from tundp.choices import Engine, SourceCheck
from tundp.engine.base import EngineContext
from tundp.engine.native.engine import NativeEngine
from tundp.engine.recorder import open_recorder
from tundp.engine.taps import TapRequest
from tundp.lab.lab import Lab
from tundp.lease.fib import build_fib
from tundp.lease.model import Endpoint, Peer
from tundp.linux.tun import Tun
from tundp.linux.udp import open_udp
from tundp.observe.events import POLL_S
from tundp.wire.filter import parse
from tundp.wire.policy import Policy

PORT: Final = 8285
UDP_SEGMENT: Final = 103
PAYLOAD: Final = 484
SUPER: Final = 32
PEER: Final = "10.5.2.9"
NOBODY: Final = "10.5.77.9"
NETWORK: Final = IPv4Network("10.5.0.0/16")


@dataclass(frozen=True)
class Row:
    """One thing that is measured."""

    name: str
    target: str = PEER
    is_super: bool = False
    request: TapRequest | None = None
    is_kept: bool = False


TAPS: Final = {
    "off": None,
    "filter": TapRequest(filter=parse("host 192.0.2.99")),
    "trace": TapRequest(snap=128, size=1 << 22),
    "capture": TapRequest(snap=65535, size=1 << 24),
}
ROWS: Final = (
    *(Row(f"sent {name}", request=request) for name, request in TAPS.items()),
    *(Row(f"super {name}", is_super=True, request=request) for name, request in TAPS.items()),
    Row("drops", target=NOBODY),
    Row("drops-kept", target=NOBODY, is_kept=True),
)


class Rig:
    """The engine under measurement, its recorder on or off, and the sender."""

    def __init__(self, engine: NativeEngine, sender: socket.socket) -> None:
        self.engine = engine
        self._sender = sender

    async def run(self, row: Row, seconds: float) -> tuple[float, int]:
        """CPU nanoseconds of the packet thread a packet, and how many records were lost."""
        tap = None if row.request is None else self.engine.open_tap(row.request)
        sending = asyncio.create_task(asyncio.to_thread(self._send, row, seconds))
        await asyncio.sleep(seconds / 5)
        before, cpu_before = self._packets(), thread_cpu_ns()
        while not sending.done():
            if tap is not None:
                tap.read()
            await asyncio.sleep(POLL_S)
        packets, cpu_ns = self._packets() - before, thread_cpu_ns() - cpu_before
        lost = sum(tap.lost()) if tap is not None else 0
        if tap is not None:
            tap.close()
        if packets < 1000:
            raise SystemExit(f"{row.name}: only {packets} packets in {seconds} s")
        return cpu_ns / packets, lost

    def _packets(self) -> int:
        return self.engine.counters().encap.packets_in

    def _send(self, row: Row, seconds: float) -> None:
        sock = self._sender
        sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, PAYLOAD if row.is_super else 0)
        data = bytes(PAYLOAD * (SUPER if row.is_super else 1))
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for _ in range(64):
                with contextlib.suppress(OSError):
                    sock.sendto(data, (row.target, 9))


def thread_cpu_ns() -> int:
    """CPU time of the packet thread, by schedstat; user and system."""
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().startswith("tundp-gso"):
            return int((task / "schedstat").read_text().split()[0])
    raise SystemExit("there is no packet thread")


@contextlib.asynccontextmanager
async def rig(*, is_kept: bool) -> AsyncIterator[Rig]:
    """An engine with a peer that takes everything and answers nothing."""
    peer = Peer(
        subnet=IPv4Network("10.5.2.0/24"),
        endpoint=Endpoint(IPv4Address("192.0.2.2"), PORT),
        hop_id=2,
    )
    fib = build_fib([peer], own_subnet=IPv4Network("10.5.1.0/24"), generation=1)
    async with Lab(f"be{time.time_ns() % 100000}") as lab:
        left, right = await lab.host("left"), await lab.host("right")
        await lab.cable(left, "eth0", right, "eth0")
        await left.configure("eth0", "192.0.2.1/24")
        await right.configure("eth0", "192.0.2.2/24")
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
            stack.enter_context(await right.call(open_udp, IPv4Address("192.0.2.2"), PORT))
            sock = stack.enter_context(await left.call(open_udp, IPv4Address("192.0.2.1"), PORT))
            engine = NativeEngine(
                Engine.GSO,
                [sock],
                EngineContext(
                    fib=fib,
                    policy=Policy(
                        tun_address=int(IPv4Address("10.5.1.0")),
                        source_check=SourceCheck.COUNT,
                        port=PORT,
                    ),
                    loop=asyncio.get_running_loop(),
                    recorder=open_recorder(folder / "box", "bench") if is_kept else None,
                ),
            )
            stack.callback(engine.stop)
            tun = await left.call(Tun, "flannel%d", engine.tun_mode)
            stack.callback(tun.close)
            await left.sysctl(f"ipv6/conf/{tun.name}/disable_ipv6", 1)
            await left.configure(tun.name, "10.5.1.0/32", mtu=1472)
            await left.netlink.ensure_route(await left.index(tun.name), NETWORK)
            sender = stack.enter_context(await left.socket(socket.SOCK_DGRAM))
            engine.attach(tun)
            yield Rig(engine, sender)


async def measure(seconds: float, rounds: int) -> dict[str, list[tuple[float, int]]]:
    """Every row, in turn, `rounds` times."""
    found: dict[str, list[tuple[float, int]]] = {row.name: [] for row in ROWS}
    for number in range(rounds):
        for row in ROWS if number % 2 == 0 else reversed(ROWS):
            async with rig(is_kept=row.is_kept) as used:
                found[row.name].append(await used.run(row, seconds))
    return found


def show(found: dict[str, list[tuple[float, int]]]) -> None:
    """A table: nanoseconds, and the ratio to the row's own baseline, each a median."""
    print(f"{'row':<16} {'ns a packet':>12} {'of the first':>13} {'lost':>8}")
    bases = {"sent": "sent off", "super": "super off", "drops": "drops", "drops-kept": "drops"}
    for name, runs in found.items():
        base = found[bases[name.split()[0]]]
        ratios = [run[0] / first[0] for run, first in zip(runs, base, strict=True)]
        nanoseconds = statistics.median(run[0] for run in runs)
        lost = max(run[1] for run in runs)
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        print(
            f"{name:<16} {nanoseconds:>12.0f} {statistics.median(ratios):>13.2f} {lost:>8}"
            f"  ({spread})"
        )


def main() -> None:
    """Measure and print."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    show(asyncio.run(measure(seconds, rounds)))


if __name__ == "__main__":
    main()
