"""Which PublicIPs the kernel routes into the overlay itself, or takes for no single host.

A datagram to such an address comes back to us through our own device. The kernel alone knows:
nodes may well have addresses of the overlay's network where a longer route, or a policy rule,
leads to them. Asked for are only the addresses that a route over our device covers, and again
only when a route, rule, link or address changes that concerns them.
"""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from tundp.lease.routing import Refusal
from tundp.linux.netlink import (
    AddressChange,
    Change,
    Flow,
    LinkChange,
    Netlink,
    NoRoute,
    RouteChange,
    RouteLookup,
)
from tundp.linux.uapi import RT_TABLE_DEFAULT, RT_TABLE_LOCAL, RT_TABLE_MAIN

_Judged = tuple[IPv4Address, RouteLookup | NoRoute, Refusal | None]
"""An address, what the kernel says of it, and why no datagram reaches it, if so."""


class PeerPaths:
    """See the module. `misrouted` is what Routing.set_misrouted takes."""

    def __init__(self, netlink: Netlink, *, network: IPv4Network, has_device: bool) -> None:
        """has_device: whether a device of ours will have the network's route."""
        self.misrouted: dict[IPv4Address, Refusal] = {}
        self._broadcasts: frozenset[IPv4Address] = frozenset()
        """Of this host's own networks."""
        self._netlink = netlink
        self._network = network
        self._device: int | None = None
        self._covers: tuple[IPv4Network, ...] = (network,) if has_device else ()
        self._asked: dict[IPv4Address, int] = {}
        """Each address asked for, and the link it leads over; 0 if it has no route."""
        self._sorted: list[int] = []
        """The same addresses, ascending."""
        self._outs: Counter[int] = Counter()
        """How many addresses lead over each of these links."""
        self._news: set[IPv4Address] = set()
        """Addresses of which `misrouted` says something else than when last taken."""

    def set_own_networks(self, networks: Iterable[IPv4Network]) -> bool:
        """Keep the broadcast addresses of this host's networks; whether they are others now."""
        before = self._broadcasts
        self._broadcasts = frozenset(
            network.broadcast_address for network in networks if network.prefixlen < 31
        )
        return self._broadcasts != before

    def unknown(self, addresses: Iterable[IPv4Address]) -> list[IPv4Address]:
        """Those the kernel has to be asked for and was not yet."""
        masks = [(int(net.netmask), int(net.network_address)) for net in self._covers]
        return [
            address
            for address in dict.fromkeys(addresses)
            if address not in self._asked
            and (
                address in self._broadcasts
                or any(int(address) & mask == first for mask, first in masks)
            )
        ]

    async def predict(self, addresses: Iterable[IPv4Address], flow: Flow | None = None) -> None:
        """Ask for what is not known yet, as it will be when our device has its route.

        Whatever is routed no more specifically than the network will go into it. PlatformError.
        """
        found = await self._netlink.lookups(self.unknown(addresses), flow, of_routes=True)
        judged: list[_Judged] = []
        for address, answer in found.items():
            if isinstance(answer, RouteLookup):
                refusal = _NO_HOST.get(answer.kind)
                is_behind = answer.table in (RT_TABLE_MAIN, RT_TABLE_DEFAULT)
                is_inside = is_behind and answer.prefix_len <= self._network.prefixlen
            else:
                refusal, is_inside = None, True  # no route but the device's
            if refusal is None and is_inside and address in self._network:
                refusal = Refusal.ROUTED_INTO_OVERLAY
            judged.append((address, answer, refusal))
        self._note(judged)

    def take_news(self) -> dict[IPv4Address, Refusal | None]:
        """What `misrouted` says now of the addresses of which it says something else than before.

        Before: when this was called last. None: a datagram reaches it.
        """
        news, self._news = self._news, set()
        return {address: self.misrouted.get(address) for address in news}

    @property
    def count(self) -> int:
        """How many addresses the kernel was asked for."""
        return len(self._asked)

    def forget_but(self, addresses: Iterable[IPv4Address]) -> None:
        """Keep what is known of these addresses only: no lease has the others any more."""
        kept = set(addresses)
        gone = [address for address in self._asked if address not in kept]
        for address in gone:
            del self._asked[address]
            if self.misrouted.pop(address, None) is not None:
                self._news.add(address)
        self._rebuild()

    async def ask(self, addresses: Iterable[IPv4Address], flow: Flow | None) -> None:
        """Ask for what is not known yet. PlatformError."""
        if unknown := self.unknown(addresses):
            await self._look_up(unknown, flow)

    async def ask_again(self, addresses: Collection[IPv4Address], flow: Flow | None) -> None:
        """Ask for these again, since something changed that concerns them. PlatformError."""
        await self._look_up([each for each in addresses if each in self._asked], flow)

    async def follow_device(
        self,
        index: int | None,
        addresses: Callable[[], Iterable[IPv4Address]],
        flow: Flow | None,
    ) -> None:
        """Ask for everything anew: of `addresses`, what routes over our device cover.

        index: the device's; 0 while it is gone: nothing changes then; None if there is none.
        addresses: called after the kernel listed the routes, since leases come and go meanwhile.
        """
        if index == 0:
            return
        self._device = index
        self._covers = () if index is None else tuple(await self._netlink.prefixes(index))
        before, self._asked, self.misrouted = self.misrouted, {}, {}
        self._rebuild()
        unknown = self.unknown(addresses())
        self.misrouted = {each: before[each] for each in unknown if each in before}
        self._news |= before.keys() - self.misrouted.keys()
        await self._look_up(unknown, flow)

    def concerned(self, change: Change) -> Collection[IPv4Address]:
        """The addresses whose way may be another after a change."""
        if isinstance(change, RouteChange):
            if change.table == RT_TABLE_LOCAL:
                return ()
            first = int(change.destination.network_address)
            last = int(change.destination.broadcast_address)
            left, right = bisect_left(self._sorted, first), bisect_right(self._sorted, last)
            return [IPv4Address(each) for each in self._sorted[left:right]]
        if isinstance(change, LinkChange):
            # Routes go silently with a link that goes down.
            if change.link.is_up and not change.is_gone:
                return ()
            return self._over(change.link.index)
        if isinstance(change, AddressChange):
            # And with an address they name as source.
            return self._over(change.address.index) if change.is_gone else ()
        return tuple(self._asked)

    def is_about_device(self, change: Change) -> bool:
        """Whether a change is of a route over our device, which may cover other addresses now."""
        return isinstance(change, RouteChange) and bool(
            self._device and self._device in change.indexes
        )

    def is_stale(self, device: int | None) -> bool:
        """Whether the device is another than the one asked for, or is gone."""
        return device != self._device

    def _over(self, index: int) -> list[IPv4Address]:
        if not self._outs[index]:
            return []
        return [address for address, out in self._asked.items() if out == index]

    async def _look_up(self, addresses: Collection[IPv4Address], flow: Flow | None) -> None:
        if not addresses:
            return
        found: Mapping[IPv4Address, RouteLookup | NoRoute]
        found = await self._netlink.lookups(addresses, flow)
        judged: list[_Judged] = []
        for address, answer in found.items():
            refusal = None
            if isinstance(answer, RouteLookup):
                refusal = _NO_HOST.get(answer.kind)
                if answer.index == self._device:
                    refusal = Refusal.ROUTED_INTO_OVERLAY
            elif answer.errno == errno.EINVAL:
                # Our source address is away for a moment, or a blackhole: no news of a loop.
                refusal = self.misrouted.get(address)
            judged.append((address, answer, refusal))
        self._note(judged)

    def _rebuild(self) -> None:
        self._sorted = sorted(map(int, self._asked))
        self._outs = Counter(self._asked.values())

    def _note(self, judged: Collection[_Judged]) -> None:
        """Keep answers. A few cost nothing more with more addresses, but for a move in memory."""
        is_many = len(judged) > _MANY
        for address, answer, refusal in judged:
            before = self._asked.get(address)
            if before is not None:
                self._outs[before] -= 1
            elif not is_many:
                insort(self._sorted, int(address))
            out = self._asked[address] = answer.index if isinstance(answer, RouteLookup) else 0
            self._outs[out] += 1
            if self.misrouted.get(address) is not refusal:
                self._news.add(address)
            if refusal is None:
                self.misrouted.pop(address, None)
            else:
                self.misrouted[address] = refusal
        if is_many:
            self._rebuild()


_MANY: Final = 100
"""Answers from which on the order is made anew."""
_NO_HOST: Mapping[str, Refusal] = {
    "broadcast": Refusal.NOT_UNICAST,
    "multicast": Refusal.NOT_UNICAST,
}
"""Refusals by the kind of route the kernel finds."""
