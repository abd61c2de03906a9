"""The daemon: opens everything in order, runs one task group, and closes it all in reverse.

    store -> interface -> network config -> UDP socket -> lease -> TUN -> engine
          -> subnet.env -> READY -> { follow leases, keep lease, keep device, watch kernel }

Shutdown is cancellation and nothing else: `run` ends when its task is cancelled, and
what it opened is closed on the way out. As with flannel the lease and subnet.env stay,
so that the next start finds the same subnet.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
import time
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Any, Final

import tundp
from tundp.admin import serve_admin
from tundp.backoff import Backoff, Outage
from tundp.config import Config
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
    LeaseAttributes,
    LeaseKey,
    Put,
    Snapshot,
)
from tundp.lease.network import NetworkConfig, parse_network_config
from tundp.lease.peers import PeerSet, Refusal, RefusedLease, select_peers
from tundp.lease.table import Change as LeaseChange
from tundp.lease.table import LeaseTable
from tundp.linux import capability, device, sdnotify
from tundp.linux.device import DeviceSettings
from tundp.linux.iface import Host, Interface, select_interface
from tundp.linux.netlink import Change as KernelChange
from tundp.linux.netlink import Netlink
from tundp.linux.offload import Offload
from tundp.linux.tun import Tun
from tundp.linux.udp import open_udp
from tundp.store.base import Store
from tundp.store.claim import Claim
from tundp.store.etcd2 import Etcd2Store, EtcdAccess
from tundp.store.file import FileStore
from tundp.store.follow import follow
from tundp.wire import overhead
from tundp.wire.encap import SourceCheck

_log = logging.getLogger(__name__)

STATUS_SCHEMA: Final = 1
DEVICE_LIVES_S: Final = 10.0
"""A device that lasted so long was not part of a series of losses."""
REPAIR_PAUSE_S: Final = 0.1
"""Kernel changes come in bursts; a look this long after the first takes in the rest."""


async def run(config: Config) -> None:
    """Be a node of the overlay until cancelled. Raises TundpError when it cannot be one."""
    _log.info("tundp %s starting: %s", tundp.__version__, config.describe())
    capability.require(capability.CAP_NET_ADMIN, "a TUN device, its address and its route")
    async with contextlib.AsyncExitStack() as stack:
        store = open_store(config)
        stack.push_async_callback(store.close)
        netlink = await stack.enter_async_context(Netlink())
        interface = await _choose_interface(config, netlink)
        sdnotify.notify("STATUS=waiting for the network config")
        network = await _wait_for_network_config(store)
        socks = [
            stack.enter_context(
                open_udp(
                    interface.address,
                    network.port,
                    is_shared=config.workers > 1,
                    is_one_of_many=number > 0,
                )
            )
            for number in range(config.workers)
        ]
        claim = _make_claim(config, store, network, interface)
        sdnotify.notify("STATUS=waiting for a lease")
        lease = await claim.acquire()
        _log.info("lease %s, subnet %s", lease.key, lease.key.subnet)
        node = Node(
            config=config,
            store=store,
            network=network,
            interface=interface,
            claim=claim,
            netlink=netlink,
            socks=socks,
        )
        stack.callback(node.close)
        await node.open_device()
        await stack.enter_async_context(serve_admin(config.admin_socket, node.status))
        node.write_subnet_env()
        await node.run()


@dataclass(slots=True, kw_only=True, eq=False)
class Node:
    """A node that has its lease: the resources of `run`, and what keeps them going."""

    config: Config
    store: Store
    network: NetworkConfig
    interface: Interface
    claim: Claim
    netlink: Netlink
    socks: list[socket.socket]
    table: LeaseTable = field(default_factory=LeaseTable)
    peer_set: PeerSet = field(default_factory=lambda: PeerSet((), ()))
    bad_entries: dict[str, str] = field(default_factory=dict)
    own_addresses: frozenset[IPv4Address] = frozenset()
    store_outage: Outage = field(init=False)
    settings: DeviceSettings = field(init=False)
    engine: Dataplane = field(init=False)
    tun: Tun | None = None
    tun_index: int = 0
    generation: int = 0
    started_at: float = field(default_factory=time.time)
    updated_at: float | None = None

    def __post_init__(self) -> None:
        key = self.claim.lease.key
        self.store_outage = Outage(_log, self.store.description)
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

    def write_subnet_env(self) -> None:
        """Tell Docker and CNI. A file that cannot be written is a warning, as in flannel."""
        env = subnet_env.SubnetEnv(
            network=self.network.network,
            key=self.claim.lease.key,
            network6=None if self.network.pool6 is None else self.network.pool6.network,  # type: ignore[arg-type]
            mtu=self.settings.mtu,
            ip_masq=False,
        )
        try:
            write_atomically(self.config.subnet_file, subnet_env.render(env))
        except OSError as error:
            _log.warning(
                "cannot write %s: %s; Docker and CNI will not learn this node's subnet",
                self.config.subnet_file,
                error.strerror,
            )

    async def run(self) -> None:
        """Run until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_leases(), name="follow leases")
            group.create_task(self.claim.keep(), name="keep lease")
            group.create_task(self._keep_device(), name="keep device")
            group.create_task(self._watch_kernel(), name="watch kernel")
            sdnotify.notify("READY=1", f"STATUS={self._summary()}")

    def close(self) -> None:
        """Stop the engine, then remove the device. The socket belongs to `run`."""
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
            "interface": {
                "name": self.interface.link.name,
                "address": str(self.interface.address),
                "why": self.interface.why,
            },
            "port": self.network.port,
            "tun": {"name": "" if self.tun is None else self.tun.name, "mtu": self.settings.mtu},
            "engine": self.engine.name,
            "engine_uses": self.engine.describe(),
            "loop": type(asyncio.get_running_loop()).__module__.partition(".")[0],
            "lease": {
                "key": str(lease.key),
                "state": self.claim.state.value,
                "expires_in_s": None if expires is None else round(expires),
            },
            "store": {
                "description": self.store.description,
                "is_answering": not self.store_outage.is_on,
                "revision": self.table.revision,
                "age_s": None if self.updated_at is None else round(time.time() - self.updated_at),
            },
            "generation": self.generation,
            "peers": [
                {"subnet": str(peer.subnet), "public_ip": str(peer.address)}
                for peer in self.peer_set.peers
            ],
            "refused": [
                {
                    "key": str(refused.lease.key),
                    "public_ip": str(refused.lease.attributes.public_ip),
                    "reason": refused.refusal.name.lower(),
                    "means": refused.refusal.value,
                }
                for refused in self.peer_set.refused
            ],
            "bad_entries": [
                {"name": name, "why": why} for name, why in sorted(self.bad_entries.items())
            ],
            "counters": self.engine.counters().as_dict(),
        }

    async def _follow_leases(self) -> None:
        async for update in follow(self.store, self.store_outage, Backoff(0.2, 5.0)):
            self.updated_at = time.time()
            changes = self.table.apply(update)
            self._note_bad_entries(update)
            self._observe_own_lease(update, changes)
            own = self.claim.lease.key
            if any(change.moves_packets and change.key != own for change in changes):
                self._install_routes()

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

    def _install_routes(self) -> None:
        before = self.peer_set
        self.peer_set = select_peers(
            self.table.leases.values(),
            network=self.network.network,
            own_key=self.claim.lease.key,
            own_addresses=[self.interface.public_ip, *self.own_addresses],
        )
        self._report_refused(before)
        if self.peer_set.peers != before.peers:
            self._publish()
        for peer in sorted(set(before.peers) - set(self.peer_set.peers), key=str):
            _log.info("peer %s at %s gone", peer.subnet, peer.address)
        for peer in sorted(set(self.peer_set.peers) - set(before.peers), key=str):
            _log.info("peer %s at %s", peer.subnet, peer.address)

    def _publish(self) -> None:
        """Give the engine a FIB of what we know now."""
        self.generation += 1
        self.engine.install(
            build_fib(
                self.peer_set.peers,
                own_subnet=self.claim.lease.key.subnet,
                own_addresses=self.own_addresses,
                port=self.network.port,
                generation=self.generation,
            )
        )
        sdnotify.notify(f"STATUS={self._summary()}")

    def _report_refused(self, before: PeerSet) -> None:
        known = {_refusal_id(refused) for refused in before.refused}
        for refused in self.peer_set.refused:
            if _refusal_id(refused) not in known:
                _log.warning(
                    "lease %s (%s) is no peer: it %s",
                    refused.lease.key,
                    refused.lease.attributes.public_ip,
                    refused.refusal.value,
                )

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
        """Put back what somebody takes from the device; learn which addresses are ours.

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
        """Our device, anybody's address, or a route for the network wherever it leads."""
        if change.destination is None:
            return True
        return change.index == self.tun_index or change.destination == self.settings.network

    async def _look_at_kernel(self) -> str:
        done = await device.repair(self.netlink, self.tun_index, self.settings)
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
            self._install_routes()
            self._publish()

    def _summary(self) -> str:
        peers = len(self.peer_set.peers)
        return f"{self.claim.lease.key.subnet}, {peers} peer{'' if peers == 1 else 's'}"


def open_store(config: Config) -> Store:
    """The store the flags name; nothing is read yet. ConfigError for flags that cannot be."""
    if config.store_path is not None:
        return FileStore(config.store_path)
    return Etcd2Store(
        EtcdAccess(
            endpoints=config.etcd_endpoints,
            prefix=config.etcd_prefix,
            username=config.etcd_username,
            password=config.etcd_password,
            cafile=config.etcd_cafile,
            certfile=config.etcd_certfile,
            keyfile=config.etcd_keyfile,
        )
    )


async def _wait_for_network_config(store: Store) -> NetworkConfig:
    """The network config, as soon as there is a valid one: an operator may still be typing."""
    outage = Outage(_log, f"waiting for the network config from {store.description}")
    backoff = Backoff(0.5, 5.0)
    clock = asyncio.get_running_loop().time
    while True:
        try:
            config = parse_network_config(await store.network_config(), store.description)
        except (StoreError, ConfigError) as error:
            outage.failed(error, now=clock())
            await asyncio.sleep(backoff.next_s())
            continue
        outage.ended(now=clock())
        _log.info(
            "network %s, udp port %d, from %s", config.network, config.port, store.description
        )
        return config


async def _choose_interface(config: Config, netlink: Netlink) -> Interface:
    host = Host(
        links=await netlink.links(),
        addresses=await netlink.addresses(),
        routes=await netlink.routes(),
    )
    chosen = select_interface(host, wanted=config.iface, public_ip=config.public_ip)
    for warning in chosen.warnings:
        _log.warning("%s", warning)
    _log.info(
        "interface %s (%s), MTU %d, advertising %s: %s",
        chosen.link.name,
        chosen.address,
        chosen.link.mtu,
        chosen.public_ip,
        chosen.why,
    )
    return chosen


def _make_claim(
    config: Config, store: Store, network: NetworkConfig, interface: Interface
) -> Claim:
    return Claim(
        store,
        config=network,
        attributes=LeaseAttributes(public_ip=interface.public_ip),
        previous=_previous_key(config),
        lease_ttl_s=config.lease_ttl,
        margin_s=config.subnet_lease_renew_margin * 60,
        rng=random.SystemRandom(),
    )


def _refusal_id(refused: RefusedLease) -> tuple[LeaseKey, IPv4Address, Refusal]:
    """What makes two refusals the same news: a renewal is none."""
    return refused.lease.key, refused.lease.attributes.public_ip, refused.refusal


def _previous_key(config: Config) -> LeaseKey | None:
    try:
        text = config.subnet_file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return subnet_env.previous_key(text)
