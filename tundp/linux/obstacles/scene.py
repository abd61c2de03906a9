"""What the overlay is on this host, as far as it decides which packets are looked for."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Final

NOT_JUDGED: Final = "not judged"
"""The meaning of a finding that something may drop packets, and cannot be judged from outside."""


@dataclass(frozen=True, slots=True)
class PeerPlace:
    """A peer: its subnet, and where its packets go."""

    subnet: IPv4Network
    public_ip: IPv4Address


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """The overlay on this host. Devices are named; `is_open` tells whether they exist."""

    network: IPv4Network
    subnet: IPv4Network
    """This node's; the network while it is not known."""
    device: str
    """The TUN; with a backend that has none, the interface to the other nodes."""
    is_open: bool
    """Whether a daemon runs: device and route are there, and so are its rules."""
    is_tunnel: bool
    """Whether packets travel in UDP datagrams."""
    uplink: str
    address: IPv4Address
    port: int | None
    peers: tuple[PeerPlace, ...]
    """A sample."""
    peer_count: int
    accepts: bool
    """Whether rules of ours, at the end of iptables' FORWARD, accept the overlay's packets."""
    pid: int | None = None
    """The daemon's; None while none runs."""
    keeps_route: bool = False
    """Whether who looks puts the network's route back itself, and names it where it cannot."""

    @property
    def tunnel_address(self) -> IPv4Address:
        """The TUN's address."""
        return self.subnet.network_address
