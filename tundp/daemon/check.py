"""`tundp config check`: everything a start depends on, looked at without starting.

Each finding says what was looked at and, if it is bad, what to do. Nothing is changed:
no lease is taken, no device made.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, Final

from tundp.config import Config
from tundp.daemon.underlay import selection_of
from tundp.errors import ConfigError, PlatformError, StoreError
from tundp.lease.model import Snapshot
from tundp.lease.network import NetworkConfig, parse_network_config
from tundp.lease.table import keys_of
from tundp.linux import capability, fallback
from tundp.linux.command import find
from tundp.linux.iface import Interface, look
from tundp.linux.netlink import Netlink
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


async def check(config: Config, store: Store) -> list[Finding]:
    """All findings. Closes the store."""
    try:
        return [finding async for finding in _look(config, store)]
    finally:
        await store.close()


async def _look(config: Config, store: Store) -> AsyncIterator[Finding]:
    yield Finding(Verdict.OK, "settings", config.describe())
    yield _rights()
    network: NetworkConfig | None = None
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
        for finding in _leases(store, snapshot):
            yield finding
    async with Netlink() as netlink:
        selection = selection_of(config)
        try:
            chosen = await look(netlink, selection, None if network is None else network.network)
        except (ConfigError, PlatformError) as error:
            yield Finding(Verdict.FAIL, "interface", str(error))
        else:
            for finding in _interface(chosen):
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
    yield _firewall(config, is_nftables=network is not None and network.enable_nftables)


def _rights() -> Finding:
    try:
        capability.require(capability.CAP_NET_ADMIN, "a TUN device, its address and its route")
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    except PlatformError as error:
        return Finding(Verdict.FAIL, "rights", str(error))
    except OSError as error:
        return Finding(
            Verdict.FAIL,
            "TUN",
            f"cannot open /dev/net/tun: {error.strerror}; load the module (modprobe tun), or"
            " give the container the device (--device /dev/net/tun)",
        )
    os.close(descriptor)
    return Finding(Verdict.OK, "rights", "CAP_NET_ADMIN, and /dev/net/tun opens")


def _leases(store: Store, snapshot: Snapshot) -> list[Finding]:
    found = [Finding(Verdict.OK, "store", f"{store.description}: {len(snapshot.leases)} leases")]
    found += [
        Finding(Verdict.WARN, "unreadable entry", f"{entry.name}: {entry.why}")
        for entry in snapshot.bad
    ]
    if held := keys_of(snapshot.bad):
        found.append(
            Finding(Verdict.WARN, "held by nobody known", ", ".join(str(key) for key in held))
        )
    return found


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


def _firewall(config: Config, *, is_nftables: bool) -> Finding:
    if not (config.ip_masq or config.iptables_forward_rules):
        return Finding(Verdict.OK, "firewall", "no rules wanted")
    tool = "nft" if is_nftables else "iptables"
    if (path := find(tool)) is None:
        return Finding(
            Verdict.WARN,
            "firewall",
            f"{tool} is not installed: no {'masquerading and no ' if config.ip_masq else ''}forward"
            " rules; install it, or say --iptables-forward-rules=false",
        )
    return Finding(Verdict.OK, "firewall", f"rules by {path}")
