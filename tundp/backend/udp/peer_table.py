"""Who the other nodes are: by TUN address, by subnet, and whose an inner address is."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterable, Mapping, Sequence
from ipaddress import IPv4Network
from typing import Final

from tundp.lease.fib import Fib
from tundp.lease.model import Peer
from tundp.lease.routing import RoutingDelta

_FEW: Final = 64
"""So many changes of the order are cheaper one by one."""


class PeerTable:
    """The peers that routes lead to; kept by the differences of the routing ledger."""

    def __init__(self, fib: Fib, peers: Mapping[IPv4Network, Peer]) -> None:
        self._fib = fib
        self._by_subnet: dict[IPv4Network, Peer] = {}
        self._by_address: dict[int, dict[int, Peer]] = {}
        """By the first address of the subnet, and its prefix length."""
        self._by_hop: dict[int, dict[IPv4Network, None]] = {}
        self._order: list[int] = []
        """The rank of each peer, ascending."""
        self._by_rank: dict[int, Peer] = {}
        self._add(peers.values())

    @property
    def generation(self) -> int:
        """Of the FIB in use."""
        return self._fib.generation

    def install(self, fib: Fib, delta: RoutingDelta) -> None:
        """See FibSink."""
        self._fib = fib
        if delta.is_whole:
            self._by_subnet.clear()
            self._by_address.clear()
            self._by_hop.clear()
            self._order.clear()
            self._by_rank.clear()
        gone = []
        for peer in (*delta.gone, *(old for old, _ in delta.moved)):
            self._by_subnet.pop(peer.subnet, None)
            address, length = int(peer.subnet.network_address), peer.subnet.prefixlen
            if self._by_rank.pop(rank := _rank(address, length), None) is not None:
                gone.append(rank)
            if (lengths := self._by_address.get(address)) is not None:
                lengths.pop(length, None)
                if not lengths:
                    del self._by_address[address]
            if (subnets := self._by_hop.get(peer.hop_id)) is not None:
                subnets.pop(peer.subnet, None)
                if not subnets:
                    del self._by_hop[peer.hop_id]
        self._leave_out(gone)
        self._add((*delta.come, *(new for _, new in delta.moved)))

    def of_tun_address(self, address: int) -> Peer | None:
        """The peer whose TUN has this address (host order), the first of its subnet; or None.

        Packets from a pod have another: no pod speaks for its node.
        """
        lengths = self._by_address.get(address)
        if not lengths:
            return None
        peer = lengths[max(lengths)]
        return peer if self.hop_of(address) == peer.hop_id else None

    def covering(self, subnet: IPv4Network) -> Peer | None:
        """The peer whose lease is this subnet, or the smallest that covers it."""
        for length in range(subnet.prefixlen, -1, -1):
            key = subnet if length == subnet.prefixlen else subnet.supernet(new_prefix=length)
            if (peer := self._by_subnet.get(key)) is not None:
                return peer
        return None

    def hop_of(self, address: int) -> int:
        """The hop id packets for an inner address (host order) go to; 0 none."""
        return self._fib.index(address)

    def subnets_of(self, hop_id: int) -> Sequence[IPv4Network]:
        """The subnets that lead to a hop."""
        return tuple(self._by_hop.get(hop_id, ()))

    def __len__(self) -> int:
        return len(self._order)

    def page(self, start: int, count: int) -> Sequence[Peer]:
        """Peers `start` to `start + count` of all in the order of their networks.

        The order is kept with each change: any peer may ask for a page after each of them.
        """
        return [self._by_rank[rank] for rank in self._order[start : start + count]]

    def _leave_out(self, ranks: Collection[int]) -> None:
        if len(ranks) > _FEW:
            gone = set(ranks)
            self._order = [rank for rank in self._order if rank not in gone]
            return
        for rank in ranks:
            del self._order[bisect_left(self._order, rank)]

    def _put_in(self, ranks: Collection[int]) -> None:
        if len(ranks) > _FEW:
            self._order += ranks
            self._order.sort()
            return
        for rank in ranks:
            insort(self._order, rank)

    def _add(self, peers: Iterable[Peer]) -> None:
        fresh = []
        for peer in peers:
            self._by_subnet[peer.subnet] = peer
            address, length = int(peer.subnet.network_address), peer.subnet.prefixlen
            self._by_address.setdefault(address, {})[length] = peer
            self._by_hop.setdefault(peer.hop_id, {})[peer.subnet] = None
            rank = _rank(address, length)
            if rank not in self._by_rank:
                fresh.append(rank)
            self._by_rank[rank] = peer
        self._put_in(fresh)


def _rank(address: int, length: int) -> int:
    """A number whose order is that of the networks, without comparing those, which is slow."""
    return address << 6 | length
