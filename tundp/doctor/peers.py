"""Checks of peers: who answers through the overlay, and what is known of those who do not.

What a host can find out of another one: whether the kernel has a way to it, whether it answers ARP
and pings, whether its port refuses datagrams, and whether its TUN address, which its kernel answers
for once its daemon has the packet, answers through the overlay. What lies behind a peer's TUN, its
forwarding, its firewall and its pods, is not seen from here.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from shlex import quote
from typing import Final

from tundp.doctor.context import Context, ask_daemon, finding, running
from tundp.doctor.probes import SMALL, Question, asking, closed_ports, refuses
from tundp.errors import PlatformError
from tundp.finding import Finding, Verdict
from tundp.linux import uapi
from tundp.linux.netlink import Flow, Link, Netlink, NoRoute, RouteLookup
from tundp.linux.obstacles import neighbours, sysctls
from tundp.linux.obstacles.neighbours import Neighbour
from tundp.observe.status import BackendStatus, PeerStatus, Status
from tundp.wire.overhead import OVERHEAD

ASKED: Final = 16
"""Peers that are asked; silent ones first, the others from all over the table."""
NAMED: Final = 8
SIZES: Final = (1472, 1452, 1422, 1372, 1322, 1272, 1222, 1172, 1072, 972, 772, 552)
"""Inner packet lengths that are tried on a path that swallows larger ones."""
ASK_THERE: Final = "tundp doctor"


@dataclass(slots=True, kw_only=True)
class Look:
    """The kernel's way to a peer that does not answer, and what its host answered."""

    peer: PeerStatus
    route: RouteLookup | NoRoute
    device: str = ""
    """The link the route leaves by; empty without a route, or if the link is gone."""
    source: IPv4Address | None = None
    """The source address the kernel gives others that go the same way; None if not known."""
    neighbour: Neighbour | None = None
    is_pingable: bool = False
    is_refusing: bool = False
    filtered_at: str = ""
    """The device at which the kernel would drop its datagrams as they come in; empty if none."""

    @property
    def hop(self) -> IPv4Address:
        """The neighbour its datagrams go to."""
        gateway = None if isinstance(self.route, NoRoute) else self.route.gateway
        return gateway or self.peer.public_ip


async def check_peers(context: Context) -> AsyncIterator[Finding]:
    """Ask each peer's kernel through the overlay; of those that do not answer, find out why."""
    status = context.status
    try:
        if status is None or status.backend is None:
            return
        if not status.peers:
            yield finding("peers.none", Verdict.NOTE, "no other node has a lease that is a peer")
            return
        device = status.backend.device
        link = None if device is None else await context.link(device.name)
        if device is not None and not (link is not None and link.is_up):
            yield finding(
                "not-looked.peers",
                Verdict.UNKNOWN,
                "not looked at: the TUN is down or gone, and nothing can be asked through it",
            )
            return
        if device is None or status.subnet is None:
            async for each in _without_tunnel(context, status, status.backend):
                yield each
            return
        asked = _chosen(status.peers)
        answers = await _answers(status.subnet.network_address, asked, status.backend)
        silent = [peer for peer in asked if Question(_tun_of(peer)) not in answers]
        context.heard = len(asked) - len(silent)
        context.dead = {peer.public_ip for peer in silent}
    finally:
        context.probed.set()
    async for each in _silent(context, status.backend, silent):
        yield each
    # All at once: a path that swallows packets takes more than a second.
    paths = (_paths(context, status, peer, answers) for peer in asked if peer not in silent)
    for found in await asyncio.gather(*paths):
        for each in found:
            yield each
    if context.heard:
        yield finding(
            "peers.answering",
            Verdict.OK,
            f"{context.heard} of {len(asked)} peers asked answer at their TUN address"
            f" ({len(status.peers)} there are)",
            meaning="what lies behind a peer's TUN, its forwarding, firewall and pods, is not seen"
            " from here: tundp doctor there",
        )


def _chosen(peers: Sequence[PeerStatus]) -> list[PeerStatus]:
    silent = [peer for peer in peers if peer.is_silent][:ASKED]
    others = [peer for peer in peers if not peer.is_silent]
    left = ASKED - len(silent)
    return [*silent, *others[:: max(1, -(-len(others) // left))]] if left else silent


def _tun_of(peer: PeerStatus) -> IPv4Address:
    return peer.subnet.network_address


def _full(peer: PeerStatus, backend: BackendStatus) -> int:
    """Bytes of the largest inner packet that should arrive at a peer."""
    known = None if peer.path is None else peer.path.inner_mtu
    return known or (0 if backend.device is None else backend.device.mtu)


async def _answers(
    source: IPv4Address, asked: Sequence[PeerStatus], backend: BackendStatus
) -> dict[Question, float]:
    """Echo requests from our TUN address to each peer's: small ones, and as large as fits."""
    questions = [
        Question(_tun_of(peer), size) for peer in asked for size in (SMALL, _full(peer, backend))
    ]
    async with asking(source) as asker:
        return await asker.ask(questions)


async def _silent(
    context: Context, backend: BackendStatus, silent: Sequence[PeerStatus]
) -> AsyncIterator[Finding]:
    if not silent:
        return
    looks = await _look(context, backend, silent)
    verdict = Verdict.WARN if context.heard else Verdict.FAIL
    for look in looks[:NAMED]:
        yield _judged(look, verdict)
    if (more := len(looks) - NAMED) > 0:
        yield finding(
            "peer.silent", verdict, f"{more} more peers do not answer", words="tundp status"
        )


async def _look(
    context: Context, backend: BackendStatus, silent: Sequence[PeerStatus]
) -> list[Look]:
    netlink = context.inspection.netlink
    source, port = backend.interface.address, backend.port or 0
    looks = await look_up(netlink, await context.links(), silent, source=source, port=port)
    # The kernel knows of a neighbour only once it was asked: the echo requests below do that too.
    pings, refused = await asyncio.gather(
        _pings(source, [peer.public_ip for peer in silent]), _refusals(source, silent, port)
    )
    await add_neighbours(netlink, looks)
    for look in looks:
        look.is_pingable = look.peer.public_ip in pings
        look.is_refusing = look.peer.public_ip in refused
    return looks


async def look_up(
    netlink: Netlink,
    links: Sequence[Link],
    peers: Sequence[PeerStatus],
    *,
    source: IPv4Address,
    port: int,
) -> list[Look]:
    """Ask the kernel for the route of datagrams to each peer, and of those that it sends.

    source, port: of our datagrams. PlatformError.
    """
    flow = Flow(source=source, port=port)
    addresses = [peer.public_ip for peer in peers]
    routes, unbound = await netlink.lookups(addresses, flow), await netlink.lookups(addresses)
    names = {link.index: link.name for link in links}
    looks = []
    for peer in peers:
        look = Look(peer=peer, route=routes[peer.public_ip])
        if isinstance(look.route, RouteLookup):
            look.device = names.get(look.route.index, "")
            other = unbound[peer.public_ip]
            if isinstance(other, RouteLookup) and other.index == look.route.index:
                look.source = other.source
        looks.append(look)
    # Those with our address: what comes in there is for us, whatever device ours leave by.
    ins = [each.index for each in await netlink.addresses() if each.interface.ip == source]
    for look in looks:
        for index in ins:
            back = Flow(source=look.peer.public_ip, port=port, iif=index)
            answer = (await netlink.lookups([source], back))[source]
            name = names.get(index, "")
            # The kernel would drop what it sends where it comes in (RFC 3704). EXDEV, or EINVAL
            # on some kernels (6.18): what tells is that the filter is on.
            if isinstance(answer, NoRoute) and sysctls.effective_rp_filter(name):
                look.filtered_at = name
    return looks


async def add_neighbours(netlink: Netlink, looks: Sequence[Look]) -> None:
    """Look up the next hop of each peer in the neighbour table. PlatformError."""
    known = {(each.index, each.address): each for each in await neighbours.table(netlink)}
    for look in looks:
        if isinstance(look.route, RouteLookup):
            look.neighbour = known.get((look.route.index, look.hop))


async def _pings(source: IPv4Address, addresses: Sequence[IPv4Address]) -> set[IPv4Address]:
    try:
        async with asking(source) as asker:
            answered = await asker.ask([Question(each) for each in addresses])
    except PlatformError:
        return set()
    return {each.to for each in answered}


async def _refusals(
    source: IPv4Address, silent: Sequence[PeerStatus], port: int
) -> set[IPv4Address]:
    closed, *answers = await asyncio.gather(
        closed_ports(),
        *(refuses(source, peer.public_ip, peer.port or port) for peer in silent),
        return_exceptions=True,
    )
    heard = closed if isinstance(closed, set) else set()
    return {
        peer.public_ip
        for peer, answer in zip(silent, answers, strict=True)
        if answer is True or (peer.public_ip, peer.port or port) in heard
    }


def _judged(look: Look, verdict: Verdict) -> Finding:
    """The finding for a peer that does not answer through the overlay."""
    who = f"peer {look.peer.subnet} at {look.peer.endpoint}: {_since(look.peer)}"
    return on_our_side(look, who, verdict) or on_its_side(look, who, verdict)


def on_our_side(look: Look, who: str, verdict: Verdict) -> Finding | None:
    """What this host does to packets from or for the peer; None if nothing is known.

    who: begins the evidence.
    """
    neighbour = look.neighbour
    if isinstance(look.route, NoRoute):
        return finding(
            "peer.route",
            verdict,
            f"{who}; this host has no way to it: {os.strerror(look.route.errno)}",
            words=f"ip route get {look.peer.public_ip}; see obstacle.tunnel",
        )
    if look.filtered_at:
        mode = sysctls.effective_rp_filter(look.filtered_at)
        return finding(
            "peer.rp-filter",
            verdict,
            f"{who}; the kernel drops its datagrams that come in by {look.filtered_at}, where"
            f" rp_filter is {mode}: the route back leaves by another device",
            command=f"sysctl -w {quote(f'net/ipv4/conf/{look.filtered_at}/rp_filter')}=2",
            words=f"or make the route symmetric: ip route get {look.peer.public_ip}",
        )
    if neighbour is not None and neighbour.is_permanent and not look.is_pingable:
        return finding(
            "peer.neighbour",
            verdict,
            f"{who}; its datagrams go to the link address {neighbour.link_address}, which somebody"
            f" has fixed for {look.hop} on {look.device}, and nothing comes back",
            command=f"ip neigh del {look.hop} dev {quote(look.device)}" if look.device else "",
        )
    return None


def on_its_side(look: Look, who: str, verdict: Verdict) -> Finding:
    """What the peer, or the way to it, does."""
    there, port = str(look.peer.public_ip), look.peer.port
    if look.neighbour is not None and look.neighbour.is_unanswered:
        name, words = (
            "peer.arp",
            ("does that host run, and have this address? else its lease has to go or change"),
        )
        seen = (
            f"{look.hop} answers no ARP on {look.device}: it is down, elsewhere, or its lease names"
            " a wrong PublicIP"
        )
    elif look.is_refusing:
        name, words = "peer.refused", ""
        seen = (
            f"it refuses UDP {port} (ICMP port unreachable): no daemon listens there, or a firewall"
            " rejects"
        )
    elif look.is_pingable:
        name, words = (
            "peer.filtered",
            (f"a firewall or security group between the two has to let UDP {port} pass both ways"),
        )
        seen = (
            f"it answers pings, and nothing comes back from UDP {port}: dropped there or on the"
            " way, or its daemon hangs"
        )
    else:
        name, words = "peer.unreachable", ""
        seen = "it answers neither pings nor datagrams: down, or all is dropped on the way"
    return finding(name, verdict, f"{who}; {seen}", command=ASK_THERE, on=there, words=words)


def _since(peer: PeerStatus) -> str:
    heard = None if peer.traffic is None else peer.traffic.last_heard
    error = "" if peer.traffic is None else peer.traffic.last_errno or ""
    after = f", last error {error}" if error else ""
    if heard is None:
        return f"never heard of{after}"
    age_s = max(0.0, time.time() - heard)
    at = time.strftime("%H:%M:%S", time.localtime(heard))
    return f"silent since {at} ({age_s:.0f} s){after}"


async def _paths(
    context: Context, status: Status, peer: PeerStatus, answers: Mapping[Question, float]
) -> list[Finding]:
    return [each async for each in _path(context, status, peer, answers)]


async def _path(
    context: Context, status: Status, peer: PeerStatus, answers: Mapping[Question, float]
) -> AsyncIterator[Finding]:
    """Whether packets as large as they are told to be arrive at a peer that answers."""
    assert status.backend is not None and status.subnet is not None
    full = _full(peer, status.backend)
    if Question(_tun_of(peer), full) in answers:
        if status.backend.device is not None and full < status.backend.device.mtu:
            yield _narrow(peer, full, status.backend.device.mtu)
        return
    inner = await _largest(status, peer, full)
    # The daemon, too, measures a path that large packets go to, and drops what does not fit.
    now = running(await ask_daemon(context.inspection.settings.admin_socket))
    told = None if now is None else next((p for p in now.peers if p.subnet == peer.subnet), None)
    if told is not None and (known := _full(told, status.backend)) < full:
        yield _narrow(told, known, full)
        return
    yield await _blackhole(context, status.backend, peer, full=full, inner=inner)


async def _largest(status: Status, peer: PeerStatus, full: int) -> int:
    """Bytes of the largest packet below `full` that arrives; what is lost is asked twice."""
    assert status.subnet is not None
    inner = SMALL
    async with asking(status.subnet.network_address) as asker:
        for _ in range(2):
            # Ascending: the engine joins a packet with a longer one before it to one super-packet,
            # which a virtual link's rules judge, and drop, as a whole.
            sizes = sorted(size for size in SIZES if inner < size < full)
            found = await asker.ask([Question(_tun_of(peer), size) for size in sizes])
            inner = max((each.packet_len for each in found), default=inner)
    return inner


def _narrow(peer: PeerStatus, known: int, mtu: int) -> Finding:
    path = peer.path
    origin = "" if path is None or path.mtu_origin is None else path.mtu_origin.value
    return finding(
        "mtu.path",
        Verdict.NOTE,
        f"packets of {known} bytes at most arrive at {peer.subnet} ({origin}), as pods are told;"
        f" the device has {mtu}",
    )


async def _blackhole(
    context: Context, backend: BackendStatus, peer: PeerStatus, *, full: int, inner: int
) -> Finding:
    seen = f"packets of {full} bytes do not arrive at {peer.subnet} ({peer.public_ip})"
    if inner < min(SIZES):
        return finding(
            "mtu.blackhole",
            Verdict.FAIL,
            f"{seen}, nor those of {min(SIZES)}; those of {inner} do",
            words=f"no route's MTU mends that: see what is on the way: tracepath -n"
            f" {peer.public_ip}",
        )
    (look,) = await look_up(
        context.inspection.netlink,
        await context.links(),
        [peer],
        source=backend.interface.address,
        port=backend.port or 0,
    )
    command = narrow(look, backend.interface.name, inner + OVERHEAD)
    return finding(
        "mtu.blackhole",
        Verdict.FAIL,
        f"{seen}, those of {inner} do: something on the way swallows large ones",
        command=command,
        words="for as long as the path is narrow: pods are told then; to keep it, where routes are"
        " configured"
        if command
        else f"a route to {peer.public_ip} with MTU {inner + OVERHEAD} beside the one that is used,"
        f" which is not by {backend.interface.name} in the main table: ip route get"
        f" {peer.public_ip}",
    )


def narrow(look: Look, uplink: str, mtu: int) -> str:
    """The command that gives the route to a peer an MTU, and leaves it otherwise as it is.

    Empty if the route is not by `uplink`, or in a table that is asked before the main one.
    """
    route = look.route
    if isinstance(route, NoRoute) or route.kind != "unicast" or not look.device:
        return ""
    if look.device != uplink or route.table != uapi.RT_TABLE_MAIN:
        return ""
    via = "" if route.gateway is None else f"via {route.gateway} "
    source = "" if look.source is None else f" src {look.source}"
    return f"ip route replace {look.peer.public_ip} {via}dev {quote(uplink)}{source} mtu {mtu}"


async def _without_tunnel(
    context: Context, status: Status, backend: BackendStatus
) -> AsyncIterator[Finding]:
    """With a backend that has no TUN: whether each peer's host answers pings."""
    asked = _chosen(status.peers)
    pings = await _pings(backend.interface.address, [peer.public_ip for peer in asked])
    context.heard = len(pings)
    context.dead = {peer.public_ip for peer in asked} - pings
    for peer in asked:
        if peer.public_ip not in pings:
            yield finding(
                "peer.unreachable",
                Verdict.WARN if pings else Verdict.FAIL,
                f"peer {peer.subnet} at {peer.public_ip} answers no ping",
                command=ASK_THERE,
                on=str(peer.public_ip),
            )
    if pings:
        yield finding("peers.answering", Verdict.OK, f"{len(pings)} of {len(asked)} answer pings")
