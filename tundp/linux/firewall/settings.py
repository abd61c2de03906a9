"""What the firewall has to let through and to masquerade, whatever the tool that does it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network


@dataclass(frozen=True, slots=True, kw_only=True)
class FirewallSettings:
    """The overlay as the firewall sees it, and what is wanted of it."""

    network: IPv4Network
    """The whole overlay, N in the tables of rules."""
    subnet: IPv4Network
    """This node's part of it, S in the tables of rules."""
    network6: IPv6Network | None = None
    subnet6: IPv6Network | None = None
    """IPv6 rules are made if both are given."""
    is_masquerading: bool
    """Packets that leave the overlay get the node's address."""
    is_forwarding: bool
    """The overlay's packets are accepted where the FORWARD policy would drop them."""
    is_random_fully: bool = True
    """Source ports of masqueraded connections are random, where the tools know how."""
    mark: str = ""
    """Ends the names of chains and tables, so that several daemons of one host leave each
    other's alone; at most 8 characters. Empty: flannel's own names."""

    @property
    def is_wanted(self) -> bool:
        """Whether there is any rule to make."""
        return self.is_masquerading or self.is_forwarding

    @property
    def networks(self) -> list[IPv4Network | IPv6Network]:
        """N of each family."""
        return [self.network] if self.network6 is None else [self.network, self.network6]

    @property
    def overlays(self) -> list[Overlay]:
        """N and S of each family that has rules."""
        found = [Overlay(family="ip", network=str(self.network), subnet=str(self.subnet))]
        if self.network6 is not None and self.subnet6 is not None:
            found.append(
                Overlay(family="ip6", network=str(self.network6), subnet=str(self.subnet6))
            )
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """One family's N and S, as text."""

    family: str
    """`ip` or `ip6`."""
    network: str
    subnet: str

    @property
    def multicast(self) -> str:
        """What is never masqueraded."""
        return "224.0.0.0/4" if self.family == "ip" else "ff00::/8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Previous:
    """Networks and subnet of the run before, from its subnet.env or lease cache."""

    network: IPv4Network
    subnet: IPv4Network
    network6: IPv6Network | None = None


@dataclass(frozen=True, slots=True)
class Removal:
    """What was removed (or would be), and what another network's flannel has; a line each."""

    removed: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, parts: Iterable[Removal]) -> Removal:
        """All of them as one."""
        whole = cls()
        for part in parts:
            whole.removed.extend(part.removed)
            whole.kept.extend(part.kept)
        return whole
