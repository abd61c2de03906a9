"""Pseudonyms of addresses and host names: the same name for the same one, structure kept.

IPv4 and IPv6 addresses are mapped by a keyed permutation of the tree of prefixes, as Crypto-PAn
does (Fan, Xu, Ammar, Moon 2004): two addresses have as many leading bits in common as their
pseudonyms have, so that an address stays inside its subnet, a subnet inside its network, and no two
become one. These stay: the blocks whose meaning is in their numbers (private, loopback, link-local,
multicast), as blocks; the last eight bits of an IPv4 address, and inside the overlay all bits
behind its subnets' length, so that the first address of a subnet is that of its pseudonym.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import re
from collections.abc import Collection, Iterable, Sequence
from ipaddress import IPv4Network, IPv6Address, IPv6Network
from typing import Final

_KEPT4: Final = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "224.0.0.0/3",
    )
)
_WHOLE4: Final = tuple(IPv4Network(text) for text in ("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/3"))
"""Blocks whose addresses are not replaced at all."""
_KEPT6: Final = tuple(
    IPv6Network(text) for text in ("::/8", "fc00::/7", "fe80::/10", "ff00::/8", "2000::/3")
)
_WHOLE6: Final = tuple(IPv6Network(text) for text in ("::/64", "ff00::/8"))
_WITH_IPV4: Final = (0, 0xFFFF)
"""The first 96 bits of addresses that hold an IPv4 address (RFC 4291, 2.5.5): its pseudonym's."""
_LAST_BITS: Final = 8
"""Bits at the end of an IPv4 address that stay."""
_V4: Final = re.compile(
    r"(?<![\d.])((?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)(?:\.(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)){3})"
    r"(?![\d]|\.\d)(?:([/-])(\d{1,2})(?![\d.]))?"
)
_COLONS: Final = re.compile(r"(?<![\w:])(\w*:[\w:]*:\w*)(?:(/)(\d{1,3})(?!\d))?", re.ASCII)
"""Words joined by two colons or more: in it may be an IPv6 or a link address, before it a label
(`addr:2001:db8::1`), behind it a port or the colon of a sentence. With an IPv4 address at its end
it stays, which has its pseudonym by then."""
_V4_TAIL: Final = re.compile(r"\.\d+\.\d+\.\d")
_HEX: Final = re.compile(r"[0-9A-Fa-f]{0,4}")
_HEX2: Final = re.compile(r"[0-9A-Fa-f]{2}")
_GROUPS: Final = 8
_MAC_LEN: Final = 6
_KEPT_MACS: Final = ("00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff")
_NAME_LEAST: Final = 2
"""Characters of a host name that is searched for."""


class Pseudonyms:
    """The pseudonyms of one report. `key` decides them all, and must not be kept with them."""

    def __init__(
        self,
        key: bytes,
        *,
        overlay: IPv4Network | None = None,
        subnet_len: int = 24,
        hosts: Collection[str] = (),
    ) -> None:
        """overlay, subnet_len: its network, and the length of its subnets. hosts: names."""
        self._key = key
        self._overlay = overlay
        self._subnet_len = subnet_len
        self._v4: dict[int, int] = {}
        self._v6: dict[int, int] = {}
        self._hosts: dict[str, str] = {}
        self._names: re.Pattern[str] | None = None
        self.add_hosts(hosts)

    def add_hosts(self, names: Iterable[str]) -> None:
        """Replace these host names from now on, too, whatever their case."""
        for name in names:
            lower = name.strip().rstrip(".").lower()
            if len(lower) >= _NAME_LEAST and lower not in ("localhost", *self._hosts):
                self._hosts[lower] = f"host-{len(self._hosts) + 1}"
        if self._hosts:
            texts = "|".join(map(re.escape, sorted(self._hosts, key=len, reverse=True)))
            self._names = re.compile(rf"(?<![\w.-])(?:{texts})(?![\w-])", re.IGNORECASE)

    @property
    def host_count(self) -> int:
        """Host names that are known."""
        return len(self._hosts)

    def ipv4(self, address: int) -> int:
        """The pseudonym of an IPv4 address, both in host order."""
        found = self._v4.get(address)
        if found is None:
            found = self._v4[address] = self._mapped4(address)
        return found

    def ipv6(self, address: int) -> int:
        """The pseudonym of an IPv6 address, both as numbers of 128 bits."""
        found = self._v6.get(address)
        if found is None:
            found = self._v6[address] = self._mapped6(address)
        return found

    def network(self, network: IPv4Network) -> IPv4Network:
        """The pseudonym of a network: that of its addresses' common prefix."""
        mapped = self.ipv4(int(network.network_address)) & int(network.netmask)
        return IPv4Network((mapped, network.prefixlen))

    def mac(self, address: str) -> str:
        """The pseudonym of a link address: a local one (IEEE 802, second bit)."""
        lower = address.lower()
        if lower in _KEPT_MACS:
            return address
        tail = hmac.digest(self._key, b"mac" + lower.encode(), "sha256")[:5]
        return ":".join(f"{byte:02x}" for byte in (2, *tail))

    def text(self, text: str) -> str:
        """The text with the pseudonym of each address and each known host name in it."""
        if self._names is not None:
            text = self._names.sub(lambda found: self._hosts[found[0].lower()], text)
        text = _V4.sub(self._replace4, text)
        return _COLONS.sub(self._replace_groups, text)

    def _replace4(self, found: re.Match[str]) -> str:
        a, b, c, d = map(int, found[1].split("."))
        address = a << 24 | b << 16 | c << 8 | d
        mapped = self.ipv4(address)
        end = ""
        if found[2]:
            length, end = int(found[3]), f"{found[2]}{found[3]}"
            if length <= 32 and not address & ((1 << 32 - length) - 1):
                mapped &= ~((1 << 32 - length) - 1)
        return ".".join(str(mapped >> shift & 0xFF) for shift in (24, 16, 8, 0)) + end

    def _replace_groups(self, found: re.Match[str]) -> str:
        """The addresses among words joined by colons, the longest first at each place."""
        if _V4_TAIL.match(found.string, found.end()):
            return found[0]
        groups = found[1].split(":")
        end = f"/{found[3]}" if found[2] else ""
        shown: list[str] = []
        at = 0
        while at < len(groups):
            count = _address_len(groups, at)
            if count:
                is_last = at + count == len(groups)
                text = ":".join(groups[at : at + count])
                shown.append(self._replaced6(text, found[3] if is_last and end else ""))
                at += count
            elif all(map(_HEX2.fullmatch, each := groups[at : at + _MAC_LEN])) and (
                len(each) == _MAC_LEN
            ):
                shown.append(self.mac(":".join(each)))
                at += _MAC_LEN
            else:
                shown.append(groups[at])
                at += 1
        return ":".join(shown) + end

    def _replaced6(self, text: str, length: str) -> str:
        """The pseudonym of an IPv6 address; of a network with no bits behind its length."""
        address = int(IPv6Address(text))
        mapped = self.ipv6(address)
        if length and int(length) <= 128 and not address & ((1 << 128 - int(length)) - 1):
            mapped &= ~((1 << 128 - int(length)) - 1)
        return str(IPv6Address(mapped))

    def _mapped4(self, address: int) -> int:
        if any(_holds(int(each.network_address), each.prefixlen, address, 32) for each in _WHOLE4):
            return address
        mapped = address
        for depth in range(32 - _LAST_BITS):
            prefix = address >> 32 - depth
            if not self._is_fixed4(prefix, depth) and self._flips(4, prefix, depth):
                mapped ^= 1 << 31 - depth
        return mapped

    def _is_fixed4(self, prefix: int, depth: int) -> bool:
        """Whether the bit behind this prefix stays: a rule of the prefix alone."""
        for each in _KEPT4:
            if depth < each.prefixlen and int(each.network_address) >> 32 - depth == prefix:
                return True
        overlay = self._overlay
        if overlay is None or depth < max(self._subnet_len, overlay.prefixlen):
            return False
        return prefix >> depth - overlay.prefixlen == (
            int(overlay.network_address) >> 32 - overlay.prefixlen
        )

    def _mapped6(self, address: int) -> int:
        if address >> 32 in _WITH_IPV4:
            return address >> 32 << 32 | self.ipv4(address & 0xFFFFFFFF)
        for each in _WHOLE6:
            if _holds(int(each.network_address), each.prefixlen, address, 128):
                return address
        mapped = address
        for depth in range(128):
            prefix = address >> 128 - depth
            is_fixed = any(
                depth < each.prefixlen and int(each.network_address) >> 128 - depth == prefix
                for each in (*_KEPT6, *_WHOLE6)
            )
            # The zeros of fe80::/64 are part of its meaning.
            is_fixed = is_fixed or (depth < 64 and address >> 118 == 0x3FA)
            if not is_fixed and self._flips(6, prefix, depth):
                mapped ^= 1 << 127 - depth
        return mapped

    def _flips(self, family: int, prefix: int, depth: int) -> bool:
        message = b"%d %d %x" % (family, depth, prefix)
        return bool(hmac.digest(self._key, message, hashlib.sha256)[0] & 1)


def _address_len(groups: Sequence[str], at: int) -> int:
    """How many groups from `at` on are one IPv6 address; 0 if none begins there."""
    for count in range(min(_GROUPS + 2, len(groups) - at), 2, -1):
        some = groups[at : at + count]
        # Eight groups, or "::" for some of them; :: alone is no address of anybody.
        is_whole = count == _GROUPS or "" in some
        if is_whole and any(some) and all(map(_HEX.fullmatch, some)):
            with contextlib.suppress(ValueError):
                IPv6Address(":".join(some))
                return count
    return 0


def _holds(first: int, length: int, address: int, bits: int) -> bool:
    return address >> bits - length == first >> bits - length
