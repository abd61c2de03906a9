"""The kernel's side of a node while the daemon runs: watched, followed, put back.

    netlink change --note--> Due           what the change is worth, from the change itself
                   --look--> the kernel    asked for what is due, and for nothing else

Concerned are: our device and the routes over it, routes of the network and of our subnet, the
link and address of the underlay, this host's own addresses, and routes, rules and links that
decide where the PublicIPs lead. All else on a host with thousands of containers and routes
costs the decoding of its message. Lost messages mean one look at everything.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from heapq import nsmallest
from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING, Final

from tundp.backoff import Backoff, Outage
from tundp.daemon.backends import lease_offer
from tundp.daemon.peer_paths import PeerPaths
from tundp.daemon.underlay import PEERS_ASKED
from tundp.daemon.unreachable import ensure_unreachable
from tundp.errors import ConfigError, PlatformError
from tundp.lease.model import Events, Put, Snapshot
from tundp.linux.iface import Host, read_host
from tundp.linux.netlink import (
    Address,
    AddressChange,
    Change,
    Flow,
    LinkChange,
    RouteChange,
    RuleChange,
)
from tundp.linux.uapi import RT_TABLE_LOCAL, RT_TABLE_MAIN

if TYPE_CHECKING:
    from tundp.daemon.node import Node

_log = logging.getLogger(__name__)

REPAIR_PAUSE_S: Final = 0.1
"""Kernel changes come in bursts; a look this long after the first covers the rest."""
RETRY_S: Final = 5.0
"""Between looks at an underlay that cannot be used."""
DEVICE_S: Final = 0.5
"""Between looks for a device that is being made again."""
PATHS_KEPT: Final = 1000
"""Addresses whose ways are kept beyond two a lease: a lease may have another one each time."""
PACE: Final = 20.0
"""A look that cost a second is followed by no other for so many; repairs excepted."""


@dataclass(slots=True)
class Due:
    """What has to be looked at."""

    everything: bool = False
    underlay: bool = False
    device: bool = False
    unreachable: bool = False
    addresses: bool = False
    all_paths: bool = False
    paths: set[IPv4Address] = field(default_factory=set)

    def __bool__(self) -> bool:
        """Whether anything is."""
        return self.is_urgent or self.underlay or self.all_paths or bool(self.paths)

    @property
    def is_urgent(self) -> bool:
        """Whether something may have been taken from us: it waits for no pace."""
        return self.everything or self.device or self.unreachable or self.addresses


class KernelKeeper:
    """See the module."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._netlink = node.netlink
        self._paths = PeerPaths(
            node.netlink,
            network=node.network_config.network,
            has_device=node.backend.device_index is not None,
        )
        self._addresses: dict[tuple[int, IPv4Address], Address] = {}
        """This host's addresses, by link and address."""
        self._free_at = 0.0
        """Event-loop time before which nothing costly is looked at again."""

    async def prepare(self) -> None:
        """Before there is a device: learn our addresses, predict the ways to all known leases."""
        await self._learn_addresses(await self._netlink.addresses())
        await self._paths.predict(self._known_addresses(self._node.acquired.snapshot), self._flow())
        self._node.routing.set_misrouted(self._paths.misrouted)

    async def opened(self) -> None:
        """The device is there: it has an address of its own, and its routes."""
        await self._learn_addresses(await self._netlink.addresses())
        await self._ask_paths(Due(all_paths=True))
        await self.ensure_unreachable()

    async def admit(self, update: Snapshot | Events) -> None:
        """Ask for the ways to PublicIPs that are new with `update`, before it is applied."""
        try:
            await self._paths.ask(self._known_addresses(update), self._flow())
        except PlatformError as error:
            _log.warning("new leases are taken without a look at the routes to them: %s", error)
        leases = self._node.routing.leases
        if self._paths.count > PATHS_KEPT + 2 * len(leases):
            known = [lease.attributes.public_ip for lease in leases.values()]
            self._paths.forget_but([*known, *self._known_addresses(update)])
        self._publish_paths()

    async def ensure_unreachable(self) -> None:
        """See daemon.unreachable."""
        await ensure_unreachable(
            self._netlink,
            self._node.settings,
            network=self._node.network_config.network,
            subnet=self._node.acquired.lease.key.subnet,
        )

    async def watch(self) -> None:
        """Put back what somebody takes from us; follow the underlay and the ways to the peers.

        A round that had to repair or failed is followed by another, later and later: two
        programs that disagree about a device must not fill the log.
        """
        outage = Outage(_log, "keeping the kernel's side as it should be")
        clock = asyncio.get_running_loop().time
        backoff = Backoff(REPAIR_PAUSE_S, 5.0)
        while True:
            try:
                async with self._netlink.watch() as changes:
                    due = Due(everything=True)
                    while True:
                        done = await self._look(due)
                        outage.ended(now=clock())
                        if done:
                            what = f"changed behind our back; put back: {', '.join(done)}"
                            self._node.contest.undone(what, now=clock())
                            due = Due(device=True, unreachable=True)
                            await asyncio.sleep(backoff.next_s())
                            continue
                        backoff.reset()
                        await asyncio.sleep(REPAIR_PAUSE_S)
                        due = await self._gather(changes)
            except PlatformError as error:
                outage.failed(error, now=clock())
                await asyncio.sleep(backoff.next_s())

    async def _gather(self, changes: Callable[[], Awaitable[list[Change]]]) -> Due:
        """Wait until something is due, and may be looked at again; what that is."""
        due = Due()
        clock = asyncio.get_running_loop().time
        # What could not be done is tried again, though nothing happens.
        is_device_new = self._paths.is_stale(self._node.backend.device_index)
        retry_at = clock() + DEVICE_S if is_device_new else None
        if self._node.underlay.error:
            retry_at = clock() + RETRY_S
        while not due.is_urgent and not (due and clock() >= self._free_at):
            try:
                async with asyncio.timeout_at(self._free_at if due else retry_at):
                    seen = await changes()
                    for change in seen:
                        self._note(change, due)
                    self._node.backend.kernel_changed(seen)
            except TimeoutError:
                if not due:
                    due.underlay, due.all_paths = bool(self._node.underlay.error), is_device_new
                    break
        return due

    def _note(self, change: Change, due: Due) -> None:
        """Add what `change` is worth."""
        node, backend = self._node, self._node.backend
        due.underlay = due.underlay or node.underlay.is_concerned(change)
        due.paths.update(self._paths.concerned(change))
        due.all_paths = due.all_paths or self._paths.is_about_device(change)
        due.device = due.device or backend.is_concerned(change)
        if isinstance(change, AddressChange):
            self._note_address(change, due)
        elif isinstance(change, RouteChange) and change.table != RT_TABLE_LOCAL:
            ours = (node.network_config.network, node.acquired.lease.key.subnet)
            if change.destination in ours:
                due.device = True
                due.unreachable = change.table == RT_TABLE_MAIN or due.unreachable
        elif isinstance(change, LinkChange) and backend.owns_address(change.link.index):
            due.all_paths = True
        if due or _may_obstruct(change, node.network_config.network):
            node.obstacles.poke()

    def _note_address(self, change: AddressChange, due: Due) -> None:
        address = change.address
        key = address.index, address.interface.ip
        if change.is_gone:
            self._addresses.pop(key, None)
        elif self._addresses.get(key) == address:
            return
        else:
            self._addresses[key] = address
        due.addresses = True

    async def _look(self, due: Due) -> list[str]:
        """Look at what is due; what had to be put back."""
        busy_s = self._netlink.busy_s
        node = self._node
        host: Host | None = None
        done: list[str] = []
        if due.everything:
            host = await read_host(self._netlink)
            await self._learn_addresses(host.addresses)
        elif due.addresses:
            self._publish_addresses()
        if due.everything or due.underlay:
            await self._follow_underlay(host)
        if due.everything or due.device:
            done = await node.backend.repair()
        if due.everything or due.unreachable:
            await self.ensure_unreachable()
        await self._ask_paths(due)
        cost_s = self._netlink.busy_s - busy_s
        self._free_at = asyncio.get_running_loop().time() + PACE * cost_s
        return done

    async def _ask_paths(self, due: Due) -> None:
        node = self._node
        if due.everything or due.all_paths:
            await self._paths.follow_device(
                node.backend.device_index, self._leased_addresses, self._flow()
            )
        elif due.paths:
            await self._paths.ask_again(due.paths, self._flow())
        else:
            return
        self._publish_paths()

    def _publish_paths(self) -> None:
        if news := self._paths.take_news():
            with self._node.change():
                self._node.publisher.apply(self._node.routing.note_misrouted(news))

    def _leased_addresses(self) -> list[IPv4Address]:
        return [lease.attributes.public_ip for lease in self._node.routing.leases.values()]

    def _known_addresses(self, update: Snapshot | Events) -> Iterable[IPv4Address]:
        if isinstance(update, Snapshot):
            return (lease.attributes.public_ip for lease in update.leases)
        return (
            event.lease.attributes.public_ip for event in update.events if isinstance(event, Put)
        )

    def _flow(self) -> Flow | None:
        """How our datagrams look, for policy rules; None for a backend that sends none."""
        port = self._node.network_config.backend.peer_port
        return Flow(source=self._node.underlay.interface.address, port=port) if port else None

    async def _learn_addresses(self, addresses: Iterable[Address]) -> None:
        self._addresses = {(each.index, each.interface.ip): each for each in addresses}
        self._publish_addresses()

    def _publish_addresses(self) -> None:
        """Give the ledger this node's addresses, which no lease may lead to."""
        node = self._node
        self._paths.set_own_networks(each.interface.network for each in self._addresses.values())
        public_ip = node.underlay.interface.public_ip
        own = frozenset(
            address for index, address in self._addresses if not node.backend.owns_address(index)
        ) | {public_ip}
        broadcasts = frozenset(
            address for each in self._addresses.values() for address in each.broadcasts
        )
        if (own, broadcasts, public_ip) != (
            node.routing.own_addresses,
            node.routing.broadcasts,
            node.routing.public_ip,
        ):
            with node.change():
                node.routing.broadcasts = broadcasts
                delta = node.routing.set_own_addresses(own, public_ip)
                node.publisher.apply(delta, is_own_changed=True)

    async def _follow_underlay(self, host: Host | None) -> None:
        """Follow a changed address, MTU or state of the interface to the other nodes."""
        node = self._node
        peers = (peer.endpoint.address for peer in node.routing.peers.values())
        node.underlay.peers = nsmallest(PEERS_ASKED, peers)
        was = node.underlay.interface
        now = await node.underlay.look(host)
        if now is None:
            return
        mtu = node.backend.mtu
        try:
            offer = lease_offer(node.backend, node.settings, node.network_config, now)
            if await node.backend.underlay_changed(now):
                node.manager.reconnect()
        except (ConfigError, PlatformError) as error:
            node.underlay.failed(error)
            return
        node.underlay.follow(now)
        if now.public_ip != was.public_ip:
            _log.warning("PublicIP changes from %s to %s", was.public_ip, now.public_ip)
            node.manager.offer(offer)
            self._publish_addresses()
        if mtu != node.backend.mtu:
            _log.warning(
                "MTU of %s is %d now: overlay MTU %d, was %d; pods keep theirs until restarted",
                now.link.name,
                now.link.mtu,
                node.backend.mtu,
                mtu,
            )
            node.write_subnet_file()


def _may_obstruct(change: Change, network: IPv4Network) -> bool:
    """Whether `change` may lead the network's packets elsewhere: a policy rule, a route in it."""
    if isinstance(change, RouteChange):
        return change.destination.subnet_of(network) and change.table != RT_TABLE_LOCAL
    return isinstance(change, RuleChange)
