"""Routes that catch the overlay's packets while nothing better does, kept by the daemon."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from ipaddress import IPv4Network

from tundp.errors import PlatformError
from tundp.linux import unreachable
from tundp.linux.firewall.choose import Previous
from tundp.linux.gateways import remove_gateway_routes
from tundp.linux.netlink import Netlink
from tundp.settings.settings import Settings

_log = logging.getLogger(__name__)


async def ensure_unreachable(
    netlink: Netlink, settings: Settings, *, network: IPv4Network, subnet: IPv4Network
) -> None:
    """Have the unreachable route of the network and, if asked for, the subnet's blackhole route.

    Both outlive the daemon. One that cannot be had is a warning: packets flow without it.
    """
    if settings.fallback_route:
        with _tolerated("the unreachable route"):
            await unreachable.ensure(netlink, unreachable.UNREACHABLE, network)
    if settings.ip_blackhole_route:
        with _tolerated("the blackhole route"):
            await unreachable.ensure(netlink, unreachable.BLACKHOLE, subnet)


async def remove_routes_of_before(
    netlink: Netlink, before: Previous | None, *, network: IPv4Network, subnet: IPv4Network
) -> None:
    """Remove the routes that the last start left for another subnet or network than ours now.

    They bear our protocol number. The subnet of before may be another node's by now, which a
    blackhole route would cut off. One that cannot be removed is a warning.
    """
    if before is None:
        return
    if before.subnet != subnet:
        with _tolerated("the blackhole route of last time"):
            await unreachable.remove(netlink, unreachable.BLACKHOLE, before.subnet)
    if before.network != network:
        with _tolerated("routes of the network of last time"):
            await unreachable.remove(netlink, unreachable.UNREACHABLE, before.network)
            await remove_gateway_routes(netlink, before.network)


@contextlib.contextmanager
def _tolerated(what: str) -> Iterator[None]:
    try:
        yield
    except PlatformError as error:
        _log.warning("%s: %s", what, error)
