"""Event records: every engine tells the same story of the same packets."""

from __future__ import annotations

import asyncio
import errno
import gc
import select
import socket
import struct
import time
import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tests.engine.test_contract import (
    APP_PORT,
    NOWHERE,
    OF_PEER,
    World,
    every_engine,
    inner,
    receive,
    world,
)
from tests.nodes import PORT
from tests.wait import DEADLINE_S, until
from tundp.choices import Engine
from tundp.engine.native import engine as native_engine
from tundp.engine.taps import TAPS_MAX, TapRequest
from tundp.errors import TooManyReaders
from tundp.wire.filter import parse

HEADER = struct.Struct("=IBBBxQQIIIHHIIIHHII")
"""Written down once more: what a reader of the records must know."""
READ, SEND, RECEIVE, WRITE = 1, 2, 3, 4
UDP_SEGMENT = 103  # linux/udp.h
SO_TIMESTAMPNS_NEW = 64  # asm-generic/socket.h
SO_TIMESTAMPING_NEW = 65
PEER_ADDRESS, STRANGER = 0xC0000202, 0xC0000203
OF_THE_PEER: dict[str, int] = {"hop": 2, "outer": PEER_ADDRESS, "port": PORT}
NO_ROUTE, TTL_EXCEEDED, SEND_UNREACHABLE, MARTIAN = 5, 7, 12, 10


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a record says, but its time, the FIB's generation, and how long it waited."""

    stage: int
    is_dropped: int = 0
    reason: int = 0
    packet_id: int
    more_ids: int = 0
    hop: int = 0
    outer: int = 0
    port: int = 0
    error: int = 0
    packets: int = 1
    together: int = 1
    gso_size: int = 0
    length: int = 0
    packet: bytes = b""
    wait_ns: int = field(default=0, compare=False)


def read(data: bytes) -> list[Seen]:
    found = []
    offset = 0
    while offset < len(data):
        (
            size,
            stage,
            dropped,
            reason,
            time_ns,
            packet_id,
            more,
            hop,
            outer,
            port,
            error,
            length,
            packets,
            together,
            captured,
            gso_size,
            generation,
            wait_ns,
        ) = HEADER.unpack_from(data, offset)
        assert size % 8 == 0 and HEADER.size + captured <= size < HEADER.size + captured + 8
        assert time_ns > 0 and generation == 0
        assert stage == RECEIVE or not wait_ns
        packet = data[offset + HEADER.size : offset + HEADER.size + captured]
        assert not any(data[offset + HEADER.size + captured : offset + size])
        found.append(
            Seen(
                stage=stage,
                is_dropped=dropped,
                reason=reason,
                packet_id=packet_id,
                more_ids=more,
                hop=hop,
                outer=outer,
                port=port,
                error=error,
                packets=packets,
                together=together,
                gso_size=gso_size,
                packet=packet,
                length=length,
                wait_ns=wait_ns,
            )
        )
        offset += size
    assert offset == len(data)
    return found


async def records(tap: Any, count: int) -> list[Seen]:
    """The next `count` records of a tap, of all workers."""
    found: list[Seen] = []

    def take() -> bool:
        for _, data in tap.read():
            found.extend(read(data))
        return len(found) >= count

    await until(take, f"{count} event records")
    return found


def headless(seen: Seen) -> Seen:
    """Without the packet."""
    return replace(seen, packet=b"", length=0)


@every_engine
async def test_each_packet_has_its_records(make_lab: Any, engine: Engine) -> None:
    async with world(make_lab, engine) as here:
        tap = here.engine.open_tap(TapRequest(snap=2048))
        here.app.sendto(b"out", (OF_PEER, APP_PORT))
        sent = await receive(here.peer)
        packet = inner(b"in")
        here.peer.sendto(packet, ("192.0.2.1", PORT))
        assert await receive(here.app) == b"in"
        found = {seen.stage: seen for seen in await records(tap, 4)}
        tap.close()
        assert set(found) == {READ, SEND, RECEIVE, WRITE}
        assert headless(found[READ]) == Seen(stage=READ, packet_id=found[READ].packet_id)
        assert headless(found[SEND]) == Seen(
            stage=SEND, packet_id=found[READ].packet_id, hop=2, outer=PEER_ADDRESS, port=PORT
        )
        assert headless(found[RECEIVE]) == Seen(
            stage=RECEIVE, packet_id=1, hop=2, outer=PEER_ADDRESS, port=PORT
        )
        assert headless(found[WRITE]) == Seen(
            stage=WRITE, packet_id=1, hop=2, outer=PEER_ADDRESS, port=PORT
        )
        assert found[SEND].packet == sent
        assert found[READ].packet[8] == sent[8] + 1
        assert found[RECEIVE].packet == packet
        assert found[WRITE].packet[20:] == packet[20:]
        assert [found[stage].length for stage in found] == [
            len(found[stage].packet) for stage in found
        ]


@every_engine
async def test_drops_have_reason_errno_and_packet(make_lab: Any, engine: Engine) -> None:
    async with world(make_lab, engine) as here:
        tap = here.engine.open_tap(TapRequest(stages=1, snap=28))
        here.app.sendto(b"nobody", (NOWHERE, APP_PORT))
        await here.until_read(1, 0)
        expired = inner(b"late", ttl=1)
        here.peer.sendto(expired, ("192.0.2.1", PORT))
        await here.until_read(1, 1)
        foreign = inner(b"martian", source="127.0.0.1")
        here.stranger.sendto(foreign, ("192.0.2.1", PORT))
        await here.until_read(1, 2)
        found = await records(tap, 3)
        tap.close()
        assert [headless(seen) for seen in sorted(found, key=lambda s: (s.stage, s.packet_id))] == [
            Seen(stage=SEND, is_dropped=1, reason=NO_ROUTE, packet_id=1),
            Seen(
                stage=WRITE,
                is_dropped=1,
                reason=TTL_EXCEEDED,
                packet_id=1,
                hop=2,
                outer=PEER_ADDRESS,
                port=PORT,
            ),
            Seen(
                stage=WRITE,
                is_dropped=1,
                reason=MARTIAN,
                packet_id=2,
                outer=STRANGER,
                port=PORT,
            ),
        ]
        assert [seen.packet for seen in found if seen.reason == TTL_EXCEEDED] == [expired[:28]]
        assert [seen.length for seen in found if seen.reason == MARTIAN] == [len(foreign)]


@every_engine
async def test_a_refused_send_has_its_errno(make_lab: Any, engine: Engine) -> None:
    async with world(make_lab, engine) as here:
        tap = here.engine.open_tap(TapRequest(stages=1, snap=0))
        await here.node.host.netlink.call(
            "block the way", "route", "add", dst="192.0.2.2/32", type="unreachable"
        )
        here.app.sendto(b"refused", (OF_PEER, APP_PORT))
        await here.until_read(1, 0)
        (seen,) = await records(tap, 1)
        tap.close()
        assert headless(seen) == Seen(
            stage=SEND,
            is_dropped=1,
            reason=SEND_UNREACHABLE,
            packet_id=1,
            hop=2,
            outer=PEER_ADDRESS,
            port=PORT,
            error=errno.EHOSTUNREACH,
        )


@every_engine
async def test_what_has_no_room_is_counted_as_lost(make_lab: Any, engine: Engine) -> None:
    count = 600
    async with world(make_lab, engine) as here:
        tap = here.engine.open_tap(TapRequest(stages=1 << RECEIVE, snap=1000, size=1 << 18))
        packet = inner(bytes(900))
        for number in range(count):
            here.peer.sendto(packet, ("192.0.2.1", PORT))
            if number % 50 == 49:
                await here.until_read(0, number + 1)
        (data,) = [data for _, data in tap.read()]
        kept = len(read(data))
        assert 0 < kept < count
        assert sum(tap.lost()) == count - kept
        here.peer.sendto(packet, ("192.0.2.1", PORT))
        assert [seen.packet_id for seen in await records(tap, 1)] == [count + 1]
        tap.close()


@every_engine
async def test_taps_are_independent_and_bounded(make_lab: Any, engine: Engine) -> None:
    async with world(make_lab, engine) as here:
        taps = [here.engine.open_tap(TapRequest()) for _ in range(TAPS_MAX)]
        with pytest.raises(TooManyReaders):
            here.engine.open_tap(TapRequest())
        for tap in taps[2:]:
            tap.close()
            tap.close()
        assert here.engine.tap_count() == 2
        here.peer.sendto(inner(b"one"), ("192.0.2.1", PORT))
        first, second = [await records(tap, 2) for tap in taps[:2]]
        assert first == second
        taps[0].close()
        here.peer.sendto(inner(b"two"), ("192.0.2.1", PORT))
        assert [seen.packet_id for seen in await records(taps[1], 2)] == [2, 2]
        assert taps[0].read() == []
        taps[1].close()
        assert here.engine.tap_count() == 0


@every_engine
async def test_a_closed_tap_is_not_kept(
    make_lab: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rings are up to 64 MB a worker."""
    monkeypatch.setattr(native_engine, "_EXPIRE_S", 0.05)
    async with world(make_lab, engine) as here:
        tap = here.engine.open_tap(TapRequest())
        kept = weakref.ref(tap)
        tap.close()
        del tap
        here.peer.sendto(inner(b"one"), ("192.0.2.1", PORT))
        await until(lambda: gc.collect() >= 0 and kept() is None, "the tap to be freed")


@pytest.mark.parametrize("engine", [Engine.GSO, Engine.MMSG], ids=lambda engine: engine.value)
async def test_every_packet_of_a_train_has_its_own(make_lab: Any, engine: Engine) -> None:
    """Forty datagrams in the TUN's queue at once leave in trains: each is found, in order."""
    count = 40
    async with world(make_lab, engine, is_attached=False) as here:
        tap = here.engine.open_tap(TapRequest(stages=1 << READ | 1 << SEND, snap=64))
        for number in range(count):
            here.app.sendto(bytes([number]) * 20, (OF_PEER, APP_PORT))
        here.engine.attach(here.node.tun)
        found = await records(tap, 2 * count)
        tap.close()
        reads = [seen for seen in found if seen.stage == READ]
        sends = [seen for seen in found if seen.stage == SEND]
        assert [seen.packet_id for seen in reads] == list(range(1, count + 1))
        assert [seen.packet_id for seen in sends] == list(range(1, count + 1))
        assert [seen.packet[28] for seen in sends] == list(range(count))
        # A vnet header leaves the UDP checksum to whoever sends.
        assert [seen.packet[28:] for seen in sends] == [seen.packet[28:] for seen in reads]
        if engine is Engine.GSO:
            assert max(seen.together for seen in sends) > 1


async def test_packets_the_kernel_put_together_have_one_each(make_lab: Any) -> None:
    """gso: a receive of ten datagrams has ten records, the super-packet written of them has one."""
    count = 10
    async with world(make_lab, Engine.GSO) as here:
        tap = here.engine.open_tap(TapRequest(stages=1 << RECEIVE | 1 << WRITE, snap=64))
        packets = [inner(bytes([number]) * 100) for number in range(count)]
        length = len(packets[0])
        here.peer.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, length)
        here.peer.sendto(b"".join(packets), ("192.0.2.1", PORT))
        await here.until_read(0, count)
        found = await records(tap, count + 1)
        received = [seen for seen in found if seen.stage == RECEIVE]
        written = [seen for seen in found if seen.stage == WRITE]
        tap.close()
        assert [seen.packet for seen in received] == [packet[:64] for packet in packets]
        assert {seen.length for seen in received} == {length}
        assert sum(seen.packets for seen in written) == count
        for seen in written:
            assert seen.together == seen.packets
            assert (seen.gso_size == 100) == (seen.packets > 1)
        assert max(seen.together for seen in received) > 1
        ids = {seen.packet_id for seen in received}
        covered = {
            number
            for seen in written
            for number in range(seen.packet_id, seen.packet_id + seen.more_ids + 1)
        }
        assert ids == covered


@every_engine
@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("", [READ, SEND, READ, SEND, RECEIVE, WRITE, RECEIVE, WRITE]),
        ("encap", [READ, SEND, READ, SEND]),
        ("dst host 10.5.1.0", [RECEIVE, WRITE, RECEIVE, WRITE]),
        ("peer 192.0.2.2", [SEND, RECEIVE, WRITE]),
        ("peer 192.0.2.3 or reason no_route", [SEND, RECEIVE, WRITE]),
        ("drop", [SEND, WRITE]),
        ("reason martian_source and not src 10.5.2.9", [WRITE]),
        ("udp dst port 7000 and less 30 and in", [RECEIVE, WRITE]),
        ("tcp", []),
    ],
)
async def test_a_filter_runs_before_records_are_made(
    make_lab: Any, engine: Engine, text: str, stages: list[int]
) -> None:
    """Sent to a peer; dropped for no route; delivered; dropped as a martian."""
    async with world(make_lab, engine) as here:
        tap = here.engine.open_tap(TapRequest(filter=parse(text), snap=20))
        everything = here.engine.open_tap(TapRequest())
        here.app.sendto(b"out", (OF_PEER, APP_PORT))
        await receive(here.peer)
        here.app.sendto(b"nobody", (NOWHERE, APP_PORT))
        await here.until_read(2, 0)
        here.peer.sendto(inner(b"in"), ("192.0.2.1", PORT))
        assert await receive(here.app) == b"in"
        here.stranger.sendto(inner(bytes(50), source="127.0.0.1"), ("192.0.2.1", PORT))
        await records(everything, 8)
        found = [seen.stage for _, data in tap.read() for seen in read(data)]
        assert found == stages
        assert sum(tap.lost()) == 0


def let_wait(sock: socket.socket) -> int:
    """Let a datagram wait in a socket, and the loop with it: at least so many ns."""
    readable, _, _ = select.select([sock], [], [], DEADLINE_S)
    assert readable, "no datagram arrives"
    arrived_ns = time.monotonic_ns()
    time.sleep(0.05)
    return time.monotonic_ns() - arrived_ns


async def first_wait(here: World, tap: Any) -> int:
    """Send datagrams until one has a wait: the kernel begins to stamp when it gets round to it."""
    for _ in range(1000):
        here.peer.sendto(inner(b"first"), ("192.0.2.1", PORT))
        (seen,) = await records(tap, 1)
        if seen.wait_ns:
            return seen.wait_ns
        await asyncio.sleep(0.01)
    raise AssertionError("a thousand datagrams, and the wait of none is known")


@every_engine
async def test_a_receive_says_how_long_its_datagram_waited(make_lab: Any, engine: Engine) -> None:
    """Nobody receives while this thread sleeps: no worker runs, nor the loop of `reference`."""
    async with world(make_lab, engine, is_attached=False) as here:
        tap = here.engine.open_tap(TapRequest(stages=1 << RECEIVE))
        here.peer.sendto(inner(b"at once"), ("192.0.2.1", PORT))
        waited_ns = let_wait(here.node.sock)
        here.engine.attach(here.node.tun)
        (early,) = await records(tap, 1)
        # It came before the kernel stamped datagrams, or, if others had it do so, behind that.
        assert not early.wait_ns or early.wait_ns >= waited_ns
        began_ns = time.monotonic_ns()
        assert await first_wait(here, tap) <= time.monotonic_ns() - began_ns
        here.engine.detach()
        began_ns = time.monotonic_ns()
        here.peer.sendto(inner(b"late"), ("192.0.2.1", PORT))
        waited_ns = let_wait(here.node.sock)
        here.engine.attach(here.node.tun)
        (late,) = await records(tap, 1)
        tap.close()
        assert waited_ns <= late.wait_ns <= time.monotonic_ns() - began_ns


@every_engine
async def test_a_second_reader_waits_for_stamps_again(make_lab: Any, engine: Engine) -> None:
    """Between two readers the kernel stops to stamp; a worker that stands still does not notice."""
    async with world(make_lab, engine) as here:
        first = here.engine.open_tap(TapRequest(stages=1 << RECEIVE))
        await first_wait(here, first)
        here.engine.detach()
        first.close()
        await asyncio.sleep(0.05)
        second = here.engine.open_tap(TapRequest(stages=1 << RECEIVE))
        here.peer.sendto(inner(b"between"), ("192.0.2.1", PORT))
        waited_ns = let_wait(here.node.sock)
        here.engine.attach(here.node.tun)
        (seen,) = await records(second, 1)
        second.close()
        assert not seen.wait_ns or seen.wait_ns >= waited_ns


async def test_packets_the_kernel_put_together_waited_as_long(make_lab: Any) -> None:
    async with world(make_lab, Engine.GSO) as here:
        tap = here.engine.open_tap(TapRequest(stages=1 << RECEIVE))
        await first_wait(here, tap)
        packet = inner(bytes(100))
        here.peer.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, len(packet))
        here.peer.sendto(packet * 10, ("192.0.2.1", PORT))
        found = await records(tap, 10)
        tap.close()
        assert max(seen.together for seen in found) > 1
        assert all(seen.wait_ns for seen in found)
        assert len({(seen.packet_id, seen.wait_ns) for seen in found}) == len(
            {seen.packet_id for seen in found}
        )


@every_engine
async def test_datagrams_are_stamped_only_while_a_tap_is_open(
    make_lab: Any, engine: Engine
) -> None:
    async with world(make_lab, engine) as here:
        sock = here.node.sock

        def is_stamped() -> bool:
            # What this one has begun goes on until the socket is freed.
            assert not sock.getsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS_NEW)
            return bool(sock.getsockopt(socket.SOL_SOCKET, SO_TIMESTAMPING_NEW))

        assert not is_stamped()
        taps = [here.engine.open_tap(TapRequest()) for _ in range(2)]
        assert is_stamped()
        taps[0].close()
        assert is_stamped()
        # A new socket comes under the old one's descriptor without it.
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPING_NEW, 0)
        here.engine.detach()
        here.engine.rebound()
        assert is_stamped()
        here.engine.attach(here.node.tun)
        taps[1].close()
        taps[1].close()
        assert not is_stamped()
        here.engine.detach()
        here.engine.rebound()
        assert not is_stamped()


def does_host_stamp() -> bool:
    """Whether the kernel stamps what comes for a socket that has not asked for it."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind(("127.0.0.1", 0))
        sender.sendto(b"?", receiver.getsockname())
        select.select([receiver], [], [], DEADLINE_S)
        time.sleep(0.05)
        asked_ns = time.time_ns()
        # What has no stamp yet gets the time of the receive.
        receiver.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS_NEW, 1)
        _, control, _, _ = receiver.recvmsg(1, 64)
        seconds, nanoseconds = struct.unpack("=qq", control[0][2])
        return bool(seconds * 10**9 + nanoseconds < asked_ns)


@every_engine
async def test_the_host_is_stamped_no_longer_when_the_last_tap_has_closed(
    make_lab: Any, engine: Engine
) -> None:
    """The kernel's switch is one for all sockets and namespaces: others may hold it, too."""
    async with world(make_lab, engine) as here:
        # Tests beside this one hold it now and then; a clock's daemon always does.
        if not await until_host_is_not_stamped(2.0):
            pytest.skip("somebody else has the kernel stamp all packets")
        tap = here.engine.open_tap(TapRequest(stages=1 << RECEIVE))
        await first_wait(here, tap)
        tap.close()
        assert await until_host_is_not_stamped(DEADLINE_S), (
            "no tap is open, and packets are stamped"
        )


async def until_host_is_not_stamped(for_s: float) -> bool:
    """Whether the kernel stamps nothing, once in so many seconds."""
    deadline = time.monotonic() + for_s
    while does_host_stamp():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.1)
    return True
