"""flannel's udp backend: a TUN device, an engine and UDP sockets on the underlay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from tundp.backend.base import BackendKind, Surroundings
from tundp.backend.udp.backend import UdpBackend
from tundp.backend.udp.config import NAME, parse
from tundp.backend.udp.mtu import mtu_of
from tundp.finding import Finding
from tundp.lease.network import BackendConfig


def _check(_: BackendConfig, __: Surroundings) -> Iterator[Finding]:
    """Nothing: any node that can be sent a datagram is a peer."""
    yield from ()


KIND: Final = BackendKind(name=NAME, parse=parse, make=UdpBackend, mtu=mtu_of, check=_check)
