"""flannel's iptables rules of every version, recognised in the lines `iptables -S` prints.

v0.11.0 to v0.16.1   directly in POSTROUTING and FORWARD, marked by nothing
v0.16.2 to v0.19.2   the same rules with the comments "flanneld masq" and "flanneld forward"
v0.20.0 to v0.21.2   in chains FLANNEL-POSTRTG and FLANNEL-FWD, the jumps to them inserted first
v0.22.0 and later    in these chains, other rules for masquerading, the jumps appended

Those without a chain of their own are the direct ones. Somebody else may have written a
rule like an unmarked one, and another flannel of the host (k3s has one inside) may use the
same chains for another network: what counts as ours is told by the networks a rule names.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Final

Network = IPv4Network | IPv6Network

MASQUERADE_COMMENT: Final = "flanneld masq"
FORWARD_COMMENT: Final = "flanneld forward"
_COMMENT: Final = re.compile(r' -m comment --comment "(flanneld masq|flanneld forward)"')
_PREFIXES: Final = re.compile(r" -[sd] (\S+)")
_RULES_OF_A_SET: Final = 4


@dataclass(frozen=True, slots=True)
class _Seen:
    """One line of a built-in chain: which of a set's rules it is, and whether flannel signed it."""

    line: str
    kind: str
    """`returns`, `leaves`, `arrives` or `enters` (nat), `from` or `to` (filter); empty: none."""
    is_signed: bool


def multicast_of(network: Network) -> str:
    """What flannel never masquerades, of the network's family."""
    return "224.0.0.0/4" if network.version == 4 else "ff00::/8"


def direct_rules(listed: Sequence[str], table: str, networks: Iterable[Network]) -> list[str]:
    """Those lines of a built-in chain that flannel before v0.20 wrote for these networks.

    With flannel's comment a line is enough. Without, all four rules of `nat` must be there, in
    whatever order and number, and in `filter` both, one after the other. A rule for one subnet
    that flannel forgot when its lease changed (`! -s N -d S -j RETURN`) is nobody else's.
    """
    ours: set[str] = set()
    for network in networks:
        seen = [_judge(line, table, network) for line in listed]
        ours.update(each.line for each in seen if each.kind and each.is_signed)
        unsigned = [each for each in seen if not each.is_signed]
        if table == "nat":
            kinds = {each.kind for each in unsigned} - {""}
            is_whole = len(kinds) == _RULES_OF_A_SET
            ours.update(
                each.line for each in unsigned if each.kind == "arrives" or (each.kind and is_whole)
            )
            continue
        for one, next_one in itertools.pairwise(seen):
            is_pair = {one.kind, next_one.kind} == {"from", "to"}
            if is_pair and not (one.is_signed or next_one.is_signed):
                ours.update((one.line, next_one.line))
    return [line for line in listed if line in ours]


def own_rules(chain_lines: Iterable[str], networks: Iterable[Network]) -> list[str]:
    """Those rules of a chain that name one of `networks`."""
    known = list(networks)
    return [
        line
        for line in chain_lines
        if (named := _networks_of(line)) and not _is_elsewhere(named, known)
    ]


def foreign_rules(chain_lines: Iterable[str], networks: Iterable[Network]) -> list[str]:
    """Those rules of flannel's own chain that a flannel of another network made.

    They have flannel's comment; each rule of flannel's names its network, and these none of
    `networks`.
    """
    known = list(networks)
    return [
        line
        for line in chain_lines
        if _COMMENT.search(line) and _is_elsewhere(_networks_of(line), known)
    ]


def names_of(chain_lines: Iterable[str]) -> list[str]:
    """The networks that rules name, the widest ones only."""
    return widest(name for line in chain_lines for name in _PREFIXES.findall(line))


def widest(named: Iterable[str]) -> list[str]:
    """Those of the prefixes that no other one contains, multicast apart."""
    networks = set(_parsed(named))
    return sorted(
        str(network)
        for network in networks
        if not any(network != other and _is_within(network, other) for other in networks)
    )


def are_elsewhere(named: Iterable[str], networks: Iterable[Network]) -> bool:
    """Whether a rule names prefixes, multicast apart, and none of `networks` is among them."""
    return _is_elsewhere(_parsed(named), list(networks))


def _judge(line: str, table: str, network: Network) -> _Seen:
    bare, count = _COMMENT.subn("", line)
    is_signed = count > 0
    bare = bare.removesuffix(" --random-fully")
    if table != "nat":
        kinds = {
            f"-A FORWARD -s {network} -j ACCEPT": "from",
            f"-A FORWARD -d {network} -j ACCEPT": "to",
        }
        return _Seen(line, kinds.get(bare, ""), is_signed)
    kinds = {
        f"-A POSTROUTING -s {network} -d {network} -j RETURN": "returns",
        f"-A POSTROUTING -s {network} ! -d {multicast_of(network)} -j MASQUERADE": "leaves",
        f"-A POSTROUTING ! -s {network} -d {network} -j MASQUERADE": "enters",
    }
    kind = kinds.get(bare, "")
    start, end = f"-A POSTROUTING ! -s {network} -d ", " -j RETURN"
    if not kind and bare.startswith(start) and bare.endswith(end):
        subnets = _parsed([bare[len(start) : -len(end)]])
        if any(subnet != network and _is_within(subnet, network) for subnet in subnets):
            kind = "arrives"
    return _Seen(line, kind, is_signed)


def _networks_of(line: str) -> list[Network]:
    return _parsed(_PREFIXES.findall(line))


def _parsed(texts: Iterable[str]) -> list[Network]:
    found: list[Network] = []
    for text in texts:
        try:
            network = ip_network(text, strict=False)
        except ValueError:
            continue
        if not network.is_multicast:
            found.append(network)
    return found


def _is_elsewhere(named: Sequence[Network], known: Sequence[Network]) -> bool:
    return bool(named) and not any(network in known for network in named)


def _is_within(inner: Network, outer: Network) -> bool:
    if isinstance(inner, IPv4Network):
        return isinstance(outer, IPv4Network) and inner.subnet_of(outer)
    return isinstance(outer, IPv6Network) and inner.subnet_of(outer)
