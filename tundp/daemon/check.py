"""`tundp config check`: everything a start depends on, checked without starting.

`CHECKS` is the list, in the order shown. Each check yields findings whose ids begin with its
own, and leaves what later ones need in the `Inspection`; a check whose needs could not be met
yields nothing. Nothing is changed: no lease is taken, no device made.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from types import MappingProxyType
from typing import Final

from tundp.admin import fetch_status
from tundp.daemon.underlay import selection_of
from tundp.daemon.unit import installed_unit
from tundp.errors import ConfigError, OutOfSubnets, PlatformError, StoreError
from tundp.finding import Finding, Verdict
from tundp.lease import subnet_env
from tundp.lease.allocate import Keep, plan_claim
from tundp.lease.identity import identity_of
from tundp.lease.model import Snapshot
from tundp.lease.network import BackendConfig, NetworkConfig, parse_network_config
from tundp.lease.table import keys_of
from tundp.linux import capability, unreachable
from tundp.linux.command import find
from tundp.linux.iface import Interface, look
from tundp.linux.netlink import Netlink
from tundp.linux.tun import require_device
from tundp.settings.settings import Settings
from tundp.settings.show import reported
from tundp.store.auto import AutoStore
from tundp.store.base import Store
from tundp.subnet.lease_cache import LeaseCache
from tundp.wire import overhead

BR_NETFILTER: Final = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
ANSWER_S: Final = 12.0
"""Deadline for the store, all of its endpoints together."""


@dataclass(slots=True, kw_only=True)
class Inspection:
    """What checks share: the inputs, and what earlier checks found out."""

    settings: Settings
    store: Store
    netlink: Netlink
    whose: str
    """In words, whose settings these are."""
    is_running: bool = False
    """Whether a daemon answers on the admin socket."""
    network_config: NetworkConfig | None = None
    snapshot: Snapshot | None = None
    interface: Interface | None = None


Check = Callable[[Inspection], AsyncIterator[Finding]]


async def check(settings: Settings, store: Store, *, whose: str = "given") -> list[Finding]:
    """Run every check. Closes the store. whose: in words, whose settings these are."""
    try:
        async with Netlink() as netlink:
            inspection = Inspection(settings=settings, store=store, netlink=netlink, whose=whose)
            return [finding for each in CHECKS.values() async for finding in each(inspection)]
    finally:
        await store.close()


async def _check_settings(inspection: Inspection) -> AsyncIterator[Finding]:
    yield Finding(
        id="settings",
        verdict=Verdict.OK,
        evidence=f"{inspection.whose}: {inspection.settings.describe()}",
    )


async def _check_rights(_: Inspection) -> AsyncIterator[Finding]:
    try:
        capability.require(capability.CAP_NET_ADMIN, "a TUN device, its address and its route")
        require_device()
    except PlatformError as error:
        yield Finding(id="rights", verdict=Verdict.FAIL, evidence=str(error))
    else:
        yield Finding(
            id="rights", verdict=Verdict.OK, evidence="CAP_NET_ADMIN, and /dev/net/tun opens"
        )


async def _check_daemon(inspection: Inspection) -> AsyncIterator[Finding]:
    """Whether a daemon runs already."""
    path = inspection.settings.admin_socket
    try:
        status = await fetch_status(path)
    except PlatformError:
        return
    inspection.is_running = True
    mine = reported(inspection.settings)
    theirs = {name: each.value for name, each in status.settings.items()}
    differing = [f"{name} {theirs[name]!r}" for name in mine if theirs.get(name) != mine[name]]
    if not differing:
        yield Finding(
            id="daemon",
            verdict=Verdict.OK,
            evidence=f"runs with these settings (pid {status.pid}, {path}); ports are not tried",
        )
    else:
        yield Finding(
            id="daemon",
            verdict=Verdict.WARN,
            evidence=f"one runs already (pid {status.pid}, {path}), with other settings:"
            f" {', '.join(differing)}; ports are not tried",
            next_step="--running checks the running daemon's settings; another network of this"
            " host needs its own --subnet-file",
        )


async def _check_files(inspection: Inspection) -> AsyncIterator[Finding]:
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
        while there is not None and not there.exists():
            there = there.parent
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


async def _check_store(inspection: Inspection) -> AsyncIterator[Finding]:
    """The network config and the leases."""
    store = inspection.store
    try:
        async with asyncio.timeout(ANSWER_S):
            text = await store.network_config()
            config = inspection.network_config = parse_network_config(text, store.description)
            snapshot = inspection.snapshot = await store.snapshot()
    except (StoreError, ConfigError, TimeoutError) as error:
        evidence = str(error) or f"{store.description} timed out"
        yield Finding(id="store", verdict=Verdict.FAIL, evidence=evidence)
        return
    pool = config.pool
    yield Finding(
        id="store.network-config",
        verdict=Verdict.OK,
        title="network config",
        evidence=f"{config.network}, /{pool.subnet_len} subnets from {pool.subnet_min} to"
        f" {pool.subnet_max}, backend {_backend(config.backend)}",
    )
    if isinstance(store, AutoStore) and store.is_ambiguous:
        yield Finding(
            id="store.two-configs",
            verdict=Verdict.WARN,
            title="network config",
            evidence="there is one in etcd v3 and one in v2: v3 counts, and the nodes in v2 stay"
            " unseen",
            next_step="--etcd-api=v2 or both, or delete the one nobody uses",
        )
    for finding in _lease_findings(store, snapshot):
        yield finding


def _backend(config: BackendConfig) -> str:
    return f"{config.name}, port {config.peer_port}" if config.peer_port else config.name


def _lease_findings(store: Store, snapshot: Snapshot) -> Iterator[Finding]:
    yield Finding(
        id="store",
        verdict=Verdict.OK,
        evidence=f"{store.description}: {len(snapshot.leases)} leases",
    )
    for entry in snapshot.bad:
        yield Finding(
            id="store.unreadable",
            verdict=Verdict.WARN,
            title="unreadable entry",
            evidence=f"{entry.name}: {entry.why}",
        )
    if held := keys_of(snapshot.bad):
        yield Finding(
            id="store.withheld",
            verdict=Verdict.WARN,
            title="subnets not given out",
            evidence=", ".join(str(key) for key in held),
        )


async def _check_interface(inspection: Inspection) -> AsyncIterator[Finding]:
    """Which interface leads to the other nodes."""
    config = inspection.network_config
    try:
        chosen = inspection.interface = await look(
            inspection.netlink,
            selection_of(inspection.settings),
            None if config is None else config.network,
        )
    except (ConfigError, PlatformError) as error:
        yield Finding(id="interface", verdict=Verdict.FAIL, evidence=str(error))
        return
    mtu = overhead.tun_mtu(chosen.link.mtu, chosen.link.name)
    yield Finding(
        id="interface",
        verdict=Verdict.OK,
        evidence=f"{chosen.link.name} ({chosen.address}), advertising {chosen.public_ip},"
        f" overlay MTU {mtu} (chosen: {chosen.why})",
    )
    for other in chosen.others:
        yield Finding(
            id="interface.other", verdict=Verdict.NOTE, title="interface not taken", evidence=other
        )
    for warning in chosen.warnings:
        yield Finding(
            id="interface.warning", verdict=Verdict.WARN, title="interface", evidence=warning
        )


async def _check_lease(inspection: Inspection) -> AsyncIterator[Finding]:
    """Which lease a start would take."""
    settings, config = inspection.settings, inspection.network_config
    snapshot, interface = inspection.snapshot, inspection.interface
    if config is None or snapshot is None or interface is None:
        return
    node_id = LeaseCache(settings.state_dir, settings.instance).known_node_id()
    try:
        text = settings.subnet_file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    previous = subnet_env.previous_key(text)
    public_ip = interface.public_ip
    verdict = Verdict.OK
    try:
        plan = plan_claim(
            snapshot.leases,
            unreadable=keys_of(snapshot.bad),
            config=config,
            public_ip=public_ip,
            node_id=node_id,
            previous=previous,
            rng=random.Random(),
        )
    except OutOfSubnets as error:
        verdict, evidence = Verdict.FAIL, str(error)
    else:
        if isinstance(plan, Keep):
            verdict, evidence = _kept(plan, public_ip, node_id)
        elif plan.key == previous:
            evidence = f"would take {plan.key} again, as in subnet.env"
        elif previous is not None:
            verdict = Verdict.WARN
            evidence = (
                f"none for {public_ip}, and {previous} of subnet.env cannot be had: a new subnet"
                " would be taken, and bridges and pods made before have addresses of the old one"
            )
        else:
            evidence = "would take a new one"
    yield Finding(id="lease", verdict=verdict, evidence=evidence)


def _kept(plan: Keep, public_ip: IPv4Address, node_id: str | None) -> tuple[Verdict, str]:
    """Verdict and evidence for a lease that is there already."""
    key, holder = plan.lease.key, identity_of(plan.lease)
    if holder is None:
        return (
            Verdict.OK,
            f"would keep {key}, found by its PublicIP {public_ip}",
        )
    if holder.node_id == node_id:
        return Verdict.OK, f"would keep {key}, ours from before"
    return (
        Verdict.WARN,
        f"{key} with our PublicIP {public_ip} is of node {holder}: a start asks whether that is"
        " alive, and fails if it is",
    )


async def _check_ports(inspection: Inspection) -> AsyncIterator[Finding]:
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


async def _check_routes(inspection: Inspection) -> AsyncIterator[Finding]:
    """Whether anything else has addresses or routes of the overlay's network."""
    if inspection.network_config is None:
        return
    network = inspection.network_config.network
    names = {link.index: link.name for link in await inspection.netlink.links()}
    is_clear = True
    for route in await inspection.netlink.routes():
        over = ", ".join(names.get(index, str(index)) for index in route.indexes)
        if route.priority == unreachable.METRIC and not route.is_unicast:
            continue
        is_pods = any(
            names.get(i, "").startswith(("cni", "docker", "flannel")) for i in route.indexes
        )
        if route.destination.prefixlen == 0 or is_pods or not route.destination.overlaps(network):
            continue
        is_clear = False
        yield Finding(
            id="routes.overlap",
            verdict=Verdict.FAIL if route.destination == network else Verdict.WARN,
            title="route",
            evidence=f"{route.destination} over {over or 'nothing'} overlaps the network {network}:"
            " packets for it do not reach the overlay, or leave it",
        )
    if is_clear:
        yield Finding(id="routes", verdict=Verdict.OK, evidence=f"none in the way of {network}")


async def _check_br_netfilter(_: Inspection) -> AsyncIterator[Finding]:
    if not BR_NETFILTER.exists():
        yield Finding(
            id="br_netfilter",
            verdict=Verdict.OK,
            evidence="not loaded; flannel would refuse to start, the overlay does not need it, but"
            " kube-proxy's rules miss pods' traffic within a bridge without it",
        )


async def _check_firewall(inspection: Inspection) -> AsyncIterator[Finding]:
    settings, config = inspection.settings, inspection.network_config
    if not (settings.ip_masq or settings.iptables_forward_rules):
        yield Finding(id="firewall", verdict=Verdict.OK, evidence="no rules wanted")
        return
    tool = "nft" if config is not None and config.enable_nftables else "iptables"
    if (path := find(tool)) is not None:
        yield Finding(id="firewall", verdict=Verdict.OK, evidence=f"rules by {path}")
        return
    yield Finding(
        id="firewall",
        verdict=Verdict.WARN,
        evidence=f"{tool} is not installed: no"
        f" {'masquerading and no ' if settings.ip_masq else ''}forward rules",
        next_step="install it, or say --iptables-forward-rules=false",
    )


CHECKS: Final[Mapping[str, Check]] = MappingProxyType(
    {
        "settings": _check_settings,
        "rights": _check_rights,
        "daemon": _check_daemon,
        "files": _check_files,
        "store": _check_store,
        "interface": _check_interface,
        "lease": _check_lease,
        "ports": _check_ports,
        "routes": _check_routes,
        "br_netfilter": _check_br_netfilter,
        "firewall": _check_firewall,
    }
)
"""Every check by its id, in the order of the answer; each needs only what earlier ones found."""
