"""Which leases packets may be sent to, and why not the others.

flannel sends to anything under the prefix: a lease without PublicIP loops back into
the sender, a vxlan node becomes a udp peer that never answers. Each refusal here has
one reason, reported once and shown by `tundp status`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address, IPv4Network

from tundp.lease.model import UNSPECIFIED, Lease, LeaseKey, Peer
from tundp.lease.network import BACKEND_UDP


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


def _rank(lease: Lease) -> tuple[IPv4Network, bool, IPv4Address, str]:
    key = lease.key
    return key.subnet, not key.is_aligned, key.v4.ip, str(key)


def _refuse(
    lease: Lease, network: IPv4Network, own: IPv4Network, own_addresses: Sequence[IPv4Address]
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
