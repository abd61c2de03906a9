"""Packets of the overlay as netfilter sees them, and tests of rules applied to them.

A `Packet` stands for many: any TCP connection from any of these networks. So a test has four
answers (`Match`), and what is not understood is never taken for a no.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum, unique
from ipaddress import IPv4Address, IPv4Network
from typing import Final, Protocol

Range = tuple[int, int]
"""First and last, both included."""
PORTS: Final[Range] = (0, 65535)
_ETHER_TYPES: Final = ({"ip", "ipv4", "8", "2048", "0x0800"}, {"arp", "1544", "2054", "0x0806"})
"""Names and numbers of IPv4 and of ARP, in either byte order."""
PAST_ALL: Final = 1 << 32
"""Larger than any address."""


@unique
class Match(IntEnum):
    """Whether a test holds for the packets a Packet stands for. Ordered by certainty."""

    NO = 0
    """For none of them."""
    UNKNOWN = 1
    """It is not understood."""
    PART = 2
    """For some of them."""
    YES = 3
    """For all of them."""

    @property
    def negated(self) -> Match:
        """The answer of the opposite test."""
        return {Match.YES: Match.NO, Match.NO: Match.YES}.get(self, self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packet:
    """One kind of packet at one hook: of IPv4, or of the ARP it needs on the way."""

    proto: str
    """`tcp`, `udp`, `icmp` or `arp`."""
    state: str
    """conntrack's: `new` or `established`."""
    src: tuple[Range, ...]
    dst: tuple[Range, ...]
    iif: tuple[str, ...] = ()
    """Names of devices it may come in by; () at hooks without one."""
    oif: tuple[str, ...] = ()
    port: int | None = None
    """Source and destination port; None for any."""
    is_port_of_destination: bool = False
    """Whether `port` is the destination's only; the source's is any then."""
    client_ports: Range | None = None
    """Destination ports of answers to this host's own requests, where `port` is None; None: any."""
    is_for_host: bool = False
    """Whether the destination is an address of this host."""
    is_from_host: bool = False
    is_untracked: bool = False
    """Whether a rule keeps conntrack from it: its state is `untracked`, and `state` tells no more
    than whether it is the first one."""


class Test(Protocol):
    """A condition of a rule."""

    def match(self, packet: Packet, mark: int) -> Match:
        """mark: the bits that rules before may have set; all others are 0."""
        ...


@dataclass(frozen=True, slots=True)
class Not:
    """The opposite of a test."""

    test: Test

    def match(self, packet: Packet, mark: int) -> Match:
        """See Test."""
        return self.test.match(packet, mark).negated


@dataclass(frozen=True, slots=True)
class AllOf:
    """Several tests together."""

    tests: tuple[Test, ...]

    def match(self, packet: Packet, mark: int) -> Match:
        """See Test."""
        return worst(*(test.match(packet, mark) for test in self.tests))


@dataclass(frozen=True, slots=True)
class AnyOf:
    """Any of several tests."""

    tests: tuple[Test, ...]

    def match(self, packet: Packet, mark: int) -> Match:
        """See Test."""
        answers = {test.match(packet, mark) for test in self.tests} - {Match.NO}
        if not answers or Match.YES in answers:
            return max(answers, default=Match.NO)
        return min(answers)


@dataclass(frozen=True, slots=True)
class Constant:
    """A test that says the same of every packet."""

    answer: Match

    def match(self, _: Packet, mark: int) -> Match:
        """See Test."""
        del mark
        return self.answer


UNKNOWN: Final = Constant(Match.UNKNOWN)
ALWAYS: Final = Constant(Match.YES)
NEVER: Final = Constant(Match.NO)


@dataclass(frozen=True, slots=True)
class Device:
    """The device a packet comes in or goes out by; a name may end with * for any."""

    is_input: bool
    names: tuple[str, ...]

    def match(self, packet: Packet, mark: int) -> Match:
        """See Test. Of a hook that knows no such device, none matches."""
        del mark
        devices = packet.iif if self.is_input else packet.oif
        return _share([any(_is_named(each, name) for name in self.names) for each in devices])


@dataclass(frozen=True, slots=True)
class Address:
    """The source or destination address."""

    is_source: bool
    ranges: tuple[Range, ...]
    """In order, and merged."""

    def match(self, packet: Packet, mark: int) -> Match:
        """See Test."""
        del mark
        return cover(self.ranges, packet.src if self.is_source else packet.dst)


@dataclass(frozen=True, slots=True)
class Port:
    """The source or destination port of TCP or UDP."""

    ranges: tuple[Range, ...]
    is_source: bool = False

    def match(self, packet: Packet, mark: int) -> Match:
        """See Test."""
        del mark
        if packet.proto not in ("tcp", "udp"):
            return Match.NO
        is_any = packet.port is None or (self.is_source and packet.is_port_of_destination)
        wanted = PORTS if is_any or packet.port is None else (packet.port, packet.port)
        if packet.port is None and packet.client_ports is not None and not self.is_source:
            wanted = packet.client_ports
        return cover(self.ranges, (wanted,))


@dataclass(frozen=True, slots=True)
class Layer4:
    """The protocol of layer 4."""

    names: frozenset[str]

    def match(self, packet: Packet, mark: int) -> Match:
        """See Test."""
        del mark
        return _yes(packet.proto in self.names)


@dataclass(frozen=True, slots=True)
class EtherType:
    """The protocol of layer 3."""

    names: frozenset[str]

    def match(self, packet: Packet, mark: int) -> Match:
        """See Test."""
        del mark
        return _yes(not self.names.isdisjoint(_ETHER_TYPES[packet.proto == "arp"]))


@dataclass(frozen=True, slots=True)
class State:
    """conntrack's state of the connection."""

    names: frozenset[str]

    def match(self, packet: Packet, mark: int) -> Match:
        """See Test."""
        del mark
        if packet.proto == "arp":
            return Match.UNKNOWN
        return _yes(("untracked" if packet.is_untracked else packet.state) in self.names)


@dataclass(frozen=True, slots=True)
class TcpFlags:
    """TCP flags under a mask. The first packet of a connection has SYN, later ones have ACK."""

    mask: frozenset[str]
    wanted: frozenset[str]

    def match(self, packet: Packet, mark: int) -> Match:
        """See Test."""
        del mark
        if packet.proto != "tcp":
            return Match.NO
        # SYN+ACK, FIN and RST belong to a connection, too; a bare ACK stands for all of it.
        flags = {"syn"} if packet.state == "new" else {"ack"}
        return _yes(flags & self.mask == self.wanted)


@dataclass(frozen=True, slots=True)
class IcmpType:
    """The type of an ICMP message: ours are an echo request, and its reply."""

    names: frozenset[str]

    def match(self, packet: Packet, mark: int) -> Match:
        """See Test."""
        del mark
        ours = {"echo-request", "8"} if packet.state == "new" else {"echo-reply", "0"}
        return _yes(packet.proto == "icmp" and bool(self.names & (ours | {"any"})))


@dataclass(frozen=True, slots=True)
class AddressType:
    """What kind of address it is to this host: `local`, `unicast`, `broadcast`, ..."""

    is_source: bool
    names: frozenset[str]

    def match(self, packet: Packet, mark: int) -> Match:
        """See Test."""
        del mark
        is_local = packet.is_from_host if self.is_source else packet.is_for_host
        return _yes(("local" if is_local else "unicast") in self.names)


@dataclass(frozen=True, slots=True)
class Mark:
    """The packet's mark under a mask. It is 0 but for what rules may have set."""

    value: int
    mask: int = 0xFFFFFFFF

    def match(self, _: Packet, mark: int) -> Match:
        """See Test."""
        if self.value & self.mask & ~mark:
            return Match.NO
        return Match.UNKNOWN if mark & self.mask else Match.YES


def worst(*answers: Match) -> Match:
    """The answer of several tests together."""
    return min(answers, default=Match.YES)


def range_of(network: IPv4Network) -> Range:
    """First and last address as numbers."""
    return int(network.network_address), int(network.broadcast_address)


def ranges_of(networks: Iterable[IPv4Network]) -> tuple[Range, ...]:
    """The same of several."""
    return tuple(map(range_of, networks))


def range_at(address: IPv4Address) -> Range:
    """A single address."""
    return int(address), int(address)


def merged(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """The same numbers in order, in as few ranges as possible."""
    found: list[Range] = []
    for first, last in sorted(ranges):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(last, found[-1][1]))
        else:
            found.append((first, last))
    return tuple(found)


def cover(having: Sequence[Range], wanted: Sequence[Range]) -> Match:
    """How much of `wanted` lies in `having`, which is merged."""
    answers = set()
    for first, last in wanted:
        # The last range that begins at or before `last` is the only one that can hold both ends.
        index = bisect_right(having, (last, PAST_ALL)) - 1
        start, end = having[index] if index >= 0 else (PAST_ALL, -1)
        if start <= first and last <= end:
            answers.add(Match.YES)
        else:
            answers.add(Match.PART if end >= first else Match.NO)
    if len(answers) == 1:
        return answers.pop()
    return Match.PART if answers else Match.UNKNOWN


def _share(answers: Sequence[bool]) -> Match:
    if not any(answers):
        return Match.NO
    return Match.YES if all(answers) else Match.PART


def _yes(holds: bool) -> Match:  # noqa: FBT001  (a plain conversion)
    return Match.YES if holds else Match.NO


def _part(holds: bool) -> Match:  # noqa: FBT001  (a plain conversion)
    return Match.PART if holds else Match.NO


def _is_named(device: str, name: str) -> bool:
    if name.endswith("*"):
        return device.startswith(name[:-1])
    return device == name
