"""One contract for all engines, on a real TUN and real sockets: decide, count, forget alike.

left: engine under test, 10.5.1.0 on its TUN -- 192.0.2.1 eth0 ---- eth0 192.0.2.2, .3 right

10.5.2.0/24 is the peer's at 192.0.2.2, hop id 2; 192.0.2.3 is a stranger. Both are bare sockets,
so that what an engine sends and gets is seen without another engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from typing import Any

import pytest
from pyroute2 import netns

from tests.nodes import PORT, EngineNode, engine_node
from tests.packets import udp
from tests.routes import peer as peer_of
from tests.wait import DEADLINE_S, until
from tundp.choices import Engine, Layout, MtuOrigin, Offload, SourceCheck
from tundp.engine.base import EMSGSIZE_ORIGIN, OffloadState, PathLimit
from tundp.engine.counters import Counters, HopCounters
from tundp.engine.native.engine import EngineSettings
from tundp.engine.native.fib import NativeFib
from tundp.engine.taps import Recorder
from tundp.lab.lab import Host
from tundp.linux.netlink import enter_namespace
from tundp.linux.udp import open_udp
from tundp.wire.drop import DropReason
from tundp.wire.ratelimit import ICMP_BURST, ICMP_RATE_PER_S, ICMP_WIRE_RATE_PER_S

ENGINES = [engine for engine in Engine if engine is not Engine.AUTO]
every_engine = pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.value)

OWN, OF_PEER, NOWHERE = "10.5.1.0", "10.5.2.9", "10.5.77.1"
PEER = peer_of("10.5.2.0/24", "192.0.2.2", hop_id=2)
APP_PORT = 7000
IP_MTU_DISCOVER, IP_PMTUDISC_DONT = 10, 0  # linux/in.h
HEADERS_LEN = 28


@dataclass(slots=True, kw_only=True)
class World:
    """The engine's node, and what is around it."""

    node: EngineNode
    peer: socket.socket
    stranger: socket.socket
    app: socket.socket
    """On the node, bound to the TUN's address: sends into the overlay, receives from it."""

    @property
    def engine(self) -> Any:
        return self.node.engine

    async def until_read(self, encap: int, decap: int) -> None:
        """Wait until so many packets came in, each way, and have been dealt with."""
        await until(
            lambda: (
                [
                    (counted := self.engine.counters()).encap.packets_in,
                    counted.decap.packets_in,
                ]
                == [encap, decap]
            ),
            f"{encap} packets from the TUN and {decap} from the socket",
        )


@contextlib.asynccontextmanager
async def world(
    make_lab: Any,
    engine: Engine,
    *,
    is_attached: bool = True,
    layout: Layout = Layout.SHARED,
    recorder: Recorder | None = None,
) -> AsyncIterator[World]:
    async with make_lab() as lab, contextlib.AsyncExitStack() as stack:
        left, right = await lab.host("left"), await lab.host("right")
        await lab.cable(left, "eth0", right, "eth0")
        await right.configure("eth0", "192.0.2.2/24")
        await right.configure("eth0", "192.0.2.3/24")
        node = await stack.enter_async_context(
            engine_node(
                left,
                engine.value,
                1,
                peers=[PEER],
                source_check=SourceCheck.COUNT,
                settings=EngineSettings(layout=layout),
                recorder=recorder,
            )
        )
        peer, stranger = [
            stack.enter_context(await right.call(open_udp, IPv4Address(f"192.0.2.{host}"), PORT))
            for host in (2, 3)
        ]
        app = stack.enter_context(await left.socket(socket.SOCK_DGRAM))
        app.bind((OWN, APP_PORT))
        for sock in (peer, app):
            sock.settimeout(DEADLINE_S)
        # The engine's threads, and this one, look paths up as the node's kernel does.
        stack.enter_context(inside(left))
        if is_attached:
            node.engine.attach(node.tun)
        yield World(node=node, peer=peer, stranger=stranger, app=app)


@contextlib.contextmanager
def inside(host: Host) -> Iterator[None]:
    outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter_namespace(host.namespace)
        yield
    finally:
        netns.setns(outside)
        os.close(outside)


def inner(payload: bytes, *, source: str = OF_PEER, ttl: int = 64) -> bytes:
    """A packet a peer would send, to the node's application."""
    return udp(payload, source=source, destination=OWN, dport=APP_PORT, ttl=ttl)


async def receive(sock: socket.socket) -> bytes:
    return await asyncio.to_thread(sock.recv, 2048)


async def route(world: World, command: str, **what: Any) -> None:
    await world.node.host.netlink.call(f"{command} a route", "route", command, **what)


def drops(world: World) -> dict[str, int]:
    counted = world.engine.counters().as_dict()
    assert counted["conserved"]
    found: dict[str, int] = counted["encap"]["drops"] | counted["decap"]["drops"]
    return found


@every_engine
async def test_packets_bytes_and_hops(make_lab: Any, engine: Engine) -> None:
    async with world(make_lab, engine) as all_:
        for number in range(5):
            all_.app.sendto(bytes(100), (OF_PEER, 9))
            assert (await receive(all_.peer))[8] == 63, number
        all_.app.sendto(bytes(60), (NOWHERE, 9))
        for number in range(4):
            all_.peer.sendto(inner(bytes(200)), ("192.0.2.1", PORT))
            assert await receive(all_.app) == bytes(200), number
        all_.peer.sendto(b"garbage", ("192.0.2.1", PORT))
        all_.stranger.sendto(inner(bytes(300)), ("192.0.2.1", PORT))
        assert await receive(all_.app) == bytes(300)
        await all_.until_read(6, 6)

        counted = all_.engine.counters()
        assert (counted.encap.packets_in, counted.encap.packets_out) == (6, 5)
        assert counted.encap.bytes_in == 5 * (HEADERS_LEN + 100) + HEADERS_LEN + 60
        assert counted.encap.bytes_out == 5 * (HEADERS_LEN + 100)
        assert (counted.decap.packets_in, counted.decap.packets_out) == (6, 5)
        delivered = 4 * (HEADERS_LEN + 200) + HEADERS_LEN + 300
        assert counted.decap.bytes_in == delivered + len(b"garbage")
        assert counted.decap.bytes_out == delivered
        assert drops(all_) == {DropReason.NO_ROUTE.label: 1, DropReason.TOO_SHORT.label: 1}
        assert counted.source_mismatches == 1
        assert counted.icmp_to_tun == 1
        assert counted.errnos == {}

        hops = dict(all_.engine.hop_counters())
        assert set(hops) == {0, PEER.hop_id}
        of_peer, of_nobody = hops[PEER.hop_id], hops[0]
        assert (of_peer.packets_out, of_peer.bytes_out) == (5, counted.encap.bytes_out)
        assert of_peer.packets_in == 5
        assert of_peer.bytes_in == 4 * (HEADERS_LEN + 200) + len(b"garbage")
        assert of_peer.drops == 1
        assert of_peer.last_errno is None
        assert (of_nobody.packets_in, of_nobody.bytes_in) == (1, HEADERS_LEN + 300)
        assert of_nobody.drops == 1
        for hop in (of_peer, of_nobody):
            assert hop.last_heard is not None
            assert abs(hop.last_heard - time.time()) < DEADLINE_S
        asked = all_.engine.hop_counters([7, PEER.hop_id])
        assert asked[7] == HopCounters()
        assert replace(asked[PEER.hop_id], last_heard=None) == replace(of_peer, last_heard=None)


@every_engine
@pytest.mark.parametrize(
    ("kind", "errno_name", "reason"),
    [
        ("prohibit", "EACCES", DropReason.SEND_FORBIDDEN),
        ("unreachable", "EHOSTUNREACH", DropReason.SEND_UNREACHABLE),
        ("throw", "ENETUNREACH", DropReason.SEND_UNREACHABLE),
        ("blackhole", "EINVAL", DropReason.SEND_FAILED),
    ],
)
async def test_refused_sends(
    make_lab: Any, engine: Engine, kind: str, errno_name: str, reason: DropReason
) -> None:
    async with world(make_lab, engine) as all_:
        await route(all_, "add", dst="192.0.2.2/32", type=kind)
        for count in (1, 2):
            all_.app.sendto(b"x", (OF_PEER, 9))
            await all_.until_read(count, 0)
        assert drops(all_) == {reason.label: 2}
        assert all_.engine.counters().errnos == {errno_name: 2}
        hop = all_.engine.hop_counters([PEER.hop_id])[PEER.hop_id]
        assert (hop.packets_out, hop.drops, hop.last_errno) == (0, 2, errno_name)


@every_engine
async def test_silent_peers_get_sockets_of_their_own(make_lab: Any, engine: Engine) -> None:
    """Once the shared socket is full; their packets alone are dropped, each under their hop."""
    silent = [peer_of(f"10.5.{n}.0/24", f"192.0.2.{n}", hop_id=n) for n in range(101, 117)]
    async with world(make_lab, engine) as all_:
        all_.node.install([PEER, *silent])
        sent = 0

        async def are_full() -> bool:
            nonlocal sent
            for peer in silent:
                for _ in range(20):
                    all_.app.sendto(bytes(1400), (str(peer.subnet[9]), 9))
            sent += 20 * len(silent)
            await all_.until_read(sent, 0)
            full = all_.engine.hop_counters([peer.hop_id for peer in silent]).values()
            return all(hop.queue_full for hop in full)

        await until(are_full, "every silent peer's queue is full", poll_s=0)
        assert 1 <= all_.engine.hop_sockets() <= len(silent)
        all_.app.sendto(b"live", (OF_PEER, 9))
        while not (datagram := await receive(all_.peer)).endswith(b"live"):
            pass
        assert len(datagram) == HEADERS_LEN + 4
        await all_.until_read(sent + 1, 0)
        by_hop = all_.engine.hop_counters()
        lost = drops(all_)
        assert set(lost) == {DropReason.HOP_QUEUE_FULL.label}
        assert lost[DropReason.HOP_QUEUE_FULL.label] == sum(
            by_hop[peer.hop_id].queue_full for peer in silent
        )
        assert sum(by_hop[p.hop_id].packets_out + by_hop[p.hop_id].drops for p in silent) == sent
        live = by_hop[PEER.hop_id]
        assert (live.packets_out, live.drops, live.queue_full) == (1, 0, 0)
        # A moved node begins anew: what the sockets send from is no longer its address.
        await all_.node.host.configure("eth0", "192.0.2.9/24")
        await all_.node.move("192.0.2.9")
        assert all_.engine.hop_sockets() == 0


@every_engine
async def test_refused_tun_writes(make_lab: Any, engine: Engine) -> None:
    async with world(make_lab, engine) as all_:
        index = await all_.node.host.index(all_.node.tun.name)
        await all_.node.host.netlink.set_link(index, state="down")
        for count in (1, 2):
            all_.peer.sendto(inner(b"x"), ("192.0.2.1", PORT))
            await all_.until_read(0, count)
        assert drops(all_) == {DropReason.TUN_DOWN.label: 2}
        assert all_.engine.counters().errnos == {"EIO": 2}
        hop = all_.engine.hop_counters()[PEER.hop_id]
        assert (hop.packets_in, hop.drops, hop.last_errno) == (2, 2, None)


every_layout = pytest.mark.parametrize(
    ("engine", "layout"),
    [
        *((engine, Layout.SHARED) for engine in ENGINES),
        (Engine.MMSG, Layout.SPLIT),
        (Engine.GSO, Layout.SPLIT),
    ],
    ids=lambda value: value.value,
)


@every_layout
async def test_icmp_is_limited(make_lab: Any, engine: Engine, layout: Layout) -> None:
    async with world(make_lab, engine, layout=layout) as all_:
        for rate, of_tun, of_wire in ((ICMP_RATE_PER_S, 200, 0), (ICMP_WIRE_RATE_PER_S, 200, 200)):
            counted = replace(all_.engine.counters())
            began = time.monotonic()
            for _ in range(200):
                if of_wire:
                    all_.peer.sendto(inner(b"x", ttl=1), ("192.0.2.1", PORT))
                else:
                    all_.app.sendto(b"x", (NOWHERE, 9))
            await all_.until_read(of_tun, of_wire)
            took_s = time.monotonic() - began
            after = all_.engine.counters()
            granted = granted_by(after) - granted_by(counted)
            assert granted + after.icmp_rate_limited - counted.icmp_rate_limited == 200
            assert ICMP_BURST <= granted <= ICMP_BURST + took_s * rate + 1


def granted_by(counted: Counters) -> int:
    return counted.icmp_to_tun + counted.icmp_to_peers + counted.icmp_undeliverable


@every_layout
async def test_a_flood_takes_no_others_icmp(make_lab: Any, engine: Engine, layout: Layout) -> None:
    """Whoever is no peer, a peer, and the node's own pods have an ICMP budget each."""
    async with world(make_lab, engine, layout=layout) as all_:
        at = ("192.0.2.1", PORT)
        for _ in range(200):
            all_.stranger.sendto(inner(b"x", ttl=1), at)
        await all_.until_read(0, 200)
        flooded = all_.engine.counters().icmp_rate_limited
        assert flooded > 0
        before = all_.engine.counters().icmp_to_peers
        for _ in range(ICMP_BURST):
            all_.peer.sendto(inner(b"x", ttl=1), at)
            all_.app.sendto(b"x", (NOWHERE, 9))
        await all_.until_read(ICMP_BURST, 200 + ICMP_BURST)
        counted = all_.engine.counters()
        assert counted.icmp_rate_limited == flooded
        assert counted.icmp_to_peers == before + ICMP_BURST
        assert counted.icmp_to_tun == ICMP_BURST


@every_layout
async def test_a_pods_flood_takes_no_other_pods_icmp(
    make_lab: Any, engine: Engine, layout: Layout
) -> None:
    """A neighbour's "fragmentation needed" would be lost with it: a black hole on demand."""
    async with world(make_lab, engine, layout=layout) as all_:
        await all_.node.host.configure("lo", "10.5.1.77/32")
        with await all_.node.host.socket(socket.SOCK_DGRAM) as other:
            other.bind(("10.5.1.77", APP_PORT))
            for _ in range(200):
                all_.app.sendto(b"x", (NOWHERE, 9))
            await all_.until_read(200, 0)
            flooded = all_.engine.counters()
            assert flooded.icmp_rate_limited > 0
            answered, limited = flooded.icmp_to_tun, flooded.icmp_rate_limited
            for _ in range(ICMP_BURST):
                other.sendto(b"x", (NOWHERE, 9))
            await all_.until_read(200 + ICMP_BURST, 0)
            counted = all_.engine.counters()
            assert counted.icmp_rate_limited == limited
            assert counted.icmp_to_tun == answered + ICMP_BURST


@every_engine
async def test_what_waits_in_the_tun_has_a_route_at_once(make_lab: Any, engine: Engine) -> None:
    async with world(make_lab, engine, is_attached=False) as all_:
        for number in range(3):
            all_.app.sendto(bytes([number]), (OF_PEER, 9))
        all_.node.engine.attach(all_.node.tun)
        for number in range(3):
            assert (await receive(all_.peer))[HEADERS_LEN:] == bytes([number])
        assert drops(all_) == {}


@dataclass(frozen=True, slots=True)
class Assigned:
    """What an engine reads of a change of routes."""

    hops_assigned: tuple[int, ...] = ()


async def learn_narrow_path(all_: World) -> None:
    """One packet above the device's MTU, DF clear: refused, decided again, sent in two pieces."""
    before = all_.engine.counters().encap.packets_out
    await send_in_two_pieces(all_)
    await until(lambda: all_.engine.counters().encap.packets_out == before + 1)


async def send_in_two_pieces(all_: World) -> None:
    all_.app.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)
    all_.app.sendto(bytes(1420), (OF_PEER, 9))
    pieces = [await receive(all_.peer), await receive(all_.peer)]
    assert max(map(len, pieces)) <= 1400 - HEADERS_LEN
    # The first piece has the UDP header, both an IPv4 header.
    assert b"".join(piece[20:] for piece in pieces)[8:] == bytes(1420)


@every_engine
async def test_path_state(make_lab: Any, engine: Engine) -> None:
    async with world(make_lab, engine) as all_:
        began = time.time()
        await all_.node.host.configure("eth0", mtu=1400)
        await learn_narrow_path(all_)
        ((hop_id, state),) = all_.engine.path_states().items()
        assert hop_id == PEER.hop_id
        assert (state.inner_mtu, state.no_gso) == (1400 - HEADERS_LEN, False)
        assert (state.origin, state.mtu_origin) == (EMSGSIZE_ORIGIN, MtuOrigin.DEVICE)
        assert began - 1 <= state.since <= time.time() + 1
        counted = all_.engine.counters()
        assert (counted.fragments_out, counted.errnos) == (2, {"EMSGSIZE": 1})
        assert all_.engine.hop_counters()[hop_id].last_errno == "EMSGSIZE"

        # What is known is not asked again; another FIB does not change what is known.
        all_.node.install([PEER])
        await learn_narrow_path(all_)
        assert all_.engine.counters().errnos == {"EMSGSIZE": 1}
        assert all_.engine.path_states() == {hop_id: state}
        assert all_.engine.hop_counters()[hop_id].packets_out == 2

        # The hop id stands for another endpoint: its path and its counters begin anew.
        fib = all_.engine.seen()
        all_.node.install([PEER], Assigned((hop_id,)))
        assert all_.engine.path_states() == {}
        assert all_.engine.hop_counters([hop_id]) == {hop_id: HopCounters()}
        await until(lambda: all_.engine.seen() > fib, "the new FIB is in use")
        await learn_narrow_path(all_)
        assert all_.engine.counters().errnos == {"EMSGSIZE": 2}
        assert all_.engine.hop_counters()[hop_id].packets_out == 1
        assert all_.engine.counters().encap.packets_out == 3

        # Another address of ours: other paths.
        all_.engine.detach()
        all_.engine.rebound()
        all_.engine.attach(all_.node.tun)
        assert all_.engine.path_states() == {}
        assert all_.engine.hop_counters()[hop_id].packets_out == 1


@every_engine
async def test_what_others_say_of_a_path_narrows_nothing(make_lab: Any, engine: Engine) -> None:
    """A route's MTU is the control plane's to read; what ICMP errors say is nobody's."""
    async with world(make_lab, engine) as all_:
        index = await all_.node.host.index("eth0")
        await route(all_, "add", dst="192.0.2.2/32", oif=index, metrics={"mtu": 600})
        all_.app.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)
        all_.app.sendto(bytes(1420), (OF_PEER, 9))
        assert len(await receive(all_.peer)) == HEADERS_LEN + 1420
        # Nor does it when the device is narrow: that is asked, and not the path.
        await all_.node.host.configure("eth0", mtu=1400)
        await learn_narrow_path(all_)
        assert all_.engine.path_states()[PEER.hop_id].inner_mtu == 1400 - HEADERS_LEN


@every_engine
async def test_a_limit_holds_until_it_is_lifted(make_lab: Any, engine: Engine) -> None:
    async with world(make_lab, engine) as all_:
        limit = PathLimit(
            inner_mtu=1372, origin=MtuOrigin.MEASURED, since=1_770_000_000.0, text="measured"
        )
        all_.engine.limit_path(PEER.hop_id, limit)
        await send_in_two_pieces(all_)
        await until(lambda: all_.engine.counters().fragments_out == 2)
        assert all_.engine.counters().errnos == {}, "nothing was refused"
        state = all_.engine.path_states()[PEER.hop_id]
        assert (state.inner_mtu, state.mtu_origin) == (1372, MtuOrigin.MEASURED)
        assert (state.since, state.origin) == (1_770_000_000.0, "measured")

        # The smaller one holds, and the other is there again when it is gone.
        await all_.node.host.configure("eth0", mtu=1300)
        await send(all_, 1320)
        await until(lambda: all_.engine.counters().errnos == {"EMSGSIZE": 1})
        assert all_.engine.path_states()[PEER.hop_id].mtu_origin is MtuOrigin.DEVICE
        await all_.node.host.configure("eth0", mtu=1500)
        all_.engine.recheck_paths()
        assert all_.engine.path_states()[PEER.hop_id].inner_mtu == 1372
        all_.engine.limit_path(PEER.hop_id, None)
        assert all_.engine.path_states() == {}
        await send(all_, 1420)

        # A limit is the endpoint's, not the hop id's; and goes with the address.
        all_.engine.limit_path(PEER.hop_id, limit)
        all_.node.install([PEER], Assigned((PEER.hop_id,)))
        assert all_.engine.path_states() == {}
        all_.engine.limit_path(PEER.hop_id, limit)
        all_.engine.detach()
        all_.engine.rebound()
        all_.engine.attach(all_.node.tun)
        assert all_.engine.path_states() == {}


async def send(all_: World, length: int) -> None:
    """Wait until a packet with so many bytes of UDP payload has arrived whole, or in pieces."""
    all_.app.sendto(bytes(length), (OF_PEER, 9))
    arrived = 0
    while arrived < length + 8:
        arrived += len(await receive(all_.peer)) - 20
    assert arrived == length + 8


@every_engine
async def test_bytes_out_are_each_hops(make_lab: Any, engine: Engine) -> None:
    async with world(make_lab, engine) as all_:
        assert all_.engine.bytes_out().sum() == 0
        await send(all_, 100)
        await until(lambda: all_.engine.bytes_out()[PEER.hop_id] == 100 + HEADERS_LEN)
        assert all_.engine.bytes_out().sum() == 100 + HEADERS_LEN


@every_engine
async def test_activity_is_what_each_hop_counted(make_lab: Any, engine: Engine) -> None:
    async with world(make_lab, engine) as all_:
        await send(all_, 100)
        rule = ["OUTPUT", "-p", "udp", "--dport", "8285", "-j", "DROP"]
        assert (await all_.node.host.run("iptables", "-I", *rule)).returncode == 0
        all_.app.sendto(b"x", (OF_PEER, 9))
        await until(lambda: all_.engine.activity().last_refused_ns[PEER.hop_id] > 0)
        counted, found = all_.engine.hop_counters(), all_.engine.activity()
        assert len(found.packets_out) > PEER.hop_id
        for name in ("packets_out", "bytes_out", "packets_in", "bytes_in", "drops"):
            column = getattr(found, name)
            assert column[PEER.hop_id] == getattr(counted[PEER.hop_id], name), name
            assert column.sum() == sum(getattr(each, name) for each in counted.values()), name
        assert found.drops[PEER.hop_id] == 1
        # The same hop for another endpoint has counted nothing yet.
        all_.node.install([peer_of("10.5.2.0/24", "192.0.2.3", hop_id=PEER.hop_id)])
        assert all_.engine.activity().packets_out[PEER.hop_id] == 0


@every_engine
async def test_too_big_says_so_in_the_packets_own_words(make_lab: Any, engine: Engine) -> None:
    async with world(make_lab, engine) as all_:
        await all_.node.host.configure("eth0", mtu=1400)
        # The error comes from the TUN's own address, as with the daemon.
        await all_.node.host.sysctl(f"ipv4/conf/{all_.node.tun.name}/accept_local", 1)
        listener = await all_.node.host.socket(socket.SOCK_RAW, socket.IPPROTO_ICMP)
        with listener:
            listener.settimeout(DEADLINE_S)
            for _ in range(2):  # refused by the kernel, then by what that taught
                all_.app.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, 3)  # IP_PMTUDISC_PROBE
                all_.app.sendto(bytes(1420), (OF_PEER, 9))
                error = await receive(listener)
                assert error[20:22] == b"\x03\x04"
                assert int.from_bytes(error[26:28], "big") == 1400 - HEADERS_LEN
                quoted = error[28:]
                assert quoted[8] == 64, "as the application sent it, not as we would have"
                assert quoted[12:20] == bytes((10, 5, 1, 0, 10, 5, 2, 9))
        assert drops(all_) == {DropReason.TOO_BIG.label: 2}
        hop = all_.engine.hop_counters()[PEER.hop_id]
        assert (hop.packets_out, hop.drops) == (0, 2)


@every_engine
async def test_a_change_without_a_delta_is_compared(make_lab: Any, engine: Engine) -> None:
    async with world(make_lab, engine) as all_:
        all_.app.sendto(b"x", (OF_PEER, 9))
        await receive(all_.peer)
        await until(lambda: PEER.hop_id in all_.engine.hop_counters())
        all_.node.install([PEER])
        assert all_.engine.hop_counters()[PEER.hop_id].packets_out == 1
        all_.node.install([peer_of("10.5.2.0/24", "192.0.2.3", hop_id=PEER.hop_id)])
        assert all_.engine.hop_counters() == {}


@every_engine
async def test_heartbeat_and_generation(make_lab: Any, engine: Engine) -> None:
    async with world(make_lab, engine) as all_:
        threads = 0 if engine is Engine.REFERENCE else 1
        before = all_.engine.heartbeat()
        assert len(before) == threads
        await until(
            lambda: all(
                now > then for now, then in zip(all_.engine.heartbeat(), before, strict=True)
            ),
            "an iteration of each thread",
        )
        all_.node.install([PEER])
        await until(lambda: all_.engine.seen() == all_.node.generation, "the new FIB is in use")
        all_.engine.detach()
        assert all_.engine.heartbeat() == ()
        all_.node.install([PEER])
        assert all_.engine.seen() == all_.node.generation


@every_engine
async def test_offload_state(make_lab: Any, engine: Engine) -> None:
    async with world(make_lab, engine) as all_:
        state = all_.engine.offloads()
        if engine is not Engine.GSO:
            assert state == OffloadState()
            return
        assert {*state.in_use, *state.disabled} == set(Offload)
        assert len(state.in_use) + len(state.disabled) == len(Offload)
        for offload in state.in_use:
            assert offload.value in all_.engine.describe()
        for reason, since in state.disabled.values():
            assert reason in all_.engine.describe()
            assert since <= time.time()


@every_engine
async def test_a_diverted_hop_is_the_same_hop(make_lab: Any, engine: Engine) -> None:
    async with world(make_lab, engine) as all_, contextlib.AsyncExitStack() as stack:
        relay = stack.enter_context(await all_.node.host.socket(socket.SOCK_DGRAM))
        relay.bind(("127.0.130.134", 0))
        relay.settimeout(DEADLINE_S)
        await all_.node.host.configure("lo")
        way = int(IPv4Address("127.0.130.134")), relay.getsockname()[1]
        all_.engine.divert({PEER.hop_id: way})
        for length in (100, 200):
            all_.app.sendto(bytes(length), (OF_PEER, 9))
            data, sender = await asyncio.to_thread(relay.recvfrom, 2048)
            assert (len(data), sender) == (HEADERS_LEN + length, ("192.0.2.1", PORT))
        # What comes from the peer's endpoint is still the peer's.
        all_.peer.sendto(inner(bytes(200)), ("192.0.2.1", PORT))
        assert await receive(all_.app) == bytes(200)
        await all_.until_read(2, 1)
        hop = all_.engine.hop_counters([PEER.hop_id])[PEER.hop_id]
        assert (hop.packets_out, hop.bytes_out) == (2, 300 + 2 * HEADERS_LEN)
        assert hop.packets_in == 1
        assert all_.engine.counters().source_mismatches == 0
        assert drops(all_) == {}
        # Another FIB with the same hop: still diverted.
        all_.node.install([PEER])
        all_.app.sendto(bytes(300), (OF_PEER, 9))
        assert len(await receive(relay)) == HEADERS_LEN + 300

        all_.engine.divert({})
        all_.app.sendto(bytes(400), (OF_PEER, 9))
        assert len(await receive(all_.peer)) == HEADERS_LEN + 400


def native_fibs() -> int:
    """How many FIBs are kept for C engines in this process."""
    return sum(isinstance(each, NativeFib) for each in gc.get_objects())


@every_engine
async def test_ways_that_no_worker_uses_are_not_kept(make_lab: Any, engine: Engine) -> None:
    """Nothing is routed anew meanwhile: all of them are of one generation."""
    gc.collect()
    before = native_fibs()
    async with world(make_lab, engine) as all_:
        kept: list[int] = []
        for port in range(1, 101):
            all_.engine.divert({PEER.hop_id: (int(IPv4Address("127.0.130.134")), port)})

        def is_little_kept() -> bool:
            all_.engine.divert({})
            kept.append(native_fibs() - before)
            return kept[-1] <= 3

        await until(is_little_kept, "ways that are not used any more to be freed")
        assert all_.engine.seen() == all_.node.generation
        all_.app.sendto(bytes(100), (OF_PEER, 9))
        assert len(await receive(all_.peer)) == HEADERS_LEN + 100


@every_engine
async def test_a_hop_id_assigned_anew_is_not_diverted(make_lab: Any, engine: Engine) -> None:
    async with world(make_lab, engine) as all_:
        all_.engine.divert({PEER.hop_id: (int(IPv4Address("127.0.130.134")), 9)})
        # By comparison of the FIBs: the id stands for another endpoint, and then for this one.
        all_.node.install([peer_of("10.5.2.0/24", "192.0.2.3", hop_id=PEER.hop_id)])
        all_.node.install([PEER])
        all_.app.sendto(bytes(100), (OF_PEER, 9))
        assert len(await receive(all_.peer)) == HEADERS_LEN + 100
