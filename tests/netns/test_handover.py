"""A daemon takes over from another: no packet is lost, and at every step one of them goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

import pytest

from tests.nodes import MakeOverlay, answers, counters, link_of, log_contains, must_run
from tests.wait import until
from tundp.admin_handover import fetch_handover
from tundp.daemon.handover import protocol
from tundp.daemon.lock import is_running
from tundp.errors import PlatformError
from tundp.instance import Instance
from tundp.lab.overlay import LabNode, OverlayLab
from tundp.observe.codec import to_json

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


async def goes_on(node: LabNode, text: str) -> None:
    """The daemon of before is there, all of it, and said why."""
    await until(lambda: log_contains(node, text))
    await until(lambda: is_daemon(node, node.daemon.pid))
    await until(lambda: log_contains(node, "; going on"))


async def a_successor_that_fails(node: LabNode) -> None:
    """At each step in turn, by death, by silence, and by nonsense."""
    async with FakeSuccessor(node) as fake:
        assert " 101 " in await fake.ask()
    await goes_on(node, "it went away before it was ready")
    async with FakeSuccessor(node) as fake:
        assert isinstance(await fake.offered(), protocol.Offer)
        fake.say(protocol.Refuse(why="the test says so"))
        assert isinstance(await fake.hear(), protocol.Withdrawn)
    await goes_on(node, "it refuses: the test says so")
    async with FakeSuccessor(node) as fake:
        await fake.offered()
        fake.say_bytes(b"GET / HTTP/1.1\r\n\r\n")
        assert isinstance(await fake.hear(), protocol.Withdrawn)
    await goes_on(node, "are the most")
    async with FakeSuccessor(node) as fake:
        await fake.offered()
        fake.say(protocol.Gone())
        assert isinstance(await fake.hear(), protocol.Withdrawn)
    await goes_on(node, "a successor says no Gone")
    async with FakeSuccessor(node) as fake:
        await fake.offered()
        fake.say(protocol.Ready())
        assert isinstance(await fake.hear(), protocol.Paused)
    await goes_on(node, "it went away before it carried packets")
    async with FakeSuccessor(node) as fake:
        await fake.offered()
        for may_try_again in (True, True, False):
            fake.say(protocol.Ready())
            assert isinstance(await fake.hear(), protocol.Paused)
            withdrawn = await fake.hear()
            assert isinstance(withdrawn, protocol.Withdrawn)
            assert withdrawn.may_try_again is may_try_again
            fake.say(protocol.Attached(gap_ns=1))  # too late
    await goes_on(node, "it did not carry packets within 0.25 s")
    async with FakeSuccessor(node) as fake:
        await fake.offered()
        fake.say(protocol.Ready())
        assert isinstance(await fake.hear(), protocol.Paused)
        # It sees both at once.
        node.daemon.send_signal(signal.SIGSTOP)
        fake.say(protocol.Attached(gap_ns=1))
        fake.close()
        node.daemon.send_signal(signal.SIGCONT)
    await until(lambda: log_contains(node, "it went away before it carried packets", times=2))
    await until(lambda: is_daemon(node, node.daemon.pid))


async def test_a_successor_that_fails_at_any_step_costs_no_packet(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay(pods=True) as overlay:
        one = overlay.nodes[1]
        pid = one.daemon.pid
        lease = overlay.lease_file.stat().st_mtime_ns
        async with streams(overlay) as both:
            await a_successor_that_fails(one)
            assert one.daemon.pid == pid
            assert one.daemon.poll() is None
            await replaced(overlay, one)  # as if nothing had happened
        assert [each.verdict() for each in both] == [CLEAN, CLEAN]
        assert overlay.lease_file.stat().st_mtime_ns == lease


async def test_who_may_not_take_over_is_told_why(make_overlay: MakeOverlay) -> None:
    async with make_overlay(nodes=1) as overlay:
        one = overlay.nodes[1]
        for change, text in (
            ({"schema": 2}, "restart the daemon instead"),
            ({"subnet_file": "/run/other.env"}, "not of /run/other.env"),
            ({"version": 3}, "version is not of type string"),
        ):
            async with FakeSuccessor(one) as fake:
                answer = await fake.ask(**change)
                assert " 409 " in answer
                assert text in answer
        async with FakeSuccessor(one) as fake, FakeSuccessor(one) as second:
            await fake.offered()
            assert "another handover is under way" in await second.ask()
        await until(lambda: log_contains(one, "it went away"))
        for flags, text in (
            (("--workers=2",), "--workers=2 cannot be taken over"),
            (("--engine=simple",), "it has vnet headers"),
            ((f"--subnet-file={one.directory}/other.env",), "not of"),
        ):
            assert text in await refused(overlay, one, *flags)
            await until(lambda: is_daemon(one, one.daemon.pid))


async def test_without_a_daemon_to_take_over_from_a_start_is_a_normal_one(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay("--replace", nodes=1) as overlay:
        one = overlay.nodes[1]
        assert await log_contains(one, "a normal start")
        assert (await fetch_handover(one.admin_socket))["taken_over"] is None
        other = f"--admin-socket={one.directory}/other.sock"
        assert "nobody answers on" in await refused(overlay, one, other)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_daemon_that_dies_while_it_hands_over_is_gone_on_for(
    make_overlay: MakeOverlay, signum: signal.Signals
) -> None:
    async with make_overlay(pods=True) as overlay:
        one = overlay.nodes[1]
        lease = overlay.lease_file.stat().st_mtime_ns
        async with streams(overlay, rate=100) as both:
            before = await replace(overlay, one)
            await until(lambda: log_contains(one, "taking over from process"))
            before.send_signal(signum)
            await until(lambda: is_daemon(one, one.daemon.pid))
            assert await asyncio.to_thread(before.wait, 10) == -signal.SIGKILL
            assert is_running(Instance(one.subnet_file))
            seen = [len(each.seen) for each in both]
            await until(lambda: all(len(s.seen) > n + 20 for s, n in zip(both, seen, strict=True)))
        assert [each.verdict() for each in both] == [CLEAN, CLEAN]
        assert overlay.lease_file.stat().st_mtime_ns == lease


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
                        str(Path(__file__).with_name("fake_predecessor.py")),
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


@pytest.mark.parametrize(
    "step",
    ["die-offer", "stop-ready", "die-paused", "stop-paused", "die-attached", "hang-attached"],
)
async def test_a_successor_goes_on_alone_when_the_one_before_dies_or_hangs(
    make_overlay: MakeOverlay, step: str
) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        lease = overlay.lease_file.stat().st_mtime_ns
        async with in_place_of(one, step) as before:
            await replace(overlay, one)
            await until(lambda: is_daemon(one, one.daemon.pid))
            # Dead, not forgotten: it must not wake up beside the new one.
            assert await asyncio.to_thread(before.wait, 10) == -signal.SIGKILL
        assert is_running(Instance(one.subnet_file))
        await until(lambda: answers(two.host, one.tunnel_address))
        assert overlay.lease_file.stat().st_mtime_ns == lease


@pytest.mark.parametrize(
    ("step", "text"),
    [
        ("refuse", "does not hand over: the test says so"),
        ("old", "is of a version that cannot hand over"),
        ("die-request", "has just ended"),
        ("withdraw-ready", "goes on: the test says so"),
        ("withdraw-attached", "goes on: the test says so"),
        ("garbage-paused", "no JSON object"),
        ("close-ready", "has closed the connection and lives"),
        ("stop-request", "is stopped: kill -CONT"),
    ],
)
async def test_a_successor_ends_when_the_one_before_goes_on(
    make_overlay: MakeOverlay, step: str, text: str
) -> None:
    async with make_overlay(nodes=1) as overlay:
        one = overlay.nodes[1]
        async with in_place_of(one, step) as before:
            await replace(overlay, one)
            assert await asyncio.to_thread(one.daemon.wait, 60) == 1
            assert text in one.log_tail()
            assert before.poll() is None or step == "die-request"
        # A start is a normal one again.
        await overlay.start_daemon(one)
        await overlay.wait_ready()


async def test_upgrade_says_what_became_of_it(make_overlay: MakeOverlay) -> None:
    async with make_overlay(pods=True) as overlay:
        one = overlay.nodes[1]
        before = one.daemon
        argv = [sys.executable, "-m", "tundp", "upgrade", f"--admin-socket={one.admin_socket}"]
        async with streams(overlay) as both:
            done = json.loads(await must_run(one.host, *argv, "--json"))
            try:
                assert await asyncio.to_thread(before.wait, 10) == 0
                assert done["before_pid"] == before.pid
                report = await fetch_handover(one.admin_socket)
                assert (report["pid"], report["is_running"]) == (done["pid"], True)
                assert done["gap_ms"] == report["taken_over"]["gap_ms"]
                assert done["packets"].keys() == done["packets_before"].keys()
                assert all(done["packets"][k] >= n for k, n in done["packets_before"].items())
                # It is the same daemon: flags, log and all.
                assert await log_contains(one, f"took over from process {before.pid}")
                words = Path(f"/proc/{done['pid']}/cmdline").read_bytes().decode().split("\0")
                assert f"--subnet-file={one.subnet_file}" in words
                again = json.loads(await must_run(one.host, *argv, "--json"))
                assert again["before_pid"] == done["pid"]
                done = again
            finally:
                os.kill(done["pid"], signal.SIGTERM)
        assert [each.verdict() for each in both] == [CLEAN, CLEAN]


async def test_upgrade_names_what_it_cannot_do(make_overlay: MakeOverlay) -> None:
    async with make_overlay(nodes=1) as overlay:
        one = overlay.nodes[1]
        argv = [sys.executable, "-m", "tundp", "upgrade", "--timeout=30"]
        nowhere = await one.host.run(*argv, f"--admin-socket={one.directory}/nowhere.sock")
        assert nowhere.returncode == 1
        assert "no daemon answers" in nowhere.stderr
        async with FakeSuccessor(one) as fake:
            await fake.offered()
            done = await one.host.run(*argv, f"--admin-socket={one.admin_socket}")
        assert done.returncode == 1
        assert f"process {one.daemon.pid}, goes on" in done.stderr
        await until(lambda: is_daemon(one, one.daemon.pid))
