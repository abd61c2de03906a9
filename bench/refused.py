"""What entries of others cost a daemon: `python -m bench.refused [REFUSED [BROKEN]]`, root.

One node on a private etcd, first alone with two leases, then beside REFUSED leases (20,000) that
cannot be peers, half of them with a PublicIP the kernel has to be asked about, and BROKEN keys
(100,000) that are no subnets. For each kind of event, 30 a second for some seconds: CPU time of the
daemon for one event (utime + stime of /proc), the longest answer of its health server, which no
event loop gives while it is busy, and the ratio to the store without the others' entries.

    moves     one lease changes its PublicIP
    asks      the same, each time to another address inside the network
    breaks    one key is written that breaks differently each time

Then how long a start takes beside them, the longest answer while it reads the first snapshot, and
`tundp status`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import statistics
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from tundp.lab.lab import Lab
from tundp.lab.overlay import PREFIX, LabNode, OverlayLab, make_directory

EVENTS_S = 10.0
PAUSE_S = 1 / 30
LOOK_S = 0.05
HEALTH_PORT = 10256
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
OPS = 128
"""Of a transaction: etcd's own limit."""


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def put_all(url: str, entries: Iterable[tuple[str, str]]) -> None:
    """Write many keys under the prefix, through etcd's JSON gateway."""
    left = iter(entries)
    while some := list(islice(left, OPS)):
        puts = [
            {"requestPut": {"key": b64(f"{PREFIX}/subnets/{key}"), "value": b64(value)}}
            for key, value in some
        ]
        body = json.dumps({"success": puts}).encode()
        with urllib.request.urlopen(f"{url}/v3/kv/txn", body, timeout=30):
            pass


def refused(count: int) -> Iterable[tuple[str, str]]:
    """Leases outside the network; every other one says that its node is inside."""
    for number in range(count):
        address = 0x0A06_0000 + (number << 2)
        subnet = ".".join(str(address >> shift & 255) for shift in (24, 16, 8, 0))
        inside = f"10.5.{128 + (number >> 8) % 64}.{number & 255}"
        value = {"PublicIP": inside if number % 2 else "192.0.2.9", "PublicIPv6": None}
        yield f"{subnet}-30", json.dumps(value)


def broken(count: int) -> Iterable[tuple[str, str]]:
    """Keys that are no subnets."""
    return ((f"bad-{number}", '{"PublicIP":"192.0.2.9"}') for number in range(count))


def moves(number: int) -> tuple[str, str]:
    """One lease at two addresses by turns."""
    return "10.5.200.0-24", json.dumps({"PublicIP": f"192.0.2.{201 + number % 2}"})


def asks(number: int) -> tuple[str, str]:
    """One lease at another address of the network each time."""
    return "10.5.201.0-24", json.dumps({"PublicIP": f"10.5.{210 + number // 250}.{number % 250}"})


def breaks(number: int) -> tuple[str, str]:
    """One value that breaks differently each time."""
    return "10.5.202.0-24", json.dumps({"PublicIP": f"nowhere {number}"})


Event = Callable[[int], tuple[str, str]]


def cpu_s(node: LabNode) -> float:
    """User and system time of a node's daemon so far."""
    fields = Path(f"/proc/{node.daemon.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def answer_s() -> float:
    """How long the health server takes for an answer."""
    began = time.monotonic()
    with urllib.request.urlopen(f"http://127.0.0.1:{HEALTH_PORT}/healthz", timeout=30) as answer:
        answer.read()
    return time.monotonic() - began


async def measure(overlay: OverlayLab, node: LabNode, event: Event) -> tuple[float, float]:
    """CPU seconds of one event, and the longest answer in seconds."""
    stop = time.monotonic() + EVENTS_S

    async def write() -> int:
        number = 0
        while time.monotonic() < stop:
            due = time.monotonic() + PAUSE_S
            await overlay.switch.call(put_all, overlay.etcd.url, [event(number)])
            number += 1
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        return number

    before = cpu_s(node)
    count = await write()
    cost_s = (cpu_s(node) - before) / count
    stop = time.monotonic() + EVENTS_S
    writing = asyncio.ensure_future(write())
    answers = []
    while not writing.done():
        answers.append(await node.host.call(answer_s))
        await asyncio.sleep(LOOK_S)
    await writing
    return cost_s, max(answers) - statistics.median(answers)


async def rows(overlay: OverlayLab, node: LabNode) -> dict[str, tuple[float, float]]:
    """What each kind of event costs now."""
    return {each.__name__: await measure(overlay, node, each) for each in (moves, asks, breaks)}


async def start(overlay: OverlayLab, node: LabNode, peers: int) -> tuple[float, float]:
    """Start the daemon again: seconds until it has its lease and its peers, longest answer."""
    began = time.monotonic()
    await overlay.start_daemon(
        node, "--iptables-forward-rules=false", f"--healthz-port={HEALTH_PORT}"
    )
    waiting = asyncio.ensure_future(node.wait_for_peers(peers))
    answers = [0.0]
    while not waiting.done():
        with contextlib.suppress(OSError):  # it does not listen yet
            answers.append(await node.host.call(answer_s))
        await asyncio.sleep(LOOK_S / 10)
    await waiting
    return time.monotonic() - began, max(answers) - statistics.median(answers)


async def run(refused_count: int, broken_count: int) -> None:
    """Build the node, measure, add the others' entries, measure again."""
    directory = make_directory()
    try:
        async with Lab(f"tundp-refused-{os.getpid()}") as lab:
            overlay = OverlayLab(lab, directory)
            await overlay.build(1)
            await overlay.start_etcd({"Network": "10.5.0.0/16"})
            node = overlay.nodes[1]
            url = overlay.etcd.url
            await overlay.switch.call(put_all, url, [moves(0)])
            clean_s, clean_late_s = await start(overlay, node, 1)
            clean = await rows(overlay, node)
            await overlay.switch.call(put_all, url, refused(refused_count))
            await overlay.switch.call(put_all, url, broken(broken_count))
            await node.stop_daemon()
            beside_s, late_s = await start(overlay, node, 1)
            await asyncio.sleep(15)  # the lease cache is written, and the start's garbage gone
            beside = await rows(overlay, node)
            show(refused_count, broken_count, clean, beside)
            print(
                f"start: {clean_s:.2f} s alone, {beside_s:.2f} s beside them; longest answer then"
                f" {clean_late_s * 1e3:.0f} ms, {late_s * 1e3:.0f} ms"
            )
            began = time.monotonic()
            status: dict[str, Any] = await node.status_document()
            took_s = time.monotonic() - began
            lines = len(status["refused"]) + len(status["bad_entries"])
            print(f"status: {took_s:.2f} s, {lines} of them listed")
            print(f"log: {len(node.log_path.read_text().splitlines())} lines in both starts")
            await overlay.close_etcd()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def show(
    refused_count: int,
    broken_count: int,
    clean: dict[str, tuple[float, float]],
    beside: dict[str, tuple[float, float]],
) -> None:
    print(f"beside {refused_count:,} refused leases and {broken_count:,} broken keys")
    print(f"{'event':<10}{'CPU ms':>9}{'beside':>9}{'ratio':>8}{'late ms':>10}{'beside':>9}")
    for name, (cost_s, late_s) in clean.items():
        cost, late = beside[name]
        print(
            f"{name:<10}{cost_s * 1e3:>9.2f}{cost * 1e3:>9.2f}{cost / cost_s:>7.2f}x"
            f"{late_s * 1e3:>10.1f}{late * 1e3:>9.1f}"
        )


def main() -> None:
    """See the module."""
    counts = [int(text) for text in sys.argv[1:]]
    asyncio.run(run(*(counts + [20_000, 100_000][len(counts) :])))


if __name__ == "__main__":
    main()
