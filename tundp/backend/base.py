"""What carries packets between subnets, as the daemon sees it.

A backend owns everything that is particular to its way of carrying packets: the device and
sockets of udp, the kernel routes of host-gw. What every backend needs is the daemon's:
lease, routing ledger, firewall, unreachable route, subnet.env, health.

    offer(interface)         what our lease shall say
    prepare(interface)       open what can be had before the lease is known
    open(lease key, fib)     make the device or routes; packets flow from here on
    run()                    keep them until cancelled
    underlay_changed(...)    another address, MTU or link
    close()                  give back what was opened; a failed `prepare` or `open` included
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network
from typing import TYPE_CHECKING, Protocol

from tundp.backend.peers import PeerTools
from tundp.choices import Engine, Measuring, SourceCheck
from tundp.engine.base import Dataplane
from tundp.engine.counters import Counters
from tundp.engine.native.early import EarlyWorkers
from tundp.engine.native.engine import EngineSettings
from tundp.engine.reach import Reach
from tundp.engine.taps import Recorder
from tundp.finding import Finding
from tundp.lease import gojson
from tundp.lease.fib import Fib
from tundp.lease.model import Lease, LeaseAttributes, LeaseKey, Peer
from tundp.lease.network import BackendConfig
from tundp.lease.routing import RoutingDelta
from tundp.linux.iface import Interface
from tundp.linux.netlink import Change as KernelChange
from tundp.linux.netlink import Netlink
from tundp.linux.tun_device import remove_device

if TYPE_CHECKING:
    from tundp.backend.udp.chaos import Chaos

_log = logging.getLogger(__name__)


class FibSink(Protocol):
    """A consumer of routes. Called on the event loop's thread; must not block it."""

    def install(self, fib: Fib, delta: RoutingDelta) -> None:
        """Route by `fib` from now on.

        `delta` is what changed since the last call, or since the backend was opened. Whoever
        can be fed by differences uses `delta`, whoever swaps tables uses `fib`.
        """
        ...

    def seen(self) -> int:
        """The oldest generation of the FIB that may still be in use."""
        ...


@dataclass(frozen=True, slots=True)
class Given:
    """Descriptors another process opened, for a backend to go on with. Owned by whoever has it."""

    tun_fds: tuple[int, ...] = ()
    """One for each queue of the TUN device, in the queues' order."""
    udp_socks: tuple[socket.socket, ...] = ()
    """Bound sockets on the underlay, one for each worker."""
    forget: Callable[[str], object] = bool
    """Makes whoever keeps copies close them: of `tun-` or `udp-`. Returns when that is done."""
    image_fd: int | None = None
    """A memfd with the image of an early start: engine/image.py."""
    early: EarlyWorkers | None = None
    """Who carries packets by it until an engine does."""

    def by_name(self) -> dict[str, int]:
        """All of it by the names of linux/fd_store.py; nothing is left in here."""
        return {
            **{f"tun-{number}": fd for number, fd in enumerate(self.tun_fds)},
            **{f"udp-{number}": sock.detach() for number, sock in enumerate(self.udp_socks)},
            **({} if self.image_fd is None else {"image": self.image_fd}),
        }

    def close(self) -> None:
        """Close what nobody took; copies elsewhere stay, and with them device and ports."""
        if self.early is not None:
            self.early.close()
        if self.image_fd is not None:
            os.close(self.image_fd)
        for fd in self.tun_fds:
            os.close(fd)
        for sock in self.udp_socks:
            sock.close()

    def discard(self) -> None:
        """Close what nobody took, for good: the device is deleted, the ports are free again."""
        if self.tun_fds:
            if name := remove_device(self.tun_fds[0]):
                _log.warning("device %s, of the daemon before, is not used: deleted", name)
            self.forget("tun-")
        self.close()
        if self.udp_socks:
            self.forget("udp-")


@dataclass(frozen=True, slots=True, kw_only=True)
class PacketSettings:
    """What the operator chose, for backends that carry packets in this process."""

    tun_name: str
    """Name of the TUN device; `%d` in it becomes the lowest free number."""
    engine: Engine
    workers: int
    """Sockets, and queues of the TUN device."""
    source_check: SourceCheck
    admitted: tuple[IPv4Network, ...]
    """Networks in no lease that any peer may send from, whatever the source check."""
    engine_settings: EngineSettings
    why_no_early: str = ""
    """Why the next start is not to carry packets before the store is asked; empty: it may."""
    has_peer_tools: bool = True
    """Whether other nodes are asked, and answered."""


Switch = Callable[[Callable[[], None], Callable[[], None]], Awaitable[None]]
"""Attaches an engine when the one before has let go: `await switch(attach, detach)`. Raises a
TundpError, with the engine detached, if that one goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendContext:
    """What a backend is made with."""

    netlink: Netlink
    packets: PacketSettings
    given: Given
    """Descriptors of a predecessor to go on with; the backend's own from here on."""
    recorder: Recorder | None = None
    """Where an engine keeps the last packets it dropped."""
    on_descriptors: Callable[[], object] = bool
    """Called after each change of what `give` returns. On the event loop; must not block it."""
    switch: Switch | None = None
    """What is given is still in use by another process, until this says so. None: it is not."""
    totals: Counters | None = None
    """What that process has counted, filled in by `switch` before it attaches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a backend judges before a start: `tundp config check`."""

    interface: Interface
    networks: tuple[IPv4Network, ...]
    """The networks of the interface's addresses."""
    leases: tuple[Lease, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendKind:
    """One backend, before there is an instance of it."""

    name: str
    """As `Backend.Type` of the network config spells it, lower case."""
    parse: Callable[[gojson.Fields], BackendConfig]
    """The members of the Backend object to what they say; ConfigError."""
    make: Callable[[BackendConfig, BackendContext], Backend]
    mtu: Callable[[Interface], int]
    """The largest inner packet over an interface, bytes; ConfigError if it cannot be used."""
    check: Callable[[BackendConfig, Surroundings], Iterator[Finding]]
    """What this backend needs beyond what every backend does."""


@dataclass(frozen=True, slots=True)
class PathMeasuring:
    """What measuring the path to one peer has come to."""

    state: Measuring
    since: float
    """Unix time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendStatus:
    """What `tundp status` shows of a backend."""

    name: str
    """As `Backend.Type` of the network config spells it."""
    overhead: int
    """Bytes the outer headers add to each packet."""
    mtu: int
    """The largest inner packet, bytes: FLANNEL_MTU."""
    port: int | None
    """The UDP port on the underlay; None for a backend without one."""
    device: str | None
    """The name of its own device, empty while that is gone; None if it has none."""
    routes: int | None
    """How many kernel routes it keeps; None for a backend that keeps one for the network."""
    queue_len: int | None = None
    """Packets each queue of its own device holds; None while that is gone, or if it has none."""
    receive_buffer: int | None = None
    """Bytes each of its sockets may hold unread, as the kernel charges them; None without one."""
    queue_drops: int | None = None
    """Packets the kernel dropped at the queue of its own device; None if it has none."""
    path_probes: int | None = None
    """Datagrams it sent by itself, to measure paths and to ask who answers; None: it sends none."""
    peer_messages: int | None = None
    """Questions and answers it sent to other nodes; None: it sends none."""
    silent_peers: int | None = None
    """Peers that do not answer though they were sent packets; None if it cannot tell."""
    paths: Mapping[int, PathMeasuring] | None = None
    """By hop id, of the paths that carried large packets lately; None if it measures none."""


class Backend(Protocol):
    """See the module. Methods are called in the order given there, by one task."""

    @property
    def name(self) -> str:
        """As `Backend.Type` of the network config spells it."""
        ...

    @property
    def overhead(self) -> int:
        """Bytes the outer headers add to each packet."""
        ...

    @property
    def mtu(self) -> int:
        """The largest inner packet now, bytes; known after `prepare`."""
        ...

    @property
    def device_index(self) -> int | None:
        """Index of its own device; 0 before it is made and while it is gone, None without one."""
        ...

    @property
    def engine(self) -> Dataplane | None:
        """The engine that carries the packets in this process; None if the kernel does."""
        ...

    @property
    def peer_tools(self) -> PeerTools | None:
        """Who asks other nodes; None for a backend that cannot."""
        ...

    @property
    def chaos(self) -> Chaos | None:
        """What impairs packets on purpose; None if the kernel carries them."""
        ...

    def offer(self, interface: Interface) -> LeaseAttributes:
        """What our lease shall say. ConfigError if this backend cannot use the interface."""
        ...

    def prepare(self, interface: Interface) -> None:
        """Open what can be opened before the lease is known. PlatformError, ConfigError."""
        ...

    async def open(
        self,
        network: IPv4Network,
        key: LeaseKey,
        *,
        fib: Fib,
        peers: Mapping[IPv4Network, Peer],
    ) -> None:
        """Carry packets for the lease `key` to the peers known so far. PlatformError.

        `fib` and `peers` are two views of the same routes.
        """
        ...

    def sinks(self) -> Sequence[FibSink]:
        """Who must be given each new FIB; after `open`."""
        ...

    async def run(self) -> None:
        """Keep the device and routes as they must be until cancelled."""
        ...

    async def measure(self) -> None:
        """Measure the paths to the peers until cancelled."""
        ...

    async def watch_peers(self) -> None:
        """Find out which peers answer until cancelled."""
        ...

    def reaches(self, hop_ids: Collection[int] | None = None) -> Mapping[int, Reach]:
        """Whether peers answer, by hop id: of those it knows something of.

        hop_ids: of these only; None: of all, which may be many.
        """
        ...

    def peer_at(self, hop_id: int) -> Peer | None:
        """One of the peers at a hop; None if there is none, or if it has no hops."""
        ...

    async def repair(self) -> list[str]:
        """Put back what somebody took from our device; what that was, for the log."""
        ...

    def is_concerned(self, change: KernelChange) -> bool:
        """Whether a change calls for `repair`: of our device, or of a route we keep."""
        ...

    def kernel_changed(self, changes: Sequence[KernelChange]) -> None:
        """Links, addresses or routes of the node changed, whosever: called often, must be cheap."""
        ...

    def owns_address(self, interface_index: int) -> bool:
        """Whether addresses on this interface are ours by right: the overlay's own."""
        ...

    async def underlay_changed(self, now: Interface) -> bool:
        """Follow the interface to the other nodes; whether connections from it are void.

        PlatformError or ConfigError if that cannot be; everything is as it was then.
        """
        ...

    def heartbeat(self) -> tuple[int, ...]:
        """Iteration count of each packet thread; () without one. See Dataplane.heartbeat."""
        ...

    def status(self) -> BackendStatus:
        """A snapshot for `tundp status`."""
        ...

    def checks(self) -> list[Finding]:
        """What must hold for pods to use the overlay."""
        ...

    def give(self) -> Given:
        """Duplicates of the descriptors a successor needs to go on; ours stay in use."""
        ...

    def descriptors(self) -> tuple[int, ...]:
        """What `give` duplicates, as numbers that change when the device or a socket is another."""
        ...

    def pause(self) -> None:
        """Carry nothing: a successor is about to. What is on the way waits in the queues."""
        ...

    def resume(self, *, is_paused: bool) -> None:
        """No successor came of it. Undo what one may have set, and `pause` if it was called."""
        ...

    def close(self) -> None:
        """Stop carrying packets and close what was opened."""
        ...
