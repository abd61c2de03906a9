"""Checks of what pods have from this node: bridge, MTU, subnet.env, CNI configs, masquerading."""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import AsyncIterator, Mapping, Sequence
from ipaddress import IPv4Network
from pathlib import Path
from shlex import quote
from typing import Final

from tundp.doctor.context import Context, finding
from tundp.files import SMALL_LEN, read_regular
from tundp.finding import Finding, Verdict
from tundp.lease import subnet_env
from tundp.linux import unreachable
from tundp.linux.netlink import Address, Link
from tundp.linux.obstacles import rulesets, source_nat
from tundp.linux.obstacles.firewall import text_of
from tundp.linux.obstacles.packet import Match
from tundp.linux.obstacles.scene import Scene
from tundp.linux.obstacles.source_nat import Outwards
from tundp.observe.status import Status

CNI_DIR: Final = Path("/etc/cni/net.d")
BRIDGES: Final = ("cni0", "docker0", "cbr0", "kube-bridge")
"""Bridges that flannel's pods usually are behind."""
_CNI_NAMES: Final = (".conf", ".conflist", ".json")
"""What libcni reads, in the order of names (libcni/api.go, ConfFiles)."""


async def check_bridge(context: Context) -> AsyncIterator[Finding]:
    """Whether the bridge of pods is up, in this node's subnet, and no larger than the overlay."""
    status = context.status
    if status is None or status.network is None or status.subnet is None or status.backend is None:
        return
    links = {each.index: each for each in await context.links()}
    ours = {status.backend.interface.name}
    if status.backend.device is not None:
        ours.add(status.backend.device.name)
    addresses = await context.inspection.netlink.addresses()
    held = [
        (links[each.index], each)
        for each in addresses
        if each.interface.ip in status.network
        and each.index in links
        and links[each.index].name not in ours
        and not links[each.index].is_loopback
    ]
    right = [link for link, each in held if each.interface.ip in status.subnet]
    wrong = [each for each in held if each[1].interface.ip not in status.subnet]
    wrong_bridges = {link.name for link, _ in wrong} & {*BRIDGES}
    has_address = {each.index for each in addresses}
    # Docker's own, with an address of its own, is no bridge that lost one.
    bare = [
        each for each in links.values() if each.name in BRIDGES and each.index not in has_address
    ]
    for link, address in wrong:
        # With the right address elsewhere, or two such bridges, it may be another network's.
        is_theirs = link.name in BRIDGES and (
            link in right or (not right and len(wrong_bridges) == 1)
        )
        if is_theirs:
            yield _moved(status, link, address, has_right=link in right)
        else:
            yield _foreign(status, link, address, is_alone=not right and not bare)
    if not right and (not held or (bare and not wrong_bridges)):
        yield _none(status, bare[0].name if bare else "")
    for each in await _strays(context, status, {link.index: link.name for link in links.values()}):
        yield each
    for link in dict.fromkeys(right):
        if not link.is_up:
            yield finding(
                "pods.bridge-down",
                Verdict.FAIL,
                f"{link.name}, which pods are behind, is down",
                command=f"ip link set dev {quote(link.name)} up",
            )
        elif (mtu := status.backend.mtu) is not None and link.mtu > mtu:
            yield finding(
                "pods.mtu",
                Verdict.WARN,
                f"{link.name} has MTU {link.mtu}, the overlay {mtu}: pods send packets that do not"
                " fit, and what ignores ICMP hangs",
                command=f"ip link set dev {quote(link.name)} mtu {mtu}",
                words="pods have MTUs of their own: those made before keep them",
            )
        else:
            yield finding("pods.bridge", Verdict.OK, f"{link.name} is up, in {status.subnet}")


async def _strays(context: Context, status: Status, names: Mapping[int, str]) -> list[Finding]:
    """Routes of the main table that lead addresses of this node's subnet away from its pods."""
    assert status.subnet is not None and status.backend is not None
    away = {status.backend.interface.name}
    if status.backend.device is not None:
        away.add(status.backend.device.name)
    found = []
    for route in await context.inspection.netlink.routes():
        devices = [names.get(index, "") for index in route.indexes]
        is_ours = not route.is_unicast and route.priority == unreachable.METRIC
        if is_ours or not route.destination.subnet_of(status.subnet):
            continue
        if route.is_unicast and away.isdisjoint(devices):
            continue
        kind = "" if route.is_unicast else f"{route.kind} "
        over = f" dev {quote(devices[0])}" if len(devices) == 1 and devices[0] else ""
        found.append(
            finding(
                "pods.route",
                Verdict.FAIL,
                f"{kind}route {route.destination}{over} takes packets for pods of this node, whose"
                f" subnet is {status.subnet}, away from them",
                command=f"ip route del {kind}{route.destination}{over}",
            )
        )
    return found


def _gateway(subnet: IPv4Network) -> str:
    """The address the pods' bridge has, with its prefix length."""
    return f"{subnet.network_address + 1}/{subnet.prefixlen}"


def _moved(status: Status, link: Link, address: Address, *, has_right: bool) -> Finding:
    """The pods' bridge has an address of a subnet that is not this node's (any more)."""
    assert status.subnet is not None
    name = quote(link.name)
    add = "" if has_right else f"ip addr add {_gateway(status.subnet)} dev {name} && "
    return finding(
        "pods.subnet",
        Verdict.FAIL,
        f"{link.name} has {address.interface}, but this node's subnet is {status.subnet}: its pods"
        " cannot be reached from other nodes",
        command=f"{add}ip addr del {address.interface} dev {name}",
        words="pods made before have addresses of the old subnet: make them again",
    )


def _foreign(status: Status, link: Link, address: Address, *, is_alone: bool) -> Finding:
    """A device that may be of another network (VPN, libvirt) has an address of another node's.

    is_alone: whether nothing else can be the pods' bridge.
    """
    assert status.subnet is not None
    return finding(
        "pods.subnet",
        Verdict.FAIL if is_alone else Verdict.WARN,
        f"{link.name} has {address.interface}, inside the overlay {status.network}, but this node's"
        f" subnet is {status.subnet}: what is behind {link.name} cannot be reached from other"
        " nodes, and hides pods of theirs from this one",
        words=f"where this node's pods are behind {link.name}, it needs {_gateway(status.subnet)}"
        f" instead; another network needs addresses outside {status.network}",
    )


def _none(status: Status, bridge: str) -> Finding:
    """bridge: one without an address; empty if there is none."""
    assert status.subnet is not None
    wanted = _gateway(status.subnet)
    if not bridge:
        return finding(
            "pods.none",
            Verdict.NOTE,
            f"no device has an address in {status.subnet}: there are no pods yet, or their bridge"
            " was not made from subnet.env",
        )
    return finding(
        "pods.address",
        Verdict.FAIL,
        f"no device has an address in this node's subnet {status.subnet}, though there is {bridge}:"
        " packets for pods come back into the overlay",
        command=f"ip addr add {wanted} dev {quote(bridge)}",
        words=f"where {bridge} is the bridge of this network's pods",
    )


async def check_subnet_env(context: Context) -> AsyncIterator[Finding]:
    """Whether subnet.env says what the daemon says."""
    status, path = context.status, context.inspection.settings.subnet_file
    if status is None or status.subnet is None or status.network is None:
        return
    try:
        text = read_regular(path, most_len=SMALL_LEN)
    except OSError as error:
        yield finding(
            "subnet-env.missing",
            Verdict.FAIL,
            f"{path}: {error.strerror}: CNI plugins make no pod without it",
            words="the daemon writes it again within seconds, if it can: see subnet-file",
        )
        return
    key = subnet_env.previous_key(text)
    network = subnet_env.previous_network(text)
    if key is None or key.subnet != status.subnet or network != status.network:
        yield finding(
            "subnet-env.drift",
            Verdict.FAIL,
            f"{path} names {key} of {network}, the lease is {status.subnet} of {status.network}",
            words="the daemon writes it again within seconds; who else writes it?",
        )
    else:
        yield finding("subnet-env", Verdict.OK, f"{path} names {status.subnet}")


async def check_cni(context: Context) -> AsyncIterator[Finding]:
    """Whether the network config that pods get is flannel's: the first file by name counts."""
    folder = context.cni_dir
    try:
        names = sorted(each.name for each in folder.iterdir() if each.suffix in _CNI_NAMES)
    except FileNotFoundError:
        yield finding("cni", Verdict.NOTE, f"there is no {folder}: no CNI plugins here")
        return
    except OSError as error:
        yield finding("cni", Verdict.UNKNOWN, f"{folder}: {error.strerror}", words="run as root")
        return
    if not names:
        yield finding("cni", Verdict.NOTE, f"{folder} is empty: no CNI plugins here")
        return
    kinds = {name: _plugins(folder / name) for name in names}
    flannels = [name for name in names if "flannel" in kinds[name]]
    first = names[0]
    if flannels and flannels[0] != first:
        yield finding(
            "cni.order",
            Verdict.FAIL,
            f"{folder / first} comes before {flannels[0]}: pods get their network from"
            f" {'/'.join(kinds[first]) or 'it'}, and not from flannel",
            command=shlex.join(["mv", str(folder / first), f"{folder / first}.disabled"]),
            words="and make the pods again that were made meanwhile",
        )
    elif not flannels:
        kind = "/".join(kinds[first]) or "no plugin that can be read"
        yield finding(
            "cni", Verdict.NOTE, f"{folder / first} names {kind}: pods may not use flannel"
        )
    else:
        yield finding("cni", Verdict.OK, f"{folder / first} is flannel's")


def _plugins(path: Path) -> list[str]:
    """The types of a CNI config's plugins; none if it cannot be read."""
    try:
        document = json.loads(read_regular(path, most_len=SMALL_LEN))
        plugins = document.get("plugins", [document])
        return [str(each.get("type", "")) for each in plugins]
    except (OSError, ValueError, AttributeError, TypeError):
        return []


async def check_masquerade(context: Context) -> AsyncIterator[Finding]:
    """Whether what pods send to addresses outside the overlay is masqueraded, and nothing else."""
    status, scene = context.status, context.scene
    if status is None or scene is None or status.subnet is None:
        return
    listed = await rulesets.read()
    devices = await _pod_devices(context)
    for each in await source_nat.findings(listed.tables, scene, devices):
        yield each
    if context.setting("ip-masq") == "true":
        yield finding("masquerade", Verdict.OK, "--ip-masq: see the finding firewall")
    else:
        out = await _ways_out(context, scene.uplink)
        # Thousands of rules take long: the deadline of the whole is on this loop.
        found = await asyncio.to_thread(source_nat.outwards, listed.tables, scene, devices, out)
        if found.certainty is not Match.NO or not listed.unread:
            yield await _outwards(scene, found, out)
    if listed.unread:
        yield finding("masquerade", Verdict.UNKNOWN, "; ".join(listed.unread))


async def _pod_devices(context: Context) -> list[str]:
    """The devices with an address in this node's subnet, the TUN apart."""
    scene = context.scene
    assert scene is not None
    names = {each.index: each.name for each in await context.links()}
    held = [
        names.get(each.index, "")
        for each in await context.inspection.netlink.addresses()
        if each.interface.ip in scene.subnet
    ]
    return [name for name in dict.fromkeys(held) if name not in ("", scene.device)]


async def _outwards(scene: Scene, found: Outwards, out: Sequence[str]) -> Finding:
    """What the rules that were read do with packets to addresses outside."""
    subnet, by = scene.subnet, " or ".join(out)
    stop = found.stop or found.by_mark
    rule = "" if stop is None else f"{stop.table.title}, {await text_of(stop)}"
    if found.certainty is Match.YES:
        seen = f"what {subnet} sends to public addresses by {by} is masqueraded: {rule}"
        return finding("masquerade", Verdict.OK, seen)
    if found.certainty is Match.UNKNOWN:
        return finding(
            "masquerade",
            Verdict.UNKNOWN,
            f"whether what {subnet} sends to public addresses by {by} is masqueraded is not known:"
            f" not understood is {rule}",
        )
    if found.certainty is Match.PART:
        return finding(
            "masquerade.missing",
            Verdict.NOTE,
            f"--ip-masq is off, and of what {subnet} sends to public addresses by {by} only some is"
            f" surely masqueraded: {rule}",
            words="what is not gets an answer only where routers there know the way back",
        )
    marked = f"; only what other rules mark: {rule}" if rule else ""
    return finding(
        "masquerade.missing",
        Verdict.NOTE,
        f"--ip-masq is off, and no rule here masquerades {subnet}{marked}: pods reach addresses"
        " outside the overlay only where routers there know the way back",
        command=f"iptables -t nat -A POSTROUTING -s {subnet} ! -d {scene.network} -j MASQUERADE",
        words="until the next boot; to keep it: --ip-masq",
    )


async def _ways_out(context: Context, uplink: str) -> list[str]:
    """The devices of the default route; the uplink if there is none."""
    names = {each.index: each.name for each in await context.links()}
    routes = await context.inspection.netlink.routes()
    default = [each for each in routes if each.destination.prefixlen == 0 and each.is_unicast]
    first = min(default, key=lambda each: each.priority, default=None)
    found = [] if first is None else [names.get(index, "") for index in first.indexes]
    return [name for name in found if name] or [uplink]
