"""Workers of an image and a full engine: the same packets, the same counters, one after the other.

left: 10.5.1.0 on the TUN -- 192.0.2.1 eth0 ---- eth0 192.0.2.2, .3 right; see test_contract.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import select
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.engine.test_contract import (
    APP_PORT,
    ENGINES,
    NOWHERE,
    OF_PEER,
    OWN,
    PEER,
    World,
    every_engine,
    world,
)
from tests.nodes import PORT
from tests.packets import MF, ROUTER_ALERT, icmp_echo, udp
from tests.routes import peer as peer_of
from tests.wait import until
from tundp.backend.udp.image_keeper import content, facts_of
from tundp.choices import Engine, Layout, SourceCheck
from tundp.engine import image as images
from tundp.engine.base import EngineContext
from tundp.engine.choose import make_engine
from tundp.engine.counter_base import CounterBase, from_document
from tundp.engine.image import ImageWriter
from tundp.engine.native.early import EarlyWorkers
from tundp.engine.native.early_base import counted_by
from tundp.engine.native.engine import EngineSettings
from tundp.lease.fib import build_fib
from tundp.wire.policy import Policy

C_ENGINES = [engine for engine in ENGINES if engine is not Engine.REFERENCE]
HOWS = [
    (engine, layout)
    for engine in C_ENGINES
    for layout in Layout
    if layout is Layout.SHARED or engine is not Engine.SIMPLE
]
TIMED = {"latency", "latency_ns", "reads", "writes", "super_in", "super_out"}
WAITING = {"syscalls", "wakeups", "spins", "spin_hits"}
ETH_P_IP = 0x0800
HOST = 0


@contextlib.contextmanager
def image_of(all_: World) -> Iterator[images.Image]:
    """What the engine, attached before, would leave."""
    node = all_.node
    fib = build_fib([PEER], own_subnet=node.subnet, generation=1)
    fd = images.make()
    try:
        facts = facts_of(node.tun, [node.sock])
        ImageWriter(fd).write(*content(all_.engine.early_plan(), fib, facts))
        yield images.read(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def early_of(all_: World) -> Iterator[EarlyWorkers]:
    """Workers that carry packets in the place of the engine, which is detached."""
    all_.engine.detach()
    with image_of(all_) as image:
        workers = EarlyWorkers(image, all_.node.tun.fds, [all_.node.sock.fileno()])
    workers.start()
    try:
        yield workers
    finally:
        workers.close()


@contextlib.contextmanager
def successor(all_: World, engine: Engine) -> Iterator[Any]:
    """Another engine on the same socket, whose one peer has hop id 5."""
    context = EngineContext(
        fib=build_fib([replace(PEER, hop_id=5)], own_subnet=all_.node.subnet, generation=1),
        policy=Policy(
            tun_address=int(all_.node.subnet.network_address),
            source_check=SourceCheck.COUNT,
            port=PORT,
        ),
        loop=asyncio.get_running_loop(),
    )
    made = make_engine(engine, [all_.node.sock], EngineSettings(), context)
    try:
        yield made
    finally:
        made.stop()


def from_pods() -> list[bytes]:
    """Packets into the TUN: all that encap decides by."""
    rng = random.Random(5)
    found = [udp(rng.randbytes(n), source=OWN, destination=OF_PEER) for n in (0, 1, 99, 1400)]
    found += [udp(b"x", source=OWN, destination=OF_PEER, ttl=ttl) for ttl in (1, 2, 255)]
    found += [udp(b"x", source=OWN, destination=to) for to in (NOWHERE, "10.5.1.77")]
    found.append(udp(b"x", source=OWN, destination=OF_PEER, ip_options=ROUTER_ALERT))
    found.append(udp(b"part", source=OWN, destination=OF_PEER, frag=MF))
    found.append(icmp_echo(b"ping", source=OWN, destination=OF_PEER))
    return found


def from_wire() -> list[tuple[str, bytes]]:
    """Datagrams, and who sends them: all that decap decides by."""
    rng = random.Random(6)

    def to_app(payload: bytes, *, source: str = OF_PEER, to: str = OWN, ttl: int = 64) -> bytes:
        # To a port somebody has: the kernel must not answer by itself.
        return udp(payload, source=source, destination=to, dport=APP_PORT, ttl=ttl)

    good = to_app(b"hello")
    found = [("peer", to_app(rng.randbytes(n))) for n in (0, 1, 1400)]
    found += [("peer", to_app(b"x", ttl=ttl)) for ttl in (1, 2, 255)]
    found += [("peer", good[:cut]) for cut in (0, 1, 19, 20, len(good) - 1)]
    found += [("peer", good + b"padding"), ("peer", b"garbage" * 9), ("stranger", good)]
    found += [("peer", to_app(b"x", source=NOWHERE)), ("peer", to_app(b"x", to=NOWHERE))]
    for at in range(20):
        broken = bytearray(good)
        broken[at] ^= 0xFF
        found.append(("peer", bytes(broken)))
    return found


@contextlib.asynccontextmanager
async def wires(all_: World) -> AsyncIterator[tuple[socket.socket, socket.socket]]:
    """A socket that sends whole packets into the TUN, and one that sees what is written to it."""
    host = all_.node.host
    into = await host.call(socket.socket, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    seen = await host.call(
        socket.socket, socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_IP)
    )
    with into, seen:
        seen.bind((all_.node.tun.name, ETH_P_IP))
        seen.setblocking(False)
        yield into, seen


def drained(sock: socket.socket, *, is_device: bool = False) -> list[bytes]:
    """All there is; of a device what came from it, not what went into it."""
    found = []
    while select.select([sock], [], [], 0)[0]:
        data, sender = sock.recvfrom(65535)
        if not is_device or sender[2] == HOST:
            found.append(data)
    return found


async def carried(
    all_: World, count: Callable[[], CounterBase]
) -> tuple[tuple[list[bytes], list[bytes]], CounterBase]:
    """What the packets become, on the wire and out of the TUN; and the counters then."""
    on_wire: list[bytes] = []
    from_tun: list[bytes] = []
    async with wires(all_) as (into, seen):
        drained(all_.peer)
        before = count().totals
        encap, decap = before.encap.packets_in, before.decap.packets_in
        for who, data in [("pod", packet) for packet in from_pods()] + from_wire():
            if who == "pod":
                into.sendto(data, (".".join(map(str, data[16:20])), 0))
                encap += 1
            else:
                sender = all_.peer if who == "peer" else all_.stranger
                sender.sendto(data, ("192.0.2.1", PORT))
                decap += 1

            def is_read(want: tuple[int, int] = (encap, decap)) -> bool:
                now = count().totals
                return (now.encap.packets_in, now.decap.packets_in) == want

            await until(is_read, f"{data[:40].hex()} was read", poll_s=0.001)

        def is_out() -> bool:
            # A packet is counted as read before it is written.
            on_wire.extend(drained(all_.peer))
            from_tun.extend(drained(seen, is_device=True))
            now = count().totals
            return now.is_conserved and (len(on_wire), len(from_tun)) == (
                now.encap.packets_out + now.icmp_to_peers,
                now.decap.packets_out + now.icmp_to_tun,
            )

        await until(is_out, "all that was counted as sent came out")
    return (on_wire, from_tun), count()


def comparable(base: CounterBase) -> tuple[dict[str, Any], list[Any]]:
    """Counters without those of time and of waiting; hops without their times."""
    document = base.totals.as_dict()
    for direction in ("encap", "decap"):
        document[direction] = {
            name: value for name, value in document[direction].items() if name not in TIMED
        }
    hops = [
        [int(row[name]) for name in row.dtype.names if not name.endswith("_ns")]
        for row in base.hops
    ]
    return {name: value for name, value in document.items() if name not in WAITING}, hops


@pytest.mark.parametrize(("engine", "layout"), HOWS, ids=str)
async def test_every_packet_becomes_the_same(make_lab: Any, engine: Engine, layout: Layout) -> None:
    async with world(make_lab, engine, layout=layout) as all_:
        expected, full = await carried(all_, all_.engine.base)
        assert all(expected), "packets came out at all"
        with early_of(all_) as workers:
            found, _ = await carried(all_, lambda: counted_by(workers))
            workers.stop()
            counted = counted_by(workers)
        assert found == expected
        assert counted.totals.is_conserved
        assert counted.totals.encap.dropped and counted.totals.decap.dropped
        assert comparable(counted) == comparable(full)


@pytest.mark.parametrize("engine", C_ENGINES, ids=lambda engine: engine.value)
async def test_the_engine_counts_on_and_no_packet_is_lost(make_lab: Any, engine: Engine) -> None:
    """From the engine to the workers of an image and back, three times, packets all the time."""
    async with world(make_lab, engine) as all_:
        sent = 0

        async def send(count: int) -> None:
            nonlocal sent
            for _ in range(count):
                all_.app.sendto(sent.to_bytes(4, "big"), (OF_PEER, 9))
                sent += 1
                await asyncio.sleep(0.0005)

        base = CounterBase()
        for _ in range(3):
            await send(20)
            with early_of(all_) as workers:
                await send(20)
                workers.renew()
                await send(20)
                workers.stop()
                await send(5)  # in the queue
                base += counted_by(workers)
                all_.engine.attach(all_.node.tun)
        await send(20)
        # An engine goes on once, before it is attached; here it has carried before.
        all_.engine.go_on_from(base)
        await all_.until_read(sent, 0)
        numbers = [int.from_bytes(each[-4:], "big") for each in drained(all_.peer)]
        counted = all_.engine.counters()
        assert numbers == list(range(sent)), f"none lost, none twice, in order: {counted}"
        assert counted.encap.packets_out == sent
        assert counted.is_conserved
        hops = all_.engine.hop_counters()
        assert sum(hop.packets_out for hop in hops.values()) == sent
        assert hops[PEER.hop_id].last_heard is None


@every_engine
async def test_a_successor_counts_on(make_lab: Any, engine: Engine) -> None:
    """With other hop ids; what was counted of a peer that is gone stays in the totals."""
    gone = peer_of("10.5.9.0/24", "192.0.2.3", hop_id=9)
    async with world(make_lab, engine) as all_:
        all_.node.install([PEER, gone])
        for number in range(7):
            all_.app.sendto(b"x", (OF_PEER if number % 2 else "10.5.9.1", 9))
        all_.app.sendto(b"x", (NOWHERE, 9))
        all_.peer.sendto(b"garbage", ("192.0.2.1", PORT))
        await all_.until_read(8, 1)
        all_.engine.detach()
        base = all_.engine.base()
        before = all_.engine.hop_counters()
        assert comparable(base + CounterBase()) == comparable(base)
        totals = from_document(base.totals.as_dict())
        assert totals.as_dict() == base.totals.as_dict(), "nothing is lost on the way"
        with successor(all_, engine) as engine_now:
            engine_now.go_on_from(CounterBase(totals=totals, hops=base.hops))
            now = engine_now.counters()
            assert now.as_dict() == base.totals.as_dict()
            assert now.is_conserved
            hops = engine_now.hop_counters()
            assert set(hops) == {0, 5}
            for hop_id, of in ((0, 0), (5, PEER.hop_id)):
                mine, theirs = hops[hop_id], before[of]
                assert replace(mine, last_heard=None) == replace(theirs, last_heard=None)
                if theirs.last_heard is not None:
                    assert mine.last_heard == pytest.approx(theirs.last_heard, abs=0.1)
            activity = engine_now.activity()
            assert activity.packets_out[5] == before[PEER.hop_id].packets_out
            again = engine_now.base()
            assert comparable(again)[0] == comparable(base)[0]
            assert len(again.hops) == len(base.hops) - 1
            # And an id that gets another endpoint starts anew.
            moved = build_fib(
                [peer_of("10.5.2.0/24", "192.0.2.7", hop_id=5)], own_subnet=None, generation=9
            )
            engine_now.install(moved)
            assert 5 not in engine_now.hop_counters()
            assert engine_now.counters().as_dict() == base.totals.as_dict()
