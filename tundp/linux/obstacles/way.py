"""The way of one packet through this host: rules, routes, neighbours, asked of the kernel.

The same parts as in look.py, for one packet that is named and not for all of the overlay's, and
with what lets it pass as well as with what does not. Changes nothing, sends nothing.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, unique
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from tundp.errors import PlatformError
from tundp.finding import Finding
from tundp.linux import uapi
from tundp.linux.links import Address, Link
from tundp.linux.netlink import Flow, Netlink, NoRoute, Route
from tundp.linux.obstacles import (
    bpf,
    devices,
    firewall,
    ipsec,
    programs,
    remedy,
    rulesets,
    sysctls,
)
from tundp.linux.obstacles.devices import Device
from tundp.linux.obstacles.packet import Match, Packet
from tundp.linux.obstacles.rules import Chain, Kind, Marks, Passage, Stop, Table, bases
from tundp.linux.obstacles.scene import Scene
from tundp.linux.rtnl import attributes

PROTOCOLS: Final[Mapping[str, int]] = {"tcp": 6, "udp": 17, "icmp": 1}
_NDMSG: Final = struct.Struct("=BxxxiHBB")
"""struct ndmsg: family, index of the device, state, flags, type (linux/neighbour.h)."""
_STATES: Final = {
    0x01: "incomplete",
    0x02: "reachable",
    0x04: "stale",
    0x08: "delay",
    0x10: "probe",
    0x20: "failed",
    0x40: "noarp",
    0x80: "permanent",
}
"""linux/neighbour.h: NUD_*."""
_NO_WAY: Final = {
    errno.ENETUNREACH: "there is no route",
    errno.EHOSTUNREACH: 'an "unreachable" route takes it, or this host does not forward',
    errno.EACCES: 'a "prohibit" route takes it',
    errno.EINVAL: 'a "blackhole" route takes it, or its source is refused',
    errno.EXDEV: "its source would be reached by another device (rp_filter)",
}


@unique
class Effect(Enum):
    """What a rule or policy does to the packet."""

    DROPS = "drops"
    MAY_DROP = "may drop"
    ACCEPTS = "accepts"
    DIVERTS = "diverts"
    REWRITES = "rewrites the source of"


@dataclass(frozen=True, slots=True)
class Met:
    """A rule or policy that decides about the packet, and how it is changed."""

    effect: Effect
    hook: str
    where: str
    """Table, chain, and the rule as its own program prints it."""
    kinds: str
    """Which packets: `TCP`, `later packets of a connection`; empty for all that were tried."""
    is_sure: bool
    """Whether that holds for all of them."""
    command: str
    """What lets them pass before it; empty for what does not drop."""


@dataclass(frozen=True, slots=True)
class Walked:
    """What the rules of some hooks do to a packet."""

    met: tuple[Met, ...] = ()
    chains: int = 0
    """Base chains it goes through."""
    ended: frozenset[tuple[str, str]] = frozenset()
    """Protocol and state of the packets that surely end there."""
    left: tuple[Packet, ...] = ()
    """The packets that do not."""
    marks: Marks = field(default_factory=Marks)


@dataclass(frozen=True, slots=True)
class Routed:
    """The kernel's routing decision."""

    question: str
    """The command that asks the same."""
    device: str = ""
    """Empty if there is none."""
    gateway: IPv4Address | None = None
    table: int = uapi.RT_TABLE_MAIN
    mtu: int | None = None
    """The MTU the route names."""
    is_for_host: bool = False
    errno: int = 0

    @property
    def is_main(self) -> bool:
        """Whether the main table decided, and no policy rule before it."""
        return self.table in (uapi.RT_TABLE_MAIN, 0)

    @property
    def words(self) -> str:
        """The answer, for people."""
        if self.errno:
            return _NO_WAY.get(self.errno, errno.errorcode.get(self.errno, str(self.errno)))
        if self.is_for_host:
            return "to this host itself"
        via = "" if self.gateway is None else f"via {self.gateway} "
        table = "" if self.is_main else f" (table {self.table}, ip rule)"
        return f"{via}dev {self.device}{table}"


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An entry of the neighbour table."""

    index: int
    address: IPv4Address
    state: str
    """`reachable`, `stale`, `failed`, ..., as ip-neighbour(8) spells it in capitals."""
    link_address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question about routes. iif: the device the packet comes in by; empty for our own."""

    to: IPv4Address
    source: IPv4Address | None = None
    iif: str = ""
    proto: str = ""
    port: int | None = None
    """The destination's, of TCP and UDP."""
    mark: int = 0

    def __str__(self) -> str:
        text = f"ip route get {self.to}"
        text += "" if self.source is None else f" from {self.source}"
        text += f" iif {self.iif}" if self.iif else ""
        text += f" mark {self.mark:#x}" if self.mark else ""
        text += f" ipproto {self.proto}" if self.proto else ""
        return text + (f" dport {self.port}" if self.proto and self.port else "")


class Way:
    """Questions about one packet. `read` first; then everything is of that moment."""

    def __init__(self, netlink: Netlink) -> None:
        self._netlink = netlink
        self.links: Mapping[str, Link] = {}
        self.addresses: Sequence[Address] = ()
        self.routes: Sequence[Route] = ()
        self.devices: Sequence[Device] = ()
        self.tables: Sequence[Table] = ()
        self.unread: list[str] = []
        """Rules that were not looked at, and why."""
        self._neighbours: Sequence[Neighbour] = ()

    async def read(self) -> None:
        """List devices, addresses, routes, neighbours and rules. PlatformError for the first."""
        netlink = self._netlink
        self.links = {each.name: each for each in await netlink.links()}
        self.addresses = await netlink.addresses()
        self.routes = await netlink.routes()
        self.devices = await devices.read(netlink)
        request = uapi.RTM_GETNEIGH, _NDMSG.pack(socket.AF_INET, 0, 0, 0, 0)
        self._neighbours = await netlink.dump("list neighbours", request, decode_neighbour)
        listed = await rulesets.read()
        self.tables, self.unread = listed.tables, listed.unread

    @property
    def own(self) -> frozenset[IPv4Address]:
        """This host's addresses."""
        return frozenset(each.interface.ip for each in self.addresses)

    def addresses_of(self, device: str) -> list[Address]:
        """The addresses of one device."""
        link = self.links.get(device)
        return [each for each in self.addresses if link is not None and each.index == link.index]

    def name(self, index: int) -> str:
        """The name of a device."""
        return next((each.name for each in self.links.values() if each.index == index), "")

    def pod_devices(self, subnet: IPv4Network, device: str) -> list[str]:
        """Devices of routes inside a subnet, the TUN apart."""
        found = [
            self.name(index)
            for route in self.routes
            if route.is_unicast and route.destination.subnet_of(subnet)
            for index in route.indexes
        ]
        return [name for name in dict.fromkeys(found) if name not in (device, "", "lo")]

    def neighbour(self, address: IPv4Address, device: str) -> Neighbour | None:
        """The entry of an address on a device; None if there is none."""
        link = self.links.get(device)
        return next(
            (
                each
                for each in self._neighbours
                if link is not None and each.index == link.index and each.address == address
            ),
            None,
        )

    async def route(self, asked: Asked) -> Routed:
        """Ask the kernel. PlatformError if it cannot be asked."""
        link = self.links.get(asked.iif)
        flow = Flow(
            source=asked.source,
            is_udp=False,
            proto=PROTOCOLS.get(asked.proto, 0),
            destination_port=(asked.port or 0) if asked.proto in ("tcp", "udp") else 0,
            iif=0 if link is None else link.index,
            mark=asked.mark,
        )
        found = (await self._netlink.lookups([asked.to], flow))[asked.to]
        if isinstance(found, NoRoute):
            return Routed(str(asked), errno=found.errno or errno.EIO)
        return Routed(
            str(asked),
            device=self.name(found.index),
            gateway=found.gateway,
            table=found.table,
            mtu=found.mtu,
            is_for_host=found.kind == "local",
        )

    async def walk(
        self,
        hooks: Sequence[str],
        packets: Sequence[Packet],
        passes: remedy.Passes,
        scene: Scene,
        *,
        is_for_port: bool = False,
    ) -> Walked:
        """Send each kind of packet through the base chains of the hooks, in order.

        is_for_port: whether a packet that is diverted has missed its end, a socket of ours.
        """
        tables = firewall.with_ours(self.tables, scene)
        ways = [each for hook in hooks for each in bases(tables, hook, are_all=True)]
        names = dict.fromkeys(name for each in packets for name in (*each.iif, *each.oif))
        ports = {name: devices.ports(self.devices, (name,)) for name in names}
        walk = _Walk(ports, is_for_port=is_for_port)
        await asyncio.to_thread(walk.send_all, packets, ways)
        return Walked(
            met=tuple([await each.told(passes, packets) for each in walk.found.values()]),
            chains=walk.chains,
            ended=frozenset((each.proto, each.state) for each in walk.ended),
            left=tuple(each for each in packets if each not in walk.ended),
            marks=walk.marks,
        )

    async def others(self, scene: Scene, names: Sequence[str]) -> tuple[list[Finding], list[str]]:
        """What else may drop frames of these devices, and what of it could not be looked at."""
        found = [*devices.vrfs(self.devices, names), *connections(scene)]
        unread = []
        try:
            found += await programs.findings(self._netlink, self.devices, names)
        except PlatformError as error:
            unread.append(f"filters and queues of tc, XDP: {error}")
        try:
            asked = await asyncio.to_thread(bpf.ask, scene, names)
            found += asked.findings
            unread += [asked.refused] if asked.refused else []
        except PlatformError as error:
            unread.append(f"BPF programs: {error}")
        try:
            pods = [name for name in names if name not in (scene.device, scene.uplink)]
            policies = await asyncio.to_thread(ipsec.read)
            found += await asyncio.to_thread(ipsec.findings, policies, scene, pods)
        except PlatformError as error:
            unread.append(f"IPsec policies: {error}")
        return found, unread


@dataclass(slots=True)
class _Place:
    """A rule or policy, and the packets that meet it."""

    effect: Effect
    stop: Stop
    hook: str
    packets: list[tuple[Packet, Match]] = field(default_factory=list)

    async def told(self, passes: remedy.Passes, tried: Sequence[Packet]) -> Met:
        command = ""
        if self.effect in (Effect.DROPS, Effect.MAY_DROP):
            command = remedy.command(self.stop, [(self.hook, passes)])
        if self.effect in (Effect.REWRITES, Effect.DIVERTS):
            # What the first packet of a connection gets, all of it gets.
            tried = [packet for packet in tried if packet.state == "new"]
        return Met(
            effect=self.effect,
            hook=self.hook,
            where=f"{self.stop.table.title}, {await firewall.text_of(self.stop)}",
            kinds=_kinds([packet for packet, _ in self.packets], tried),
            is_sure=all(certainty is Match.YES for _, certainty in self.packets),
            command=command,
        )


class _Walk:
    """The way of several packets; `found` has what decides about them, in order."""

    def __init__(self, ports: Mapping[str, Sequence[str]], *, is_for_port: bool) -> None:
        self.found: dict[tuple[object, ...], _Place] = {}
        self.ended: list[Packet] = []
        self.marks = Marks()
        self.chains = 0
        """Base chains that any of the packets meets."""
        self._ports = ports
        self._is_for_port = is_for_port

    def send_all(self, packets: Sequence[Packet], ways: Sequence[tuple[Table, Chain]]) -> None:
        """Send each, one after the other."""
        for packet in packets:
            self._send(packet, ways)

    def _send(self, packet: Packet, ways: Sequence[tuple[Table, Chain]]) -> None:
        passage = Passage(is_for_port=self._is_for_port)
        chains = 0
        for table, base in ways:
            met = firewall.as_met(table, base, packet, self._ports)
            if met is None:
                continue
            chains += 1
            stops = len(passage.stops)
            passage.accepts = []
            passage.through(table, base, met)
            for stop in passage.accepts:
                self._note_accept(stop, packet, passage)
            for stop in passage.stops[stops:]:
                is_known = stop.certainty is not Match.UNKNOWN
                self._note(Effect.DROPS if is_known else Effect.MAY_DROP, stop, packet)
            if any(stop.certainty is Match.YES for stop in passage.stops[stops:]):
                self.ended.append(packet)
                break
        self.chains = max(self.chains, chains)
        self.marks = self.marks.with_more(passage.marks.possible, passage.marks.sure)

    def _note_accept(self, stop: Stop, packet: Packet, passage: Passage) -> None:
        rule = stop.rule
        if rule is None:
            return
        is_nat = rule.rewrites_source or rule.kind is Kind.DIVERT
        # Only the first packet of a connection meets the tables of NAT, and none that is untracked.
        if is_nat and (packet.state != "new" or passage.untracked is Match.YES):
            return
        if rule.rewrites_source:
            self._note(Effect.REWRITES, stop, packet)
        elif rule.kind is Kind.DIVERT:
            if not self._is_for_port:
                self._note(Effect.DIVERTS, stop, packet)
        else:
            self._note(Effect.ACCEPTS, stop, packet)

    def _note(self, effect: Effect, stop: Stop, packet: Packet) -> None:
        rule = (0, "") if stop.rule is None else (stop.rule.place, stop.rule.text)
        key = (effect, stop.table.title, stop.chain.name, stop.base.hook, *rule)
        place = self.found.setdefault(key, _Place(effect, stop, stop.base.hook))
        place.packets.append((packet, stop.certainty))


def _kinds(met: Sequence[Packet], tried: Sequence[Packet]) -> str:
    """Which of the packets that were tried, in words; empty for all of them."""
    states, protocols = {each.state for each in met}, {each.proto for each in met}
    words = []
    if protocols < {each.proto for each in tried}:
        words.append("/".join(sorted(protocols)).upper())
    if states < {each.state for each in tried}:
        words.append("first packets" if states == {"new"} else "later packets")
        words.append("of a connection")
    return " ".join(words)


def connections(scene: Scene) -> list[Finding]:
    """Whether the connection table has room for another connection."""
    return [each for each in sysctls.findings(scene, ()) if each.id == "obstacle.conntrack"]


def decode_neighbour(body: memoryview) -> Neighbour | None:
    """The entry of an RTM_NEWNEIGH; None for one that is not of IPv4."""
    family, index, state, _, _ = _NDMSG.unpack_from(body)
    values = dict(attributes(body[_NDMSG.size :]))
    address = values.get(uapi.NDA_DST)
    if family != socket.AF_INET or address is None:
        return None
    return Neighbour(
        index=index,
        address=IPv4Address(bytes(address)),
        state=_STATES.get(state, f"{state:#x}"),
        link_address=bytes(values.get(uapi.NDA_LLADDR, b"")).hex(":"),
    )
