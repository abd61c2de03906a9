"""`tundp ping`: who is meant, what layers come to, path sizes, round-trip times, and how it looks.

The golden files are what people and programs are shown; they change only on purpose.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import random
import statistics
from collections.abc import Collection, Iterable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console, RenderableType
from rich.text import Text

from tests.json_schema import validate
from tundp.choices import MtuOrigin
from tundp.cli import ping as command
from tundp.doctor.conclusion import Facts, conclude
from tundp.doctor.hello import read_hello
from tundp.doctor.path_size import SMALLEST, largest_that_arrives
from tundp.doctor.peers import Look
from tundp.doctor.whom import address_alone, find_peer
from tundp.errors import ConfigError, PlatformError
from tundp.linux.netlink import NoRoute, RouteLookup
from tundp.linux.obstacles.neighbours import Neighbour
from tundp.observe import schema
from tundp.observe.leases import LeaseRecord, Leases
from tundp.observe.ping import (
    Answer,
    Clock,
    Layer,
    LayerId,
    Outcome,
    PathSize,
    Ping,
    PingedPeer,
    RoundTrips,
    Series,
)
from tundp.observe.status import ChaosStatus, DaemonState, PeerStatus, Status
from tundp.show_ping import head_line, layers_grid, summary_parts

GOLDEN = Path(__file__).with_name("golden")
SCHEMA = json.loads(Path(schema.__file__).with_name("ping.schema.json").read_text())
PEER = PingedPeer(
    public_ip=IPv4Address("192.0.2.2"),
    subnet=IPv4Network("10.5.2.0/24"),
    port=8285,
    host="n2",
    implementation="tundp 0.2.0",
)
ASKED = {
    LayerId.UNDERLAY: "ICMP echo 192.0.2.2",
    LayerId.PORT: "UDP 192.0.2.2:8285",
    LayerId.TUN: "ICMP echo 10.5.2.0",
    LayerId.CONTROL: "hello",
    LayerId.BRIDGE: "ICMP echo 10.5.2.1",
}
NUD_FAILED, NUD_PERMANENT = 0x20, 0x80


def layers(
    underlay: Answer = Answer.ANSWERED,
    port: Answer = Answer.ANSWERED,
    tun: Answer = Answer.ANSWERED,
    control: Answer = Answer.ANSWERED,
    bridge: Answer = Answer.ANSWERED,
    **evidence: str,
) -> dict[LayerId, Layer]:
    answers = (underlay, port, tun, control, bridge)
    return {
        layer: Layer(
            id=layer, asked=ASKED[layer], answer=answer, evidence=evidence.get(layer.value, "")
        )
        for layer, answer in zip(LayerId, answers, strict=True)
    }


def facts(found: dict[LayerId, Layer], **changes: Any) -> Facts:
    return dataclasses.replace(Facts(peer=PEER, layers=found, uplink="eth0"), **changes)


def look(
    *,
    gateway: str = "",
    neighbour: int = 0,
    errno: int = 0,
    filtered: str = "",
    device: str = "eth0",
    table: int = 254,
) -> Look:
    via = IPv4Address(gateway) if gateway else None
    status = PeerStatus(subnet=IPv4Network("10.5.2.0/24"), public_ip=PEER.public_ip, port=8285)
    return Look(
        peer=status,
        route=NoRoute(errno=errno)
        if errno
        else RouteLookup(index=2, source=IPv4Address("192.0.2.1"), gateway=via, table=table),
        device="" if errno else device,
        source=None if errno else IPv4Address("192.0.2.1"),
        neighbour=Neighbour(2, via or PEER.public_ip, "", neighbour) if neighbour else None,
        filtered_at=filtered,
    )


def test_a_narrow_path_by_another_device_is_left_there() -> None:
    path = PathSize(device_mtu=1472, largest=1372)
    by_uplink = conclude(facts(layers(), path=path, look=look(gateway="192.0.2.254")))
    assert by_uplink.next_step.startswith(
        "ip route replace 192.0.2.2 via 192.0.2.254 dev eth0 src 192.0.2.1 mtu 1400  ("
    )
    for other in (look(device="eth1"), look(table=100), None):
        step = conclude(facts(layers(), path=path, look=other)).next_step
        assert "ip route replace" not in step
        assert step.startswith("an MTU of 1400 for the route to 192.0.2.2: ip route get")


def test_the_neighbour_is_named_with_the_device_it_is_on() -> None:
    dead = dict(broken(underlay=Answer.SILENT))
    found = conclude(facts(dead, look=look(device="eth1", neighbour=NUD_PERMANENT)))
    assert found.next_step.startswith("ip neigh del 192.0.2.2 dev eth1")


SILENT = layers(port=Answer.SILENT, tun=Answer.SILENT, control=Answer.SILENT, bridge=Answer.SILENT)


def broken(**changes: Any) -> dict[LayerId, Layer]:
    """All but the underlay silent, but for what is named."""
    given = {"port": Answer.SILENT, "tun": Answer.SILENT, "control": Answer.SILENT}
    return layers(**({**given, "bridge": Answer.SILENT} | changes))


# What it comes to


@pytest.mark.parametrize(
    ("known", "outcome", "words"),
    [
        (facts(layers()), Outcome.OK, "10.5.2.0/24 answers through the overlay"),
        (facts(layers(control=Answer.STOCK)), Outcome.OK, "answers through the overlay"),
        (facts(layers(control=Answer.OFF)), Outcome.OK, "answers through the overlay"),
        (facts(layers(bridge=Answer.SILENT)), Outcome.OK, "it has no bridge for pods yet"),
        (facts(layers(underlay=Answer.SILENT)), Outcome.PARTLY, "which the overlay does not need"),
        (facts(layers(control=Answer.SILENT)), Outcome.PARTLY, "what answers there is not known"),
        (
            facts(layers(), series=Series(packet_len=84, sent=20, received=17)),
            Outcome.PARTLY,
            "3 of 20 echo requests were not answered",
        ),
        (
            facts(layers(), path=PathSize(device_mtu=1472, largest=1372)),
            Outcome.PARTLY,
            "packets of 1472 bytes do not arrive there, and those of 1372 do",
        ),
        (
            facts(layers(), path=PathSize(device_mtu=1472, largest=None, tried=(1472, 552))),
            Outcome.PARTLY,
            "no packet of 552 bytes or more arrives",
        ),
        (
            # Pods are told: nobody is harmed.
            facts(layers(), path=PathSize(device_mtu=1472, largest=1372, daemon_mtu=1372)),
            Outcome.OK,
            "answers through the overlay",
        ),
        (
            facts(broken(port=Answer.REFUSED)),
            Outcome.OVERLAY,
            "ICMP passes to 192.0.2.2, UDP 8285 is refused: no daemon listens on 192.0.2.2",
        ),
        (
            # What sends lives: its refusals are a firewall's.
            facts(broken(port=Answer.REFUSED), is_heard=True),
            Outcome.OVERLAY,
            "a firewall of 192.0.2.2 rejects ours",
        ),
        (
            facts(broken(port=Answer.PROHIBITED)),
            Outcome.OVERLAY,
            "ICMP passes to 192.0.2.2, UDP 8285 is not: a firewall rejects it",
        ),
        (facts(SILENT), Outcome.OVERLAY, "a firewall drops it there or on the way, or its daemon"),
        (facts(SILENT, is_heard=True), Outcome.OVERLAY, "one direction is broken"),
        (
            facts(broken(underlay=Answer.SILENT)),
            Outcome.OVERLAY,
            "neither ICMP nor from UDP 8285",
        ),
        (
            facts(broken(underlay=Answer.SILENT), look=look(neighbour=NUD_FAILED)),
            Outcome.OVERLAY,
            "192.0.2.2 answers no ARP on eth0",
        ),
        (
            facts(broken(underlay=Answer.SILENT), look=look(gateway="192.0.2.254")),
            Outcome.OVERLAY,
            "it is reached by 192.0.2.254",
        ),
        (
            facts(broken(underlay=Answer.SILENT), look=look(errno=101)),
            Outcome.OVERLAY,
            "this host has no way to it: Network is unreachable",
        ),
        (
            facts(SILENT, look=look(filtered="eth1")),
            Outcome.OVERLAY,
            "the kernel drops its datagrams that come in by eth1",
        ),
        (
            facts(broken(underlay=Answer.SILENT, port=Answer.UNREACHABLE)),
            Outcome.OVERLAY,
            "datagrams to UDP 8285 do not get there",
        ),
        (
            facts(broken(tun=Answer.NOT_SENT)),
            Outcome.OVERLAY,
            "this host's kernel refuses to send echo requests to 10.5.2.0/24",
        ),
        (
            facts(SILENT, ours=("this node's TUN flannel0 is down", "ip link set")),
            Outcome.OVERLAY,
            "this node's TUN flannel0 is down",
        ),
        (
            facts(broken(control=Answer.ANSWERED, port=Answer.ANSWERED)),
            Outcome.OVERLAY,
            "the daemon of 192.0.2.2 answers, but the kernel behind its TUN does not",
        ),
        (
            facts(broken(control=Answer.STOCK, port=Answer.ANSWERED)),
            Outcome.PARTLY,
            "the overlay to 10.5.2.0/24 works (its kernel rejects other packets)",
        ),
        (
            facts(broken(bridge=Answer.ANSWERED, port=Answer.ANSWERED)),
            Outcome.PARTLY,
            "the overlay to 10.5.2.0/24 works (its bridge answers)",
        ),
        (
            facts(SILENT, daemon="no daemon answers on x"),
            Outcome.OVERLAY,
            "no daemon answers here, so nothing was asked through the overlay; ICMP passes",
        ),
        (
            facts(layers(), has_tun=False),
            Outcome.OK,
            "host-gw has no port and no TUN to ask",
        ),
        (
            facts(broken(underlay=Answer.SILENT), has_tun=False),
            Outcome.OVERLAY,
            "192.0.2.2 answers no ping",
        ),
    ],
)
def test_one_sentence_for_all_layers(known: Facts, outcome: Outcome, words: str) -> None:
    found = conclude(known)
    assert (found.outcome, words in found.text) == (outcome, True), found
    assert not found.text.endswith(".")
    assert found.outcome is Outcome.OK or found.next_step or "does not need" in found.text


CHAOS = ChaosStatus(
    subnet=IPv4Network("10.5.2.0/24"),
    public_ip=IPv4Address("192.0.2.2"),
    port=8285,
    impairment="loss 100%",
    seed=1,
    since=1.0,
    ends_at=2.0,
)


@pytest.mark.parametrize(
    ("known", "outcome"),
    [
        (facts(broken(control=Answer.ANSWERED)), Outcome.OVERLAY),
        (facts(SILENT), Outcome.OVERLAY),
        (facts(SILENT, is_heard=True), Outcome.OVERLAY),
        (facts(layers(), series=Series(packet_len=84, sent=20, received=17)), Outcome.PARTLY),
        (facts(layers(), path=PathSize(device_mtu=1472, largest=1300)), Outcome.PARTLY),
    ],
)
def test_nobody_is_blamed_for_chaos_of_this_node(known: Facts, outcome: Outcome) -> None:
    found = conclude(dataclasses.replace(known, chaos=CHAOS))
    assert found.outcome is outcome
    assert found.text.startswith(
        "tundp chaos impairs packets to 10.5.2.0/24 at 192.0.2.2:8285 on purpose: loss 100%;"
    )
    assert found.next_step.startswith("tundp chaos stop 192.0.2.2; ")


def test_chaos_hides_nothing_that_is_known_without_it() -> None:
    for known in (facts(layers()), facts(SILENT, ours=("this node's TUN is down", "ip link"))):
        assert conclude(dataclasses.replace(known, chaos=CHAOS)) == conclude(known)


def test_chaos_is_that_of_the_endpoint_while_it_lasts() -> None:
    ended = dataclasses.replace(CHAOS, port=1, ended_at=1.5)
    status = dataclasses.replace(STATUS, chaos=[CHAOS, ended])
    assert status.chaos_to(CHAOS.public_ip, 8285) is CHAOS
    assert status.chaos_to(CHAOS.public_ip, None) is CHAOS
    assert status.chaos_to(CHAOS.public_ip, 1) is None
    assert status.chaos_to(IPv4Address("192.0.2.3"), 8285) is None


@settings(deadline=None)
@given(
    st.tuples(*[st.sampled_from(Answer)] * 5),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["", "none answers"]),
)
def test_whatever_comes_back_an_overlay_that_does_not_answer_is_no_success(
    answers: tuple[Answer, ...], is_heard: bool, has_tun: bool, daemon: str
) -> None:
    known = facts(layers(*answers), is_heard=is_heard, has_tun=has_tun, daemon=daemon)
    found = conclude(known)
    assert found.text
    if has_tun and known.answer(LayerId.TUN) is not Answer.ANSWERED:
        assert found.outcome is not Outcome.OK


# Who is meant


def peer(subnet: str, public_ip: str) -> PeerStatus:
    return PeerStatus(subnet=IPv4Network(subnet), public_ip=IPv4Address(public_ip), port=8285)


STATUS = Status(
    version="0.2.0",
    pid=1,
    state=DaemonState.RUNNING,
    started_at=0.0,
    uptime_s=1.0,
    network=IPv4Network("10.5.0.0/16"),
    subnet=IPv4Network("10.5.1.0/24"),
    public_ip=IPv4Address("192.0.2.1"),
    peers=[
        peer("10.5.2.0/24", "192.0.2.2"),
        peer("10.5.3.0/24", "192.0.2.3"),
        peer("10.5.4.0/24", "192.0.2.3"),
        peer("10.5.4.128/25", "192.0.2.5"),
    ],
)


def lease(subnet: str, public_ip: str, host: str, state: str = "peer") -> LeaseRecord:
    return LeaseRecord(
        key=subnet.replace("/", "-"),
        subnet=IPv4Network(subnet),
        public_ip=IPv4Address(public_ip),
        state=state,
        reason="its backend is vxlan" if state == "refused" else "",
        host=host,
        revision=1,
    )


LEASES = Leases(
    revision=1,
    own_key="10.5.1.0-24",
    leases=[
        lease("10.5.1.0/24", "192.0.2.1", "n1.example.net", "own"),
        lease("10.5.2.0/24", "192.0.2.2", "N2.example.net"),
        lease("10.5.3.0/24", "192.0.2.3", "n3"),
        lease("10.5.4.0/24", "192.0.2.3", "n3"),
        lease("10.5.9.0/24", "192.0.2.9", "n9", "refused"),
    ],
)


@pytest.mark.parametrize(
    ("text", "subnet"),
    [
        ("192.0.2.2", "10.5.2.0/24"),
        ("10.5.2.0/24", "10.5.2.0/24"),
        ("10.5.2.0-24", "10.5.2.0/24"),
        ("10.5.2.77/24", "10.5.2.0/24"),
        ("10.5.2.0", "10.5.2.0/24"),
        ("10.5.2.77", "10.5.2.0/24"),
        ("n2", "10.5.2.0/24"),
        ("n2.EXAMPLE.net", "10.5.2.0/24"),
        ("10.5.4.1", "10.5.4.0/24"),
        ("10.5.4.200", "10.5.4.128/25"),
    ],
)
def test_a_peer_is_found_by_what_people_call_it(text: str, subnet: str) -> None:
    assert str(find_peer(text, STATUS, LEASES).peer.subnet) == subnet


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("192.0.2.1", ConfigError, "is this node"),
        ("10.5.1.7", ConfigError, "is this node"),
        ("10.5.1.0/24", ConfigError, "is this node"),
        ("n1", ConfigError, "is this node"),
        ("192.0.2.3", ConfigError, "has 2 leases: name one of 10.5.3.0/24, 10.5.4.0/24"),
        ("n3", ConfigError, "has 2 leases"),
        ("10.5.77.1", ConfigError, "no lease of a peer has it; peers are 10.5.2.0/24 at 192.0.2.2"),
        ("10.5.2.0/25", ConfigError, "no lease of a peer has it"),
        ("n7", ConfigError, "no lease names that host"),
        ("", ConfigError, "PEER is empty"),
        ("10.5.9.1", PlatformError, "is no peer: its backend is vxlan"),
        ("n9", PlatformError, "is no peer"),
        ("\x1b[2J", ConfigError, "\\x1b[2J"),
    ],
)
def test_who_is_no_peer_is_told_why(text: str, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind) as raised:
        find_peer(text, STATUS, LEASES)
    assert words in str(raised.value)


def test_without_a_daemon_only_an_address_of_the_underlay_is_understood() -> None:
    network = IPv4Network("10.5.0.0/16")
    assert address_alone("192.0.2.2", network) == PEER.public_ip
    for text in ("10.5.2.3", "n2", "10.5.2.0/24"):
        with pytest.raises(ConfigError, match="no daemon answers"):
            address_alone(text, network)


# Path sizes


def searched(full: int, limit: int, *, loss: float = 0.0, seed: int = 1) -> tuple[Any, list[int]]:
    """The search over a path that carries `limit` bytes, three tries a size."""
    rng = random.Random(seed)
    asked: list[int] = []

    async def ask(sizes: Collection[int]) -> set[int]:
        asked.extend(sizes)
        return {
            size for size in sizes if size <= limit and any(rng.random() >= loss for _ in range(3))
        }

    largest, tried = asyncio.run(largest_that_arrives(full, 64, ask))
    assert tried == asked, "what is said to be tried was"
    assert len(set(tried)) == len(tried), "no size twice: its answer is known"
    return largest, tried


@settings(deadline=None)
@given(st.integers(SMALLEST, 9000), st.integers(SMALLEST, 9000))
def test_the_largest_size_is_found_to_the_byte(full: int, limit: int) -> None:
    largest, tried = searched(full, limit)
    assert largest == min(full, limit)
    assert tried[0] == full
    assert len(tried) <= 50


@settings(deadline=None)
@given(st.integers(600, 1472), st.integers(0, 1 << 30))
def test_loss_never_makes_a_path_wider(limit: int, seed: int) -> None:
    largest, _ = searched(1472, limit, loss=0.5, seed=seed)
    assert largest is None or largest <= limit


def test_a_path_that_carries_nothing_large_is_said_to_be_one() -> None:
    assert searched(1472, 100) == (None, [1472, SMALLEST])


# Round-trip times


@settings(deadline=None)
@given(st.lists(st.none() | st.floats(1e-6, 10.0), max_size=50))
def test_times_are_those_of_the_textbook(rtts_s: list[float | None]) -> None:
    trips = RoundTrips()
    for rtt_s in rtts_s:
        trips.add(rtt_s)
    found = trips.series(84)
    known = [each * 1e3 for each in rtts_s if each is not None]
    assert (found.sent, found.received) == (len(rtts_s), len(known))
    if not known:
        assert found.rtt_avg_ms is None
        return
    assert found.rtt_min_ms == pytest.approx(min(known), abs=1e-3)
    assert found.rtt_max_ms == pytest.approx(max(known), abs=1e-3)
    assert found.rtt_avg_ms == pytest.approx(statistics.fmean(known), rel=1e-6, abs=1e-3)
    assert found.rtt_mdev_ms == pytest.approx(statistics.pstdev(known), rel=1e-4, abs=1e-3)


# The daemon's answer


def test_what_a_daemon_says_of_a_peer_is_read() -> None:
    answer = {"implementation": "tundp", "version": "0.2.0", "clock_offset_s": 0.25}
    found = read_hello(
        {"result": "answer", "rtt_s": 0.0004, "answer": answer | {"clock_error_s": 0.0002}}
    )
    assert found.layer.answer is Answer.ANSWERED
    assert found.layer.rtt_ms == 0.4
    assert found.implementation == "tundp 0.2.0"
    assert found.clock == Clock(offset_s=0.25, error_s=0.0002)
    stock = read_hello({"result": "protocol-unreachable", "answer": None})
    assert (stock.layer.answer, stock.implementation) == (Answer.STOCK, "stock flanneld")


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["result", "rtt_s", "answer", "detail"]),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text() | st.sampled_from(["answer"]),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        ),
    )
)
@example(document={"result": "answer", "rtt_s": float("nan")})
@example(document={"result": "answer", "rtt_s": float("inf"), "answer": {"clock_offset_s": 1}})
def test_a_strange_answer_is_no_error(document: dict[str, Any]) -> None:
    found = read_hello(document)
    json.dumps(found.layer.rtt_ms, allow_nan=False)


# How it looks


FINE = Ping(
    node="10.5.1.0/24",
    daemon="",
    peer=PEER,
    layers=[
        Layer(
            id=LayerId.UNDERLAY,
            asked=ASKED[LayerId.UNDERLAY],
            answer=Answer.ANSWERED,
            rtt_ms=0.1812,
        ),
        Layer(
            id=LayerId.PORT,
            asked=ASKED[LayerId.PORT],
            answer=Answer.ANSWERED,
            evidence="a daemon listens: tun answers through it",
        ),
        Layer(id=LayerId.TUN, asked=ASKED[LayerId.TUN], answer=Answer.ANSWERED, rtt_ms=0.4123),
        Layer(
            id=LayerId.CONTROL,
            asked="hello",
            answer=Answer.ANSWERED,
            rtt_ms=0.61,
            evidence="tundp 0.2.0",
        ),
        Layer(
            id=LayerId.BRIDGE,
            asked=ASKED[LayerId.BRIDGE],
            answer=Answer.SILENT,
            meaning="no pods there yet, or docker0/cni0 is elsewhere: no fault of the overlay",
        ),
    ],
    series=Series(
        packet_len=84,
        sent=5,
        received=5,
        rtt_min_ms=0.38,
        rtt_avg_ms=0.4123,
        rtt_max_ms=0.52,
        rtt_mdev_ms=0.03,
    ),
    path=PathSize(
        device_mtu=1472,
        largest=1372,
        tried=(1472, 552, 1372),
        daemon_mtu=1372,
        daemon_origin=MtuOrigin.MEASURED,
    ),
    clock=Clock(offset_s=0.00012, error_s=0.0003),
    outcome=Outcome.OK,
    conclusion="10.5.2.0/24 answers through the overlay; it has no bridge for pods yet",
)


def _refused() -> Ping:
    found = broken(port=Answer.REFUSED)
    known = facts(found)
    outcome, text, step = conclude(known)
    named = dict.fromkeys(found)
    for layer, each in found.items():
        evidence = "port unreachable, says 192.0.2.2" if layer is LayerId.PORT else ""
        rtt_ms = 0.18 if layer is LayerId.UNDERLAY else None
        named[layer] = dataclasses.replace(each, evidence=evidence, rtt_ms=rtt_ms)
    return Ping(
        node="10.5.1.0/24",
        daemon="",
        peer=dataclasses.replace(PEER, implementation=""),
        layers=[each for each in named.values() if each is not None],
        outcome=outcome,
        conclusion=text,
        next_step=step,
    )


EXAMPLES = {"fine": FINE, "refused": _refused()}


def parts(found: Ping) -> Iterable[RenderableType]:
    return (
        head_line(found.peer),
        Text(),
        layers_grid(found.layers),
        Text(),
        *summary_parts(found),
    )


def printed(found: Ping, *, is_terminal: bool) -> str:
    out = io.StringIO()
    console = Console(
        file=out,
        force_terminal=is_terminal,
        width=80,
        highlight=False,
        color_system="standard" if is_terminal else None,
    )
    for part in parts(found):
        console.print(part, crop=False)
    return out.getvalue()


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("kind", ["terminal", "pipe"])
def test_how_it_looks(name: str, kind: str) -> None:
    text = printed(EXAMPLES[name], is_terminal=kind == "terminal")
    assert text == (GOLDEN / f"ping-{name}-{kind}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", EXAMPLES)
def test_its_json(name: str) -> None:
    golden = json.loads((GOLDEN / f"ping-{name}.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(EXAMPLES[name].to_json())) == golden
    validate(golden, SCHEMA)
    assert Ping.from_json(golden) == Ping.from_json(EXAMPLES[name].to_json())
    assert SCHEMA["properties"].keys() == golden.keys()


# The command line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "PEER is missing"),
        (["192.0.2.2", "-c", "-1"], "out of range"),
        (["192.0.2.2", "-i", "1ms"], "a flood"),
        (["192.0.2.2", "--size", "43"], "out of range"),
        (["192.0.2.2", "--size", "65536"], "out of range"),
        (["192.0.2.2", "-W", "0"], "no time above zero"),
        (["192.0.2.2", "-o", "xml"], "is not one of text, json"),
        (["192.0.2.2", "192.0.2.3"], "192.0.2.3"),
    ],
)
def test_wrong_usage_is_named(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        command.COMMAND.main(arguments)
    assert words in str(raised.value)
