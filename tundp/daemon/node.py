"""A node that has its lease, and what keeps it going while the daemon runs.

follow leases   the store's updates -> table -> peers -> FIB
keep lease      renewals, and getting it back (store/claim.py)
keep device     the TUN made again when it was deleted
watch kernel    what somebody took from the device put back; the underlay's address,
MTU and state followed
keep firewall   rules put back
keep memory     the leases on disk, for a start without the store
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from typing import Any, Final

import tundp
from tundp.backoff import Backoff, Outage
from tundp.config import Config
from tundp.daemon.health import Check
from tundp.daemon.memory import Memory, Remembered
from tundp.daemon.metrics import Metrics
from tundp.daemon.stores import api_of
from tundp.dataplane.base import Dataplane
from tundp.dataplane.choose import make_engine
from tundp.dataplane.native import EngineSettings, Layout
from tundp.errors import ConfigError, PlatformError, StoreError
from tundp.files import write_atomically
from tundp.lease import subnet_env
from tundp.lease.fib import build_fib
from tundp.lease.model import (
    BadEntry,
    BadEntryGone,
    Events,
    Gone,
    Lease,
    LeaseKey,
    Peer,
    Put,
    Snapshot,
)
from tundp.lease.network import NetworkConfig, parse_network_config
from tundp.lease.peers import PeerTable, Refusal, RefusedLease
from tundp.lease.table import Change as LeaseChange
from tundp.lease.table import LeaseTable
from tundp.linux import device, fallback, sdnotify
from tundp.linux.device import DeviceSettings
from tundp.linux.firewall import Firewall, Previous, needs_raw_sockets, watch_ruleset
from tundp.linux.iface import Interface, Selection, relook
from tundp.linux.netlink import Change as KernelChange
from tundp.linux.netlink import Netlink
from tundp.linux.offload import Offload
from tundp.linux.tun import Tun
from tundp.linux.udp import open_udp, rebind
from tundp.store.base import Store
from tundp.store.claim import Claim, LeaseState
from tundp.store.follow import follow
from tundp.wire import overhead
from tundp.wire.encap import SourceCheck

_log = logging.getLogger(__name__)

STATUS_SCHEMA: Final = 1
DEVICE_LIVES_S: Final = 10.0
"""A device that lasted so long was not part of a series of losses."""
REPAIR_PAUSE_S: Final = 0.1
"""Kernel changes come in bursts; a look this long after the first takes in the rest."""
UNDERLAY_PATIENCE: Final = 5
"""Looks, a fifth of a second apart, before a vanished address is believed: DHCP clients
take one away before they give the next."""
RULES_LOOK_S: Final = 60.0
"""Between looks at rules whose every change the kernel reports."""
LASTING_LEASES: Final = 1000
"""A snapshot of more makes the garbage collector's work noticeable."""
TELL_S: Final = 5.0
PEERS_NAMED: Final = 20
"""More changes at once are counted in the log, not named."""
PUBLISH_SHARE: Final = 5.0
"""Making routes takes at most one part in so many of the loop's time."""
MEMORY_S: Final = 10.0
"""At least so long between two writes of the leases to disk."""
CONFIRM_S: Final = 60.0


@dataclass(slots=True, kw_only=True, eq=False)
class Node:
    """The resources of `run`, and what keeps them going."""

    config: Config
    store: Store
    network: NetworkConfig
    network_text: str
    selection: Selection
    interface: Interface
    claim: Claim
    netlink: Netlink
    socks: list[socket.socket]
    firewall: Firewall | None
    previous: Previous | None
    memory: Memory
    metrics: Metrics
    node_id: str
    table: LeaseTable = field(default_factory=LeaseTable)
    peer_table: PeerTable = field(init=False)
    bad_entries: dict[str, str] = field(default_factory=dict)
    own_addresses: frozenset[IPv4Address] = frozenset()
    store_outage: Outage = field(init=False)
    settings: DeviceSettings = field(init=False)
    engine: Dataplane = field(init=False)
    tun: Tun | None = None
    tun_index: int = 0
    generation: int = 0
    started_at: float = field(default_factory=time.time)
    synced_at: float | None = None
    """When the leases were last known to be the store's, Unix time."""
    is_synced: bool = False
    """Whether the store itself was heard since the start."""
    missing_rules: str = "not set up yet"
    file_error: str = "not written yet"
    underlay_error: str = ""
    _refusals_said: set[tuple[LeaseKey, IPv4Address, Refusal]] = field(default_factory=set)
    _publish_timer: asyncio.TimerHandle | None = None
    _published_at: float = 0.0
    _publish_cost_s: float = 0.0
    _is_unsaved: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        key = self.claim.lease.key
        self.store_outage = Outage(_log, self.store.description)
        self.peer_table = PeerTable(
            network=self.network.network,
            own_key=key,
            own_addresses=[self.interface.public_ip],
        )
        self.settings = DeviceSettings(
            address=key.subnet.network_address,
            mtu=overhead.tun_mtu(self.interface.link.mtu, self.interface.link.name),
            network=self.network.network,
        )
        self.engine = make_engine(
            self.config.engine,
            self.socks,
            EngineSettings(
                disabled=frozenset(Offload(name) for name in self.config.disable_offloads),
                cpus=self.config.cpus,
                spin_us=self.config.spin,
                layout=Layout(self.config.layout),
            ),
            tunnel_address=self.settings.address,
            fib=build_fib(
                (), own_subnet=key.subnet, port=self.network.port, generation=self.generation
            ),
            source_check=SourceCheck(self.config.source_check),
            loop=asyncio.get_running_loop(),
        )

    async def open_device(self) -> None:
        """Make the TUN, configure it, and hand it to the engine."""
        name = self.config.tun_name if self.tun is None else self.tun.name
        if self.tun is not None:
            self.tun.close()
        self.tun = Tun(name, self.engine.tun_mode)
        self.tun_index = await device.configure(self.netlink, self.tun, self.settings)
        # First what is ours, then packets: nobody gets in under our name meanwhile.
        await self._learn_addresses()
        self.engine.attach(self.tun)
        _log.info(
            "device %s: address %s/32, MTU %d, route %s, engine %s",
            self.tun.name,
            self.settings.address,
            self.settings.mtu,
            self.settings.network,
            self.engine.name,
        )

    def recall(self, remembered: Remembered) -> None:
        """Begin with the leases of last time: the store is away."""
        self.synced_at = time.time() - remembered.age_s
        self._take_in(self.table.apply(Snapshot(remembered.leases, remembered.revision)))

    async def set_up_firewall(self) -> None:
        """Make the rules. What cannot be made is tried again, and readyz says so meanwhile."""
        if self.firewall is None:
            self.missing_rules = ""
            return
        try:
            await self.firewall.set_up(self.previous)
        except PlatformError as error:
            self.missing_rules = str(error)
            _log.error("%s rules: %s; trying again", self.firewall.name, error)
        else:
            self.missing_rules = ""
            _log.info("%s rules are in place", self.firewall.name)

    async def set_up_fallback(self) -> None:
        """Routes that catch what the device would carry, for as long as it is away."""
        if self.config.fallback_route:
            with self._tolerated("the fallback route"):
                await fallback.ensure(self.netlink, fallback.UNREACHABLE, self.settings.network)
        if self.config.ip_blackhole_route:
            with self._tolerated("the blackhole route"):
                subnet = self.claim.lease.key.subnet
                await fallback.ensure(self.netlink, fallback.BLACKHOLE, subnet)

    @staticmethod
    @contextlib.contextmanager
    def _tolerated(what: str) -> Iterator[None]:
        try:
            yield
        except PlatformError as error:
            _log.warning("%s: %s", what, error)

    def write_subnet_env(self) -> None:
        """Tell Docker and CNI. A file that cannot be written is a warning, as in flannel."""
        key = self.claim.lease.key
        env = subnet_env.SubnetEnv(
            network=self.network.network,
            key=key,
            network6=None if self.network.pool6 is None else self.network.pool6.network,  # type: ignore[arg-type]
            mtu=self.settings.mtu,
            ip_masq=self.config.ip_masq,
        )
        try:
            write_atomically(self.config.subnet_file, subnet_env.render(env))
        except OSError as error:
            self.file_error = error.strerror or str(error)
            _log.warning(
                "cannot write %s: %s; Docker and CNI will not learn this node's subnet",
                self.config.subnet_file,
                error.strerror,
            )
        else:
            self.file_error = ""

    async def run(self) -> None:
        """Run until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_leases(), name="follow leases")
            group.create_task(self.claim.keep(), name="keep lease")
            group.create_task(self._keep_device(), name="keep device")
            group.create_task(self._watch_kernel(), name="watch kernel")
            group.create_task(self._keep_firewall(), name="keep firewall")
            group.create_task(self._keep_memory(), name="keep memory")
            group.create_task(self._keep_telling(), name="keep telling")
            sdnotify.notify("READY=1", f"STATUS={self._summary()}")

    def close(self) -> None:
        """Stop the engine, then remove the device. The socket belongs to `run`."""
        if self._publish_timer is not None:
            self._publish_timer.cancel()
        self.engine.stop()
        if self.tun is not None:
            self.tun.close()
        sdnotify.notify("STOPPING=1")
        counters = self.engine.counters()
        _log.info(
            "stopped; encap %d packets, %d dropped; decap %d packets, %d dropped",
            counters.encap.packets_in,
            counters.encap.dropped,
            counters.decap.packets_in,
            counters.decap.dropped,
        )

    def status(self) -> dict[str, Any]:
        """Everything `tundp status` shows."""
        lease = self.claim.lease
        expires = self.claim.expires_in_s
        return {
            "schema": STATUS_SCHEMA,
            "version": tundp.__version__,
            "pid": os.getpid(),
            "uptime_s": round(time.time() - self.started_at, 1),
            "network": str(self.network.network),
            "subnet": str(lease.key.subnet),
            "public_ip": str(self.interface.public_ip),
            "node_id": self.node_id,
            "started_at": self.started_at,
            "interface": {
                "name": self.interface.link.name,
                "address": str(self.interface.address),
                "mtu": self.interface.link.mtu,
                "why": self.interface.why,
                "others": list(self.interface.others),
                "warnings": list(self.interface.warnings),
            },
            "port": self.network.port,
            "tun": {"name": "" if self.tun is None else self.tun.name, "mtu": self.settings.mtu},
            "engine": self.engine.name,
            "engine_uses": self.engine.describe(),
            "loop": type(asyncio.get_running_loop()).__module__.partition(".")[0],
            "lease": {
                "key": str(lease.key),
                "state": self.claim.state.value,
                "conflict": self.claim.conflict,
                "expires_in_s": None if expires is None else round(expires),
                "expires_at": None if expires is None else round(time.time() + expires),
            },
            "store": {
                "description": self.store.description,
                "is_answering": not self.store_outage.is_on,
                "is_from_memory": not self.is_synced,
                "revision": self.table.revision,
                "synced_at": self.synced_at,
                "age_s": self._age_s(),
            },
            "firewall": {
                "flavour": "" if self.firewall is None else self.firewall.name,
                "missing": self.missing_rules,
            },
            "checks": [check.as_dict() for check in self.checks()],
            "generation": self.generation,
            "peers": [
                {"subnet": str(peer.subnet), "public_ip": str(peer.address)}
                for peer in sorted(self.peer_table.peers.values(), key=lambda peer: peer.subnet)
            ],
            "refused": [
                {
                    "key": str(refused.lease.key),
                    "public_ip": str(refused.lease.attributes.public_ip),
                    "reason": refused.refusal.name.lower(),
                    "means": refused.refusal.value,
                }
                for refused in self.peer_table.refused
            ],
            "bad_entries": [
                {"name": name, "why": why} for name, why in sorted(self.bad_entries.items())
            ],
            "counters": self.engine.counters().as_dict(),
        }

    def checks(self) -> list[Check]:
        """What must hold for pods to use the overlay."""
        claim = self.claim
        state = claim.state.value
        link = self.interface.link
        age_s = self._age_s()
        return [
            Check("lease", claim.state is LeaseState.HELD, claim.conflict or state),
            Check(
                "device",
                self.tun is not None and self.tun_index != 0,
                "gone" if self.tun is None or not self.tun_index else self.tun.name,
            ),
            Check(
                "underlay",
                not self.underlay_error and link.is_up,
                self.underlay_error
                or f"{link.name} {self.interface.address} {'up' if link.is_up else 'is down'}",
            ),
            Check(
                "leases-synced",
                self.is_synced,
                f"{'' if self.is_synced else 'only from memory, '}age {age_s} s",
            ),
            Check("firewall", not self.missing_rules, self.missing_rules or "in place"),
            Check("subnet-file", not self.file_error, self.file_error or "written"),
        ]

    def _age_s(self) -> int | None:
        """How old what we know of the leases is: 0 while the store answers."""
        if self.is_synced and not self.store_outage.is_on:
            return 0
        return None if self.synced_at is None else round(time.time() - self.synced_at)

    async def _follow_leases(self) -> None:
        clock = asyncio.get_running_loop().time
        async for update in follow(self.store, self.store_outage, Backoff(0.2, 5.0)):
            began = clock()
            self.synced_at = time.time()
            if not self.is_synced:
                self.is_synced = True
                await self._compare_network()
            changes = self.table.apply(update)
            self._note_bad_entries(update)
            self._observe_own_lease(update, changes)
            moving = [change for change in changes if change.moves_packets]
            if self._take_in(moving):
                self.metrics.route_apply.observe(clock() - began)
            if changes:
                self._is_unsaved.set()
            if len(changes) > LASTING_LEASES:
                # They are here to stay: the collector need not walk them again and again,
                # a tenth of a second at a time with tens of thousands.
                gc.collect()
                gc.freeze()

    async def _compare_network(self) -> None:
        """After a start from memory: say so if the network config is another one by now."""
        try:
            text = await self.store.network_config()
            network = parse_network_config(text, self.store.description)
        except (StoreError, ConfigError) as error:
            _log.warning("network config: %s; going on with the one in use", error)
            return
        if network != self.network:
            _log.error(
                "the network config in %s is not the one this node started with (%s): restart it",
                self.store.description,
                self.network.network,
            )

    def _observe_own_lease(
        self, update: Snapshot | Events, changes: tuple[LeaseChange, ...]
    ) -> None:
        own = self.claim.lease.key
        if str(own) in self.bad_entries:
            self.claim.observe_unreadable(self.bad_entries[str(own)])
            return
        for change in changes:
            if change.key == own:
                self.claim.observe(change.new)
        if isinstance(update, Snapshot) and own not in self.table.leases:
            self.claim.observe(None)

    def _take_in(self, changes: Iterable[LeaseChange]) -> bool:
        """Judge changed leases; whether that changed where packets go."""
        return self._moved(*self.peer_table.apply(changes))

    def _moved(self, gone: Sequence[Peer], come: Sequence[Peer]) -> bool:
        """Say and publish what became of peers."""
        self._report_refused()
        if not gone and not come:
            return False
        if len(gone) + len(come) > PEERS_NAMED:
            _log.info("peers: %d gone or changed, %d new or changed", len(gone), len(come))
        else:
            for peer in gone:
                _log.info("peer %s at %s gone", peer.subnet, peer.address)
            for peer in come:
                _log.info("peer %s at %s", peer.subnet, peer.address)
        self._publish_soon()
        return True

    def _publish_soon(self) -> None:
        """Publish now, or, if that was so dear that events could keep us from all else, later."""
        loop = asyncio.get_running_loop()
        if self._publish_timer is not None:
            return
        free_at = self._published_at + PUBLISH_SHARE * self._publish_cost_s
        if loop.time() >= free_at:
            self._publish()
        else:
            self._publish_timer = loop.call_at(free_at, self._publish)

    def _publish(self) -> None:
        """Give the engine a FIB of what we know now."""
        loop = asyncio.get_running_loop()
        if self._publish_timer is not None:
            self._publish_timer.cancel()
            self._publish_timer = None
        began = loop.time()
        self.generation += 1
        self.engine.install(
            build_fib(
                self.peer_table.rows,
                own_subnet=self.claim.lease.key.subnet,
                own_addresses=self.own_addresses,
                port=self.network.port,
                generation=self.generation,
            )
        )
        self._published_at = loop.time()
        self._publish_cost_s = self._published_at - began

    def _report_refused(self) -> None:
        """Name each lease that is no peer, once."""
        refused = {_refusal_id(refused): refused for refused in self.peer_table.refused}
        for news in refused.keys() - self._refusals_said:
            _log.warning(
                "lease %s (%s) is no peer: it %s",
                refused[news].lease.key,
                refused[news].lease.attributes.public_ip,
                refused[news].refusal.value,
            )
        self._refusals_said = set(refused)

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

    async def _keep_device(self) -> None:
        """Make the TUN again whenever it was deleted; the counters go on."""
        backoff = Backoff(0.1, 5.0)
        outage = Outage(_log, "TUN device")
        clock = asyncio.get_running_loop().time
        while True:
            started = clock()
            await self.engine.tun_lost()
            self.tun_index = 0
            if clock() - started > DEVICE_LIVES_S:
                backoff.reset()
            else:
                # Lost again right away: somebody deletes it each time, or an engine fails.
                await asyncio.sleep(backoff.next_s())
            try:
                await self.open_device()
            except PlatformError as error:
                self.engine.detach()
                outage.failed(error, now=clock())
            else:
                outage.ended(now=clock())

    async def _watch_kernel(self) -> None:
        """Put back what somebody takes from the device; follow the underlay; learn addresses.

        Every round looks at everything, so nothing depends on having seen each change.
        A round that had to repair or failed is followed by another, later and later: two
        programs that disagree about a device must not fill the log.
        """
        outage = Outage(_log, "keeping the TUN device as it should be")
        clock = asyncio.get_running_loop().time
        backoff = Backoff(REPAIR_PAUSE_S, 5.0)
        while True:
            try:
                async with self.netlink.watch() as changes:
                    while True:
                        done = await self._look_at_kernel()
                        outage.ended(now=clock())
                        if done:
                            _log.warning("device changed behind our back; put back: %s", done)
                            await asyncio.sleep(backoff.next_s())
                            continue
                        backoff.reset()
                        while not any(self._concerns_us(c) for c in await changes()):
                            pass
                        await asyncio.sleep(REPAIR_PAUSE_S)
            except PlatformError as error:
                outage.failed(error, now=clock())
                await asyncio.sleep(backoff.next_s())

    def _concerns_us(self, change: KernelChange) -> bool:
        """Any link or address, a route of our device's, or one for what is ours."""
        if change.destination is None:
            return True
        ours = (self.settings.network, self.claim.lease.key.subnet)
        return change.index == self.tun_index or change.destination in ours

    async def _look_at_kernel(self) -> str:
        await self._follow_underlay()
        done = await device.repair(self.netlink, self.tun_index, self.settings)
        await self.set_up_fallback()
        await self._learn_addresses()
        return ", ".join(done)

    async def _learn_addresses(self) -> None:
        own = frozenset(
            address.interface.ip
            for address in await self.netlink.addresses()
            if address.interface.ip != self.settings.address
        )
        if own != self.own_addresses:
            self.own_addresses = own
            self._readdress()
            self._publish()

    async def _follow_underlay(self) -> None:
        """Take in a changed address, MTU or state of the interface to the other nodes."""
        was = self.interface
        try:
            now = await self._look_at_underlay()
        except ConfigError as error:
            if not self.underlay_error:
                _log.error("underlay: %s; going on with what there is", error)
            self.underlay_error = str(error)
            return
        if self.underlay_error:
            _log.info("underlay: %s (%s) again", now.link.name, now.address)
            self.underlay_error = ""
        if now.link.is_up != was.link.is_up:
            _log.warning("interface %s went %s", now.link.name, "up" if now.link.is_up else "down")
        if now.address != was.address and not self._rebind(now):
            return
        self.interface = now
        if now.public_ip != was.public_ip:
            _log.warning("PublicIP changes from %s to %s", was.public_ip, now.public_ip)
            self.claim.move_to(now.public_ip)
        mtu = overhead.tun_mtu(now.link.mtu, now.link.name)
        if mtu != self.settings.mtu:
            _log.warning(
                "MTU of %s is %d now: overlay MTU %d, was %d; pods keep theirs until restarted",
                now.link.name,
                now.link.mtu,
                mtu,
                self.settings.mtu,
            )
            self.settings = replace(self.settings, mtu=mtu)
            self.write_subnet_env()
        if now.public_ip != was.public_ip:
            self._readdress()

    def _readdress(self) -> None:
        """Judge leases by the addresses that are ours now."""
        own = [self.interface.public_ip, *self.own_addresses]
        self._moved(*self.peer_table.set_own_addresses(own))

    async def _look_at_underlay(self) -> Interface:
        """The interface as it is now; an address that is gone gets a second to come back."""
        for _ in range(UNDERLAY_PATIENCE):
            with contextlib.suppress(ConfigError):
                now = await self._relook()
                if now.link.index == self.interface.link.index:
                    return now
            await asyncio.sleep(0.2)
        return await self._relook()

    async def _relook(self) -> Interface:
        return await relook(self.netlink, self.selection, self.interface, self.network.network)

    def _rebind(self, now: Interface) -> bool:
        """Move the sockets to the new address; the engine keeps its descriptors."""
        try:
            fresh = open_sockets(self.config, now.address, self.network.port)
        except PlatformError as error:
            _log.error("cannot move to %s: %s", now.address, error)
            self.underlay_error = str(error)
            return False
        self.engine.detach()
        for sock, successor in zip(self.socks, fresh, strict=True):
            rebind(sock, successor)
        self.engine.rebound()
        if self.tun is not None and self.tun_index:
            self.engine.attach(self.tun)
        _log.warning(
            "underlay address changed from %s to %s on %s: sockets moved",
            self.interface.address,
            now.address,
            now.link.name,
        )
        return True

    async def _keep_firewall(self) -> None:
        """Put rules back when they go; look when the kernel says so, or every period."""
        if self.firewall is None:
            return
        outage = Outage(_log, f"{self.firewall.name} rules")
        clock = asyncio.get_running_loop().time
        backoff = Backoff(1.0, 60.0)
        # Of the legacy iptables' changes the kernel tells nobody.
        is_blind = self.firewall.name == "iptables" and needs_raw_sockets()
        resync_s = self.config.iptables_resync
        period_s = resync_s if is_blind else max(RULES_LOOK_S, resync_s)
        async with watch_ruleset() as changed:
            while True:
                try:
                    if self.missing_rules:
                        await self.firewall.set_up(self.previous)
                        self.missing_rules = ""
                    elif missing := await self.firewall.repair():
                        _log.warning("firewall rules were gone; put back: %s", ", ".join(missing))
                except PlatformError as error:
                    self.missing_rules = str(error)
                    outage.failed(error, now=clock())
                    await asyncio.sleep(backoff.next_s())
                    continue
                outage.ended(now=clock())
                backoff.reset()
                # Many change at once; and two who disagree must not spin.
                await asyncio.sleep(1.0)
                await changed(float(period_s))

    async def _keep_memory(self) -> None:
        """Write the leases down, not more often than every MEMORY_S, and confirm them between."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CONFIRM_S):
                    await self._is_unsaved.wait()
            if not self._is_unsaved.is_set():
                if not self.store_outage.is_on:
                    await asyncio.to_thread(self.memory.confirm)
                continue
            self._is_unsaved.clear()
            if self.is_synced:
                await asyncio.to_thread(self._remember, tuple(self.table.leases.values()))
            await asyncio.sleep(MEMORY_S)

    def _remember(self, leases: Sequence[Lease]) -> None:
        self.memory.save(
            store=store_name(self.config),
            api=api_of(self.store),
            network_config=self.network_text,
            own_key=self.claim.lease.key,
            leases=leases,
            revision=self.table.revision,
        )

    async def _keep_telling(self) -> None:
        """Tell systemd of changes that are not told where they happen."""
        told = ""
        while True:
            if (summary := self._summary()) != told:
                sdnotify.notify(f"STATUS={summary}")
                told = summary
            await asyncio.sleep(TELL_S)

    def _summary(self) -> str:
        peers = len(self.peer_table.peers)
        text = f"{self.claim.lease.key.subnet}, {peers} peer{'' if peers == 1 else 's'}"
        if self.claim.state is not LeaseState.HELD:
            text += f", lease {self.claim.state.value.upper()}"
        if self.store_outage.is_on or not self.is_synced:
            text += f", leases {self._age_s()} s old: the store does not answer"
        return text


def open_sockets(config: Config, address: IPv4Address, port: int) -> list[socket.socket]:
    """The underlay's sockets, one for each worker; all or none. PlatformError."""
    with contextlib.ExitStack() as stack:
        socks = [
            stack.enter_context(
                open_udp(
                    address,
                    port,
                    is_shared=config.workers > 1,
                    is_one_of_many=number > 0,
                )
            )
            for number in range(config.workers)
        ]
        stack.pop_all()
        return socks


def store_name(config: Config) -> str:
    """Which leases these are, whatever endpoint gives them: what is remembered goes by it."""
    if config.store_path is not None:
        return config.store
    return f"etcd:{config.etcd_prefix}"


def _refusal_id(refused: RefusedLease) -> tuple[LeaseKey, IPv4Address, Refusal]:
    """What makes two refusals the same news: a renewal is none."""
    return refused.lease.key, refused.lease.attributes.public_ip, refused.refusal
