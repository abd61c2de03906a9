"""What changes of links and routes cost a daemon: `python -m bench.churn [PAIRS [ROUTES]]`, root.

A node with PAIRS veth pairs (400) and ROUTES routes (10,000), as a container host that speaks
BGP has them. For each kind of change, over some seconds: the daemon's CPU share in percent of a
core (utime + stime of /proc), then the longest and the median answer of its health server, asked
every 0.1 s, which no event loop gives while it is busy.

    idle          nothing changes
    links         a veth pair comes up or goes, ten changes a second
    containers    200 pairs with addresses started and stopped
    routes        1,000 routes added and deleted, over and over
"""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import sys
import time
import urllib.request
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

from tundp.lab.lab import Lab
from tundp.lab.overlay import LabNode, OverlayLab, make_directory

CPU_S = 20.0
LAG_S = 10.0
HEALTH_PORT = 10256
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Churn:
    """One node, and what is done to its kernel."""

    def __init__(self, node: LabNode, directory: Path) -> None:
        self.node = node
        self._batch = directory / "batch"

    async def ip(self, lines: Iterable[str]) -> None:
        """Carry out many `ip` commands."""
        await asyncio.to_thread(self._batch.write_text, "".join(f"{line}\n" for line in lines))
        done = await self.node.host.run("ip", "-batch", str(self._batch))
        if done.returncode != 0:
            raise SystemExit(done.stderr)

    async def idle(self) -> None:
        """Do nothing."""
        await asyncio.sleep(1.0)

    async def links(self) -> None:
        """Ten changes in a second: five pairs up, five gone."""
        for number in range(5):
            await self.ip([f"link add v{number} type veth peer name w{number}"])
            await self.ip([f"link set v{number} up"])
            await asyncio.sleep(0.1)
            await self.ip([f"link del v{number}"])
            await asyncio.sleep(0.1)

    async def containers(self) -> None:
        """Two hundred pairs with an address each, then none."""
        names = range(200)
        await self.ip(f"link add c{n} type veth peer name d{n}" for n in names)
        await self.ip(f"addr add 172.18.{n}.1/24 dev c{n}" for n in names)
        await self.ip(f"link set c{n} up" for n in names)
        await self.ip(f"link del c{n}" for n in names)

    async def routes(self) -> None:
        """A thousand routes, then none."""
        prefixes = [f"100.{64 + n // 256}.{n % 256}.0/24" for n in range(1000)]
        await self.ip(f"route add {each} via 192.0.2.253" for each in prefixes)
        await self.ip(f"route del {each} via 192.0.2.253" for each in prefixes)

    def cpu_s(self) -> float:
        """User and system time of the daemon so far."""
        fields = Path(f"/proc/{self.node.daemon.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * TICK_S

    def answer_s(self) -> float:
        """How long the health server takes for an answer."""
        began = time.monotonic()
        with urllib.request.urlopen(f"http://127.0.0.1:{HEALTH_PORT}/healthz", timeout=30):
            return time.monotonic() - began


async def measure(churn: Churn, change: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Print one row."""
    began, before = time.monotonic(), churn.cpu_s()
    rounds = await repeat(change, CPU_S)
    share = (churn.cpu_s() - before) / (time.monotonic() - began)
    changing = asyncio.ensure_future(repeat(change, LAG_S))
    answers: list[float] = []
    while not changing.done():
        answers.append(await churn.node.host.call(churn.answer_s))
        await asyncio.sleep(0.1)
    await changing
    print(
        f"{change.__name__:<12}{rounds:>8}{share:>9.1%}{statistics.median(answers) * 1e3:>11.1f}"
        f"{max(answers) * 1e3:>9.1f}",
        flush=True,
    )


async def repeat(change: Callable[[], Coroutine[Any, Any, None]], for_s: float) -> int:
    """Do it again and again; how often."""
    count, until = 0, time.monotonic() + for_s
    while time.monotonic() < until:
        await change()
        count += 1
    return count


async def run(pairs: int, routes: int) -> None:
    """Build the node, then print a row for each kind of change."""
    directory = make_directory()
    try:
        async with Lab(f"tundp-churn-{os.getpid()}") as lab:
            overlay = OverlayLab(lab, directory)
            await overlay.build(1)
            overlay.write_lease_file({"Network": "10.5.0.0/16"})
            node = overlay.nodes[1]
            churn = Churn(node, directory)
            await churn.ip(["route add default via 192.0.2.254"])
            await churn.ip(f"link add a{n} type veth peer name b{n}" for n in range(pairs))
            await churn.ip(f"link set a{n} up" for n in range(pairs))
            await churn.ip(
                f"route add 11.{n // 256}.{n % 256}.0/24 via 192.0.2.254" for n in range(routes)
            )
            flags = ("--iptables-forward-rules=false", f"--healthz-port={HEALTH_PORT}")
            await overlay.start_daemon(node, *flags)
            await overlay.wait_ready()
            print(f"{pairs} veth pairs, {routes} routes")
            print(f"{'change':<12}{'rounds':>8}{'CPU':>9}{'answer ms':>11}{'max ms':>9}")
            for change in (churn.idle, churn.links, churn.containers, churn.routes):
                await measure(churn, change)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def main() -> None:
    """See the module."""
    counts = [int(text) for text in sys.argv[1:]]
    asyncio.run(run(*(counts + [400, 10_000][len(counts) :])))


if __name__ == "__main__":
    main()
