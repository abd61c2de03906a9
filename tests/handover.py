"""Handovers for tests: successors real and fake, predecessors that go wrong, numbered packets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final, Self

from tests.nodes import log_contains
from tests.wait import until
from tundp.admin_handover import fetch_handover
from tundp.daemon.handover import protocol
from tundp.errors import PlatformError
from tundp.lab.overlay import LabNode, OverlayLab
from tundp.observe.codec import to_json

FAKE_PREDECESSOR: Final = Path(__file__).with_name("netns") / "fake_predecessor.py"
RATE = 1000


class Stream:
    """Numbered datagrams from one host to another at a steady rate, with what became of them."""

    def __init__(self, sender: socket.socket, receiver: socket.socket, rate: int) -> None:
        self._sender, self._receiver = sender, receiver
        self._rate = rate
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
            due = int((time.monotonic() - began) * self._rate)
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
async def streams(overlay: OverlayLab, *, rate: int = RATE) -> AsyncIterator[list[Stream]]:
    """One each way between the pods of nodes 1 and 2. rate: packets a second."""
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
            found.append(await stack.enter_async_context(Stream(sender, receiver, rate)))
        await until(lambda: all(len(each.seen) > 20 for each in found))
        yield found


async def replace(overlay: OverlayLab, node: LabNode, *flags: str) -> subprocess.Popen[bytes]:
    """Start a successor on a node; the process before it, which may not have ended yet."""
    before = node.daemon
    await overlay.start_daemon(node, "--replace", *flags)
    return before


async def refused(overlay: OverlayLab, node: LabNode, *flags: str) -> str:
    """Start a successor that must fail; the node's log. The daemon before stays its daemon."""
    before = await replace(overlay, node, *flags)
    successor, node.daemon = node.daemon, before
    assert await asyncio.to_thread(successor.wait, 60) == 1
    assert before.poll() is None
    return node.log_tail()


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


class FakeSuccessor:
    """Says what a successor says, as far as the test wants."""

    def __init__(self, node: LabNode) -> None:
        self._node = node
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(20)
        self._decoder = protocol.Decoder()
        self._fds: list[int] = []

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._sock.connect, str(self._node.admin_socket))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """What the kernel does for a process that is killed."""
        protocol.close_all(self._fds)
        self._fds.clear()
        self._sock.close()

    def take_fds(self) -> list[int]:
        """What was offered; the caller's to close."""
        fds, self._fds = self._fds, []
        return fds

    async def ask(self, **change: object) -> str:
        """The head of the answer to a Hello, and what follows if it is a refusal."""
        hello = {"schema": 1, "version": "t", "subnet_file": str(self._node.subnet_file)} | change
        body = json.dumps(hello).encode()
        head = f"POST /v1/handover HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        self._sock.sendall(head.encode() + body)
        return await asyncio.to_thread(self._read_head)

    def _read_head(self) -> str:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self._sock.recv(1)
        if b" 101 " not in head:
            while data := self._sock.recv(4096):
                head += data
        return head.decode()

    async def offered(self) -> protocol.Message:
        assert " 101 " in await self.ask()
        return await self.hear()

    async def hear(self) -> protocol.Message:
        while (message := self._decoder.next()) is None:
            received = await asyncio.to_thread(protocol.receive_with_fds, self._sock, 65536)
            assert received.data, "closed without a word"
            self._fds += received.fds
            self._decoder.feed(received.data)
        return message

    def say(self, message: protocol.Message) -> None:
        self._sock.sendall(protocol.encode(message))

    def say_bytes(self, data: bytes) -> None:
        self._sock.sendall(data)


@contextlib.asynccontextmanager
async def in_place_of(node: LabNode, step: str) -> AsyncIterator[subprocess.Popen[bytes]]:
    """Kill a node's daemon; until the block ends, one that goes wrong at a step has its place.

    It has the same descriptors, and says of itself what the daemon said.
    """
    async with FakeSuccessor(node) as fake:
        offer = await fake.offered()
        assert isinstance(offer, protocol.Offer)
        node.daemon.kill()
        await asyncio.to_thread(node.daemon.wait)
        fds = fake.take_fds()
        try:
            document = to_json(offer) | {"fds": dict(zip(offer.names, fds, strict=True))}
            with node.log_path.with_suffix(".fake").open("wb") as log:
                process = await node.host.popen(
                    [
                        sys.executable,
                        str(FAKE_PREDECESSOR),
                        str(node.admin_socket),
                        step,
                        json.dumps(document),
                    ],
                    log=log,
                    pass_fds=fds,
                )
            try:
                await until(lambda: log_contains(Path(log.name), "listening"))
                yield process
            finally:
                process.kill()
                await asyncio.to_thread(process.wait)
        finally:
            protocol.close_all(fds)
