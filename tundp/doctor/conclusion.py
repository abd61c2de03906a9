"""What the layers of a peer come to: one sentence, and what to do. Decides, asks nobody."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from tundp.doctor.peers import Look, narrow, on_its_side, on_our_side
from tundp.finding import Verdict
from tundp.linux.netlink import RouteLookup
from tundp.observe.ping import Answer, Layer, LayerId, Outcome, PathSize, PingedPeer, Series
from tundp.observe.status import ChaosStatus
from tundp.wire.overhead import OVERHEAD


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything that is known of a peer after it was asked."""

    peer: PingedPeer
    layers: Mapping[LayerId, Layer]
    uplink: str
    """The interface to the other nodes."""
    has_tun: bool = True
    """Whether the backend has one: host-gw has not."""
    ours: tuple[str, str] = ("", "")
    """What of this node keeps packets from the overlay, and what to do; empty if nothing does."""
    look: Look | None = None
    """The kernel's way to it; None if it could not be looked up."""
    is_heard: bool = False
    """Whether datagrams came from it while it was asked."""
    series: Series | None = None
    path: PathSize | None = None
    daemon: str = ""
    """Why this node's daemon could not be asked; empty if it could."""
    chaos: ChaosStatus | None = None
    """What `tundp chaos` of this node does to packets to it."""

    def answer(self, layer: LayerId) -> Answer:
        """What came back from a layer."""
        found = self.layers.get(layer)
        return Answer.NOT_ASKED if found is None else found.answer

    def evidence(self, layer: LayerId) -> str:
        """What was seen of a layer besides."""
        found = self.layers.get(layer)
        return "" if found is None else found.evidence


class Conclusion(NamedTuple):
    """What it comes to."""

    outcome: Outcome
    text: str
    """One sentence without a full stop."""
    next_step: str = ""


def conclude(facts: Facts) -> Conclusion:
    """The first of what explains most. Nobody is blamed for what may be this node's chaos."""
    found = _conclude(facts)
    if facts.chaos is None or found.outcome is Outcome.OK or found == _ours(facts):
        return found
    return Conclusion(
        found.outcome,
        f"{facts.chaos.on_purpose}; while it lasts, nothing is known of that node from what is"
        f" lost; {_seen(facts)}",
        f"{facts.chaos.stop}; tundp ping {facts.peer.public_ip}",
    )


def _conclude(facts: Facts) -> Conclusion:
    if not facts.has_tun and not facts.daemon:
        return _without_tunnel(facts)
    if facts.answer(LayerId.TUN) is Answer.ANSWERED:
        return _answering(facts)
    if facts.daemon:
        known = _on_the_way(facts)
        text = f"no daemon answers here, so nothing was asked through the overlay; {known.text}"
        step = f"{facts.daemon}{f'; then {known.next_step}' if known.next_step else ''}"
        return Conclusion(Outcome.OVERLAY, text, step)
    return _ours(facts) or _behind_its_daemon(facts) or _on_the_way(facts)


def _who(facts: Facts) -> str:
    return str(facts.peer.subnet or facts.peer.public_ip)


def _answering(facts: Facts) -> Conclusion:
    who, there = _who(facts), facts.peer.public_ip
    path, series = facts.path, facts.series
    if path is not None and path.is_black_hole:
        lost = path.device_mtu if path.daemon_mtu is None else path.daemon_mtu
        assert path.largest is not None
        mtu = path.largest + OVERHEAD
        step = narrow(facts.look, facts.uplink, mtu) if facts.look is not None else ""
        if step:
            step += "  (for as long as the path is narrow)"
        else:
            step = f"an MTU of {mtu} for the route to {there}: ip route get {there}"
        return Conclusion(
            Outcome.PARTLY,
            f"{who} answers, but packets of {lost} bytes do not arrive there, and those of"
            f" {path.largest} do: something on the way swallows large ones",
            f"{step}; tundp doctor --only=mtu",
        )
    if path is not None and path.largest is None:
        return Conclusion(
            Outcome.PARTLY,
            f"{who} answers, but no packet of {path.tried[-1]} bytes or more arrives there",
            f"tundp trace peer {there}; tundp doctor",
        )
    if series is not None and series.lost:
        return Conclusion(
            Outcome.PARTLY,
            f"{who} answers, but {series.lost} of {series.sent} echo requests were not answered in"
            " time: the path loses packets, or a host on it is overloaded",
            f"tundp drops; tundp trace peer {there}; the same on {there}",
        )
    if facts.answer(LayerId.UNDERLAY).is_trouble:
        return Conclusion(
            Outcome.PARTLY,
            f"the overlay to {who} works; only ICMP to {there} is not answered on the underlay,"
            " which the overlay does not need",
        )
    if facts.answer(LayerId.CONTROL).is_trouble:
        return Conclusion(
            Outcome.PARTLY,
            f"the overlay to {who} works, but what answers there is not known: no daemon answers"
            " questions, and no kernel rejects them",
            f"on {there}: tundp status; a firewall that drops protocol 253, or an older tundp",
        )
    bridge = facts.answer(LayerId.BRIDGE).is_trouble
    return Conclusion(
        Outcome.OK,
        f"{who} answers through the overlay"
        + ("; it has no bridge for pods yet" if bridge else ""),
    )


def _ours(facts: Facts) -> Conclusion | None:
    """What this node does; None if nothing is known."""
    if facts.ours[0]:
        return Conclusion(Outcome.OVERLAY, *facts.ours)
    peer, there = facts.peer, facts.peer.public_ip
    if facts.look is not None:
        found = on_our_side(facts.look, _seen(facts), Verdict.FAIL)
        if found is not None:
            return Conclusion(Outcome.OVERLAY, found.evidence, found.next_step)
    for layer, what in (
        (LayerId.TUN, f"echo requests to {_who(facts)}"),
        (LayerId.PORT, f"datagrams to {there}:{peer.port}"),
    ):
        if facts.answer(layer) is Answer.NOT_SENT:
            return Conclusion(
                Outcome.OVERLAY,
                f"this host's kernel refuses to send {what} ({facts.evidence(layer)})",
                "a rule in an OUTPUT chain, or a route: tundp doctor",
            )
    return None


def _behind_its_daemon(facts: Facts) -> Conclusion | None:
    """What its TUN or its kernel does, if its daemon has the packets; None if that is not known."""
    who, there = _who(facts), facts.peer.public_ip
    tun = facts.layers[LayerId.TUN].asked if LayerId.TUN in facts.layers else who
    works = facts.answer(LayerId.CONTROL) is Answer.STOCK
    if works or facts.answer(LayerId.BRIDGE) is Answer.ANSWERED:
        other = "its bridge answers" if not works else "its kernel rejects other packets"
        return Conclusion(
            Outcome.PARTLY,
            f"the overlay to {who} works ({other}), but {tun} is not answered: a rule of that"
            " host's INPUT chain, or icmp_echo_ignore_all there",
            f"on {there}: tundp doctor",
        )
    if facts.answer(LayerId.CONTROL) is Answer.ANSWERED:
        return Conclusion(
            Outcome.OVERLAY,
            f"the daemon of {there} answers, but the kernel behind its TUN does not: the TUN is"
            " down there, or a rule drops what comes in by it",
            f"on {there}: tundp doctor; ip link show; tundp drops",
        )
    return None


def _on_the_way(facts: Facts) -> Conclusion:
    """What the underlay and the peer's port come to."""
    seen, there, port = _seen(facts), facts.peer.public_ip, facts.peer.port
    said = facts.evidence(LayerId.PORT)
    look = facts.look
    match facts.answer(LayerId.PORT):
        case Answer.REFUSED if facts.is_heard:
            text = (
                f"{seen}, UDP {port} is refused although datagrams come from it: a firewall of"
                f" {there} rejects ours"
            )
            return Conclusion(Outcome.OVERLAY, text, _let_pass(facts))
        case Answer.REFUSED:
            text = (
                f"{seen}, UDP {port} is refused: no daemon listens on {there}, or a firewall there"
                " rejects as if none did"
            )
            step = f"on {there}: systemctl status tundp (or flanneld); tundp doctor"
            return Conclusion(Outcome.OVERLAY, text, step)
        case Answer.PROHIBITED:
            text = f"{seen}, UDP {port} is not: a firewall rejects it ({said})"
            return Conclusion(Outcome.OVERLAY, text, _let_pass(facts))
    if look is not None and look.neighbour is not None and look.neighbour.is_unanswered:
        found = on_its_side(look, seen, Verdict.FAIL)
        step = f"is {there} its address (tundp leases), and is that host up? {found.next_step}"
        return Conclusion(Outcome.OVERLAY, found.evidence, step)
    if facts.answer(LayerId.PORT) is Answer.UNREACHABLE:
        text = f"{seen}, and datagrams to UDP {port} do not get there ({said})"
        return Conclusion(Outcome.OVERLAY, text, f"ip route get {there}; the router that says so")
    if facts.is_heard:
        text = (
            f"{seen}; datagrams come from {there}, but ours to its UDP {port} are not answered: one"
            " direction is broken"
        )
        return Conclusion(Outcome.OVERLAY, text, _let_pass(facts))
    if facts.answer(LayerId.UNDERLAY) is Answer.ANSWERED:
        if facts.daemon:
            text = (
                f"{seen}, UDP {port} does not refuse: whether a daemon listens there is not known"
            )
            return Conclusion(Outcome.OVERLAY, text)
        text = (
            f"{seen}, but nothing comes back from UDP {port}: a firewall drops it there or on the"
            " way, or its daemon hangs"
        )
        return Conclusion(Outcome.OVERLAY, text, _let_pass(facts))
    return _no_host(facts)


def _no_host(facts: Facts) -> Conclusion:
    """Neither ICMP nor datagrams come back."""
    there = facts.peer.public_ip
    route = None if facts.look is None else facts.look.route
    text = (
        f"nothing comes back from {there}, neither ICMP nor from UDP {facts.peer.port}: it is down,"
        " not that node's address, or all is dropped on the way"
    )
    if isinstance(route, RouteLookup) and route.gateway is not None:
        return Conclusion(
            Outcome.OVERLAY,
            f"{text}; it is reached by {route.gateway}",
            f"is {there} an address that nodes can reach (--iface, --public-ip there)?"
            f" ip route get {there}; on {there}: tundp doctor",
        )
    return Conclusion(Outcome.OVERLAY, text, f"on {there}: tundp doctor")


def _let_pass(facts: Facts) -> str:
    there, port = facts.peer.public_ip, facts.peer.port
    return f"on {there}: tundp doctor; let UDP {port} pass there and in between, both ways"


def _seen(facts: Facts) -> str:
    """The underlay's answer, as a sentence begins."""
    there = facts.peer.public_ip
    if facts.answer(LayerId.UNDERLAY) is Answer.ANSWERED:
        return f"ICMP passes to {there}"
    if facts.answer(LayerId.UNDERLAY) is Answer.NOT_ASKED:
        return f"ICMP to {there} was not asked"
    return f"ICMP to {there} is not answered"


def _without_tunnel(facts: Facts) -> Conclusion:
    who, there = _who(facts), facts.peer.public_ip
    if facts.answer(LayerId.UNDERLAY) is not Answer.ANSWERED:
        found = (
            None
            if facts.look is None
            else on_our_side(facts.look, f"{there} answers no ping", Verdict.FAIL)
        )
        if found is not None:
            return Conclusion(Outcome.OVERLAY, found.evidence, found.next_step)
        return Conclusion(
            Outcome.OVERLAY,
            f"{there} answers no ping, so no packet of the overlay gets there either, or its"
            " firewall drops ICMP",
            f"on {there}: tundp doctor",
        )
    if facts.answer(LayerId.BRIDGE).is_trouble:
        return Conclusion(
            Outcome.OK,
            f"{there} answers; host-gw has no port and no TUN to ask, and no bridge of {who}"
            " answers",
            f"on {there}: tundp doctor, if it has pods",
        )
    return Conclusion(Outcome.OK, f"{who} answers; host-gw has no port and no TUN to ask")
