"""Steps of the kernel: sides, routes, rules, masquerade, neighbours. Facts in, steps out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address
from shlex import quote
from typing import Final

from tundp.finding import Finding
from tundp.finding import Verdict as FindingVerdict
from tundp.linux.obstacles.scene import NOT_JUDGED
from tundp.linux.obstacles.way import Effect, Met, Neighbour, Walked
from tundp.observe.explain.facts import Direction, Facts, Kind, Pass, Place
from tundp.observe.explain.model import Ruling, Step

SHOWN: Final = 3
"""Rules that are named in one step; of the rest their number is."""
_UNANSWERED: Final = ("failed", "incomplete")
_TO: Final = re.compile(r"(?:--to-source|snat (?:ip )?to) (\d+\.\d+\.\d+\.\d+)")


def sides(facts: Facts) -> Iterator[Step]:
    """Whose source and destination are."""
    for name, place in (("source", facts.source), ("destination", facts.destination)):
        yield Step(id=name, title=name, ruling=Ruling.NOTE, evidence=_whose(place, facts))


def _whose(place: Place, facts: Facts) -> str:
    row, network = place.row, facts.leases.network
    text = f"{place.address}: {place.kind.value}"
    if place.kind is Kind.POD:
        return f"{text}, subnet {facts.leases.subnet}"
    if row is not None and place.kind is Kind.PEER_HOST:
        return f"{text}, the PublicIP of {row.subnet}"
    if row is not None:
        return f"{text}: {row.subnet} at {row.endpoint}"
    if place.kind is Kind.NO_LEASE:
        return f"{text}, inside the network {network}"
    if place.kind is Kind.OUTSIDE and network is not None:
        return f"{text} {network}"
    return text


def pod(facts: Facts) -> Iterator[Step]:
    """The bridge, or whatever leads to this node's pods."""
    place = next(
        (each for each in (facts.source, facts.destination) if each.kind is Kind.POD), None
    )
    if place is None:
        return
    title = "pod's bridge"
    if not facts.pods:
        way = f" ({facts.pod_route})" if facts.pod_route else ""
        yield Step(
            id="pod",
            title=title,
            ruling=Ruling.DROP,
            evidence=f"no device of pods leads to {place.address}{way}: there is no bridge (cni0,"
            f" docker0), it is down, or its subnet is not {facts.leases.subnet} of subnet.env",
            command=f"ip -4 route show root {facts.leases.subnet}",
        )
        return
    device = facts.pods[0]
    if not facts.pods_up:
        yield Step(
            id="pod",
            title=title,
            ruling=Ruling.DROP,
            evidence=f"{device} is down",
            command=f"ip link set {quote(device)} up",
        )
        return
    entry = facts.pod_neighbour
    is_deaf = entry is not None and entry.state in _UNANSWERED
    yield Step(
        id="pod",
        title=title,
        ruling=Ruling.WARN if is_deaf else Ruling.OK,
        evidence=f"{device}{f' ({facts.gateway})' if facts.gateway else ''}; {_arp(place, entry)}",
        command=f"ip neigh get {place.address} dev {quote(device)}" if is_deaf else "",
    )


def _arp(place: Place, entry: Neighbour | None) -> str:
    if entry is None:
        return f"nothing is known of {place.address}'s link address yet"
    if entry.state in _UNANSWERED:
        return f"{place.address} did not answer ARP ({entry.state}): is there such a pod?"
    return f"{place.address} is at {entry.link_address or '(no address)'} ({entry.state})"


def route(facts: Facts) -> Iterator[Step]:
    """Where the kernel sends the inner packet."""
    way = facts.inner
    if way is None:
        return
    title = "host route"
    if way.forwarding_switch:
        yield Step(
            id="forwarding",
            title="forwarding",
            ruling=Ruling.DROP,
            evidence=f"{way.forwarding_switch} is 0: this host forwards nothing that comes in by"
            f" {way.iif}",
            command=f"sysctl -w {quote(way.forwarding_switch)}=1",
        )
        # Without it the kernel answers every question with an error.
        if way.route is None or way.route.errno:
            return
    found = way.route
    if found is None:
        yield Step(id="route", title=title, ruling=Ruling.UNKNOWN, evidence=way.why_not)
        return
    ruling, words, command = Ruling.OK, found.words, ""
    if found.errno:
        ruling, words, command = _refused(way)
    elif way.is_for_host != found.is_for_host or (
        way.wanted and not found.is_for_host and found.device not in way.wanted
    ):
        wanted = "this host" if way.is_for_host else " or ".join(way.wanted)
        ruling, command = Ruling.DROP, way.mender
        words = f"{words}, and not to {wanted}"
    elif way.wanted_gateway is not None and found.gateway != way.wanted_gateway:
        ruling, command = Ruling.DROP, way.mender
        words = f"{words}, and not to {way.wanted_gateway}"
    elif not way.is_link_up:
        ruling, command = Ruling.DROP, f"ip link set {quote(found.device)} up"
        words = f"{words}, which is down"
    yield Step(
        id="route",
        title=title,
        ruling=ruling,
        evidence=f"{words} ({found.question})",
        command=command,
    )


def _refused(way: Pass) -> tuple[Ruling, str, str]:
    """Why there is no way for the packet."""
    assert way.route is not None
    if way.iif and way.unchecked is not None and not way.unchecked.errno:
        if way.rp_filter:
            return (
                Ruling.DROP,
                f"rp_filter is {way.rp_filter} on {way.iif}: the kernel would not reach the source"
                f" by {way.iif}, and drops the packet",
                f"sysctl -w {quote(f'net/ipv4/conf/{way.iif}/rp_filter')}"
                f"={2 if way.rp_filter == 1 else 0}",
            )
        return (
            Ruling.DROP,
            f"the kernel refuses the packet's source on {way.iif}: {way.route.words}",
            "",
        )
    return Ruling.DROP, way.route.words, way.mender


def firewall(
    facts: Facts, walked: Walked | None, step_id: str = "firewall", title: str = "firewall"
) -> Iterator[Step]:
    """Rules that drop the packet, or accept it."""
    if walked is None:
        return
    bad = [each for each in walked.met if each.effect in (Effect.DROPS, Effect.MAY_DROP)]
    turned = [each for each in walked.met if each.effect is Effect.DIVERTS]
    unread = "; ".join(facts.unread_rules)
    first = next(iter([*bad, *turned]), None)
    if first is None:
        ruling = Ruling.UNKNOWN if unread else Ruling.OK
        evidence = _accepted(walked)
    else:
        ruling = _ruling(walked, bad, turned)
        evidence = _named([*bad, *turned])
    if unread:
        evidence += f"; not looked at: {unread}"
        ruling = Ruling.UNKNOWN if ruling is Ruling.WARN else ruling
    yield Step(
        id=step_id,
        title=title,
        ruling=ruling,
        evidence=evidence,
        command="" if first is None else first.command,
    )


def _ruling(walked: Walked, bad: Sequence[Met], turned: Sequence[Met]) -> Ruling:
    """Of rules that drop or divert something."""
    first_packets = {proto for proto, state in walked.ended if state == "new"}
    left = {each.proto for each in walked.left if each.state == "new"}
    if first_packets and not left:
        return Ruling.DROP
    # What gets another destination does not arrive where it was asked for.
    if turned or any(each.effect is Effect.MAY_DROP for each in bad):
        return Ruling.UNKNOWN
    return Ruling.WARN


def _named(met: Sequence[Met]) -> str:
    words = [f"{each.where} {_does(each)}" for each in met[:SHOWN]]
    more = len(met) - SHOWN
    return "; ".join([*words, f"and {more} more"] if more > 0 else words)


def _does(met: Met) -> str:
    kinds = f" {met.kinds}" if met.kinds else " it"
    some = "" if met.is_sure or met.effect is Effect.MAY_DROP else " some of"
    if met.effect is Effect.DIVERTS:
        return f"gives{some}{kinds} another destination: explain that one, too"
    return f"{met.effect.value}{some}{kinds}"


def _accepted(walked: Walked) -> str:
    accepts = [each for each in walked.met if each.effect is Effect.ACCEPTS]
    count = f"none of {walked.chains} base chains drops it"
    if not walked.chains:
        return "no rules at its hooks"
    return f"{count}; {_named(accepts)}" if accepts else count


def masquerade(facts: Facts) -> Iterator[Step]:
    """Whether the packet leaves with another source, and by which rule."""
    way = facts.inner
    if way is None or way.walked is None or way.is_for_host:
        return
    rules = [each for each in way.walked.met if each.effect is Effect.REWRITES]
    unread = "; ".join(facts.unread_rules)
    title = "masquerade"
    if not rules:
        evidence = "not applied: no rule gives it another source"
        if unread:
            evidence += f"; not looked at: {unread}"
        ruling = Ruling.UNKNOWN if unread else Ruling.OK
        yield Step(id="masquerade", title=title, ruling=ruling, evidence=evidence)
        return
    rule = rules[0]
    source = masqueraded(facts)
    as_what = f"the source becomes {source}" if source else "it gets another source"
    # Between pods flannel keeps addresses; whoever hides them breaks policies by address.
    is_odd = facts.source.kind is Kind.POD and facts.destination.kind is Kind.PEER_POD
    is_odd = is_odd or (facts.direction is Direction.DECAP and facts.source.kind is Kind.PEER_POD)
    some = "" if rule.is_sure and not rule.kinds else f" (for {rule.kinds or 'some'})"
    yield Step(
        id="masquerade",
        title=title,
        ruling=Ruling.WARN if is_odd else Ruling.NOTE,
        evidence=f"{as_what}{some}, by {rule.where}",
    )


def masqueraded(facts: Facts) -> IPv4Address | None:
    """The source the packet leaves with, if a rule changes it and it can be told."""
    way = facts.inner
    if way is None or way.walked is None:
        return None
    for each in way.walked.met:
        if each.effect is Effect.REWRITES:
            named = _TO.search(each.where)
            return IPv4Address(named[1]) if named else way.masqueraded_as
    return None


def others(facts: Facts) -> Iterator[Step]:
    """Filters, programs and policies below the rules."""
    title = "tc, XDP, BPF, IPsec"
    unread = "; ".join(facts.unread_others)
    if not facts.others:
        yield Step(
            id="filters",
            title=title,
            ruling=Ruling.UNKNOWN if unread else Ruling.OK,
            evidence=f"not looked at: {unread}" if unread else "none on its devices",
        )
    for each in facts.others:
        yield Step(
            id="filters",
            title=title,
            ruling=_of_finding(each),
            evidence=each.evidence,
            command=each.facts.get("command", ""),
        )


def _of_finding(finding: Finding) -> Ruling:
    """What drops some packets of the overlay may drop this one: nobody has asked about it alone."""
    is_harmless = finding.verdict in (FindingVerdict.OK, FindingVerdict.NOTE)
    return Ruling.NOTE if is_harmless and finding.meaning != NOT_JUDGED else Ruling.UNKNOWN


def underlay(facts: Facts) -> Iterator[Step]:
    """The datagram to the peer, or from it, in this host's kernel."""
    tunnel, peer = facts.tunnel, facts.peer
    if tunnel is None or peer is None:
        return
    if facts.direction is Direction.DECAP:
        yield from _from_peer(facts)
        return
    found = tunnel.route
    assert found is not None
    ruling, words, command = Ruling.OK, found.words, ""
    if found.errno:
        ruling, command = Ruling.DROP, f"ip route get {peer.public_ip}"
    elif facts.is_tunnel and found.device == facts.device:
        ruling, words = Ruling.DROP, f"{words}: the datagram would enter the tunnel again"
        command = f"ip rule add priority 1 to {peer.public_ip} lookup main"
    elif found.is_for_host:
        ruling, words = Ruling.DROP, f"{words}: it would come back"
    yield Step(
        id="underlay",
        title="underlay route",
        ruling=ruling,
        evidence=f"{words} ({found.question})",
        command=command,
        reason="send_unreachable" if found.errno else "",
    )
    if ruling is Ruling.OK:
        yield _neighbour(facts)


def _neighbour(facts: Facts) -> Step:
    assert facts.tunnel is not None and facts.tunnel.route is not None
    entry, hop = facts.tunnel.neighbour, facts.tunnel.next_hop
    device = facts.tunnel.route.device
    ruling, command = Ruling.OK, ""
    if entry is None:
        ruling, words = Ruling.NOTE, f"{hop} has no entry: the first packet asks for it by ARP"
    elif entry.state in _UNANSWERED:
        ruling, words = Ruling.WARN, f"{hop} did not answer ARP ({entry.state}): is the host up?"
        command = f"ip neigh get {hop} dev {quote(device)}"
    else:
        words = f"{hop} is at {entry.link_address or '(no address)'} ({entry.state})"
        if entry.state == "permanent":
            # The right one, or that of a card long gone: nobody can tell from here.
            ruling, command = Ruling.UNKNOWN, f"ip neigh del {hop} dev {quote(device)}"
            words += ": somebody has fixed it"
    return Step(
        id="neighbour",
        title="underlay neighbour",
        ruling=ruling,
        evidence=f"{words}, on {device}",
        command=command,
    )


def _from_peer(facts: Facts) -> Iterator[Step]:
    """Whether the kernel lets datagrams of the peer in."""
    assert facts.tunnel is not None
    found = facts.tunnel.back
    if found is None:
        return
    ruling, words, command = Ruling.OK, "the kernel takes datagrams from it", ""
    if found.errno or not found.is_for_host:
        ruling = Ruling.DROP
        words = f"the kernel would drop datagrams from it: {found.words}"
        if facts.tunnel.rp_filter:
            words += f"; rp_filter is {facts.tunnel.rp_filter}"
            command = f"sysctl -w {quote(f'net/ipv4/conf/{facts.uplink}/rp_filter')}=2"
    yield Step(
        id="underlay",
        title="underlay, inwards",
        ruling=ruling,
        evidence=f"{words} ({found.question})",
        command=command,
    )
