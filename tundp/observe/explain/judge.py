"""All steps of a packet, in the order it takes them, and what becomes of it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from tundp.observe.explain import host, overlay
from tundp.observe.explain.facts import Direction, Facts, Kind
from tundp.observe.explain.model import Explanation, Ruling, Step, Verdict

_TUNNEL: Final = "tunnel-firewall"

Steps = Callable[[Facts], Iterator[Step]]


def _inner_firewall(facts: Facts) -> Iterator[Step]:
    way = facts.inner
    if way is not None and way.route is None:
        step = Step(
            id="firewall",
            title="firewall",
            ruling=Ruling.UNKNOWN,
            evidence=f"not looked at, as its devices are not known: {way.why_not}",
        )
        return iter((step,))
    return host.firewall(facts, None if way is None else way.walked)


def _tunnel_firewall(facts: Facts) -> Iterator[Step]:
    walked = None if facts.tunnel is None else facts.tunnel.walked
    return host.firewall(facts, walked, _TUNNEL, "tunnel firewall (UDP)")


_ENCAP: Final[Sequence[Steps]] = (
    host.sides,
    host.pod,
    host.route,
    _inner_firewall,
    host.masquerade,
    overlay.lease,
    overlay.size,
    overlay.chaos,
    host.underlay,
    _tunnel_firewall,
    host.others,
    overlay.traffic,
    overlay.receiver,
)
_DECAP: Final[Sequence[Steps]] = (
    host.sides,
    overlay.traffic,
    host.underlay,
    _tunnel_firewall,
    overlay.decapsulated,
    host.route,
    _inner_firewall,
    host.masquerade,
    host.others,
    host.pod,
)
_ROUTED: Final[Sequence[Steps]] = (
    host.sides,
    host.pod,
    host.route,
    _inner_firewall,
    host.masquerade,
    host.others,
)
_ORDER: Final = {
    Direction.ENCAP: _ENCAP,
    Direction.DECAP: _DECAP,
    Direction.ROUTED: _ROUTED,
    Direction.ELSEWHERE: (host.sides,),
}


def explain(facts: Facts) -> Explanation:
    """Judge a packet by what was looked at."""
    steps = [step for each in _ORDER[facts.direction] for step in each(facts)]
    verdict, summary, command, words = _verdict(facts, steps)
    return Explanation(
        question=facts.question,
        direction=facts.direction.value,
        leases_of=facts.leases_of,
        steps=steps,
        verdict=verdict,
        summary=summary,
        command=command,
        words=words,
        not_looked_at=tuple(_limits(facts)),
    )


def _verdict(facts: Facts, steps: Sequence[Step]) -> tuple[Verdict, str, str, str]:
    for number, step in enumerate(steps, 1):
        if step.ruling is Ruling.DROP:
            summary = f"step {number}, {step.title}: {step.evidence}"
            return Verdict.DROPPED, summary, step.command, step.words
    if facts.direction is Direction.ELSEWHERE:
        return Verdict.UNKNOWN, _elsewhere(facts), "", _there(facts)
    unknown = [
        f"step {number}, {step.title}"
        for number, step in enumerate(steps, 1)
        if step.ruling is Ruling.UNKNOWN
    ]
    if unknown:
        return Verdict.UNKNOWN, f"nothing seen drops it; unknown: {'; '.join(unknown)}", "", ""
    return Verdict.DELIVERED, _delivered(facts), "", ""


def _delivered(facts: Facts) -> str:
    way, peer = facts.inner, facts.peer
    if facts.direction is Direction.ENCAP and peer is not None:
        what = "in a datagram " if facts.is_tunnel else ""
        return f"sent {what}to {peer.endpoint}, the node of {peer.subnet}"
    if way is not None and way.is_for_host:
        return "delivered to this host"
    device = "" if way is None or way.route is None else way.route.device
    if facts.direction is Direction.DECAP:
        return f"delivered over {device}"
    return f"routed over {device}: the overlay has no part in it"


def _elsewhere(facts: Facts) -> str:
    if facts.source.kind is Kind.POD:
        return "both are pods of this node: the bridge carries it, which is not looked at"
    if facts.source.row is not None:
        return "it does not pass this node: its source is another node's"
    return "neither end is this node's"


def _there(facts: Facts) -> str:
    row = facts.source.row
    if row is None or facts.source.kind is Kind.POD:
        return ""
    question = facts.question
    return f"on {row.public_ip}: tundp explain {question.source} {question.destination}"


def _limits(facts: Facts) -> Iterator[str]:
    """What else it depends on, and nobody can see from here."""
    question = facts.question
    if facts.source.kind is Kind.POD:
        yield "the routes and rules inside the pod that sends it"
    if facts.destination.kind is Kind.POD:
        yield "the rules inside the pod that gets it, and whether anything listens there"
    if facts.direction is Direction.ENCAP and (peer := facts.peer) is not None:
        yield "the underlay between the nodes, and its firewalls"
        if facts.is_tunnel and overlay.measured(facts).startswith("not"):
            yield f"whether the path carries datagrams so large: {overlay.measured(facts)}"
        yield (
            f"what {peer.public_ip} does with it: there,"
            f" tundp explain {question.source} {question.destination}"
        )
    if facts.direction is Direction.ROUTED and not facts.destination.kind.is_here:
        yield "the way beyond this host"
    if facts.inner is not None:
        yield "connections that conntrack knows: they keep the NAT they began with (conntrack -L)"
    if facts.inner is not None or facts.tunnel is not None:
        yield "programs attached to netfilter's hooks by BPF links: no list of them names a hook"
