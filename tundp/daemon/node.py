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
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import tundp
from tundp.backoff import Backoff, Outage
from tundp.choices import Engine, Layout, Offload, SourceCheck
from tundp.daemon.lease_cache import Memory, Remembered
from tundp.daemon.routes import Routes
from tundp.daemon.rules import Rules, ensure_fallback
from tundp.daemon.stores import api_of
from tundp.daemon.underlay import Underlay
from tundp.engine.base import Dataplane, EngineContext
from tundp.engine.choose import make_engine
from tundp.engine.native.engine import EngineSettings
from tundp.errors import ConfigError, PlatformError, StoreError
from tundp.files import write_atomically
from tundp.lease import subnet_env
from tundp.lease.fib import build_fib
from tundp.lease.model import (
    Events,
    Lease,
    Snapshot,
)
from tundp.lease.network import NetworkConfig, parse_network_config
from tundp.lease.table import Change as LeaseChange
from tundp.linux import device, notify
from tundp.linux.device import DeviceSettings
from tundp.linux.iface import Interface
from tundp.linux.netlink import Change as KernelChange
from tundp.linux.netlink import Netlink
from tundp.linux.tun import Tun
from tundp.observe.health import Check
from tundp.observe.metrics import Metrics
from tundp.settings.settings import Settings
from tundp.store.base import Store
from tundp.store.claim import Claim, LeaseState
from tundp.store.follow import follow
from tundp.wire.policy import Policy

_log = logging.getLogger(__name__)

STATUS_SCHEMA: Final = 1
DEVICE_LIVES_S: Final = 10.0
"""A device that lasted so long was not part of a series of losses."""
REPAIR_PAUSE_S: Final = 0.1
"""Kernel changes come in bursts; a look this long after the first takes in the rest."""
WIPED_S: Final = 2.0
"""How long peers are kept when a store has lost our lease: every node's watch tells it, and
it makes its lease again in milliseconds."""
RETRY_S: Final = 5.0
"""Between looks at an underlay that cannot be used."""
TELL_S: Final = 5.0
MEMORY_S: Final = 10.0
"""At least so long between two writes of the leases to disk."""
CONFIRM_S: Final = 60.0


@dataclass(slots=True, kw_only=True, eq=False)
class Node:
    """The resources of `run`, and what keeps them going."""

    settings: Settings
    store: Store
    network: NetworkConfig
    network_text: str
    underlay: Underlay
    claim: Claim
    netlink: Netlink
    rules: Rules
    memory: Memory
    metrics: Metrics
    node_id: str
    store_outage: Outage = field(init=False)
    device_settings: DeviceSettings = field(init=False)
    engine: Dataplane = field(init=False)
    routes: Routes = field(init=False)
    tun: Tun | None = None
    tun_index: int = 0
    started_at: float = field(default_factory=time.time)
    synced_at: float | None = None
    """When the leases were last known to be the store's, Unix time."""
    is_synced: bool = False
    """Whether the store itself was heard since the start."""
    file_error: str = "not written yet"
    env_text: str = ""
    """What subnet.env must say."""
    _is_unsaved: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        key = self.claim.lease.key
        self.store_outage = Outage(_log, self.store.description)
        self.device_settings = DeviceSettings(
            address=key.subnet.network_address,
            mtu=self.underlay.tun_mtu,
            network=self.network.network,
        )
        self.engine = make_engine(
            Engine(self.settings.engine),
            self.underlay.socks,
            EngineSettings(
                disabled=frozenset(Offload(name) for name in self.settings.disable_offloads),
                cpus=self.settings.cpus,
                spin_us=self.settings.spin,
                layout=Layout(self.settings.layout),
            ),
            EngineContext(
                fib=build_fib((), own_subnet=key.subnet, port=self.network.port, generation=0),
                policy=Policy(
                    tun_address=int(self.device_settings.address),
                    source_check=SourceCheck(self.settings.source_check),
                ),
                loop=asyncio.get_running_loop(),
            ),
        )
        self.routes = Routes(
            self.engine,
            network=self.network,
            own_key=key,
            public_ip=self.underlay.interface.public_ip,
        )

    async def open_device(self) -> None:
        """Make the TUN, configure it, and hand it to the engine."""
        name = self.settings.tun_name if self.tun is None else self.tun.name
        if self.tun is not None:
            self.tun.close()
        self.tun = Tun(name, self.engine.tun_mode)
        self.tun_index = await device.configure(self.netlink, self.tun, self.device_settings)
        # First what is ours, then packets: nobody gets in under our name meanwhile.
        await self._learn_addresses()
        self.engine.attach(self.tun)
        _log.info(
            "device %s: address %s/32, MTU %d, route %s, engine %s",
            self.tun.name,
            self.device_settings.address,
            self.device_settings.mtu,
            self.device_settings.network,
            self.engine.name,
        )

    def recall(self, remembered: Remembered) -> None:
        """Begin with the leases of last time: the store is away."""
        self.synced_at = time.time() - remembered.age_s
        self.routes.take_in(Snapshot(remembered.leases, remembered.revision))

    async def ensure_fallback(self) -> None:
        """See rules.ensure_fallback."""
        await ensure_fallback(
            self.netlink,
            self.settings,
            network=self.device_settings.network,
            subnet=self.claim.lease.key.subnet,
        )

    def write_subnet_env(self) -> None:
        """Tell Docker and CNI. A file that cannot be written is a warning, as in flannel."""
        key = self.claim.lease.key
        env = subnet_env.SubnetEnv(
            network=self.network.network,
            key=key,
            network6=self.network.network6,
            mtu=self.device_settings.mtu,
            ip_masq=self.settings.ip_masq,
        )
        self.env_text = subnet_env.render(env)
        try:
            write_atomically(self.settings.subnet_file, self.env_text)
        except OSError as error:
            self.file_error = error.strerror or str(error)
            _log.warning(
                "cannot write %s: %s; Docker and CNI will not learn this node's subnet",
                self.settings.subnet_file,
                error.strerror,
            )
        else:
            self.file_error = ""

    def _look_at_subnet_env(self) -> None:
        """Write it again if somebody removed or changed it, or once it can be written."""
        if not self.file_error:
            try:
                text = self.settings.subnet_file.read_text(encoding="utf-8", errors="replace")
            except OSError:
                text = ""
            if text == self.env_text:
                return
            _log.warning("%s was removed or changed: writing it again", self.settings.subnet_file)
        elif not os.access(self.settings.subnet_file.parent, os.W_OK):
            return
        self.write_subnet_env()

    async def run(self) -> None:
        """Run until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_leases(), name="follow leases")
            group.create_task(self.claim.keep(), name="keep lease")
            group.create_task(self._keep_device(), name="keep device")
            group.create_task(self._watch_kernel(), name="watch kernel")
            group.create_task(self.rules.keep(), name="keep firewall")
            group.create_task(self._keep_memory(), name="keep memory")
            group.create_task(self._keep_telling(), name="keep telling")
            notify.notify("READY=1", f"STATUS={self._summary()}")

    def close(self) -> None:
        """Stop the engine, then remove the device. The socket belongs to `run`."""
        self.routes.close()
        if self._is_unsaved.is_set() and self.is_synced:
            self._remember(tuple(self.routes.table.leases.values()))
        self.engine.stop()
        if self.tun is not None:
            self.tun.close()
        notify.notify("STOPPING=1")
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
            "public_ip": str(self.underlay.interface.public_ip),
            "node_id": self.node_id,
            "started_at": self.started_at,
            "interface": self.underlay.as_dict(),
            "port": self.network.port,
            "tun": {
                "name": "" if self.tun is None else self.tun.name,
                "mtu": self.device_settings.mtu,
            },
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
                "is_answering": self.is_synced and not self.store_outage.is_on,
                "is_from_memory": not self.is_synced,
                "revision": self.routes.table.revision,
                "synced_at": self.synced_at,
                "age_s": self._age_s(),
            },
            "firewall": {"flavour": self.rules.flavour, "missing": self.rules.missing},
            "checks": [check.as_dict() for check in self.checks()],
            **self.routes.as_dict(),
            "counters": self.engine.counters().as_dict(),
        }

    def checks(self) -> list[Check]:
        """What must hold for pods to use the overlay."""
        claim = self.claim
        state = claim.state.value
        underlay = self.underlay
        link = underlay.interface.link
        age_s = self._age_s()
        twins = self.routes.twins
        return [
            Check(
                "lease",
                claim.state is LeaseState.HELD and not twins,
                claim.conflict or (f"{twins[0]} has our PublicIP, too" if twins else state),
            ),
            Check(
                "device",
                self.tun is not None and self.tun_index != 0,
                "gone" if self.tun is None or not self.tun_index else self.tun.name,
            ),
            Check(
                "underlay",
                not underlay.error and link.is_up,
                underlay.error
                or f"{link.name} {underlay.interface.address} {'up' if link.is_up else 'is down'}",
            ),
            Check(
                "leases-synced",
                self.is_synced,
                f"{'' if self.is_synced else 'only from memory, '}age {age_s} s",
            ),
            Check("firewall", not self.rules.missing, self.rules.missing or "in place"),
            Check("subnet-file", not self.file_error, self.file_error or "written"),
        ]

    def _age_s(self) -> int | None:
        """How old what we know of the leases is: 0 while the store answers."""
        if self.is_synced and not self.store_outage.is_on:
            return 0
        return None if self.synced_at is None else round(time.time() - self.synced_at)

    async def _follow_leases(self) -> None:
        clock = asyncio.get_running_loop().time
        async for heard in follow(self.store, self.store_outage, Backoff(0.2, 5.0)):
            self.synced_at = time.time()
            if not self.is_synced:
                self.is_synced = True
                await self._compare_network()
            update = heard
            if isinstance(heard, Snapshot) and self._looks_wiped(heard):
                update = await self._wait_for_others(heard)
            began = clock()
            changes, has_moved = self.routes.take_in(update)
            self._observe_own_lease(update, changes)
            if has_moved:
                self.metrics.route_apply.observe(clock() - began)
            if changes:
                self._is_unsaved.set()

    def _looks_wiped(self, snapshot: Snapshot) -> bool:
        """Our own lease is gone, as all are when the store's data was lost or restored."""
        own = self.claim.lease.key
        if own not in self.routes.table.leases:
            return False
        there = {str(lease.key) for lease in snapshot.leases}
        there.update(entry.name for entry in snapshot.bad)
        return str(own) not in there

    async def _wait_for_others(self, snapshot: Snapshot) -> Snapshot:
        """Let every node notice and come back before its peers believe it gone."""
        _log.warning(
            "%s has lost our lease, and perhaps all: known peers stay for %.0f s to come back",
            self.store.description,
            WIPED_S,
        )
        self.claim.observe(None)
        await asyncio.sleep(WIPED_S)
        try:
            return await self.store.snapshot()
        except StoreError:
            return snapshot

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
        if (why := self.routes.bad_entries.get(str(own))) is not None:
            self.claim.observe_unreadable(why)
            return
        for change in changes:
            if change.key == own:
                self.claim.observe(change.new)
        if isinstance(update, Snapshot) and own not in self.routes.table.leases:
            self.claim.observe(None)
        if any(change.new is None for change in changes):
            self.claim.look_again()

    async def _keep_device(self) -> None:
        """Make the TUN again whenever it was deleted; the counters go on."""
        backoff = Backoff(0.1, 5.0)
        outage = Outage(_log, "TUN device")
        clock = asyncio.get_running_loop().time
        while True:
            started = clock()
            await self.engine.tun_gone()
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
                        with contextlib.suppress(TimeoutError):
                            # What could not be done is tried again, though nothing happens.
                            async with asyncio.timeout(RETRY_S if self.underlay.error else None):
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
        ours = (self.device_settings.network, self.claim.lease.key.subnet)
        return change.index == self.tun_index or change.destination in ours

    async def _look_at_kernel(self) -> str:
        await self._follow_underlay()
        done = await device.repair(self.netlink, self.tun_index, self.device_settings)
        await self.ensure_fallback()
        await self._learn_addresses()
        return ", ".join(done)

    async def _learn_addresses(self) -> None:
        own = frozenset(
            address.interface.ip
            for address in await self.netlink.addresses()
            if address.interface.ip != self.device_settings.address
        )
        self.routes.set_own(self.underlay.interface.public_ip, own)

    async def _follow_underlay(self) -> None:
        """Take in a changed address, MTU or state of the interface to the other nodes."""
        was = self.underlay.interface
        now = await self.underlay.look()
        if now is None:
            return
        if now.address != was.address and not self._rebind(now):
            return
        self.underlay.interface = now
        if now.public_ip != was.public_ip:
            _log.warning("PublicIP changes from %s to %s", was.public_ip, now.public_ip)
            self.claim.move_to(now.public_ip)
        try:
            mtu = self.underlay.tun_mtu
        except ConfigError as error:
            _log.error("%s; the overlay's stays at %d", error, self.device_settings.mtu)
            self.underlay.error = str(error)
            return
        if mtu != self.device_settings.mtu:
            _log.warning(
                "MTU of %s is %d now: overlay MTU %d, was %d; pods keep theirs until restarted",
                now.link.name,
                now.link.mtu,
                mtu,
                self.device_settings.mtu,
            )
            self.device_settings = replace(self.device_settings, mtu=mtu)
            self.write_subnet_env()
            if self.tun_index:
                await self.netlink.set_link(self.tun_index, mtu=mtu)

    def _rebind(self, now: Interface) -> bool:
        """Move the sockets to the new address; whether that went well."""
        fresh = self.underlay.open(now)
        if fresh is None:
            return False
        self.store.reconnect()
        self.engine.detach()
        self.underlay.move(fresh)
        self.engine.rebound()
        if self.tun is not None and self.tun_index:
            self.engine.attach(self.tun)
        _log.warning("underlay address is %s on %s now: sockets moved", now.address, now.link.name)
        return True

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
                await asyncio.to_thread(self._remember, tuple(self.routes.table.leases.values()))
            await asyncio.sleep(MEMORY_S)

    def _remember(self, leases: Sequence[Lease]) -> None:
        self.memory.save(
            store=store_name(self.settings),
            node_id=self.node_id,
            api=api_of(self.store),
            network_config=self.network_text,
            own_key=self.claim.lease.key,
            leases=leases,
            revision=self.routes.table.revision,
        )

    async def _keep_telling(self) -> None:
        """Tell systemd of changes that are not told where they happen, and look at subnet.env."""
        told = ""
        while True:
            self._look_at_subnet_env()
            if (summary := self._summary()) != told:
                notify.notify(f"STATUS={summary}")
                told = summary
            await asyncio.sleep(TELL_S)

    def _summary(self) -> str:
        peers = len(self.routes.peers.peers)
        text = f"{self.claim.lease.key.subnet}, {peers} peer{'' if peers == 1 else 's'}"
        if self.claim.state is not LeaseState.HELD:
            text += f", lease {self.claim.state.value.upper()}"
        if self.store_outage.is_on or not self.is_synced:
            text += f", leases {self._age_s()} s old: the store does not answer"
        return text


def store_name(settings: Settings) -> str:
    """Which leases these are, whatever endpoint gives them: what is remembered goes by it."""
    if settings.store_path is not None:
        return settings.store
    return f"etcd:{settings.etcd_prefix}"
