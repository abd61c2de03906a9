"""What silent neighbours cost a live peer: `python -m bench.neighbours`, or `make neighbours`.

Two nodes ping each other every 50 ms while node 1 sends to 0, 16, 32 and 300 peers whose
addresses nobody has, 100 packets a second to each; then 4,000 to a third node behind a 2 Mbit/s
class of node 1's uplink. One row an engine and case: pings lost each way, the longest row of lost
ones, packets of node 1 sent and dropped by name, and what the kernel dropped before the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from tundp.errors import LabError
from tundp.lab.lab import Lab
from tundp.lab.overlay import LabNode, OverlayLab, make_directory
from tundp.lab.traffic import PingStream

ENGINES = ("reference", "simple", "mmsg", "gso", "mmsg --workers=2", "gso --workers=2")
SILENT = (0, 16, 32, 300)
SECONDS = 6.0
NETWORK = {"Network": "10.4.0.0/14", "Backend": {"Type": "udp"}}
SLOW = (
    "qdisc add dev eth0 root handle 1: htb default 10",
    "class add dev eth0 parent 1: classid 1:10 htb rate 10gbit",
    "class add dev eth0 parent 1: classid 1:30 htb rate 2mbit",
    "qdisc add dev eth0 parent 1:30 handle 30: pfifo limit 3000",
    "filter add dev eth0 parent 1: protocol ip prio 1 u32 match ip dst 192.0.2.3/32 flowid 1:30",
)


def main() -> None:
    print(f"{'engine':<18}{'case':<14}{'lost there':>11}{'back':>9}{'longest':>9}  node 1")
    for engine in sys.argv[1:] or ENGINES:
        for silent in SILENT:
            asyncio.run(row(engine, silent))
        asyncio.run(row(engine, 0, is_slow=True))


async def row(engine: str, silent: int, *, is_slow: bool = False) -> None:
    directory = make_directory()
    try:
        async with Lab(f"bn{os.getpid()}") as lab:
            overlay = OverlayLab(lab, directory)
            await overlay.build(3 if is_slow else 2)
            targets = await start(overlay, engine, silent, is_slow=is_slow)
            one, two = overlay.nodes[1], overlay.nodes[2]
            sock = await one.host.socket(socket.SOCK_DGRAM)
            with chatter(sock, targets, per_s=4000 if is_slow else 100):
                await asyncio.sleep(1.0)
                async with (
                    PingStream(one.host, two.tunnel_address, pause_s=0.05) as there,
                    PingStream(two.host, one.tunnel_address, pause_s=0.05) as back,
                ):
                    await asyncio.sleep(SECONDS)
            case = "2 Mbit/s class" if is_slow else f"{silent} silent"
            gap_s = max(there.longest_gap_s, back.longest_gap_s)
            print(
                f"{engine:<18}{case:<14}{there.lost:>6}/{there.sent:<4}{back.lost:>4}/{back.sent:<4}"
                f"{gap_s:>7.2f} s  {await seen(one)}",
                flush=True,
            )
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def start(overlay: OverlayLab, engine: str, silent: int, *, is_slow: bool) -> list[str]:
    """Start a daemon on each node; the overlay addresses to send to."""
    live = len(overlay.nodes)
    leases = {f"10.5.{n}.0-24": {"PublicIP": f"192.0.2.{n}"} for n in range(1, live + 1)}
    for n in range(silent):
        leases[f"10.6.{n}.0-24" if n < 256 else f"10.7.{n - 256}.0-24"] = {
            "PublicIP": f"198.18.{n >> 8}.{n & 255}"
        }
    overlay.lease_file.write_text(json.dumps({"config": NETWORK, "leases": leases}))
    done = await overlay.nodes[1].host.run("ip", "route", "add", "198.18.0.0/15", "dev", "eth0")
    for command in SLOW if is_slow else ():
        done = await overlay.nodes[1].host.run("tc", *command.split())
    if done.returncode:
        raise LabError(done.stderr)
    for node in overlay.nodes.values():
        await overlay.start_daemon(node, *f"--engine={engine}".split())
    for node in overlay.nodes.values():
        await node.wait_for_peers(len(leases) - 1)
    if is_slow:
        return [overlay.nodes[3].tunnel_address]
    return [f"10.6.{n}.9" if n < 256 else f"10.7.{n - 256}.9" for n in range(silent)]


@contextlib.contextmanager
def chatter(sock: socket.socket, addresses: Sequence[str], *, per_s: int) -> Iterator[None]:
    """200 bytes to each address `per_s` times a second, from a thread."""
    stop = threading.Event()

    def send() -> None:
        began, rounds = time.monotonic(), 0
        while not stop.wait(0.005):
            due = int((time.monotonic() - began) * per_s)
            for _ in range(min(due - rounds, 50)):
                for address in addresses:
                    with contextlib.suppress(OSError):
                        sock.sendto(bytes(200), (address, 9))
            rounds = due

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        sock.close()


async def seen(node: LabNode) -> str:
    """What a node counted: sent, dropped by name, and dropped by the kernel at the TUN's queue."""
    counted = (await node.status_document())["counters"]["encap"]
    shown = await node.host.run("ip", "-j", "-s", "link", "show", "flannel0")
    (link,) = json.loads(shown.stdout)
    drops = ", ".join(f"{name} {count:,}" for name, count in counted["drops"].items())
    queue = link["stats64"]["tx"]["dropped"]
    return f"out {counted['packets_out']:,}, {drops or 'no drops'}; TUN queue {queue:,}"


if __name__ == "__main__":
    main()
