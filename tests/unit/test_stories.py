"""The kernel's drops: which packet of the overlay each is of, and whose story it belongs to."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from ipaddress import IPv4Address, IPv4Network

import pytest

from tests.packets import icmp_echo, udp
from tests.unit.test_trace import event, traces
from tests.unit.test_trace import packet as traced_packet
from tundp.errors import Unsupported
from tundp.linux.btf import Btf
from tundp.linux.nft_trace import Path, Step
from tundp.linux.skb_drops import Place as Namespace
from tundp.linux.skb_drops import SkbDrop
from tundp.observe.skb_steps import Place, SkbStep, is_wanted, step_of
from tundp.observe.skb_words import WORDS, words_of
from tundp.observe.stories import (
    HOLD_NS,
    LATE_MAX_NS,
    LATE_NS,
    WAITING_MAX,
    Stories,
    Story,
    document,
    story_lines,
)
from tundp.wire.event import Stage
from tundp.wire.facts import Direction
from tundp.wire.filter import parse

PLACE = Place(
    network=IPv4Network("10.5.0.0/16"),
    subnet=IPv4Network("10.5.1.0/24"),
    node=IPv4Address("192.0.2.1"),
    port=8285,
)
INNER = udp(b"x", source="10.5.1.2", destination="10.5.2.3", sport=7000)


def drop(
    packet: bytes, reason: str = "NEIGH_FAILED", *, at: int = 0, device: str = "eth0"
) -> SkbDrop:
    return SkbDrop(
        time_ns=at,
        reason=reason,
        function="neigh_invalidate",
        device=device,
        place=Namespace.HERE,
        packet=packet,
    )


def outer(inner: bytes, source: str = "192.0.2.1", destination: str = "192.0.2.2") -> bytes:
    return udp(inner, source=source, destination=destination, sport=8285, dport=8285)


def step(packet: bytes, reason: str = "NEIGH_FAILED", *, at: int = 0) -> SkbStep:
    found = step_of(drop(packet, reason, at=at), PLACE)
    assert found is not None
    return found


def test_an_inner_packet_has_a_direction() -> None:
    back = udp(b"x", source="10.5.2.3", destination="10.5.1.2")
    assert step(INNER).direction is Direction.ENCAP
    assert step(back).direction is Direction.DECAP
    assert step(INNER).inner == INNER and step(INNER).peer is None


@pytest.mark.parametrize(
    ("source", "destination", "direction", "peer"),
    [
        ("192.0.2.1", "192.0.2.2", Direction.ENCAP, "192.0.2.2"),
        ("192.0.2.9", "192.0.2.1", Direction.DECAP, "192.0.2.9"),
        # Behind NAT the node's own address is another one: the inner source tells.
        ("172.16.0.1", "192.0.2.2", Direction.ENCAP, "192.0.2.2"),
    ],
)
def test_a_datagram_is_of_its_inner_packet(
    source: str, destination: str, direction: Direction, peer: str
) -> None:
    found = step(outer(INNER, source, destination))
    assert (found.inner, found.direction, str(found.peer)) == (INNER, direction, peer)


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\x45" + bytes(10),
        b"\x4f" + bytes(30),
        # The empty datagram that asks whether a peer's port is open.
        outer(b""),
        udp(b"x", source="192.0.2.1", destination="192.0.2.2")[:9] + b"\x06" + bytes(10),
    ],
)
def test_what_is_no_packet_of_the_overlay(packet: bytes) -> None:
    assert step_of(drop(packet), PLACE) is None


def test_a_pod_drops_inner_packets_only() -> None:
    """A node that is a container has a veth, too: what its host drops is none of its pods'."""
    inside = replace(drop(INNER), place=Namespace.POD)
    found = step_of(inside, PLACE)
    assert found is not None and "eth0 of the pod: " in found.text
    assert step_of(replace(inside, packet=outer(INNER)), PLACE) is None


@pytest.mark.parametrize("device", ["$(reboot)", "eth0"])
@pytest.mark.parametrize("reason", list(WORDS))
def test_no_command_for_the_host_is_made_of_what_a_pod_dropped(reason: str, device: str) -> None:
    """The pod chose the name; the host's device of the same name is another one."""
    inside = replace(drop(INNER, reason, device=device), place=Namespace.POD)
    found = step_of(inside, PLACE)
    assert found is not None
    assert device not in found.next_step
    assert found.next_step.startswith("in the pod's own network namespace") is bool(
        WORDS[reason].next_step
    )


@pytest.mark.parametrize(
    ("device", "named"),
    [
        ("eth0.5@if-7", "eth0.5@if-7"),
        ("$(reboot)", "DEVICE"),
        ("a;reboot", "DEVICE"),
        ("`id`", "DEVICE"),
        ("-batch", "DEVICE"),
        ("eth0\x1b[2J", "DEVICE"),
        ("", "DEVICE"),
    ],
)
def test_a_command_names_only_devices_a_shell_takes_as_a_word(device: str, named: str) -> None:
    found = step_of(drop(INNER, "QDISC_DROP", device=device), PLACE)
    assert found is not None
    assert found.next_step == f"tc -s qdisc show dev {named}"
    assert found.text.isprintable()


def test_without_a_namespace_the_addresses_decide_whose_it_is() -> None:
    """A fragment that was never put together has no device any more."""
    stray = udp(b"x", source="10.5.7.2", destination="10.5.2.3")
    for packet, is_ours in (
        (INNER, True),
        (outer(INNER), True),
        (stray, False),
        (outer(stray, source="192.0.2.8"), False),
    ):
        found = step_of(replace(drop(packet), place=Namespace.UNKNOWN), PLACE)
        assert (found is not None) is is_ours
        assert step_of(drop(packet), PLACE) is not None


def test_a_function_speaks_where_the_kernel_gives_no_reason() -> None:
    found = step_of(replace(drop(INNER, "NOT_SPECIFIED"), function="ip_error"), PLACE)
    assert found is not None and "says unreachable" in found.means
    assert "no reason" in step(INNER, "NOT_SPECIFIED").means


def test_a_filter_that_cannot_be_asked_says_so() -> None:
    """The payload of a train of datagrams is kept elsewhere: the inner packet is unknown."""
    train = step(outer(INNER)[:28])
    assert train.inner == b""
    assert is_wanted(train, parse("")) is True
    assert is_wanted(train, parse("peer 192.0.2.2")) is True
    assert is_wanted(train, parse("peer 192.0.2.3")) is False
    assert is_wanted(train, parse("host 10.5.2.3")) is None
    assert is_wanted(train, parse("not host 10.5.2.3")) is None
    assert is_wanted(step(outer(INNER)), parse("udp and src port 7000 and peer 192.0.2.2")) is True
    assert is_wanted(step(outer(INNER)), parse("tcp")) is False


def due(stories: Stories, now_ns: int = HOLD_NS + LATE_NS) -> list[Story]:
    return list(stories.due(now_ns))


def test_a_drop_behind_the_daemon_is_part_of_its_story() -> None:
    sent = [event(Stage.TUN_READ, 7, 1000, peer=None), event(Stage.UDP_SEND, 7, 20_000)]
    (trace,) = traces(sent)
    stories = Stories(has_paths=True)
    stories.add_trace(trace, 0)
    stories.add_drop(step(outer(traced_packet()), at=3_000_001_000), 10)
    (story,) = due(stories)
    assert story.is_dropped
    assert list(story_lines(story, 1, "n1"))[-2:] == [
        "  n1 +3000.0ms  kernel       DROP NEIGH_FAILED in neigh_invalidate, eth0, the datagram to"
        " 192.0.2.2: the next hop answers no ARP",
        "    next step: ip neigh show dev eth0; is 192.0.2.2, or the gateway to it, up?",
    ]
    assert document(story, 1)["kernel"][0]["reason"] == "NEIGH_FAILED"
    assert due(stories, 10 * HOLD_NS) == []


def test_a_trace_that_comes_after_its_drop_is_waited_for() -> None:
    """A busy daemon tells of the packet later than the kernel of its drop."""
    stories = Stories(has_paths=True)
    stories.add_drop(step(traced_packet(), "IP_RPFILTER"), 0)
    assert due(stories, HOLD_NS) == []
    (trace,) = traces([event(Stage.TUN_READ, 7, 1000, peer=None), event(Stage.UDP_SEND, 7, 20_000)])
    stories.add_trace(trace, HOLD_NS)
    (story,) = due(stories)
    assert story.trace is trace and len(story.drops) == 1


def test_a_drop_waits_as_long_as_the_daemon_is_behind_with_its_events() -> None:
    stories = Stories(has_paths=True)
    stories.add_drop(step(traced_packet(), "IP_RPFILTER"), 0)
    later = 10 * HOLD_NS + LATE_NS
    assert list(stories.due(later, events_ns=HOLD_NS)) == []
    (trace,) = traces([event(Stage.TUN_READ, 7, 1000, peer=None), event(Stage.UDP_SEND, 7, 20_000)])
    stories.add_trace(trace, later)
    (story,) = stories.due(later + HOLD_NS, events_ns=later + HOLD_NS)
    assert story.trace is trace and len(story.drops) == 1
    # One that hangs, or that never had the packet, is not waited for without end.
    stories.add_drop(step(traced_packet(), "IP_RPFILTER"), later)
    until = later + HOLD_NS + LATE_NS
    assert list(stories.due(until + LATE_MAX_NS - 1, events_ns=0)) == []
    (alone,) = stories.due(until + LATE_MAX_NS, events_ns=0)
    assert alone.trace is None


def test_a_trace_waits_for_the_kernels_drops_as_long_as_they_are_read() -> None:
    """The first of a function takes longer: its name is looked up."""
    (trace,) = traces([event(Stage.TUN_READ, 7, 1000, peer=None), event(Stage.UDP_SEND, 7, 20_000)])
    stories = Stories(has_paths=True)
    stories.add_trace(trace, 0)
    assert list(stories.due(5 * HOLD_NS, drops_ns=HOLD_NS - 1)) == []
    stories.add_drop(step(traced_packet(), "IP_RPFILTER"), 5 * HOLD_NS)
    (story,) = stories.due(6 * HOLD_NS, drops_ns=5 * HOLD_NS)
    assert story.trace is trace and story.is_dropped
    # As the daemon, it is not waited for without end.
    stories.add_trace(trace, 0)
    assert list(stories.due(HOLD_NS + LATE_MAX_NS - 1, drops_ns=0)) == []
    assert [each.trace for each in stories.due(HOLD_NS + LATE_MAX_NS, drops_ns=0)] == [trace]


def test_a_path_that_gets_another_name_is_found_and_forgotten() -> None:
    """Begun by a rule's line; what packet it was came later."""
    stories = Stories(has_paths=True)
    way = Path({}, 0, [RULE])
    stories.add_path(way, 0)
    way.fields |= path(traced_packet()).fields
    stories.add_path(way, 1)
    (story,) = due(stories)
    assert story.path is way
    assert len(stories._untraced) == 0 and not stories._paths


def test_of_too_many_the_oldest_go_first() -> None:
    stories = Stories(has_paths=True)
    other = udp(b"x", source="10.5.1.2", destination="10.5.2.3", sport=7001)
    for number in range(WAITING_MAX):
        stories.add_drop(step(other, "IP_RPFILTER"), number)
    assert list(stories.due(2 * HOLD_NS, events_ns=0)) == []
    (trace,) = traces([event(Stage.TUN_READ, 7, 1000, peer=None), event(Stage.UDP_SEND, 7, 20_000)])
    stories.add_trace(trace, 2 * HOLD_NS)
    gone = list(stories.due(2 * HOLD_NS, events_ns=0))
    assert len(gone) == 1 and gone[0].drops[0].drop.reason == "IP_RPFILTER"
    assert len(stories) == WAITING_MAX


def test_what_netfilter_says_later_is_in_the_story_that_waits() -> None:
    """And in one of its own if that was shown."""
    (trace,) = traces([event(Stage.TUN_READ, 7, 1000, peer=None), event(Stage.UDP_SEND, 7, 20_000)])
    stories = Stories(has_paths=True)
    stories.add_trace(trace, 0)
    way = path(traced_packet())
    stories.add_path(way, 0)
    way.steps.append(RULE)
    stories.add_path(way, 1)
    (story,) = due(stories)
    assert story.path is way and story.is_dropped
    stories.add_path(way, 2 * HOLD_NS)
    (again,) = due(stories, 3 * HOLD_NS)
    assert again.path is way and again.trace is None


def test_a_drop_that_comes_late_names_the_story() -> None:
    sent = [event(Stage.TUN_READ, 7, 1000, peer=None), event(Stage.UDP_SEND, 7, 20_000)]
    (trace,) = traces(sent)
    stories = Stories(has_paths=True)
    stories.add_trace(trace, 0)
    (first,) = due(stories)
    stories.remember(first, 4)
    stories.add_drop(step(outer(traced_packet())), HOLD_NS)
    other = udp(b"x", source="10.5.1.2", destination="10.5.2.3", sport=7001)
    stories.add_drop(step(outer(other)), HOLD_NS)
    late, stray = due(stories, 2 * HOLD_NS + LATE_NS)
    for each in (late, stray):
        stories.recall(each)
    assert list(story_lines(late, 5, "n1"))[1] == "  the packet of #4, later"
    assert stray.earlier is None


def test_a_late_drop_names_a_story_that_was_held_for_another_node() -> None:
    """The drop comes after its packet's story was complete, and before that was shown."""
    (trace,) = traces([event(Stage.TUN_READ, 7, 1000, peer=None), event(Stage.UDP_SEND, 7, 20_000)])
    stories = Stories(has_paths=True)
    stories.add_trace(trace, 0)
    (first,) = due(stories)
    stories.add_drop(step(outer(traced_packet())), HOLD_NS)
    stories.remember(first, 4)
    (late,) = due(stories, 2 * HOLD_NS + LATE_NS)
    stories.recall(late)
    assert list(story_lines(late, 5, "n1"))[1] == "  the packet of #4, later"


def path(packet: bytes, steps: Iterable[Step] = ()) -> Path:
    source, destination = IPv4Address(packet[12:16]), IPv4Address(packet[16:20])
    ip_id = str(int.from_bytes(packet[4:6], "big"))
    return Path({"saddr": str(source), "daddr": str(destination), "id": ip_id}, 0, list(steps))


RULE = Step(family="ip", table="filter", chain="FORWARD", text="drop", handle=4, verdict="drop")


def test_the_rule_that_dropped_a_packet_needs_no_next_step_of_the_kernel() -> None:
    stories = Stories(has_paths=True)
    stories.add_drop(step(INNER, "NETFILTER_DROP"), 0)
    stories.add_path(path(INNER, [RULE]), 5)
    (story,) = due(stories)
    assert list(story_lines(story, 1, "n1"))[1:] == [
        "  n1            netfilter    DROP ip filter FORWARD, handle 4: drop",
        "    lets it pass: nft delete rule ip filter FORWARD handle 4",
        "  n1            kernel       DROP NETFILTER_DROP in neigh_invalidate, eth0: a rule or a"
        " chain's policy of netfilter dropped it",
    ]


def test_a_packet_netfilter_lets_through_and_the_kernel_drops_is_shown() -> None:
    stories = Stories(has_paths=True)
    stories.add_path(path(INNER), 0)
    stories.add_drop(step(INNER, "IP_RPFILTER"), 5)
    (story,) = due(stories)
    assert "DROP IP_RPFILTER" in list(story_lines(story, 1, "n1"))[-2]
    assert "ip route get 10.5.1.2; sysctl" in list(story_lines(story, 1, "n1"))[-1]


def ported_path(packet: bytes, steps: Iterable[Step] = ()) -> Path:
    """As netfilter tells of a UDP packet."""
    found = path(packet, steps)
    ports = (str(int.from_bytes(packet[at : at + 2], "big")) for at in (20, 22))
    found.fields |= {"protocol": "udp"} | dict(zip(("sport", "dport"), ports, strict=True))
    return found


def echo(number: int) -> bytes:
    return icmp_echo(b"x", seq=number, ident=0, source="10.5.1.2", destination="10.5.2.3")


def echo_path(number: int, steps: Iterable[Step] = ()) -> Path:
    found = path(echo(number), steps)
    ident = str(int.from_bytes(echo(number)[24:26], "big"))
    found.fields |= {"protocol": "icmp", "type": "echo-request"}
    found.fields |= {"icmp id": ident, "sequence": str(number)}
    return found


def path_of_echo(packet: bytes, steps: Iterable[Step] = ()) -> Path:
    return echo_path(int.from_bytes(packet[26:28], "big"), steps)


def of_port(sport: int) -> bytes:
    return udp(b"x", source="10.5.1.2", destination="10.5.2.3", sport=sport, ident=0)


@pytest.mark.parametrize(
    ("first", "second", "path_of"),
    [(of_port(7000), of_port(7001), ported_path), (echo(1), echo(2), path_of_echo)],
    ids=["ports", "echo"],
)
@pytest.mark.parametrize("order", ["path first", "drops first"])
def test_a_rules_drop_is_the_packets_it_names(
    first: bytes, second: bytes, path_of: Callable[[bytes, list[Step]], Path], order: str
) -> None:
    """Many packets between two pods have IP id 0: only ports tell them apart."""
    stories = Stories(has_paths=True)
    whole = path_of(second, [RULE])
    if order == "path first":
        stories.add_path(whole, 0)
    for packet in (first, second):
        stories.add_drop(step(packet, "NETFILTER_DROP"), 0)
    if order == "drops first":
        stories.add_path(whole, 0)
    found = {story.packet: story.path for story in due(stories)}
    assert found == {first: None, second: whole}


def test_a_trace_is_put_to_the_path_of_its_ports() -> None:
    other = udp(b"x", source="10.5.1.2", destination="10.5.2.3", sport=7001)
    stories = Stories(has_paths=True)
    stories.add_path(ported_path(other, [RULE]), 0)
    stories.add_path(ported_path(traced_packet()), 0)
    (trace,) = traces([event(Stage.TUN_READ, 7, 1000, peer=None), event(Stage.UDP_SEND, 7, 20_000)])
    stories.add_trace(trace, 0)
    assert {story.trace is trace: story.is_dropped for story in due(stories)} == {
        True: False,
        False: True,
    }


def test_thousands_of_drops_that_look_the_same_take_no_comparison_each() -> None:
    """Counted, since time says nothing on a busy machine: of 2,000 one another's 2,000,000."""
    stories, asked = Stories(has_paths=True), 0

    class Counted(SkbDrop):
        def __getattribute__(self, name: str) -> object:
            nonlocal asked
            asked += name == "reason"
            return super().__getattribute__(name)

    like = drop(INNER, "FULL_RING")
    values = {each.name: getattr(like, each.name) for each in fields(SkbDrop)}
    for _ in range(2000):
        stories.add_drop(replace(step(INNER), drop=Counted(**values)), 0)
    assert len(due(stories)) == 2000
    assert asked < 40_000


def test_packets_that_look_the_same_have_a_story_each() -> None:
    stories = Stories(has_paths=True)
    for _ in range(3):
        stories.add_drop(step(INNER, "FULL_RING"), 0)
    assert [len(story.drops) for story in due(stories)] == [1, 1, 1]


def test_segments_belong_to_their_super_packet() -> None:
    """Those of one flow whose IP ids count on; the one behind the last is another packet."""
    read = event(Stage.TUN_READ, 7, 0, peer=None, packets=3, gso_size=10, length=49)
    (trace,) = traces([read, event(Stage.UDP_SEND, 7, 5000, packets=3, together=3)])
    first = int.from_bytes(traced_packet()[4:6], "big")
    stories = Stories(has_paths=True)
    stories.add_trace(trace, 0)
    for at in range(4):
        inner = traced_packet()
        inner = inner[:4] + ((first + at) & 0xFFFF).to_bytes(2, "big") + inner[6:]
        stories.add_drop(step(outer(inner), "QDISC_DROP"), 0)
    mine, other = due(stories)
    assert (len(mine.drops), len(other.drops)) == (3, 1)
    assert "(3 times)" in list(story_lines(mine, 1, "n1"))[-2]


def test_a_lost_copy_is_no_drop() -> None:
    stories = Stories(has_paths=True)
    stories.add_drop(step(INNER, "PACKET_SOCK_ERROR"), 0)
    (story,) = due(stories)
    assert not story.is_dropped
    assert "DROP" not in list(story_lines(story, 1, "n1"))[1]


def test_nothing_is_kept_of_what_was_shown() -> None:
    stories = Stories(has_paths=True)
    for number in range(2000):
        inner = INNER[:4] + number.to_bytes(2, "big") + INNER[6:]
        stories.add_drop(step(inner), number)
    assert len(due(stories, 2000 + HOLD_NS + LATE_NS)) == 2000
    (trace,) = traces([event(Stage.TUN_READ, 7, 0, peer=None), event(Stage.UDP_SEND, 7, 5)])
    whole = event(Stage.TUN_READ, 8, 0, peer=None, packets=100, gso_size=10)
    (super_,) = traces([whole, event(Stage.UDP_SEND, 8, 5, packets=100, together=100)])
    for _ in range(3):
        for each in (trace, super_):
            stories.add_path(path(traced_packet()), 0)
            stories.add_drop(step(outer(traced_packet())), 0)
            stories.add_trace(each, 0)
        stories.add_path(echo_path(1), 0)
        stories.add_drop(step(outer(INNER)[:28]), 0)
    assert len(due(stories, 2000 + HOLD_NS + LATE_NS)) == 9
    kept = (stories._waiting, stories._late, stories._twins, stories._supers, stories._untraced)
    assert not any(len(each) for each in (*kept, stories._unpathed))


def test_words_name_what_they_may() -> None:
    allowed = {"device", "source", "destination", "port"}
    for reason, words in WORDS.items():
        for text in (words.means, words.next_step):
            names = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
            assert names <= allowed, reason
        assert step(INNER, reason).text
    assert (
        "include/net/dropreason-core.h"
        in words_of("SOMETHING_NEW").next_step + words_of("SOMETHING_NEW").means
    )
    assert "TCP" in words_of("TCP_OLD_DATA").means


def test_every_reason_with_words_is_one_of_the_kernels() -> None:
    """Read from the running kernel's own types; younger or older ones lack some."""
    try:
        names = Btf.of_kernel(["skb_drop_reason"]).enum("skb_drop_reason").values()
    except Unsupported as error:
        pytest.skip(str(error))
    if "SKB_DROP_REASON_IP_LOCALNET" not in names:
        pytest.skip("an older kernel, with fewer reasons")
    assert {f"SKB_DROP_REASON_{reason}" for reason in WORDS} <= set(names)


def test_an_echo_reply_to_a_raw_socket_is_no_drop() -> None:
    """The kernel says NO_SOCKET of each, those to tundp's own requests too."""
    assert words_of("NO_SOCKET", "ping_rcv").is_copy
    assert not words_of("NO_SOCKET", "__udp4_lib_rcv").is_copy
