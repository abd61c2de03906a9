"""What the checks of `tundp doctor` share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from tundp.admin import fetch_status
from tundp.daemon.checks.inspection import Inspection
from tundp.errors import PlatformError
from tundp.finding import Finding, Verdict
from tundp.linux.listeners import is_stopped
from tundp.linux.losses import UdpErrors, udp_errors
from tundp.linux.netlink import Link
from tundp.linux.obstacles.scene import PeerPlace, Scene
from tundp.observe.status import DaemonState, Status
from tundp.wire.drop import DropReason

STATUS_S: Final = 3.0
"""Deadline of an answer of the daemon: a look that takes longer says so."""


@dataclass(slots=True, kw_only=True)
class Context:
    """What checks share: the inputs, and what earlier checks found out."""

    inspection: Inspection
    """Of `tundp config check`: settings, store, netlink."""
    status: Status | None
    """The running daemon's; None if none answers, or while it starts."""
    asked: Status | PlatformError
    """What came back when a daemon was asked."""
    pid: int | None
    """The process that listens on the admin socket, also if it does not answer."""
    cni_dir: Path
    udp_before: UdpErrors = field(default_factory=udp_errors)
    probed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when probes of peers are done: counters are compared after that."""
    dead: set[IPv4Address] = field(default_factory=set)
    """PublicIPs of peers that answered nothing through the overlay."""
    heard: int = 0
    """Peers that answered through the overlay."""
    _links: list[Link] | None = None

    async def links(self) -> list[Link]:
        """The links of this host, asked for once. PlatformError."""
        if self._links is None:
            self._links = await self.inspection.netlink.links()
        return self._links

    async def link(self, name: str) -> Link | None:
        """A link by its name; None if there is none."""
        return next((each for each in await self.links() if each.name == name), None)

    def setting(self, name: str) -> str:
        """A setting of the running daemon, as on its command line; empty if that is not known."""
        if self.status is None or name not in self.status.settings:
            return ""
        return self.status.settings[name].value

    @property
    def scene(self) -> Scene | None:
        """What the overlay is on this host, by the daemon's word; None without one."""
        status = self.status
        if status is None or status.network is None or status.subnet is None:
            return None
        if (backend := status.backend) is None:
            return None
        device = backend.device
        name = backend.interface.name if device is None else device.name
        peers = [PeerPlace(peer.subnet, peer.public_ip) for peer in status.peers]
        return Scene(
            network=status.network,
            subnet=status.subnet,
            device=name,
            is_open=bool(name),
            is_tunnel=device is not None,
            uplink=backend.interface.name,
            address=backend.interface.address,
            port=backend.port,
            peers=tuple(peers[:: max(1, len(peers) // 256)]),
            peer_count=len(peers),
            accepts=self.setting("iptables-forward-rules") == "true",
            pid=status.pid,
        )


Check = Callable[[Context], AsyncIterator[Finding]]


def finding(
    finding_id: str,
    verdict: Verdict,
    evidence: str,
    *,
    command: str = "",
    on: str = "",
    words: str = "",
    meaning: str = "",
    **facts: str,
) -> Finding:
    """A finding with the command that mends it. on: the host it is for, empty for this one.

    words: what else there is to say of what to do.
    """
    known: dict[str, str] = dict(facts)
    if command:
        known["command"] = command
    if on:
        known["on"] = on
    where = f"on {on}: " if on and command else ""
    step = f"{where}{command}" if command else ""
    if words:
        step = f"{step}  ({words})" if step else words
    return Finding(
        id=finding_id,
        verdict=verdict,
        evidence=evidence,
        meaning=meaning,
        next_step=step,
        facts=known,
    )


async def ask_daemon(path: Path, pid: int | None = None) -> Status | PlatformError:
    """The status of the daemon behind `path`, or why there is none within STATUS_S.

    pid: who listens there, if known: a process that is stopped is not waited for.
    """
    if is_stopped(pid):
        return PlatformError(f"the daemon on {path} is stopped")
    try:
        async with asyncio.timeout(STATUS_S):
            return await fetch_status(path)
    except PlatformError as error:
        return error
    except TimeoutError:
        return PlatformError(f"the daemon on {path} took longer than {STATUS_S:.0f} s to answer")


def running(asked: Status | PlatformError) -> Status | None:
    """The status, if it is one of a daemon that has started."""
    if isinstance(asked, PlatformError) or asked.state is not DaemonState.RUNNING:
        return None
    return asked


def reasons() -> Mapping[str, DropReason]:
    """Drop reasons by the name they are counted under."""
    return {reason.label: reason for reason in DropReason}
