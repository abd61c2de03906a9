"""Rules of source NAT that packets from pod to pod meet, and the commands that exempt them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from tundp.finding import Finding, Verdict
from tundp.linux.obstacles import remedy
from tundp.linux.obstacles.firewall import FROM_PODS, TO_PODS, text_of, trips
from tundp.linux.obstacles.packet import Match, Packet
from tundp.linux.obstacles.rules import Passage, Stop, Table, bases
from tundp.linux.obstacles.scene import Scene

ID: Final = "masquerade.overlay"
_HOOK: Final = "postrouting"


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


def _rewrites(tables: Sequence[Table], packet: Packet) -> Iterator[Stop]:
    """Where the first packet of a connection gets another source: NAT rules meet no others."""
    if packet.state != "new":
        return
    for table, base in bases(tables, _HOOK, are_all=True):
        passage = Passage()
        passage.accepts = []
        passage.through(table, base, packet)
        for stop in passage.accepts:
            # By what is not understood it may be meant for others: services, single pods.
            if (
                stop.rule is not None
                and stop.rule.rewrites_source
                and stop.certainty > Match.UNKNOWN
            ):
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
