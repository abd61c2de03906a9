"""Which leases packets may be sent to, and why not the others.

flannel sends to anything under the prefix: a lease without PublicIP loops back into
the sender, a vxlan node becomes a udp peer that never answers. Each refusal here has
one reason, reported once and shown by `tundp status`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address, IPv4Network
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from tundp.lease.fib import row_of
from tundp.lease.model import UNSPECIFIED, Lease, LeaseKey, Peer
from tundp.lease.network import BACKEND_UDP
from tundp.lease.table import Change


class Refusal(Enum):
    """Why a lease is not a peer; the value is the sentence an operator reads."""

    NO_PUBLIC_IP = "has no PublicIP: packets would go to 0.0.0.0, that is back to this node"
    OWN_PUBLIC_IP = "has this node's own PublicIP: packets would loop (two nodes with one address?)"
    NOT_UNICAST = "has a PublicIP no datagram can be sent to"
    OUTSIDE_NETWORK = "lies outside the network"
    INSIDE_NETWORK = "has a PublicIP inside the overlay: packets would go round and round"
    INSIDE_OWN_SUBNET = "lies inside this node's own subnet"
    OTHER_BACKEND = "belongs to another backend: its node does not listen for us"
    DUPLICATE_SUBNET = "names the same subnet as another key, which wins"


@dataclass(frozen=True, slots=True)
class RefusedLease:
    """A lease that is not a peer, and the reason."""

    lease: Lease
    refusal: Refusal


@dataclass(frozen=True, slots=True)
class PeerSet:
    """The verdict over all leases. `peers` is sorted by subnet."""

    peers: tuple[Peer, ...]
    refused: tuple[RefusedLease, ...]


def select_peers(
    leases: Iterable[Lease],
    *,
    network: IPv4Network,
    own_key: LeaseKey,
    own_addresses: Sequence[IPv4Address],
) -> PeerSet:
    """Split `leases` into peers and refused ones; our own lease is neither.

    Of two keys for one subnet the aligned one wins, else the lower: the same on every
    node and after every restart.
    """
    peers: dict[IPv4Network, Peer] = {}
    refused: list[RefusedLease] = []
    for lease in sorted(leases, key=_rank):
        if lease.key == own_key:
            continue
        refusal = _refuse(lease, network, own_key.subnet, own_addresses)
        if refusal is None and lease.key.subnet in peers:
            refusal = Refusal.DUPLICATE_SUBNET
        if refusal is None:
            peers[lease.key.subnet] = Peer(lease.key.subnet, lease.attributes.public_ip)
        else:
            refused.append(RefusedLease(lease, refusal))
    return PeerSet(tuple(peers.values()), tuple(refused))


class PeerTable:
    """`select_peers` kept up to date: a change costs the same whatever the number of leases."""

    def __init__(
        self, *, network: IPv4Network, own_key: LeaseKey, own_addresses: Collection[IPv4Address]
    ) -> None:
        self._network = network
        self._own_key = own_key
        self._own_addresses = frozenset(own_addresses)
        self._leases: dict[LeaseKey, Lease] = {}
        # Leases that may be peers, by subnet: several keys can name one.
        self._candidates: dict[IPv4Network, list[Lease]] = {}
        self._crowded: set[IPv4Network] = set()
        self._refusals: dict[LeaseKey, RefusedLease] = {}
        self._peers: dict[IPv4Network, Peer] = {}
        # The same in numbers, a row each, in no order: what a FIB is made of in one go.
        self._rows = np.zeros((64, 3), np.int64)
        self._row_subnets: list[IPv4Network] = []
        self._row_of: dict[IPv4Network, int] = {}

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """`peers` as `fib.row_of` puts them; a view, valid until the next change."""
        return self._rows[: len(self._row_subnets)]

    @property
    def peers(self) -> Mapping[IPv4Network, Peer]:
        """Who gets packets, by subnet; read-only, in no order."""
        return MappingProxyType(self._peers)

    @property
    def refused(self) -> list[RefusedLease]:
        """Leases that are no peers, by key."""
        duplicates = [
            RefusedLease(lease, Refusal.DUPLICATE_SUBNET)
            for subnet in self._crowded
            for lease in self._candidates[subnet][1:]
        ]
        return sorted([*self._refusals.values(), *duplicates], key=lambda r: _rank(r.lease))

    @property
    def refused_count(self) -> int:
        """How many `refused` are; does not depend on how many leases there are."""
        doubled = sum(len(self._candidates[subnet]) - 1 for subnet in self._crowded)
        return len(self._refusals) + doubled

    def apply(self, changes: Iterable[Change]) -> tuple[list[Peer], list[Peer]]:
        """Take in changes of the lease table; peers that went, and peers that came."""
        touched: dict[IPv4Network, Peer | None] = {}
        for change in changes:
            if change.key == self._own_key:
                continue
            subnet = change.key.subnet
            touched.setdefault(subnet, self._peers.get(subnet))
            self._forget(change.key, subnet)
            if change.new is not None:
                self._take_in(change.new)
        gone = []
        come = []
        for subnet, before in touched.items():
            now = self._peers.get(subnet)
            if before == now:
                continue
            if before is not None:
                gone.append(before)
            if now is not None:
                come.append(now)
        return gone, come

    def set_own_addresses(
        self, addresses: Collection[IPv4Address]
    ) -> tuple[list[Peer], list[Peer]]:
        """Judge every lease by our new addresses; peers that went, and peers that came."""
        before = frozenset(addresses) ^ self._own_addresses
        self._own_addresses = frozenset(addresses)
        concerned = [
            Change(lease.key, lease, lease)
            for lease in (self._leases.values() if before else ())
            if lease.attributes.public_ip in before
        ]
        return self.apply(concerned)

    def _forget(self, key: LeaseKey, subnet: IPv4Network) -> None:
        self._leases.pop(key, None)
        self._refusals.pop(key, None)
        candidates = self._candidates.get(subnet)
        if candidates is not None:
            candidates[:] = [lease for lease in candidates if lease.key != key]
            self._elect(subnet, candidates)

    def _take_in(self, lease: Lease) -> None:
        self._leases[lease.key] = lease
        refusal = _refuse(lease, self._network, self._own_key.subnet, self._own_addresses)
        if refusal is not None:
            self._refusals[lease.key] = RefusedLease(lease, refusal)
            return
        subnet = lease.key.subnet
        candidates = self._candidates.setdefault(subnet, [])
        candidates.append(lease)
        if len(candidates) > 1:
            candidates.sort(key=_rank)
        self._elect(subnet, candidates)

    def _elect(self, subnet: IPv4Network, candidates: list[Lease]) -> None:
        """The first candidate is the peer."""
        if len(candidates) > 1:
            self._crowded.add(subnet)
        else:
            self._crowded.discard(subnet)
        if not candidates:
            del self._candidates[subnet]
            if self._peers.pop(subnet, None) is not None:
                self._remove_row(subnet)
            return
        address = candidates[0].attributes.public_ip
        known = self._peers.get(subnet)
        if known is None or known.address != address:
            peer = self._peers[subnet] = Peer(subnet, address)
            self._put_row(peer)

    def _put_row(self, peer: Peer) -> None:
        row = self._row_of.get(peer.subnet)
        if row is None:
            row = self._row_of[peer.subnet] = len(self._row_subnets)
            self._row_subnets.append(peer.subnet)
            if row == len(self._rows):
                self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        self._rows[row] = row_of(peer)

    def _remove_row(self, subnet: IPv4Network) -> None:
        """The last row takes its place."""
        row = self._row_of.pop(subnet)
        last = self._row_subnets.pop()
        if last != subnet:
            self._row_subnets[row] = last
            self._row_of[last] = row
            self._rows[row] = self._rows[len(self._row_subnets)]


def _rank(lease: Lease) -> tuple[IPv4Network, bool, IPv4Address, str]:
    key = lease.key
    return key.subnet, not key.is_aligned, key.v4.ip, str(key)


def _refuse(
    lease: Lease, network: IPv4Network, own: IPv4Network, own_addresses: Collection[IPv4Address]
) -> Refusal | None:
    address = lease.attributes.public_ip
    subnet = lease.key.subnet
    if lease.attributes.backend_type.lower() not in ("", BACKEND_UDP):
        return Refusal.OTHER_BACKEND
    if address == UNSPECIFIED:
        return Refusal.NO_PUBLIC_IP
    if address in own_addresses:
        return Refusal.OWN_PUBLIC_IP
    if address in network:
        return Refusal.INSIDE_NETWORK
    if address.is_multicast or address.is_reserved or address.is_loopback:
        return Refusal.NOT_UNICAST
    if int(address) >> 24 == 0:
        return Refusal.NOT_UNICAST
    if not subnet.subnet_of(network):
        return Refusal.OUTSIDE_NETWORK
    if subnet.subnet_of(own):
        return Refusal.INSIDE_OWN_SUBNET
    return None
