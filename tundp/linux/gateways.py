"""Routes via a gateway that a host-gw backend left: more specific than a device's, they bypass it.

They bear our protocol number, and stay when a daemon goes (backend/hostgw.py).
"""

from __future__ import annotations

import errno
from ipaddress import IPv4Network

from tundp.errors import PlatformError
from tundp.linux.netlink import Netlink
from tundp.linux.unreachable import PROTOCOL


async def remove_gateway_routes(netlink: Netlink, network: IPv4Network) -> int:
    """Remove those whose destination lies in `network`; how many there were. PlatformError."""
    left = [
        route
        for route in await netlink.list_routes(protocol=PROTOCOL)
        if route.gateway is not None and route.destination.subnet_of(network)
    ]
    for failure in await netlink.change_routes(delete=left):
        if failure.errno != errno.ESRCH:
            raise PlatformError(str(failure), failure.errno)
    return len(left)
