"""A node that has its lease, and what keeps it going while the daemon runs.

follow leases   subnet manager -> routing ledger -> publisher -> backend
keep lease      renewals, and getting it back (the subnet manager)
keep backend    device and routes made again when they are gone
watch kernel    what somebody took put back; the underlay's address, MTU and state followed
keep firewall   rules put back
obstacles       what would drop or divert packets, looked for
notify          systemd's STATUS, subnet.env
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field
from typing import Final

from tundp.backend.base import Backend
from tundp.backoff import Backoff, Outage
from tundp.daemon import report
from tundp.daemon.backends import lease_offer
from tundp.daemon.firewall_keeper import FirewallKeeper
from tundp.daemon.obstacle_watch import ObstacleWatch
from tundp.daemon.publish import Publisher
from tundp.daemon.subnet_file import SubnetFile
from tundp.daemon.underlay import Underlay
from tundp.daemon.unreachable import ensure_unreachable
from tundp.errors import ConfigError, PlatformError
from tundp.finding import Finding
from tundp.lease.claim import LeaseState
from tundp.lease.model import Events, Snapshot
from tundp.lease.network import NetworkConfig
from tundp.lease.routing import Routing
from tundp.lease.subnet_env import SubnetEnv
from tundp.linux import notify
from tundp.linux.netlink import Change as KernelChange
from tundp.linux.netlink import Netlink
from tundp.observe.metrics import Metrics
from tundp.observe.status import Status
from tundp.settings.settings import Settings
from tundp.subnet.base import Acquired, SubnetManager

_log = logging.getLogger(__name__)

REPAIR_PAUSE_S: Final = 0.1
"""Kernel changes come in bursts; a look this long after the first covers the rest."""
RETRY_S: Final = 5.0
"""Between looks at an underlay that cannot be used."""
NOTIFY_S: Final = 5.0
"""Between two refreshes of systemd's STATUS and looks at subnet.env."""


@dataclass(slots=True, kw_only=True, eq=False)
class Node:
    """The resources of `run`, and the tasks that keep them going."""

    settings: Settings
    network_config: NetworkConfig
    manager: SubnetManager
    acquired: Acquired
    backend: Backend
    underlay: Underlay
    netlink: Netlink
    firewall: FirewallKeeper
    metrics: Metrics
    node_id: str
    subnet_file: SubnetFile = field(init=False)
    routing: Routing = field(init=False)
    publisher: Publisher = field(init=False)
    obstacles: ObstacleWatch = field(init=False)
    started_at: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.subnet_file = SubnetFile(self.settings.instance)
        self.routing = Routing(
            network=self.network_config.network,
            backend=self.network_config.backend,
            own_key=self.acquired.lease.key,
            own_addresses=[self.underlay.interface.public_ip],
        )
        self.publisher = Publisher(self.routing)
        self.obstacles = ObstacleWatch(self.netlink, lambda: report.scene(self))

    async def open(self) -> None:
        """Carry packets: every lease known so far is in the table before the first one comes."""
        await self._learn_addresses()
        self._apply(self.acquired.snapshot)
        await self.backend.open(
            self.network_config.network,
            self.acquired.lease.key,
            fib=self.publisher.first_fib(),
            peers=dict(self.routing.peers),
        )
        self.publisher.start(self.backend.sinks())
        # The device has an address of its own now, which is no peer's business.
        await self._learn_addresses()
        await self.ensure_unreachable()

    async def ensure_unreachable(self) -> None:
        """See daemon.unreachable."""
        await ensure_unreachable(
            self.netlink,
            self.settings,
            network=self.network_config.network,
            subnet=self.acquired.lease.key.subnet,
        )

    def write_subnet_file(self) -> None:
        """Write subnet.env as it must be now."""
        self.subnet_file.write(
            SubnetEnv(
                network=self.network_config.network,
                key=self.acquired.lease.key,
                network6=self.network_config.network6,
                mtu=self.backend.mtu,
                ip_masq=self.settings.ip_masq,
            )
        )

    async def run(self) -> None:
        """Run until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_leases(), name="follow leases")
            group.create_task(self.manager.keep(), name="keep lease")
            group.create_task(self.backend.run(), name="keep backend")
            group.create_task(self._watch_kernel(), name="watch kernel")
            group.create_task(self.firewall.keep(), name="keep firewall")
            group.create_task(self.obstacles.run(), name="watch obstacles")
            group.create_task(self._notify(), name="notify")
            notify.notify("READY=1", f"STATUS={self._summary()}")

    def close(self) -> None:
        """Publish no more. What was opened belongs to `run`."""
        self.publisher.close()
        notify.notify("STOPPING=1")

    def summary(self) -> Status:
        """See observe.collect.StatusSource."""
        return report.summary(self)

    def status(self) -> Status:
        """See observe.collect.StatusSource."""
        return report.status(self)

    def findings(self) -> list[Finding]:
        """What must hold for pods to use the overlay."""
        return report.findings(self)

    async def _follow_leases(self) -> None:
        clock = asyncio.get_running_loop().time
        async for update in self.manager.updates():
            began = clock()
            if self._apply(update):
                self.metrics.route_apply.observe(clock() - began)

    def _apply(self, update: Snapshot | Events) -> bool:
        """Apply an update of the leases; whether packets go elsewhere now."""
        delta = self.routing.apply(update)
        self.publisher.apply(delta)
        self.manager.observe(delta, self.routing)
        return delta.moves_packets

    async def _watch_kernel(self) -> None:
        """Put back what somebody takes from the device; follow the underlay; learn addresses.

        Every round looks at everything, so nothing depends on having seen each change.
        A round that had to repair or failed is followed by another, later and later: two
        programs that disagree about a device must not fill the log.
        """
        outage = Outage(_log, "keeping the kernel's side as it should be")
        clock = asyncio.get_running_loop().time
        backoff = Backoff(REPAIR_PAUSE_S, 5.0)
        while True:
            try:
                async with self.netlink.watch() as changes:
                    while True:
                        done = await self._look_at_kernel()
                        outage.ended(now=clock())
                        if done:
                            _log.warning("changed behind our back; put back: %s", ", ".join(done))
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
        """Any link or address, a route the backend keeps, or one for what is ours."""
        if change.destination is None or change.destination.subnet_of(self.network_config.network):
            self.obstacles.poke()
        if change.destination is None:
            return True
        ours = (self.network_config.network, self.acquired.lease.key.subnet)
        return change.destination in ours or self.backend.is_concerned(change)

    async def _look_at_kernel(self) -> list[str]:
        await self._follow_underlay()
        done = await self.backend.repair()
        await self.ensure_unreachable()
        await self._learn_addresses()
        return done

    async def _learn_addresses(self) -> None:
        """Give the ledger this node's addresses, which no lease may lead to."""
        own = {
            address.interface.ip
            for address in await self.netlink.addresses()
            if not self.backend.owns_address(address.index)
        }
        own.add(self.underlay.interface.public_ip)
        if own != self.routing.own_addresses:
            delta = self.routing.set_own_addresses(own)
            self.publisher.apply(delta, is_own_changed=True)

    async def _follow_underlay(self) -> None:
        """Follow a changed address, MTU or state of the interface to the other nodes."""
        was = self.underlay.interface
        now = await self.underlay.look()
        if now is None:
            return
        mtu = self.backend.mtu
        try:
            offer = lease_offer(self.backend, self.settings, self.network_config, now)
            if await self.backend.underlay_changed(now):
                self.manager.reconnect()
        except (ConfigError, PlatformError) as error:
            self.underlay.failed(error)
            return
        self.underlay.follow(now)
        if now.public_ip != was.public_ip:
            _log.warning("PublicIP changes from %s to %s", was.public_ip, now.public_ip)
            self.manager.offer(offer)
        if mtu != self.backend.mtu:
            _log.warning(
                "MTU of %s is %d now: overlay MTU %d, was %d; pods keep theirs until restarted",
                now.link.name,
                now.link.mtu,
                self.backend.mtu,
                mtu,
            )
            self.write_subnet_file()

    async def _notify(self) -> None:
        """Refresh systemd's STATUS, and check subnet.env, every NOTIFY_S."""
        sent = ""
        while True:
            self.subnet_file.check()
            if (summary := self._summary()) != sent:
                notify.notify(f"STATUS={summary}")
                sent = summary
            await asyncio.sleep(NOTIFY_S)

    def _summary(self) -> str:
        lease = self.manager.state()
        peers = len(self.routing.peers)
        text = f"{lease.key.subnet}, {peers} peer{'' if peers == 1 else 's'}"
        if lease.state is not LeaseState.HELD:
            text += f", lease {lease.state.value.upper()}"
        if not lease.is_answering and lease.age_s is not None:
            text += f", leases {lease.age_s} s old: the store does not answer"
        if count := self.obstacles.count:
            text += f", {count} in the way of packets: tundp status"
        return text
