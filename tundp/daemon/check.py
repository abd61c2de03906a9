"""`tundp config check`: everything a start depends on, checked without starting.

`CHECKS` is the list, in the order shown. Each check yields findings whose ids begin with its
own, and leaves what later ones need in the `Inspection`; a check whose needs could not be met
yields nothing. Nothing is changed: no lease is taken, no device made.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from types import MappingProxyType
from typing import Final

from tundp.admin import fetch_status
from tundp.daemon.checks import firewall, host, overlay, queues
from tundp.daemon.checks.inspection import Check, Inspection
from tundp.errors import PlatformError
from tundp.finding import Finding, Verdict
from tundp.linux.listeners import listener
from tundp.linux.netlink import Netlink
from tundp.settings.settings import Settings
from tundp.settings.show import reported
from tundp.store.base import Store

STATUS_S: Final = 5.0
"""Deadline of the daemon's answer, if there is one: the other checks need none."""


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


async def _check_daemon(inspection: Inspection) -> AsyncIterator[Finding]:
    """Whether a daemon runs already."""
    path = inspection.settings.admin_socket
    try:
        status = await fetch_status(path, limit_s=STATUS_S)
    except PlatformError as error:
        if await asyncio.to_thread(listener, path) is not None:
            yield Finding(
                id="daemon",
                verdict=Verdict.WARN,
                evidence=f"one listens on {path} and cannot be asked: {error}",
                next_step="tundp doctor names why",
            )
        return
    inspection.status = status
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


CHECKS: Final[Mapping[str, Check]] = MappingProxyType(
    {
        "settings": _check_settings,
        "rights": host.check_rights,
        "limits": host.check_limits,
        "sandbox": host.check_sandbox,
        "daemon": _check_daemon,
        "files": host.check_files,
        "store": overlay.check_store,
        "interface": overlay.check_interface,
        "lease": overlay.check_lease,
        "peers": overlay.check_peers,
        "backend": overlay.check_backend,
        "queues": queues.check_queues,
        "ports": host.check_ports,
        "routes": host.check_routes,
        "br_netfilter": host.check_br_netfilter,
        "firewall": firewall.check_firewall,
        "obstacles": firewall.check_obstacles,
    }
)
"""Every check by its id, in the order of the answer; each needs only what earlier ones found."""
