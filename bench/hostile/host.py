"""Hostile clients of the admin socket and the HTTP ports, hostile files, and kernel faults."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import socket
import struct
from pathlib import Path
from typing import Final

from bench.hostile.common import HEALTH_PORT, HONEST, Score, deck
from tundp.lab.overlay import LabNode

METRICS_PORT: Final = 9401
HELD: Final = 5
"""Rows of twenty connections with half a request each that stay open for minutes."""
RESET: Final = struct.pack("ii", 1, 0)
CLIENTS: Final = (
    *("slow", "huge_header", "huge_uri", "huge_body", "noise", "half", "crowd", "reset"),
    *("pipelined", "deaf", "broken_chunks", "methods", "upgrade", "held", "deaf_crowd"),
)
COUNTS: Final = {
    "crowd": 1000,
    "slow": 50,
    "deaf": 20,
    "reset": 200,
    "held": 20,
    "deaf_crowd": 400,
}
"""Connections at once; of the other kinds three."""
KERNEL: Final = (
    *("tun_deleted", "tun_down", "address_removed", "routes_removed", "rules_flushed"),
    *("mtu_changed", "underlay_mtu", "links_churned"),
)
HEAL_S: Final = 4.0
"""A daemon puts back what a kernel fault took within a second; a busy machine is slower."""


class Clients:
    """Whoever may connect to a daemon, at its worst."""

    def __init__(self, score: Score, nodes: list[LabNode]) -> None:
        self.score = score
        self.nodes = nodes
        self.rng = score.rng("clients")

    async def run(self) -> None:
        """One kind after another, at a random door of a random node."""
        held: list[contextlib.ExitStack] = []
        try:
            for kind in deck(self.rng, CLIENTS):
                node = self.rng.choice(self.nodes)
                door = self.rng.choice(("admin", "health", "metrics"))
                self.score.done["clients", kind] += 1
                with contextlib.ExitStack() as stack:
                    try:
                        await self._attack(stack, kind, node, door)
                    except (OSError, TimeoutError):
                        self.score.refused["clients"] += 1
                    if kind in ("held", "deaf_crowd"):
                        held.append(stack.pop_all())
                if len(held) > HELD:
                    held.pop(0).close()
                await asyncio.sleep(self.rng.uniform(0, 0.3))
        finally:
            for stack in held:
                stack.close()

    async def _connect(
        self, stack: contextlib.ExitStack, node: LabNode, door: str
    ) -> socket.socket:
        if door == "admin":
            sock = socket.socket(socket.AF_UNIX)
            address: str | tuple[str, int] = str(node.admin_socket)
        else:
            sock = await node.host.socket(socket.SOCK_STREAM)
            address = ("127.0.0.1", HEALTH_PORT if door == "health" else METRICS_PORT)
        stack.callback(sock.close)
        sock.setblocking(False)
        async with asyncio.timeout(2):
            await asyncio.get_running_loop().sock_connect(sock, address)
        self.score.packets["connections"] += 1
        return sock

    async def _attack(
        self, stack: contextlib.ExitStack, kind: str, node: LabNode, door: str
    ) -> None:
        loop, rng = asyncio.get_running_loop(), self.rng
        count = COUNTS.get(kind, 3)
        path = {"admin": "/v1/status", "health": "/readyz?verbose", "metrics": "/metrics"}[door]
        get = f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        data = {
            "huge_header": b"GET / HTTP/1.1\r\nA: " + b"x" * 1_000_000 + b"\r\n\r\n",
            "huge_uri": b"GET /" + b"%41" * 300_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
            "huge_body": b"POST "
            + path.encode()
            + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n"
            + bytes(1_000_000),
            "noise": rng.randbytes(rng.randrange(1, 5000)),
            "held": get[:-2],
            "half": get[: rng.randrange(len(get))],
            "pipelined": get * 500,
            "deaf": get * 200,
            "deaf_crowd": get * 20,
            "broken_chunks": b"POST / HTTP/1.1\r\nHost: x\r\n"
            b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
            "methods": rng.choice((b"PUT", b"BREW", b"\x00", b"get", b"OPTIONS")) + get[3:],
            "upgrade": get[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        }.get(kind, b"")
        socks = [await self._connect(stack, node, door) for _ in range(count)]
        if kind == "slow":
            for at in range(10):
                for sock in socks:
                    await loop.sock_sendall(sock, get[at : at + 1])
                await asyncio.sleep(0.2)
            return
        for sock in socks:
            if kind == "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                with contextlib.suppress(OSError):
                    sock.send(get)
                sock.close()
            elif data:
                with contextlib.suppress(TimeoutError, OSError):
                    async with asyncio.timeout(0.5):
                        await loop.sock_sendall(sock, data)
        await asyncio.sleep(rng.uniform(0, 0.5))


class Files:
    """subnet.env, the state directory and the file of --config, replaced under the daemon."""

    def __init__(self, score: Score, nodes: list[LabNode]) -> None:
        self.score = score
        self.nodes = nodes
        self.rng = score.rng("files")

    async def run(self, pause_s: float) -> None:
        """One file after another; junk that a rename cannot replace goes after two seconds."""
        kinds = deck(self.rng, ("junk", "long", "fifo", "directory", "link", "device", "removed"))
        while True:
            node = self.rng.choice(self.nodes)
            for path in (node.subnet_file, config_file(node), *sorted(node.state_dir.iterdir())):
                kind = next(kinds)
                what = "state" if path.parent == node.state_dir else path.suffix[1:]
                self.score.done["files", f"{what} {kind}"] += 1
                replace(self.rng, path, kind)
                await asyncio.sleep(self.rng.uniform(0, pause_s))
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)

    def restore(self) -> None:
        """Remove what is no regular file; the daemons write the others themselves."""
        for node in self.nodes:
            for path in (node.subnet_file, *node.state_dir.iterdir()):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)


def config_file(node: LabNode) -> Path:
    """What the node's daemon was started with as --config."""
    return node.directory / f"node{node.number}.toml"


def replace(rng: random.Random, path: Path, kind: str) -> None:
    """Put something of this kind in place of a file."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if kind == "junk":
        path.write_bytes(rng.randbytes(rng.randrange(500)))
    elif kind == "long":
        with path.open("wb") as file:
            file.truncate(300 << 20)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
        (path / "x").write_text("x")
    elif kind == "link":
        path.symlink_to(rng.choice((path.name, "nowhere", "/proc/self/mem", "/")))
    elif kind == "device":
        path.symlink_to(rng.choice(("/dev/zero", "/dev/full", "/dev/tty")))


class Kernel:
    """What somebody else's commands do to the node's network."""

    def __init__(self, score: Score, nodes: list[LabNode]) -> None:
        self.score = score
        self.nodes = nodes
        self.rng = score.rng("kernel")

    async def run(self, pause_s: float) -> None:
        """A fault each `pause_s`, at one node at a time."""
        for kind in deck(self.rng, KERNEL):
            await asyncio.sleep(pause_s)
            node = self.rng.choice(self.nodes)
            self.score.done["kernel", kind] += 1
            if node in self.nodes[:HONEST]:
                self.score.fault(f"{kind} at node{node.number}", HEAL_S)
            await getattr(self, kind)(node)

    async def tun_deleted(self, node: LabNode) -> None:
        await command(node, "ip link del flannel0")

    async def tun_down(self, node: LabNode) -> None:
        await command(node, "ip link set flannel0 down")

    async def address_removed(self, node: LabNode) -> None:
        await command(node, "ip addr flush dev flannel0")

    async def routes_removed(self, node: LabNode) -> None:
        await command(node, "ip route flush dev flannel0")

    async def rules_flushed(self, node: LabNode) -> None:
        await command(node, "iptables -F; iptables -t nat -F; iptables -X; true")

    async def mtu_changed(self, node: LabNode) -> None:
        await command(node, f"ip link set flannel0 mtu {self.rng.choice((68, 576, 1300, 9000))}")

    async def underlay_mtu(self, node: LabNode) -> None:
        mtu = self.rng.choice((1280, 1400, 1499))
        await command(node, f"ip link set eth0 mtu {mtu}; sleep 0.5; ip link set eth0 mtu 1500")

    async def links_churned(self, node: LabNode) -> None:
        await command(
            node,
            "for n in 1 2 3 4 5 6 7 8 9 10; do ip link add h$n type veth peer name i$n; "
            "ip link set h$n up; ip addr add 198.51.100.$n/32 dev h$n; done; "
            "for n in 1 2 3 4 5 6 7 8 9 10; do ip link del h$n; done",
        )


async def command(node: LabNode, line: str) -> None:
    """A shell's line in the node's namespace; it may fail, as when the device is just gone."""
    process = await asyncio.create_subprocess_exec(
        *("ip", "netns", "exec", node.host.namespace, "sh", "-c", line),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    await process.wait()
