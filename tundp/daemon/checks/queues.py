"""Check of the queues: how long nobody may read before packets are lost, at which rate.

    from pods    queue of the TUN / rate
    from peers   receive buffer / charge of a datagram / rate

Both are those of one queue and one socket, of which each worker has one: the packets of a flow, and
those of a peer, all go to the same.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from shlex import quote
from typing import Final

from tundp.backend.choose import kind_of
from tundp.daemon.checks.inspection import Inspection
from tundp.errors import ConfigError, PlatformError
from tundp.finding import Finding, Verdict
from tundp.linux.device import queue_len
from tundp.linux.queues import datagram_charge
from tundp.linux.udp import RECEIVE_BUFFER_LEN, granted_receive_buffer
from tundp.observe.status import BackendStatus

RATE: Final = 10_000
"""Packets a second, each way, that the gap is told for."""
SMALL_LEN: Final = 100
"""Bytes of a small inner packet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Room:
    """What there is to wait in, of a daemon that runs, or as a start would get it."""

    device: str
    """Empty before a start."""
    queue_len: int
    receive_buffer: int
    full: int
    """Bytes of the largest inner packet, which is the payload of a datagram."""
    workers: int


async def check_queues(inspection: Inspection) -> AsyncIterator[Finding]:
    """How long a gap is bridged: while a daemon starts again, is replaced, or stands still."""
    config = inspection.network_config
    if config is None or not config.backend.peer_port:
        return  # no queue of ours: the kernel carries packets, and goes on without a daemon
    try:
        room = _room(inspection)
        if room is None:
            return
        charges = [datagram_charge(length) for length in (room.full, SMALL_LEN)]
    except PlatformError as error:
        yield Finding(id="queues", verdict=Verdict.UNKNOWN, evidence=str(error))
        return
    if not (room.queue_len and room.receive_buffer):
        yield Finding(
            id="queues",
            verdict=Verdict.UNKNOWN,
            evidence="the daemon does not say how long they are: its device is gone, or it is of an"
            " older version",
        )
        return
    yield _judge(room, *charges)


def _room(inspection: Inspection) -> _Room | None:
    """None if no interface leads to the other nodes."""
    workers = inspection.settings.workers
    running = inspection.node
    if running is not None and running.backend is not None:
        return _room_of(running.backend, workers)
    config, chosen = inspection.network_config, inspection.interface
    if config is None or chosen is None:
        return None
    try:
        full = kind_of(config.backend).mtu(chosen)
    except ConfigError:
        return None  # said by the check of the interface
    return _Room(
        device="",
        queue_len=queue_len(workers),
        receive_buffer=granted_receive_buffer(),
        full=full,
        workers=workers,
    )


def _room_of(backend: BackendStatus, workers: int) -> _Room:
    device = backend.device
    return _Room(
        device="" if device is None else device.name,
        queue_len=(None if device is None else device.queue_len) or 0,
        receive_buffer=backend.receive_buffer or 0,
        full=backend.mtu or 0,
        workers=workers,
    )


def _judge(room: _Room, charge_full: int, charge_small: int) -> Finding:
    from_pods = room.queue_len / RATE
    from_peers, small = (room.receive_buffer // each / RATE for each in (charge_full, charge_small))
    each = f", of each of {room.workers} workers" if room.workers > 1 else ""
    steps = list(_steps(room))
    return Finding(
        id="queues",
        verdict=Verdict.WARN if steps else Verdict.OK,
        evidence=f"{'' if room.device else 'a start would have room for '}a gap"
        f"{' is bridged' if room.device else ''} of {from_pods:.2f} s at {RATE:,} packets/s from"
        f" pods (TUN queue of {room.queue_len:,} packets{each}), and of {from_peers:.2f} s at"
        f" {RATE:,} full-size datagrams/s from peers, {small:.2f} s if small (receive buffer of"
        f" {room.receive_buffer:,} bytes{each}, of which one takes {charge_full:,} or"
        f" {charge_small:,})",
        meaning="what comes in while no daemon reads, as at a restart, waits there; one more is"
        " lost, and counted"
        if steps
        else "",
        next_step="; ".join(steps),
        facts={
            "queue_len": str(room.queue_len),
            "receive_buffer": str(room.receive_buffer),
            "charge_full": str(charge_full),
            "charge_small": str(charge_small),
            "rate": str(RATE),
            "from_pods_s": f"{from_pods:.4f}",
            "from_peers_s": f"{from_peers:.4f}",
        },
    )


def _steps(room: _Room) -> Iterator[str]:
    """What gives the queues the length that tundp asks for, where something withholds it."""
    if room.queue_len < (wanted := queue_len(room.workers)):
        yield f"ip link set dev {quote(room.device)} txqueuelen {wanted}"
    if room.receive_buffer < 2 * RECEIVE_BUFFER_LEN:
        then = ", then start the daemon again" if room.device else ""
        yield (
            f"sysctl -w net.core.rmem_max={RECEIVE_BUFFER_LEN}{then}, or give it CAP_NET_ADMIN,"
            " with which it needs no sysctl"
        )
