"""`tundp config check`: everything a start depends on, looked at without starting.

Each finding says what was looked at and, if it is bad, what to do. Nothing is changed:
no lease is taken, no device made.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, Final

from tundp.admin import fetch_status
from tundp.daemon.lease_cache import Memory
from tundp.daemon.underlay import selection_of
from tundp.errors import ConfigError, OutOfSubnets, PlatformError, StoreError
from tundp.lease import subnet_env
from tundp.lease.allocate import Keep, plan_claim
from tundp.lease.identity import identity_of
from tundp.lease.model import Snapshot
from tundp.lease.network import NetworkConfig, parse_network_config
from tundp.lease.table import keys_of
from tundp.linux import capability, fallback
from tundp.linux.command import find
from tundp.linux.iface import Interface, look
from tundp.linux.netlink import Netlink
from tundp.linux.tun import require_device
from tundp.settings.settings import Settings
from tundp.settings.show import document
from tundp.store.auto import AutoStore
from tundp.store.base import Store
from tundp.wire import overhead

BR_NETFILTER: Final = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
ANSWER_S: Final = 12.0
"""For the store, all endpoints of it."""


class Verdict(Enum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at."""

    verdict: Verdict
    what: str
    detail: str

    @property
    def is_failure(self) -> bool:
        """Whether a start would fail, or wait."""
        return self.verdict is Verdict.FAIL

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"verdict": self.verdict.value, "what": self.what, "detail": self.detail}


async def check(settings: Settings, store: Store, *, whose: str = "given") -> list[Finding]:
    """All findings. Closes the store. whose: in words, whose settings these are."""
    try:
        return [finding async for finding in _look(settings, store, whose)]
    finally:
        await store.close()


async def _look(settings: Settings, store: Store, whose: str) -> AsyncIterator[Finding]:
    yield Finding(Verdict.OK, "settings", f"{whose}: {settings.describe()}")
    yield _rights()
    running = await _running(settings)
    if running is not None:
        yield running
    for finding in _files(settings):
        yield finding
    network: NetworkConfig | None = None
    snapshot: Snapshot | None = None
    try:
        async with asyncio.timeout(ANSWER_S):
            text = await store.network_config()
            network = parse_network_config(text, store.description)
            snapshot = await store.snapshot()
    except (StoreError, ConfigError, TimeoutError) as error:
        yield Finding(Verdict.FAIL, "store", str(error) or f"{store.description} timed out")
    else:
        pool = network.pool
        yield Finding(
            Verdict.OK,
            "network config",
            f"{network.network}, /{pool.subnet_len} subnets from {pool.subnet_min} to"
            f" {pool.subnet_max}, udp port {network.port}",
        )
        if isinstance(store, AutoStore) and store.is_ambiguous:
            yield Finding(
                Verdict.WARN,
                "network config",
                "there is one in etcd v3 and one in v2: v3 counts, and the nodes in v2 stay unseen;"
                " --etcd-api=v2 or both, or delete the one nobody uses",
            )
        for finding in _leases(store, snapshot):
            yield finding
    async with Netlink() as netlink:
        selection = selection_of(settings)
        try:
            chosen = await look(netlink, selection, None if network is None else network.network)
        except (ConfigError, PlatformError) as error:
            yield Finding(Verdict.FAIL, "interface", str(error))
        else:
            for finding in _interface(chosen):
                yield finding
            if snapshot is not None and network is not None:
                yield _claim(settings, network, snapshot, chosen.public_ip)
            if network is not None and running is None:
                for finding in _ports(settings, chosen.address, network.port):
                    yield finding
        if network is not None:
            async for finding in _routes(netlink, network.network):
                yield finding
    if not BR_NETFILTER.exists():
        yield Finding(
            Verdict.OK,
            "br_netfilter",
            "not loaded; flannel would refuse to start, the overlay does not need it, but"
            " kube-proxy's rules miss pods' traffic within a bridge without it",
        )
    yield _firewall(settings, is_nftables=network is not None and network.enable_nftables)


def _rights() -> Finding:
    try:
        capability.require(capability.CAP_NET_ADMIN, "a TUN device, its address and its route")
        require_device()
    except PlatformError as error:
        return Finding(Verdict.FAIL, "rights", str(error))
    return Finding(Verdict.OK, "rights", "CAP_NET_ADMIN, and /dev/net/tun opens")


def _leases(store: Store, snapshot: Snapshot) -> list[Finding]:
    found = [Finding(Verdict.OK, "store", f"{store.description}: {len(snapshot.leases)} leases")]
    found += [
        Finding(Verdict.WARN, "unreadable entry", f"{entry.name}: {entry.why}")
        for entry in snapshot.bad
    ]
    if held := keys_of(snapshot.bad):
        found.append(
            Finding(
                Verdict.WARN,
                "subnets not given out",
                ", ".join(str(key) for key in held),
            )
        )
    return found


async def _running(settings: Settings) -> Finding | None:
    try:
        status = await fetch_status(settings.admin_socket)
    except PlatformError:
        return None
    pid = f"pid {status['pid']}, {settings.admin_socket}"
    mine = {name: each["value"] for name, each in document(settings).items()}
    theirs = {name: each["value"] for name, each in status.get("settings", {}).items()}
    differing = [name for name in mine if mine[name] != theirs.get(name)]
    if not differing:
        return Finding(
            Verdict.OK, "daemon", f"runs with these settings ({pid}); its ports are not tried"
        )
    shown = ", ".join(f"{name} {theirs[name]!r}" for name in differing if name in theirs)
    return Finding(
        Verdict.WARN,
        "daemon",
        f"one runs already ({pid}), with other settings: {shown or 'not reported'}; --running"
        " checks those; another network of this host needs its own --subnet-file",
    )


def _files(settings: Settings) -> list[Finding]:
    """Whether the files a daemon writes can be written."""
    found = []
    for flag, path in (
        ("subnet-file", settings.subnet_file.parent),
        ("state-dir", settings.state_dir),
        ("admin-socket", settings.admin_socket.parent),
    ):
        there = path
        while there is not None and not there.exists():
            there = there.parent
        if there is not None and not (there.is_dir() and os.access(there, os.W_OK)):
            found.append(
                Finding(Verdict.FAIL, f"--{flag}", f"{there} cannot be written, or is no directory")
            )
    return found


def _ports(settings: Settings, address: IPv4Address, port: int) -> list[Finding]:
    """Whether what a daemon listens on is free."""
    found = []
    wanted = [(socket.SOCK_DGRAM, str(address), port, "the overlay's udp port")]
    if settings.healthz_port:
        wanted.append(
            (socket.SOCK_STREAM, settings.healthz_ip, settings.healthz_port, "--healthz-port")
        )
    if settings.metrics_addr is not None:
        wanted.append((socket.SOCK_STREAM, *settings.metrics_addr, "--metrics-addr"))
    with contextlib.ExitStack() as stack:
        for kind, ip, number, what in wanted:
            family = socket.AF_INET6 if ":" in ip else socket.AF_INET
            sock = stack.enter_context(socket.socket(family, kind))
            if kind == socket.SOCK_STREAM:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((ip, number))
            except OSError as error:
                found.append(
                    Finding(
                        Verdict.FAIL,
                        what,
                        f"{ip}:{number}: {error.strerror}; who has it tells ss -lnp (a flanneld"
                        " still running?)",
                    )
                )
    return found or [Finding(Verdict.OK, "ports", ", ".join(f"{ip}:{n}" for _, ip, n, _ in wanted))]


def _claim(
    settings: Settings, network: NetworkConfig, snapshot: Snapshot, public_ip: IPv4Address
) -> Finding:
    """Which lease a start would take."""
    node_id = Memory(settings.state_dir, settings.instance).known_node_id()
    try:
        text = settings.subnet_file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    previous = subnet_env.previous_key(text)
    try:
        plan = plan_claim(
            snapshot.leases,
            unreadable=keys_of(snapshot.bad),
            config=network,
            public_ip=public_ip,
            node_id=node_id,
            previous=previous,
            rng=random.Random(),
        )
    except OutOfSubnets as error:
        return Finding(Verdict.FAIL, "lease", str(error))
    if isinstance(plan, Keep):
        holder = identity_of(plan.lease)
        if holder is None:
            whose = f"written by a flannel with PublicIP {public_ip}, or by hand"
        elif holder.node_id == node_id:
            whose = "ours from before"
        else:
            return Finding(
                Verdict.WARN,
                "lease",
                f"{plan.lease.key} with our PublicIP {public_ip} is of node {holder}: a start asks"
                " whether that is alive, and fails if it is",
            )
        return Finding(Verdict.OK, "lease", f"would keep {plan.lease.key}, {whose}")
    if plan.key == previous:
        return Finding(Verdict.OK, "lease", f"would take {plan.key} again, as in subnet.env")
    if previous is not None:
        return Finding(
            Verdict.WARN,
            "lease",
            f"none for {public_ip}, and {previous} of subnet.env cannot be had: a new subnet would"
            " be taken, and bridges and pods made before have addresses of the old one",
        )
    return Finding(Verdict.OK, "lease", "would take a new one")


def _interface(chosen: Interface) -> list[Finding]:
    mtu = overhead.tun_mtu(chosen.link.mtu, chosen.link.name)
    found = [
        Finding(
            Verdict.OK,
            "interface",
            f"{chosen.link.name} ({chosen.address}), advertising {chosen.public_ip}, overlay MTU"
            f" {mtu}: {chosen.why}",
        )
    ]
    found += [Finding(Verdict.OK, "not taken", other) for other in chosen.others]
    found += [Finding(Verdict.WARN, "interface", warning) for warning in chosen.warnings]
    return found


async def _routes(netlink: Netlink, network: IPv4Network) -> AsyncIterator[Finding]:
    """Whatever else has addresses or routes of the overlay's (P24)."""
    names = {link.index: link.name for link in await netlink.links()}
    clashes = 0
    for route in await netlink.routes():
        over = ", ".join(names.get(index, str(index)) for index in route.indexes)
        if route.priority == fallback.METRIC and not route.is_unicast:
            continue
        is_pods = any(
            names.get(i, "").startswith(("cni", "docker", "flannel")) for i in route.indexes
        )
        if route.destination.prefixlen == 0 or is_pods or not route.destination.overlaps(network):
            continue
        clashes += 1
        verdict = Verdict.FAIL if route.destination == network else Verdict.WARN
        yield Finding(
            verdict,
            "route",
            f"{route.destination} over {over or 'nothing'} overlaps the network {network}:"
            " packets for it do not reach the overlay, or leave it",
        )
    if not clashes:
        yield Finding(Verdict.OK, "routes", f"none in the way of {network}")


def _firewall(settings: Settings, *, is_nftables: bool) -> Finding:
    if not (settings.ip_masq or settings.iptables_forward_rules):
        return Finding(Verdict.OK, "firewall", "no rules wanted")
    tool = "nft" if is_nftables else "iptables"
    if (path := find(tool)) is None:
        return Finding(
            Verdict.WARN,
            "firewall",
            f"{tool} is not installed: no {'masquerading and no ' if settings.ip_masq else ''}"
            "forward rules; install it, or say --iptables-forward-rules=false",
        )
    return Finding(Verdict.OK, "firewall", f"rules by {path}")
