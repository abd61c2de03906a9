"""The routing ledger: leases, peers, refused leases and unreadable entries, in one place.

Why one room: one ledger, whose parts change together; 500 lines with their docstrings.

    Snapshot | Events --apply--> RoutingDelta        what changed, for whoever is concerned
                      --fib()--> Fib                 the table packets consult
                      --why()--> RouteAnswer         which lease decides about an address

Pure: no clock, no I/O. A change costs the same whatever the number of leases; only a
snapshot and `fib` (a few numpy passes) are linear in it.

flannel sends to anything under the prefix: a lease without PublicIP loops back into the
sender, a vxlan node becomes a udp peer that never answers. Here each lease that is no peer
is refused for one named reason. Each endpoint has a stable hop id: lease/hops.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from ipaddress import IPv4Address, IPv4Network
from types import MappingProxyType
from typing import Final

from tundp.lease.allocate import overlap
from tundp.lease.by_address import KeysByAddress
from tundp.lease.fib import Fib, assemble_fib
from tundp.lease.hops import Hops, Rows
from tundp.lease.identity import Holder, Identity, whose
from tundp.lease.model import (
    UNSPECIFIED,
    BadEntry,
    Endpoint,
    Events,
    Lease,
    LeaseKey,
    Peer,
    Snapshot,
)
from tundp.lease.network import BackendConfig, SubnetPool
from tundp.lease.table import Change, LeaseTable

_BROADCAST: Final = 0xFFFF_FFFF


class Refusal(Enum):
    """Why a lease is not a peer; the value is the sentence an operator reads."""

    NO_PUBLIC_IP = "has no PublicIP: packets would go to 0.0.0.0, that is back to this node"
    OWN_PUBLIC_IP = "has this node's own PublicIP: packets would loop (two nodes with one address?)"
    LEFTOVER = "has our PublicIP and is renewed by nobody: a former lease of this node"
    HOST_ADDRESS = "has an address of this host as PublicIP: packets would loop"
    NOT_UNICAST = "has a PublicIP no datagram can be sent to"
    OUTSIDE_NETWORK = "lies outside the network"
    ROUTED_INTO_OVERLAY = (
        "has a PublicIP that this node's kernel routes into the overlay: packets would go round and"
        " round (ip route get)"
    )
    TOO_WIDE = "is wider than the network config's SubnetLen: no node here can hold it"
    INSIDE_OWN_SUBNET = "lies inside this node's own subnet"
    OTHER_BACKEND = "belongs to another backend: its node does not listen for us"
    DUPLICATE_SUBNET = "names the same subnet as another key, which wins"
    TOO_MANY_PEERS = "is one peer too many: no hop id is left"


@dataclass(frozen=True, slots=True)
class RefusedLease:
    """A lease that is not a peer, and the reason."""

    lease: Lease
    refusal: Refusal


@dataclass(frozen=True, slots=True)
class OwnSeen:
    """Our key has this value in the store; it differs from the one known before."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class OwnGone:
    """Our key is absent from the store."""


@dataclass(frozen=True, slots=True)
class OwnUnreadable:
    """Our key has a value in the store that cannot be read."""

    why: str


OwnLease = OwnSeen | OwnGone | OwnUnreadable


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingDelta:
    """What one update changed. Everything is empty for an update that changed nothing.

    gone, come, moved: peers by subnet; `moved` pairs a peer before and after where the
        subnet stays and the endpoint, or what the lease says of it, is another.
    hops_assigned: hop ids that stand for another endpoint than in any generation before:
        per-hop state of theirs is void. New ids are among them.
    own: what the update says of our own lease, in order.
    newly_refused, newly_bad: refusals and unreadable entries that were not known before.
    is_whole: `come` holds every peer; what was given before is void.
    """

    gone: tuple[Peer, ...] = ()
    come: tuple[Peer, ...] = ()
    moved: tuple[tuple[Peer, Peer], ...] = ()
    hops_assigned: tuple[int, ...] = ()
    own: tuple[OwnLease, ...] = ()
    newly_refused: tuple[RefusedLease, ...] = ()
    newly_bad: tuple[BadEntry, ...] = ()
    changed_leases: int = 0
    """Leases, our own included, whose entry differs from before; renewals count."""
    has_overlap_gone: bool = False
    """Whether a lease that shares addresses with our own was deleted or expired."""
    is_whole: bool = False

    @property
    def moves_packets(self) -> bool:
        """Whether some packet goes elsewhere than before."""
        return bool(self.gone or self.come or self.moved)


def merged(*deltas: RoutingDelta) -> RoutingDelta:
    """Deltas in a row as one: for a consumer that was not served between them.

    `gone`, `come` and `moved` are the net effect by subnet; the rest is concatenated. Linear in
    what the deltas hold.
    """
    before: dict[IPv4Network, Peer | None] = {}
    after: dict[IPv4Network, Peer | None] = {}
    for delta in deltas:
        for subnet, old, new in _changes(delta):
            before.setdefault(subnet, old)
            after[subnet] = new
    gone, come, moved = _net(before, after)
    return RoutingDelta(
        gone=gone,
        come=come,
        moved=moved,
        hops_assigned=tuple(hop for delta in deltas for hop in delta.hops_assigned),
        own=tuple(own for delta in deltas for own in delta.own),
        newly_refused=tuple(each for delta in deltas for each in delta.newly_refused),
        newly_bad=tuple(each for delta in deltas for each in delta.newly_bad),
        changed_leases=sum(delta.changed_leases for delta in deltas),
        has_overlap_gone=any(delta.has_overlap_gone for delta in deltas),
        is_whole=any(delta.is_whole for delta in deltas),
    )


def _changes(delta: RoutingDelta) -> Iterable[tuple[IPv4Network, Peer | None, Peer | None]]:
    """Each subnet's peer before and after."""
    yield from ((peer.subnet, peer, None) for peer in delta.gone)
    yield from ((peer.subnet, None, peer) for peer in delta.come)
    yield from ((new.subnet, old, new) for old, new in delta.moved)


def _net(
    before: Mapping[IPv4Network, Peer | None], after: Mapping[IPv4Network, Peer | None]
) -> tuple[tuple[Peer, ...], tuple[Peer, ...], tuple[tuple[Peer, Peer], ...]]:
    """Peers gone, come and moved, given each touched subnet's peer before and after."""
    gone, come, moved = [], [], []
    for subnet, old in before.items():
        new = after[subnet]
        if old == new:
            continue
        if old is not None and new is not None:
            moved.append((old, new))
        elif old is not None:
            gone.append(old)
        elif new is not None:
            come.append(new)
    return tuple(gone), tuple(come), tuple(moved)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteAnswer:
    """Why packets to an address go where they go.

    peer: the next hop, None if there is none. lease: the entry that decides, readable or
    refused. refusal: why it is no peer. is_own: the address is in this node's own subnet.
    """

    peer: Peer | None = None
    lease: Lease | None = None
    refusal: Refusal | None = None
    is_own: bool = False


class Routing:
    """See the module. One instance for one network; `own_key` is known from the start."""

    def __init__(
        self,
        *,
        network: IPv4Network,
        backend: BackendConfig,
        own_key: LeaseKey,
        own_addresses: Collection[IPv4Address],
        public_ip: IPv4Address = UNSPECIFIED,
        identity: Identity | None = None,
        pool: SubnetPool | None = None,
    ) -> None:
        """own_addresses: every address of this node. public_ip: the one it advertises, if any.

        pool: the subnets a node may hold; None admits all of the network.
        """
        self.generation = 0
        """Of the FIB last made by `fib`."""
        self._network = network
        self._pool = pool
        self._backend = backend
        self._own_key = own_key
        self.own_addresses = frozenset(own_addresses)
        """The addresses no lease may lead to and no packet may come from."""
        self.public_ip = public_ip
        """The address that our own lease advertises."""
        self.broadcasts: frozenset[IPv4Address] = frozenset()
        """Broadcast addresses of this node's networks: no packet is from one or for one."""
        self._identity = identity
        self._renewed: dict[LeaseKey, None] = {}
        """Leftovers that somebody has written since we know them, and so holds."""
        self._table = LeaseTable()
        self._keys: dict[IPv4Network, tuple[LeaseKey, ...]] = {}
        """The keys that name a subnet, ours apart: nearly always one."""
        self._lengths: Counter[int] = Counter()
        """How many subnets of each prefix length `_keys` has."""
        self._peers: dict[IPv4Network, Peer] = {}
        self._refused: dict[LeaseKey, RefusedLease] = {}
        self._duplicates: dict[LeaseKey, None] = {}
        self._by_address = KeysByAddress()
        self._misrouted: dict[IPv4Address, Refusal] = {}
        self._without_hop: dict[IPv4Network, None] = {}
        """Subnets of which a lease was refused for want of a hop id."""
        self._hops = Hops()
        self._rows = Rows()

    @property
    def own_key(self) -> LeaseKey:
        """The key of this node's own lease."""
        return self._own_key

    @property
    def revision(self) -> int:
        """The store's revision of the last update."""
        return self._table.revision

    @property
    def leases(self) -> Mapping[LeaseKey, Lease]:
        """Every readable lease, our own among them; read-only."""
        return self._table.leases

    @property
    def peers(self) -> Mapping[IPv4Network, Peer]:
        """Who gets packets, by subnet; read-only, in no order."""
        return MappingProxyType(self._peers)

    @property
    def refused(self) -> Mapping[LeaseKey, RefusedLease]:
        """Leases that are no peers; read-only, in no order."""
        return MappingProxyType(self._refused)

    @property
    def bad_entries(self) -> Mapping[str, BadEntry]:
        """Unreadable entries under the prefix, by name; read-only."""
        return self._table.bad_entries

    @property
    def misrouted(self) -> Mapping[IPv4Address, Refusal]:
        """PublicIPs no datagram reaches by the kernel's routes, and why; see `set_misrouted`."""
        return MappingProxyType(self._misrouted)

    @property
    def duplicates(self) -> Collection[LeaseKey]:
        """Leases of other nodes that advertise our PublicIP."""
        return self._duplicates.keys()

    def apply(self, update: Snapshot | Events) -> RoutingDelta:
        """Apply one update of the store."""
        changes = self._table.apply(update)
        moving = [
            change for change in changes if self._notice_renewal(change) or change.moves_packets
        ]
        return replace(
            self._judge_again(moving),
            own=self._own_observations(update, changes),
            newly_bad=self._table.newly_bad,
            changed_leases=len(changes),
            has_overlap_gone=any(
                change.new is None and overlap(change.key, self._own_key) for change in changes
            ),
        )

    def set_own_addresses(
        self, addresses: Collection[IPv4Address], public_ip: IPv4Address | None = None
    ) -> RoutingDelta:
        """Judge every lease by our new addresses, and by `public_ip` if that is another now."""
        fresh = frozenset(addresses)
        public_ip = self.public_ip if public_ip is None else public_ip
        changed = fresh ^ self.own_addresses
        if public_ip != self.public_ip:
            changed |= {public_ip, self.public_ip}
        self.own_addresses, self.public_ip = fresh, public_ip
        return self._judge_addresses(changed)

    def _judge_addresses(self, changed: Collection[IPv4Address]) -> RoutingDelta:
        """Judge every lease with one of these PublicIPs."""
        return self._judge_again(
            [
                Change(key, self.leases[key], self.leases[key])
                for address in changed
                for key in self._by_address.of(address)
            ]
        )

    def set_misrouted(self, addresses: Mapping[IPv4Address, Refusal]) -> RoutingDelta:
        """Refuse the leases with these PublicIPs, for these reasons; judge those with others anew.

        The kernel's routes decide, which the ledger cannot ask: daemon/peer_paths.py.
        """
        gone = dict.fromkeys(self._misrouted.keys() - addresses.keys())
        return self.note_misrouted({**gone, **addresses})

    def note_misrouted(self, changes: Mapping[IPv4Address, Refusal | None]) -> RoutingDelta:
        """The same for these PublicIPs only; None: a datagram reaches it. Costs the changes."""
        changed = [
            address
            for address, refusal in changes.items()
            if self._misrouted.get(address) is not refusal
        ]
        for address in changed:
            if (refusal := changes[address]) is None:
                del self._misrouted[address]
            else:
                self._misrouted[address] = refusal
        return self._judge_addresses(changed)

    def fib(self) -> Fib:
        """The table of what is known now, of the next generation."""
        self.generation += 1
        return assemble_fib(
            self._rows.view,
            self._hops.view,
            own_subnet=self._own_key.subnet,
            own_addresses=self.own_addresses,
            broadcasts=self.broadcasts,
            generation=self.generation,
        )

    def note_seen(self, generation: int) -> None:
        """No consumer uses a FIB older than `generation` any more: ids freed before are free."""
        self._hops.note_seen(generation)

    def why(self, address: IPv4Address) -> RouteAnswer:
        """Which lease decides about `address`: the longest prefix that is a peer, as in the FIB.

        Where no peer covers it, the longest refused one.
        """
        refused: RouteAnswer | None = None
        own = self._own_key.subnet
        for length in sorted({*self._lengths, own.prefixlen}, reverse=True):
            subnet = IPv4Network((address, length), strict=False)
            peer = self._peers.get(subnet)
            if peer is not None:
                return RouteAnswer(peer=peer, lease=self._deciding(subnet))
            if subnet == own:
                return RouteAnswer(lease=self.leases.get(self._own_key), is_own=True)
            if refused is None and (keys := self._keys.get(subnet)):
                no = self._refused[keys[0]]
                refused = RouteAnswer(lease=no.lease, refusal=no.refusal)
        return refused or RouteAnswer()

    def _deciding(self, subnet: IPv4Network) -> Lease | None:
        return next(
            (self.leases[key] for key in self._keys[subnet] if key not in self._refused), None
        )

    def _own_observations(
        self, update: Snapshot | Events, changes: Iterable[Change]
    ) -> tuple[OwnLease, ...]:
        own = self._own_key
        if (bad := self.bad_entries.get(str(own))) is not None:
            return (OwnUnreadable(bad.why),)
        seen: list[OwnLease] = [
            OwnGone() if change.new is None else OwnSeen(change.new)
            for change in changes
            if change.key == own
        ]
        # Every snapshot without our lease is an observation, though it was not known before.
        is_whole = isinstance(update, Snapshot) or update.is_whole
        if is_whole and own not in self.leases and not seen:
            seen.append(OwnGone())
        return tuple(seen)

    def _judge_again(self, changes: Collection[Change]) -> RoutingDelta:
        """Elect the peer of each subnet that `changes` touch, or that waits for a hop id."""
        before: dict[IPv4Network, Peer | None] = {}
        refused_before: dict[LeaseKey, RefusedLease | None] = {}
        for change in changes:
            if change.key == self._own_key:
                continue
            subnet = change.key.subnet
            before.setdefault(subnet, self._peers.get(subnet))
            self._index(change)
        assigned: list[int] = []

        def elect(subnet: IPv4Network) -> None:
            for key in self._keys.get(subnet, ()):
                refused_before.setdefault(key, self._refused.get(key))
            self._elect(subnet, before[subnet], assigned)

        for subnet in before:
            elect(subnet)
        for subnet in tuple(self._without_hop) if self._hops.has_room else ():
            if not self._hops.has_room:
                break
            if subnet not in before:
                before[subnet] = self._peers.get(subnet)
                elect(subnet)
        gone, come, moved = _net(before, {subnet: self._peers.get(subnet) for subnet in before})
        return RoutingDelta(
            gone=gone,
            come=come,
            moved=moved,
            hops_assigned=tuple(assigned),
            newly_refused=tuple(
                now
                for key, was_refused in refused_before.items()
                if (now := self._refused.get(key)) is not None and _is_news(was_refused, now)
            ),
        )

    def _index(self, change: Change) -> None:
        """Keep the list of keys that name the subnet, the one that wins first."""
        subnet = change.key.subnet
        keys = set(self._keys.pop(subnet, ()))
        had_keys = bool(keys)
        keys.discard(change.key)
        if change.old is not None:
            self._by_address.discard(change.old.attributes.public_ip, change.key)
        if change.new is not None:
            self._by_address.add(change.new.attributes.public_ip, change.key)
        if change.new is None:
            self._refused.pop(change.key, None)
            self._duplicates.pop(change.key, None)
        else:
            keys.add(change.key)
        if keys:
            self._keys[subnet] = tuple(sorted(keys, key=_rank)) if len(keys) > 1 else (*keys,)
        self._lengths[subnet.prefixlen] += bool(keys) - had_keys
        if not self._lengths[subnet.prefixlen]:
            del self._lengths[subnet.prefixlen]

    def _elect(self, subnet: IPv4Network, was: Peer | None, assigned: list[int]) -> None:
        """The first key that names an admissible peer wins; each other one is refused."""
        winner: Lease | None = None
        self._without_hop.pop(subnet, None)
        for key in self._keys.get(subnet, ()):
            lease = self.leases[key]
            refusal = self._refuse(lease)
            if refusal is None and winner is not None:
                refusal = Refusal.DUPLICATE_SUBNET
            if refusal is None and self._hops.is_full(self._endpoint_of(lease)):
                refusal = Refusal.TOO_MANY_PEERS
                self._without_hop[subnet] = None
            if refusal is None:
                winner = lease
            self._note_refusal(lease, refusal)
        if winner is None:
            if self._peers.pop(subnet, None) is not None:
                self._rows.remove(subnet)
        else:
            endpoint = self._endpoint_of(winner)
            hop_id, is_new = self._hops.take(endpoint)
            if is_new:
                assigned.append(hop_id)
            peer = Peer(
                subnet=subnet,
                endpoint=endpoint,
                hop_id=hop_id,
                backend_type=winner.attributes.backend_type,
                backend_data=winner.attributes.backend_data,
            )
            self._peers[subnet] = peer
            self._rows.put(peer)
        if was is not None:
            self._hops.release(was.endpoint, self.generation)

    def _note_refusal(self, lease: Lease, refusal: Refusal | None) -> None:
        if refusal is None:
            self._refused.pop(lease.key, None)
        else:
            self._refused[lease.key] = RefusedLease(lease, refusal)
        if refusal is Refusal.OWN_PUBLIC_IP:
            self._duplicates[lease.key] = None
        else:
            self._duplicates.pop(lease.key, None)

    def _endpoint_of(self, lease: Lease) -> Endpoint:
        return Endpoint(lease.attributes.public_ip, self._backend.peer_port)

    def _refuse(self, lease: Lease) -> Refusal | None:
        address = lease.attributes.public_ip
        subnet = lease.key.subnet
        if lease.attributes.backend_type.lower() not in self._backend.lease_types:
            return Refusal.OTHER_BACKEND
        if address == UNSPECIFIED:
            return Refusal.NO_PUBLIC_IP
        if address in self.own_addresses or address == self.public_ip:
            return self._refuse_own(lease)
        if address.is_multicast or int(address) == _BROADCAST or int(address) >> 24 in (0, 127):
            return Refusal.NOT_UNICAST
        if (refusal := self._misrouted.get(address)) is not None:
            return refusal
        if not subnet.subnet_of(self._network):
            return Refusal.OUTSIDE_NETWORK
        if self._pool is not None and subnet.prefixlen < self._pool.subnet_len:
            return Refusal.TOO_WIDE
        if subnet.subnet_of(self._own_key.subnet):
            return Refusal.INSIDE_OWN_SUBNET
        return None

    def _refuse_own(self, lease: Lease) -> Refusal:
        """Why a lease with an address of this node is no peer: only a duplicate node is alive."""
        if lease.attributes.public_ip != self.public_ip:
            return Refusal.HOST_ADDRESS
        holder = whose(lease, public_ip=self.public_ip, identity=self._identity)
        is_dead = holder in (Holder.OURS, Holder.LEFTOVER) and lease.key not in self._renewed
        return Refusal.LEFTOVER if is_dead else Refusal.OWN_PUBLIC_IP

    def _notice_renewal(self, change: Change) -> bool:
        """Whether this is the first write of a leftover since we know it: somebody holds it."""
        old, new = change.old, change.new
        if new is None or new.attributes.public_ip != self.public_ip:
            self._renewed.pop(change.key, None)
            return False
        if old is None or new.revision <= old.revision or change.key in self._renewed:
            return False
        refused = self._refused.get(change.key)
        if refused is None or refused.refusal is not Refusal.LEFTOVER:
            return False
        self._renewed[change.key] = None
        return True


def _is_news(before: RefusedLease | None, now: RefusedLease) -> bool:
    """Whether the refusal differs from the one logged: a renewal of a refused lease does not."""
    return before is None or (before.refusal, before.lease.attributes.public_ip) != (
        now.refusal,
        now.lease.attributes.public_ip,
    )


def _rank(key: LeaseKey) -> tuple[bool, IPv4Address, str]:
    """Of two keys for one subnet the aligned one wins, else the lower: the same on every node."""
    return not key.is_aligned, key.v4.ip, str(key)
