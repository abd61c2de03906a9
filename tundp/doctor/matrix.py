"""Asks every peer how it answers, and every tundp peer how it reaches the others."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from tundp.admin import fetch_status
from tundp.doctor.hello import Hello, ask_hello, ask_reach
from tundp.doctor.home import STATUS_S, Home
from tundp.doctor.probes import SMALL, Asker, Question, asking
from tundp.errors import PlatformError
from tundp.observe.leases import Leases
from tundp.observe.matrix import Matrix, MatrixNode, MatrixRow, judged
from tundp.observe.ping import Answer, RoundTrips
from tundp.observe.status import PeerStatus

AT_ONCE: Final = 32
"""Peers that are asked at the same time."""
GRID_MAX: Final = 256
"""Peers up to which they are asked for their own view: its cells are the square of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixWish:
    """What was asked for on the command line."""

    count: int = 5
    """Echo requests to each peer."""
    interval_s: float = 0.1
    wait_s: float = 1.0
    limit_s: float = 30.0
    """Of all together."""


@dataclass(slots=True)
class _Found:
    """What is known so far."""

    nodes: dict[IPv4Network, MatrixNode]
    rows: dict[IPv4Network, MatrixRow] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


async def matrix(
    home: Home, leases: Leases | None, wish: MatrixWish, *, stop: asyncio.Event
) -> Matrix:
    """Ask all peers until all is known, the limit is over or `stop` is set. PlatformError."""
    status = home.status
    assert status is not None and status.subnet is not None
    began, at = time.monotonic(), time.time()
    hosts = {} if leases is None else {each.subnet: each.host for each in leases.leases}
    found = _Found(
        {
            peer.subnet: MatrixNode(
                subnet=peer.subnet,
                public_ip=peer.public_ip,
                port=peer.port,
                host=hosts.get(peer.subnet, ""),
            )
            for peer in status.peers
        }
    )
    found.notes += [
        f"{each.on_purpose}; what is lost to it may be its doing: {each.stop}"
        for each in status.chaos_now
    ]
    work = asyncio.ensure_future(_ask_all(home, status.peers, wish, found))
    ended = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((work, ended), timeout=wish.limit_s, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
    finally:
        for task in (work, ended):
            task.cancel()
        await asyncio.gather(work, ended, return_exceptions=True)
    left = sum(not each.is_asked for each in found.nodes.values())
    if left:
        why = "interrupted" if stop.is_set() else f"no time left after {wish.limit_s:g} s"
        found.notes.append(f"{left} of {len(found.nodes)} peers not asked: {why} (--timeout)")
    await _add_heard(home, found, since=at)
    return judged(
        status.subnet,
        status.public_ip or home.address,
        list(found.nodes.values()),
        list(found.rows.values()),
        took_s=time.monotonic() - began,
        notes=found.notes,
    )


async def _ask_all(
    home: Home, peers: Sequence[PeerStatus], wish: MatrixWish, found: _Found
) -> None:
    has_grid = len(peers) <= GRID_MAX
    if not has_grid:
        found.notes.append(
            f"no grid: {len(peers):,} peers, and they are asked for their views up to {GRID_MAX}"
        )
    room = asyncio.Semaphore(AT_ONCE)
    async with contextlib.AsyncExitStack() as stack:
        outer = await stack.enter_async_context(asking(home.address))
        inner = None
        if home.tun_address is not None:
            inner = await stack.enter_async_context(asking(home.tun_address))
        one = _One(home, wish, outer, inner, found, has_grid=has_grid)

        async def ask(peer: PeerStatus) -> None:
            async with room:
                await one.ask(peer)

        async with asyncio.TaskGroup() as group:
            for peer in peers:
                group.create_task(ask(peer))


@dataclass(slots=True)
class _One:
    """Asks one peer after the other, several at a time."""

    home: Home
    wish: MatrixWish
    outer: Asker
    inner: Asker | None
    found: _Found
    has_grid: bool = field(kw_only=True)

    async def ask(self, peer: PeerStatus) -> None:
        """All questions to one peer; what is known of it is in `found` then."""
        where = Question(peer.public_ip)
        if self.inner is None:
            await self._without_tunnel(peer, where)
            return
        pings, trips, hello = await asyncio.gather(
            self.outer.ask([where]),
            self._trips(self.inner, peer.subnet.network_address),
            ask_hello(self.home.path, peer.subnet),
        )
        node = replace(
            self.found.nodes[peer.subnet],
            underlay_rtt_ms=_milliseconds(pings.get(where)),
            control=hello.layer.answer,
            implementation=hello.implementation,
        )
        told = self._told_mtu(peer)
        series = trips.series(SMALL)
        if series.received and told:
            full = Question(peer.subnet.network_address, told)
            node = replace(node, is_full_size_lost=full not in await self.inner.ask([full]))
        if self.has_grid:
            self.found.rows[peer.subnet] = await self._row(peer, hello)
        self.found.nodes[peer.subnet] = replace(
            node,
            is_asked=True,
            overlay_rtt_ms=series.rtt_avg_ms,
            sent=series.sent,
            received=series.received,
            path_mtu=told if series.received else None,
        )

    async def _without_tunnel(self, peer: PeerStatus, where: Question) -> None:
        """With host-gw: whether the peer's host answers; packets of pods go the same way."""
        trips = await self._trips(self.outer, peer.public_ip)
        series = trips.series(where.packet_len)
        self.found.nodes[peer.subnet] = replace(
            self.found.nodes[peer.subnet],
            is_asked=True,
            underlay_rtt_ms=series.rtt_avg_ms,
            overlay_rtt_ms=series.rtt_avg_ms,
            sent=series.sent,
            received=series.received,
        )
        self.found.rows[peer.subnet] = MatrixRow(
            subnet=peer.subnet, is_told=False, why_not="host-gw: nobody to ask"
        )

    async def _trips(self, asker: Asker, to: IPv4Address) -> RoundTrips:
        trips = RoundTrips()
        async for each in asker.series(
            to,
            SMALL,
            count=self.wish.count,
            interval_s=self.wish.interval_s,
            wait_s=self.wish.wait_s,
        ):
            trips.add(each.rtt_s)
        return trips

    def _told_mtu(self, peer: PeerStatus) -> int:
        """Bytes of the largest inner packet that pods are told to send to it; 0: not known."""
        if peer.path is not None and peer.path.inner_mtu:
            return peer.path.inner_mtu
        status = self.home.status
        backend = None if status is None else status.backend
        device = None if backend is None else backend.device
        return 0 if device is None else device.mtu

    async def _row(self, peer: PeerStatus, hello: Hello) -> MatrixRow:
        """What the peer says of the others."""
        if hello.layer.answer is not Answer.ANSWERED:
            return MatrixRow(subnet=peer.subnet, is_told=False, why_not=_why_not(hello))
        try:
            reached = await ask_reach(self.home.path, peer.subnet)
        except PlatformError as error:
            return MatrixRow(subnet=peer.subnet, is_told=False, why_not=str(error))
        if reached is None:
            return MatrixRow(subnet=peer.subnet, is_told=False, why_not="did not answer in time")
        return MatrixRow(subnet=peer.subnet, is_told=True, reached=reached)


def _why_not(hello: Hello) -> str:
    match hello.layer.answer:
        case Answer.STOCK:
            return "does not tell (stock flanneld, or peer tools off)"
        case Answer.OFF:
            return "not asked: peer tools are off on this node"
        case Answer.SILENT:
            return "does not answer"
    return hello.layer.evidence or "not asked"


async def _add_heard(home: Home, found: _Found, *, since: float) -> None:
    """Of peers that do not answer: whether datagrams came from them all the same."""
    silent = [each for each in found.nodes.values() if each.urgency == 0]
    if not silent:
        return
    try:
        status = await fetch_status(home.path, limit_s=STATUS_S)
    except PlatformError as error:
        found.notes.append(f"what comes from silent peers was not looked at: {error}")
        return
    heard = {
        peer.subnet
        for peer in status.peers
        if peer.traffic is not None and (peer.traffic.last_heard or 0.0) >= since
    }
    for each in silent:
        found.nodes[each.subnet] = replace(each, is_heard=each.subnet in heard)


def _milliseconds(rtt_s: float | None) -> float | None:
    return None if rtt_s is None else round(rtt_s * 1e3, 4)
