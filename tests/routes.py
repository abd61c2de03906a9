"""Routes for tests: FIBs of a few peers, and an independent verdict over leases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network

from tundp.lease.fib import FIRST_HOP_ID, Fib, build_fib
from tundp.lease.model import Endpoint, Lease, LeaseKey, Peer
from tundp.lease.routing import Refusal

PORT = 8285


def peer(subnet: str | IPv4Network, address: str | IPv4Address, hop_id: int = FIRST_HOP_ID) -> Peer:
    """A peer on port 8285."""
    return Peer(
        subnet=IPv4Network(subnet),
        endpoint=Endpoint(IPv4Address(address), PORT),
        hop_id=hop_id,
    )


def peers_of(routes: Iterable[tuple[str | IPv4Network, str | IPv4Address]]) -> list[Peer]:
    """A peer for each (subnet, address); hop ids by first appearance of the address."""
    hops: dict[IPv4Address, int] = {}
    return [
        peer(subnet, address, hops.setdefault(IPv4Address(address), FIRST_HOP_ID + len(hops)))
        for subnet, address in routes
    ]


def fib_of(
    *routes: tuple[str | IPv4Network, str | IPv4Address],
    own: str | IPv4Network | None = None,
    own_addresses: Iterable[str] = (),
    broadcasts: Iterable[str] = (),
    generation: int = 1,
) -> Fib:
    """A FIB of (subnet, address) routes."""
    return build_fib(
        peers_of(routes),
        own_subnet=None if own is None else IPv4Network(own),
        own_addresses=[IPv4Address(address) for address in own_addresses],
        broadcasts=[IPv4Address(address) for address in broadcasts],
        generation=generation,
    )


def verdict(
    leases: Iterable[Lease],
    *,
    network: IPv4Network,
    own_key: LeaseKey,
    own_addresses: Iterable[IPv4Address],
    backend_types: Iterable[str] = ("", "udp"),
    misrouted: Iterable[IPv4Address] = (),
) -> tuple[Mapping[IPv4Network, IPv4Address], Mapping[LeaseKey, Refusal]]:
    """Peers by subnet, and refused leases with the reason: written anew, from the rules.

    own_addresses: without our PublicIP, which none of the leases may have.

    Every lease is judged in one pass over all, sorted; nothing is kept between calls.
    """
    taken = frozenset(own_addresses)
    peers: dict[IPv4Network, IPv4Address] = {}
    refused: dict[LeaseKey, Refusal] = {}

    def order(lease: Lease) -> tuple[int, int, bool, int, str]:
        key = lease.key
        first = int(key.subnet.network_address)
        return (first, key.subnet.prefixlen, int(key.v4.ip) != first, int(key.v4.ip), str(key))

    for lease in sorted(leases, key=order):
        if lease.key == own_key:
            continue
        subnet, address = lease.key.subnet, lease.attributes.public_ip
        octet = int(address) >> 24
        if lease.attributes.backend_type.lower() not in backend_types:
            refused[lease.key] = Refusal.OTHER_BACKEND
        elif int(address) == 0:
            refused[lease.key] = Refusal.NO_PUBLIC_IP
        elif address in taken:
            refused[lease.key] = Refusal.HOST_ADDRESS
        elif octet in (0, 127) or 224 <= octet < 240 or int(address) == 2**32 - 1:
            refused[lease.key] = Refusal.NOT_UNICAST
        elif address in misrouted:
            refused[lease.key] = Refusal.ROUTED_INTO_OVERLAY
        elif subnet[0] < network[0] or subnet[-1] > network[-1]:
            refused[lease.key] = Refusal.OUTSIDE_NETWORK
        elif subnet[0] >= own_key.subnet[0] and subnet[-1] <= own_key.subnet[-1]:
            refused[lease.key] = Refusal.INSIDE_OWN_SUBNET
        elif subnet in peers:
            refused[lease.key] = Refusal.DUPLICATE_SUBNET
        else:
            peers[subnet] = address
    return peers, refused
