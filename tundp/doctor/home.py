"""This node as packets to a peer leave it: by its daemon's word, or by the kernel's alone."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Final

from tundp.admin import fetch_leases, fetch_status
from tundp.doctor.context import running
from tundp.doctor.whom import Whom, address_alone, find_peer
from tundp.errors import PlatformError
from tundp.lease import subnet_env
from tundp.linux.listeners import is_stopped, listener
from tundp.linux.netlink import Netlink
from tundp.observe.leases import Leases
from tundp.observe.ledger import DEFAULT_PORT
from tundp.observe.status import PeerStatus, Status

STATUS_S: Final = 10.0
"""Deadline of the daemon's status, which takes seconds with tens of thousands of peers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """This node: what packets to a peer leave from."""

    path: Path
    """Its admin socket."""
    address: IPv4Address
    """Of the underlay."""
    uplink: str
    tun_address: IPv4Address | None = None
    """None: the backend has no TUN, or there is no daemon."""
    status: Status | None = None
    daemon: str = ""
    """Why the daemon could not be asked; empty if it could."""

    @property
    def subnet(self) -> IPv4Network | None:
        """This node's; None without a daemon."""
        return None if self.status is None else self.status.subnet


async def find(text: str, netlink: Netlink, *, path: Path, subnet_file: Path) -> tuple[Home, Whom]:
    """This node, and the peer that `text` names.

    Without a daemon that answers on `path` only a PublicIP is understood. ConfigError for a text
    that names no peer; PlatformError without rights, or without a way to it.
    """
    asked = await daemon_status(path)
    if isinstance(asked, Status):
        leases = await leases_of(path)
        return home_of(asked, path), find_peer(text, asked, leases)
    network = await asyncio.to_thread(_network, subnet_file)
    to = address_alone(text, network)
    peer = PeerStatus(subnet=IPv4Network(to), public_ip=to, port=DEFAULT_PORT)
    home = await home_alone(netlink, path, to, str(asked))
    return home, Whom(peer=peer, is_address_only=True)


async def daemon_status(path: Path) -> Status | PlatformError:
    """The status of a daemon that has started, or why there is none.

    PlatformError is raised if only others may ask it.
    """
    if is_stopped(await asyncio.to_thread(listener, path)):
        return PlatformError(f"the daemon on {path} is stopped (SIGSTOP): kill -CONT its process")
    try:
        asked = await fetch_status(path, limit_s=STATUS_S)
    except PlatformError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise
        return error
    if running(asked) is None:
        return PlatformError(f"the daemon on {path} is starting: it waits for {asked.waiting_for}")
    return asked


async def leases_of(path: Path) -> Leases | None:
    """Leases with host names; None if the daemon does not tell."""
    with contextlib.suppress(PlatformError):
        return await fetch_leases(path)
    return None


def home_of(status: Status, path: Path) -> Home:
    """This node by its daemon's word. PlatformError while the daemon has no backend yet."""
    backend = status.backend
    if backend is None or status.subnet is None:
        raise PlatformError(f"the daemon on {path} has no backend yet: tundp status")
    has_tun = backend.device is not None
    return Home(
        path=path,
        address=backend.interface.address,
        uplink=backend.interface.name,
        tun_address=status.subnet.network_address if has_tun else None,
        status=status,
    )


async def home_alone(netlink: Netlink, path: Path, to: IPv4Address, daemon: str) -> Home:
    """This host without a daemon: what the kernel would send from. PlatformError: no route."""
    route = await netlink.route_to(to)
    names = {link.index: link.name for link in await netlink.links()}
    if route.source is None:
        raise PlatformError(f"this host has no address to send to {to} from: ip route get {to}")
    return Home(path=path, address=route.source, uplink=names.get(route.index, ""), daemon=daemon)


def _network(subnet_file: Path) -> IPv4Network | None:
    """The overlay, as the last start wrote it to subnet.env; None if it did not."""
    try:
        return subnet_env.previous_network(subnet_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
