"""Packet filters: any tree of tests against a direct look at the values, and any text at all."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import packets
from tundp.wire.drop import DropReason
from tundp.wire.facts import Direction
from tundp.wire.filter import Facts, FilterError, facts_of, parse
from tundp.wire.filter_program import is_sound
from tundp.wire.filter_words import STARTS

SETTINGS = settings(max_examples=400, deadline=None)

ADDRESSES = [IPv4Address(each) for each in ("10.5.1.2", "10.5.1.3", "10.5.2.3", "192.0.2.7")]
PORTS = [0, 53, 80, 443, 65535]


@dataclass(frozen=True)
class Sent:
    """One packet as the test made it: what the oracle looks at."""

    source: IPv4Address
    destination: IPv4Address
    proto: int
    source_port: int
    destination_port: int
    flags: int
    frag: int
    size: int
    outer: IPv4Address | None
    direction: Direction
    reason: DropReason | None

    @property
    def has_ports(self) -> bool:
        return self.proto in (6, 17) and not self.frag & 0x1FFF

    @property
    def bytes(self) -> bytes:
        where: Any = {"source": int(self.source), "destination": int(self.destination)}
        where["frag"] = self.frag
        ports: Any = {"sport": self.source_port, "dport": self.destination_port}
        payload = bytes(self.size)
        if self.proto == 6:
            return packets.tcp(payload, 1, self.flags, b"", **ports, **where)
        if self.proto == 17:
            return packets.udp(payload, **ports, **where)
        return packets.ipv4(payload, self.proto, **where)

    @property
    def facts(self) -> Facts:
        outer = None if self.outer is None else int(self.outer)
        return facts_of(self.bytes, direction=self.direction, outer=outer, reason=self.reason)


SENT = st.builds(
    Sent,
    source=st.sampled_from(ADDRESSES),
    destination=st.sampled_from(ADDRESSES),
    proto=st.sampled_from([1, 6, 17, 47]),
    source_port=st.sampled_from(PORTS),
    destination_port=st.sampled_from(PORTS),
    flags=st.integers(0, 255),
    frag=st.sampled_from([0, packets.DF, packets.MF, packets.MF | 5, 7]),
    size=st.integers(0, 90),
    outer=st.sampled_from([None, *ADDRESSES]),
    direction=st.sampled_from(Direction),
    reason=st.sampled_from([None, *DropReason]),
)

Test = tuple[str, Callable[[Sent], bool]]
"""A filter's text, and whether it is true of a packet."""

NAMES = {"icmp": 1, "tcp": 6, "udp": 17}


def either(direction: str, one: Callable[[str], bool]) -> bool:
    sides = {"": any, "src or dst ": any, "src and dst ": all}
    if direction in sides:
        return sides[direction]([one("source"), one("destination")])
    return one({"src ": "source", "dst ": "destination"}[direction])


DIRECTION = st.sampled_from(["", "src ", "dst ", "src and dst ", "src or dst "])
PROTOCOL = st.sampled_from(["", "", "tcp ", "udp ", "ip "])


def is_of(sent: Sent, protocol: str) -> bool:
    name = protocol.strip()
    return name in ("", "ip") or sent.proto == NAMES[name]


@st.composite
def addresses(draw: st.DrawFn) -> Test:
    protocol, direction = draw(PROTOCOL), draw(DIRECTION)
    length = draw(st.sampled_from([0, 8, 23, 24, 31, 32]))
    net = IPv4Network((draw(st.sampled_from(ADDRESSES)), length), strict=False)
    kind = "host" if length == 32 and draw(st.booleans()) else "net"
    value = str(net.network_address) if kind == "host" else str(net)
    return (
        f"{protocol}{direction}{kind} {value}",
        lambda sent: (
            is_of(sent, protocol) and either(direction, lambda side: getattr(sent, side) in net)
        ),
    )


@st.composite
def ports(draw: st.DrawFn) -> Test:
    protocol, direction = draw(PROTOCOL), draw(DIRECTION)
    low, high = sorted((draw(st.sampled_from(PORTS)), draw(st.sampled_from(PORTS))))
    kind = f"port {low}" if low == high else f"portrange {low}-{high}"
    return (
        f"{protocol}{direction}{kind}",
        lambda sent: (
            is_of(sent, protocol)
            and sent.has_ports
            and either(direction, lambda side: low <= getattr(sent, f"{side}_port") <= high)
        ),
    )


def sizes(number: int) -> st.SearchStrategy[Test]:
    return st.sampled_from(
        [
            (f"less {number}", lambda sent: len(sent.bytes) <= number),
            (f"greater {number}", lambda sent: len(sent.bytes) >= number),
        ]
    )


SIMPLE: list[Test] = [
    *((name, lambda sent, number=number: sent.proto == number) for name, number in NAMES.items()),
    ("proto 47", lambda sent: sent.proto == 47),
    ("ip", lambda sent: True),
    ("fragment", lambda sent: bool(sent.frag & 0x3FFF)),
    ("tcp-syn", lambda sent: sent.proto == 6 and sent.has_ports and bool(sent.flags & 2)),
    ("tcp-rst", lambda sent: sent.proto == 6 and sent.has_ports and bool(sent.flags & 4)),
    ("drop", lambda sent: sent.reason is not None),
    ("reason no_route", lambda sent: sent.reason is DropReason.NO_ROUTE),
    ("encap", lambda sent: sent.direction is Direction.ENCAP),
    ("in", lambda sent: sent.direction is Direction.DECAP),
    ("peer 192.0.2.7", lambda sent: str(sent.outer) == "192.0.2.7"),
    ("outer net 10.5", lambda sent: str(sent.outer).startswith("10.5.")),
]

PRIMITIVES = st.one_of(
    addresses(), ports(), st.integers(20, 130).flatmap(sizes), st.sampled_from(SIMPLE)
)
AND = st.sampled_from([" and ", "&&", " AND "])
OR = st.sampled_from([" or ", "||", "\tOr\n"])


@st.composite
def joined(draw: st.DrawFn, of: st.SearchStrategy[Test]) -> Test:
    (left, is_left), (right, is_right) = draw(of), draw(of)
    joint, combine = draw(
        st.one_of(AND.map(lambda word: (word, operator.and_)), OR.map(lambda w: (w, operator.or_)))
    )
    return f"({left}){joint}({right})", lambda sent: combine(is_left(sent), is_right(sent))


@st.composite
def negated(draw: st.DrawFn, of: st.SearchStrategy[Test]) -> Test:
    text, is_so = draw(of)
    return f"{draw(st.sampled_from(['not ', '!', 'NOT']))}({text})", lambda sent: not is_so(sent)


TREES = st.recursive(PRIMITIVES, lambda of: st.one_of(joined(of), negated(of)), max_leaves=8)


@given(TREES, st.lists(SENT, min_size=1, max_size=8))
@SETTINGS
def test_a_filter_says_what_a_look_at_the_packet_says(test: Test, sent: list[Sent]) -> None:
    text, is_so = test
    made = parse(text)
    assert is_sound(made.ops)
    for each in sent:
        assert made.matches(each.facts) is is_so(each), made.text


@given(st.lists(PRIMITIVES, min_size=1, max_size=6), st.data())
@SETTINGS
def test_and_and_or_bind_alike_from_the_left(tests: list[Test], data: st.DataObject) -> None:
    sent = data.draw(SENT)
    text, expected = tests[0][0], tests[0][1](sent)
    for more, is_so in tests[1:]:
        is_and, is_not = data.draw(st.booleans()), data.draw(st.booleans())
        text += (" and " if is_and else " or ") + "not " * is_not + more
        value = is_so(sent) is not is_not
        expected = (expected and value) if is_and else (expected or value)
    assert parse(text).matches(sent.facts) is expected, text


@given(TREES)
@SETTINGS
def test_canonical_text_is_the_same_program(test: Test) -> None:
    made = parse(test[0])
    assert parse(made.text) == made
    assert made.text.isprintable()


WORDS = st.sampled_from(
    [*STARTS, "and", "or", "!", "(", ")", "10.5.1.2", "10.5/16", "80", "1-9", "no_route", "&", "é"]
)


@given(
    st.one_of(
        st.text(max_size=60),
        st.lists(WORDS, max_size=40).map(" ".join),
        st.lists(st.one_of(WORDS, st.text(max_size=3)), max_size=12).map("".join),
    )
)
@settings(max_examples=3000, deadline=None)
def test_any_text_is_a_filter_or_a_filter_error(text: str) -> None:
    try:
        made = parse(text)
    except FilterError as error:
        assert 0 <= error.position <= len(text)
        assert all(line.isprintable() for line in (str(error), *error.lines()))
        return
    assert is_sound(made.ops)
    assert parse(made.text) == made


@pytest.mark.parametrize("text", ["(" * 4000, "not " * 1000, "host (" * 600, "tcp and " * 500])
def test_what_is_deeply_nested_ends_in_an_error(text: str) -> None:
    with pytest.raises(FilterError):
        parse(text)
