"""Checks of the daemon: whether it answers, what it says of itself, its device and its lease."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from ipaddress import IPv4Address
from shlex import quote
from typing import Final

import tundp
from tundp.daemon import lock
from tundp.doctor import remedy
from tundp.doctor.context import Context, finding
from tundp.errors import PlatformError
from tundp.finding import Finding, Verdict
from tundp.lease.routing import Refusal
from tundp.linux.listeners import is_stopped
from tundp.linux.netlink import Route
from tundp.observe.status import Status

_NAMED: Final = 5
"""Leases that are named one by one."""
_ELSEWHERE: Final = frozenset(("chaos", "lease", "underlay", "device"))
"""Ids of the status that checks of ours say more precisely; `obstacle...` are looked for anew."""


async def check_daemon(context: Context) -> AsyncIterator[Finding]:
    """Whether a daemon runs and answers."""
    settings, asked = context.inspection.settings, context.asked
    if context.status is not None:
        version = context.status.version
        if version != tundp.__version__:
            yield finding(
                "daemon.version",
                Verdict.NOTE,
                f"the daemon runs {version}, this is {tundp.__version__}",
                command=remedy.restart(context.status.pid),
            )
        yield finding("daemon", Verdict.OK, f"pid {context.status.pid} answers")
    elif isinstance(asked, Status):
        yield finding(
            "daemon.starting", Verdict.FAIL, f"pid {asked.pid} waits for {asked.waiting_for}"
        )
    elif asked.errno is not None:
        yield finding("daemon", Verdict.UNKNOWN, str(asked), words="run this as root")
    elif context.pid is not None:
        yield _silent(context.pid, asked)
    elif lock.is_running(settings.instance):
        yield finding(
            "daemon.socket",
            Verdict.FAIL,
            f"a daemon of {settings.subnet_file} runs, but not with {settings.admin_socket}",
            words="name its socket: --admin-socket",
        )
    else:
        yield finding(
            "daemon.dead",
            Verdict.FAIL,
            f"none runs: nothing listens on {settings.admin_socket}",
            command=remedy.start(settings),
            words="for the settings of another daemon of this host: --subnet-file, --env-file",
        )


def _silent(pid: int, why: PlatformError) -> Finding:
    if is_stopped(pid):
        return finding(
            "daemon.stopped",
            Verdict.FAIL,
            f"pid {pid} is stopped by a signal or a debugger: it moves no packet, and renews no"
            " lease",
            command=f"kill -CONT {pid}",
        )
    if not pid:
        evidence = f"one listens, and it cannot be seen which process: {why}"
        return finding("daemon.hung", Verdict.FAIL, evidence)
    return finding("daemon.hung", Verdict.FAIL, f"pid {pid}: {why}", command=remedy.restart(pid))


async def check_chaos(context: Context) -> AsyncIterator[Finding]:
    """Whether somebody breaks traffic on purpose. First of all: it explains what others find."""
    if context.status is None:
        return
    running = context.status.chaos_now
    socket = quote(f"--admin-socket={context.inspection.settings.admin_socket}")
    for each in running:
        at = time.strftime("%H:%M:%S", time.localtime(each.ends_at))
        yield finding(
            "chaos",
            Verdict.FAIL,
            f"tundp chaos impairs packets to {each.who} on purpose until {at}: {each.impairment};"
            f" so far {each.fates or 'nothing came'}",
            command=f"tundp chaos stop {each.public_ip} {socket}",
        )
    if not running:
        yield finding("chaos", Verdict.OK, "no packets are impaired on purpose")


async def check_health(context: Context) -> AsyncIterator[Finding]:
    """What the daemon says of itself, as /readyz does; obstacles have a check of their own."""
    if context.status is None:
        return
    for each in context.status.findings:
        if each.id not in _ELSEWHERE and not each.id.startswith("obstacle"):
            yield each


async def check_device(context: Context) -> AsyncIterator[Finding]:
    """The TUN: up, with its address and the overlay's route; and the uplink, with its address."""
    status = context.status
    if status is None or status.backend is None:
        for link in await context.links():
            if context.pid is not None and link.kind == "tun" and not link.is_up:
                yield _down("device.down", link.name)
        return
    for each in [each async for each in _tun(context, status)]:
        yield each
    async for each in _uplink(context, status):
        yield each


def _down(finding_id: str, name: str) -> Finding:
    return finding(
        finding_id,
        Verdict.FAIL,
        f"{name} is down: nothing comes or goes by it",
        command=f"ip link set dev {quote(name)} up",
    )


async def _tun(context: Context, status: Status) -> AsyncIterator[Finding]:
    assert status.backend is not None
    device = status.backend.device
    if device is None or status.subnet is None or status.network is None:
        return
    link = await context.link(device.name)
    if link is None:
        yield finding(
            "device.gone",
            Verdict.FAIL,
            f"there is no device {device.name or 'of the overlay'}: the daemon makes it again"
            " within seconds",
            words="look again; tundp status tells why if it stays away",
        )
        return
    if not link.is_up:
        yield _down("device.down", link.name)
        return
    addresses = await context.inspection.netlink.addresses(link.index)
    wanted = status.subnet.network_address
    if all(each.interface.ip != wanted for each in addresses):
        yield finding(
            "device.address",
            Verdict.FAIL,
            f"{link.name} lacks its address {wanted}/32",
            command=f"ip addr add {wanted}/32 dev {quote(link.name)}",
        )
    routes = await context.inspection.netlink.routes()
    over = [each for each in routes if each.destination == status.network]
    if all(link.index not in each.indexes for each in over):
        yield finding(
            "device.route",
            Verdict.FAIL,
            f"no route leads {status.network} to {link.name}",
            command=f"ip route add {status.network} dev {quote(link.name)}",
        )
    if link.mtu != device.mtu:
        yield finding(
            "device.mtu",
            Verdict.WARN,
            f"{link.name} has MTU {link.mtu}, the daemon goes by {device.mtu}",
            command=f"ip link set dev {quote(link.name)} mtu {device.mtu}",
        )
    yield finding("device", Verdict.OK, f"{link.name} is up, with address and route")


async def _uplink(context: Context, status: Status) -> AsyncIterator[Finding]:
    assert status.backend is not None
    interface = status.backend.interface
    link = await context.link(interface.name)
    if link is None:
        yield finding(
            "underlay.gone",
            Verdict.FAIL,
            f"{interface.name}, the interface to the other nodes, is gone",
            words="bring it back, or name another one with --iface",
        )
        return
    if not link.is_up:
        yield _down("underlay.down", link.name)
        return
    addresses = [each.interface.ip for each in await context.inspection.netlink.addresses()]
    if interface.address not in addresses:
        yield finding(
            "underlay.address",
            Verdict.FAIL,
            f"no interface has {interface.address}, which packets leave from",
            words=f"give it back to {interface.name}: DHCP, netplan, or ip addr add with its"
            " prefix length; the daemon follows another address of the same interface",
        )
        return
    for each in status.findings:
        if each.id == "underlay":
            yield each
    if (public := status.public_ip) is not None and public not in addresses:
        if context.setting("public-ip"):
            yield await _foreign_public_ip(context, status)
        else:
            yield finding(
                "public-ip",
                Verdict.NOTE,
                f"peers are told to send to {public}, which no interface here has",
            )


async def _foreign_public_ip(context: Context, status: Status) -> Finding:
    """--public-ip names no address of this host: right where NAT leads it here, else nobody can."""
    await context.probed.wait()
    is_heard, peers = context.heard > 0, len(status.peers)
    verdict = Verdict.NOTE if is_heard or not peers else Verdict.FAIL
    reached = "peers reach us, so NAT leads it here" if is_heard else "no peer answers"
    return finding(
        "public-ip",
        verdict,
        f"peers are told to send to {status.public_ip} (--public-ip), which no interface of this"
        f" host has: {reached if peers else 'there is no peer yet'}",
        command="" if is_heard else remedy.restart(status.pid, "--public-ip="),
        words="" if is_heard else "without --public-ip the interface's own address is told",
    )


async def check_lease(context: Context) -> AsyncIterator[Finding]:
    """Whether the lease is ours, and ours alone."""
    status = context.status
    if status is None or status.lease is None:
        return
    lease, settings = status.lease, context.inspection.settings
    said = next((each.evidence for each in status.findings if each.id == "lease"), "")
    if lease.state == "conflict":
        yield finding(
            "lease.conflict",
            Verdict.FAIL,
            f"{lease.key}: {said}; peers send this node's packets to whoever has it",
            command=remedy.delete_lease(settings, status, lease.key),
            words="once the other node is stopped or gone; this one takes the subnet back then",
        )
    elif lease.state != "held":
        yield finding(
            "lease.lost",
            Verdict.FAIL,
            f"{lease.key} is {lease.state}: {said}; packets still flow to known peers",
            words="see what is said of the store",
        )
    elif lease.expires_in_s is not None and lease.expires_in_s < 0:
        yield finding(
            "lease.expired",
            Verdict.FAIL,
            f"{lease.key} expired {-lease.expires_in_s} s ago, and was not renewed",
            words="see what is said of the store",
        )
    else:
        yield finding("lease", Verdict.OK, f"{lease.key} is held")
    routes = await context.inspection.netlink.routes()
    names = {link.index: link.name for link in await context.links()}
    for each in _looped(status, routes, names):
        yield each
    for each in _refused(context, status):
        yield each


def _looped(status: Status, routes: Sequence[Route], names: Mapping[int, str]) -> Iterator[Finding]:
    """Leases that are no peers because datagrams to them would enter the overlay again."""
    for each in status.refused[:_NAMED]:
        if each.reason != Refusal.ROUTED_INTO_OVERLAY.name.lower():
            continue
        yield finding(
            "peer.loop",
            Verdict.FAIL,
            f"datagrams to {each.public_ip} (lease {each.key}) would go round and round: this host"
            " routes that address into the overlay",
            command=_unloop(status, each.public_ip, routes, names),
            words=f"ip route get {each.public_ip} must not name the TUN: see ip rule, and the table"
            " it names",
        )


def _unloop(
    status: Status, public_ip: IPv4Address, routes: Sequence[Route], names: Mapping[int, str]
) -> str:
    """The command that deletes the route of the main table that loops; empty if none there does.

    The loop may be in another table, or gone: the best route is then the one that works.
    """
    backend, network = status.backend, status.network
    tun = None if backend is None else backend.device
    fitting = [route for route in routes if public_ip in route.destination]
    best = max(fitting, key=lambda route: route.destination.prefixlen, default=None)
    if best is None or tun is None or not tun.name or network is None or not best.is_unicast:
        return ""
    if [names.get(index) for index in best.indexes] != [tun.name]:
        return ""
    # The overlay's own route, and what is larger, is not somebody's mistake about this peer.
    if best.destination.prefixlen <= network.prefixlen:
        return ""
    return f"ip route del {best.destination} dev {quote(tun.name)}"


def _refused(context: Context, status: Status) -> Iterator[Finding]:
    settings = context.inspection.settings
    for each in status.refused:
        if each.reason == Refusal.OWN_PUBLIC_IP.name.lower():
            yield finding(
                "lease.duplicate",
                Verdict.FAIL,
                f"another node's lease {each.key} has our PublicIP {each.public_ip}: packets for"
                " its pods come to us",
                command=remedy.delete_lease(settings, status, each.key),
                words="where that node is gone; a clone of this machine wants an address of its"
                " own instead",
            )
    others = [each for each in status.refused if each.reason not in _EXPECTED]
    if others:
        named = "; ".join(f"{each.key} ({each.public_ip}) {each.means}" for each in others[:_NAMED])
        more = "" if len(others) <= _NAMED else f"; and {len(others) - _NAMED} more"
        yield finding(
            "peers.refused",
            Verdict.WARN,
            f"leases that are no peers: {named}{more}",
            words="tundp status lists them; mend or delete the lease of the node it names",
        )
    if status.bad_entries:
        first = status.bad_entries[0]
        yield finding(
            "store.unreadable",
            Verdict.WARN,
            f"{len(status.bad_entries)} entries of the store cannot be read, such as {first.name}:"
            f" {first.why}",
            command=remedy.delete_lease(settings, status, first.name)
            if _is_key(first.name)
            else "",
            words="if no node writes it: delete it where it is, and nothing beside it",
        )


def _is_key(name: str) -> bool:
    """Whether an unreadable entry's name is surely its key below `subnets/`, to the letter.

    Not if it is in a folder, and not if it was cut or escaped to be shown (`printable`).
    """
    return bool(name) and name.isascii() and name.isprintable() and not set(name) & set("/\\")


_EXPECTED: Final = frozenset(
    each.name.lower()
    for each in (Refusal.OWN_PUBLIC_IP, Refusal.LEFTOVER, Refusal.ROUTED_INTO_OVERLAY)
)
