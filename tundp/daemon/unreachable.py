"""Routes that catch the overlay's packets while nothing better does, kept by the daemon."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from ipaddress import IPv4Network

from tundp.errors import PlatformError
from tundp.linux import unreachable
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


@contextlib.contextmanager
def _tolerated(what: str) -> Iterator[None]:
    try:
        yield
    except PlatformError as error:
        _log.warning("%s: %s", what, error)
