"""Settings of the packet rules. Native twin: struct tundp_policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from tundp.choices import SourceCheck

ADMITTED_MAX: Final = 16
"""Networks one policy can admit: each is compared with every source that is in no lease."""
NO_ECHO_ID: Final = 0x10000
"""An identifier that no ICMP echo message has: the native twin's None."""


class Prefix(NamedTuple):
    """An IPv4 network in numbers, host order."""

    address: int
    mask: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Own address, own port and source check: the same for every packet."""

    tun_address: int
    """Our own address on the TUN (host order): the source of ICMP errors."""
    source_check: SourceCheck
    """What becomes of a datagram whose addresses do not fit the leases."""
    port: int
    """The UDP port of the overlay: no inner datagram may be for it on a node."""
    admitted: tuple[Prefix, ...] = ()
    """Networks in no lease that any peer may send from; at most ADMITTED_MAX."""
    echo_id: int | None = None
    """ICMP identifier (RFC 792) of the echo requests that measure paths; None: there are none."""

    def admits(self, source: int) -> bool:
        """Whether a source (host order) that is in no lease is admitted."""
        return any(not (source ^ each.address) & each.mask for each in self.admitted)
