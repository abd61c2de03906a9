"""The routing ledger, every lease and what became of it, as documents: GET /v1/ledger, typed.

`tundp explain` and `tundp replay` judge packets by it, without a daemon too: then it is made of
what the store holds, or of a mapping of subnets to PublicIPs (`from_mapping`). LEDGER_SCHEMA goes
up when a member changes meaning, changes type or goes; new members come without notice.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Final

from tundp.choices import SourceCheck
from tundp.lease.fib import FIRST_HOP_ID, Fib, build_fib
from tundp.lease.model import Endpoint, Lease, LeaseKey, Peer
from tundp.lease.routing import RefusedLease, Routing
from tundp.observe import codec
from tundp.observe.codec import Malformed
from tundp.wire.policy import Policy, Prefix

LEDGER_SCHEMA: Final = 1
PEER: Final = "peer"
OWN: Final = "own"
REFUSED: Final = "refused"
DEFAULT_PORT: Final = 8285


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerRow:
    """One lease, and what became of it here."""

    subnet: IPv4Network
    public_ip: IPv4Address
    state: str = PEER
    """`peer`, `own` or `refused`."""
    key: str = ""
    """As the store spells it: 10.5.1.0-24."""
    port: int | None = None
    """UDP port its packets are sent to; null for a backend without one."""
    backend_type: str = ""
    reason: str = ""
    """The name of the refusal; empty unless it was refused."""
    means: str = ""
    """The same as a sentence, the lease as its subject."""
    revision: int = 0
    """The store's version of the entry."""

    @property
    def endpoint(self) -> str:
        """Where its packets go: 192.0.2.7:8285."""
        return str(self.public_ip) if self.port is None else f"{self.public_ip}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Every lease a node knows, and what else its verdicts about packets depend on."""

    schema: int = LEDGER_SCHEMA
    """Goes up when a member changes meaning, changes type or goes."""
    network: IPv4Network | None = None
    """The whole overlay."""
    subnet: IPv4Network | None = None
    """This node's part of it; null if it has no lease."""
    public_ip: IPv4Address | None = None
    """What peers are told to send to."""
    backend: str = "udp"
    port: int | None = None
    """UDP port of this node; null for a backend without one."""
    mtu: int | None = None
    """Bytes of the largest inner packet."""
    source_check: SourceCheck = SourceCheck.COUNT
    admitted: Sequence[IPv4Network] = ()
    """Networks in no lease that any peer may send from."""
    own_addresses: Sequence[IPv4Address] = ()
    """This node's addresses, which no packet from a peer may come from."""
    broadcasts: Sequence[IPv4Address] = ()
    """Broadcast addresses of its networks."""
    revision: int = 0
    """The store's revision the table is the state of."""
    generation: int = 0
    """Of the FIB in use; 0 if none is."""
    leases: Sequence[LedgerRow] = ()
    """By subnet; those that concern some addresses, if only these were asked for."""
    total: int | None = None
    """How many leases there are, if `leases` has not all of them."""
    bad_entries: int = 0
    """Entries of the store nobody can read."""

    def to_json(self) -> dict[str, Any]:
        """The document the admin socket answers with."""
        return codec.to_json(self)

    @classmethod
    def from_json(cls, document: Any, where: str = "leases") -> Ledger:
        """The reverse; also of a plain object of subnets and PublicIPs. Malformed, if neither.

        What `tundp leases --json` prints is read as well: it names its leases alike.
        """
        if not isinstance(document, dict):
            raise Malformed(f"{where} is no object")
        if "leases" not in document and "schema" not in document:
            return from_mapping(document)
        if document.get("schema") != LEDGER_SCHEMA:
            raise Malformed(
                f"{where} has schema {document.get('schema')}, and this tundp reads {LEDGER_SCHEMA}"
            )
        return codec.from_json(cls, document).completed()

    def completed(self) -> Ledger:
        """The table with what its own lease says of its node, where nothing else does."""
        own = next((each for each in self.leases if each.state == OWN), None)
        if self.subnet is not None or own is None:
            return self
        return self.owned_by(own)

    def owned_by(self, row: LedgerRow) -> Ledger:
        """The table of the node that holds this lease."""
        mine = replace(row, state=OWN, port=None)
        return replace(
            self,
            subnet=row.subnet,
            public_ip=row.public_ip,
            own_addresses=(row.public_ip,),
            leases=tuple(mine if each is row else each for each in self.leases),
        )

    @property
    def tun_address(self) -> IPv4Address | None:
        """The TUN's address: the first of this node's subnet."""
        return None if self.subnet is None else self.subnet.network_address

    @property
    def peers(self) -> list[LedgerRow]:
        """Those that packets are sent to."""
        return [each for each in self.leases if each.state == PEER]

    def holding(self, address: IPv4Address) -> LedgerRow | None:
        """The lease that decides about an address: as in the FIB the longest prefix of a peer.

        Or this node's own. Where neither covers it, the longest refused one.
        """
        covering = [each for each in self.leases if address in each.subnet]
        if not covering:
            return None
        ranked = [(each.state != REFUSED, each.subnet.prefixlen) for each in covering]
        return covering[ranked.index(max(ranked))]

    def peer_at(self, address: IPv4Address) -> LedgerRow | None:
        """A peer's lease with this PublicIP."""
        return next((each for each in self.peers if each.public_ip == address), None)

    @property
    def count(self) -> int:
        """How many leases there are."""
        return len(self.leases) if self.total is None else self.total

    def about(self, addresses: Collection[IPv4Address]) -> Ledger:
        """The table of what concerns these addresses: all that can decide about one of them.

        That is this node's lease, what covers an address or has it as PublicIP, and the nearest.
        """
        near = [each for address in addresses for each in self.nearest(address)]
        kept = tuple(
            row
            for row in self.leases
            if row.state == OWN
            or row in near
            or row.public_ip in addresses
            or any(address in row.subnet for address in addresses)
        )
        return replace(self, leases=kept, total=self.count)

    def nearest(self, address: IPv4Address, count: int = 2) -> list[LedgerRow]:
        """Ledger whose subnets are next to an address, the nearest first."""
        wanted = int(address)

        def distance(row: LedgerRow) -> int:
            first = int(row.subnet.network_address)
            return max(first - wanted, wanted - first - row.subnet.num_addresses + 1, 0)

        return heapq.nsmallest(count, self.leases, key=distance)

    def fib(self) -> Fib:
        """The table packets are judged by."""
        return build_fib(
            _numbered(self.peers, self.port),
            own_subnet=self.subnet,
            own_addresses=self.own_addresses,
            broadcasts=self.broadcasts,
            generation=self.generation,
        )

    def policy(self) -> Policy:
        """The rest of what a datagram from a peer is judged by."""
        return Policy(
            tun_address=int(self.tun_address or IPv4Address(0)),
            source_check=self.source_check,
            port=self.port or DEFAULT_PORT,
            admitted=tuple(
                Prefix(int(each.network_address), int(each.netmask)) for each in self.admitted
            ),
        )

    def seen_from(self, row: LedgerRow, source: IPv4Address) -> Ledger:
        """What a peer's own table says, as far as a packet of ours from `source` depends on it."""
        us = LedgerRow(
            subnet=self.subnet or IPv4Network("0.0.0.0/32"),
            public_ip=self.public_ip or IPv4Address(0),
            port=self.port,
        )
        holder = self.holding(source)
        others = [holder] if holder is not None and holder.state == PEER else []
        return replace(
            self,
            subnet=row.subnet,
            public_ip=row.public_ip,
            port=row.port,
            own_addresses=(row.public_ip, row.subnet.network_address),
            broadcasts=(),
            leases=tuple(each for each in (us, *others) if each.subnet != row.subnet),
        )


def from_mapping(document: Mapping[str, Any]) -> Ledger:
    """A table of peers from an object of subnets and PublicIPs. Malformed names what is wrong."""
    rows = []
    for subnet, public_ip in document.items():
        try:
            if not isinstance(public_ip, str):
                raise ValueError(f"{public_ip!r} is no address")  # noqa: TRY004
            row = LedgerRow(
                subnet=IPv4Network(subnet), public_ip=IPv4Address(public_ip), port=DEFAULT_PORT
            )
        except ValueError as error:
            raise Malformed(f"{subnet}: {error}") from None
        rows.append(row)
    return Ledger(leases=tuple(rows), port=DEFAULT_PORT)


@dataclass(frozen=True, slots=True)
class LedgerRows:
    """A copy of what a ledger holds, to make rows of where the ledger may change meanwhile."""

    own_key: LeaseKey
    leases: tuple[Lease, ...]
    refused: Mapping[LeaseKey, RefusedLease]
    peers: Mapping[IPv4Network, Peer]

    @classmethod
    def of(cls, routing: Routing) -> LedgerRows:
        """The copy. Call where the ledger is changed: on the event loop."""
        return cls(
            routing.own_key,
            tuple(routing.leases.values()),
            dict(routing.refused),
            dict(routing.peers),
        )

    def made(self) -> tuple[LedgerRow, ...]:
        """Every readable lease, by subnet; in any thread."""
        ordered = sorted(self.leases, key=lambda each: _place(each.key.subnet))
        return tuple(_row(lease, self) for lease in ordered)


def _row(lease: Lease, routing: LedgerRows) -> LedgerRow:
    subnet, refused = lease.key.subnet, routing.refused.get(lease.key)
    peer = routing.peers.get(subnet)
    state = PEER
    if lease.key == routing.own_key:
        state = OWN
    elif refused is not None:
        state = REFUSED
    return LedgerRow(
        subnet=subnet,
        public_ip=lease.attributes.public_ip,
        state=state,
        key=str(lease.key),
        port=peer.endpoint.port or None if state == PEER and peer is not None else None,
        backend_type=lease.attributes.backend_type,
        reason="" if refused is None else refused.refusal.name.lower(),
        means="" if refused is None else refused.refusal.value,
        revision=lease.revision,
    )


def _numbered(rows: Collection[LedgerRow], port: int | None) -> list[Peer]:
    """The rows as peers; rows of one endpoint have one hop id."""
    hops: dict[Endpoint, int] = {}
    found: dict[IPv4Network, Peer] = {}
    for row in rows:
        endpoint = Endpoint(row.public_ip, row.port or port or DEFAULT_PORT)
        hop_id = hops.setdefault(endpoint, FIRST_HOP_ID + len(hops))
        found[row.subnet] = Peer(subnet=row.subnet, endpoint=endpoint, hop_id=hop_id)
    return list(found.values())


def _place(subnet: IPv4Network) -> tuple[int, int]:
    return int(subnet.network_address), subnet.prefixlen
