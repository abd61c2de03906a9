"""Checks of this host: rights, files, ports, routes, firewall."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from tundp.choices import Sandbox
from tundp.daemon.checks.inspection import Inspection
from tundp.daemon.confinement import plan_for, written_folders
from tundp.daemon.unit import installed_unit
from tundp.errors import PlatformError
from tundp.finding import Finding, Verdict
from tundp.linux import capability, limits, sandbox, unreachable
from tundp.linux.netlink import Link, Route
from tundp.linux.tun import require_device

BR_NETFILTER: Final = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")


async def check_rights(_: Inspection) -> AsyncIterator[Finding]:
    """Whether this process may make and configure network devices."""
    try:
        capability.require(capability.CAP_NET_ADMIN, "a TUN device, its address and its route")
        require_device()
    except PlatformError as error:
        yield Finding(id="rights", verdict=Verdict.FAIL, evidence=str(error))
    else:
        yield Finding(
            id="rights", verdict=Verdict.OK, evidence="CAP_NET_ADMIN, and /dev/net/tun opens"
        )


async def check_limits(_: Inspection) -> AsyncIterator[Finding]:
    """Whether this process may make the system calls, threads and files a daemon needs."""
    found = limits.findings()
    for finding in found:
        yield finding
    if not found:
        yield Finding(
            id="limits",
            verdict=Verdict.OK,
            evidence="threads start, eventfd works, open files may be many, /proc is there (of"
            " this process; a unit or container may have less)",
        )


async def check_sandbox(inspection: Inspection) -> AsyncIterator[Finding]:
    """What --sandbox would hold, and what these settings leave open. Enters none."""
    settings = inspection.settings
    if settings.sandbox is Sandbox.OFF:
        yield Finding(id="sandbox", verdict=Verdict.NOTE, evidence="off: nothing is refused")
        return
    foreseen = sandbox.foresee()
    plan = await asyncio.to_thread(plan_for, settings)
    written = ", ".join(map(str, written_folders(settings)))
    verdict = Verdict.NOTE if plan.gaps else Verdict.OK
    if foreseen.missing:
        verdict = Verdict.WARN
    if settings.sandbox is Sandbox.ON and (foreseen.missing or plan.gaps):
        verdict = Verdict.FAIL
    yield Finding(
        id="sandbox",
        verdict=verdict,
        evidence=f"{replace(foreseen, gaps=plan.gaps).evidence}; written are files below {written}",
    )


async def check_files(inspection: Inspection) -> AsyncIterator[Finding]:
    """Whether the files a daemon writes can be written."""
    settings = inspection.settings
    store_file = settings.store.path
    wanted = {
        "subnet-file": settings.subnet_file.parent,
        "state-dir": settings.state_dir,
        "admin-socket": settings.admin_socket.parent,
        "store": None if store_file is None else store_file.parent,
    }
    for flag, path in wanted.items():
        there = path
        try:
            while there is not None and not there.exists():
                there = there.parent
        except OSError as error:
            yield Finding(
                id=f"files.{flag}",
                verdict=Verdict.UNKNOWN,
                title=f"--{flag}",
                evidence=f"{path} cannot be looked at: {error.strerror}",
                next_step="run this as root",
            )
            continue
        if there is not None and not (there.is_dir() and os.access(there, os.W_OK)):
            yield Finding(
                id=f"files.{flag}",
                verdict=Verdict.FAIL,
                title=f"--{flag}",
                evidence=f"{there} cannot be written, or is no directory",
            )
    unit = installed_unit(["tundp.service", "tundp@.service"])
    if unit is None:
        return
    for flag, path in wanted.items():
        if path is not None and not unit.may_write(path.absolute()):
            below = ", ".join(str(each) for each in unit.writable)
            yield Finding(
                id=f"files.unit.{flag}",
                verdict=Verdict.WARN,
                title=f"--{flag}",
                evidence=f"{unit.name} lets the daemon write below {below} only, not in {path}",
                next_step="another path, or ReadWritePaths= in a drop-in: systemctl edit"
                f" {unit.name}",
            )


async def check_ports(inspection: Inspection) -> AsyncIterator[Finding]:
    """Whether what a daemon listens on is free; not asked while one runs."""
    settings, config, chosen = (
        inspection.settings,
        inspection.network_config,
        inspection.interface,
    )
    if config is None or chosen is None or inspection.is_running:
        return
    wanted = []
    if port := config.backend.peer_port:
        wanted.append((socket.SOCK_DGRAM, str(chosen.address), port, "the overlay's udp port"))
    if settings.healthz_port:
        wanted.append(
            (socket.SOCK_STREAM, settings.healthz_ip, settings.healthz_port, "--healthz-port")
        )
    if settings.metrics_addr is not None:
        wanted.append((socket.SOCK_STREAM, *settings.metrics_addr, "--metrics-addr"))
    is_free = True
    with contextlib.ExitStack() as stack:
        for kind, ip, number, what in wanted:
            family = socket.AF_INET6 if ":" in ip else socket.AF_INET
            sock = stack.enter_context(socket.socket(family, kind))
            if kind == socket.SOCK_STREAM:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((ip, number))
            except OSError as error:
                is_free = False
                yield Finding(
                    id="ports.taken",
                    verdict=Verdict.FAIL,
                    title=what,
                    evidence=f"{ip}:{number}: {error.strerror}",
                    next_step="who has it tells ss -lnp (a flanneld still running?)",
                )
    if is_free:
        evidence = ", ".join(f"{ip}:{number}" for _, ip, number, _ in wanted)
        yield Finding(id="ports", verdict=Verdict.OK, evidence=evidence)


async def check_routes(inspection: Inspection) -> AsyncIterator[Finding]:
    """Whether other routes overlap the overlay's network. Where a daemon runs, see `obstacles`."""
    if inspection.network_config is None or inspection.node is not None:
        return
    network = inspection.network_config.network
    links = {link.index: link for link in await inspection.netlink.links()}
    is_clear = True
    for route in await inspection.netlink.routes():
        if route.priority == unreachable.METRIC and not route.is_unicast:
            continue
        if route.destination.prefixlen == 0 or not route.destination.overlaps(network):
            continue
        devices = [links[index] for index in route.indexes if index in links]
        if _is_of_the_overlay(route, devices, inspection):
            continue
        is_clear = False
        over = ", ".join(link.name for link in devices)
        yield Finding(
            id="routes.overlap",
            verdict=Verdict.FAIL if route.destination == network else Verdict.WARN,
            title="route",
            evidence=f"{route.destination} over {over or 'nothing'} overlaps the network {network}:"
            " packets for it do not reach the overlay, or leave it",
            next_step=f"ip route del {route.destination}"
            f"{f' dev {over}' if len(devices) == 1 else ''}, or another Network",
        )
    if is_clear:
        yield Finding(
            id="routes",
            verdict=Verdict.OK,
            evidence=f"no route of the main table but the overlay's own overlaps {network}",
        )


def _is_of_the_overlay(route: Route, devices: Sequence[Link], inspection: Inspection) -> bool:
    """Whether a route is a pods' bridge's, the underlay's, or over the device a start replaces."""
    assert inspection.network_config is not None
    subnet = inspection.subnet
    kinds = {link.kind for link in devices}
    if route.destination == inspection.network_config.network:
        return kinds == {"tun"}
    if inspection.interface is not None and inspection.interface.address in route.destination:
        return True  # the way to the other nodes
    if subnet is not None:
        return route.destination.subnet_of(subnet)
    return kinds == {"bridge"}


async def check_br_netfilter(_: Inspection) -> AsyncIterator[Finding]:
    """Whether bridged packets pass iptables, as kube-proxy needs."""
    if BR_NETFILTER.exists():
        value = BR_NETFILTER.read_text(encoding="ascii").strip()
        seen = f"net.bridge.bridge-nf-call-iptables is {value}"
    elif not BR_NETFILTER.parents[1].is_dir():
        yield Finding(
            id="br_netfilter",
            verdict=Verdict.UNKNOWN,
            evidence=f"{BR_NETFILTER.parents[1]} cannot be seen here: is /proc mounted, and whole?",
        )
        return
    else:
        value, seen = "", "not loaded; flannel would refuse to start, the overlay does not need it"
    if value != "1":
        seen += ": kube-proxy's rules miss pods' traffic within a bridge"
    yield Finding(
        id="br_netfilter", verdict=Verdict.OK if value == "1" else Verdict.NOTE, evidence=seen
    )
