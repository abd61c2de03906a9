"""From the daemon's live parts to the records of `status`.

What is cheap is made at once, on the event loop. What grows with the number of peers is made
when somebody looks at it (`Lazy`), which a scrape of the metrics and a probe of /readyz never
do; the admin socket's answer is made of it in a thread of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network
from itertools import islice
from types import MappingProxyType
from typing import Final, Protocol

from tundp.choices import MtuOrigin
from tundp.engine.base import Dataplane, PathState
from tundp.engine.counters import Counters, HopCounters
from tundp.engine.reach import Reach, Way
from tundp.lease.model import BadEntry
from tundp.lease.routing import RefusedLease
from tundp.linux.iface import Interface
from tundp.observe.status import (
    BadEntryStatus,
    CountersStatus,
    DisabledOffload,
    EngineStatus,
    IcmpStatus,
    InterfaceStatus,
    Lazy,
    LeaseStatus,
    MeasuringStatus,
    PathStatus,
    PeerStatus,
    PeerTraffic,
    ReachStatus,
    RefusedStatus,
    Status,
)
from tundp.printable import SENTENCE_MAX, printable


class StatusSource(Protocol):
    """What a daemon offers to those who show it."""

    def summary(self) -> Status:
        """Everything but peers, refused, bad_entries and settings, of which it has the counts.

        Its cost does not depend on the number of leases.
        """
        ...

    def status(self) -> Status:
        """Everything, the long parts lazy. Call on the event loop; `to_json` in any thread."""
        ...


class Named(Protocol):
    """An Enum whose values are names."""

    @property
    def value(self) -> str:
        """Its name."""
        ...


class ClaimView(Protocol):
    """What is shown of a claim on a lease."""

    @property
    def conflict(self) -> str:
        """Who has our subnet; else empty."""
        ...

    @property
    def expires_in_s(self) -> float | None:
        """Seconds until the lease expires."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerView:
    """A peer as the routing table has it."""

    subnet: IPv4Network
    public_ip: IPv4Address
    port: int | None = None
    hop_id: int | None = None
    backend_type: str = ""
    identity: str | None = None


def lease_status(key: str, state: Named, claim: ClaimView) -> LeaseStatus:
    """What is shown of our lease."""
    left_s = claim.expires_in_s
    return LeaseStatus(
        key=key,
        state=state.value,
        conflict=claim.conflict,
        expires_in_s=None if left_s is None else round(left_s),
        expires_at=None if left_s is None else round(time.time() + left_s),
    )


def interface_status(interface: Interface) -> InterfaceStatus:
    """What is shown of the interface to the other nodes."""
    return InterfaceStatus(
        name=interface.link.name,
        address=interface.address,
        mtu=interface.link.mtu,
        why=interface.why,
        others=interface.others,
        warnings=interface.warnings,
    )


def engine_status(engine: Dataplane) -> EngineStatus:
    """What an engine uses now, what it does without, and why."""
    offloads = engine.offloads()
    return EngineStatus(
        name=engine.name,
        uses=engine.describe(),
        offloads_in_use=tuple(offload.value for offload in offloads.in_use),
        offloads_disabled=tuple(
            DisabledOffload(name=offload.value, reason=why.reason, since=why.since)
            for offload, why in offloads.disabled.items()
        ),
        hop_sockets=engine.hop_sockets(),
        readers=engine.tap_count(),
    )


def counters_status(counters: Counters) -> CountersStatus:
    """Every counter of an engine, by the names its own dict form gives them."""
    return CountersStatus.from_json(counters.as_dict())


def path_counts(engine: Dataplane | None) -> tuple[int, int]:
    """How many paths are narrower than the device, and how many take no UDP_SEGMENT.

    The cost depends on how many paths anything was learnt of, not on the number of peers.
    """
    states = () if engine is None else engine.path_states().values()
    narrow = sum(state.inner_mtu is not None for state in states)
    return narrow, sum(state.no_gso for state in states)


def narrow_by_origin(engine: Dataplane | None) -> Mapping[str, int]:
    """How many paths are narrower than the device, by who says so. The cost is as above."""
    states = () if engine is None else engine.path_states().values()
    origins = [state.mtu_origin for state in states if state.inner_mtu is not None]
    return {origin.value: origins.count(origin) for origin in MtuOrigin}


def peer_statuses(
    count: int,
    peers: Callable[[], Iterable[PeerView]],
    engine: Dataplane | None,
    measurings: Mapping[int, MeasuringStatus],
    reaches: Mapping[int, Reach] = MappingProxyType({}),
) -> Sequence[PeerStatus]:
    """The peers by subnet, with what the engine knows of each, and whether it answers.

    measurings: by hop id.

    peers: evaluated later and in another thread, so over a copy. The engine is asked at once:
    it may only be asked on the event loop. reaches: by hop id.
    """
    now = time.time()
    hops: Mapping[int, HopCounters] = {}
    paths: Mapping[int, PathState] = {}
    if engine is not None:
        hops, paths = engine.hop_counters(), engine.path_states()

    def make() -> list[PeerStatus]:
        ordered = sorted(peers(), key=_place)
        found = [_peer_status(peer, hops, paths, measurings) for peer in ordered]
        if not reaches:
            return found
        return [
            peer
            if view.hop_id is None or (reach := reaches.get(view.hop_id)) is None
            else replace(peer, reach=_reach_status(reach, peer, now))
            for view, peer in zip(ordered, found, strict=True)
        ]

    return Lazy(count, make)


LISTED_MAX: Final = 1000
"""Refused leases, and unreadable entries, that are listed: the store decides how many there are."""


def refused_statuses(refused: Collection[RefusedLease]) -> Sequence[RefusedStatus]:
    """Of the leases that are no peers the first LISTED_MAX."""
    listed = tuple(islice(refused, LISTED_MAX))

    def make() -> list[RefusedStatus]:
        return [
            RefusedStatus(
                key=str(each.lease.key),
                public_ip=each.lease.attributes.public_ip,
                reason=each.refusal.name.lower(),
                means=each.refusal.value,
            )
            for each in listed
        ]

    return Lazy(len(listed), make)


def bad_entry_statuses(entries: Collection[BadEntry]) -> Sequence[BadEntryStatus]:
    """Of the unreadable entries the first LISTED_MAX, by name."""
    listed = tuple(islice(entries, LISTED_MAX))

    def make() -> list[BadEntryStatus]:
        return [
            BadEntryStatus(name=printable(each.name), why=printable(each.why, SENTENCE_MAX))
            for each in sorted(listed, key=lambda each: each.name)
        ]

    return Lazy(len(listed), make)


def _place(peer: PeerView) -> tuple[int, int]:
    """Where a subnet stands among others, in numbers: comparing IPv4Networks takes ten times."""
    return int(peer.subnet.network_address), peer.subnet.prefixlen


def _peer_status(
    peer: PeerView,
    hops: Mapping[int, HopCounters],
    paths: Mapping[int, PathState],
    measurings: Mapping[int, MeasuringStatus],
) -> PeerStatus:
    hop_id = peer.hop_id
    hop = None if hop_id is None else hops.get(hop_id)
    path = None if hop_id is None else paths.get(hop_id)
    return PeerStatus(
        subnet=peer.subnet,
        public_ip=peer.public_ip,
        port=peer.port,
        backend_type=peer.backend_type,
        identity=peer.identity,
        path=None if path is None else _path_status(path),
        measuring=None if hop_id is None else measurings.get(hop_id),
        traffic=None if hop is None else _traffic(hop),
    )


def _path_status(path: PathState) -> PathStatus:
    return PathStatus(
        inner_mtu=path.inner_mtu,
        mtu_origin=path.mtu_origin,
        no_gso=path.no_gso,
        since=path.since,
        origin=path.origin,
    )


def _reach_status(reach: Reach, peer: PeerStatus, now: float) -> ReachStatus:
    way, icmp = reach.way or Way(), reach.unreachable
    return ReachStatus(
        standing=reach.standing.value,
        since=reach.since,
        unanswered_packets=reach.sent,
        echo_requests=reach.asked,
        echo_missed=reach.missed,
        rtt_ms=None if reach.rtt_s is None else round(reach.rtt_s * 1e3, 3),
        device=way.device,
        gateway=way.gateway,
        is_default_route=way.is_default,
        neighbour=way.neighbour,
        icmp=None
        if icmp is None
        else IcmpStatus(text=icmp.text, said_by=icmp.said_by, count=icmp.count, last=icmp.last),
        evidence=reach.evidence(now),
        next_step=reach.next_step(str(peer.public_ip), peer.port),
    )


def _traffic(hop: HopCounters) -> PeerTraffic:
    return PeerTraffic(
        packets_out=hop.packets_out,
        bytes_out=hop.bytes_out,
        packets_in=hop.packets_in,
        bytes_in=hop.bytes_in,
        drops=hop.drops,
        queue_full=hop.queue_full,
        last_heard=hop.last_heard,
        last_errno=hop.last_errno,
    )
