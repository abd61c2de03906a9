"""The TUN device's MTU: the link's less the outer headers."""

from __future__ import annotations

from tundp.errors import ConfigError
from tundp.linux.iface import Interface
from tundp.wire import ip, overhead


def mtu_of(interface: Interface) -> int:
    """The TUN device's MTU over the interface's link. ConfigError if IPv4 does not fit."""
    link = interface.link
    mtu = overhead.tun_mtu(link.mtu)
    if mtu is None:
        least = ip.MIN_MTU + overhead.OVERHEAD
        raise ConfigError(
            f"interface {link.name} has MTU {link.mtu}: after {overhead.OVERHEAD} bytes of outer"
            f" headers {link.mtu - overhead.OVERHEAD} are left, and IPv4 needs {ip.MIN_MTU}"
            f" (RFC 791); raise it to {least} or more, or choose another with --iface"
        )
    return mtu
