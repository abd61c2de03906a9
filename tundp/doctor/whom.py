"""Which peer a word on the command line means: by address, subnet or host name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from tundp.errors import ConfigError, PlatformError
from tundp.observe.leases import Leases
from tundp.observe.ping import PingedPeer
from tundp.observe.status import PeerStatus, Status
from tundp.printable import quoted

NAMED: Final = 8
"""Peers that an error lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Whom:
    """The peer that is meant."""

    peer: PeerStatus
    host: str = ""
    """Its host name, if its lease says."""
    is_address_only: bool = False
    """Whether its PublicIP is all that is known: the subnet is that address."""

    def pinged(self, implementation: str = "") -> PingedPeer:
        """As documents have it. implementation: what answers there, if that is known."""
        return PingedPeer(
            public_ip=self.peer.public_ip,
            subnet=None if self.is_address_only else self.peer.subnet,
            port=self.peer.port,
            host=self.host,
            implementation=implementation,
        )


def find_peer(text: str, status: Status, leases: Leases | None) -> Whom:
    """The peer that `text` names: a PublicIP, a subnet, an address of it, or a host name.

    leases: for host names and refused leases; None if the daemon does not tell. ConfigError if it
    is this node, nobody, or more than one; PlatformError if its lease is refused.
    """
    hosts = {} if leases is None else {each.subnet: each.host for each in leases.leases}
    meant = _meaning(text)
    if isinstance(meant, str):
        found = [peer for peer in status.peers if _is_named(hosts.get(peer.subnet, ""), meant)]
        is_own = status.subnet is not None and _is_named(hosts.get(status.subnet, ""), meant)
    else:
        found = [peer for peer in status.peers if _has(peer.subnet, peer.public_ip, meant)]
        own = status.subnet, status.public_ip
        is_own = own[0] is not None and _has(own[0], own[1], meant)
    if not found and is_own:
        raise ConfigError(f"{quoted(text)} is this node ({status.subnet}): name another one")
    if not found:
        raise _unknown(text, meant, status, leases, hosts)
    if isinstance(meant, IPv4Address):
        # An address inside two leases belongs to the smaller one, as packets to it do.
        inside = [peer for peer in found if meant in peer.subnet]
        found = [max(inside, key=lambda peer: peer.subnet.prefixlen)] if inside else found
    if len(found) > 1:
        each = ", ".join(str(peer.subnet) for peer in found[:NAMED])
        raise ConfigError(f"{quoted(text)} has {len(found)} leases: name one of {each}")
    return Whom(peer=found[0], host=hosts.get(found[0].subnet, ""))


def address_alone(text: str, network: IPv4Network | None) -> IPv4Address:
    """The PublicIP that `text` is, for a host without a daemon that knows others.

    network: the overlay's, if that is known. ConfigError.
    """
    meant = _meaning(text)
    if not isinstance(meant, IPv4Address):
        raise ConfigError(
            f"PEER {quoted(text)}: no daemon answers that knows subnets and names: start it, or"
            " give the peer's PublicIP"
        )
    if network is not None and meant in network:
        raise ConfigError(
            f"PEER {meant} is in the overlay {network}, and no daemon answers that knows whose it"
            " is: start it, or give the peer's PublicIP"
        )
    return meant


def _meaning(text: str) -> IPv4Address | IPv4Network | str:
    """An address, a network (10.5.2.0/24 or 10.5.2.0-24), or else a name in lower case."""
    try:
        return IPv4Address(text)
    except ValueError:
        pass
    if not text or text.startswith("/"):
        raise ConfigError("PEER is empty: give a PublicIP, subnet, address or host name")
    try:
        return IPv4Network(text.replace("-", "/"), strict=False)
    except ValueError:
        return text.lower()


def _has(
    subnet: IPv4Network, public_ip: IPv4Address | None, meant: IPv4Address | IPv4Network
) -> bool:
    if isinstance(meant, IPv4Network):
        return meant == subnet
    return meant == public_ip or meant in subnet


def _is_named(host: str, name: str) -> bool:
    host = host.lower()
    return bool(host) and name in (host, host.split(".")[0])


def _unknown(
    text: str,
    meant: IPv4Address | IPv4Network | str,
    status: Status,
    leases: Leases | None,
    hosts: dict[IPv4Network, str],
) -> ConfigError | PlatformError:
    """Why no peer is meant."""
    for each in () if leases is None else leases.leases:
        is_it = (
            _is_named(each.host, meant)
            if isinstance(meant, str)
            else _has(each.subnet, each.public_ip, meant)
        )
        if is_it and each.state == "refused":
            return PlatformError(f"lease {each.key} of {each.public_ip} is no peer: {each.reason}")
    why = "no lease of a peer has it"
    if isinstance(meant, str):
        why = "no lease names that host"
        if leases is None:
            why = "no address, no subnet, and this daemon does not tell host names"
    return ConfigError(f"PEER {quoted(text)}: {why}; {_listed(status.peers, hosts)}")


def _listed(peers: Sequence[PeerStatus], hosts: dict[IPv4Network, str]) -> str:
    if not peers:
        return "there are no peers: tundp leases"
    each = [
        f"{peer.subnet} at {peer.public_ip}"
        + (f" ({hosts[peer.subnet]})" if hosts.get(peer.subnet) else "")
        for peer in peers[:NAMED]
    ]
    more = f" and {len(peers) - NAMED} more" if len(peers) > NAMED else ""
    return f"peers are {', '.join(each)}{more}: tundp leases"
