"""Leases, snapshots and events. Frozen values; flannel's nouns.

network   the whole overlay prefix          10.5.0.0/16
subnet    one host's slice of it            10.5.52.0/24
lease     the claim on a subnet             10.5.52.0-24 -> {"PublicIP": "192.0.2.7"}
endpoint  a peer's underlay address, port   192.0.2.7:8285
peer      a lease that packets may go to    10.5.52.0/24 -> 192.0.2.7:8285
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface
from typing import Any, Final

UNSPECIFIED: Final = IPv4Address(0)
TTL_UNKNOWN: Final = math.nan
"""`lease_ttl_s` of a lease that expires at a time its store did not report: etcd v3 needs one
request a lease for that. Only the expiry of our own lease matters, and a renewal returns it."""


@dataclass(frozen=True, slots=True)
class LeaseKey:
    """What identifies a lease: its subnets, exactly as the store spells them.

    The addresses keep their host bits: flannel checks no alignment, so `10.5.1.5-24`
    is a key of its own, though it covers the same packets as `10.5.1.0-24`.
    """

    v4: IPv4Interface
    v6: IPv6Interface | None = None

    def __str__(self) -> str:
        text = f"{self.v4.ip}-{self.v4.network.prefixlen}"
        if self.v6 is not None:
            text += f"&{self.v6.ip}-{self.v6.network.prefixlen}"
        return text

    @property
    def subnet(self) -> IPv4Network:
        """The IPv4 subnet, host bits masked off."""
        return self.v4.network

    @property
    def is_aligned(self) -> bool:
        """Whether the key's address is the first of its subnet."""
        return self.v4.ip == self.v4.network.network_address


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseAttributes:
    """The lease value: where the subnet's packets go."""

    public_ip: IPv4Address = UNSPECIFIED
    public_ipv6: IPv6Address | None = None
    backend_type: str = ""
    backend_data: Any = None
    backend_v6_data: Any = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields flannel does not know, kept when we write our own lease again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """One lease as the store has it."""

    key: LeaseKey
    attributes: LeaseAttributes
    revision: int
    """The store's version of this entry: a guarded write compares it."""
    lease_ttl_s: float | None
    """Seconds to its expiry when it was read, TTL_UNKNOWN if not reported; None for a
    reservation, which never expires."""

    @property
    def is_reservation(self) -> bool:
        """A lease without expiry, made by hand; renewing it must keep it so."""
        return self.lease_ttl_s is None

    @property
    def is_ttl_known(self) -> bool:
        """Whether `lease_ttl_s` is a time or None, and not TTL_UNKNOWN."""
        return self.lease_ttl_s is None or not math.isnan(self.lease_ttl_s)


@dataclass(frozen=True, slots=True)
class BadEntry:
    """An entry under the prefix that cannot be parsed. It does not affect any other entry."""

    name: str
    why: str
    is_name_bad: bool = False
    """Whether its name is known to be no key: it is not parsed again then."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All leases at `revision`."""

    leases: tuple[Lease, ...]
    revision: int
    bad: tuple[BadEntry, ...] = ()


@dataclass(frozen=True, slots=True)
class Put:
    """A lease was made, renewed or changed."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Gone:
    """A lease was deleted or expired."""

    key: LeaseKey


@dataclass(frozen=True, slots=True)
class BadEntryGone:
    """An entry whose name cannot be read was deleted."""

    name: str


LeaseEvent = Put | Gone | BadEntry | BadEntryGone


@dataclass(frozen=True, slots=True)
class Events:
    """What happened after a snapshot or an earlier batch, in order, up to `revision`."""

    events: tuple[LeaseEvent, ...]
    revision: int
    is_whole: bool = False
    """Whether all leases are known with these, as after a snapshot; see lease/parts.py."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a peer takes datagrams on the underlay: address and UDP port.

    The port is 0 for a backend that has none (host-gw: the endpoint is a gateway).
    """

    address: IPv4Address
    port: int

    def __str__(self) -> str:
        return f"{self.address}:{self.port}" if self.port else str(self.address)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A lease that packets may be sent to: the next hop of every packet for `subnet`."""

    subnet: IPv4Network
    endpoint: Endpoint
    hop_id: int
    """Number of the endpoint, the same for every subnet that leads to it and for as long as
    any does (lease/routing.py): the index into the FIB's hops and every per-hop array."""
    backend_type: str = ""
    """The lease's BackendType, as the store spells it."""
    backend_data: Any = None
    """The lease's BackendData, decoded JSON."""
