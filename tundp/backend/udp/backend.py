"""The udp backend: IP packets in UDP datagrams, in this process.

    TUN device  --engine-->  UDP sockets on the underlay

Owns the device (address, route and MTU as linux/device.py describes), the engine and the
sockets. The engine is made and attached with the first FIB given to `open`, never an empty
one: a packet that comes in the first millisecond finds its peer.

Why one room: it is the list of what the backend is made of, each part in a file of its own, and the
order in which they begin, follow changes and end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from ipaddress import IPv4Network
from typing import Final

from tundp.backend.base import BackendContext, BackendStatus, FibSink, Given
from tundp.backend.peers import PeerTools
from tundp.backend.udp.chaos import Chaos
from tundp.backend.udp.echoes import Echoes, ProberSettings
from tundp.backend.udp.image_keeper import ImageKeeper
from tundp.backend.udp.leftovers import remove_leftovers
from tundp.backend.udp.mtu import mtu_of
from tundp.backend.udp.path_prober import PathProber
from tundp.backend.udp.peer_tools import UdpPeerTools
from tundp.backend.udp.peer_watch import PeerWatch
from tundp.backend.udp.queue_drops import QueueDrops
from tundp.backend.udp.sockets import are_bound_to, move_sockets, open_sockets
from tundp.backoff import Backoff, Contest, Outage, Ration
from tundp.engine.base import Dataplane, EngineContext
from tundp.engine.choose import make_engine
from tundp.engine.reach import Reach
from tundp.errors import PlatformError
from tundp.finding import Finding, must_hold, worries
from tundp.lease.fib import Fib
from tundp.lease.model import LeaseAttributes, LeaseKey, Peer
from tundp.lease.network import BackendConfig
from tundp.linux import device
from tundp.linux.device import DeviceSettings, fits
from tundp.linux.iface import Interface
from tundp.linux.netlink import AddressChange, LinkChange, RouteChange
from tundp.linux.netlink import Change as KernelChange
from tundp.linux.queues import device_queue_len, receive_buffer
from tundp.linux.tun import Tun, require_device
from tundp.linux.udp import grow_buffers
from tundp.wire import overhead
from tundp.wire.policy import Policy, Prefix

_log = logging.getLogger(__name__)

DEVICE_LIVES_S: Final = 10.0
"""A device that lasted so long was not part of a series of losses."""
RECHECK_S: Final = 1.0
"""From a change of links or routes to a look at paths; changes meanwhile cost nothing more."""


class UdpBackend:
    """See the module, and backend.base.Backend for the contract."""

    def __init__(self, config: BackendConfig, context: BackendContext) -> None:
        self._config = config
        self._settings = context.packets
        self._netlink = context.netlink
        self._recorder = context.recorder
        self._on_descriptors = context.on_descriptors
        self._switch, self._totals = context.switch, context.totals
        self._is_others = context.switch is not None
        """Whether what is given is still another process's."""
        self._has_old_socks = False
        self._socks: list[socket.socket] = []
        self._interface: Interface | None = None
        self._device: DeviceSettings | None = None
        self._engine: Dataplane | None = None
        self._tun: Tun | None = None
        self._tun_index = 0
        self._has_moved_away = asyncio.Event()
        self._has_attached = False
        """Whether the engine has ever carried packets."""
        self._gone = "gone"
        """What the finding says of a device that is not there."""
        self._contest = Contest(_log)
        self._device_lines, self._moved_lines = Ration(1), Ration(1)
        self._queue_drops = QueueDrops()
        self._recheck: asyncio.TimerHandle | None = None
        self._echoes = Echoes()
        self._prober = PathProber(context.netlink, self._echoes)
        self._watch = PeerWatch(context.netlink, self._echoes, self._prober.peer)
        self._peer_tools = UdpPeerTools(is_on=context.packets.has_peer_tools)
        self._image = ImageKeeper(
            context.given.image_fd, context.given.early, why_not=context.packets.why_no_early
        )
        self._given = replace(context.given, image_fd=None, early=None)
        self._chaos = Chaos(self._echoes, self._prober.peer, self._prober.measure_again)

    @property
    def name(self) -> str:
        """See Backend."""
        return self._config.name

    @property
    def overhead(self) -> int:
        """See Backend."""
        return overhead.OVERHEAD

    @property
    def mtu(self) -> int:
        """See Backend."""
        if self._device is not None:
            return self._device.mtu
        assert self._interface is not None, "prepare() comes first"
        return mtu_of(self._interface)

    @property
    def device_index(self) -> int | None:
        """See Backend."""
        return self._tun_index

    @property
    def engine(self) -> Dataplane:
        """See Backend."""
        assert self._engine is not None, "open() comes first"
        return self._engine

    @property
    def peer_tools(self) -> PeerTools | None:
        """See Backend."""
        return self._peer_tools

    @property
    def chaos(self) -> Chaos:
        """See Backend."""
        return self._chaos

    def offer(self, interface: Interface) -> LeaseAttributes:
        """See Backend. flannel's udp leases have neither type nor data."""
        return LeaseAttributes(public_ip=interface.public_ip, backend_type=self._config.lease_type)

    def prepare(self, interface: Interface) -> None:
        """See Backend: opens the sockets, so that a port in use fails the start early."""
        require_device()
        mtu_of(interface)
        self._interface = interface
        given = self._given.udp_socks
        if len(given) == self._settings.workers and are_bound_to(
            given, interface.address, self._config.peer_port
        ):
            self._socks = list(given)
            self._has_old_socks = bool(given)
            for sock in given:
                grow_buffers(sock)
        elif self._switch is not None and len(given) != self._settings.workers:
            raise PlatformError(f"{len(given)} sockets were given for {self._settings.workers}")
        else:
            self._image.end_early()
            if given:
                _log.warning(
                    "the UDP sockets given are not %d bound to %s:%d, opening others",
                    *(self._settings.workers, interface.address, self._config.peer_port),
                )
                replace(self._given, tun_fds=()).discard()
                self._given = replace(self._given, udp_socks=())
            self._socks = open_sockets(
                interface.address, self._config.peer_port, self._settings.workers
            )
        self._given = replace(self._given, udp_socks=())

    async def open(
        self,
        network: IPv4Network,
        key: LeaseKey,
        *,
        fib: Fib,
        peers: Mapping[IPv4Network, Peer],
    ) -> None:
        """See Backend."""
        self._device = DeviceSettings(
            address=key.subnet.network_address,
            mtu=self.mtu,
            network=network,
            queues=self._settings.workers,
        )
        self._engine = make_engine(
            self._settings.engine,
            self._socks,
            self._settings.engine_settings,
            EngineContext(
                fib=fib,
                policy=Policy(
                    tun_address=int(self._device.address),
                    source_check=self._settings.source_check,
                    port=self._config.peer_port,
                    admitted=tuple(
                        Prefix(int(each.network_address), int(each.netmask))
                        for each in self._settings.admitted
                    ),
                    echo_id=self._echoes.echo_id,
                ),
                loop=asyncio.get_running_loop(),
                recorder=self._recorder,
                echo_fd=self._echoes.echo_fd,
                peer_fd=self._peer_tools.peer_fd,
                has_old_socks=self._has_old_socks,
            ),
        )
        self._echoes.start(self._prober_settings())
        self._watch.start(self._engine, self._prober_settings(), fib)
        self._prober.start(self._engine, self._prober_settings(), fib, peers)
        self._peer_tools.start(
            self._engine,
            self._prober_settings(),
            fib=fib,
            peers=peers,
            own_subnet=key.subnet,
            reaches=self._watch.reaches,
            measurings=self._prober.measurings,
        )
        self._chaos.start(self._engine, self._prober_settings(), fib)
        await self._open_device(fib)
        self._log_device()
        self._device_lines = Ration(1)
        await remove_leftovers(self._netlink, network)

    def sinks(self) -> Sequence[FibSink]:
        """See Backend."""
        parts = self._prober, self._watch, self._peer_tools, self._chaos
        return self.engine, self._image, *parts

    async def run(self) -> None:
        """See Backend: makes the TUN device again whenever it was deleted or moved away.

        Counters go on.
        """
        backoff = Backoff(0.1, 5.0)
        outage = Outage(_log, "TUN device")
        clock = asyncio.get_running_loop().time
        while True:
            started = clock()
            await self._device_lost()
            self._tun_index = 0
            self._contest.note(now=clock())
            if clock() - started > DEVICE_LIVES_S:
                backoff.reset()
            else:
                # Lost again right away: somebody deletes it each time, or an engine fails.
                await asyncio.sleep(backoff.next_s())
            try:
                await self._open_device()
            except PlatformError as error:
                self.engine.detach()
                outage.failed(error, now=clock())
            else:
                outage.ended(now=clock())
                self._log_device()

    async def measure(self) -> None:
        """See Backend."""
        await self._prober.run()

    async def watch_peers(self) -> None:
        """See Backend."""
        await self._watch.run()

    def reaches(self, hop_ids: Collection[int] | None = None) -> Mapping[int, Reach]:
        """See Backend."""
        return self._watch.reaches(hop_ids)

    def peer_at(self, hop_id: int) -> Peer | None:
        """See Backend."""
        return self._prober.peer(hop_id)

    async def repair(self) -> list[str]:
        """See Backend."""
        assert self._device is not None
        index, tun = self._tun_index, self._tun
        if index and tun is not None and await self._netlink.link(index) is None:
            # Deleted: reading it fails, and the engine reports that. Moved away: reading goes on.
            if index == self._tun_index and tun is self._tun and tun.has_device:
                self._has_moved_away.set()
            return []
        return await device.repair(self._netlink, index, self._device)

    def is_concerned(self, change: KernelChange) -> bool:
        """See Backend."""
        index, device = self._tun_index, self._device
        if not index or device is None:
            return False
        match change:
            case LinkChange(link=link):
                return link.index == index and (change.is_gone or not fits(link, device))
            case AddressChange(address=address):
                return address.index == index and change.is_gone
            case RouteChange(destination=destination, indexes=indexes):
                return destination == device.network or index in indexes
        return False

    def kernel_changed(self, changes: Sequence[KernelChange]) -> None:
        """See Backend: what is known of paths is compared with the kernel's routes, soon."""
        self._prober.note(changes)
        if self._recheck is None and self._engine is not None:
            self._recheck = asyncio.get_running_loop().call_later(RECHECK_S, self._recheck_paths)

    def owns_address(self, interface_index: int) -> bool:
        """See Backend."""
        return interface_index == self._tun_index != 0

    async def underlay_changed(self, now: Interface) -> bool:
        """See Backend: moves the sockets to a changed address and follows the link's MTU."""
        assert self._interface is not None
        mtu = mtu_of(now)
        before = None if self._device is None else self._prober_settings()
        has_moved = now.address != self._interface.address
        if has_moved:
            self._move(now)
        self._interface = now
        if self._device is not None and mtu != self._device.mtu:
            self._device = replace(self._device, mtu=mtu)
            if self._tun_index:
                # The device may be gone by now: `repair`, or whoever makes it again, sets it then.
                with contextlib.suppress(PlatformError):
                    await self._netlink.set_link(self._tun_index, mtu=mtu)
        if self._device is not None and self._prober_settings() != before:
            for each in (self._echoes, self._watch, self._prober, self._peer_tools, self._chaos):
                each.reset(self._prober_settings())
        return has_moved

    def heartbeat(self) -> tuple[int, ...]:
        """See Backend."""
        return () if self._engine is None else self._engine.heartbeat()

    def status(self) -> BackendStatus:
        """See Backend."""
        return BackendStatus(
            name=self.name,
            overhead=self.overhead,
            mtu=self.mtu,
            port=self._config.peer_port,
            device="" if self._tun is None else self._tun.name,
            routes=None,
            queue_len=self._queue_len(),
            receive_buffer=receive_buffer(self._socks),
            queue_drops=self._queue_drops.count(),
            path_probes=self._echoes.sent,
            peer_messages=self._peer_tools.sent,
            silent_peers=len(self._watch.troubled()),
            paths=self._prober.measurings(),
        )

    def checks(self) -> list[Finding]:
        """See Backend."""
        is_there = self._tun is not None and self._tun_index != 0
        name = self._tun.name if self._tun is not None and is_there else self._gone
        contest = self._contest.words(now=time.monotonic())
        return [
            *self._chaos.findings(),
            must_hold("device", is_there, name),
            *worries("device-contest", contest),
            *self._prober.findings(),
            self._watch.finding(),
        ]

    def give(self) -> Given:
        """See Backend."""
        return Given(
            tun_fds=tuple(os.dup(fd) for fd in self._tun.fds if self._tun_index)
            if self._tun is not None
            else (),
            udp_socks=tuple(sock.dup() for sock in self._socks),
            image_fd=None if self._image.fd < 0 else os.dup(self._image.fd),
        )

    def descriptors(self) -> tuple[int, ...]:
        """See Backend: the device's index, and the sockets' inodes."""
        return (self._tun_index, *(os.fstat(sock.fileno()).st_ino for sock in self._socks))

    def pause(self) -> None:
        """See Backend."""
        self.engine.detach()
        self._image.pause(self.engine)

    def resume(self, *, is_paused: bool) -> None:
        """See Backend. A device that is gone is left to `run`, which makes another."""
        if self._tun is None or not self._tun_index:
            return
        self._tun.ask_again(self.engine.tun_mode)
        if is_paused:
            try:
                self.engine.attach(self._tun)
            except PlatformError:
                # Too many threads, for a moment: `run` makes the device anew, and tries again.
                self.engine.detach()
                self._has_moved_away.set()
                raise
            self._image.attached(self.engine, self._tun, self._socks)

    def close(self) -> None:
        """See Backend. The device goes with its last descriptor."""
        if self._recheck is not None:
            self._recheck.cancel()
        self._peer_tools.stop()
        if self._is_others:
            self._image.leave()
        if self._engine is not None:
            self._engine.stop()
            self._image.finish(self._engine if self._has_attached else None)
            counters = self._engine.counters()
            _log.info(
                "stopped; encap %d packets, %d dropped; decap %d packets, %d dropped",
                counters.encap.packets_in,
                counters.encap.dropped,
                counters.decap.packets_in,
                counters.decap.dropped,
            )
        else:
            self._image.finish(None)
        self._image.close()
        self._chaos.close()
        self._watch.close()
        self._echoes.close()
        self._peer_tools.close()
        if self._tun is not None:
            self._tun.close()
        for sock in self._socks:
            sock.close()
        self._given.close()

    async def _device_lost(self) -> None:
        """Return once the device was deleted, or moved away, and the engine is detached from it."""
        waits = [
            asyncio.ensure_future(self.engine.tun_gone()),
            asyncio.ensure_future(self._has_moved_away.wait()),
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waits:
                each.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        self._gone = "gone"
        if self._has_moved_away.is_set():
            self._has_moved_away.clear()
            assert self._tun is not None
            self._gone = f"{self._tun.name} was moved to another network namespace"
            if self._moved_lines.take(time.monotonic()):
                _log.warning(
                    "TUN device %s, where no packet reaches this node: making another%s",
                    self._gone,
                    self._moved_lines.withheld_words(),
                )
            self.engine.detach()

    def _queue_len(self) -> int | None:
        with contextlib.suppress(PlatformError):
            return device_queue_len(self._tun_index)
        return None

    def _prober_settings(self) -> ProberSettings:
        assert self._interface is not None and self._device is not None
        return ProberSettings(
            source=self._interface.address,
            port=self._config.peer_port,
            tun_address=self._device.address,
            full=self._device.mtu,
        )

    def _recheck_paths(self) -> None:
        self._recheck = None
        self.engine.recheck_paths()

    async def _open_device(self, fib: Fib | None = None) -> None:
        """Make the TUN device, or adopt the one given; configure it; hand it to the engine.

        fib: what the engine was made with, the first time.
        """
        assert self._device is not None
        name = self._settings.tun_name if self._tun is None else self._tun.name
        if self._tun is not None:
            self._tun.close()
        adopted = self._adopt_tun()
        self._tun = adopted or Tun(name, self.engine.tun_mode)
        self._tun_index = await device.configure(self._netlink, self._tun, self._device)
        # What an adopted device dropped before is not ours, unless it was ours before.
        is_others = adopted is not None and not self._image.is_successor
        self._queue_drops.follow(self._tun_index, is_adopted=is_others)
        tun, switch, self._switch = self._tun, self._switch, None
        if switch is None:
            self._attach(tun)
        else:
            await switch(lambda: self._attach(tun), self.engine.detach)
        self._has_attached, self._is_others = True, False
        self._image.attached(self.engine, tun, self._socks, fib)
        self._on_descriptors()

    def _attach(self, tun: Tun) -> None:
        """Carry packets, the first time as who did before: with no await between."""
        if not self._has_attached:
            self._image.begin(self.engine, self._totals)
        self.engine.attach(tun)

    def _log_device(self) -> None:
        """Name the device as it is now; once a minute, should somebody delete it each time."""
        assert self._device is not None
        assert self._tun is not None
        if not self._device_lines.take(time.monotonic()):
            return
        _log.info(
            "device %s: address %s/32, MTU %d, route %s, engine %s",
            self._tun.name,
            self._device.address,
            self._device.mtu,
            self._device.network,
            self.engine.name,
        )

    def _adopt_tun(self) -> Tun | None:
        """The device given by a predecessor, if there is one and it fits the engine."""
        given, self._given = self._given, replace(self._given, tun_fds=())
        fds = given.tun_fds
        if not fds:
            self._image.end_early()
            return None
        try:
            tun = Tun.adopt([os.dup(fd) for fd in fds], self.engine.tun_mode)
        except PlatformError as error:
            if self._switch is not None:
                raise PlatformError(
                    f"{error}: give this daemon the --engine and --disable-offloads of the one"
                    " before, or restart it, which makes another device",
                    error.errno,
                ) from None
            _log.warning("the TUN device given cannot be used, making another: %s", error)
            self._image.end_early()
            replace(given, udp_socks=()).discard()
            return None
        for fd in fds:
            os.close(fd)
        _log.info("device %s adopted with %d queues", tun.name, len(fds))
        return tun

    def _move(self, now: Interface) -> None:
        """Sockets on the new address, under the old descriptors. PlatformError: nothing moved."""
        fresh = open_sockets(now.address, self._config.peer_port, len(self._socks))
        if self._engine is not None:
            self._engine.detach()
        move_sockets(self._socks, fresh)
        if self._engine is not None:
            self._engine.rebound()
            if self._device is not None:
                # Its lanes take nothing from the new address: they have to go first.
                self._chaos.reset(replace(self._prober_settings(), source=now.address))
            if self._tun is not None and self._tun_index:
                self._engine.attach(self._tun)
                self._image.attached(self._engine, self._tun, self._socks)
        self._on_descriptors()
        _log.warning("underlay address is %s on %s now: sockets moved", now.address, now.link.name)
