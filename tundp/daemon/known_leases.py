"""The lease table for commands that judge packets: the running daemon's, or read from the store.

From the store it is read once, and nothing is written there.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Final

from tundp.admin import fetch_document, fetch_ledger, read_status
from tundp.backend.choose import kind_of
from tundp.daemon.checks import overlay
from tundp.daemon.checks.inspection import Inspection
from tundp.daemon.stores import open_store
from tundp.errors import PlatformError, StoreError
from tundp.finding import Finding
from tundp.lease.model import LeaseKey
from tundp.lease.routing import Routing
from tundp.linux.iface import Interface
from tundp.linux.netlink import Netlink
from tundp.observe.ledger import Ledger, LedgerRows
from tundp.observe.status import DaemonState, Status
from tundp.settings.settings import Settings
from tundp.store.base import Store

_PROBE_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownLeases:
    """A lease table, where it is from, and what surrounds the node it is of."""

    leases: Ledger
    origin: str
    """In words."""
    status: Status | None
    """The running daemon's; None: none was asked."""
    device: str
    """The TUN; with a backend that has none, the interface to the other nodes."""
    uplink: str
    address: IPv4Address
    """What datagrams leave from."""
    accepts: bool
    """Whether rules of ours, at the end of iptables' FORWARD, accept the overlay's packets."""


async def known_leases(
    settings: Settings,
    netlink: Netlink,
    *,
    asks_daemon: bool,
    about: Collection[IPv4Address] = (),
) -> KnownLeases:
    """The running daemon's table; the store's where none answers, or none is to be asked.

    about: of the daemon's only what concerns these addresses.
    """
    if asks_daemon and await asyncio.to_thread(_is_answering, settings.admin_socket):
        return await of_daemon(settings, about)
    return await of_store(settings, open_store(settings), netlink)


def _is_answering(path: Path) -> bool:
    """Whether anybody listens on the admin socket, or it cannot be told."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:
            return True
    return True


async def of_daemon(settings: Settings, about: Collection[IPv4Address] = ()) -> KnownLeases:
    """What the daemon on the admin socket knows. PlatformError if none answers, or not yet."""
    path = settings.admin_socket
    document = await fetch_document(path)
    # Peers nobody asks about are not read: of tens of thousands that takes longer than all else.
    peers = document.pop("peers", [])
    status = read_status(path, document)
    backend = status.backend
    if status.state is not DaemonState.RUNNING or backend is None:
        raise PlatformError(
            f"the daemon on {path} is starting and has no lease yet: it waits for"
            f" {status.waiting_for or 'its backend'}"
        )
    leases = await fetch_ledger(path, about)
    subnets = {str(each.subnet) for each in leases.leases} if about else set()
    document["peers"] = [each for each in peers if each.get("subnet") in subnets]
    status = read_status(path, document)
    device = backend.interface.name
    if backend.device is not None:
        device = backend.device.name or settings.tun_name.replace("%d", "0")
    return KnownLeases(
        leases=leases,
        origin=f"the running daemon, pid {status.pid}",
        status=status,
        device=device,
        uplink=backend.interface.name,
        address=backend.interface.address,
        accepts=status.firewall is not None and status.firewall.flavour == "iptables",
    )


async def of_store(settings: Settings, store: Store, netlink: Netlink) -> KnownLeases:
    """What a node with these settings would know. Closes the store, writes nothing.

    PlatformError or StoreError names what of the network config, the leases or the interface to
    the other nodes cannot be had.
    """
    inspection = Inspection(settings=settings, store=store, netlink=netlink, whose="given")
    try:
        for check in (overlay.check_store, overlay.check_interface):
            await _must_hold(check(inspection))
        async for _ in overlay.check_lease(inspection):
            pass
    finally:
        await store.close()
    config, chosen = inspection.network_config, inspection.interface
    assert config is not None and chosen is not None
    routing = await _judged(inspection, chosen)
    has_device = bool(config.backend.peer_port)
    mtu = kind_of(config.backend).mtu(chosen)
    leases = Ledger(
        network=config.network,
        subnet=inspection.subnet,
        public_ip=chosen.public_ip,
        backend=config.backend.name,
        port=config.backend.peer_port or None,
        mtu=mtu,
        source_check=settings.source_check,
        admitted=settings.source_admit,
        own_addresses=tuple(sorted(routing.own_addresses)),
        broadcasts=tuple(sorted(routing.broadcasts)),
        revision=routing.revision,
        leases=LedgerRows.of(routing).made(),
        bad_entries=len(routing.bad_entries),
    )
    return KnownLeases(
        leases=leases,
        origin=f"{store.description}, read once: no daemon answers",
        status=None,
        device=settings.tun_name.replace("%d", "0") if has_device else chosen.link.name,
        uplink=chosen.link.name,
        address=chosen.address,
        accepts=settings.iptables_forward_rules and not config.enable_nftables,
    )


async def _must_hold(findings: AsyncIterator[Finding]) -> None:
    async for finding in findings:
        if finding.is_failure:
            raise StoreError(f"no lease table: {finding.title}: {finding.evidence}")


async def _judged(inspection: Inspection, chosen: Interface) -> Routing:
    """The ledger a start would have: which leases are peers, by what this host has now."""
    config, snapshot = inspection.network_config, inspection.snapshot
    assert config is not None and snapshot is not None
    addresses = await inspection.netlink.addresses()
    own = next(
        (each.key for each in snapshot.leases if each.key.subnet == inspection.subnet),
        LeaseKey(IPv4Interface("0.0.0.0/32")),
    )
    routing = Routing(
        network=config.network,
        pool=config.pool,
        backend=config.backend,
        own_key=own,
        own_addresses=[chosen.public_ip, *(each.interface.ip for each in addresses)],
        public_ip=chosen.public_ip,
    )
    routing.broadcasts = frozenset(one for each in addresses for one in each.broadcasts)
    routing.apply(snapshot)
    return routing
