"""Lanes of `tundp chaos`: what becomes of a datagram, and that none goes uncounted."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import cast

from tests.routes import fib_of
from tests.wait import until
from tundp.backend.udp.chaos import ENDED_KEPT, Chaos
from tundp.backend.udp.chaos_relay import Lane, LanePlan
from tundp.backend.udp.echoes import Echoes, ProberSettings
from tundp.engine.base import Dataplane
from tundp.wire.impair import Impairment

HERE = "127.0.0.1"
HEADER = struct.Struct("!BBHHHBBHII")


def packet(number: int) -> bytes:
    """An IPv4 packet (RFC 791) of UDP, numbered."""
    ends = int(IPv4Address("10.5.1.2")), int(IPv4Address("10.5.2.2"))
    return HEADER.pack(0x45, 0, 28, number, 0, 64, 17, 0, *ends) + number.to_bytes(8)


def number_of(data: bytes) -> int:
    return int.from_bytes(data[-8:])


@dataclass(frozen=True, kw_only=True)
class Ground:
    """A lane from a port of this host to another."""

    lane: Lane
    engine: socket.socket
    """Bound where the backend's datagrams come from."""
    peer: socket.socket

    def arrived(self) -> list[int]:
        """The numbers of what the peer has got by now."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(number_of(self.peer.recv(2048)))
        return found


@contextlib.contextmanager
def ground(impairment: Impairment, seed: str = "7") -> Iterator[Ground]:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as engine,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer,
    ):
        engine.bind((HERE, 0))
        peer.bind((HERE, 0))
        peer.setblocking(False)
        plan = LanePlan(
            impairment=impairment,
            seed=seed,
            source=IPv4Address(HERE),
            port=engine.getsockname()[1],
            peer=peer.getsockname(),
            ends_at=time.monotonic() + 3600,
        )
        lane = Lane(plan)
        try:
            yield Ground(lane=lane, engine=engine, peer=peer)
        finally:
            lane.close()


def passed(own_before: dict[int, int]) -> list[int]:
    """Which of 60 packets pass, with so many requests of tundp's own before some of them."""
    with ground(Impairment(loss=0.5)) as here:
        now = time.monotonic()
        for number in range(60):
            for own in range(own_before.get(number, 0)):
                here.lane.take(packet(1000 + own), now, is_own=True)
            here.lane.take(packet(number), now)
        here.lane.send_due(now)
        return [number for number in here.arrived() if number < 1000]


def test_a_seed_repeats_a_run_whatever_tundp_asks_meanwhile() -> None:
    alone = passed({})
    assert 0 < len(alone) < 60
    assert passed({0: 1}) == alone
    assert passed({3: 2, 17: 5, 40: 1}) == alone


def test_its_own_requests_are_impaired_by_the_seed_too() -> None:
    fates = []
    for _ in range(2):
        with ground(Impairment(loss=0.5)) as here:
            now = time.monotonic()
            for number in range(60):
                here.lane.take(packet(number), now, is_own=True)
            here.lane.send_due(now)
            fates.append(here.arrived())
            counts = here.lane.counts()
            assert (counts.own, counts.holds) == (60, True)
    assert fates[0] == fates[1]
    assert 0 < len(fates[0]) < 60
    assert fates[0] != passed({})


def test_what_comes_from_elsewhere_is_discarded_by_name() -> None:
    with ground(Impairment(loss=0.5)) as here:
        here.peer.sendto(packet(1), here.lane.sock.getsockname())
        now = time.monotonic()
        here.lane.receive(now)
        here.lane.send_due(now)
        counts = here.lane.counts()
        assert here.arrived() == []
        assert (counts.received, counts.foreign, counts.holds) == (1, 1, True)


def test_what_is_unread_when_a_lane_closes_is_counted() -> None:
    with ground(Impairment(loss=0.5)) as here:
        for number in range(3):
            here.engine.sendto(packet(number), here.lane.sock.getsockname())
        here.lane.close()
        counts = here.lane.counts()
        assert (counts.received, counts.overflow, counts.holds) == (3, 3, True)


class Diverted:
    """Where an engine has to send to."""

    def __init__(self) -> None:
        self.ways: dict[int, tuple[int, int]] = {}

    def divert(self, ways: Mapping[int, tuple[int, int]]) -> None:
        self.ways = dict(ways)


async def test_totals_hold_what_runs_send_when_they_are_not_listed_any_more() -> None:
    """Of more runs than are kept, each with packets that wait when it ends, and some on the way."""
    count = ENDED_KEPT + 5
    routes = [(f"10.5.{number}.0/24", f"127.5.{number}.1") for number in range(1, count + 1)]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind((HERE, 0))
        engine = Diverted()
        echoes = Echoes()
        chaos = Chaos(echoes, lambda _: None, lambda _: None)
        settings = ProberSettings(
            source=IPv4Address(HERE),
            port=sender.getsockname()[1],
            tun_address=IPv4Address("10.5.0.0"),
            full=1472,
        )
        chaos.start(cast("Dataplane", engine), settings, fib_of(*routes))
        try:
            runs = await chaos.begin("all", Impairment(delay_s=0.5), for_s=600, seed=7)
            assert len(runs) == count
            ways = [(str(IPv4Address(address)), port) for address, port in engine.ways.values()]
            for way in ways:
                sender.sendto(packet(1), way)
            await until(lambda: chaos.totals().received == count, "every packet to come")
            chaos.stop()
            # The engine has not noticed yet.
            for way in ways:
                sender.sendto(packet(2), way)
            await until(lambda: all(run.lane.is_closed for run in runs), "the lanes to be closed")
            for _ in range(2):
                totals = chaos.totals()
                assert (totals.received, totals.sent) == (2 * count, 2 * count)
                assert totals.holds
        finally:
            chaos.close()
            echoes.close()
