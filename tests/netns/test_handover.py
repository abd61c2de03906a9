"""A daemon takes over from another: no packet is lost, and at every step one of them goes on."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import subprocess
import time
from collections.abc import AsyncIterator
from typing import Any, Self

import pytest

from tests.nodes import MakeOverlay, counters, link_of
from tests.wait import until
from tundp.admin_handover import fetch_handover
from tundp.daemon.lock import is_running
from tundp.errors import PlatformError
from tundp.instance import Instance
from tundp.lab.overlay import LabNode, OverlayLab

RATE = 1000


class Stream:
    """Numbered datagrams from one host to another at a steady rate, with what became of them."""

    def __init__(self, sender: socket.socket, receiver: socket.socket) -> None:
        self._sender, self._receiver = sender, receiver
        self.sent = 0
        self.seen: list[int] = []
        """Numbers in the order they came."""
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        asyncio.get_running_loop().add_reader(self._receiver.fileno(), self._receive)
        self._tasks = [asyncio.ensure_future(self._send())]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)
        with contextlib.suppress(AssertionError):
            await until(lambda: len(self.seen) >= self.sent, deadline_s=3)
        asyncio.get_running_loop().remove_reader(self._receiver.fileno())

    async def _send(self) -> None:
        began = time.monotonic()
        while not self._stop.is_set():
            due = int((time.monotonic() - began) * RATE)
            while self.sent < due:
                with contextlib.suppress(OSError):  # lost like any other
                    self._sender.send(struct.pack("!Q", self.sent) + bytes(56))
                self.sent += 1
            await asyncio.sleep(0.002)

    def _receive(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                self.seen.append(struct.unpack_from("!Q", self._receiver.recv(2048))[0])

    def verdict(self) -> dict[str, int]:
        """Counts of what must not be."""
        return {
            "lost": self.sent - len(set(self.seen)),
            "doubled": len(self.seen) - len(set(self.seen)),
            "out of order": sum(b < a for a, b in zip(self.seen, self.seen[1:], strict=False)),
        }


CLEAN = {"lost": 0, "doubled": 0, "out of order": 0}


@contextlib.asynccontextmanager
async def streams(overlay: OverlayLab) -> AsyncIterator[list[Stream]]:
    """One each way between the pods of nodes 1 and 2."""
    one, two = overlay.nodes[1], overlay.nodes[2]
    async with contextlib.AsyncExitStack() as stack:
        found = []
        for source, target in ((one, two), (two, one)):
            receiver = stack.enter_context(await target.pod.socket(socket.SOCK_DGRAM))
            receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
            receiver.bind((target.pod_address, 5201))
            sender = stack.enter_context(await source.pod.socket(socket.SOCK_DGRAM))
            sender.connect((target.pod_address, 5201))
            for sock in (receiver, sender):
                sock.setblocking(False)
            found.append(await stack.enter_async_context(Stream(sender, receiver)))
        await until(lambda: all(len(each.seen) > 100 for each in found))
        yield found


async def replace(overlay: OverlayLab, node: LabNode, *flags: str) -> subprocess.Popen[bytes]:
    """Start a successor on a node; the process before it, which may not have ended yet."""
    before = node.daemon
    await overlay.start_daemon(node, "--replace", *flags)
    return before


async def is_daemon(node: LabNode, pid: int) -> bool:
    """Whether this process answers as the node's daemon, and runs."""
    assert node.daemon.poll() is None, f"the successor ended:\n{node.log_tail()}"
    try:
        report = await fetch_handover(node.admin_socket, limit_s=5)
    except PlatformError:
        return False
    return bool(report["pid"] == pid and report["is_running"])


async def replaced(overlay: OverlayLab, node: LabNode, *flags: str) -> dict[str, Any]:
    """Replace a node's daemon, to the end; what the successor says of it."""
    before = await replace(overlay, node, *flags)
    await until(lambda: is_daemon(node, node.daemon.pid))
    assert await asyncio.to_thread(before.wait, 10) == 0
    report = await fetch_handover(node.admin_socket)
    taken: dict[str, Any] = report["taken_over"]
    assert taken["pid"] == before.pid
    return taken


@pytest.mark.parametrize("engine", ["auto", "reference"])
async def test_five_replacements_lose_nothing_and_write_nothing(
    make_overlay: MakeOverlay, engine: str
) -> None:
    flags = ("--healthz-port=10256", "--sandbox=on", f"--engine={engine}")
    async with make_overlay(*flags, pods=True) as overlay:
        one = overlay.nodes[1]
        link = await link_of(one.host, "flannel0")
        lease = (await overlay.read_leases())[f"{one.gateway.network}".replace("/", "-")]
        files = [overlay.lease_file, one.subnet_file]
        written = [path.stat().st_mtime_ns for path in files]
        async with streams(overlay) as both:
            for _ in range(5):
                count = (await counters(one))["encap"]["packets_in"]
                taken = await replaced(overlay, one, *flags)
                assert taken["gap_ms"] < 1000
                assert (await counters(one))["encap"]["packets_in"] >= count
        assert [each.verdict() for each in both] == [CLEAN, CLEAN]
        assert await link_of(one.host, "flannel0") == link
        assert [path.stat().st_mtime_ns for path in files] == written
        assert is_running(Instance(one.subnet_file))
        now = (await overlay.read_leases())[f"{one.gateway.network}".replace("/", "-")]
        assert now == lease
        status, _ = await one.get(10256, "/healthz")
        assert status == 200
