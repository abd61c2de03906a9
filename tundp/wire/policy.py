"""Settings of the packet rules. Native twin: struct tundp_policy."""

from __future__ import annotations

from dataclasses import dataclass

from tundp.choices import SourceCheck


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Own address and source check: the same for every packet."""

    tun_address: int
    """Our own address on the TUN (host order): the source of ICMP errors."""
    source_check: SourceCheck
    """What becomes of a datagram whose addresses do not fit the leases."""
