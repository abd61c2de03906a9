"""What was looked at to explain one packet, and whose the addresses are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum, unique
from ipaddress import IPv4Address

from tundp.finding import Finding
from tundp.linux.obstacles.way import Neighbour, Routed, Walked
from tundp.observe.explain.model import Question
from tundp.observe.ledger import OWN, PEER, Ledger, LedgerRow
from tundp.observe.status import PeerStatus, Status


@unique
class Kind(Enum):
    """Whose an address is, as seen from this node."""

    POD = "a pod of this node"
    HOST = "this node"
    PEER_POD = "a pod of another node"
    PEER_HOST = "another node"
    REFUSED = "in a lease that is refused"
    NO_LEASE = "in no lease"
    OUTSIDE = "outside the overlay"

    @property
    def is_here(self) -> bool:
        """Whether it is this node's."""
        return self in (Kind.POD, Kind.HOST)

    @property
    def is_overlay(self) -> bool:
        """Whether packets for it, or from it, take the overlay."""
        return self in (Kind.PEER_POD, Kind.REFUSED, Kind.NO_LEASE)


@dataclass(frozen=True, slots=True)
class Place:
    """Whose an address is, and by which lease."""

    address: IPv4Address
    kind: Kind
    row: LedgerRow | None = None


@unique
class Direction(Enum):
    """What this node has to do with the packet."""

    ENCAP = "encap"
    DECAP = "decap"
    ROUTED = "routed"
    """The kernel alone routes it."""
    ELSEWHERE = "elsewhere"
    """It does not pass this node's routes."""


def place(address: IPv4Address, leases: Ledger, own: Collection[IPv4Address]) -> Place:
    """Whose `address` is. own: every address of this host."""
    if address in own:
        return Place(address, Kind.HOST)
    row = leases.holding(address)
    if row is not None and row.state == OWN:
        return Place(address, Kind.POD, row)
    if leases.subnet is not None and row is None and address in leases.subnet:
        return Place(address, Kind.POD)
    if row is not None:
        return Place(address, Kind.PEER_POD if row.state == PEER else Kind.REFUSED, row)
    if (peer := leases.peer_at(address)) is not None:
        return Place(address, Kind.PEER_HOST, peer)
    is_inside = leases.network is not None and address in leases.network
    return Place(address, Kind.NO_LEASE if is_inside else Kind.OUTSIDE)


def direction(source: Place, destination: Place) -> Direction:
    """What this node has to do with a packet between two places."""
    here, there = source.kind, destination.kind
    if there.is_overlay:
        # What a peer sends for another peer's pods it sends there, not here.
        is_peers = here.is_overlay or here is Kind.PEER_HOST
        return Direction.ELSEWHERE if is_peers else Direction.ENCAP
    if there.is_here and (here.is_overlay or here is Kind.PEER_HOST):
        return Direction.DECAP
    if here is Kind.POD and there is Kind.POD:
        return Direction.ELSEWHERE
    if here.is_here or there.is_here:
        return Direction.ROUTED
    return Direction.ELSEWHERE


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """The inner packet in this host's kernel."""

    iif: str
    """The device it comes in by; empty for one of this host's own."""
    wanted: tuple[str, ...]
    """Devices it should leave by; () if any will do, or if it is for this host."""
    wanted_gateway: IPv4Address | None = None
    """The neighbour it should go to; None if any will do."""
    is_for_host: bool = False
    route: Routed | None = None
    """None: it could not be asked for."""
    unchecked: Routed | None = None
    """The same for a packet of this host's own: without the check of the source."""
    why_not: str = ""
    """Why there is no route."""
    rp_filter: int = 0
    """The mode in force on `iif`."""
    is_forwarding: bool = True
    """Whether this host forwards what comes in by `iif`."""
    forwarding_switch: str = ""
    """The switch that is off, as sysctl spells it."""
    is_link_up: bool = True
    """Of the device it leaves by."""
    mender: str = ""
    """The command that makes the route lead where it should."""
    walked: Walked | None = None
    masqueraded_as: IPv4Address | None = None
    """The first address of the device it leaves by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tunnel:
    """The datagram between this node and the peer, in this host's kernel."""

    route: Routed | None
    """To the peer; None: not asked."""
    back: Routed | None = None
    """Of a datagram from the peer that comes in by the uplink."""
    rp_filter: int = 0
    next_hop: IPv4Address | None = None
    neighbour: Neighbour | None = None
    walked: Walked | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything `explain` judges by."""

    question: Question
    leases: Ledger
    leases_of: str
    """In words, where the leases are from."""
    status: Status | None
    """Of the running daemon; None: none answers."""
    source: Place
    destination: Place
    direction: Direction
    device: str
    """The TUN; with a backend that has none, the interface to the other nodes."""
    uplink: str
    pods: tuple[str, ...] = ()
    """Devices that lead to this node's pods."""
    pod_route: str = ""
    """Where the kernel routes the pod's address, if that is to none of them."""
    pods_up: bool = True
    gateway: str = ""
    """The addresses of the device to the pods."""
    pod_neighbour: Neighbour | None = None
    inner: Pass | None = None
    tunnel: Tunnel | None = None
    others: Sequence[Finding] = ()
    """Filters, programs and policies that meet the packet's frames."""
    unread_rules: Sequence[str] = ()
    """Firewall rules that were not looked at, and why."""
    unread_others: Sequence[str] = ()

    @property
    def peer(self) -> LedgerRow | None:
        """The peer the packet goes to, or comes from."""
        found = self.destination if self.direction is Direction.ENCAP else self.source
        return found.row if found.kind in (Kind.PEER_POD, Kind.PEER_HOST) else None

    @property
    def peer_status(self) -> PeerStatus | None:
        """What the daemon says of that peer."""
        row = self.peer
        if row is None or self.status is None:
            return None
        return next((each for each in self.status.peers if each.subnet == row.subnet), None)

    @property
    def is_tunnel(self) -> bool:
        """Whether packets between nodes travel in UDP datagrams."""
        return self.leases.port is not None

    @property
    def device_mtu(self) -> int | None:
        """Bytes of the largest inner packet the backend takes; None if it is not known."""
        return self.leases.mtu
