"""subnet.env: this node's subnet for Docker and CNI, and the previous subnet for the next start.

Rendered byte for byte as flannel writes it (order, spelling, base address + 1); parsed as
tolerantly as flannel parses it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import (
    IPv4Interface,
    IPv4Network,
    IPv6Interface,
    IPv6Network,
)
from typing import Final, TypeVar

from tundp.lease.model import LeaseKey

_LINE: Final = re.compile(r"\s*(?:export\s+)?([A-Za-z_]\w*)\s*[=:]\s*(.*?)\s*")


InterfaceT = TypeVar("InterfaceT", IPv4Interface, IPv6Interface)


@dataclass(frozen=True, slots=True, kw_only=True)
class SubnetEnv:
    """The contents of subnet.env."""

    network: IPv4Network
    key: LeaseKey
    network6: IPv6Network | None
    mtu: int
    ip_masq: bool


def render(env: SubnetEnv) -> str:
    """The file's text, newline-terminated lines in flannel's order."""
    lines = [f"FLANNEL_NETWORK={env.network}", f"FLANNEL_SUBNET={_first_host(env.key.subnet)}"]
    if env.network6 is not None and env.key.v6 is not None:
        lines.append(f"FLANNEL_IPV6_NETWORK={env.network6}")
        lines.append(f"FLANNEL_IPV6_SUBNET={_first_host(env.key.v6.network)}")
    lines.append(f"FLANNEL_MTU={env.mtu}")
    lines.append(f"FLANNEL_IPMASQ={'true' if env.ip_masq else 'false'}")
    return "".join(f"{line}\n" for line in lines)


def previous_key(text: str) -> LeaseKey | None:
    """The subnet in the text of a subnet.env, whatever its state; None if there is none."""
    values = _parse(text)
    v4 = _single(values.get("FLANNEL_SUBNET", ""), IPv4Interface)
    if v4 is None:
        return None
    v6 = _single(values.get("FLANNEL_IPV6_SUBNET", ""), IPv6Interface)
    return LeaseKey(
        IPv4Interface(str(v4.network)), None if v6 is None else IPv6Interface(str(v6.network))
    )


def previous_network(text: str) -> IPv4Network | None:
    """The network in the text of a subnet.env: firewall rules for it may still exist."""
    v4 = _single(_parse(text).get("FLANNEL_NETWORK", ""), IPv4Interface)
    return None if v4 is None else v4.network


def previous_network6(text: str) -> IPv6Network | None:
    """The IPv6 network in the text of a subnet.env, if there is one."""
    v6 = _single(_parse(text).get("FLANNEL_IPV6_NETWORK", ""), IPv6Interface)
    return None if v6 is None else v6.network


def _first_host(subnet: IPv4Network | IPv6Network) -> str:
    return f"{subnet.network_address + 1}/{subnet.prefixlen}"


def _parse(text: str) -> dict[str, str]:
    """`.env` syntax: comments, `export`, quotes and `KEY: value` are all tolerated."""
    values = {}
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        if match is None or line.lstrip().startswith("#"):
            continue
        name, value = match.groups()
        if value[:1] in ("'", '"') and value[:1] in value[1:]:
            value = value[1 : value.index(value[0], 1)]
        else:
            value = value.split(" #", 1)[0].strip()
        values[name] = value
    return values


def _single(text: str, kind: type[InterfaceT]) -> InterfaceT | None:
    """The only valid item of a comma-separated list; None if there are several, as in flannel."""
    found = []
    for item in text.split(","):
        try:
            if item.rpartition("/")[2].strip().isdecimal() and "/" in item:
                found.append(kind(item.strip()))
        except ValueError:
            continue
    return found[0] if len(found) == 1 else None
