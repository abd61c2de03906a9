"""The words of packet filters, and the tokens a filter's text is made of (wire/filter.py)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tundp.wire.drop import DropReason
from tundp.wire.facts import PROTO_SCTP, Direction

PROTOCOLS: Final = {"icmp": 1, "tcp": 6, "udp": 17, "sctp": PROTO_SCTP}
PROTO_NAMES: Final = PROTOCOLS | {"igmp": 2, "ipip": 4, "gre": 47, "esp": 50, "ah": 51}
TCP_FLAGS: Final = {
    "tcp-fin": 0x01,
    "tcp-syn": 0x02,
    "tcp-rst": 0x04,
    "tcp-push": 0x08,
    "tcp-ack": 0x10,
    "tcp-urg": 0x20,
}
DIRECTIONS: Final = {
    "encap": Direction.ENCAP,
    "out": Direction.ENCAP,
    "outbound": Direction.ENCAP,
    "decap": Direction.DECAP,
    "in": Direction.DECAP,
    "inbound": Direction.DECAP,
}
REASONS: Final = {reason.label: reason for reason in DropReason}
JOINTS: Final = {"and": "and", "&&": "and", "or": "or", "||": "or"}
NOTS: Final = frozenset({"not", "!"})
KINDS: Final = ("host", "net", "port", "portrange", "proto")
QUOTABLE: Final = frozenset({*KINDS, *PROTOCOLS, "ip", "src", "dst", "quoted"})
"""What a test of a quoted packet begins with."""
STARTS: Final = QUOTABLE | {
    *TCP_FLAGS,
    *DIRECTIONS,
    *("outer", "peer", "less", "greater", "fragment", "drop", "reason", "not"),
}
"""What a test begins with, but a bare address."""
_HINTS: Final = {
    "ip6": "this overlay carries IPv4 only",
    "icmp6": "this overlay carries IPv4 only",
    "arp": "this overlay carries IPv4 packets, no link layer",
    "ether": "this overlay carries IPv4 packets, no link layer",
    "vlan": "this overlay carries IPv4 packets, no link layer",
    "broadcast": "write dst host and the address",
    "multicast": "write dst net 224.0.0.0/4",
    "len": "write less N or greater N",
}
_TOKEN: Final = re.compile(r"\s*(&&|\|\||[()!]|[^\s()!&|]+|[&|])", re.ASCII)
NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,9}")
_NAMED: Final = {"proto": PROTO_NAMES.keys() - PROTOCOLS.keys(), "reason": REASONS.keys()}
"""Kinds of values that have names; `tcp` and its like begin a test of their own."""
_ADDRESS_LIKE: Final = re.compile(r"[0-9.]+(/[0-9]*)?")


@dataclass(frozen=True, slots=True)
class Token:
    """A word, an operator or a parenthesis."""

    text: str
    position: int
    """Index of its first character in the filter."""

    @property
    def word(self) -> str:
        """In lower case: the language's own words are known in either."""
        return self.text.lower()

    @property
    def is_end(self) -> bool:
        """Whether the filter ends here."""
        return not self.text


def tokens(text: str) -> Iterator[Token]:
    """Every token, and one without text for the end."""
    end = 0
    while (found := _TOKEN.match(text, end)) is not None:
        end = found.end()
        yield Token(found[1], found.start(1))
    yield Token("", len(text))


def is_value(token: Token) -> bool:
    """Whether a token can only be an address, a network or a number."""
    return _ADDRESS_LIKE.fullmatch(token.text) is not None


def takes_over(kind: str, token: Token) -> bool:
    """Whether a token without qualifiers can be one more value of the kind that came before."""
    if kind == "portrange":
        return token.text[:1].isdigit()
    return is_value(token) or token.word in _NAMED.get(kind, ())


def hint_of(token: Token) -> str:
    """What to write instead of a token no test begins with."""
    word = token.word
    if token.text in ("&", "|"):
        return f"write {token.text * 2}, and for TCP flags tcp-syn, tcp-fin, tcp-rst"
    if "[" in token.text:
        return "bytes of headers cannot be tested; for TCP flags write tcp-syn, tcp-rst ..."
    if word in _HINTS:
        return _HINTS[word]
    if word in REASONS:
        return f"write reason {word}"
    if word.isascii() and word.isprintable() and word not in JOINTS:
        close = difflib.get_close_matches(word[:80], STARTS, n=1, cutoff=0.6)
        if close:
            return f"did you mean {close[0]}?"
    return "expected host, net, port, an address, a protocol, drop, peer or ("
