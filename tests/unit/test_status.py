"""The status as a document: what it looks like, what reads it back, and what describes it.

The golden files are what daemons of this schema answered; they change only together with
STATUS_SCHEMA, but for members that are new.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.json_schema import Misfit, validate
from tundp.choices import Measuring, MtuOrigin, Offload
from tundp.engine.base import DisabledOffload as Disabled
from tundp.engine.base import OffloadState, PathState
from tundp.engine.counters import Counters, HopCounters
from tundp.finding import Finding, Verdict
from tundp.observe import collect, schema
from tundp.observe.codec import Malformed
from tundp.observe.collect import PeerView
from tundp.observe.status import (
    STATUS_SCHEMA,
    BackendStatus,
    BadEntryStatus,
    ChaosStatus,
    CountersStatus,
    DaemonState,
    DeviceStatus,
    DirectionStatus,
    DisabledOffload,
    EngineStatus,
    FirewallStatus,
    IcmpStatus,
    InterfaceStatus,
    KernelStatus,
    Lazy,
    LeaseStatus,
    MeasuringStatus,
    PathStatus,
    PeerStatus,
    PeerTraffic,
    ReachStatus,
    RefusedStatus,
    RoutingStatus,
    SandboxStatus,
    SettingStatus,
    Status,
    StoreStatus,
)

GOLDEN = Path(__file__).with_name("golden")
SCHEMA = json.loads(schema.PATH.read_text(encoding="utf-8"))

INTERFACE = InterfaceStatus(
    name="eth0",
    address=IPv4Address("192.0.2.1"),
    mtu=1500,
    why="has the default route",
    others=("eth1 198.51.100.1: is down",),
    warnings=(),
)
UDP = Status(
    version="0.2.0",
    pid=4242,
    state=DaemonState.RUNNING,
    started_at=1_770_000_000.25,
    uptime_s=90.0,
    loop="uvloop",
    node_id="0123456789abcdef",
    network=IPv4Network("10.5.0.0/16"),
    subnet=IPv4Network("10.5.1.0/24"),
    public_ip=IPv4Address("192.0.2.1"),
    lease=LeaseStatus(
        key="10.5.1.0-24", state="held", expires_in_s=82_800, expires_at=1_770_082_890
    ),
    store=StoreStatus(
        description="etcd v3 at http://192.0.2.9:2379",
        is_answering=True,
        is_from_cache=False,
        revision=77,
        synced_at=1_770_000_090.0,
        age_s=0,
        is_cached=True,
        cached_at=1_770_000_050.0,
        cache_error="/var/lib/tundp: No space left on device",
    ),
    backend=BackendStatus(
        type="udp",
        interface=INTERFACE,
        mtu=1472,
        port=8285,
        receive_buffer=33_554_432,
        device=DeviceStatus(name="flannel0", mtu=1472, queue_len=10_000),
        path_probes=4,
        peer_messages=6,
        paths_in_use={"measured": 1, "pending": 0, "no-answer": 1},
    ),
    engine=EngineStatus(
        name="gso",
        uses="tun-tso, udp-segment, udp-gro; without tcp-coalesce: EINVAL",
        offloads_in_use=("tun-tso", "udp-segment", "udp-gro"),
        offloads_disabled=(
            DisabledOffload(name="tun-uso", reason="by --disable-offloads"),
            DisabledOffload(name="tcp-coalesce", reason="EINVAL", since=1_770_000_050.0),
        ),
        hop_sockets=1,
        readers=2,
    ),
    kernel=KernelStatus(tun_queue_drops=12, udp_errors=5, udp_checksum_errors=4),
    firewall=FirewallStatus(flavour="nftables", missing=""),
    routing=RoutingStatus(
        generation=3,
        peers=2,
        refused=1,
        bad_entries=1,
        narrow_paths=1,
        no_gso_paths=0,
        silent_peers=1,
        narrow_by_origin={"device": 0, "route": 0, "measured": 1},
    ),
    sandbox=SandboxStatus(
        landlock_abi=4,
        seccomp=True,
        missing=("signals, abstract unix sockets (Landlock ABI 6, Linux 6.12)",),
        gaps=("reading /etc, for etcd's endpoints have names (etcd.example)",),
    ),
    findings=(
        Finding(id="lease", verdict=Verdict.OK, evidence="held"),
        Finding(
            id="firewall",
            verdict=Verdict.FAIL,
            evidence="nft: command failed",
            next_step="run nft list ruleset",
        ),
    ),
    peers=(
        PeerStatus(
            subnet=IPv4Network("10.5.2.0/24"),
            public_ip=IPv4Address("192.0.2.2"),
            port=8285,
            backend_type="udp",
            identity="node2",
            path=PathStatus(
                inner_mtu=1372,
                mtu_origin=MtuOrigin.MEASURED,
                no_gso=False,
                since=1_770_000_040.0,
                origin="measured",
            ),
            measuring=MeasuringStatus(state=Measuring.MEASURED, since=1_770_000_045.0),
            traffic=PeerTraffic(
                packets_out=21,
                bytes_out=1764,
                packets_in=20,
                bytes_in=1680,
                drops=1,
                queue_full=1,
                last_heard=1_770_000_088.5,
                last_errno="EMSGSIZE",
            ),
        ),
        PeerStatus(
            subnet=IPv4Network("10.5.3.0/24"),
            public_ip=IPv4Address("192.0.2.3"),
            port=8285,
            backend_type="udp",
            reach=ReachStatus(
                standing="silent",
                since=1_770_000_080.0,
                unanswered_packets=21,
                echo_requests=4,
                echo_missed=3,
                rtt_ms=0.25,
                device="eth0",
                gateway=IPv4Address("192.0.2.254"),
                is_default_route=True,
                neighbour="reachable",
                icmp=IcmpStatus(
                    text="port unreachable",
                    said_by=IPv4Address("192.0.2.3"),
                    count=5,
                    last=1_770_000_089.0,
                ),
                evidence="21 packets sent in 10 s, nothing came back",
                next_step="no daemon listens there",
            ),
        ),
    ),
    refused=(
        RefusedStatus(
            key="10.5.9.0-24",
            public_ip=IPv4Address(0),
            reason="no_public_ip",
            means="has no PublicIP",
        ),
    ),
    bad_entries=(BadEntryStatus(name="rubbish", why="'rubbish' is not a subnet key"),),
    chaos=(
        ChaosStatus(
            subnet=IPv4Network("10.5.2.0/24"),
            public_ip=IPv4Address("192.0.2.2"),
            port=8285,
            impairment="loss 1%, delay 20ms+-5ms",
            slowest_s=0.025,
            seed=7,
            since=1_770_000_060.0,
            ends_at=1_770_000_120.0,
            counts={"received": 20, "own": 1, "sent": 17, "lost": 1, "waiting": 2, "delayed": 19},
        ),
        ChaosStatus(
            subnet=IPv4Network("10.5.3.0/24"),
            public_ip=IPv4Address("192.0.2.3"),
            port=8285,
            impairment="mtu 1300",
            seed=8,
            since=1_770_000_010.0,
            ends_at=1_770_000_020.0,
            ended_at=1_770_000_015.0,
            why_ended="stopped by command",
            counts={"received": 3, "sent": 2, "too_big": 1},
        ),
    ),
    chaos_totals={"received": 23, "sent": 19, "lost": 1, "too_big": 1, "waiting": 2},
    counters=CountersStatus(
        encap=DirectionStatus(
            packets_in=22,
            bytes_in=1848,
            packets_out=21,
            bytes_out=1764,
            reads=20,
            writes=19,
            super_in=1,
            super_out=2,
            latency_ns=412_000,
            latency=(0, 0, 0, 1, 2, *[0] * 16, 1),
            drops={"too_big": 1},
        ),
        decap=DirectionStatus(packets_in=20, bytes_in=1680, packets_out=20, bytes_out=1680),
        totals={"icmp_to_tun": 1, "syscalls": 95},
        by_reason={"coalesce_misses": {"no_payload": 7}, "errnos": {"EMSGSIZE": 1}},
    ),
    settings={
        "iface": SettingStatus(value="eth0", origin="--iface"),
        "etcd-password": SettingStatus(value="***", origin="FLANNELD_ETCD_PASSWORD"),
    },
)
HOST_GW = replace(
    UDP,
    chaos=(),
    chaos_totals={},
    backend=BackendStatus(type="host-gw", interface=INTERFACE, mtu=1500, routes=1),
    engine=None,
    counters=None,
    kernel=KernelStatus(),
    peers=(
        PeerStatus(
            subnet=IPv4Network("10.5.2.0/24"),
            public_ip=IPv4Address("192.0.2.2"),
            backend_type="host-gw",
        ),
    ),
    refused=(),
    bad_entries=(),
    routing=RoutingStatus(generation=3, peers=1, refused=0, bad_entries=0),
    sandbox=None,
    findings=(),
    settings={},
)
STARTING = Status(
    version="0.2.0",
    pid=4242,
    state=DaemonState.STARTING,
    waiting_for="a lease: etcd does not answer",
    started_at=1_770_000_000.0,
    uptime_s=3.0,
    findings=(Finding(id="start", verdict=Verdict.FAIL, evidence="waiting for a lease"),),
)
STATUSES = {"udp": UDP, "host-gw": HOST_GW, "starting": STARTING}


@pytest.mark.parametrize("name", STATUSES)
def test_a_status_is_the_golden_document(name: str) -> None:
    golden = json.loads((GOLDEN / f"status-{name}.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(STATUSES[name].to_json())) == golden


@pytest.mark.parametrize("name", STATUSES)
def test_a_golden_document_is_read_back(name: str) -> None:
    golden = json.loads((GOLDEN / f"status-{name}.json").read_text(encoding="utf-8"))
    assert Status.from_json(golden) == STATUSES[name]


@pytest.mark.parametrize("name", STATUSES)
def test_a_golden_document_fits_the_schema(name: str) -> None:
    golden = json.loads((GOLDEN / f"status-{name}.json").read_text(encoding="utf-8"))
    validate(golden, SCHEMA)


def test_the_schema_file_is_current() -> None:
    assert schema.PATH.read_text(encoding="utf-8") == schema.text(), "python -m tundp.cli.docs"


def test_the_schema_describes_what_the_golden_documents_hold() -> None:
    """Every member of the fullest document is described by name."""
    document = UDP.to_json()
    assert SCHEMA["properties"].keys() == document.keys()
    peer = SCHEMA["$defs"]["PeerStatus"]["properties"]
    assert peer.keys() == document["peers"][0].keys()
    assert SCHEMA["$defs"]["PeerTraffic"]["properties"]["last_heard"]["description"]


@pytest.mark.parametrize(
    ("path", "value", "breaks"),
    [
        (("pid",), "4242", "a text for a number"),
        (("pid",), True, "a truth value for a number"),
        (("state",), "dead", "no state there is"),
        (("network",), "10.5.0.1/16", "host bits"),
        (("lease",), [], "an array for an object"),
        (("lease", "key"), None, "null where there must be a text"),
        (("peers",), {}, "an object for an array"),
        (("peers", 0, "public_ip"), "192.0.2", "no address"),
        (("peers", 0, "traffic", "packets_out"), 1.5, "half a packet"),
        (("findings", 0, "verdict"), "good", "no verdict there is"),
        (("counters",), [], "an array for an object"),
        (("counters", "encap", "drops"), [], "an array for an object"),
        (("settings", "iface"), "eth0", "a text for an object"),
        (("schema",), STATUS_SCHEMA + 1, "another schema"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(path: Any, value: Any, breaks: str) -> None:
    document = json.loads(json.dumps(UDP.to_json()))
    inner = document
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    with pytest.raises(Malformed) as caught:
        Status.from_json(document)
    assert str(path[-1]) in str(caught.value), breaks


@pytest.mark.parametrize("path", [("pid",), ("lease", "state"), ("peers", 0, "subnet")])
def test_what_is_missing_is_named(path: tuple[Any, ...]) -> None:
    document = json.loads(json.dumps(UDP.to_json()))
    inner = document
    for step in path[:-1]:
        inner = inner[step]
    del inner[path[-1]]
    with pytest.raises(Malformed, match=re.escape(str(path[-1])) + " is missing"):
        Status.from_json(document)
    with pytest.raises(Misfit, match=str(path[-1])):
        validate(document, SCHEMA)


@pytest.mark.parametrize("document", [None, [], "x", {}, {"pid": 1}])
def test_what_is_no_status_is_refused(document: Any) -> None:
    with pytest.raises(Malformed, match="no status"):
        Status.from_json(document)


def test_members_of_a_newer_daemon_are_passed_over() -> None:
    document = json.loads(json.dumps(UDP.to_json()))
    document["brand_new"] = {"x": 1}
    document["peers"][0]["brand_new"] = []
    document["counters"]["brand_new"] = 7
    document["counters"]["brand_new_reasons"] = {"x": 8}
    read = Status.from_json(document)
    assert read.peers == UDP.peers
    assert read.counters is not None
    assert read.counters.totals["brand_new"] == 7
    assert read.counters.by_reason["brand_new_reasons"] == {"x": 8}
    validate(document, SCHEMA)


NAMES = st.text("stuvw", min_size=1, max_size=9)
COUNTS = st.dictionaries(NAMES, st.integers(0, 2**64 - 1), max_size=4)


@settings(deadline=None)
@given(
    totals=COUNTS,
    by_reason=st.dictionaries(st.text("xyz", min_size=1), COUNTS, max_size=3),
    drops=COUNTS,
    texts=st.lists(st.text().filter(str.isprintable), max_size=3),
    since=st.none() | st.floats(0, 2e9),
)
def test_a_status_is_read_back_as_it_was(
    totals: Any, by_reason: Any, drops: Any, texts: Any, since: Any
) -> None:
    counters = CountersStatus(
        encap=DirectionStatus(packets_in=2**63, drops=drops), totals=totals, by_reason=by_reason
    )
    engine = EngineStatus(
        name="gso",
        uses="\N{SNOWMAN}",
        offloads_in_use=tuple(texts),
        offloads_disabled=tuple(
            DisabledOffload(name=text, reason=text, since=since) for text in texts
        ),
    )
    status = replace(UDP, counters=counters, engine=engine)
    document = json.loads(json.dumps(status.to_json()))
    validate(document, SCHEMA)
    assert Status.from_json(document) == status


def test_counters_keep_the_names_the_engine_gives_them() -> None:
    counters = Counters(icmp_rate_limited=3, errnos={"EPERM": 1})
    counters.encap.packets_in = 5
    document = collect.counters_status(counters).to_json()
    assert document == counters.as_dict()
    assert document["conserved"] is False


# What grows with the number of peers


def test_what_is_lazy_is_made_once_and_only_when_looked_at() -> None:
    made = []

    def make() -> list[str]:
        made.append(1)
        return ["a", "b"]

    lazy = Lazy(2, make)
    assert len(lazy) == 2
    status = replace(UDP, refused=lazy)  # type: ignore[arg-type]
    assert status.routing is not None
    assert made == []
    assert list(lazy) == ["a", "b"]
    assert lazy[1] == "b"
    assert lazy == ("a", "b")
    assert lazy != ("a",)
    assert made == [1]


class Engine:
    """What an engine tells of two hops."""

    name = "gso"

    def describe(self) -> str:
        return "tun-tso"

    def offloads(self) -> OffloadState:
        return OffloadState(
            in_use=(Offload.TUN_TSO,),
            disabled={
                Offload.UDP_GRO: Disabled("asked for"),
                Offload.TCP_COALESCE: Disabled("EINVAL", 9.0),
            },
        )

    def hop_sockets(self) -> int:
        return 1

    def tap_count(self) -> int:
        return 2

    def path_states(self) -> dict[int, PathState]:
        return {
            2: PathState(
                inner_mtu=1372,
                mtu_origin=MtuOrigin.DEVICE,
                no_gso=True,
                since=5.0,
                origin="EMSGSIZE",
            )
        }

    def hop_counters(self, hop_ids: Sequence[int] | None = None) -> dict[int, HopCounters]:
        return {1: HopCounters(packets_out=1, packets_in=2, last_heard=7.0)}


ENGINE: Any = Engine()
"""Of a Dataplane it has what the status asks for."""


def view(subnet: str, hop_id: int | None) -> PeerView:
    return PeerView(
        subnet=IPv4Network(subnet), public_ip=IPv4Address("192.0.2.2"), port=1, hop_id=hop_id
    )


def test_peers_are_in_the_order_of_their_subnets_with_what_the_engine_knows() -> None:
    views = [view("10.5.10.0/24", 1), view("10.5.9.0/24", 2), view("10.5.9.0/25", None)]
    measurings = {1: MeasuringStatus(state=Measuring.NO_ANSWER, since=3.0)}
    peers = list(collect.peer_statuses(3, lambda: views, ENGINE, measurings))
    assert [str(peer.subnet) for peer in peers] == ["10.5.9.0/24", "10.5.9.0/25", "10.5.10.0/24"]
    first, second, third = peers
    assert first.path == PathStatus(
        inner_mtu=1372, mtu_origin=MtuOrigin.DEVICE, no_gso=True, since=5.0, origin="EMSGSIZE"
    )
    assert first.traffic is None
    assert (second.path, second.traffic) == (None, None)
    assert [each.measuring for each in peers] == [None, None, measurings[1]]
    assert third.traffic is not None
    assert third.traffic.last_heard == 7.0
    assert collect.path_counts(ENGINE) == (1, 1)
    assert collect.narrow_by_origin(ENGINE) == {"device": 1, "route": 0, "measured": 0}
    assert collect.path_counts(None) == (0, 0)


def test_offloads_in_use_and_disabled_are_those_of_the_engine_now() -> None:
    assert collect.engine_status(ENGINE) == EngineStatus(
        name="gso",
        uses="tun-tso",
        offloads_in_use=("tun-tso",),
        offloads_disabled=(
            DisabledOffload(name="udp-gro", reason="asked for"),
            DisabledOffload(name="tcp-coalesce", reason="EINVAL", since=9.0),
        ),
        hop_sockets=1,
        readers=2,
    )
