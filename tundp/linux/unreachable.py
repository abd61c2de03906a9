"""Unreachable routes of the overlay, which keep its packets from leaking to the default gateway.

A route over a TUN dies with it; what it carried then follows the default route out of the
host, unencapsulated, to whoever is there. A route of the same prefix that rejects, with a
metric no real route has, is used only then. It outlives the daemon on purpose, and
`tundp cleanup` removes it.
"""

from __future__ import annotations

import errno
from ipaddress import IPv4Network
from typing import Final

from tundp.errors import PlatformError
from tundp.linux.netlink import Netlink
from tundp.linux.uapi import RT_TABLE_MAIN

METRIC: Final = 4096
PROTOCOL: Final = 85
"""Protocol number of our routes, for `ip route` and cleanup; not assigned in rtnetlink.h."""
UNREACHABLE: Final = "unreachable"
"""Senders get ICMP host unreachable, or EHOSTUNREACH."""
BLACKHOLE: Final = "blackhole"
"""Senders get nothing."""


async def ensure(netlink: Netlink, kind: str, destination: IPv4Network) -> None:
    """Add the route; no error if it is there."""
    try:
        await _change(netlink, "add", kind, destination)
    except PlatformError as error:
        if error.errno != errno.EEXIST:
            raise


async def remove(netlink: Netlink, kind: str, destination: IPv4Network) -> bool:
    """Remove the route if it is ours; return whether it was there."""
    try:
        await _change(netlink, "del", kind, destination)
    except PlatformError as error:
        if error.errno != errno.ESRCH:
            raise
        return False
    return True


async def _change(netlink: Netlink, command: str, kind: str, destination: IPv4Network) -> None:
    await netlink.call(
        f"{command} {kind} route {destination}",
        "route",
        command,
        dst=str(destination),
        type=kind,
        priority=METRIC,
        proto=PROTOCOL,
        table=RT_TABLE_MAIN,
    )
