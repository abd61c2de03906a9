"""From the daemon's live parts to the records of `status`.

What is cheap is made at once, on the event loop. What grows with the number of peers is made
when somebody looks at it (`Lazy`), which a scrape of the metrics and a probe of /readyz never
do; the admin socket's answer is made of it in a thread of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Protocol, runtime_checkable

from tundp.engine.counters import Counters
from tundp.lease.routing import RefusedLease
from tundp.linux.iface import Interface
from tundp.observe.status import (
    BadEntryStatus,
    CountersStatus,
    DisabledOffload,
    EngineStatus,
    InterfaceStatus,
    Lazy,
    LeaseStatus,
    PathStatus,
    PeerStatus,
    PeerTraffic,
    RefusedStatus,
    Status,
)


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


class OffloadView(Protocol):
    """`Dataplane.offloads()`."""

    @property
    def in_use(self) -> Sequence[Named]:
        """Offloads used now."""
        ...

    @property
    def disabled(self) -> Mapping[Named, tuple[str, float | None]]:
        """Why the others are not, and since when (Unix time; None for from the start)."""
        ...


class PathView(Protocol):
    """One of `Dataplane.path_states()`."""

    inner_mtu: int | None
    no_gso: bool
    since: float
    origin: str


class HopView(Protocol):
    """One of `Dataplane.hop_counters()`."""

    packets_out: int
    bytes_out: int
    packets_in: int
    bytes_in: int
    drops: int
    last_heard: float | None
    last_errno: str | None


@runtime_checkable
class EngineView(Protocol):
    """What an engine says beyond its counters, by hop id."""

    def offloads(self) -> OffloadView:
        """See engine.base.Dataplane."""
        ...

    def path_states(self) -> Mapping[int, PathView]:
        """See engine.base.Dataplane."""
        ...

    def hop_counters(self) -> Mapping[int, HopView]:
        """See engine.base.Dataplane."""
        ...


class NamedEngine(Protocol):
    """Any engine."""

    @property
    def name(self) -> str:
        """What `--engine` calls it."""
        ...

    def describe(self) -> str:
        """What it uses."""
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


def engine_status(engine: NamedEngine) -> EngineStatus:
    """What an engine uses now, what it does without, and why."""
    in_use: tuple[str, ...] = ()
    disabled: list[DisabledOffload] = []
    if isinstance(engine, EngineView):
        offloads = engine.offloads()
        in_use = tuple(offload.value for offload in offloads.in_use)
        disabled = [
            DisabledOffload(name=offload.value, reason=reason, since=since)
            for offload, (reason, since) in offloads.disabled.items()
        ]
    return EngineStatus(
        name=engine.name,
        uses=engine.describe(),
        offloads_in_use=in_use,
        offloads_disabled=tuple(disabled),
    )


def counters_status(counters: Counters) -> CountersStatus:
    """Every counter of an engine, by the names its own dict form gives them."""
    return CountersStatus.from_json(counters.as_dict())


def path_counts(engine: object) -> tuple[int, int]:
    """How many paths are narrower than the device, and how many take no UDP_SEGMENT.

    The cost depends on how many paths anything was learnt of, not on the number of peers.
    """
    states = engine.path_states().values() if isinstance(engine, EngineView) else ()
    narrow = sum(state.inner_mtu is not None for state in states)
    return narrow, sum(state.no_gso for state in states)


def peer_statuses(
    count: int, peers: Callable[[], Iterable[PeerView]], engine: object
) -> Sequence[PeerStatus]:
    """The peers by subnet, with what the engine knows of each.

    peers: evaluated later and in another thread, so over a copy. The engine is asked at once:
    it may only be asked on the event loop.
    """
    hops: Mapping[int, HopView] = {}
    paths: Mapping[int, PathView] = {}
    if isinstance(engine, EngineView):
        hops, paths = engine.hop_counters(), engine.path_states()

    def make() -> list[PeerStatus]:
        ordered = sorted(peers(), key=_place)
        return [_peer_status(peer, hops, paths) for peer in ordered]

    return Lazy(count, make)


def refused_statuses(
    count: int, refused: Callable[[], Iterable[RefusedLease]]
) -> Sequence[RefusedStatus]:
    """The leases that are no peers. refused: evaluated later and in another thread."""

    def make() -> list[RefusedStatus]:
        return [
            RefusedStatus(
                key=str(each.lease.key),
                public_ip=each.lease.attributes.public_ip,
                reason=each.refusal.name.lower(),
                means=each.refusal.value,
            )
            for each in refused()
        ]

    return Lazy(count, make)


def bad_entry_statuses(entries: Mapping[str, str]) -> Sequence[BadEntryStatus]:
    """The unreadable entries, by name. entries: a copy; evaluated later."""

    def make() -> list[BadEntryStatus]:
        return [BadEntryStatus(name=name, why=why) for name, why in sorted(entries.items())]

    return Lazy(len(entries), make)


def _place(peer: PeerView) -> tuple[int, int]:
    """Where a subnet stands among others, in numbers: comparing IPv4Networks takes ten times."""
    return int(peer.subnet.network_address), peer.subnet.prefixlen


def _peer_status(
    peer: PeerView, hops: Mapping[int, HopView], paths: Mapping[int, PathView]
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
        traffic=None if hop is None else _traffic(hop),
    )


def _path_status(path: PathView) -> PathStatus:
    return PathStatus(
        inner_mtu=path.inner_mtu, no_gso=path.no_gso, since=path.since, origin=path.origin
    )


def _traffic(hop: HopView) -> PeerTraffic:
    return PeerTraffic(
        packets_out=hop.packets_out,
        bytes_out=hop.bytes_out,
        packets_in=hop.packets_in,
        bytes_in=hop.bytes_in,
        drops=hop.drops,
        last_heard=hop.last_heard,
        last_errno=hop.last_errno,
    )
