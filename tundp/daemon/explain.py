"""`tundp explain`: look at what decides about one packet. Nothing is sent, nothing is changed.

What only the daemon knows comes over its admin socket; what the kernel knows is asked here, in
the network namespace of the command.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network
from shlex import quote
from typing import Final

from tundp.daemon.known_leases import KnownLeases
from tundp.finding import Finding
from tundp.linux.netlink import Netlink, Route
from tundp.linux.obstacles import firewall, remedy, sysctls
from tundp.linux.obstacles.packet import Packet, range_at
from tundp.linux.obstacles.scene import PeerPlace, Scene
from tundp.linux.obstacles.way import Asked, Neighbour, Routed, Walked, Way
from tundp.observe.explain.facts import (
    Direction,
    Facts,
    Kind,
    Pass,
    Place,
    Tunnel,
    direction,
    place,
)
from tundp.observe.explain.judge import explain
from tundp.observe.explain.model import Explanation, Question
from tundp.observe.ledger import LedgerRow

_STATES: Final = ("new", "established")
_UNKNOWN_NETWORK: Final = IPv4Network("0.0.0.0/32")


async def explain_packet(netlink: Netlink, known: KnownLeases, question: Question) -> Explanation:
    """Look at what decides about the packet, and judge it.

    known: the lease table, and the daemon's status. PlatformError if the kernel does not even
    list devices.
    """
    way = Way(netlink)
    await way.read()
    looked = _Looked(way=way, known=known, question=question)
    return await asyncio.to_thread(explain, await looked.facts())


@dataclass(slots=True, kw_only=True)
class _Looked:
    """One look, for one packet."""

    way: Way
    known: KnownLeases
    question: Question
    _others: list[Finding] = field(default_factory=list)
    _unread: list[str] = field(default_factory=list)

    async def facts(self) -> Facts:
        """Everything the steps are made of."""
        question, leases, way = self.question, self.known.leases, self.way
        source = place(question.source, leases, way.own)
        destination = place(question.destination, leases, way.own)
        what = direction(source, destination)
        peer = destination if what is Direction.ENCAP else source
        row = peer.row if peer.kind in (Kind.PEER_POD, Kind.PEER_HOST) else None
        scene = self._scene(row)
        pods = tuple(way.pod_devices(scene.subnet, scene.device))
        local = next((each for each in (source, destination) if each.kind is Kind.POD), None)
        pod_route = ""
        if local is not None:
            pods, pod_route = await self._towards(local.address, pods)
        inner = tunnel = None
        if what is not Direction.ELSEWHERE:
            inner = await self._pass(scene, source, destination, what, pods)
        if row is not None and scene.is_tunnel and what in (Direction.ENCAP, Direction.DECAP):
            tunnel = await self._tunnel(scene, row, what)
        elif row is not None and what is Direction.ENCAP:
            tunnel = await self._next_node(scene, row)
        if what is not Direction.ELSEWHERE:
            await self._look_below(scene, inner, tunnel)
        device = pods[0] if pods else ""
        return Facts(
            question=question,
            leases=leases,
            leases_of=self.known.origin,
            status=self.known.status,
            source=source,
            destination=destination,
            direction=what,
            device=scene.device,
            uplink=scene.uplink,
            pods=pods,
            pod_route=pod_route,
            pods_up=not device or way.links[device].is_up,
            gateway=", ".join(str(each.interface) for each in way.addresses_of(device)),
            pod_neighbour=None if local is None else way.neighbour(local.address, device),
            inner=inner,
            tunnel=tunnel,
            others=self._others,
            unread_rules=way.unread,
            unread_others=self._unread,
        )

    def _scene(self, row: LedgerRow | None) -> Scene:
        known, leases = self.known, self.known.leases
        return Scene(
            network=leases.network or _UNKNOWN_NETWORK,
            subnet=leases.subnet or _UNKNOWN_NETWORK,
            device=known.device,
            is_open=known.status is not None,
            is_tunnel=leases.port is not None,
            uplink=known.uplink,
            address=known.address,
            port=leases.port,
            peers=() if row is None else (PeerPlace(row.subnet, row.public_ip),),
            peer_count=len(leases.peers),
            accepts=known.accepts,
            pid=None if known.status is None else known.status.pid,
        )

    async def _towards(
        self, address: IPv4Address, pods: tuple[str, ...]
    ) -> tuple[tuple[str, ...], str]:
        """The devices to pods, that to this pod first; () and its route if that is none of them."""
        found = await self.way.route(Asked(to=address))
        if found.device not in pods:
            return (), f"{found.question}: {found.words}"
        return (found.device, *(name for name in pods if name != found.device)), ""

    async def _pass(
        self,
        scene: Scene,
        source: Place,
        destination: Place,
        what: Direction,
        pods: tuple[str, ...],
    ) -> Pass | None:
        """The inner packet in this host's kernel; None if it does not get into it."""
        way = self.way
        iif = await self._comes_by(scene, source, what, pods)
        if iif is None:
            return None
        wanted: tuple[str, ...] = ()
        if what is Direction.ENCAP:
            wanted = (scene.device,)
        elif destination.kind is Kind.POD:
            wanted = pods
        is_for_host = destination.kind is Kind.HOST
        if (why := self._why_no_device(scene, iif, wanted)) is not None:
            return Pass(iif=iif, wanted=wanted, route=None, why_not=why)
        before = await self._walk(
            scene, firewall.IN[:-1] if iif else (), iif, "", is_for_host=is_for_host
        )
        asked = self._asked(scene, iif, before.marks.sure)
        route = await way.route(asked)
        unchecked = None
        if route.errno and iif:
            unchecked = await way.route(replace(asked, source=None, iif=""))
        hooks = (firewall.IN if is_for_host else firewall.THROUGH) if iif else firewall.OUT
        walked = await self._walk(scene, hooks, iif, route.device, is_for_host=is_for_host)
        if not iif and walked.marks.sure:
            # What an output chain marks is routed again.
            route = await way.route(self._asked(scene, iif, walked.marks.sure))
        switch = _switch(iif) if iif and not is_for_host else ""
        out = way.links.get(route.device)
        named = way.addresses_of(route.device)
        return Pass(
            iif=iif,
            wanted=wanted,
            is_for_host=is_for_host,
            route=route,
            unchecked=unchecked,
            rp_filter=sysctls.effective_rp_filter(iif) if iif else 0,
            forwarding_switch=switch,
            is_link_up=out is None or out.is_up,
            mender=self._mender(scene, route, wanted),
            wanted_gateway=self._gateway(scene, destination, what),
            walked=walked if not route.errno else None,
            masqueraded_as=named[0].interface.ip if named else None,
        )

    async def _comes_by(
        self, scene: Scene, source: Place, what: Direction, pods: tuple[str, ...]
    ) -> str | None:
        """The device the packet comes in by: empty for our own, None if there is none."""
        if what is Direction.DECAP and scene.is_tunnel:
            return scene.device
        if source.kind is Kind.HOST:
            return ""
        if source.kind is Kind.POD:
            return pods[0] if pods else None
        back = await self.way.route(Asked(to=source.address))
        return back.device or scene.uplink

    def _gateway(self, scene: Scene, destination: Place, what: Direction) -> IPv4Address | None:
        """The node that routes of a backend without a device lead to."""
        is_routed = what is Direction.ENCAP and not scene.is_tunnel
        return destination.row.public_ip if is_routed and destination.row is not None else None

    def _why_no_device(self, scene: Scene, iif: str, wanted: Sequence[str]) -> str | None:
        if scene.device not in (iif, *wanted) or scene.device in self.way.links:
            return None
        if self.known.status is None:
            return f"no daemon runs, and there is no device {scene.device}"
        return f"there is no device {scene.device} in this network namespace"

    def _asked(self, scene: Scene, iif: str, mark: int) -> Asked:
        question = self.question
        return Asked(
            to=question.destination,
            source=question.source,
            iif=iif,
            proto=question.proto,
            port=question.port,
            mark=mark,
        )

    async def _walk(
        self, scene: Scene, hooks: Sequence[str], iif: str, oif: str, *, is_for_host: bool
    ) -> Walked:
        question = self.question
        passes = remedy.to_pods if iif == scene.device else remedy.from_pods
        packets = [
            Packet(
                proto=proto,
                state=state,
                src=(range_at(question.source),),
                dst=(range_at(question.destination),),
                iif=(iif,) if iif else (),
                oif=(oif,) if oif and not is_for_host else (),
                port=question.port if proto != "icmp" else None,
                is_port_of_destination=True,
                is_for_host=is_for_host,
                is_from_host=not iif,
            )
            for proto in ([question.proto] if question.proto else ["tcp", "udp", "icmp"])
            for state in _STATES
        ]
        return await self.way.walk(hooks, packets, passes(scene), scene)

    def _mender(self, scene: Scene, route: Routed, wanted: Sequence[str]) -> str:
        """The command that brings the packet back to where it should go."""
        to, network = self.question.destination, scene.network
        right = {self.way.links[name].index for name in wanted if name in self.way.links}
        takers = [
            each
            for each in self.way.routes
            if to in each.destination
            and each.destination.prefixlen > network.prefixlen
            and not right.intersection(each.indexes)
        ]
        is_gateway = not scene.is_tunnel and scene.device in wanted
        if is_gateway and not any(to in peer.subnet for peer in scene.peers):
            return ""
        if route.is_main and takers and wanted:
            return _deletion(max(takers, key=lambda each: each.destination.prefixlen), self.way)
        if is_gateway and route.is_main:
            return ""
        if wanted and any(right.intersection(each.indexes) for each in self.way.routes):
            target = network if scene.device in wanted else scene.subnet
            return f"ip rule add priority 1 to {target} lookup main"
        if wanted == (scene.device,):
            return f"ip route add {network} dev {quote(scene.device)}"
        return ""

    async def _tunnel(self, scene: Scene, row: LedgerRow, what: Direction) -> Tunnel:
        """The datagram between this node and the peer."""
        way, port = self.way, row.port or scene.port
        here, there = range_at(scene.address), range_at(row.public_ip)
        is_out = what is Direction.ENCAP
        packet = Packet(
            proto="udp",
            state="new",
            src=(here if is_out else there,),
            dst=(there if is_out else here,),
            iif=() if is_out else (scene.uplink,),
            oif=(scene.uplink,) if is_out else (),
            port=port,
            is_for_host=not is_out,
            is_from_host=is_out,
        )
        hooks = firewall.OUT if is_out else firewall.IN
        walked = await way.walk(hooks, [packet], remedy.tunnel(scene), scene, is_for_port=True)
        if not is_out:
            asked = Asked(
                to=scene.address, source=row.public_ip, iif=scene.uplink, proto="udp", port=port
            )
            return Tunnel(
                route=None,
                back=await way.route(asked),
                rp_filter=sysctls.effective_rp_filter(scene.uplink),
                walked=walked,
            )
        asked = Asked(
            to=row.public_ip,
            source=scene.address,
            proto="udp",
            port=port,
            mark=walked.marks.sure,
        )
        route = await way.route(asked)
        hop = route.gateway or row.public_ip
        entry: Neighbour | None = way.neighbour(hop, route.device)
        return Tunnel(route=route, next_hop=hop, neighbour=entry, walked=walked)

    async def _next_node(self, scene: Scene, row: LedgerRow) -> Tunnel:
        """The peer as the next hop of a backend without a device."""
        route = await self.way.route(Asked(to=row.public_ip, source=scene.address))
        entry = self.way.neighbour(row.public_ip, route.device)
        return Tunnel(route=route, next_hop=row.public_ip, neighbour=entry)

    async def _look_below(self, scene: Scene, inner: Pass | None, tunnel: Tunnel | None) -> None:
        """Filters and programs of the devices the packet's frames pass."""
        names = [scene.device, scene.uplink] if tunnel is not None else []
        if inner is not None:
            names += [inner.iif, "" if inner.route is None else inner.route.device]
        wanted = tuple(dict.fromkeys(name for name in names if name in self.way.links))
        self._others, self._unread = await self.way.others(scene, wanted)


def _switch(iif: str) -> str:
    """The switch that keeps this host from forwarding what comes in by a device; empty if none."""
    if sysctls.read("ipv4/ip_forward") == 0:
        return "net.ipv4.ip_forward"
    if sysctls.read(f"ipv4/conf/{iif}/forwarding") == 0:
        return f"net/ipv4/conf/{iif}/forwarding"
    return ""


def _deletion(route: Route, way: Way) -> str:
    kind = "" if route.is_unicast else f"{route.kind} "
    over = f" dev {quote(way.name(route.indexes[0]))}" if len(route.indexes) == 1 else ""
    return f"ip route del {kind}{route.destination}{over}"
