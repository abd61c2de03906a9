"""Who the other nodes are: by TUN address, by subnet, and whose an inner address is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Network

from tundp.lease.fib import Fib
from tundp.lease.model import Peer
from tundp.lease.routing import RoutingDelta


class PeerTable:
    """The peers that routes lead to; kept by the differences of the routing ledger."""

    def __init__(self, fib: Fib, peers: Mapping[IPv4Network, Peer]) -> None:
        self._fib = fib
        self._by_subnet: dict[IPv4Network, Peer] = {}
        self._by_address: dict[int, dict[int, Peer]] = {}
        """By the first address of the subnet, and its prefix length."""
        self._by_hop: dict[int, dict[IPv4Network, None]] = {}
        self._ordered: list[Peer] | None = None
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
        for peer in (*delta.gone, *(old for old, _ in delta.moved)):
            self._by_subnet.pop(peer.subnet, None)
            address = int(peer.subnet.network_address)
            if (lengths := self._by_address.get(address)) is not None:
                lengths.pop(peer.subnet.prefixlen, None)
                if not lengths:
                    del self._by_address[address]
            if (subnets := self._by_hop.get(peer.hop_id)) is not None:
                subnets.pop(peer.subnet, None)
                if not subnets:
                    del self._by_hop[peer.hop_id]
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

    def ordered(self) -> Sequence[Peer]:
        """All peers by network; made again after a change only."""
        if self._ordered is None:
            self._ordered = sorted(self._by_subnet.values(), key=lambda peer: peer.subnet)
        return self._ordered

    def _add(self, peers: Iterable[Peer]) -> None:
        for peer in peers:
            self._by_subnet[peer.subnet] = peer
            address = int(peer.subnet.network_address)
            self._by_address.setdefault(address, {})[peer.subnet.prefixlen] = peer
            self._by_hop.setdefault(peer.hop_id, {})[peer.subnet] = None
        self._ordered = None
