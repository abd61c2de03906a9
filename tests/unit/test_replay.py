"""`tundp replay`: link headers, directions, decisions, expectations. Files are written here."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.packets import DF, icmp_echo, tcp, udp
from tundp.choices import ReplayWay, SourceCheck
from tundp.cli.program import main
from tundp.daemon.replay import Given, rules_of
from tundp.observe.ledger import from_mapping
from tundp.observe.replay import (
    Decision,
    Replayed,
    Rules,
    described,
    differences,
    inner_of_link,
    replay,
    summed,
)
from tundp.wire.capture_file import CapturedPacket

LEASES = {
    "10.5.1.0/24": "192.0.2.1",
    "10.5.2.0/24": "192.0.2.2",
    "10.5.3.0/24": "192.0.2.3",
}
SUBNET = IPv4Network("10.5.1.0/24")
RAW, ETHERNET, SLL, IPV4, SLL2 = 101, 1, 113, 228, 276


def rules(**given: Any) -> Rules:
    options = {"subnet": SUBNET, "mtu": 1472, **given}
    return rules_of(from_mapping(LEASES), Given(**options))


def captured(data: bytes, *, linktype: int = RAW, number: int = 1, **more: Any) -> CapturedPacket:
    members = {"original_len": len(data), **more}
    return CapturedPacket(number=number, time_ns=0, linktype=linktype, data=data, **members)


def inner(source: str = "10.5.1.2", destination: str = "10.5.2.3", **more: Any) -> bytes:
    return icmp_echo(b"x" * 56, source=source, destination=destination, **more)


def outer(
    packet: bytes, source: str = "192.0.2.2", destination: str = "192.0.2.1", **more: Any
) -> bytes:
    ports = {"sport": 8285, "dport": 8285, **more}
    return udp(packet, source=source, destination=destination, **ports)


FROM_PEER = inner("10.5.2.3", "10.5.1.2")


@pytest.mark.parametrize(
    ("packet", "line"),
    [
        (inner(), "encap forward 10.5.1.2 > 10.5.2.3 icmp 84 to 192.0.2.2:8285"),
        (
            inner(destination="10.5.77.1"),
            "encap reply no_route 10.5.1.2 > 10.5.77.1 icmp 84 ICMP net unreachable",
        ),
        (
            inner(ttl=1),
            "encap reply hop_limit_exceeded 10.5.1.2 > 10.5.2.3 icmp 84 ICMP time exceeded",
        ),
        (
            inner(destination="10.5.1.9"),
            "encap reply own_subnet 10.5.1.2 > 10.5.1.9 icmp 84 ICMP net unreachable",
        ),
        (
            udp(b"x" * 1600, source="10.5.1.2", destination="10.5.2.3", frag=0),
            "encap forward 10.5.1.2 > 10.5.2.3 udp 1628 to 192.0.2.2:8285 (super)",
        ),
        (
            icmp_echo(b"x" * 1600, source="10.5.1.2", destination="10.5.2.3", frag=0),
            "encap forward 10.5.1.2 > 10.5.2.3 icmp 1628 to 192.0.2.2:8285 in 2 fragments",
        ),
        (
            icmp_echo(b"x" * 1600, source="10.5.1.2", destination="10.5.2.3", frag=DF),
            "encap reply too_big 10.5.1.2 > 10.5.2.3 icmp 1628 ICMP fragmentation needed, MTU 1472",
        ),
        (b"\x45\0\0", "encap drop too_short"),
        (b"\x60" + bytes(39), "encap drop not_ipv4"),
        (outer(FROM_PEER), "decap deliver 10.5.2.3 > 10.5.1.2 icmp 84 from 192.0.2.2:8285"),
        (
            outer(FROM_PEER, source="192.0.2.3"),
            "decap deliver 10.5.2.3 > 10.5.1.2 icmp 84 from 192.0.2.3:8285 (source_mismatch)",
        ),
        (
            outer(inner("10.5.2.3", "10.5.3.2")),
            "decap deliver 10.5.2.3 > 10.5.3.2 icmp 84 from 192.0.2.2:8285 (destination_mismatch)",
        ),
        (
            outer(inner("10.5.1.7", "10.5.1.2")),
            "decap drop martian_source 10.5.1.7 > 10.5.1.2 icmp 84 from 192.0.2.2:8285",
        ),
        (outer(b"abc"), "decap drop too_short from 192.0.2.2:8285"),
        (
            outer(inner(), source="192.0.2.1", destination="192.0.2.2"),
            "skip sent by this node: it is judged where it is read from the TUN",
        ),
        (
            outer(inner(), source="192.0.2.3", destination="192.0.2.2"),
            "skip for 192.0.2.2, which is not this node",
        ),
        (FROM_PEER, "skip for this node: what came out of the tunnel has been judged before"),
    ],
)
def test_decisions(packet: bytes, line: str) -> None:
    assert described(rules().decide(captured(packet))) == line


def test_a_capture_of_one_side_says_that_the_other_is_missing() -> None:
    """Nothing is called judged that is not in the file."""
    ours = replace(
        captured(outer(inner(), source="192.0.2.1", destination="192.0.2.2")),
        interface="udp:8285/out",
        packet_id=7,
    )
    read = replace(captured(inner()), interface="flannel0/in", packet_id=7)
    written = replace(captured(FROM_PEER), interface="flannel0/out", packet_id=9)
    received = replace(captured(outer(FROM_PEER)), interface="udp:8285/in", packet_id=9)
    alone = rules()
    assert "not in the file: capture without --outer" in alone.decide(ours).reason
    assert "not in the file: capture without --inner" in alone.decide(written).reason
    both = rules()
    assert both.decide(read).verdict == "forward"
    assert both.decide(ours).reason == "sent by this node: its inner packet has been judged"
    assert both.decide(received).verdict == "deliver"
    assert both.decide(written).reason == "written to the TUN: it has been judged as a datagram"


def test_settings_over_the_table() -> None:
    forged = captured(outer(FROM_PEER, source="192.0.2.3"))
    assert rules(source_check=SourceCheck.ENFORCE).decide(forged).reason == "source_mismatch"
    assert rules(source_check=SourceCheck.OFF).decide(forged).notes == ()
    stranger = captured(outer(inner("203.0.113.9", "10.5.1.2")))
    enforcing: dict[str, Any] = {"source_check": SourceCheck.ENFORCE}
    assert rules(**enforcing).decide(stranger).reason == "source_mismatch"
    admitting = rules(admitted=(IPv4Network("203.0.113.0/24"),), **enforcing)
    assert admitting.decide(stranger).verdict == "deliver"
    moved = rules(port=7000)
    assert moved.decide(captured(outer(FROM_PEER, sport=7000, dport=7000))).verdict == "deliver"
    assert moved.decide(captured(inner())).hop == "192.0.2.2:7000"


def test_a_direction_may_be_said() -> None:
    packet = captured(outer(inner("10.5.1.2", "10.5.2.3"), "192.0.2.1", "192.0.2.2"))
    assert rules().decide(packet).verdict == "skip"
    decap = rules(way=ReplayWay.DECAP)
    assert decap.decide(packet).direction == "decap"
    assert decap.decide(captured(inner())).reason == "no UDP datagram for port 8285"
    assert rules(way=ReplayWay.ENCAP).decide(captured(FROM_PEER)).direction == "encap"
    # Of a fragment of a datagram nobody can say what it carries.
    for frag in (0x2000, 5):  # the first one, and a later one
        assert decap.decide(captured(outer(FROM_PEER, frag=frag))).verdict == "skip"


def test_names_that_capture_gives_tell_the_direction() -> None:
    names = {
        "flannel0/in": (inner(), "encap"),
        "udp:8285/out": (outer(inner(), "192.0.2.1", "192.0.2.2"), ""),
        "udp:8285/in": (outer(FROM_PEER), "decap"),
        "flannel0/out": (FROM_PEER, ""),
        "drop/no_route": (inner(destination="10.5.77.1"), "encap"),
        "drop/source_mismatch": (inner("10.5.3.3", "10.5.1.2"), ""),
        # An inner datagram for the overlay's own port is no outer one.
        "drop/tunnel_in_tunnel": (outer(b"x", "10.5.2.3", "192.0.2.1"), ""),
        "flannel1/in": (outer(b"x", "10.5.1.2", "192.0.2.2"), "encap"),
    }
    for name, (packet, direction) in names.items():
        found = rules().decide(captured(packet, linktype=IPV4, interface=name))
        assert found.direction == direction, (name, found)


def test_a_drop_of_a_packet_in_the_file_is_no_packet_more() -> None:
    judge = rules()
    lost = inner(destination="10.5.77.1")
    read = captured(lost, linktype=IPV4, interface="flannel0/in", packet_id=7)
    drop = captured(lost, linktype=IPV4, interface="drop/no_route", packet_id=7)
    assert judge.decide(read).reason == "no_route"
    assert judge.decide(drop).reason == "dropped: it has been judged where it came in"
    # A file of drops alone has it once.
    assert rules().decide(drop).reason == "no_route"


def test_a_drop_without_its_arrival_is_of_the_side_the_file_has_not() -> None:
    # In a file of inner packets what was read comes first: this one was received, whatever it is.
    inside = rules()
    inside.decide(captured(FROM_PEER, linktype=IPV4, interface="flannel0/out"))
    outside = rules()
    outside.decide(captured(outer(FROM_PEER), linktype=IPV4, interface="udp:8285/in"))
    for number, data in enumerate((b"\x45", inner("10.5.1.7", "10.5.1.2"))):
        drop = captured(data, linktype=IPV4, interface="drop/any", packet_id=number)
        assert inside.decide(drop).verdict == "skip"
        assert outside.decide(drop).direction == "encap"


LINKS = {
    "raw": (RAW, b""),
    "ipv4": (IPV4, b""),
    "old raw": (12, b""),
    "ethernet": (ETHERNET, bytes(12) + b"\x08\x00"),
    "vlan": (ETHERNET, bytes(12) + b"\x81\x00\x00\x07\x08\x00"),
    "two vlans": (ETHERNET, bytes(12) + b"\x88\xa8\x00\x07\x81\x00\x00\x07\x08\x00"),
    "cooked": (SLL, bytes(14) + b"\x08\x00"),
    "cooked 2": (SLL2, b"\x08\x00" + bytes(18)),
}


@pytest.mark.parametrize("name", LINKS)
def test_link_headers(name: str) -> None:
    linktype, head = LINKS[name]
    found, why = inner_of_link(captured(head + inner(), linktype=linktype))
    assert found is not None, why
    assert bytes(found) == inner()
    assert rules().decide(captured(head + inner(), linktype=linktype)).verdict == "forward"


@pytest.mark.parametrize(
    ("linktype", "data", "words"),
    [
        (ETHERNET, bytes(12) + b"\x08\x06" + bytes(28), "not IPv4 (EtherType 0x0806)"),
        (ETHERNET, bytes(5), "not IPv4 (EtherType 0x0000)"),
        (SLL, bytes(14) + b"\x86\xdd", "not IPv4 (EtherType 0x86dd)"),
        (SLL2, b"\x08\x00", "cut within its link header"),
        (189, b"", "link type 189 is not known"),
    ],
)
def test_what_is_no_ipv4_is_skipped_by_name(linktype: int, data: bytes, words: str) -> None:
    found = rules().decide(captured(data, linktype=linktype))
    assert (found.verdict, found.reason) == ("skip", words)


def test_a_cut_packet_is_judged_at_its_length() -> None:
    whole = icmp_echo(b"x" * 1400, source="10.5.1.2", destination="10.5.2.3")
    found = rules().decide(captured(whole[:64], original_len=len(whole)))
    assert (found.verdict, found.length) == ("forward", 1428)
    # A packet that is really shorter than it says is not.
    assert rules().decide(captured(whole[:64])).reason == "bad_total_length"


def test_a_super_packet_is_judged_as_its_first() -> None:
    packet = tcp(b"x" * 30_000, source="10.5.1.2", destination="10.5.2.3", frag=DF)
    found = rules().decide(captured(packet))
    assert (found.verdict, found.notes, found.packets) == ("forward", ("super",), 1)
    # On a bridge it is a packet that does not fit.
    on_bridge = captured(bytes(12) + b"\x08\x00" + packet, linktype=ETHERNET)
    assert rules().decide(on_bridge).reason == "too_big"


@given(st.sampled_from([RAW, ETHERNET, SLL, SLL2, IPV4, 0, 12]), st.binary(max_size=120))
def test_nothing_in_a_file_raises(linktype: int, data: bytes) -> None:
    for way in ReplayWay:
        found = rules(way=way).decide(captured(data, linktype=linktype, original_len=len(data)))
        assert found.verdict in ("forward", "deliver", "reply", "drop", "skip")
        assert described(found)


@given(st.binary(max_size=100), st.integers(0, 2**32 - 1))
def test_nothing_in_a_datagram_raises(payload: bytes, length: int) -> None:
    found = rules().decide(captured(outer(payload), original_len=length))
    assert described(found)


def test_sums() -> None:
    packets = [captured(each, number=n) for n, each in enumerate([inner(), inner(), b"\x45"], 1)]
    found = list(replay(packets, rules()))
    assert summed(found) == {"encap forward": 2, "encap drop too_short": 1}


def test_differences_are_named() -> None:
    one = rules().decide(captured(inner(), number=1))
    two = rules().decide(captured(inner(destination="10.5.77.1"), number=2))
    assert list(differences([one, two], [one, two])) == []
    assert list(differences([one, two], [one])) == [
        "packet 2: not in the file, encap reply no_route 10.5.1.2 > 10.5.77.1 icmp 84 ICMP net"
        " unreachable expected"
    ]
    assert list(differences([one], [one, Decision(number=3, verdict="skip", reason="why")])) == [
        "packet 3: skip why; nothing expected"
    ]
    (line,) = differences([one], [replace(one, hop="192.0.2.3:8285")])
    assert line.split("; ")[0].endswith("to 192.0.2.3:8285")
    (line,) = differences([one], [replace(two, number=1)])
    assert line.startswith("packet 1: encap reply no_route")
    assert line.endswith("expected encap forward 10.5.1.2 > 10.5.2.3 icmp 84 to 192.0.2.2:8285")


# The command


def pcap(*packets: bytes, linktype: int = RAW) -> bytes:
    """A classic pcap file, little-endian, microseconds (draft-ietf-opsawg-pcap)."""
    head = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, linktype)
    return head + b"".join(struct.pack("<IIII", 1, 2, len(p), len(p)) + p for p in packets)


@pytest.fixture
def leases(tmp_path: Path) -> str:
    path = tmp_path / "leases.json"
    path.write_text(json.dumps(LEASES), encoding="utf-8")
    return f"--leases={path}"


def run(*arguments: str) -> int:
    return main(["replay", "--subnet=10.5.1.0/24", "--mtu=1472", *arguments])


def test_the_command_prints_a_line_a_packet_and_sums(
    tmp_path: Path, leases: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bug.pcap"
    path.write_bytes(pcap(inner(), outer(FROM_PEER), inner(destination="10.5.77.1")))
    assert run(str(path), leases) == 0
    assert capsys.readouterr().out.splitlines() == [
        "     1  encap forward 10.5.1.2 > 10.5.2.3 icmp 84 to 192.0.2.2:8285",
        "     2  decap deliver 10.5.2.3 > 10.5.1.2 icmp 84 from 192.0.2.2:8285",
        "     3  encap reply no_route 10.5.1.2 > 10.5.77.1 icmp 84 ICMP net unreachable",
        "",
        "     1  encap forward",
        "     1  decap deliver",
        "     1  encap reply no_route",
    ]


def test_the_command_as_a_regression_test(
    tmp_path: Path, leases: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, golden = tmp_path / "bug.pcap", tmp_path / "golden.json"
    path.write_bytes(pcap(inner(), outer(FROM_PEER)))
    assert run(str(path), leases, "-o", "json") == 0
    golden.write_text(capsys.readouterr().out, encoding="utf-8")
    assert len(Replayed.from_json(json.loads(golden.read_text())).decisions) == 2
    assert run(str(path), leases, f"--expect={golden}") == 0
    assert capsys.readouterr().out == "2 packets expected, 0 differences\n"
    path.write_bytes(pcap(inner(), outer(FROM_PEER, source="192.0.2.3")))
    assert run(str(path), leases, f"--expect={golden}", "--source-check=enforce") == 1
    out = capsys.readouterr().out
    assert "packet 2: decap drop source_mismatch" in out
    assert "expected decap deliver" in out


def test_what_is_wrong_is_named(
    tmp_path: Path, leases: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bug.pcap"
    path.write_bytes(pcap(inner())[:-5])
    assert run(str(path), leases) == 1
    assert f"{path}: byte " in capsys.readouterr().err
    assert run(str(tmp_path / "none.pcap"), leases) == 1
    assert "none.pcap: No such file" in capsys.readouterr().err
    path.write_text("{", encoding="utf-8")
    assert run(str(path), f"--leases={path}") == 2
    assert run(str(path), leases, f"--expect={path}") == 2
    assert run(str(path), leases, "--mtu=67") == 2
    assert run(str(path), leases, "--direction=sideways") == 2
    assert main(["replay", leases]) == 2
    assert "FILE is missing" in capsys.readouterr().err


def test_standard_input(leases: str) -> None:
    argv = (sys.executable, "-m", "tundp", "replay", "-", leases, "--subnet=10.5.1.0/24")
    done = subprocess.run(argv, input=pcap(inner()), capture_output=True, check=True)
    assert b"encap forward" in done.stdout


def test_the_node_that_is_played_has_its_public_ip() -> None:
    table = rules().leases
    assert (table.public_ip, table.own_addresses) == (
        IPv4Address("192.0.2.1"),
        (IPv4Address("192.0.2.1"),),
    )
