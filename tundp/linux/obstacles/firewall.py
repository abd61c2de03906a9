"""Rules in the way of the overlay's packets, each with the command that lets them pass."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Network
from pathlib import Path
from types import MappingProxyType
from typing import Final

from tundp.finding import Finding, Verdict
from tundp.linux.obstacles import remedy
from tundp.linux.obstacles.packet import (
    Address,
    Match,
    Packet,
    Range,
    range_at,
    range_of,
    ranges_of,
)
from tundp.linux.obstacles.rules import (
    Chain,
    Kind,
    Marks,
    Passage,
    Rule,
    Stop,
    Table,
    bases,
)
from tundp.linux.obstacles.rulesets import Rulesets, rule_text
from tundp.linux.obstacles.scene import NOT_JUDGED, Scene

ID: Final = "obstacle.firewall"
SHOWN: Final = 6
"""Rules that are named; of the rest their number is."""
_POLICIES: Final = re.compile(r"^(KUBE-(POD-FW|NWPLCY|ROUTER)|cali[-_]|felix|WEAVE-NPC|CILIUM)")
"""Chains of programs that carry out what somebody declared for single pods."""
_BRIDGED_IN: Final = ("bridge prerouting", "bridge input")
_BRIDGED_OUT: Final = ("bridge output", "bridge postrouting")
IN: Final = ("ingress", *_BRIDGED_IN, "prerouting", "input")
OUT: Final = ("output", "postrouting", *_BRIDGED_OUT, "egress")
THROUGH: Final = (*IN[:-1], "forward", *OUT[1:])
_ARP_IN: Final = ("ingress", *_BRIDGED_IN, "arp input")
_ARP_OUT: Final = ("arp output", *_BRIDGED_OUT, "egress")
"""Hooks in the order packets meet them; those of a bridge if the device is one."""
HOOKS: Final = tuple(dict.fromkeys((*IN, "forward", *OUT, *_ARP_IN, *_ARP_OUT)))
_CLIENT_PORTS: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
_USUAL_CLIENT_PORTS: Final = (32768, 60999)
_WAYS: Final = {Match.YES: "drops", Match.PART: "drops some of the", Match.UNKNOWN: "may drop"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trip:
    """A way packets of the overlay take through this host."""

    name: str
    hooks: tuple[str, ...]
    packets: tuple[Packet, ...]
    passes: remedy.Passes
    """What lets them pass, by hook."""
    is_for_port: bool = False
    """Whether they are for the port of the daemon's socket, or that of a peer's."""


@dataclass(slots=True)
class Found:
    """A rule or policy, and the packets that may end there, by trip."""

    stop: Stop
    trips: dict[tuple[str, str], Trip] = field(default_factory=dict)
    """Also by hook."""
    packets: dict[str, list[tuple[Packet, Match]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Judged:
    """What the rules do to the overlay's packets."""

    found: list[Found]
    """Every rule and policy at which any of them may end."""
    marks: Mapping[str, Marks]
    """What rules may have marked them with when they are routed, by trip."""
    elsewhere: Sequence[str]
    """Chains that drop frames of other devices, through which packets may come."""


TO_PODS: Final = "from peers to pods here"
FROM_PODS: Final = "from pods here to peers"
FROM_HOST: Final = "from this host to peers"
TUNNEL_OUT: Final = "of the tunnel (UDP) to peers"


def trips(scene: Scene, pod_devices: Sequence[str]) -> list[Trip]:
    """Every way of the overlay's packets, and the packets to try on it."""
    device, uplink, pods = (scene.device,), (scene.uplink,), tuple(pod_devices)
    inside = ranges_of(peer.subnet for peer in scene.peers) or (range_of(scene.network),)
    own = (range_of(scene.subnet),)
    found = [
        Trip(
            name=TO_PODS,
            hooks=THROUGH,
            packets=_packets(inside, own, iif=device, oif=pods),
            passes=remedy.to_pods(scene),
        ),
        Trip(
            name=FROM_PODS,
            hooks=THROUGH,
            packets=_packets(own, inside, iif=pods, oif=device),
            passes=remedy.from_pods(scene),
        ),
    ]
    if not scene.is_tunnel:
        return found
    here = (range_at(scene.address),)
    there = tuple(range_at(peer.public_ip) for peer in scene.peers)
    everywhere: tuple[Range, ...] = there or (range_of(IPv4Network("0.0.0.0/0")),)
    host = (range_at(scene.tunnel_address),)
    return [
        *found,
        Trip(
            name=TUNNEL_OUT,
            hooks=OUT,
            packets=_datagrams(here, everywhere, scene.port, oif=uplink, is_from_host=True),
            passes=remedy.tunnel(scene),
            is_for_port=True,
        ),
        Trip(
            name="of the tunnel (UDP) from peers",
            hooks=IN,
            packets=_datagrams(everywhere, here, scene.port, iif=uplink, is_for_host=True),
            passes=remedy.tunnel(scene),
            is_for_port=True,
        ),
        Trip(
            name=FROM_HOST,
            hooks=OUT,
            packets=_packets(host, inside, oif=device, is_from_host=True),
            passes=remedy.from_pods(scene),
        ),
        Trip(
            name="from peers in answer to this host",
            hooks=IN,
            packets=tuple(
                replace(packet, client_ports=client_ports())
                for packet in _packets(inside, host, iif=device, is_for_host=True)
                if packet.state == "established"
            ),
            passes=remedy.to_pods(scene),
        ),
    ]


def client_ports(path: Path = _CLIENT_PORTS) -> Range:
    """The ports the kernel gives to connections of this host (ip_local_port_range), inclusive."""
    try:
        first, last = map(int, path.read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return _USUAL_CLIENT_PORTS
    return first, last


def _packets(
    src: tuple[Range, ...],
    dst: tuple[Range, ...],
    *,
    iif: tuple[str, ...] = (),
    oif: tuple[str, ...] = (),
    is_for_host: bool = False,
    is_from_host: bool = False,
) -> tuple[Packet, ...]:
    return tuple(
        Packet(
            proto=proto,
            state=state,
            src=src,
            dst=dst,
            iif=iif,
            oif=oif,
            is_for_host=is_for_host,
            is_from_host=is_from_host,
        )
        for proto in ("tcp", "udp", "icmp")
        for state in ("new", "established")
    )


def _datagrams(
    src: tuple[Range, ...],
    dst: tuple[Range, ...],
    port: int | None,
    *,
    iif: tuple[str, ...] = (),
    oif: tuple[str, ...] = (),
    is_for_host: bool = False,
    is_from_host: bool = False,
) -> tuple[Packet, ...]:
    whole = _packets(src, dst, iif=iif, oif=oif, is_for_host=is_for_host, is_from_host=is_from_host)
    return tuple(replace(packet, port=port) for packet in whole if packet.proto == "udp")


def _neighbours(scene: Scene, pod_devices: Sequence[str]) -> list[Trip]:
    """ARP, without which nothing finds its way on an Ethernet."""
    found = []
    sides = [("pods", pod_devices, (range_of(scene.subnet),))] if pod_devices else []
    if scene.is_tunnel:
        sides.append(("the underlay", (scene.uplink,), (range_of(IPv4Network("0.0.0.0/0")),)))
    for name, devices, addresses in sides:
        for way, hooks in (("from", _ARP_IN), ("to", _ARP_OUT)):
            is_in = way == "from"
            packet = Packet(
                proto="arp",
                state="new",
                src=addresses,
                dst=addresses,
                iif=tuple(devices) if is_in else (),
                oif=() if is_in else tuple(devices),
            )
            found.append(
                Trip(
                    name=f"of ARP {way} {name}",
                    hooks=hooks,
                    packets=(packet,),
                    passes=remedy.neighbours,
                )
            )
    return found


def judge(
    rulesets: Rulesets,
    scene: Scene,
    pod_devices: Sequence[str],
    ports: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Judged:
    """Walk every kind of packet of the overlay through the rules. ports: those of each bridge."""
    tables = with_ours(rulesets.tables, scene)
    found: dict[tuple[str, str, str, str, int, str], Found] = {}
    marks: dict[str, Marks] = {}
    for trip in (*trips(scene, pod_devices), *_neighbours(scene, pod_devices)):
        ways = [each for hook in trip.hooks for each in bases(tables, hook)]
        for packet in trip.packets:
            passage = Passage(is_for_port=trip.is_for_port)
            for table, base in ways:
                if (met := as_met(table, base, packet, ports)) is not None:
                    passage.through(table, base, met)
            marks[trip.name] = marks.get(trip.name, Marks()).with_more(
                passage.marks.possible, passage.marks.sure
            )
            for stop in passage.stops:
                place = (0, "") if stop.rule is None else (stop.rule.place, stop.rule.text)
                table = stop.table
                key = (table.program, table.family, table.name, stop.chain.name, *place)
                each = found.setdefault(key, Found(stop))
                each.trips[trip.name, stop.base.hook] = trip
                each.packets.setdefault(trip.name, []).append((packet, stop.certainty))
    devices = {scene.device, scene.uplink, *pod_devices}
    elsewhere = [
        f"{table.family} {table.name} {base.name} ({base.hook} of {', '.join(base.devices)})"
        for hook in ("ingress", "egress")
        for table, base in bases(tables, hook)
        if devices.isdisjoint(base.devices)
    ]
    return Judged(list(found.values()), marks, elsewhere)


def as_met(
    table: Table, base: Chain, packet: Packet, ports: Mapping[str, Sequence[str]]
) -> Packet | None:
    """The packet as a base chain meets it; None if none of the kind comes by it."""
    is_in = base.hook in ("ingress", *_BRIDGED_IN)
    devices = packet.iif if is_in else packet.oif
    if base.hook in ("ingress", "egress"):
        # Of inet, these hooks let pass whatever is not IP (nft_do_chain_inet_ingress).
        is_unseen = packet.proto == "arp" and table.family == "inet"
        return None if is_unseen or {*base.devices}.isdisjoint(devices) else packet
    if not base.hook.startswith("bridge "):
        return packet
    bridged = tuple(port for device in devices for port in ports.get(device, ()))
    if not bridged:
        return None
    return replace(packet, iif=bridged if is_in else (), oif=() if is_in else bridged)


def with_ours(tables: Sequence[Table], scene: Scene) -> list[Table]:
    """The tables with the rules a start would append to FORWARD, if no daemon has."""
    if scene.is_open or not scene.accepts:
        return list(tables)
    ours = tuple(
        Rule(
            text="flannel's accept",
            tests=(Address(is_source, (range_of(scene.network),)),),
            kind=Kind.ACCEPT,
        )
        for is_source in (True, False)
    )

    def appended(table: Table) -> Table:
        forward = table.chains.get("FORWARD")
        if (table.program, table.name) != ("iptables", "filter") or forward is None:
            return table
        more = replace(forward, rules=(*forward.rules, *ours))
        return replace(table, chains={**table.chains, "FORWARD": more})

    return [appended(table) for table in tables]


async def findings(scene: Scene, judged: Judged) -> list[Finding]:
    """The findings of `judge`, the certain ones first."""
    ordered = sorted(judged.found, key=lambda each: -_certainty(each))
    made = [await _finding(each, scene) for each in ordered[:SHOWN]]
    if (more := len(ordered) - SHOWN) > 0:
        made.append(
            Finding(
                id=ID,
                verdict=Verdict.WARN,
                evidence=f"{more} more rules are, or may be, in the way",
                next_step="deal with those named, and look again",
            )
        )
    if odd := judged.elsewhere:
        made.append(
            Finding(
                id="obstacle.hooks",
                verdict=Verdict.NOTE,
                evidence="they may drop frames, before or below other rules:"
                f" {', '.join(odd[:SHOWN])}",
                meaning=NOT_JUDGED,
            )
        )
    return made


async def _finding(found: Found, scene: Scene) -> Finding:
    stop = found.stop
    text = await text_of(stop)
    is_policy = _POLICIES.match(stop.chain.name) is not None
    effects = [_effect(name, packets, found) for name, packets in found.packets.items()]
    command = remedy.command(stop, [(hook, trip.passes) for (_, hook), trip in found.trips.items()])
    lasting = remedy.lasting(stop, scene, text)
    return Finding(
        id=ID,
        verdict=Verdict.NOTE if is_policy else Verdict.WARN,
        evidence=f"{stop.table.title}, {text}: {'; '.join(effects)}",
        next_step="" if is_policy else f"{command}{f'  ({lasting})' if lasting else ''}",
        meaning="a policy for single pods" if is_policy else "",
        facts={} if is_policy else {"command": command},
    )


async def text_of(stop: Stop) -> str:
    """The rule as its own program prints it."""
    if stop.rule is None:
        return f"policy drop of chain {stop.base.name}"
    if stop.table.program != "nft":
        return f"rule {stop.rule.place} of {stop.chain.name}: {stop.rule.text}"
    text = await rule_text(stop.table, stop.chain.name, stop.rule.place)
    return f"chain {stop.chain.name}: {text or stop.rule.text[:200]}"


def _certainty(found: Found) -> int:
    return max(certainty for each in found.packets.values() for _, certainty in each)


def _effect(name: str, packets: Sequence[tuple[Packet, Match]], found: Found) -> str:
    """What it does to the packets of one trip, in words."""
    certainty = max(certainty for _, certainty in packets)
    states = {packet.state for packet, _ in packets}
    protocols = {packet.proto for packet, _ in packets}
    tried = next(trip for trip in found.trips.values() if trip.name == name).packets
    rule = found.stop.rule
    way = "diverts" if rule is not None and rule.kind is Kind.DIVERT else _WAYS[certainty]
    kinds = "packets"
    if protocols < {packet.proto for packet in tried}:
        kinds = f"{'/'.join(sorted(protocols)).upper()} {kinds}"
    if states < {packet.state for packet in tried}:
        is_new = states == {"new"}
        kinds = f"{'first' if is_new else 'later'} {kinds} of a connection"
    return f"{way} {kinds} {name}"
