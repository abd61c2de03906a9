"""The filter language: what texts mean, how they are written back, and what wrong ones get."""

from __future__ import annotations

from typing import Any

import pytest

from tests import packets
from tests.packets import ACK, DF, FIN, MF, RST, SYN
from tundp.errors import ConfigError
from tundp.wire.drop import DropReason
from tundp.wire.facts import Direction
from tundp.wire.filter import Facts, Filter, FilterError, Op, facts_of, parse
from tundp.wire.filter_program import OPS_MAX, OpKind, is_sound

POD, FAR, PEER = "10.5.1.2", "10.5.2.3", "192.0.2.7"
WEB = packets.tcp(b"GET", 1, SYN, b"", sport=40000, dport=443, source=POD, destination=FAR, frag=DF)
DNS = packets.udp(b"?", sport=5353, dport=53, source=FAR, destination=POD)
PING = packets.icmp_echo(b"x" * 56, source=POD, destination=FAR)
GRE = packets.ipv4(bytes(40), 47, source=POD, destination="10.6.0.1")
FIRST = packets.ipv4(WEB[20:40] + bytes(44), 6, source=POD, destination=FAR, frag=MF)
LATER = packets.ipv4(bytes(64), 6, source=POD, destination=FAR, frag=8)


def error_about(offender: bytes) -> bytes:
    """Time exceeded from a router to the offender's source."""
    return packets.ipv4(
        b"\x0b\0\0\0\0\0\0\0" + offender[:28],
        1,
        source="10.5.9.9",
        destination=".".join(map(str, offender[12:16])),
    )


SENT: Any = {"direction": Direction.ENCAP, "outer": packets.address(PEER)}
NAMED: dict[str, Facts] = {
    "web": facts_of(WEB, **SENT),
    "dns": facts_of(DNS, direction=Direction.DECAP, outer=packets.address(PEER)),
    "ping": facts_of(PING, direction=Direction.ENCAP, reason=DropReason.NO_ROUTE),
    "gre": facts_of(GRE, **SENT, reason=DropReason.TOO_BIG),
    "first": facts_of(FIRST, **SENT),
    "later": facts_of(LATER, **SENT),
    "error": facts_of(error_about(WEB), direction=Direction.DECAP, outer=0xC0000208),
    "short": facts_of(
        b"\x45", direction=Direction.DECAP, outer=0xC0000209, reason=DropReason.TOO_SHORT
    ),
}
ALL = set(NAMED)
TO_FAR = {"web", "dns", "ping", "first", "later"}


def found(text: str) -> set[str]:
    return {name for name, facts in NAMED.items() if parse(text).matches(facts)}


@pytest.mark.parametrize(
    ("text", "canonical", "names"),
    [
        ("", "", ALL),
        (" \t\n", "", ALL),
        (POD, f"host {POD}", ALL - {"short"}),
        (f"host {FAR}", f"host {FAR}", TO_FAR),
        (f"src host {FAR}", f"src host {FAR}", {"dns"}),
        (f"src {FAR}", f"src host {FAR}", {"dns"}),
        (f"dst {FAR}", f"dst host {FAR}", {"web", "ping", "first", "later"}),
        (f"src or dst host {FAR}", f"host {FAR}", TO_FAR),
        (f"src and dst {FAR}", f"src and dst host {FAR}", set()),
        ("src and dst net 10.5.0.0/16", "src and dst net 10.5.0.0/16", ALL - {"gre", "short"}),
        ("net 10.6", "net 10.6.0.0/16", {"gre"}),
        ("10.6/16", "net 10.6.0.0/16", {"gre"}),
        ("net 10.6/16", "net 10.6.0.0/16", {"gre"}),
        ("dst 10.6.0.0/24", "dst net 10.6.0.0/24", {"gre"}),
        ("net 0.0.0.0/0", "net 0.0.0.0/0", ALL - {"short"}),
        (f"net {FAR}/32", f"host {FAR}", TO_FAR),
        ("port 53", "port 53", {"dns"}),
        ("src port 443", "src port 443", set()),
        ("dst port 443", "dst port 443", {"web", "first"}),
        ("portrange 50-60", "portrange 50-60", {"dns"}),
        ("portrange 53-53", "port 53", {"dns"}),
        ("portrange 53", "port 53", {"dns"}),
        ("portrange 0-65535", "portrange 0-65535", {"web", "dns", "first"}),
        ("port 0", "port 0", set()),
        ("tcp", "tcp", {"web", "first", "later"}),
        ("icmp or udp", "icmp or udp", {"ping", "error", "dns"}),
        ("ip proto 47", "proto 47", {"gre"}),
        ("proto gre or 6", "proto 47 or tcp", {"gre", "web", "first", "later"}),
        (r"ip proto \tcp", "tcp", {"web", "first", "later"}),
        ("proto 47 or tcp port 443", "proto 47 or tcp port 443", {"gre", "web", "first"}),
        ("proto 1 or gre or tcp", "icmp or proto 47 or tcp", ALL - {"dns", "short"}),
        ("ip", "ip", ALL - {"short"}),
        (f"ip host {FAR}", f"host {FAR}", TO_FAR),
        ("tcp port 53", "tcp port 53", set()),
        ("udp src or dst port 53", "udp port 53", {"dns"}),
        (f"tcp dst host {FAR}", f"tcp dst host {FAR}", {"web", "first", "later"}),
        ("less 60", "less 60", {"web", "dns", "error", "gre", "short"}),
        ("greater 84", "greater 84", {"first", "later", "ping"}),
        ("less 83", "less 83", {"web", "dns", "error", "gre", "short"}),
        ("fragment", "fragment", {"first", "later"}),
        ("tcp-syn", "tcp-syn", {"web", "first"}),
        ("tcp-syn and not tcp-ack", "tcp-syn and not tcp-ack", {"web", "first"}),
        ("tcp-rst or tcp-fin", "tcp-rst or tcp-fin", set()),
        (f"peer {PEER}", f"peer {PEER}", {"web", "dns", "gre", "first", "later"}),
        (f"outer host {PEER}", f"peer {PEER}", {"web", "dns", "gre", "first", "later"}),
        ("outer net 192.0.2.0/24", "peer 192.0.2.0/24", ALL - {"ping"}),
        (f"host {PEER}", f"host {PEER}", set()),
        ("encap", "encap", ALL - {"dns", "error", "short"}),
        ("in", "decap", {"dns", "error", "short"}),
        ("outbound", "encap", ALL - {"dns", "error", "short"}),
        ("drop", "drop", {"ping", "gre", "short"}),
        ("reason no_route", "reason no_route", {"ping"}),
        ("reason TOO_BIG or too_short", "reason too_big or reason too_short", {"gre", "short"}),
        # The first reason has the number 0: that it is absent elsewhere is not the same.
        ("reason too_short", "reason too_short", {"short"}),
        ("quoted tcp", "quoted tcp", {"error"}),
        ("quoted dst port 443", "quoted dst port 443", {"error"}),
        (f"quoted {FAR}", f"quoted host {FAR}", {"error"}),
        ("quoted tcp src port 443", "quoted tcp src port 443", set()),
        ("quoted ip", "quoted ip", {"error"}),
        (
            f"quoted (tcp and {FAR} and not port 80) or drop",
            f"(quoted tcp and quoted host {FAR} and not quoted port 80) or drop",
            {"error", "ping", "gre", "short"},
        ),
        ("quoted (udp or quoted (tcp)) and tcp", "(quoted udp or quoted tcp) and tcp", set()),
        ("port 443", "port 443", {"web", "first"}),
        # What is absent makes a test false and its negation true.
        ("not port 53", "not port 53", ALL - {"dns"}),
        ("not host 10.9.9.9", "not host 10.9.9.9", ALL),
        # not binds tightest; and, or alike, from the left, as in pcap-filter(7).
        ("not icmp and encap", "not icmp and encap", ALL - {"dns", "ping", "error", "short"}),
        ("icmp or udp and decap", "(icmp or udp) and decap", {"dns", "error"}),
        ("icmp or (udp and encap)", "icmp or (udp and encap)", {"ping", "error"}),
        ("tcp and encap or udp", "(tcp and encap) or udp", {"web", "first", "later", "dns"}),
        ("!(tcp||udp)&&encap", "not (tcp or udp) and encap", {"ping", "gre"}),
        ("not not icmp", "not not icmp", {"ping", "error"}),
        ("NOT ICMP AND ENCAP", "not icmp and encap", ALL - {"dns", "ping", "error", "short"}),
        # A bare value takes over the words before the last one.
        ("port 53 or 443", "port 53 or port 443", {"dns", "web", "first"}),
        ("tcp dst port 53 or 443", "tcp dst port 53 or tcp dst port 443", {"web", "first"}),
        (f"src {FAR} or {POD}", f"src host {FAR} or src host {POD}", ALL - {"error", "short"}),
        ("port (53 or 443)", "port 53 or port 443", {"dns", "web", "first"}),
        (f"host ({FAR} and {POD})", f"host {FAR} and host {POD}", ALL - {"gre", "error", "short"}),
        ("port 1 or not 53", "port 1 or not port 53", ALL - {"dns"}),
        ("portrange 1-5 or 50-60", "portrange 1-5 or portrange 50-60", {"dns"}),
        (f"icmp or {FAR}", f"icmp or host {FAR}", {"error", *TO_FAR}),
        (f"peer 192.0.2.8 or {PEER}", f"peer 192.0.2.8 or peer {PEER}", ALL - {"ping", "short"}),
    ],
)
def test_meaning(text: str, canonical: str, names: set[str]) -> None:
    made = parse(text)
    assert made.text == canonical
    assert found(text) == names
    assert parse(canonical) == made
    assert is_sound(made.ops)


@pytest.mark.parametrize(
    ("text", "position", "words"),
    [
        ("host", 4, "the filter ends here: host takes an IPv4 address"),
        ("host www.example.org", 5, "names are not looked up"),
        ("host fe80::1", 5, "IPv4 only"),
        ("host 10.5", 5, "an address like"),
        ("host 10.5.1.256", 5, "an address like"),
        ("host 10.5.01.2", 5, "an address like"),
        ("80", 0, "write port 80"),
        ("net 10.5.1.2/16", 4, "write 10.5.0.0/16"),
        ("net 10.5.0.0/33", 4, "a network like"),
        ("net 10.5.0.0/", 4, "a network like"),
        ("net 1.2.3.4.5", 4, "a network like"),
        ("net 300", 4, "a network like"),
        ("port 65536", 5, "a number to 65535"),
        ("port http", 5, "names are not looked up"),
        ("port -1", 5, "a number to 65535"),
        ("port 08", 5, "a number to 65535"),
        ("port ٣", 5, "a number to 65535"),
        ("port 1_0", 5, "a number to 65535"),
        ("port 10.5.1.2", 5, "write host 10.5.1.2"),
        ("portrange 9-5", 10, "the lower port first"),
        ("portrange 1-2-3", 10, "the lower port first"),
        ("less", 4, "less takes a number of bytes"),
        ("less 4294967296", 5, "less takes a number of bytes"),
        ("proto 256", 6, "a number to 255"),
        ("reason no_rout", 7, "did you mean no_route"),
        ("reason zzzz", 7, "one of too_short"),
        ("no_route", 0, "write reason no_route"),
        ("tpc port 80", 0, "did you mean tcp?"),
        ("peer port 8285", 5, "peer takes host, net or an address"),
        ("outer src 192.0.2.7", 6, "outer takes host, net or an address"),
        ("src", 3, "src takes host, net, port, portrange or an address"),
        ("src tcp", 4, "src takes"),
        ("tcp proto 6", 4, "tcp takes host, net, port, portrange or an address"),
        ("quoted drop", 7, "quoted takes"),
        ("quoted", 6, "quoted takes"),
        ("quoted (tcp and drop)", 16, "no more"),
        ("quoted (tcp) and drop or quoted (peer 192.0.2.7)", 33, "no more"),
        ("host 10.5.1.2 port 80", 14, "expected and, or, or the end"),
        ("tcp or", 6, "the filter ends here"),
        ("and tcp", 0, "expected host"),
        ("(tcp", 4, "expected and, or, or )"),
        ("tcp)", 3, "expected and, or, or the end"),
        ("()", 1, "expected host"),
        ("port (80 or icmp)", 12, "a number to 65535"),
        ("port 80 or 10.5.1.2", 11, "write host 10.5.1.2"),
        ("(port 80) or 443", 13, "write port 443"),
        ("tcp & udp", 4, "expected and, or"),
        ("| udp", 0, "write ||"),
        ("tcp[13] & 2 != 0", 0, "tcp-syn"),
        ("ip6", 0, "IPv4 only"),
        ("arp", 0, "no link layer"),
        ("tcp\x1b[2J", 0, ""),
        ("(" * 65 + "tcp", 64, "more than 64 parentheses"),
        ("!" * 4096, 4096, "the filter ends here"),
        ("!" * 70 + "tcp", 0, f"at most {OPS_MAX}"),
        (" or ".join(["tcp"] * 33), 32 * 7, f"at most {OPS_MAX}"),
        ("port (" + " or ".join(["1"] * 40), 6 + 16 * 5, f"at most {OPS_MAX}"),
        ("a" * 4097, 4096, "longer than 4096"),
    ],
)
def test_wrong(text: str, position: int, words: str) -> None:
    with pytest.raises(FilterError) as caught:
        parse(text)
    error = caught.value
    assert isinstance(error, ConfigError)
    assert words in str(error)
    assert (error.position, error.text) == (position, text)
    assert str(error).isprintable()
    reason, shown, caret = error.lines()
    assert words in reason
    # The caret stands below the wrong character, or behind the last one.
    place = len(caret) - 1
    under = shown[place : place + 1]
    assert caret == " " * place + "^"
    if text[position : position + 1].isprintable() and text.isascii():
        assert under == text[position : position + 1]
    assert len(shown) <= 80
    assert shown.isprintable()


def test_the_longest_filters_that_are_read() -> None:
    made = parse(" or ".join(["tcp"] * 32))
    assert len(made.ops) == 63
    assert len(parse(f"!tcp or {made.text[7:]}").ops) == OPS_MAX
    assert parse("(" * 64 + "tcp" + ")" * 64).text == "tcp"


def test_a_program_that_cannot_be_run_is_no_sound_one() -> None:
    test, joint, turn = (Op(OpKind.TEST, high=9), Op(OpKind.AND), Op(OpKind.NOT))
    assert is_sound(())
    assert is_sound((test, test, joint, turn))
    for ops in ((turn,), (test, joint), (test, test), (Op(OpKind.TEST, low=2, high=1),)):
        assert not is_sound(ops)
    assert is_sound((test, *(turn,) * (OPS_MAX - 1)))
    assert not is_sound((test, *(turn,) * OPS_MAX))


def test_flags_are_bits() -> None:
    for name, flag in (("tcp-fin", FIN), ("tcp-rst", RST), ("tcp-ack", ACK), ("tcp-syn", SYN)):
        for flags in (0, flag, flag | 0x80, ~flag & 0xFF):
            packet = packets.tcp(b"", 1, flags, b"")
            facts = facts_of(packet, direction=Direction.ENCAP)
            assert parse(name).matches(facts) is bool(flags & flag)


def test_an_empty_filter_matches_everything() -> None:
    assert Filter((), "").matches(Facts({}))
