"""Which lease to claim (flannel's acquisition steps, with its races and thefts left out).

    1. a lease with our PublicIP, or else our node id, that still fits the config: keep it
    2. one that no longer fits: give it up (unless it says another node wrote it), go on
    3. the previous subnet (from subnet.env), if it fits and nobody holds it
    4. a random one of the first 100 free subnets

Pure: the leases, the previous subnet and the random source are arguments. Creating the
lease is the store's business, and the only thing that decides who got it.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Interface,
    IPv6Network,
)
from typing import Final

from tundp.errors import OutOfSubnets
from tundp.lease.identity import identity_of
from tundp.lease.model import UNSPECIFIED, Lease, LeaseKey
from tundp.lease.network import NetworkConfig, SubnetPool

CANDIDATES: Final = 100
"""flannel draws from this many free subnets: a wider draw would lose fewer races."""

IPNetwork = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class Keep:
    """Write our attributes over this lease of ours."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Take:
    """Create this lease, after deleting `stale` ones of ours that no longer fit."""

    key: LeaseKey
    stale: tuple[Lease, ...] = ()


def plan_claim(
    leases: Sequence[Lease],
    *,
    unreadable: Sequence[LeaseKey] = (),
    config: NetworkConfig,
    public_ip: IPv4Address,
    node_id: str = "",
    previous: LeaseKey | None,
    rng: random.Random,
) -> Keep | Take:
    """The next thing to try. OutOfSubnets when nothing is free.

    unreadable: keys whose value cannot be read. Somebody holds them, nobody knows who.
    node_id: ours; a lease that has it stays ours when our address changed.
    Whether the lease to keep is not a live twin's is for the caller to find out.
    """
    ours = [
        lease
        for lease in leases
        if lease.attributes.public_ip == public_ip and public_ip != UNSPECIFIED
    ]
    by_id = [lease for lease in leases if node_id and _node_id(lease) == node_id]
    ours += [lease for lease in by_id if lease not in ours]
    ours.sort(key=lambda lease: lease not in by_id)
    strangers = [lease for lease in ours if _node_id(lease) not in ("", node_id)]
    # Ours that no longer fit are deleted first, so they are in nobody's way.
    held = [*(lease.key for lease in leases if lease not in ours), *unreadable]
    for lease in ours:
        if is_compatible(lease.key, config):
            return Keep(lease)
    # A clone of this node may hold what has our id at another address: not ours to delete.
    strangers += [lease for lease in ours if lease.attributes.public_ip != public_ip]
    ours = [lease for lease in ours if lease not in strangers]
    held += [lease.key for lease in strangers]
    if (
        previous is not None
        and is_compatible(previous, config)
        and not any(overlap(previous, key) for key in held)
    ):
        return Take(previous, tuple(ours))
    v4 = _draw(config.pool, [key.subnet for key in held], rng)
    v6 = None
    if config.pool6 is not None:
        held6 = [key.v6.network for key in held if key.v6 is not None]
        v6 = IPv6Interface(str(_draw(config.pool6, held6, rng)))
    return Take(LeaseKey(IPv4Interface(str(v4)), v6), tuple(ours))


def _node_id(lease: Lease) -> str:
    identity = identity_of(lease)
    return "" if identity is None else identity.node_id


def is_compatible(key: LeaseKey, config: NetworkConfig) -> bool:
    """Whether a lease still fits the config: length and range; a v6 part iff IPv6 is on."""
    if not config.pool.admits(key.subnet):
        return False
    if config.pool6 is None:
        return key.v6 is None
    return key.v6 is not None and config.pool6.admits(key.v6.network)


def overlap(one: LeaseKey, other: LeaseKey) -> bool:
    """Whether two leases share addresses of either family."""
    if one.subnet.overlaps(other.subnet):
        return True
    return one.v6 is not None and other.v6 is not None and one.v6.network.overlaps(other.v6.network)


def _draw(pool: SubnetPool, held: Iterable[IPNetwork], rng: random.Random) -> IPNetwork:
    free = []
    for subnet in _free_subnets(pool, held):
        free.append(subnet)
        if len(free) == CANDIDATES:
            break
    if not free:
        raise OutOfSubnets(
            f"out of subnets: every /{pool.subnet_len} from {pool.subnet_min} to"
            f" {pool.subnet_max} overlaps a lease; delete stale leases under <prefix>/subnets,"
            " or widen SubnetMin..SubnetMax or Network in the network config"
        )
    return rng.choice(free)


def _free_subnets(pool: SubnetPool, held: Iterable[IPNetwork]) -> Iterator[IPNetwork]:
    """The pool's subnets that overlap no held one, lowest first."""
    step = 1 << (pool.network.max_prefixlen - pool.subnet_len)
    spans = _merged(held)
    lasts = [last for _, last in spans]
    base = int(pool.subnet_min)
    while base <= int(pool.subnet_max):
        at = bisect_right(lasts, base - 1)
        if at < len(spans) and spans[at][0] < base + step:
            # Skip the whole held span at once: a large lease may cover many subnets.
            base += max(1, -(-(spans[at][1] + 1 - base) // step)) * step
            continue
        yield type(pool.network)((base, pool.subnet_len))
        base += step


def _merged(held: Iterable[IPNetwork]) -> list[tuple[int, int]]:
    """Held address ranges (first, last), sorted, overlaps joined."""
    ranges = sorted((int(net.network_address), int(net.broadcast_address)) for net in held)
    spans: list[tuple[int, int]] = []
    for first, last in ranges:
        if spans and first <= spans[-1][1] + 1:
            spans[-1] = (spans[-1][0], max(spans[-1][1], last))
        else:
            spans.append((first, last))
    return spans
