"""Packet filters: the language of pcap-filter(7), over inner packets and what became of them.

    parse("tcp port 443 and not peer 192.0.2.7").matches(facts_of(packet, ...))

    host A                  either address; src host A, dst host A, src and dst host A: that one
    net N/LEN, net 10.5     an address in a network; src and dst likewise
    A, N/LEN, src A         a bare address or network is host or net
    port P, portrange P-Q   of TCP, UDP or SCTP; src and dst likewise
    icmp tcp udp sctp ip    the protocol; ip proto N: by number or name; tcp port P: both
    less N, greater N       at most, at least N bytes of IPv4 packet; of a super-packet, the whole
    fragment                a fragment, the first included
    tcp-syn tcp-ack ...     the flag is set; also tcp-fin, tcp-rst, tcp-push, tcp-urg
    peer A, peer N/LEN      the other node's underlay address; outer host A is the same
    encap, decap            from the TUN to a peer, from a peer to the TUN; out and in are the same
    drop, reason NAME       dropped, dropped for that reason
    quoted ...              before host, net, port, portrange, a protocol, or several of them in
                            parentheses: of the packet that this one, an ICMP error, quotes

Joined by not, and, or, also ! && ||, and parentheses. As in pcap-filter, not binds tightest, and
and or bind alike, from left to right; a bare value after them takes the words before the last one:
`src port 80 or 443`, `host (A or B)`. The canonical text of a filter has parentheses wherever and
and or meet. Names of hosts and ports are not looked up. Empty text is every packet.

What a packet does not have makes a test false, and its negation true: `not port 53` is true of
ICMP. `host` never looks into the packet an ICMP error quotes, so that `host A` means here what it
means to tcpdump; `host A or quoted host A` finds the errors about A's packets, too.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from ipaddress import AddressValueError, IPv4Address, IPv4Network, NetmaskValueError
from typing import Final, NoReturn

from tundp.errors import FilterError as FilterError
from tundp.wire import filter_program
from tundp.wire.facts import QUOTED, Field
from tundp.wire.facts import Facts as Facts
from tundp.wire.facts import facts_of as facts_of
from tundp.wire.filter_program import OPS_MAX, WORD, OpKind
from tundp.wire.filter_program import Op as Op
from tundp.wire.filter_words import (
    DIRECTIONS,
    JOINTS,
    KINDS,
    NOTS,
    NUMBER,
    PROTO_NAMES,
    PROTOCOLS,
    QUOTABLE,
    REASONS,
    STARTS,
    TCP_FLAGS,
    Token,
    hint_of,
    is_value,
    takes_over,
    tokens,
)

TEXT_MAX: Final = 4096
"""Characters of a filter."""
DEPTH_MAX: Final = 64
"""Parentheses in each other."""


@dataclass(frozen=True, slots=True)
class Filter:
    """A filter that was read."""

    ops: tuple[Op, ...]
    text: str
    """Canonical: parses to the same program, whatever the words were; empty for every packet."""

    def matches(self, facts: Facts) -> bool:
        """Whether the filter lets a packet through."""
        return filter_program.run(self.ops, facts)


def parse(text: str) -> Filter:
    """Read a filter. FilterError, and nothing else, if it is none."""
    if len(text) > TEXT_MAX:
        raise FilterError(f"longer than {TEXT_MAX} characters", TEXT_MAX, text)
    parser = _Parser(text)
    if parser.token.is_end:
        return Filter((), "")
    node = parser.expression(0)
    if not parser.token.is_end:
        parser.fail("expected and, or, or the end")
    return Filter(node.ops, node.text)


@dataclass(frozen=True, slots=True)
class _Node:
    """Part of a filter; `joint` is the word that joins its two halves, if it has any."""

    ops: tuple[Op, ...]
    text: str
    joint: str = ""

    def beside(self, joint: str) -> str:
        """The text as the left half of a node joined by `joint`."""
        return self.text if self.joint in ("", joint) else f"({self.text})"

    def closed(self) -> str:
        """The text as what follows not, and, or."""
        return f"({self.text})" if self.joint else self.text


@dataclass(frozen=True, slots=True)
class _Qualifiers:
    """The words before a value: what a bare value after and or or takes over."""

    kind: str = ""
    quoted: bool = False
    peer: bool = False
    protocol: str = ""
    direction: str = ""
    """`src`, `dst`, `src and dst`, or nothing for either."""

    @property
    def words(self) -> str:
        """The canonical text before the kind, with a blank behind each word."""
        return "".join(
            f"{word} " for word in ("quoted" * self.quoted, self.protocol, self.direction) if word
        )

    def tests(self, one: Field, other: Field, low: int, high: int, mask: int) -> tuple[Op, ...]:
        """The test of the source's or the destination's field, or of both."""
        source = _test(Field(one + QUOTED * self.quoted), low, high, mask)
        destination = _test(Field(other + QUOTED * self.quoted), low, high, mask)
        if self.direction in ("src", "dst"):
            found: tuple[Op, ...] = (source if self.direction == "src" else destination,)
        else:
            joint = OpKind.AND if self.direction == "src and dst" else OpKind.OR
            found = (source, destination, Op(joint))
        if self.protocol:
            return (self.protocol_test(PROTOCOLS[self.protocol]), *found, Op(OpKind.AND))
        return found

    def protocol_test(self, number: int) -> Op:
        """The test of the protocol number."""
        return _test(Field(Field.PROTOCOL + QUOTED * self.quoted), number, number)


def _test(field: Field, low: int, high: int, mask: int = WORD) -> Op:
    return Op(OpKind.TEST, field, low, high, mask)


class _Parser:
    """Recursive descent over the tokens; `token` is the one to read next."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = list(tokens(text))
        self._at = 0
        self._last: _Qualifiers | None = None
        self._is_quoted = False
        """Whether this is inside `quoted (...)`."""

    @property
    def token(self) -> Token:
        return self._tokens[self._at]

    def next(self) -> Token:
        token = self.token
        if not token.is_end:
            self._at += 1
        return token

    def take(self, words: Iterable[str]) -> str:
        """The next token if it is one of `words`, else nothing."""
        return self.next().word if self.token.word in words else ""

    def fail(self, expected: str, token: Token | None = None) -> NoReturn:
        token = self.token if token is None else token
        shown = token.text if len(token.text) <= 40 else f"{token.text[:40]}..."
        found = "the filter ends here" if token.is_end else f"{shown!a} is not understood"
        raise FilterError(f"{found}: {expected}", token.position, self._text)

    def expression(self, depth: int) -> _Node:
        """Terms joined from left to right."""
        node = self._term(depth)
        while (joint := JOINTS.get(self.token.word)) is not None:
            self.next()
            at = self.token
            right = self._term(depth)
            op = Op(OpKind.AND if joint == "and" else OpKind.OR)
            text = f"{node.beside(joint)} {joint} {right.closed()}"
            node = self._bounded(_Node((*node.ops, *right.ops, op), text, joint), at)
        return node

    def _term(self, depth: int) -> _Node:
        """A primitive, or an expression in parentheses, after any number of not."""
        at = self.token
        count = 0
        while self.token.word in NOTS:
            self.next()
            count += 1
        if self.token.word == "quoted" and self._tokens[self._at + 1].text == "(":
            self.next()
            before, self._is_quoted = self._is_quoted, True
            node = self._parenthesis(depth)
            self._is_quoted = before
        else:
            node = self._parenthesis(depth) if self.token.text == "(" else self._primitive()
        if count:
            ops = (*node.ops, *(Op(OpKind.NOT),) * count)
            node = self._bounded(_Node(ops, "not " * count + node.closed()), at)
        return node

    def _parenthesis(self, depth: int) -> _Node:
        opened = self.next()
        if depth == DEPTH_MAX:
            self.fail(f"more than {DEPTH_MAX} parentheses in each other", opened)
        self._last = None
        node = self.expression(depth + 1)
        if not self.take(")"):
            self.fail("expected and, or, or )")
        self._last = None
        return node

    def _bounded(self, node: _Node, at: Token) -> _Node:
        if len(node.ops) > OPS_MAX:
            raise FilterError(
                f"too long from here on: a filter has at most {OPS_MAX} tests, ands, ors and nots"
                " (host, port and net without src or dst are three of them)",
                at.position,
                self._text,
            )
        return node

    # Primitives

    def _primitive(self) -> _Node:
        token = self.token
        if self._last is not None and takes_over(self._last.kind, token):
            return self._value(self._last)
        if is_value(token):
            return self._value(_Qualifiers("host", quoted=self._is_quoted))
        if token.word not in STARTS:
            self.fail(hint_of(token))
        self._last = None
        if self._is_quoted and token.word not in QUOTABLE:
            self.fail("of a quoted packet its addresses, ports and protocol are known, no more")
        if node := self._simple():
            return node
        qualifiers = self._qualifiers()
        if qualifiers.kind:
            self._last = qualifiers
            return self._values(qualifiers)
        number = PROTOCOLS.get(qualifiers.protocol)
        if number is not None:
            return _Node((qualifiers.protocol_test(number),), qualifiers.words.rstrip())
        if qualifiers.protocol != "ip":
            self.fail("expected host, net, port, portrange, a protocol or an address")
        present = replace(qualifiers.protocol_test(0), mask=0)
        return _Node((present,), qualifiers.words.rstrip())

    def _simple(self) -> _Node | None:
        """A primitive that is one word, or one word and a value that nothing takes over."""
        token = self.token
        word = token.word
        if (flag := TCP_FLAGS.get(word)) is not None:
            test = _test(Field.TCP_FLAGS, flag, flag, flag)
        elif (direction := DIRECTIONS.get(word)) is not None:
            word, test = direction.name.lower(), _test(Field.DIRECTION, direction, direction)
        elif word == "fragment":
            test = _test(Field.FRAGMENT, 1, 1)
        elif word == "drop":
            test = _test(Field.REASON, 0, WORD)
        elif word in ("less", "greater"):
            self.next()
            number = self._number(WORD, f"{word} takes a number of bytes")
            low, high = (0, number) if word == "less" else (number, WORD)
            return _Node((_test(Field.LENGTH, low, high),), f"{word} {number}")
        else:
            return None
        self.next()
        return _Node((test,), word)

    def _qualifiers(self) -> _Qualifiers:
        """The words before a value, with the kind of value that follows; none after a protocol."""
        if self.take(("reason",)):
            return _Qualifiers("reason")
        if word := self.take(("outer", "peer")):
            return _Qualifiers(self._kind(("host", "net"), word), peer=True)
        quoted = bool(self.take(("quoted",))) or self._is_quoted
        protocol = self.take((*PROTOCOLS, "ip"))
        direction = self._direction()
        if protocol and not direction and self.token.word not in KINDS:
            return _Qualifiers(quoted=quoted, protocol=protocol)
        before = direction or protocol or ("quoted" if quoted else "src or dst")
        kinds = KINDS if not direction and protocol in ("", "ip") else KINDS[:-1]
        kind = self._kind(kinds, before)
        return _Qualifiers(
            kind, quoted=quoted, protocol="" if protocol == "ip" else protocol, direction=direction
        )

    def _direction(self) -> str:
        """`src`, `dst`, `src and dst`, or nothing; `src or dst` is nothing."""
        first = self.take(("src", "dst"))
        if not first:
            return ""
        joint = JOINTS.get(self.token.word)
        other = "dst" if first == "src" else "src"
        if joint is None or self._tokens[self._at + 1].word != other:
            return first
        self.next()
        self.next()
        return "src and dst" if joint == "and" else ""

    def _kind(self, kinds: Iterable[str], before: str) -> str:
        """The kind of value: the next word, or what an address without one is."""
        token = self.token
        if token.word in kinds:
            return self.next().word
        if token.text != "(" and not is_value(token):
            self.fail(f"{before} takes {', '.join(kinds)} or an address")
        return "host"

    def _values(self, qualifiers: _Qualifiers) -> _Node:
        """The value after qualifiers, or several in parentheses."""
        if self.token.text != "(":
            return self._value(qualifiers)
        self.next()
        node = self._value(qualifiers)
        while (joint := JOINTS.get(self.token.word)) is not None:
            self.next()
            at = self.token
            right = self._value(qualifiers)
            op = Op(OpKind.AND if joint == "and" else OpKind.OR)
            text = f"{node.beside(joint)} {joint} {right.text}"
            node = self._bounded(_Node((*node.ops, *right.ops, op), text, joint), at)
        if not self.take(")"):
            self.fail("expected and, or, or )")
        return node

    def _value(self, qualifiers: _Qualifiers) -> _Node:
        read: dict[str, Callable[[_Qualifiers], _Node]] = {
            "host": self._address,
            "net": self._address,
            "port": self._port,
            "portrange": self._port,
            "proto": self._proto,
            "reason": self._reason,
        }
        return read[qualifiers.kind](qualifiers)

    def _address(self, qualifiers: _Qualifiers) -> _Node:
        token = self.token
        network = self._network(qualifiers.kind)
        self.next()
        mask = int(network.netmask)
        address = int(network.network_address)
        is_host = network.prefixlen == 32
        value = str(network.network_address) if is_host else str(network)
        if qualifiers.peer:
            return _Node((_test(Field.OUTER, address, address, mask),), f"peer {value}")
        ops = qualifiers.tests(Field.SOURCE, Field.DESTINATION, address, address, mask)
        kind = "host" if is_host else "net"
        return self._bounded(_Node(ops, f"{qualifiers.words}{kind} {value}"), token)

    def _network(self, kind: str) -> IPv4Network:
        """The address or network the next token is."""
        token = self.token
        text = token.text
        if ":" in text:
            self.fail("this overlay carries IPv4 only")
        if not is_value(token):
            self.fail(f"{kind} takes an IPv4 address; names are not looked up")
        if "." not in text and "/" not in text and kind == "host":
            self.fail(f"host takes an address like 10.5.1.2; if it is a port, write port {text}")
        try:
            if kind == "net" or "/" in text:
                return IPv4Network(_whole(text))
            return IPv4Network(IPv4Address(text))
        except (AddressValueError, NetmaskValueError):
            self.fail("expected an address like 10.5.1.2, or a network like 10.5.0.0/16")
        except ValueError:
            whole = IPv4Network(_whole(text), strict=False)
            self.fail(f"it has bits set behind its prefix: write {whole}, or host and the address")

    def _port(self, qualifiers: _Qualifiers) -> _Node:
        token = self.token
        low, high = self._ports(qualifiers.kind)
        ops = qualifiers.tests(Field.SOURCE_PORT, Field.DESTINATION_PORT, low, high, WORD)
        value = f"port {low}" if low == high else f"portrange {low}-{high}"
        return self._bounded(_Node(ops, f"{qualifiers.words}{value}"), token)

    def _ports(self, kind: str) -> tuple[int, int]:
        token = self.token
        numbers = token.text.split("-") if kind == "portrange" else [token.text]
        if not all(NUMBER.fullmatch(each) and int(each) <= 0xFFFF for each in numbers):
            if "." in token.text and is_value(token):
                self.fail(f"{kind} takes a number; if it is an address, write host {token.text}")
            example = "a range like 8000-8080" if kind == "portrange" else "a number to 65535"
            self.fail(f"{kind} takes {example}; names are not looked up")
        low, high = int(numbers[0]), int(numbers[-1])
        if len(numbers) > 2 or low > high:
            self.fail("portrange takes a range like 8000-8080, the lower port first")
        self.next()
        return low, high

    def _proto(self, qualifiers: _Qualifiers) -> _Node:
        number = PROTO_NAMES.get(self.token.word.removeprefix("\\"))
        if number is None:
            names = ", ".join(PROTO_NAMES)
            number = self._number(255, f"proto takes a number to 255, or one of {names}")
        else:
            self.next()
        names_of = {number: name for name, number in PROTOCOLS.items()}
        text = names_of.get(number, f"proto {number}")
        return _Node((qualifiers.protocol_test(number),), f"{qualifiers.words}{text}")

    def _reason(self, qualifiers: _Qualifiers) -> _Node:
        token = self.token
        reason = REASONS.get(token.word)
        if reason is None:
            close = difflib.get_close_matches(token.word[:80], REASONS, n=3, cutoff=0.5)
            words = (
                f"did you mean {' or '.join(close)}?" if close else f"one of {', '.join(REASONS)}"
            )
            self.fail(f"reason takes the name of a drop reason: {words}")
        self.next()
        return _Node((_test(Field.REASON, reason, reason),), f"reason {reason.label}")

    def _number(self, limit: int, rule: str) -> int:
        text = self.token.text
        if not NUMBER.fullmatch(text) or int(text) > limit:
            self.fail(rule)
        self.next()
        return int(text)


def _whole(text: str) -> str:
    """A network with four numbers: 10.5/16 and 10.5 are 10.5.0.0/16."""
    address, slash, length = text.partition("/")
    count = address.count(".") + 1
    return f"{address}{'.0' * (4 - count)}/{length if slash else 8 * count}"
