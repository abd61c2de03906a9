"""Starts nodes for the tests, and asks running ones: by their status, their log, their packets.

A whole node is a `tundp.lab.overlay.LabNode` with a daemon, made by the fixture `make_overlay`
of tests/netns. An `EngineNode` is one packet engine in this process, its TUN and its socket on a
lab host, without daemon, store or firewall.

The functions that answer yes or no are conditions for `tests.wait.until`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

from tests.routes import peer as make_peer
from tests.wait import until
from tundp.choices import Engine, SourceCheck
from tundp.engine.base import Dataplane, EngineContext, HopsAssigned
from tundp.engine.choose import make_engine
from tundp.engine.native.engine import EngineSettings, NativeEngine
from tundp.engine.taps import Recorder
from tundp.lab.lab import Host, Lab
from tundp.lab.overlay import LabNode, OverlayLab
from tundp.lab.traffic import PingStream, ping
from tundp.lease.fib import Fib, build_fib
from tundp.lease.model import Peer
from tundp.linux.netlink import Link
from tundp.linux.offload import KernelOffloads
from tundp.linux.tun import Tun
from tundp.linux.udp import open_udp, rebind
from tundp.wire.policy import Policy, Prefix

MakeLab = Callable[[], Lab]
"""The fixture `make_lab`: a lab with a name nobody else on the machine has."""
MakeOverlay = Callable[..., contextlib.AbstractAsyncContextManager[OverlayLab]]
"""The fixture `make_overlay`: flags of the daemons by position, the lab's shape by name."""

PORT = 8285
HEALTH_PORT = 10256
OVERLAY = IPv4Network("10.5.0.0/16")


# A daemon's status


async def counters(node: LabNode) -> dict[str, Any]:
    """All counters of a node's daemon."""
    found: dict[str, Any] = (await node.status_document())["counters"]
    return found


async def lease_is(node: LabNode, state: str) -> bool:
    """Whether the node's lease is `held`, `lost` or in `conflict`."""
    return bool((await node.status_document())["lease"]["state"] == state)


async def store_is(node: LabNode, *, answering: bool) -> bool:
    """Whether the node's store answers, or does not."""
    return (await node.status_document())["store"]["is_answering"] is answering


async def has_peer(node: LabNode, subnet: str, public_ip: str) -> bool:
    """Whether the node sends packets for this subnet to that address."""
    peers = (await node.status_document())["peers"]
    return (subnet, public_ip) in [(each["subnet"], each["public_ip"]) for each in peers]


async def has_peer_count(node: LabNode, count: int) -> bool:
    """Whether the node has exactly so many peers."""
    return len((await node.status_document())["peers"]) == count


async def is_sending_to(node: LabNode, public_ip: str) -> bool:
    """Whether any peer of the node has this address."""
    return public_ip in [peer["public_ip"] for peer in (await node.status_document())["peers"]]


async def has_decapsulated(node: LabNode, count: int) -> bool:
    """Whether more than `count` datagrams came in from the underlay."""
    return bool((await counters(node))["decap"]["packets_in"] > count)


# A daemon's log and health server


async def log_contains(log: LabNode | Path, text: str, *, times: int = 1) -> bool:
    """Whether a node's log, or one at a path, holds `text` at least so many times."""
    path = log if isinstance(log, Path) else log.log_path
    return path.exists() and path.read_text().count(text) >= times


async def until_logged(log: LabNode | Path, text: str, *, times: int = 1) -> None:
    """Wait until log_contains: a daemon's log is written by a thread of its own."""
    await until(lambda: log_contains(log, text, times=times), f"{text!r} in the log")


@dataclass(frozen=True, slots=True)
class Readiness:
    """The answer of /readyz?format=json: HTTP status, failing checks, and their details joined."""

    status: int
    failing: list[str]
    details: str


async def readiness(node: LabNode) -> Readiness:
    """Ask the health server on port 10256; raises OSError if there is none yet."""
    status, body = await node.get(HEALTH_PORT, "/readyz?format=json")
    document = json.loads(body)
    details = "; ".join(check["detail"] for check in document["checks"] if not check["ok"])
    return Readiness(status, document["failing"], details)


async def is_ready(node: LabNode) -> bool:
    """Whether /readyz is 200."""
    try:
        return (await readiness(node)).status == 200
    except OSError:
        return False


async def fails(node: LabNode, *names: str) -> bool:
    """Whether /readyz is 503 for exactly these checks."""
    found = await readiness(node)
    return found.status == 503 and found.failing == list(names)


# Packets


async def answers(host: Host, address: str | IPv4Address, *, timeout_s: float = 0.5) -> bool:
    """Whether a ping from `host` comes back; no route at all is no answer."""
    try:
        answer = await ping(host, str(address), timeout_s=timeout_s)
    except OSError:
        return False
    return answer is not None and answer.is_echo_reply


async def has_received(stream: PingStream, count: int) -> bool:
    """Whether at least `count` answers have come back."""
    return stream.received >= count


async def has_sent(stream: PingStream, count: int) -> bool:
    """Whether at least `count` requests have gone out."""
    return stream.sent >= count


async def link_of(host: Host, name: str) -> Link | None:
    """A host's network device of this name."""
    return next((link for link in await host.netlink.links() if link.name == name), None)


async def must_run(host: Host, *argv: str) -> str:
    """Run a command in the host's namespace to its end; what it prints. It must not fail."""
    done = await host.run(*argv)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


# One engine without a daemon


@dataclass(slots=True, kw_only=True)
class EngineNode:
    """One engine in this process, its TUN and its socket on a lab host."""

    host: Host
    subnet: IPv4Network
    address: IPv4Address
    sock: socket.socket
    engine: Dataplane
    tun: Tun
    generation: int = 0

    @property
    def tun_address(self) -> str:
        """The TUN's address: the subnet's first."""
        return str(self.subnet.network_address)

    def install(self, peers: Collection[Peer], delta: HopsAssigned | None = None) -> None:
        """Send to these peers from now on."""
        self.generation += 1
        self.engine.install(_fib(peers, self.subnet, self.generation), delta)

    def follow(self, peer: EngineNode) -> None:
        """Send to where the peer is now."""
        self.install([make_peer(peer.subnet, peer.address)])

    async def move(self, address: str) -> None:
        """Replace the socket as the daemon does when its address changed."""
        self.address = IPv4Address(address)
        new = await self.host.call(open_udp, self.address, PORT)
        self.engine.detach()
        rebind(self.sock, new)
        self.engine.rebound()
        self.engine.attach(self.tun)

    def count(self, name: str) -> int:
        """One of the engine's counters, by the name it has in the status."""
        return int(self.engine.counters().as_dict()[name])


@contextlib.asynccontextmanager
async def engine_node(
    host: Host,
    engine: str,
    number: int,
    *,
    peers: Collection[Peer] = (),
    source_check: SourceCheck = SourceCheck.ENFORCE,
    admitted: Collection[IPv4Network] = (),
    settings: EngineSettings | None = None,
    kernel: KernelOffloads | None = None,
    recorder: Recorder | None = None,
    echo: tuple[int, int] | None = None,
    peer_fd: int = -1,
) -> AsyncIterator[EngineNode]:
    """A node 192.0.2.`number` with subnet 10.5.`number`.0/24 on `host`'s eth0, not yet attached.

    Its TUN is up and has its address and the overlay's route. `kernel`: what a C engine is to
    believe of this kernel, rather than to find out. `echo`: where the engine hands answers to what
    measures paths over, and their identifier; `peer_fd`: the messages of other nodes.
    """
    subnet = IPv4Network(f"10.5.{number}.0/24")
    address = IPv4Address(f"192.0.2.{number}")
    await host.configure("eth0", f"{address}/24")
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(await host.call(open_udp, address, PORT))
        devices = stack.enter_context(contextlib.ExitStack())
        context = EngineContext(
            fib=_fib(peers, subnet, 0),
            policy=Policy(
                tun_address=int(subnet.network_address),
                source_check=source_check,
                port=PORT,
                admitted=tuple(
                    Prefix(int(each.network_address), int(each.netmask)) for each in admitted
                ),
                echo_id=None if echo is None else echo[1],
            ),
            loop=asyncio.get_running_loop(),
            recorder=recorder,
            echo_fd=-1 if echo is None else echo[0],
            peer_fd=peer_fd,
        )
        made: Dataplane
        if kernel is None:
            made = make_engine(Engine(engine), [sock], settings or EngineSettings(), context)
        else:
            made = NativeEngine(Engine(engine), [sock], context, kernel=kernel)
        stack.callback(made.stop)  # before its TUN is closed
        tun = await host.call(Tun, "flannel%d", made.tun_mode)
        devices.callback(tun.close)
        # None of the kernel's own packets in what is counted.
        await host.sysctl(f"ipv6/conf/{tun.name}/disable_ipv6", 1)
        await host.configure(tun.name, f"{subnet.network_address}/32", mtu=1472)
        await host.netlink.ensure_route(await host.index(tun.name), OVERLAY)
        yield EngineNode(host=host, subnet=subnet, address=address, sock=sock, engine=made, tun=tun)


def _fib(peers: Collection[Peer], own_subnet: IPv4Network, generation: int) -> Fib:
    return build_fib(peers, own_subnet=own_subnet, generation=generation)
