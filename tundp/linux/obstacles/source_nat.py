"""Rules of source NAT: those that packets from pod to pod meet, and that packets outwards meet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ipaddress import IPv4Network
from typing import Final, NamedTuple

from tundp.finding import Finding, Verdict
from tundp.linux.obstacles import remedy
from tundp.linux.obstacles.firewall import FROM_PODS, TO_PODS, text_of, trips
from tundp.linux.obstacles.packet import Match, Packet, Range, merged, range_of, ranges_of
from tundp.linux.obstacles.rules import Passage, Stop, Table, bases
from tundp.linux.obstacles.scene import Scene

ID: Final = "masquerade.overlay"
_HOOK: Final = "postrouting"
_THROUGH: Final = ("prerouting", "forward", _HOOK)
_SPECIAL: Final = tuple(
    IPv4Network(each)
    for each in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
        *("172.16.0.0/12", "192.168.0.0/16", "224.0.0.0/3"),
    )
)
"""What is no public address (RFC 6890, RFC 1918, RFC 6598): many rules exempt some of it."""


class Outwards(NamedTuple):
    """What becomes of the source of packets from this node's subnet to public addresses."""

    certainty: Match
    """YES: all get another one; PART: some; NO: none, unless a mark says so."""
    stop: Stop | None = None
    """The first of the rules that give it."""
    by_mark: Stop | None = None
    """Where none is given: a rule that gives one to packets that other rules may mark."""


async def findings(
    tables: Sequence[Table], scene: Scene, pod_devices: Sequence[str]
) -> list[Finding]:
    """Find the rules that rewrite the source address of packets between pods of two nodes."""
    stops: dict[tuple[str, str, str, int], Stop] = {}
    ways: dict[tuple[str, str, str, int], list[str]] = {}
    for trip in trips(scene, pod_devices):
        if trip.name not in (FROM_PODS, TO_PODS):
            continue
        for packet in trip.packets:
            for stop in _rewrites(tables, packet):
                place = 0 if stop.rule is None else stop.rule.place
                key = (stop.table.program, stop.table.name, stop.chain.name, place)
                stops[key] = stop
                if trip.name not in ways.setdefault(key, []):
                    ways[key].append(trip.name)
    return [await _finding(stop, ways[key], scene) for key, stop in stops.items()]


def outwards(
    tables: Sequence[Table], scene: Scene, pod_devices: Sequence[str], out: Sequence[str]
) -> Outwards:
    """Whether packets from this node's subnet to public addresses are masqueraded.

    out: the devices they leave by.
    """
    packets = [
        Packet(
            proto=proto,
            state="new",
            src=(range_of(scene.subnet),),
            dst=_public(scene.network),
            iif=tuple(pod_devices),
            oif=tuple(out),
        )
        for proto in ("tcp", "udp", "icmp")
    ]
    best = [
        max(_sources(tables, each, (_HOOK,)), key=lambda stop: stop.certainty, default=None)
        for each in packets
    ]
    first = max(filter(None, best), key=lambda stop: stop.certainty, default=None)
    if first is None:
        marked = (stop for each in packets for stop in _sources(tables, each, _THROUGH))
        return Outwards(Match.NO, by_mark=next(marked, None))
    least = min(Match.NO if each is None else each.certainty for each in best)
    if least is Match.YES:
        return Outwards(Match.YES, first)
    return Outwards(min(first.certainty, Match.PART), first)


def _public(network: IPv4Network) -> tuple[Range, ...]:
    found, at = [], 0
    for first, last in merged(ranges_of((*_SPECIAL, network))):
        if first > at:
            found.append((at, first - 1))
        at = last + 1
    return tuple(found)


def _rewrites(tables: Sequence[Table], packet: Packet) -> Iterator[Stop]:
    """Where the first packet of a connection gets another source: NAT rules meet no others."""
    if packet.state != "new":
        return
    for stop in _sources(tables, packet, (_HOOK,)):
        # By what is not understood it may be meant for others: services, single pods.
        if stop.certainty > Match.UNKNOWN:
            yield stop


def _sources(tables: Sequence[Table], packet: Packet, hooks: Sequence[str]) -> Iterator[Stop]:
    """Where a packet on its way through hooks gets, or may get, another source."""
    passage = Passage()
    for table, base in (each for hook in hooks for each in bases(tables, hook, are_all=True)):
        passage.accepts = []
        passage.through(table, base, packet)
        for stop in passage.accepts:
            if stop.rule is not None and stop.rule.rewrites_source:
                yield stop


async def _finding(stop: Stop, ways: Sequence[str], scene: Scene) -> Finding:
    command = remedy.command(stop, [(_HOOK, remedy.inside(scene))])
    return Finding(
        id=ID,
        verdict=Verdict.WARN,
        evidence=f"{stop.table.title}, {await text_of(stop)}: gives packets {' and '.join(ways)}"
        " another source address: pods and their policies see this node's, and not the pod's",
        next_step=f"{command}  (connections known keep their address until they end)",
        facts={"command": command},
    )
