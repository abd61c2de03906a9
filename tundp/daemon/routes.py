"""Where packets go: the leases as last heard, the peers among them, and the FIB of those."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Collection, Iterator, Sequence
from ipaddress import IPv4Address
from typing import Final

from tundp.engine.base import Dataplane
from tundp.lease.fib import build_fib
from tundp.lease.model import (
    BadEntry,
    BadEntryGone,
    Events,
    Gone,
    LeaseKey,
    Peer,
    Put,
    Snapshot,
)
from tundp.lease.network import BACKEND_UDP, NetworkConfig
from tundp.lease.peers import PeerTable, Refusal, RefusedLease
from tundp.lease.table import Change, LeaseTable
from tundp.observe import collect
from tundp.observe.collect import PeerView
from tundp.observe.status import BadEntryStatus, PeerStatus, RefusedStatus, RoutingStatus

_log = logging.getLogger(__name__)

LASTING_LEASES: Final = 1000
"""A snapshot of more makes the garbage collector's work noticeable."""
PEERS_NAMED: Final = 20
"""More changes at once are counted in the log, not named."""
PUBLISH_SHARE: Final = 5.0
"""Making FIBs takes at most one part in so many of the loop's time."""


class Routes:
    """Takes in what the store says, and keeps the engine's FIB true to it.

    A change costs the same whatever the number of leases, but for the FIB, which is made
    whole each time by a few numpy passes.
    """

    def __init__(
        self,
        engine: Dataplane,
        *,
        network: NetworkConfig,
        own_key: LeaseKey,
        public_ip: IPv4Address,
    ) -> None:
        self.table = LeaseTable()
        self.peers = PeerTable(network=network.network, own_key=own_key, own_addresses=[public_ip])
        self.bad_entries: dict[str, str] = {}
        self.generation = 0
        self._engine = engine
        self._own_key = own_key
        self._port = network.port
        self._public_ip = public_ip
        self._own_addresses: frozenset[IPv4Address] = frozenset()
        self._twins: list[LeaseKey] = []
        self._refusals_said: set[tuple[LeaseKey, IPv4Address, Refusal]] = set()
        self._publish_timer: asyncio.TimerHandle | None = None
        self._published_at = 0.0
        self._publish_cost_s = 0.0

    def take_in(self, update: Snapshot | Events) -> tuple[tuple[Change, ...], bool]:
        """One update of the store: what it changed, and whether packets go elsewhere now."""
        changes = self.table.apply(update)
        self._note_bad_entries(update)
        moving = (change for change in changes if change.moves_packets)
        has_moved = self._moved(*self.peers.apply(moving))
        if len(changes) > LASTING_LEASES:
            # They are here to stay: the collector need not walk them again and again, a
            # tenth of a second at a time with tens of thousands.
            gc.collect()
            gc.freeze()
        return changes, has_moved

    @property
    def twins(self) -> list[LeaseKey]:
        """Leases of other nodes that advertise our own PublicIP."""
        return self._twins

    def set_own(self, public_ip: IPv4Address, addresses: Collection[IPv4Address]) -> None:
        """The node's addresses: no lease may lead to them, no packet may come from them."""
        addresses = frozenset(addresses)
        if (public_ip, addresses) == (self._public_ip, self._own_addresses):
            return
        self._public_ip, self._own_addresses = public_ip, addresses
        self._moved(*self.peers.set_own_addresses([public_ip, *addresses]))
        self.publish()

    def close(self) -> None:
        """Publish no more."""
        if self._publish_timer is not None:
            self._publish_timer.cancel()

    def publish(self) -> None:
        """Give the engine a FIB of what we know now."""
        loop = asyncio.get_running_loop()
        if self._publish_timer is not None:
            self._publish_timer.cancel()
            self._publish_timer = None
        began = loop.time()
        self.generation += 1
        self._engine.install(
            build_fib(
                self.peers.rows,
                own_subnet=self._own_key.subnet,
                own_addresses=self._own_addresses,
                port=self._port,
                generation=self.generation,
            )
        )
        self._published_at = loop.time()
        self._publish_cost_s = self._published_at - began

    def status(self) -> RoutingStatus:
        """What is shown of it, in numbers; the cost does not depend on the number of leases."""
        narrow, no_gso = collect.path_counts(self._engine)
        return RoutingStatus(
            generation=self.generation,
            peers=len(self.peers.peers),
            refused=self.peers.refused_count,
            bad_entries=len(self.bad_entries),
            narrow_paths=narrow,
            no_gso_paths=no_gso,
        )

    def peer_statuses(self) -> Sequence[PeerStatus]:
        """Every peer, for `tundp status`."""
        peers = tuple(self.peers.peers.values())
        port = self._port

        def views() -> Iterator[PeerView]:
            for peer in peers:
                yield PeerView(
                    subnet=peer.subnet,
                    public_ip=peer.address,
                    port=port,
                    backend_type=BACKEND_UDP,
                )

        return collect.peer_statuses(len(peers), views, self._engine)

    def refused_statuses(self) -> Sequence[RefusedStatus]:
        """Every lease that is no peer, for `tundp status`."""
        refused = self.peers.refused
        return collect.refused_statuses(len(refused), lambda: refused)

    def bad_entry_statuses(self) -> Sequence[BadEntryStatus]:
        """Every entry that cannot be read, for `tundp status`."""
        return collect.bad_entry_statuses(dict(self.bad_entries))

    def _moved(self, gone: Sequence[Peer], come: Sequence[Peer]) -> bool:
        """Say and publish what became of peers."""
        self._report_refused()
        if not gone and not come:
            return False
        if len(gone) + len(come) > PEERS_NAMED:
            _log.info("peers: %d gone or changed, %d new or changed", len(gone), len(come))
        else:
            before = {peer.subnet: peer.address for peer in gone}
            for peer in come:
                was = before.pop(peer.subnet, None)
                moved = "" if was is None else f", before at {was}"
                _log.info("peer %s at %s%s", peer.subnet, peer.address, moved)
            for subnet, address in before.items():
                _log.info("peer %s at %s gone", subnet, address)
        self._publish_soon()
        return True

    def _publish_soon(self) -> None:
        """Publish now, or, if that was so dear that events could keep us from all else, later."""
        loop = asyncio.get_running_loop()
        if self._publish_timer is not None:
            return
        free_at = self._published_at + PUBLISH_SHARE * self._publish_cost_s
        if loop.time() >= free_at:
            self.publish()
        else:
            self._publish_timer = loop.call_at(free_at, self.publish)

    def _report_refused(self) -> None:
        """Name each lease that is no peer, once."""
        refused = {_refusal_id(refused): refused for refused in self.peers.refused}
        for news in refused.keys() - self._refusals_said:
            _log.warning(
                "lease %s (%s) is no peer: it %s",
                refused[news].lease.key,
                refused[news].lease.attributes.public_ip,
                refused[news].refusal.value,
            )
        self._refusals_said = set(refused)
        self._twins = [key for key, _, refusal in refused if refusal is Refusal.OWN_PUBLIC_IP]

    def _note_bad_entries(self, update: Snapshot | Events) -> None:
        """Keep the list of unreadable entries, and say so once for each."""
        known = self.bad_entries
        if isinstance(update, Snapshot):
            self.bad_entries = {entry.name: entry.why for entry in update.bad}
        else:
            self.bad_entries = dict(known)
            for event in update.events:
                match event:
                    case BadEntry(name, why):
                        self.bad_entries[name] = why
                    case BadEntryGone(name):
                        self.bad_entries.pop(name, None)
                    case Put(lease):
                        self.bad_entries.pop(str(lease.key), None)
                    case Gone(key):
                        self.bad_entries.pop(str(key), None)
        for name, why in self.bad_entries.items():
            if known.get(name) != why:
                _log.warning("entry %r ignored: %s", name, why)


def _refusal_id(refused: RefusedLease) -> tuple[LeaseKey, IPv4Address, Refusal]:
    """What makes two refusals the same news: a renewal is none."""
    return refused.lease.key, refused.lease.attributes.public_ip, refused.refusal
