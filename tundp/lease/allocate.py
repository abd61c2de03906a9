"""Plan which lease to claim: flannel's acquisition steps, without its races.

    1. a lease that may be ours (lease/identity.py) and still fits the network config: keep it;
       of several the previous one if it is ours for sure, else by node id, else by PublicIP
    2. such leases that no longer fit: delete them, unless another node may hold them
    3. the previous subnet (from subnet.env), if it fits and no lease overlaps it: create it
    4. else create a random one of the first 100 free subnets

Pure: the leases, the previous subnet and the random source are arguments. The plan decides
nothing: the store's guarded create or update does.
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
from tundp.lease.identity import Holder, Identity, whose
from tundp.lease.model import Lease, LeaseKey
from tundp.lease.network import NetworkConfig, SubnetPool

CANDIDATES: Final = 100
"""Free subnets drawn from, as in flannel; drawing from more would lose fewer races."""

IPNetwork = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class Keep:
    """Plan: write our attributes over `lease`, which is ours."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Take:
    """Plan: create the lease `key`, after deleting `stale` leases of ours that no longer fit."""

    key: LeaseKey
    stale: tuple[Lease, ...] = ()


def plan_claim(
    leases: Sequence[Lease],
    *,
    unreadable: Sequence[LeaseKey] = (),
    network_config: NetworkConfig,
    public_ip: IPv4Address,
    node_id: str = "",
    previous: LeaseKey | None,
    rng: random.Random,
) -> Keep | Take:
    """What to try next, given all `leases`. OutOfSubnets when no subnet is free.

    unreadable: keys whose value cannot be read; their subnets count as held.
    node_id: ours, "" for none; a lease that bears it stays ours when our address changed.
    The lease to keep may be held by a duplicate node or a clone: the caller challenges it
    (subnet/challenge.py).
    """
    identity = Identity(node_id) if node_id else None
    holders = [whose(lease, public_ip=public_ip, identity=identity) for lease in leases]
    ours = [
        (lease, holder)
        for lease, holder in zip(leases, holders, strict=True)
        if holder is not Holder.OTHER
    ]
    fitting = [each for each in ours if is_compatible(each[0].key, network_config)]
    if fitting:
        return Keep(min(fitting, key=lambda each: _rank(each[0], each[1], previous))[0])
    # Those that no longer fit are deleted before anything is created, so they hold no subnet;
    # but not those that a duplicate node or a clone may hold.
    stale = [lease for lease, holder in ours if holder in (Holder.OURS, Holder.LEFTOVER)]
    gone = {lease.key for lease in stale}
    held = [*(lease.key for lease in leases if lease.key not in gone), *unreadable]
    # A key that no node can ever have held, such as one for all of the network, bars nobody.
    held = [key for key in held if network_config.pool.may_hold(key.subnet)]
    if (
        previous is not None
        and is_compatible(previous, network_config)
        and not any(overlap(previous, key) for key in held)
    ):
        return Take(previous, tuple(stale))
    v4 = _draw(network_config.pool, [key.subnet for key in held], rng)
    v6 = None
    if network_config.pool6 is not None:
        held6 = [key.v6.network for key in held if key.v6 is not None]
        v6 = IPv6Interface(str(_draw(network_config.pool6, held6, rng)))
    return Take(LeaseKey(IPv4Interface(str(v4)), v6), tuple(stale))


_RANKS: Final = (Holder.OURS, Holder.CLONE, Holder.LEFTOVER, Holder.DUPLICATE)


def _rank(lease: Lease, holder: Holder, previous: LeaseKey | None) -> tuple[bool, int]:
    """Of several leases to keep, the least: the subnet pods have addresses of, then our id."""
    is_previous = lease.key == previous and holder in (Holder.OURS, Holder.LEFTOVER)
    return not is_previous, _RANKS.index(holder)


def is_compatible(key: LeaseKey, network_config: NetworkConfig) -> bool:
    """Whether a lease fits the network config: length and range; an IPv6 part iff it is on."""
    if not network_config.pool.admits(key.subnet):
        return False
    if network_config.pool6 is None:
        return key.v6 is None
    return key.v6 is not None and network_config.pool6.admits(key.v6.network)


def overlap(one: LeaseKey, other: LeaseKey) -> bool:
    """Whether two leases share addresses of either family."""
    if one.subnet.overlaps(other.subnet):
        return True
    return one.v6 is not None and other.v6 is not None and one.v6.network.overlaps(other.v6.network)


def _draw(pool: SubnetPool, held: Iterable[IPNetwork], rng: random.Random) -> IPNetwork:
    """A random one of the first CANDIDATES subnets of `pool` that overlap none of `held`."""
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
    """The subnets of `pool` that overlap none of `held`, lowest first."""
    step = 1 << (pool.network.max_prefixlen - pool.subnet_len)
    spans = _merged(held)
    lasts = [last for _, last in spans]
    base = int(pool.subnet_min)
    while base <= int(pool.subnet_max):
        at = bisect_right(lasts, base - 1)
        if at < len(spans) and spans[at][0] < base + step:
            # Skip the whole held range at once: a large lease may cover many subnets.
            base += max(1, -(-(spans[at][1] + 1 - base) // step)) * step
            continue
        yield type(pool.network)((base, pool.subnet_len))
        base += step


def _merged(held: Iterable[IPNetwork]) -> list[tuple[int, int]]:
    """The address ranges (first, last) of `held`, sorted, adjacent and overlapping ones merged."""
    ranges = sorted((int(net.network_address), int(net.broadcast_address)) for net in held)
    spans: list[tuple[int, int]] = []
    for first, last in ranges:
        if spans and first <= spans[-1][1] + 1:
            spans[-1] = (spans[-1][0], max(spans[-1][1], last))
        else:
            spans.append((first, last))
    return spans
