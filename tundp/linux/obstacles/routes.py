"""Where the kernel would send the overlay's packets: asked of it, policy rules included.

RTM_GETROUTE is answered by the same lookup packets get. With an input device the answer is an
error where packets would be dropped: no forwarding, reverse path filter, martian source.

Why one room: the questions and what their answers mean are checked against each other.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network
from shlex import quote
from typing import Final

from tundp.finding import Finding, Verdict
from tundp.linux import uapi
from tundp.linux.netlink import Flow, Netlink, NoRoute, Route
from tundp.linux.obstacles import firewall, sysctls
from tundp.linux.obstacles.devices import Device
from tundp.linux.obstacles.rules import Marks
from tundp.linux.obstacles.scene import NOT_JUDGED, PeerPlace, Scene
from tundp.linux.policy_rules import decode_mark_rule, rules_request

ID: Final = "obstacle.route"
ASKED: Final = 4
"""Peers that are asked about."""
ASKED_MORE: Final = 60
"""Others that are asked about before it is said that nothing passes: a few leases, which anybody
who writes to the store may choose, must not make every node unready."""
_NO_WAY: Final = {
    errno.ENETUNREACH: "there is no route",
    errno.EHOSTUNREACH: 'an "unreachable" route takes it',
    errno.EACCES: 'a "prohibit" route takes it',
    errno.EINVAL: 'a "blackhole" route takes it',
}
TRIES: Final = 3
"""Questions about a peer, while the network's route is not there after them."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The kernel's routing decision."""

    index: int = 0
    """The device packets leave by; 0 for none."""
    gateway: IPv4Address | None = None
    table: int = uapi.RT_TABLE_MAIN
    errno: int = 0
    is_for_host: bool = False


@dataclass(frozen=True, slots=True)
class Question:
    """A packet to look up. iif: the name of the device it comes in by, empty for our own."""

    to: IPv4Address
    source: IPv4Address | None = None
    iif: str = ""
    port: int | None = None
    mark: int = 0

    def __str__(self) -> str:
        """As a command that asks the same."""
        text = f"ip route get {self.to}"
        if self.source is not None:
            text += f" from {self.source}"
        if self.iif:
            text += f" iif {self.iif}"
        return f"{text} mark {self.mark:#x}" if self.mark else text


class Routes:
    """Questions to the kernel about one scene."""

    def __init__(self, netlink: Netlink, scene: Scene) -> None:
        self._netlink = netlink
        self._scene = scene
        self._indexes: dict[str, int] = {}
        self._table: list[Route] = []
        self._own: set[IPv4Address] = set()
        self.asked = 0
        """Peers whose routes were asked for by `findings`."""

    async def pod_devices(self, devices: Sequence[Device]) -> list[str]:
        """Devices packets for this node's pods leave by: those of routes inside its subnet.

        devices: all of this namespace.
        """
        scene = self._scene
        self._indexes = {each.name: each.index for each in devices}
        table = await self._netlink.routes()
        self._table = await asyncio.to_thread(self._relevant, table)
        self._own = {each.interface.ip for each in await self._netlink.addresses()}
        if scene.subnet == scene.network:
            return []
        names = self._names
        found = [
            names.get(index, "")
            for route in self._table
            if route.is_unicast and route.destination.subnet_of(scene.subnet)
            for index in route.indexes
        ]
        own = {scene.device, "", "lo"} if scene.is_tunnel else {"", "lo"}
        return [name for name in dict.fromkeys(found) if name not in own][:16]

    def _relevant(self, table: Sequence[Route]) -> list[Route]:
        """The routes that may take packets of ours: of tens of thousands, mostly a few."""
        scene = self._scene
        hosts = [peer.public_ip for peer in scene.peers[:ASKED]]
        return [
            route
            for route in table
            if route.destination.overlaps(scene.network)
            or any(host in route.destination for host in hosts)
        ]

    def next_hops(self) -> set[IPv4Address]:
        """Addresses datagrams may go to on the uplink: of peers, and of gateways to them."""
        uplink = self._indexes.get(self._scene.uplink)
        gateways = (each.gateway for each in self._table if uplink in each.indexes)
        return {peer.public_ip for peer in self._scene.peers} | {*filter(None, gateways)}

    async def findings(self, pod_devices: Sequence[str]) -> list[Finding]:
        """Where packets would go elsewhere, or nowhere."""
        scene = self._scene
        if not scene.is_open or scene.device not in self._indexes:
            return []
        asked = scene.peers[:ASKED]
        self.asked = len(asked)
        found: list[Finding] = []
        astray = await self._astray(asked, pod_devices)
        # Where nothing at all passes the node is of no use; else others are served.
        is_all = len({each.facts["peer"] for each in astray}) == len(asked) > 0
        is_all = is_all and not await self._passes_elsewhere(pod_devices)
        if not is_all:
            astray = [
                Finding(
                    id=each.id,
                    verdict=Verdict.WARN,
                    evidence=each.evidence,
                    next_step=each.next_step,
                    facts=each.facts,
                )
                for each in astray
            ]
        found += astray
        found += self._overlaps(already=astray)
        if scene.is_tunnel:
            for peer in asked:
                found += await self._tunnel(peer)
            found += await self._to_pods(asked, pod_devices)
        return found

    async def _astray(
        self, asked: Sequence[PeerPlace], pod_devices: Sequence[str]
    ) -> list[Finding]:
        """Peers whose packets go elsewhere, but for the network's route being away for a moment.

        It goes and comes between any two questions while another program removes it.
        """
        for _ in range(TRIES):
            was_there = await self._has_own_route()
            found = [each for peer in asked for each in await self._to_peer(peer, pod_devices)]
            if not found or (was_there and await self._has_own_route()):
                return found
        return []

    async def _has_own_route(self) -> bool:
        """Whether the network's route is there, where it is missed by name elsewhere."""
        scene = self._scene
        if not (scene.keeps_route and scene.is_tunnel):
            return True
        device = self._indexes.get(scene.device)
        return any(
            route.is_unicast
            and route.indexes == (device,)
            and scene.network.subnet_of(route.destination)
            for route in await self._netlink.routes()
        )

    async def _passes_elsewhere(self, pod_devices: Sequence[str]) -> bool:
        """Whether packets to any other peer go where they should; spread over all there are."""
        others = self._scene.peers[ASKED:]
        for peer in others[:: max(1, -(-len(others) // ASKED_MORE))]:
            self.asked += 1
            if not await self._to_peer(peer, pod_devices):
                return True
        return False

    async def _to_peer(self, peer: PeerPlace, pod_devices: Sequence[str]) -> list[Finding]:
        """From this host, and from pods; one finding at most."""
        scene = self._scene
        to = _inside(peer.subnet)
        questions = [Question(to)]
        # Without forwarding every answer is an error, which sysctls.py has a finding for.
        if pod_devices and sysctls.read(f"ipv4/conf/{pod_devices[0]}/forwarding"):
            questions.append(Question(to, self._pod(), pod_devices[0]))
        for question in questions:
            answer = await self._ask(question)
            if self._is_right(answer, peer):
                continue
            command = self._remedy(to, answer)
            whence = f" from pods ({question.iif})" if question.iif else ""
            return [
                Finding(
                    id=ID,
                    verdict=Verdict.FAIL,
                    evidence=f"packets for {peer.subnet}{whence} do not go through"
                    f" {scene.device}: {self._says(question, answer)}",
                    next_step=command,
                    facts={"command": command, "peer": str(peer.subnet)},
                )
            ]
        return []

    def _pod(self) -> IPv4Address:
        """An address of this node's subnet that no device of this host has."""
        subnet = self._scene.subnet
        last = int(subnet.broadcast_address) - (subnet.num_addresses > 2)
        some = (IPv4Address(number) for number in range(last, int(subnet.network_address), -1))
        return next((each for each in some if each not in self._own), IPv4Address(last))

    def _is_right(self, answer: Answer, peer: PeerPlace) -> bool:
        if answer.index != self._indexes.get(self._scene.device):
            return False
        return self._scene.is_tunnel or answer.gateway == peer.public_ip

    def _overlaps(self, already: Sequence[Finding]) -> list[Finding]:
        """Routes of the main table that take a part of a peer's subnet elsewhere."""
        scene = self._scene
        if not scene.is_tunnel:
            return []
        found = []
        device = self._indexes.get(scene.device)
        done = {each.facts["peer"] for each in already}
        for route in self._table:
            if (
                route.destination.prefixlen <= scene.network.prefixlen
                or not route.destination.subnet_of(scene.network)
                or route.indexes == (device,)
                or str(route.destination) in done
                # The underlay's own route may lie within the network, too.
                or not any(route.destination.overlaps(peer.subnet) for peer in scene.peers)
            ):
                continue
            command = _deletion(route, self._names)
            found.append(
                Finding(
                    id=ID,
                    verdict=Verdict.WARN,
                    evidence=f"{_described(route, self._names)} takes packets of the overlay's"
                    f" network {scene.network} from {scene.device}",
                    next_step=command,
                    facts={"command": command, "peer": str(route.destination)},
                )
            )
        return found[:ASKED]

    async def _tunnel(self, peer: PeerPlace) -> list[Finding]:
        """Datagrams to a peer must not enter the tunnel again; those from it must be let in."""
        scene = self._scene
        question = Question(peer.public_ip, scene.address, port=scene.port)
        answer = await self._ask(question)
        if answer.errno or answer.index == self._indexes.get(scene.device):
            why = "cannot leave" if answer.errno else f"would enter {scene.device} again"
            command = self._tunnel_remedy(peer.public_ip)
            return [
                Finding(
                    id="obstacle.tunnel",
                    verdict=Verdict.WARN,
                    evidence=f"datagrams to {peer.public_ip} {why}: {self._says(question, answer)}",
                    next_step=command or f"a route to {peer.public_ip} over {scene.uplink}",
                    facts={"command": command} if command else {},
                )
            ]
        question = Question(scene.address, peer.public_ip, scene.uplink, port=scene.port)
        answer = await self._ask(question)
        if answer.errno or not answer.is_for_host:
            mode = sysctls.effective_rp_filter(scene.uplink)
            command = f"sysctl -w {quote(f'net/ipv4/conf/{scene.uplink}/rp_filter')}=2"
            return [
                Finding(
                    id="obstacle.tunnel",
                    verdict=Verdict.WARN,
                    evidence=f"the kernel would drop datagrams from {peer.public_ip} that come"
                    f" in by {scene.uplink} (rp_filter {mode}; {question})",
                    next_step=command if mode == sysctls.STRICT else "see ip rule, ip route",
                    facts={"command": command} if mode == sysctls.STRICT else {},
                )
            ]
        return []

    def _best(self, to: IPv4Address) -> Route | None:
        """The main table's route to an address."""
        fitting = (route for route in self._table if to in route.destination)
        return max(fitting, key=lambda each: each.destination.prefixlen, default=None)

    def _tunnel_remedy(self, to: IPv4Address) -> str:
        """What lets datagrams leave by the uplink; empty if no single command does."""
        best = self._best(to)
        if best is None or best.destination == self._scene.network:
            return ""
        if not best.is_unicast or best.indexes == (self._indexes.get(self._scene.device),):
            return _deletion(best, self._names)
        return f"ip rule add priority 1 to {to} lookup main"

    async def _to_pods(
        self, asked: Sequence[PeerPlace], pod_devices: Sequence[str]
    ) -> list[Finding]:
        """What comes out of the tunnel for pods, from a pod of each peer."""
        scene = self._scene
        if not pod_devices or not sysctls.read(f"ipv4/conf/{scene.device}/forwarding"):
            return []
        for peer in asked:
            question = Question(self._pod(), _inside(peer.subnet), scene.device)
            answer = await self._ask(question)
            if not answer.errno and self._names.get(answer.index) in pod_devices:
                continue
            mode = sysctls.effective_rp_filter(scene.device)
            is_filter = bool(answer.errno) and mode > 0
            best = self._best(question.to)
            command = self._remedy(question.to, answer)
            if best and any(self._names.get(each) in pod_devices for each in best.indexes):
                # The pods' own route is right; a policy rule is asked before its table.
                command = f"ip rule add priority 1 to {scene.subnet} lookup main"
            if is_filter:
                command = f"sysctl -w {quote(f'net/ipv4/conf/{scene.device}/rp_filter')}=2"
            why = self._says(question, answer)
            if is_filter:
                why = f"the kernel would drop them, rp_filter is {mode} ({question})"
            return [
                Finding(
                    id=ID,
                    verdict=Verdict.WARN,
                    evidence=f"packets from {peer.subnet} for pods here do not reach them: {why}",
                    next_step=command,
                    facts={"peer": str(peer.subnet), "command": command},
                )
            ]
        return []

    async def marked(self, marks: Mapping[str, Marks], pod_devices: Sequence[str]) -> list[Finding]:
        """Where packets go that a rule of the firewall marks and a policy rule is for."""
        scene = self._scene
        if not scene.is_open or not scene.is_tunnel or scene.device not in self._indexes:
            return []
        rules = await self._netlink.dump("list policy rules", rules_request(), decode_mark_rule)
        found: list[Finding] = []
        for mark in dict.fromkeys(rule.mark for rule in rules):
            for peer in scene.peers[:1]:
                for trip, question in self._marked_questions(mark, peer, pod_devices):
                    bits = marks.get(trip, Marks())
                    if mark & ~bits.possible or not await self._is_astray(trip, question):
                        continue
                    is_sure = not mark & ~bits.sure
                    found.append(await self._of_mark(trip, question, peer, is_sure=is_sure))
        return found

    def _marked_questions(
        self, mark: int, peer: PeerPlace, pod_devices: Sequence[str]
    ) -> list[tuple[str, Question]]:
        scene, to = self._scene, _inside(peer.subnet)
        asked = [
            (firewall.FROM_HOST, Question(to, mark=mark)),
            (
                firewall.TUNNEL_OUT,
                Question(peer.public_ip, scene.address, port=scene.port, mark=mark),
            ),
        ]
        if pod_devices and sysctls.read(f"ipv4/conf/{pod_devices[0]}/forwarding"):
            asked.append((firewall.FROM_PODS, Question(to, self._pod(), pod_devices[0], mark=mark)))
        if pod_devices and sysctls.read(f"ipv4/conf/{scene.device}/forwarding"):
            asked.append((firewall.TO_PODS, Question(self._pod(), to, scene.device, mark=mark)))
        return asked

    async def _is_astray(self, trip: str, question: Question) -> bool:
        """Whether the mark decides that packets go elsewhere, or nowhere."""
        answer = await self._ask(question)
        if answer == await self._ask(replace(question, mark=0)):
            return False
        if trip != firewall.TUNNEL_OUT:
            return True
        # The underlay may well be another one for what is marked.
        return bool(answer.errno) or answer.index == self._indexes.get(self._scene.device)

    async def _of_mark(
        self, trip: str, question: Question, peer: PeerPlace, *, is_sure: bool
    ) -> Finding:
        scene = self._scene
        is_tunnel = trip == firewall.TUNNEL_OUT
        to = peer.public_ip if is_tunnel else scene.network
        what = f"datagrams to {to}" if is_tunnel else f"packets {trip}"
        command = f"ip rule add priority 1 to {to} lookup main"
        says = self._says(question, await self._ask(question))
        return Finding(
            id="obstacle.tunnel" if is_tunnel else ID,
            verdict=Verdict.WARN if is_sure else Verdict.NOTE,
            evidence=f"{what} with the mark {question.mark:#x}, which rules of the firewall"
            f" {'set' if is_sure else 'may set'}: {says}",
            next_step=command,
            meaning="" if is_sure else NOT_JUDGED,
            facts={"command": command},
        )

    async def _ask(self, question: Question) -> Answer:
        flow = Flow(
            source=question.source,
            port=question.port or 0,
            is_udp=question.port is not None,
            iif=self._indexes.get(question.iif, 0),
            mark=question.mark,
        )
        found = (await self._netlink.lookups([question.to], flow))[question.to]
        if isinstance(found, NoRoute):
            return Answer(errno=found.errno or errno.EIO)
        return Answer(
            index=found.index,
            gateway=found.gateway,
            table=found.table,
            is_for_host=found.kind == "local",
        )

    def _says(self, question: Question, answer: Answer) -> str:
        """The answer in words."""
        if answer.errno:
            return f"{_NO_WAY.get(answer.errno, 'refused')} ({question})"
        name = self._names.get(answer.index, str(answer.index))
        via = "" if answer.gateway is None else f" via {answer.gateway}"
        table = ""
        if answer.table not in (uapi.RT_TABLE_MAIN, 0):
            table = f", by table {answer.table} (ip rule)"
        return f"the kernel would route them over {name}{via}{table} ({question})"

    def _remedy(self, to: IPv4Address, answer: Answer) -> str:
        """What brings packets for an address back to the device."""
        scene = self._scene
        device = self._indexes.get(scene.device)
        takers = [
            route
            for route in self._table
            if to in route.destination
            and route.destination.prefixlen > scene.network.prefixlen
            and route.indexes != (device,)
        ]
        # A route of the main table is taken for the cause only where that table decided.
        if takers and answer.table in (uapi.RT_TABLE_MAIN, 0):
            return _deletion(max(takers, key=lambda each: each.destination.prefixlen), self._names)
        if scene.is_tunnel and any(route.indexes == (device,) for route in self._table):
            return f"ip rule add priority 1 to {scene.network} lookup main"
        return "see ip rule, ip route"

    @property
    def _names(self) -> Mapping[int, str]:
        return {index: name for name, index in self._indexes.items()}


def _described(route: Route, names: Mapping[int, str]) -> str:
    over = ", ".join(names.get(index, str(index)) for index in route.indexes)
    if not route.is_unicast:
        return f"a {route.kind} route for {route.destination}"
    return f"a route for {route.destination} over {over or 'nothing'}"


def _deletion(route: Route, names: Mapping[int, str]) -> str:
    kind = "" if route.is_unicast else f"{route.kind} "
    over = f" dev {quote(names.get(route.indexes[0], ''))}" if len(route.indexes) == 1 else ""
    return f"ip route del {kind}{route.destination}{over}"


def _inside(subnet: IPv4Network) -> IPv4Address:
    """An address of the subnet that is not its first, if there is another."""
    return subnet.network_address + 1 if subnet.num_addresses > 2 else subnet.broadcast_address
