"""Events become a capture: read back by scapy, which shares no code with the writer."""

from __future__ import annotations

import io
import json
import struct
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from scapy.utils import RawPcapNgReader

from tests.packets import counted, icmp_echo, is_sound, slow_sum, super_packet, tcp, udp
from tundp.observe.capture import CaptureAbout, CaptureChoice, Entry, Recorder
from tundp.observe.capture_pcapng import PcapngFile
from tundp.observe.capture_text import json_line, text_line
from tundp.observe.events import Event, PeerName
from tundp.wire.drop import DropReason
from tundp.wire.event import Record, Stage
from tundp.wire.pcapng import Way

NOW_NS = 1_700_000_000_123_456_789
ABOUT = CaptureAbout(
    version="1.2.3", node=IPv4Address("192.0.2.1"), network=IPv4Network("10.5.0.0/16"),
    subnet=IPv4Network("10.5.1.0/24"), tun="flannel0", mtu=1472, port=8285, engine="gso",
    host="kube1", machine="x86_64", kernel="Linux 6.1", filter="tcp",
)  # fmt: skip
PEER = PeerName(IPv4Address("192.0.2.2"), 8285, (IPv4Network("10.5.7.0/24"),
                                                IPv4Network("10.5.2.0/24")))  # fmt: skip
THERE: Any = {"source": "10.5.1.2", "destination": "10.5.2.3"}
HERE: Any = {"source": "10.5.2.3", "destination": "10.5.1.2"}


def event(stage: Stage, packet: bytes, **changes: Any) -> Event:
    """An event; changes are of the record, but for worker, time_ns, reason and peer."""
    outside: dict[str, Any] = {"worker": 0, "time_ns": NOW_NS, "reason": None, "peer": PEER}
    outside = {name: changes.pop(name, value) for name, value in outside.items()}
    fields: dict[str, Any] = {
        "packet_id": 77, "hop": 2, "outer": 0xC0000202, "port": 8285, "length": len(packet),
        "generation": 12, "packet": packet, "is_dropped": outside["reason"] is not None,
    }  # fmt: skip
    return Event(record=Record(stage=stage, **fields | changes), **outside)


def entries(*events: Event, **choice: Any) -> list[Entry]:
    recorder = Recorder(ABOUT, CaptureChoice(**{"has_drops": True} | choice))
    return [record for each in events for record in recorder.entries(each)]


def captured(*events: Event, **choice: Any) -> list[tuple[bytes, Any]]:
    """Packets and what scapy says of them, of a file made of these events."""
    recorder = Recorder(ABOUT, CaptureChoice(**{"has_drops": True} | choice))
    file = PcapngFile(recorder, NOW_NS)
    data = file.head()
    for each in events:
        data += b"".join(map(file.packet, recorder.entries(each)))
    return scapys(data + file.tail(NOW_NS + 5))


def scapys(data: bytes) -> list[tuple[bytes, Any]]:
    reader: Any = RawPcapNgReader
    return list(reader(io.BytesIO(data)))


def text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def test_a_packet_on_its_way_out() -> None:
    packet = icmp_echo(b"x" * 56, **THERE)
    (inner, about_inner), (outer, about_outer) = captured(
        event(Stage.TUN_READ, packet),
        event(Stage.UDP_SEND, packet, time_ns=NOW_NS + 11_000, together=4),
    )
    assert inner == packet
    assert text(about_inner.ifname) == "flannel0/in"
    assert about_inner.direction & 3 == 1
    assert (about_inner.linktype, about_inner.wirelen) == (228, len(packet))
    assert (about_inner.tshigh << 32 | about_inner.tslow, about_inner.tsresol) == (NOW_NS, 10**9)
    assert text(about_inner.comments[0]) == ("#e0.77 lookup 10.5.2.0/24 -> 192.0.2.2:8285, FIB 12")
    assert text(about_outer.ifname) == "udp:8285/out"
    assert about_outer.direction & 3 == 2
    assert text(about_outer.comments[0]) == (
        "#e0.77 lookup 10.5.2.0/24 -> 192.0.2.2:8285, FIB 12; encap +28 B; 11.0 us after its read;"
        " 4 datagrams in its send; outer header made again: ID, TTL, TOS, checksum not known"
    )
    assert slow_sum(outer[:20]) == 0xFFFF
    assert outer[28:] == packet
    assert struct.unpack("!BBHHHBB", outer[:10]) == (0x45, 0, len(packet) + 28, 0, 0, 0, 17)
    assert outer[12:20] == bytes([192, 0, 2, 1, 192, 0, 2, 2])
    assert struct.unpack("!HHHH", outer[20:28]) == (8285, 8285, len(packet) + 8, 0)


def test_a_packet_on_its_way_in() -> None:
    packet = udp(b"hello", **HERE)
    first = event(Stage.UDP_RECEIVE, packet, port=4000, packet_id=3, wait_ns=31_400)
    last = event(Stage.TUN_WRITE, packet, packet_id=3, time_ns=NOW_NS + 2500)
    (outer, about_outer), (inner, about_inner) = captured(first, last)
    assert (text(about_outer.ifname), text(about_inner.ifname)) == ("udp:8285/in", "flannel0/out")
    assert (about_outer.direction & 3, about_inner.direction & 3) == (1, 2)
    assert outer[12:24] == bytes([192, 0, 2, 2, 192, 0, 2, 1]) + struct.pack("!HH", 4000, 8285)
    assert inner == packet
    assert "from 192.0.2.2:4000, the node of 10.5.7.0/24, 10.5.2.0/24; socket wait 31us" in text(
        about_outer.comments[0]
    )
    assert "decap -28 B from 192.0.2.2:8285, FIB 12; 2.5 us after its receive" in text(
        about_inner.comments[0]
    )


def test_ids_are_the_same_on_both_sides_and_differ_otherwise() -> None:
    packet = udp(b"", **THERE)
    found = {
        (worker, stage, number): entries(event(stage, packet, worker=worker, packet_id=number))[
            0
        ].packet_id
        for worker in (0, 1, 63)
        for stage in Stage
        for number in (1, 2, 1 << 40)
    }
    for (worker, stage, number), packet_id in found.items():
        same = {key for key, value in found.items() if value == packet_id}
        other = {
            Stage.TUN_READ: Stage.UDP_SEND, Stage.UDP_SEND: Stage.TUN_READ,
            Stage.UDP_RECEIVE: Stage.TUN_WRITE, Stage.TUN_WRITE: Stage.UDP_RECEIVE,
        }[stage]  # fmt: skip
        assert same == {(worker, stage, number), (worker, other, number)}


@pytest.mark.parametrize("reason", DropReason, ids=lambda reason: reason.label)
def test_every_drop_has_an_interface_meaning_and_next_step(reason: DropReason) -> None:
    (record,) = entries(
        event(Stage.TUN_READ, udp(b"", **THERE), reason=reason.label, outer=0, peer=None)
    )
    assert record.interface == f"drop/{reason.label}"
    assert record.comment == (
        f"#e0.77 DROP {reason.label}: {reason.means}, FIB 12. Next: {reason.next_step}"
    )


def test_a_drop_names_errno_and_the_other_node() -> None:
    (record,) = entries(
        event(Stage.UDP_SEND, udp(b"", **THERE), reason="send_forbidden", error=1, generation=0)
    )
    assert record.comment.startswith("#e0.77 DROP send_forbidden (EPERM) to 192.0.2.2:8285: EPERM")
    (record,) = entries(event(Stage.UDP_RECEIVE, b"\x60", reason="too_short"))
    assert "DROP too_short from 192.0.2.2:8285: " in record.comment
    assert (record.data, record.way) == (b"\x60", Way.INBOUND)


def test_a_reason_of_a_later_version_is_shown() -> None:
    (record,) = entries(event(Stage.TUN_READ, b"", reason="brand_new"))
    assert record.interface == "drop/brand_new"
    assert "a reason this version of tundp does not know" in record.comment


@pytest.mark.parametrize(
    ("choice", "seen"),
    [
        ({}, ["flannel0/in", "udp:8285/out", "udp:8285/in", "flannel0/out", "drop/no_route"]),
        ({"has_outer": False}, ["flannel0/in", "flannel0/out", "drop/no_route"]),
        ({"has_inner": False, "has_drops": False}, ["udp:8285/out", "udp:8285/in"]),
    ],
)
def test_only_what_was_asked_for(choice: dict[str, Any], seen: list[str]) -> None:
    packet = udp(b"", **THERE)
    events = [event(stage, packet) for stage in Stage]
    events.append(event(Stage.TUN_READ, packet, reason="no_route"))
    assert [record.interface for record in entries(*events, **choice)] == seen


def test_stages_asked_of_the_daemon() -> None:
    assert CaptureChoice().stages == ("read", "write", "send", "receive")
    assert CaptureChoice(has_outer=False, has_drops=True).stages == ("read", "write", "drop")
    assert CaptureChoice(snaplen=96).asked_len == 96
    assert CaptureChoice(snaplen=96, is_wire_size=True).asked_len == 65535


@pytest.mark.parametrize("make", [tcp, udp])
@pytest.mark.parametrize("payload_len", [3000, 3001])
def test_super_packets_are_cut_into_sound_packets(make: Any, payload_len: int) -> None:
    payload = counted(payload_len)
    packet = super_packet(make(payload, **THERE))
    whole = event(Stage.TUN_READ, packet, packets=3, gso_size=1400)
    made = entries(whole, is_wire_size=True)
    headers = len(packet) - len(payload)
    assert [len(each.data) for each in made] == [headers + 1400, headers + 1400,
                                                 headers + payload_len - 2800]  # fmt: skip
    assert all(is_sound(bytes(each.data)) for each in made)
    assert b"".join(bytes(each.data[headers:]) for each in made) == payload
    assert {each.packet_id for each in made} == {77 << 8}
    assert made[1].comment.endswith("super-packet for 3 packets of 1400 bytes each, 2 of 3")
    (uncut,) = entries(whole)
    assert uncut.data == packet


@pytest.mark.parametrize("make", [tcp, udp])
def test_packets_of_a_coalesced_write_have_the_ids_they_came_with(make: Any) -> None:
    """Receive 5 brought two of them, 6 another flow's, 7 the third one."""
    payload = counted(3000)
    packet = super_packet(make(payload, **HERE))
    write = event(Stage.TUN_WRITE, packet, packets=3, gso_size=1000, packet_id=5, more_ids=2)
    pieces = [bytes(each.data) for each in entries(write, is_wire_size=True)]
    came = [(5, pieces[0]), (5, pieces[1]), (6, make(b"another", dport=9, **HERE)), (7, pieces[2])]
    receives = [event(Stage.UDP_RECEIVE, data, packet_id=number) for number, data in came]
    *_, first, second, third = entries(*receives, write, is_wire_size=True)
    assert [each.label for each in (first, second, third)] == ["d0.5", "d0.5", "d0.7"]
    assert first.comment.startswith("#d0.5..7 decap")
    (uncut,) = entries(write)
    assert uncut.label == "d0.5"
    unknown = entries(write, is_wire_size=True)
    assert {each.label for each in unknown} == {"d0.5"}


def test_equal_datagrams_of_one_write_have_an_id_each() -> None:
    packet = super_packet(udp(b"same" * 3, **HERE))
    write = event(Stage.TUN_WRITE, packet, packets=3, gso_size=4, packet_id=5, more_ids=2)
    one = bytes(entries(write, is_wire_size=True)[0].data)
    receives = [event(Stage.UDP_RECEIVE, one, packet_id=number) for number in (5, 6, 7)]
    made = entries(*receives, write, is_wire_size=True)[3:]
    assert [each.label for each in made] == ["d0.5", "d0.6", "d0.7"]


def test_what_cannot_be_cut_is_left_and_said() -> None:
    packet = super_packet(tcp(counted(3000), **THERE))
    cut_off = event(Stage.TUN_READ, packet[:100], length=len(packet), packets=3, gso_size=1400)
    broken = event(Stage.TUN_READ, packet[:2] + b"\x00\x10" + packet[4:], packets=3, gso_size=1400)
    short = event(Stage.TUN_READ, b"E", packets=3, gso_size=1400)
    for each in (cut_off, broken, short):
        (record,) = entries(each, is_wire_size=True)
        assert record.data == each.packet
        assert record.length == each.record.length
        assert record.comment.endswith(
            "not cut: it is not whole, or its header does not describe it"
        )


def test_an_unfinished_checksum_is_completed_and_a_wrong_one_is_not() -> None:
    good = tcp(b"data", **THERE)
    wrong = bytearray(good)
    wrong[-1] ^= 1
    for sent, expected in (
        (super_packet(good), good), (good, good), (bytes(wrong), bytes(wrong)),
        (super_packet(udp(b"x", **THERE)), udp(b"x", **THERE)),
        (super_packet(good)[:30], super_packet(good)[:30]),
        (icmp_echo(b"x", **THERE), icmp_echo(b"x", **THERE)),
    ):  # fmt: skip
        (record,) = entries(event(Stage.TUN_READ, sent), is_wire_size=True)
        assert record.data == expected


def test_a_snapshot_length_cuts_the_inner_packet_only() -> None:
    packet = udp(b"x" * 500, **THERE)
    cut = packet[:96]
    first, second = entries(
        event(Stage.TUN_READ, cut, length=len(packet)),
        event(Stage.UDP_SEND, cut, length=len(packet)), snaplen=96,
    )  # fmt: skip
    assert (len(first.data), first.length) == (96, len(packet))
    assert (len(second.data), second.length) == (96 + 28, len(packet) + 28)
    assert int.from_bytes(second.data[2:4], "big") == len(packet) + 28


def test_a_datagram_longer_than_any_has_no_length() -> None:
    (record,) = entries(event(Stage.UDP_SEND, b"E" * 99, length=65535))
    assert record.data[2:4] == b"\0\0"
    assert record.data[24:26] == b"\0\0"
    assert slow_sum(record.data[:20]) == 0xFFFF


def blocks_of(data: bytes) -> list[tuple[int, bytes]]:
    found, at = [], 0
    while at < len(data):
        kind, length = struct.unpack_from("<II", data, at)
        assert struct.unpack_from("<I", data, at + length - 4) == (length,)
        found.append((kind, data[at + 8 : at + length - 4]))
        at += length
    return found


def test_every_file_of_a_ring_stands_alone() -> None:
    recorder = Recorder(ABOUT, CaptureChoice(has_drops=True))
    file = PcapngFile(recorder, NOW_NS)
    dropped = event(Stage.TUN_READ, udp(b"", **THERE), reason="no_route")
    for _ in range(2):
        (record,) = recorder.entries(dropped)
        data = file.head() + file.packet(record) + file.packet(record) + file.tail(NOW_NS)
        assert [kind for kind, _ in blocks_of(data)] == [
            0x0A0D0D0A, 1, 1, 1, 1, 4, 1, 4, 6, 6, 5, 5, 5, 5, 5
        ]  # fmt: skip
        assert [text(about.ifname) for _, about in scapys(data)] == ["drop/no_route"] * 2


def test_losses_stand_where_they_were_noticed_and_in_the_statistics() -> None:
    recorder = Recorder(ABOUT, CaptureChoice())
    file = PcapngFile(recorder, NOW_NS)
    (record,) = recorder.entries(event(Stage.TUN_READ, udp(b"", **THERE)))
    file.head()
    file.lost(9)
    assert b"\x04\x00\x08\x00" + struct.pack("<Q", 9) in file.packet(record)
    assert b"\x04\x00\x08\x00" + struct.pack("<Q", 9) not in file.packet(record)
    tail = blocks_of(file.tail(NOW_NS, lost=9, os_dropped={"flannel0/in": 4, "other": 1}))
    assert struct.pack("<HHQ", 5, 8, 9) in tail[0][1]
    assert struct.pack("<HHQ", 7, 8, 4) in tail[0][1]
    assert b"9 events, of all interfaces, were lost" in tail[0][1]
    assert struct.pack("<HHQ", 7, 8, 4) not in tail[1][1]
    assert b"\x05\0\x08\0" not in tail[1][1], "not known of which interface lost ones were"
    tail = blocks_of(file.tail(NOW_NS))
    assert all(struct.pack("<HHQ", 5, 8, 0) in body for _, body in tail)


def test_names_are_bounded() -> None:
    recorder = Recorder(ABOUT, CaptureChoice())
    file = PcapngFile(recorder, NOW_NS)
    data = file.head()
    subnets = tuple(IPv4Network(f"10.5.{each}.0/24") for each in range(99))
    for number in range(2000):
        peer = PeerName(IPv4Address(0x0B000000 + number), 8285, subnets)
        (record,) = recorder.entries(event(Stage.TUN_READ, udp(b"", **THERE), peer=peer))
        data += file.packet(record)
    names = [body for kind, body in blocks_of(data) if kind == 4]
    assert len(names) <= 1024
    assert max(map(len, names)) < 1000


# Text


def test_a_line_of_text() -> None:
    (record,) = entries(event(Stage.UDP_SEND, icmp_echo(b"x" * 56, seq=3, **THERE)))
    time, line = text_line(record).split(" ", 1)
    assert time.endswith(".123456")
    packet, comment = line.split("  | ")
    assert packet == ("udp:8285/out   10.5.1.2 > 10.5.2.3 ICMP echo request id 1 seq 3, 84 B")
    assert comment.startswith("#e0.77 lookup")


def test_a_line_of_json() -> None:
    (record,) = entries(event(Stage.UDP_RECEIVE, udp(b"x", **HERE), reason="source_mismatch"))
    document = json.loads(json_line(record))
    assert document["reason"] == "source_mismatch"
    assert document["peer"] == {"address": "192.0.2.2", "port": 8285,
                               "subnets": ["10.5.7.0/24", "10.5.2.0/24"]}  # fmt: skip
    assert (document["time_ns"], document["label"]) == (NOW_NS, "d0.77")
    assert bytes.fromhex(document["packet"]) == udp(b"x", **HERE)
    assert "\n" not in json_line(record)


def test_hostile_packets_do_no_harm_to_a_terminal() -> None:
    (record,) = entries(event(Stage.TUN_READ, b"\x1b[2J", reason="too_short"))
    assert "\x1b" not in text_line(record)
