"""What another backend left in the kernel that keeps packets from the device."""

from __future__ import annotations

import logging
from ipaddress import IPv4Network

from tundp.errors import PlatformError
from tundp.linux.gateways import remove_gateway_routes
from tundp.linux.netlink import Netlink

_log = logging.getLogger(__name__)


async def remove_leftovers(netlink: Netlink, network: IPv4Network) -> None:
    """Remove what the host-gw backend left, if the network config named that before."""
    try:
        count = await remove_gateway_routes(netlink, network)
    except PlatformError as error:
        _log.warning("routes of the host-gw backend bypass the device: %s", error)
    else:
        if count:
            _log.info("%d routes of the host-gw backend removed", count)
