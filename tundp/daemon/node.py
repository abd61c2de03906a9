"""A node that has its lease, and what keeps it going while the daemon runs.

follow leases   subnet manager -> routing ledger -> publisher -> backend
keep lease      renewals, and getting it back (the subnet manager)
keep cache      the leases on disk, for a start without the store (the subnet manager)
keep backend    device and routes made again when they are gone
measure paths   how large a packet arrives at each peer
watch peers     which of them answer
watch kernel    what somebody took put back; the underlay's address, MTU and state followed
keep firewall   rules put back
keep subnet.env the file written again when somebody removed or changed it
obstacles       what would drop or divert packets, looked for
notify          systemd's STATUS

A task ended by a bug is started again by the supervisor; packets flow meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from typing import Final

from tundp.backend.base import Backend
from tundp.backoff import Contest
from tundp.daemon import report
from tundp.daemon.firewall_keeper import FirewallKeeper
from tundp.daemon.journal import Journal
from tundp.daemon.kernel_keeper import KernelKeeper
from tundp.daemon.lease_history import LeaseHistory
from tundp.daemon.obstacle_watch import ObstacleWatch
from tundp.daemon.publish import Publisher
from tundp.daemon.subnet_file import SubnetFile
from tundp.daemon.supervise import Supervisor
from tundp.daemon.underlay import Underlay
from tundp.finding import Finding
from tundp.lease.claim import LeaseState
from tundp.lease.identity import Identity
from tundp.lease.model import Events, Snapshot
from tundp.lease.network import NetworkConfig
from tundp.lease.parts import PART_LEN, in_parts
from tundp.lease.routing import Routing
from tundp.lease.subnet_env import SubnetEnv
from tundp.linux import notify
from tundp.linux.losses import UdpErrors, udp_errors
from tundp.linux.netlink import Netlink
from tundp.observe.leases import Leases
from tundp.observe.metrics import Metrics
from tundp.observe.status import Status
from tundp.settings.settings import Settings
from tundp.subnet.base import Acquired, SubnetManager

_log = logging.getLogger(__name__)

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
    identity: Identity
    supervisor: Supervisor
    journal: Journal = field(default_factory=lambda: Journal(None))
    subnet_file: SubnetFile = field(init=False)
    routing: Routing = field(init=False)
    publisher: Publisher = field(init=False)
    history: LeaseHistory = field(default_factory=LeaseHistory)
    contest: Contest = field(default_factory=lambda: Contest(_log))
    """Over what the kernel keeper puts back."""
    worries: Callable[[], list[Finding]] = list
    """Who cannot ask the daemon, and why."""
    kernel: KernelKeeper = field(init=False)
    obstacles: ObstacleWatch = field(init=False)
    started_at: float = field(default_factory=time.time)
    _keeping: asyncio.Future[None] | None = None
    """The tasks, while they run."""
    _thawed: asyncio.Event = field(default_factory=asyncio.Event)
    _is_handed_over: bool = False
    _is_main: bool = False
    """Whether systemd was told that this is the daemon."""
    _is_changing: bool = False
    """Whether a change of the ledger was begun and has not come to its end."""
    udp_errors_before: UdpErrors = field(default_factory=udp_errors)

    def __post_init__(self) -> None:
        self.subnet_file = SubnetFile(self.settings.instance)
        self.routing = self._make_ledger([self.underlay.interface.public_ip])
        self.publisher = Publisher(self.routing, self.journal)
        self.publisher.on_published = self.history.published
        self.obstacles = ObstacleWatch(self.netlink, lambda: report.scene(self))
        self.kernel = KernelKeeper(self)
        if self.backend.chaos is not None:
            self.backend.chaos.note = self.journal.note

    async def open(self) -> None:
        """Carry packets: every lease known so far is in the table before the first one comes."""
        await self.kernel.prepare()
        await self._apply(self.acquired.snapshot)
        await self.backend.open(
            self.network_config.network,
            self.acquired.lease.key,
            fib=self.publisher.first_fib(),
            peers=dict(self.routing.peers),
        )
        self.publisher.start(self.backend.sinks())
        self.history.published()
        await self.kernel.opened()

    def write_subnet_file(self, *, is_there: bool = False) -> None:
        """Write subnet.env as it must be now. is_there: by a predecessor, perhaps."""
        write = self.subnet_file.take_over if is_there else self.subnet_file.write
        write(
            SubnetEnv(
                network=self.network_config.network,
                key=self.acquired.lease.key,
                network6=self.network_config.network6,
                mtu=self.backend.mtu,
                ip_masq=self.settings.ip_masq,
            )
        )

    @property
    def is_running(self) -> bool:
        """Whether its tasks run: the start is over, the end has not begun."""
        return self._keeping is not None and not self._keeping.done()

    async def run(self) -> None:
        """Run until cancelled, or handed over. Raises LeaseLost and DuplicateNode, which end it."""
        while not self._is_handed_over:
            self._thawed.clear()
            self._keeping = asyncio.ensure_future(self._keep())
            try:
                await self._keeping
            except asyncio.CancelledError:
                current = asyncio.current_task()
                if current is None or current.cancelling():
                    raise  # else it was `freeze`
            await self._thawed.wait()

    async def freeze(self) -> None:
        """End every task; packets flow, nothing else is written or said. `thaw` undoes it."""
        keeping = self._keeping
        assert keeping is not None, "it runs"
        keeping.cancel()
        await asyncio.wait([keeping])
        await asyncio.to_thread(self.manager.flush)

    def thaw(self) -> None:
        """Begin the tasks again."""
        self._thawed.set()

    def hand_over(self) -> None:
        """Another process is this node now: `run` returns, and nothing is removed or told."""
        self._is_handed_over = True
        self._thawed.set()

    async def _keep(self) -> None:
        tasks: dict[str, Callable[[], Awaitable[None]]] = {
            "follow leases": self._follow_leases,
            "keep lease": self.manager.keep,
            "keep cache": self.manager.keep_cache,
            "keep backend": self.backend.run,
            "measure paths": self.backend.measure,
            "watch peers": self.backend.watch_peers,
            "watch kernel": self._watch_kernel,
            "keep firewall": self.firewall.keep,
            "watch obstacles": self.obstacles.run,
            "keep subnet.env": self._keep_subnet_file,
            "notify": self._notify,
        }
        self.supervisor.own({"linux/firewall/watch.py": "keep firewall"})
        async with asyncio.TaskGroup() as group:
            for name, main in tasks.items():
                group.create_task(self.supervisor.keep(name, main), name=name)
            if not self._is_main:
                self._is_main = True
                notify.notify("READY=1", f"STATUS={self._summary()}")

    def close(self) -> None:
        """Publish no more. What was opened belongs to `run`."""
        self.publisher.close()
        if self._is_main and not self._is_handed_over:
            notify.notify("STOPPING=1")

    def summary(self) -> Status:
        """See observe.collect.StatusSource."""
        return report.summary(self)

    def status(self) -> Status:
        """See observe.collect.StatusSource."""
        return report.status(self)

    def leases(self, since: int | None) -> Callable[[], Leases]:
        """See daemon.lease_history.LeaseHistory.answer."""
        return self.history.answer(self.routing, self.manager.state(), since)

    def findings(self) -> list[Finding]:
        """What must hold for pods to use the overlay."""
        return report.findings(self)

    async def _follow_leases(self) -> None:
        """Apply every update. Begins with a full snapshot, also when it is called again."""
        clock = asyncio.get_running_loop().time
        async with contextlib.aclosing(self.manager.updates()) as updates:
            async for update in updates:
                began = clock()
                await self.kernel.admit(update)
                if await self._apply(update):
                    self.metrics.route_apply.observe(clock() - began)

    async def _apply(self, update: Snapshot | Events) -> bool:
        """Apply an update of the leases; whether packets go elsewhere now.

        A large one in parts, with a pause after each: the event loop is others', too. Only this
        task changes the leases of the ledger.
        """
        self.history.look(update, self.routing.leases)
        parts: Sequence[Snapshot | Events] = (update,)
        if _size_of(update) > PART_LEN:
            parts = await asyncio.to_thread(self._parts_of, update)
        has_moved = has_overlap_gone = False
        changed_leases = 0
        for number, part in enumerate(parts, 1):
            with self.change():
                delta = self.routing.apply(part)
                self.history.judged(delta, update.revision)
                self.publisher.apply(delta, is_last=number == len(parts))
                has_moved |= delta.moves_packets
                has_overlap_gone |= delta.has_overlap_gone
                changed_leases += delta.changed_leases
                if number == len(parts):
                    # Half of a snapshot is nothing to go by, or to be kept on disk.
                    whole = replace(
                        delta, has_overlap_gone=has_overlap_gone, changed_leases=changed_leases
                    )
                    self.manager.observe(whole, self.routing)
            if number < len(parts):
                await asyncio.sleep(0)
        return has_moved

    def _parts_of(self, update: Snapshot | Events) -> Sequence[Events]:
        """See lease.parts. On a thread: comparing takes a while."""
        return tuple(
            in_parts(
                update,
                leases=self.routing.leases,
                bad=self.routing.bad_entries,
                own_key=self.acquired.lease.key,
                revision=self.routing.revision,
            )
        )

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """Around each change of the ledger: after one that a bug ended halfway, make a new ledger.

        It has the same leases, and the backend is given all of it.
        """
        if self._is_changing:
            old, ledger = self.routing, self._make_ledger(self.routing.own_addresses)
            ledger.generation = old.generation
            ledger.broadcasts = old.broadcasts
            ledger.set_misrouted(old.misrouted)
            delta = ledger.apply(
                Snapshot(tuple(old.leases.values()), old.revision, tuple(old.bad_entries.values()))
            )
            self.publisher.start_over(ledger)
            self.routing = ledger
            self.manager.observe(delta, ledger)
        self._is_changing = True
        yield
        self._is_changing = False

    def _make_ledger(self, own_addresses: Collection[IPv4Address]) -> Routing:
        return Routing(
            network=self.network_config.network,
            pool=self.network_config.pool,
            backend=self.network_config.backend,
            own_key=self.acquired.lease.key,
            own_addresses=own_addresses,
            public_ip=self.underlay.interface.public_ip,
            identity=self.identity,
        )

    async def _watch_kernel(self) -> None:
        """See daemon.kernel_keeper."""
        await self.kernel.watch()

    async def _notify(self) -> None:
        """Refresh systemd's STATUS every NOTIFY_S."""
        sent = ""
        while True:
            if (summary := self._summary()) != sent:
                notify.notify(f"STATUS={summary}")
                sent = summary
            await asyncio.sleep(NOTIFY_S)

    async def _keep_subnet_file(self) -> None:
        """Check subnet.env every NOTIFY_S."""
        while True:
            self.subnet_file.check()
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


def _size_of(update: Snapshot | Events) -> int:
    """Entries in an update."""
    if isinstance(update, Snapshot):
        return len(update.leases) + len(update.bad)
    return len(update.events)
