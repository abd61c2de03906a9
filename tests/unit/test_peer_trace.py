"""Traces of two nodes joined: which packets are the same, and what is said of those not found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest

from tests.json_schema import validate
from tests.packets import MF, ROUTER_ALERT, icmp_echo, tcp, udp, with_ttl
from tundp.observe.events import Event, PeerName
from tundp.observe.peer_trace import (
    GIVE_UP_NS,
    NO_RECORD_NS,
    Joined,
    Joiner,
    PeerState,
    PeerView,
    key_of,
    peer_of,
)
from tundp.observe.peer_trace_show import joined_lines, peer_document
from tundp.observe.stories import WAITING_MAX, Story, document
from tundp.observe.trace import Trace
from tundp.wire.event import Record, Stage

PEER = PeerName(IPv4Address("192.0.2.2"), 8285, (IPv4Network("10.5.2.0/24"),))
OWN = PeerName(IPv4Address("192.0.2.1"), 8285)
OFFSET_NS = 5_000_000_000
"""The other node's clock is so far ahead."""
NOW = 1_770_000_000_000_000_000
SCHEMA = Path(__file__).parents[2] / "tundp" / "observe" / "trace.schema.json"


def ping(number: int = 1, *, is_reply: bool = False) -> bytes:
    ends = ("10.5.2.3", "10.5.1.2") if is_reply else ("10.5.1.2", "10.5.2.3")
    return icmp_echo(
        bytes(56), kind=0 if is_reply else 8, seq=number, source=ends[0], destination=ends[1]
    )


def event(stage: Stage, packet: bytes, at_us: int, **values: Any) -> Event:
    record = Record(
        stage=stage,
        packet_id=values.pop("packet_id", 1),
        hop=2,
        length=values.pop("length", len(packet)),
        packet=packet,
        **values,
    )
    return Event(worker=0, record=record, time_ns=NOW + at_us * 1000, reason=None, peer=PEER)


def sent(packets: Sequence[bytes]) -> Story:
    """This node read and sent packets, 100 us after NOW."""
    first = event(Stage.TUN_READ, packets[0], 0, packets=len(packets))
    rest = [event(Stage.UDP_SEND, with_ttl(each, 63), 100) for each in packets]
    return Story(Trace(first, rest))


def received(packet: bytes) -> Story:
    first = event(Stage.UDP_RECEIVE, with_ttl(packet, 63), 500)
    return Story(Trace(first, [event(Stage.TUN_WRITE, with_ttl(packet, 62), 520)]))


def record(stage: str, packet: bytes, at_us: int, **values: Any) -> dict[str, Any]:
    """As /v1/peers/trace has it, by the other node's clock."""
    fields = {
        "unix_ns": NOW + OFFSET_NS + at_us * 1000,
        "stage": stage,
        "verdict": "pass",
        "reason": None,
        "error": None,
        "length": len(packet),
        "packets": 1,
        "together": 1,
        "gso_size": 0,
        "packet_id": 7,
        "last_packet_id": 7,
        "worker": 0,
        "packet": packet[:64].hex(),
    }
    return {"record": fields | values}


def view(*, began_us: int = -1_000_000, late_ns: int = 0) -> PeerView:
    """Of a node that shows what it sees since."""
    found = PeerView("192.0.2.2", OWN, own_subnet=IPv4Network("10.5.1.0/24"), late_ns=late_ns)
    hello = {
        "version": "0.2.0",
        "engine": "gso",
        "subnet": "10.5.2.0/24",
        "offset_s": OFFSET_NS / 1e9,
        "error_s": 9e-6,
    }
    found.take({"hello": hello}, NOW + began_us * 1000)
    return found


def joined(story: Story, of: PeerView, *, after_ns: int = NO_RECORD_NS + 1) -> Joined | None:
    """The story, if it need not wait any longer `after_ns` after NOW."""
    joiner = Joiner()
    joiner.add(story, of)
    return next(joiner.due(NOW + 100_000 + after_ns), None)


def shown(story: Story, of: PeerView) -> list[str]:
    found = joined(story, of)
    assert found is not None
    return list(joined_lines(found, 1, "192.0.2.1"))[1:]


def test_the_receiving_node_follows_with_the_time_on_the_wire() -> None:
    of = view()
    of.take(record("udp.receive", with_ttl(ping(), 63), 312), NOW)
    of.take(record("tun.write", with_ttl(ping(), 62), 330), NOW)
    lines = shown(sent([ping()]), of)
    assert lines[-2:] == [
        "  192.0.2.2    +312us  udp.receive  wire 212us (clock ±9us)",
        "  192.0.2.2    +330us  tun.write    84 B",
    ]


def test_the_sending_node_comes_first() -> None:
    of, reply = view(), ping(is_reply=True)
    of.take(record("tun.read", reply, 100), NOW)
    of.take(record("udp.send", with_ttl(reply, 63), 120), NOW)
    lines = shown(received(reply), of)
    assert [line.split()[:3] for line in lines] == [
        ["192.0.2.2", "+0us", "tun.read"],
        ["192.0.2.2", "+20us", "udp.send"],
        ["192.0.2.1", "+400us", "udp.receive"],
        ["192.0.2.1", "+420us", "tun.write"],
    ]
    assert "84 B to 192.0.2.1:8285, wire 380us (clock ±9us)" in lines[1]


def test_each_packet_of_a_super_packet_is_found_and_the_lost_one_counted() -> None:
    of = view()
    packets = [
        tcp(bytes(100), source="10.5.1.2", destination="10.5.2.3", seq=100 * number, ident=number)
        for number in range(5)
    ]
    for packet in packets[:4]:
        of.take(record("udp.receive", with_ttl(packet, 63), 312), NOW)
    of.take(record("tun.write", with_ttl(packets[0], 62), 330, packets=4), NOW)
    for _ in range(2):
        of.take({"lost": 0, "is_all": True}, NOW + NO_RECORD_NS)
    found = joined(sent(packets), of)
    assert found is not None
    lines = list(joined_lines(found, 1, "192.0.2.1"))[1:]
    half = peer_document(found.half)
    assert half is not None
    assert (half["packets"], half["missing"], len(half["events"])) == (5, 1, 5)
    assert "udp.receive  4 packets, wire 212us" in lines[-3]
    assert lines[-2].endswith(" B, written as one super-packet of 4")
    assert "of 1 of 5 packets no record of it within 0.5 s: lost between" in lines[-1]


def test_a_drop_on_the_other_node_has_its_reason_and_next_step() -> None:
    of = view()
    of.take(record("udp.receive", with_ttl(ping(), 63), 312), NOW)
    dropped = {"verdict": "drop", "reason": "source_mismatch"}
    of.take(record("tun.write", with_ttl(ping(), 63), 315, **dropped), NOW)
    found = joined(sent([ping()]), of)
    assert found is not None
    assert found.is_dropped
    assert not found.story.is_dropped
    lines = list(joined_lines(found, 1, "192.0.2.1"))
    assert "tun.write    DROP source_mismatch: " in lines[-2]
    assert lines[-1].startswith("    next step: ")


def says(of: PeerView, *parts: dict[str, Any]) -> str:
    story = sent([ping()])
    joiner = Joiner()
    joiner.add(story, of)
    for part in parts:
        of.take(part, NOW + NO_RECORD_NS)
    found = next(joiner.due(NOW + GIVE_UP_NS + 1_000_000))
    return list(joined_lines(found, 1, "192.0.2.1"))[-1].split(maxsplit=1)[1]


def test_what_is_not_found_is_said_with_the_reason() -> None:
    empty = {"lost": 0, "is_all": True}
    assert says(view(), empty, empty).startswith("no record of it within 0.5 s: lost between")
    assert says(view(), empty) == "no record: nothing more was heard of it for 3 s"
    assert says(view(), {"lost": 5, "is_all": True}, empty | {"lost": 5}).startswith(
        "no record: 5 of its records were lost meanwhile"
    )
    late = view(began_us=1000)
    assert says(late) == "no record: it was not asked yet when this packet passed"
    assert says(view(), {"error": "its trace ended"}) == "no record: its trace ended"
    refused = PeerView("192.0.2.2", OWN)
    refused.take({"error": "a stock flanneld", "result": "protocol-unreachable"}, NOW)
    assert says(refused) == "not looked at: a stock flanneld"


def test_what_the_end_of_the_trace_did_not_wait_for_is_not_called_lost() -> None:
    """The other node has nothing more to say, but half a second is not over."""
    of, joiner = view(), Joiner()
    for number in (1, 2):
        joiner.add(sent([ping(number)]), of)
    of.take(record("udp.receive", ping(2), 300), NOW)
    of.take(record("tun.write", ping(2), 310), NOW)
    for _ in range(2):
        of.take({"lost": 0, "is_all": True}, NOW + 200_000)
    young, known = joiner.due(NOW + 300_000, is_last=True)
    assert not young.is_dropped
    assert list(joined_lines(young, 1, "192.0.2.1"))[-1].split(maxsplit=1)[1] == (
        "no record yet: the trace ended before that node's answer was due"
    )
    half = peer_document(young.half)
    assert half is not None and not half["is_lost"]
    assert "no record" not in "".join(joined_lines(known, 2, "192.0.2.1"))
    joiner.add(sent([ping()]), of)
    for _ in range(2):
        of.take({"lost": 0, "is_all": True}, NOW + NO_RECORD_NS)
    (old,) = joiner.due(NOW + NO_RECORD_NS + 100_000, is_last=True)
    assert old.is_dropped, "it waited long enough"


def test_no_more_stories_wait_than_can_be_held() -> None:
    of, joiner = view(), Joiner()
    for number in range(WAITING_MAX + 2):
        joiner.add(sent([ping(number)]), of)
    early = list(joiner.due(NOW + 200_000))
    assert len(early) == 2
    assert not any(each.is_dropped for each in early)
    last = list(joined_lines(early[0], 1, "192.0.2.1"))[-1]
    assert last.endswith("no record yet: not waited for, since 4,096 packets already are")


def test_a_node_that_lost_records_is_not_waited_for_any_longer() -> None:
    """It never has nothing more to tell: each story would wait three seconds."""
    of, joiner = view(), Joiner()
    joiner.add(sent([ping()]), of)
    of.take({"lost": 5}, NOW + 200_000)
    assert next(joiner.due(NOW + 300_000), None) is None, "its record may be on its way"
    (found,) = joiner.due(NOW + 100_000 + NO_RECORD_NS)
    assert "5 of its records were lost meanwhile" in list(joined_lines(found, 1, "n"))[-1]


def test_a_story_waits_until_the_other_node_has_said_all() -> None:
    of = view()
    assert joined(sent([ping()]), of) is None
    of.take({"lost": 0, "is_all": True}, NOW + NO_RECORD_NS)
    assert joined(sent([ping()]), of) is None
    of.take({"lost": 0, "is_all": True}, NOW + NO_RECORD_NS)
    assert joined(sent([ping()]), of) is not None
    assert joined(sent([ping()]), view(), after_ns=GIVE_UP_NS) is not None
    # One record is one packet's: an equal packet is another.
    of.take(record("udp.receive", ping(), 300), NOW)
    of.take(record("tun.write", ping(), 310), NOW)
    first, second = joined(sent([ping()]), of), joined(sent([ping()]), of)
    assert first is not None
    assert second is not None
    assert first.half is not None
    assert second.half is not None
    assert (len(first.half.keys), len(second.half.keys)) == (0, 1)


EMPTY = {"lost": 0, "is_all": True}


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        ("192.0.2.1", "10.5.2.3"),
        ("10.5.1.2", "192.0.2.2"),
        ("203.0.113.9", "10.5.2.3"),
        ("10.5.3.1", "10.5.2.3"),
        ("10.5.2.4", "10.5.2.3"),
    ],
)
def test_what_the_other_node_does_not_look_at_is_not_lost(source: str, destination: str) -> None:
    packet = udp(b"hello", source=source, destination=destination)
    of = view()
    for _ in range(2):
        of.take(EMPTY, NOW + NO_RECORD_NS)
    found = joined(sent([packet]), of, after_ns=0)
    assert found is not None, "nothing is waited for"
    assert found.half is not None
    half = peer_document(found.half)
    assert half is not None
    assert (half["is_lost"], found.is_dropped) == (False, False)
    assert half["detail"] == (
        "not looked at there: that node traces packets between 10.5.1.0/24 and 10.5.2.0/24 only"
    )


def test_what_this_node_delays_on_purpose_is_not_lost_before_it_can_arrive() -> None:
    late_ns = 900_000_000
    of = view(late_ns=late_ns)
    for _ in range(2):
        of.take(EMPTY, NOW + NO_RECORD_NS)
    story = sent([ping()])
    joiner = Joiner()
    joiner.add(story, of)
    assert not list(joiner.due(NOW + NO_RECORD_NS + 200_000_000)), "it is on the way"
    for _ in range(2):
        of.take(EMPTY, NOW + late_ns + NO_RECORD_NS)
    (found,) = joiner.due(NOW + late_ns + NO_RECORD_NS + 1_000_000)
    assert found.half is not None
    assert found.half.is_lost
    assert found.half.missing() == (
        "no record of it within 1.4 s: lost between the nodes, still on the way, or dropped there"
        " before tundp (its firewall, the socket's buffer)"
    )
    # What comes from there is not delayed here.
    reply = received(ping(is_reply=True))
    assert joined(reply, of, after_ns=NO_RECORD_NS + 1_000_000) is not None


def test_what_arrived_without_a_record_of_its_sender_is_not_lost() -> None:
    """The other daemon's own echo requests leave beside its engine."""
    of = view()
    joiner = Joiner()
    joiner.add(received(ping()), of)
    for _ in range(2):
        of.take(EMPTY, NOW + NO_RECORD_NS)
    (found,) = joiner.due(NOW + NO_RECORD_NS + 1_000_000)
    assert found.half is not None
    assert (found.half.is_lost, found.is_dropped) == (False, False)
    assert found.half.missing().startswith("no record: its daemon asked by itself")


def test_no_other_node_has_to_do_with_it() -> None:
    read = Story(Trace(event(Stage.TUN_READ, ping(), 0)))
    assert peer_of(read) is None
    assert peer_of(sent([ping()])) == PEER


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ping(1), ping(2)),
        (ping(), ping(is_reply=True)),
        (udp(b"a", sport=1), udp(b"a", sport=2)),
        (udp(b"a", ident=1), udp(b"a", ident=2)),
        (tcp(b"a", seq=1), tcp(b"a", seq=2)),
        (udp(b"question 1", ident=0), udp(b"question 2", ident=0)),
        (udp(bytes(35) + b"1", ident=0), udp(bytes(35) + b"2", ident=0)),
    ],
)
def test_packets_are_told_apart_but_not_by_what_nodes_change(one: bytes, other: bytes) -> None:
    assert key_of(one) != key_of(other)
    assert key_of(one) == key_of(with_ttl(one, one[8] - 1)) == key_of(one[:64])
    assert key_of(one[:19]) is None


@pytest.mark.parametrize("options", [b"", ROUTER_ALERT, ROUTER_ALERT * 10])
@pytest.mark.parametrize("offset", [0, MF, 185])
def test_what_a_record_holds_of_a_packet_tells_it(options: bytes, offset: int) -> None:
    for whole in (
        udp(bytes(range(200)), ident=0, ip_options=options, frag=offset),
        tcp(bytes(200), ip_options=options, frag=offset),
    ):
        assert key_of(whole[:64]) == key_of(whole[:128]) == key_of(whole) is not None


def test_an_unfinished_udp_checksum_makes_no_other_packet() -> None:
    finished = udp(b"question", ident=0)
    partial = finished[:26] + b"\x12\x34" + finished[28:]
    assert key_of(partial) == key_of(finished)
    # Behind the first fragment there is no checksum, but payload.
    behind = udp(b"a" * 40, frag=5)
    assert key_of(behind[:26] + b"12" + behind[28:]) != key_of(behind)


def test_the_document_fits_the_schema() -> None:
    of = view()
    of.take(record("udp.receive", with_ttl(ping(), 63), 312, error="EINVAL"), NOW)
    of.take(record("tun.write", with_ttl(ping(), 62), 330), NOW)
    schema = json.loads(SCHEMA.read_text())
    found = joined(sent([ping()]), of)
    assert found is not None
    half = peer_document(found.half)
    assert half is not None
    whole = {**document(found.story, 1), "peer": half}
    validate(json.loads(json.dumps(whole)), schema)
    assert set(whole) == set(schema["properties"])
    assert set(half) == set(schema["$defs"]["peer"]["properties"])
    assert set(half["events"][0]) == set(schema["$defs"]["event"]["properties"])
    assert [each["unix_ns"] - NOW for each in half["events"]] == [312_000, 330_000]
    validate({**whole, "peer": None}, schema)
    assert of.state is PeerState.TRACING
