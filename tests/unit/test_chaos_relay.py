"""Lanes of `tundp chaos`: what becomes of a datagram, and that none goes uncounted."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address

from tundp.backend.udp.chaos_relay import Lane, LanePlan
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
