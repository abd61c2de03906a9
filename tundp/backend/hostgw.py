"""The host-gw backend: kernel routes to the other nodes, all on one layer-2 network.

    subnet of a peer  via its PublicIP  dev the underlay's interface

No device, no socket, no packet in this process: the kernel forwards, and the MTU is the
link's. What flannel's host-gw does, and where this differs:

- The node's PublicIP must be its interface address: a gateway must be a neighbour.
- Routes are added and removed in batches. Every RECONCILE_S, and when the kernel reports a
  change, they are compared with the table: a missing or changed one is put back, a stale
  one of ours removed. flannel looks every 10 s and leaves stale routes.
- A route for the subnet that is not ours (another gateway or device) is replaced, as by
  flannel.
- Each route bears the protocol number PROTOCOL, so that `ip route` shows whose it is. One
  inside the network that leads elsewhere than it must is ours to remove; those of other
  networks are another instance's. Routes stay when the daemon goes, as flannel's do: pods
  keep their way while it restarts. `tundp cleanup` removes them.
- A gateway the kernel refuses (not on the link) is named in the log and in `checks`, and
  costs no other route. The subnet has no route then, rather than that to its former gateway.

Why one room: what is wanted of the routing table, and how it is compared and put right.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network
from itertools import islice
from typing import Final

from tundp.backend.base import (
    BackendContext,
    BackendKind,
    BackendStatus,
    FibSink,
    Given,
    Surroundings,
)
from tundp.backend.peers import PeerTools
from tundp.backoff import Outage
from tundp.engine.base import Dataplane
from tundp.engine.reach import Reach
from tundp.errors import ConfigError, PlatformError
from tundp.finding import Finding, Verdict, must_hold, worries
from tundp.lease import gojson
from tundp.lease.fib import Fib
from tundp.lease.model import LeaseAttributes, LeaseKey, Peer
from tundp.lease.network import BackendConfig
from tundp.lease.routing import RoutingDelta
from tundp.linux.iface import Interface
from tundp.linux.netlink import Change as KernelChange
from tundp.linux.netlink import LinkChange, RouteChange
from tundp.linux.route_table import RouteEntry, RouteFailure
from tundp.linux.unreachable import PROTOCOL

_log = logging.getLogger(__name__)

NAME: Final = "host-gw"
RECONCILE_S: Final = 10.0
"""Between two comparisons with the kernel's table, as in flannel."""
RETRIED: Final = 64
"""Routes the kernel has refused that are tried again then: the store decides how many there are."""
PACE: Final = 5.0
"""Pause after a comparison, in parts of the time it took."""
ERRORS_NAMED: Final = 5
"""More routes at once are counted in the log, not named."""


class HostGwBackend:
    """See the module, and backend.base.Backend for the contract."""

    def __init__(self, config: BackendConfig, context: BackendContext) -> None:
        # Those of a udp backend before: its device would keep the network's route.
        context.given.discard()
        self._config = config
        self._netlink = context.netlink
        self._interface: Interface | None = None
        self._network: IPv4Network | None = None
        self._wanted: dict[IPv4Network, IPv4Address] = {}
        """Gateway of each peer's subnet."""
        self._errors: dict[IPv4Network, str] = {}
        """Routes the kernel refuses, and why."""
        self._refused: dict[IPv4Network, RouteEntry] = {}
        """The same routes, those tried longest ago first."""
        self._trouble = ""
        """Why the kernel's table could not be compared last time; empty if it was."""
        self._generation = 0
        self._seen = 0
        self._is_due = asyncio.Event()
        self._turn = asyncio.Lock()
        """Held during a comparison: `run` and `repair` would undo each other's work."""
        self._outage = Outage(_log, "routes to the other nodes")

    @property
    def name(self) -> str:
        """See Backend."""
        return self._config.name

    @property
    def overhead(self) -> int:
        """See Backend: packets cross the underlay as they are."""
        return 0

    @property
    def mtu(self) -> int:
        """See Backend: the link's own."""
        return self._link.link.mtu

    @property
    def device_index(self) -> int | None:
        """See Backend: there is no device."""
        return None

    @property
    def engine(self) -> Dataplane | None:
        """See Backend: the kernel forwards."""
        return None

    @property
    def peer_tools(self) -> PeerTools | None:
        """See Backend: messages between nodes need the overlay."""
        return None

    @property
    def chaos(self) -> None:
        """See Backend."""
        return None

    def offer(self, interface: Interface) -> LeaseAttributes:
        """See Backend. ConfigError if other nodes could not reach this one as a gateway."""
        if interface.public_ip != interface.address:
            raise ConfigError(
                f"--public-ip {interface.public_ip} differs from the address"
                f" {interface.address} of {interface.link.name}: the host-gw backend needs the"
                " interface's own address, since it is the gateway of the other nodes' routes;"
                " leave --public-ip out, or use the udp backend"
            )
        return LeaseAttributes(public_ip=interface.public_ip, backend_type=self._config.lease_type)

    def prepare(self, interface: Interface) -> None:
        """See Backend."""
        self._interface = interface

    async def open(
        self,
        network: IPv4Network,
        key: LeaseKey,
        *,
        fib: Fib,
        peers: Mapping[IPv4Network, Peer],
    ) -> None:
        """See Backend: the routes to all peers are there when this returns."""
        self._wanted = {subnet: peer.endpoint.address for subnet, peer in peers.items()}
        self._network = network
        self._generation = fib.generation
        async with self._turn:
            changed = await self._reconcile()
        _log.info(
            "%d routes over %s, MTU %d (%d changed)",
            self._route_count,
            self._link.link.name,
            self.mtu,
            len(changed),
        )

    def sinks(self) -> Sequence[FibSink]:
        """See Backend."""
        return (self,)

    def install(self, fib: Fib, delta: RoutingDelta) -> None:
        """See FibSink. The task in `run` does it, on netlink."""
        if delta.is_whole:
            self._wanted.clear()
        for peer in delta.gone:
            self._wanted.pop(peer.subnet, None)
        for peer in (*delta.come, *(new for _, new in delta.moved)):
            self._wanted[peer.subnet] = peer.endpoint.address
        self._generation = fib.generation
        self._is_due.set()

    def seen(self) -> int:
        """See FibSink: the generation whose routes the kernel has."""
        return self._seen

    async def run(self) -> None:
        """See Backend: brings the kernel's routes in line when peers change, and regularly."""
        clock = asyncio.get_running_loop().time
        while True:
            try:
                async with asyncio.timeout(RECONCILE_S):
                    await self._is_due.wait()
                is_change = True
            except TimeoutError:
                is_change = False
            began = clock()
            try:
                async with self._turn:
                    put_back = await self._reconcile(retried=0 if is_change else RETRIED)
            except PlatformError as error:
                self._outage.failed(error, now=clock())
                await asyncio.sleep(1.0)
                self._is_due.set()
                continue
            self._outage.ended(now=clock())
            took_s = clock() - began
            if put_back and not is_change:
                _log.warning(
                    "routes changed behind our back; put back: %s", ", ".join(_some(put_back))
                )
            # Changes that come meanwhile are one comparison: it costs as much as there are leases.
            await asyncio.sleep(min(RECONCILE_S, PACE * took_s))

    async def repair(self) -> list[str]:
        """See Backend."""
        async with self._turn:
            if self._is_due.is_set():
                return []  # `run` is about to change them: what differs now is no surprise
            return _some(await self._reconcile())

    def is_concerned(self, change: KernelChange) -> bool:
        """See Backend: a route for a peer's subnet."""
        if isinstance(change, LinkChange):
            # Routes go silently with a link that goes down.
            is_ours = change.link.index == self._link.link.index
            return is_ours and (change.is_gone or not change.link.is_up)
        return isinstance(change, RouteChange) and change.destination in self._wanted

    async def measure(self) -> None:
        """See Backend: the kernel forwards, and learns of paths."""
        await asyncio.Event().wait()

    async def watch_peers(self) -> None:
        """See Backend: the kernel counts no packets by peer."""
        await asyncio.Event().wait()

    def reaches(self, hop_ids: Collection[int] | None = None) -> Mapping[int, Reach]:
        """See Backend."""
        del hop_ids
        return {}

    def peer_at(self, hop_id: int) -> Peer | None:
        """See Backend: there are no hops."""
        del hop_id
        return None

    def kernel_changed(self, changes: Sequence[KernelChange]) -> None:
        """See Backend. Nothing is remembered of paths."""

    def owns_address(self, interface_index: int) -> bool:
        """See Backend: there is no device, and so no address of it."""
        return False

    async def underlay_changed(self, now: Interface) -> bool:
        """See Backend: routes move to another link; the kernel took those of a lost one."""
        self.offer(now)
        before, self._interface = self._interface, now
        self._refused.clear()
        if before is not None and before.link.index != now.link.index:
            self._is_due.set()
        return before is not None and before.address != now.address

    def heartbeat(self) -> tuple[int, ...]:
        """See Backend: there are no packet threads."""
        return ()

    def status(self) -> BackendStatus:
        """See Backend."""
        return BackendStatus(
            name=self.name,
            overhead=0,
            mtu=self.mtu,
            port=None,
            device=None,
            routes=self._route_count,
        )

    def checks(self) -> list[Finding]:
        """See Backend."""
        if self._trouble:
            return [must_hold("routes", False, self._trouble)]
        refused = [subnet for subnet in self._errors if subnet in self._wanted]
        if not refused:
            return [must_hold("routes", True, f"{len(self._wanted)} in the kernel's table")]
        # Somebody else's lease: this node cannot mend it, and serves the others.
        why = self._errors[refused[0]]
        detail = f"{len(refused)} of {len(self._wanted)} refused: {refused[0]}: {why}"
        return worries("routes", detail, next_step="host-gw needs all nodes on one layer-2 network")

    def give(self) -> Given:
        """See Backend: routes outlive the process by themselves."""
        return Given()

    def descriptors(self) -> tuple[int, ...]:
        """See Backend."""
        return ()

    def pause(self) -> None:
        """See Backend: the kernel carries the packets."""

    def resume(self, *, is_paused: bool) -> None:
        """See Backend."""

    def close(self) -> None:
        """See Backend. The routes stay."""

    @property
    def _link(self) -> Interface:
        assert self._interface is not None, "prepare() comes first"
        return self._interface

    @property
    def _route_count(self) -> int:
        """Routes in the kernel, as far as is known."""
        return sum(subnet not in self._errors for subnet in self._wanted)

    async def _reconcile(self, *, retried: int = 0) -> list[str]:
        """Make the kernel's routes what they must be; what was changed, for the log.

        retried: how many of those it has refused before are tried again. PlatformError if the
        kernel cannot be asked; `checks` says so until it can.
        """
        self._is_due.clear()
        generation = self._generation
        try:
            changed = await self._compare(retried)
        except PlatformError as error:
            self._trouble = str(error)
            raise
        self._trouble = ""
        self._seen = generation
        return changed

    async def _compare(self, retried: int) -> list[str]:
        index = self._link.link.index
        wanted = {
            subnet: RouteEntry(destination=subnet, gateway=gateway, index=index, protocol=PROTOCOL)
            for subnet, gateway in self._wanted.items()
        }
        present = dict.fromkeys(
            route
            for route in await self._netlink.list_routes(protocol=PROTOCOL)
            if route.gateway is not None and self._is_inside(route.destination)
        )
        self._refused = {
            subnet: route for subnet, route in self._refused.items() if wanted.get(subnet) == route
        }
        skipped = dict(islice(self._refused.items(), retried, None))
        missing = [
            route
            for route in wanted.values()
            if route not in present and route.destination not in skipped
        ]
        replaced = {route.destination for route in missing}
        stale = [route for route in present if wanted.get(route.destination) != route]
        failures = await self._netlink.change_routes(
            replace=missing,
            delete=[route for route in stale if route.destination not in replaced],
        )
        refused = {each.route.destination for each in failures if each.action == "replace"}
        # Packets must not go on to a node that does not have the subnet any more.
        failures += await self._netlink.change_routes(
            delete=[route for route in stale if route.destination in refused]
        )
        self._note_failures(failures, wanted, skipped)
        failed = {failure.route for failure in failures}
        return [
            *(f"route {each.destination}" for each in missing if each not in failed),
            *(
                f"no route {each.destination}"
                for each in stale
                if each not in failed and each.destination not in replaced - refused
            ),
        ]

    def _is_inside(self, destination: IPv4Network) -> bool:
        """Whether a route with our protocol number is this instance's."""
        return self._network is not None and destination.subnet_of(self._network)

    def _note_failures(
        self,
        failures: Sequence[RouteFailure],
        wanted: Mapping[IPv4Network, RouteEntry],
        skipped: Mapping[IPv4Network, RouteEntry],
    ) -> None:
        """Keep what was refused for `checks`; log what was not known before."""
        before = self._errors
        refused = [each for each in failures if wanted.get(each.route.destination) == each.route]
        self._refused = {**skipped, **{each.route.destination: each.route for each in refused}}
        self._errors = {subnet: before[subnet] for subnet in skipped if subnet in before} | {
            each.route.destination: f"via {each.route.gateway}: {each.reason}" for each in refused
        }
        news = [subnet for subnet, why in self._errors.items() if before.get(subnet) != why]
        for subnet in news[:ERRORS_NAMED]:
            _log.error(
                "no route to %s %s: host-gw peers must be on the network of %s",
                subnet,
                self._errors[subnet],
                self._link.link.name,
            )
        if len(news) > ERRORS_NAMED:
            _log.error("and %d routes more are refused", len(news) - ERRORS_NAMED)


def _some(names: Sequence[str]) -> list[str]:
    """The first ERRORS_NAMED, and how many more there are."""
    more = [f"{len(names) - ERRORS_NAMED} routes more"] if len(names) > ERRORS_NAMED else []
    return [*names[:ERRORS_NAMED], *more]


def host_gw_config() -> BackendConfig:
    """The host-gw backend, which takes no parameters. A peer is a gateway, and has no port."""
    return BackendConfig(name=NAME, lease_type=NAME, lease_types=frozenset({NAME}))


def _parse(_: gojson.Fields) -> BackendConfig:
    return host_gw_config()


def _mtu(interface: Interface) -> int:
    return interface.link.mtu


def _check(config: BackendConfig, around: Surroundings) -> Iterator[Finding]:
    """Whether the other nodes are neighbours on the interface, and we are one for them."""
    chosen = around.interface
    if chosen.public_ip != chosen.address:
        yield Finding(
            id="backend.public-ip",
            verdict=Verdict.FAIL,
            title=NAME,
            evidence=f"the PublicIP {chosen.public_ip} is not the address {chosen.address} of"
            f" {chosen.link.name}, which other nodes would send to",
            next_step="leave --public-ip out, or use the udp backend",
        )
    peers = [
        lease
        for lease in around.leases
        if lease.attributes.backend_type.lower() in config.lease_types
        and lease.attributes.public_ip != chosen.public_ip
    ]
    far = [
        lease
        for lease in peers
        if not any(lease.attributes.public_ip in network for network in around.networks)
    ]
    for lease in far:
        yield Finding(
            id="backend.far",
            verdict=Verdict.WARN,
            title=NAME,
            evidence=f"{lease.key} at {lease.attributes.public_ip} is on no network of"
            f" {chosen.link.name}: no route can lead there",
            next_step="host-gw needs all nodes on one layer-2 network; udp does not",
        )
    if not far:
        yield Finding(
            id="backend",
            verdict=Verdict.OK,
            title=NAME,
            evidence=f"{len(peers)} other nodes, all on networks of {chosen.link.name}",
        )


KIND: Final = BackendKind(name=NAME, parse=_parse, make=HostGwBackend, mtu=_mtu, check=_check)
