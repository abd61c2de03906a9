"""The FIB: what packets consult. Immutable, longest prefix first, flat in the number of leases.

Layout, shared with native/src/fib.c, which reads the same memory:

    table   uint32[]   a root of 2^stride[0] slots for the addresses under `base`, then
                       chunks of 2^stride[n] slots, each replacing one slot of the level above
    slot    bit 31 clear: index into `hops` (0 = no route)
            bit 31 set:   offset in `table` of the chunk that refines this slot
    hops    (address uint32, port uint16, flags uint16)[]   host order, indexed by hop id;
            entry 0 is "no route", entry 1 this node's own subnet, an unused id has address 0

A lookup is at most three loads whatever the number of leases (one for the usual /24
leases in a /16 or /8), against flannel's walk over all of them. Shorter prefixes are
expanded to slots at build time, so "longest match" costs nothing per packet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Final

import numpy as np
import numpy.typing as npt

from tundp.lease.model import Peer

CHUNK: Final = 0x8000_0000
HOP_LOCAL: Final = 0x0001
"""`flags` bit of the hop that stands for this node's own subnet."""
NO_HOP_ID: Final = 0
LOCAL_HOP_ID: Final = 1
FIRST_HOP_ID: Final = 2
"""The lowest hop id a peer's endpoint can have; 0 is "no route", 1 this node's own subnet."""
HOPS_MAX: Final = 1 << 20
"""Hop ids end below it: engines reserve address space for so many per-hop entries."""
HOP_DTYPE: Final = np.dtype([("address", "=u4"), ("port", "=u2"), ("flags", "=u2")])
_ROOT_STRIDE: Final = 16
_CHUNK_STRIDE: Final = 8
_ADDRESS_BITS: Final = 32


@dataclass(frozen=True, slots=True)
class NextHop:
    """Where the packets of a subnet go: `address` in host order, `sockaddr` as sendto takes it."""

    address: int
    sockaddr: tuple[str, int]
    is_local: bool = False


@dataclass(frozen=True, slots=True)
class _Level:
    shift: int
    mask: int


class Fib:
    """One generation of routes. Build with `build_fib`; never changes afterwards."""

    __slots__ = (
        "_base",
        "_base_shift",
        "_hops",
        "_levels",
        "_peers",
        "_view",
        "broadcasts",
        "generation",
        "hop_array",
        "own_addresses",
        "peer_array",
        "peer_hops",
        "strides",
        "table",
    )

    def __init__(
        self,
        *,
        base: int,
        base_len: int,
        strides: tuple[int, ...],
        table: npt.NDArray[np.uint32],
        hop_array: npt.NDArray[np.void],
        own_addresses: frozenset[int],
        broadcasts: frozenset[int] = frozenset(),
        generation: int,
    ) -> None:
        self.own_addresses = own_addresses
        self.broadcasts = broadcasts
        """Broadcast addresses of this host's networks (host order)."""
        self.generation = generation
        self.strides = strides
        self.table = table
        self.hop_array = hop_array
        self._hops: tuple[NextHop | None, ...] | None = None
        for array in (table, hop_array):
            array.flags.writeable = False
        self._base = base
        self._base_shift = _ADDRESS_BITS - base_len
        self._levels = _levels(base_len, strides)
        # A memoryview item is a plain int; a numpy item would be boxed on every packet.
        self._view = memoryview(table)  # type: ignore[arg-type]  # mypy does not know ndarray as a buffer
        used = np.flatnonzero(hop_array["address"])
        addresses, first = np.unique(hop_array["address"][used], return_index=True)
        self.peer_array = addresses.astype(np.uint32)
        """Addresses of all peers (host order), ascending."""
        self.peer_hops = used[first].astype(np.uint32)
        """The hop id of each address in `peer_array`: of two with one address, the lower."""
        self._peers: dict[int, tuple[int, int]] | None = None

    @property
    def hops(self) -> tuple[NextHop | None, ...]:
        """What `index` counts; entry 0 is "no route". Made when first asked: C never does."""
        if self._hops is None:
            self._hops = tuple(map(_to_hop, self.hop_array.tolist()))
        return self._hops

    @property
    def peers(self) -> Mapping[int, tuple[int, int]]:
        """Endpoint (address, port) of each peer by its address. Made when asked first."""
        if self._peers is None:
            ports = self.hop_array["port"][self.peer_hops].tolist()
            self._peers = {
                address: (address, port)
                for address, port in zip(self.peer_array.tolist(), ports, strict=True)
            }
        return self._peers

    @property
    def base(self) -> int:
        """First address (host order) the root table covers."""
        return self._base

    @property
    def base_len(self) -> int:
        """Prefix length of the root table's range; outside of it nothing has a route."""
        return _ADDRESS_BITS - self._base_shift

    def index(self, address: int) -> int:
        """Index into `hops` for an address (host order); 0 is "no route"."""
        if (address ^ self._base) >> self._base_shift:
            return 0
        offset = 0
        for level in self._levels:
            slot = self._view[offset + (address >> level.shift & level.mask)]
            if slot < CHUNK:
                return slot
            offset = slot - CHUNK
        raise AssertionError("the last level of a FIB holds no chunk offsets")

    def lookup(self, address: int) -> NextHop | None:
        """The next hop for an address (host order), or None."""
        return self.hops[self.index(address)]

    def is_own(self, address: int) -> bool:
        """Whether an address (host order) is this node's, or lies in its own subnet."""
        if address in self.own_addresses:
            return True
        hop = self.lookup(address)
        return hop is not None and hop.is_local

    def is_broadcast(self, address: int) -> bool:
        """Whether an address (host order) is a broadcast address of this host's networks."""
        return address in self.broadcasts

    def is_node(self, address: int) -> bool:
        """Whether an address (host order) is one of this host's, or a peer's PublicIP."""
        return address in self.own_addresses or address in self.peers

    def holder(self, address: int) -> tuple[int, int] | None:
        """The endpoint that sends what has this inner source (host order), or None.

        Of an address in a lease it is the lease's peer; of a peer's PublicIP that peer. Nobody
        sends from our own subnet: its endpoint is address 0.
        """
        hop = self.lookup(address)
        return self.peer(address) if hop is None else (hop.address, hop.sockaddr[1])

    def peer(self, address: int) -> tuple[int, int] | None:
        """The endpoint of the peer with this PublicIP (host order), or None."""
        return self.peers.get(address)


def row_of(peer: Peer) -> tuple[int, int, int]:
    """A route in numbers: first address of the subnet, prefix length, hop id."""
    return int(peer.subnet.network_address), peer.subnet.prefixlen, peer.hop_id


def build_fib(
    peers: Iterable[Peer],
    *,
    own_subnet: IPv4Network | None,
    generation: int,
    own_addresses: Iterable[IPv4Address] = (),
    broadcasts: Iterable[IPv4Address] = (),
) -> Fib:
    """A FIB that sends each peer's subnet to its endpoint; equal subnets must not occur.

    For a handful of peers; `assemble_fib` takes the arrays that lease/routing.py keeps.
    """
    peers = tuple(peers)
    hops = np.zeros(1 + max((peer.hop_id for peer in peers), default=LOCAL_HOP_ID), HOP_DTYPE)
    for peer in peers:
        hops[peer.hop_id] = (int(peer.endpoint.address), peer.endpoint.port, 0)
    return assemble_fib(
        np.array([row_of(peer) for peer in peers], np.int64).reshape(-1, 3),
        hops,
        own_subnet=own_subnet,
        own_addresses=own_addresses,
        broadcasts=broadcasts,
        generation=generation,
    )


def assemble_fib(
    rows: npt.NDArray[np.int64],
    hops: npt.NDArray[np.void],
    *,
    own_subnet: IPv4Network | None,
    own_addresses: Iterable[IPv4Address],
    broadcasts: Iterable[IPv4Address] = (),
    generation: int,
) -> Fib:
    """A FIB of routes and hops in numbers. Cost: a few numpy passes, linear in the routes.

    rows: int64, shape (routes, 3), what `row_of` returns; each subnet once.
    hops: HOP_DTYPE, indexed by hop id; copied. Ids nobody uses have address 0. Entry
        LOCAL_HOP_ID is overwritten: `own_subnet` leads to it, unless a peer holds a
        longer prefix inside.
    own_addresses: the node's other addresses, which no packet may come from.
    broadcasts: broadcast addresses of its networks, which no packet may come from or be for.
    """
    starts: list[int] = []
    lengths: list[int] = []
    indexes: list[int] = []
    if own_subnet is not None:
        starts.append(int(own_subnet.network_address))
        lengths.append(own_subnet.prefixlen)
        indexes.append(LOCAL_HOP_ID)
    routes = _Routes(
        np.concatenate([np.array(starts, np.int64), rows[:, 0]]),
        np.concatenate([np.array(lengths, np.int64), rows[:, 1]]),
        np.concatenate([np.array(indexes, np.uint32), rows[:, 2].astype(np.uint32)]),
    )
    base, base_len, strides = _plan(routes)
    hop_array = np.zeros(max(len(hops), FIRST_HOP_ID), HOP_DTYPE)
    hop_array[: len(hops)] = hops
    hop_array[LOCAL_HOP_ID] = (0, 0, HOP_LOCAL if own_subnet is not None else 0)
    return Fib(
        base=base,
        base_len=base_len,
        strides=strides,
        table=_fill(routes, base_len, strides),
        hop_array=hop_array,
        own_addresses=frozenset(int(address) for address in own_addresses),
        broadcasts=frozenset(int(address) for address in broadcasts),
        generation=generation,
    )


def _to_hop(row: tuple[int, int, int]) -> NextHop | None:
    address, port, flags = row
    is_local = bool(flags & HOP_LOCAL)
    if not (address or is_local):
        return None
    return NextHop(address, (str(IPv4Address(address)), port), is_local=is_local)


@dataclass(frozen=True, slots=True)
class _Routes:
    """One row a route: first address (host order), prefix length, index into `hops`."""

    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    indexes: npt.NDArray[np.uint32]

    def select(self, rows: npt.NDArray[np.bool_]) -> _Routes:
        return _Routes(self.starts[rows], self.lengths[rows], self.indexes[rows])


def _plan(routes: _Routes) -> tuple[int, int, tuple[int, ...]]:
    """The prefix all routes share (address, length), and the address bits of each level."""
    if not len(routes.starts):
        return 0, _ADDRESS_BITS, (0,)
    first = int(routes.starts.min())
    last = int((routes.starts + (1 << (_ADDRESS_BITS - routes.lengths)) - 1).max())
    base_len = min(_ADDRESS_BITS - (first ^ last).bit_length(), int(routes.lengths.min()))
    base = first >> (_ADDRESS_BITS - base_len) << (_ADDRESS_BITS - base_len)
    left = int(routes.lengths.max()) - base_len
    strides = [min(left, _ROOT_STRIDE)]
    left -= strides[0]
    while left:
        strides.append(min(left, _CHUNK_STRIDE))
        left -= strides[-1]
    return base, base_len, tuple(strides)


def _levels(base_len: int, strides: tuple[int, ...]) -> tuple[_Level, ...]:
    levels = []
    shift = _ADDRESS_BITS - base_len
    for stride in strides:
        shift -= stride
        levels.append(_Level(shift, (1 << stride) - 1))
    return tuple(levels)


def _fill(routes: _Routes, base_len: int, strides: tuple[int, ...]) -> npt.NDArray[np.uint32]:
    """The table: level by level, within a level from short prefixes to long ones."""
    table = np.zeros(1 << strides[0], np.uint32)
    # Offset in the table of the node each route lies in, as far as we have descended.
    nodes = np.zeros(len(routes.starts), np.int64)
    end = base_len
    for number, level in enumerate(_levels(base_len, strides)):
        end += strides[number]
        slots = nodes + (routes.starts >> level.shift & level.mask)
        for length in np.unique(routes.lengths[routes.lengths <= end]):
            here = routes.lengths == length
            spans = slots[here][:, None] + np.arange(1 << (end - int(length)))
            table[spans] = routes.indexes[here][:, None]
        longer = routes.lengths > end
        if not longer.any():
            break
        parents, inverse = np.unique(slots[longer], return_inverse=True)
        chunk_len = 1 << strides[number + 1]
        offsets = len(table) + np.arange(len(parents)) * chunk_len
        table = np.concatenate([table, np.repeat(table[parents], chunk_len)])
        table[parents] = offsets.astype(np.uint32) | np.uint32(CHUNK)
        nodes = offsets[inverse]
        routes = routes.select(longer)
    return table
