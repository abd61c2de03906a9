"""Status, checks and probes as people read them."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from tundp.choices import MtuOrigin
from tundp.finding import Finding, Verdict, must_hold
from tundp.layout import Figure, Line
from tundp.linux.probe import ProbeReport, feature
from tundp.observe import dump
from tundp.observe.status import (
    BackendStatus,
    BadEntryStatus,
    CountersStatus,
    DaemonState,
    DeviceStatus,
    DirectionStatus,
    DisabledOffload,
    EngineStatus,
    FirewallStatus,
    IcmpStatus,
    InterfaceStatus,
    LeaseStatus,
    PathStatus,
    PeerStatus,
    PeerTraffic,
    ReachStatus,
    RefusedStatus,
    RoutingStatus,
    Status,
    StoreStatus,
)
from tundp.show import brief_parts, drop_lines, finding_parts, probe_parts, status_parts
from tundp.wire.drop import DropReason

LARGEST = 2**63
COUNTS = st.integers(0, LARGEST)
NOW = 1_770_000_100.0

COUNTERS = CountersStatus(
    encap=DirectionStatus(
        packets_in=1_234_567, packets_out=1_234_560, bytes_out=2_500_000, drops={"no_route": 7}
    ),
    decap=DirectionStatus(packets_in=5, packets_out=4, drops={"source_mismatch": 1}),
    totals={"icmp_rate_limited": 0},
    by_reason={"coalesce_misses": {"no_payload": 1155}, "errnos": {}},
)
INTERFACE = InterfaceStatus(
    name="eth0", address=IPv4Address("192.0.2.1"), mtu=1500, why="has the default route"
)
LEASE = LeaseStatus(key="10.5.1.0-24", state="held", expires_in_s=82_800)
STORE = StoreStatus(
    description="etcd v2 at http://192.0.2.9:2379",
    is_answering=True,
    is_from_cache=False,
    revision=77,
    age_s=0,
)


def peer(number: int, **changes: Any) -> PeerStatus:
    return PeerStatus(
        subnet=IPv4Network(f"10.5.{number}.0/24"),
        public_ip=IPv4Address(f"192.0.2.{number}"),
        port=8285,
        **changes,
    )


def traffic(**changes: Any) -> PeerTraffic:
    none = {"packets_out": 0, "bytes_out": 0, "packets_in": 0, "bytes_in": 0, "drops": 0}
    return PeerTraffic(**none | changes)


STATUS = Status(
    version="0.2.0",
    pid=4242,
    state=DaemonState.RUNNING,
    started_at=NOW - 100,
    uptime_s=100,
    loop="uvloop",
    network=IPv4Network("10.5.0.0/16"),
    subnet=IPv4Network("10.5.1.0/24"),
    public_ip=IPv4Address("192.0.2.1"),
    lease=LEASE,
    store=STORE,
    backend=BackendStatus(
        type="udp",
        interface=INTERFACE,
        port=8285,
        device=DeviceStatus(name="flannel0", mtu=1472),
    ),
    engine=EngineStatus(name="reference", uses="one packet at a time, in Python"),
    firewall=FirewallStatus(flavour="iptables", missing=""),
    routing=RoutingStatus(generation=3, peers=2, refused=1, bad_entries=1),
    findings=[must_hold("lease", True, "held"), must_hold("firewall", True, "our rules are there")],
    peers=[peer(2), peer(3)],
    refused=[
        RefusedStatus(
            key="10.5.9.0-24",
            public_ip=IPv4Address(0),
            reason="no_public_ip",
            means="has no PublicIP",
        )
    ],
    bad_entries=[BadEntryStatus(name="rubbish", why="'rubbish' is not a subnet key")],
    counters=COUNTERS,
)


def printed(parts: Iterable[RenderableType], *, width: int = 80, is_terminal: bool = False) -> str:
    file = io.StringIO()
    console = Console(
        file=file, highlight=False, width=width, force_terminal=is_terminal, color_system=None
    )
    for part in parts:
        console.print(part, crop=False)
    return file.getvalue()


def shown(status: Status) -> str:
    return printed(status_parts(status))


@pytest.mark.parametrize(
    "text",
    [
        "10.5.1.0/24 of 10.5.0.0/16 on flannel0 (MTU 1472), udp 192.0.2.1:8285 via eth0",
        "lease 10.5.1.0-24 held, 23h00m left",
        "etcd v2 at http://192.0.2.9:2379 answering, revision 77",
        "engine reference on uvloop, pid 4242",
        "one packet at a time, in Python",
        "no peer: 10.5.9.0-24 has no PublicIP",
        "ignored: rubbish: 'rubbish' is not a subnet key",
        "192.0.2.2:8285",
        "192.0.2.3:8285",
        "1,234,567",
        "2.5",
        "encap no_route 7: no lease covers the destination; ",
        "decap source_mismatch 1: the outer source does not hold the lease",
    ],
)
def test_what_status_shows(text: str) -> None:
    assert text in shown(STATUS)


def test_each_peer_is_a_line() -> None:
    lines = shown(STATUS).splitlines()
    for subnet, at in (("10.5.2.0/24", "192.0.2.2:8285"), ("10.5.3.0/24", "192.0.2.3:8285")):
        assert [line.split() for line in lines if subnet in line] == [[subnet, at]]


def test_without_peers_status_says_so() -> None:
    assert "none yet" in shown(replace(STATUS, peers=[]))


def test_a_peer_is_shown_with_its_traffic_and_its_path() -> None:
    path = PathStatus(inner_mtu=1372, no_gso=True, since=NOW - 9, origin="EMSGSIZE")
    heard = traffic(packets_out=4_282_411, packets_in=12, last_heard=NOW - 300)
    lines = shown(replace(STATUS, peers=[peer(2, path=path, traffic=heard)])).splitlines()
    at = next(number for number, line in enumerate(lines) if "peer subnet" in line)
    assert re.split(r"\s{2,}", lines[at].strip()) == [
        *("peer subnet", "at", "out", "in", "last heard", "path MTU", "without")
    ]
    assert re.split(r"\s{2,}", lines[at + 2].strip()) == [
        *("10.5.2.0/24", "192.0.2.2:8285", "4,282,411", "12", "5 min", "1372", "udp-segment")
    ]


def test_silent_peers_come_first() -> None:
    peers = [
        peer(2, traffic=traffic()),
        peer(3, traffic=traffic(packets_out=5, packets_in=5, last_heard=NOW)),
        peer(4, traffic=traffic(packets_out=21)),
        peer(5, traffic=traffic(packets_out=1, packets_in=1, last_errno="EHOSTUNREACH")),
        peer(6, traffic=traffic(packets_in=9, last_heard=NOW)),
    ]
    found = re.findall(r"10\.5\.(\d)\.0/24 ", shown(replace(STATUS, peers=peers)))
    assert found[1:] == ["4", "2", "3", "5", "6"]


SILENT = ReachStatus(
    standing="silent",
    since=NOW - 9,
    unanswered_packets=21,
    rtt_ms=0.25,
    evidence="21 packets sent in 9 s, nothing came back",
    next_step="no daemon listens there",
)


def test_what_is_known_of_peers_that_do_not_answer_is_told_and_they_come_first() -> None:
    answers = ReachStatus(standing="answers", since=NOW, rtt_ms=1.234)
    one_way = replace(SILENT, standing="one-way", evidence="none came back", next_step="")
    waiting = replace(SILENT, standing="waiting")
    heard = traffic(packets_out=5, bytes_out=4200, packets_in=5, last_heard=NOW, drops=7)
    peers = [
        peer(2, traffic=heard, reach=answers),
        peer(3, traffic=traffic(packets_out=1), reach=one_way),
        peer(4, traffic=traffic(packets_out=21), reach=SILENT),
        peer(5, traffic=traffic(packets_out=1), reach=waiting),
    ]
    finding = Finding(id="peers", verdict=Verdict.WARN, evidence="in short")
    text = shown(replace(STATUS, peers=peers, findings=[finding]))
    assert (
        "silent: 10.5.4.0/24 at 192.0.2.4:8285: 21 packets sent in 9 s, nothing came back;"
        " no daemon listens there\n"
    ) in text
    assert "one-way: 10.5.3.0/24 at 192.0.2.3:8285: none came back\n" in text
    assert "waiting:" not in text
    assert "in short" not in text
    assert text.index("silent: 10.5.4") < text.index("one-way: 10.5.3")
    rows = re.findall(r"(?m)^(10\.5\.\d)\.0/24 +\S+:8285 +(.*)$", text)
    assert [row[0][-1] for row in rows] == ["4", "3", "5", "2"]
    assert rows[0][1].split()[:3] == ["silent", "0.25", "ms"]
    assert rows[3][1].split() == [*["yes", "1.23", "ms", "5", "5", "0", "s", "4,200", "7"]]
    assert "in short" in shown(replace(STATUS, findings=[finding])), "of a daemon without details"


def test_of_many_silent_peers_the_first_are_told() -> None:
    peers = [peer(each, reach=SILENT) for each in range(2, 102)]
    text = shown(replace(STATUS, peers=peers))
    assert text.count("silent: 10.5.") == 20
    assert "peers: and 80 more without an answer; see below" in text


def test_a_narrow_path_is_shown_with_who_says_so() -> None:
    path = PathStatus(
        inner_mtu=1372, mtu_origin=MtuOrigin.MEASURED, no_gso=False, since=NOW, origin="measured"
    )
    assert "  1372 measured" in shown(replace(STATUS, peers=[peer(2, path=path)]))


def test_the_dump_has_a_line_a_peer_and_the_columns_of_the_first() -> None:
    path = PathStatus(
        inner_mtu=1372, mtu_origin=MtuOrigin.MEASURED, no_gso=False, since=NOW, origin="measured"
    )
    heard = traffic(packets_out=LARGEST, packets_in=2, bytes_out=3, bytes_in=4, drops=5)
    heard = replace(heard, last_heard=NOW + 0.7, last_errno="EPERM")
    icmp = IcmpStatus(text="port unreachable", said_by=IPv4Address("192.0.2.2"), count=1, last=NOW)
    reach = replace(SILENT, device="eth0", neighbour="failed", icmp=icmp, rtt_ms=0.0001)
    status = replace(STATUS, peers=[peer(2, path=path, traffic=heard, reach=reach), peer(3)])
    names, full, bare = [line.split("\t") for line in dump.lines(status)]
    assert names == ["#subnet", *list(dump.COLUMNS)[1:]]
    assert full == [
        *("10.5.2.0/24", "192.0.2.2", "8285", "silent", str(int(NOW)), "1"),
        *(str(LARGEST), "2", "3", "4", "5", "1372", "measured", "EPERM"),
        *("eth0", "-", "failed", "port unreachable"),
    ]
    assert bare == [
        *("10.5.3.0/24", "192.0.2.3", "8285", "-", "0", "0"),
        *("0", "0", "0", "0", "0", "0", "-", "-", "-", "-", "-", "-"),
    ]


def test_one_line_for_the_node_counts_silent_peers() -> None:
    assert STATUS.routing is not None
    routing = replace(STATUS.routing, silent_peers=1)
    (line,) = printed(brief_parts({"/a": replace(STATUS, routing=routing)})).splitlines()
    assert line.endswith("2 peers, 1 silent, pid 4242: ready")


def test_an_offload_disabled_while_running_is_shown_with_reason_and_time() -> None:
    engine = EngineStatus(
        name="gso",
        uses="tun-tso",
        offloads_in_use=["tun-tso"],
        offloads_disabled=[
            DisabledOffload(name="udp-gro", reason="by --disable-offloads"),
            DisabledOffload(name="tcp-coalesce", reason="the TUN said EINVAL", since=NOW - 240),
        ],
    )
    text = shown(replace(STATUS, engine=engine))
    assert re.search(
        r"disabled: tcp-coalesce since \d\d:\d\d:\d\d, 4 min ago: the TUN said EINVAL", text
    )
    assert "udp-gro" not in text


def test_a_backend_without_device_port_and_engine_is_shown() -> None:
    backend = BackendStatus(type="host-gw", interface=INTERFACE, mtu=1500, routes=3)
    peers = [replace(peer(2), port=None)]
    status = replace(STATUS, backend=backend, engine=None, counters=None, peers=peers)
    text = shown(status)
    assert "10.5.0.0/16 (MTU 1500), host-gw 192.0.2.1 via eth0, 3 routes\n" in text
    assert "packets are carried by the kernel; daemon on uvloop, pid 4242" in text
    assert re.search(r"10\.5\.2\.0/24 +192\.0\.2\.2\n", text)
    for word in ("None", "balance", "8285"):
        assert word not in text


@pytest.mark.parametrize("reason", DropReason)
def test_every_drop_reason_is_explained(reason: DropReason) -> None:
    counters = CountersStatus(decap=DirectionStatus(drops={reason.label: 1000}))
    (line,) = drop_lines(counters)
    assert line.plain.startswith(f"decap {reason.label} 1,000: ")
    assert reason.means in line.plain
    assert reason.next_step in line.plain


def test_a_reason_of_a_newer_daemon_is_shown_by_its_name() -> None:
    (line,) = drop_lines(CountersStatus(decap=DirectionStatus(drops={"brand_new": 3})))
    assert line.plain == "decap brand_new 3"


def test_counters_that_mean_trouble_are_shown_though_they_are_no_drops() -> None:
    totals = {"source_mismatches": 3, "icmp_rate_limited": 4, "socket_overflows": 5, "spins": 6}
    text = "\n".join(line.plain for line in drop_lines(CountersStatus(totals=totals)))
    for name, count in totals.items():
        assert (f"{name} {count}: " in text) is (name != "spins")


def test_routine_reasons_are_shown_only_when_asked_for() -> None:
    assert drop_lines(CountersStatus(by_reason={"coalesce_misses": {"full": 7}})) == []
    (line,) = drop_lines(
        CountersStatus(by_reason={"coalesce_misses": {"full": 7}}), is_verbose=True
    )
    assert "coalesce_misses full 7" in line.plain
    (line,) = drop_lines(CountersStatus(by_reason={"errnos": {"EPERM": 7}}))
    assert "EPERM 7" in line.plain


def test_nothing_counted_shows_no_line() -> None:
    assert drop_lines(CountersStatus()) == []


def test_conservation_is_shown_and_its_violation_too() -> None:
    assert shown(STATUS).count("holds") == 2
    encap = replace(COUNTERS.encap, packets_in=COUNTERS.encap.packets_in + 1)
    text = shown(replace(STATUS, counters=replace(COUNTERS, encap=encap)))
    assert text.count("holds") == 1
    assert text.count("VIOLATED") == 1


@pytest.mark.parametrize(
    ("lease", "text"),
    [
        ({"state": "held", "expires_in_s": None}, "held, never expires"),
        ({"state": "held", "expires_in_s": 59}, "held, 0h00m left"),
        ({"state": "held", "expires_in_s": 3660}, "held, 1h01m left"),
        ({"state": "lost", "expires_in_s": -12}, "lost, expired 12 s ago"),
        ({"state": "lost", "expires_in_s": None}, "lost, not confirmed by the store"),
        ({"state": "conflict", "expires_in_s": 0}, "conflict, 0h00m left"),
    ],
)
def test_how_long_the_lease_lasts(lease: dict[str, Any], text: str) -> None:
    assert text in shown(replace(STATUS, lease=LeaseStatus(key="10.5.1.0-24", **lease)))


@pytest.mark.parametrize(
    ("name", "breaks"),
    [
        ("[/]", "a closing tag would raise"),
        ("[/red]x", "a closing tag would raise"),
        ("[red]x", "an opening tag would vanish"),
        (":a:", "a smiley name would turn into a smiley"),
        ("\\[x]", "a backslash would vanish"),
    ],
)
def test_names_from_the_store_are_only_text(name: str, breaks: str) -> None:
    # Anybody who may write to the store chooses these.
    entry = BadEntryStatus(name=name, why=f"{name!r} is not a subnet key")
    text = shown(replace(STATUS, bad_entries=[entry]))
    assert f"ignored: {name}: {name!r} is not a subnet key" in text, breaks


def test_of_many_refused_and_unreadable_entries_the_first_are_shown() -> None:
    refused = [replace(STATUS.refused[0], key=f"10.6.{n}.0-24") for n in range(1000)]
    bad = [BadEntryStatus(name=f"bad-{n}", why="no") for n in range(1000)]
    assert STATUS.routing is not None
    routing = replace(STATUS.routing, refused=20_000, bad_entries=100_000)
    lines = shown(replace(STATUS, refused=refused, bad_entries=bad, routing=routing)).splitlines()
    assert sum(line.startswith("no peer: 10.6.") for line in lines) == 20
    assert "no peer: and 19,980 more; tundp status --json lists 1,000" in lines
    assert sum(line.startswith("ignored: bad-") for line in lines) == 20
    assert "ignored: and 99,980 more; tundp status --json lists 1,000" in lines
    assert not any(" more; " in line for line in shown(STATUS).splitlines())


def test_the_age_of_the_leases_on_disk_is_shown_and_why_they_are_no_newer() -> None:
    now = STATUS.started_at + STATUS.uptime_s
    store = replace(STORE, is_cached=True, cached_at=now - 75)
    assert "leases on disk: saved 75 s ago\n" in shown(replace(STATUS, store=store))
    failing = replace(store, cache_error="/var/lib/tundp: No space left on device")
    assert (
        "leases on disk: saved 75 s ago, failing: /var/lib/tundp: No space left on device\n"
        in shown(replace(STATUS, store=failing))
    )
    never = replace(failing, cached_at=None)
    assert "leases on disk: not saved yet, failing: " in shown(replace(STATUS, store=never))
    assert "on disk" not in shown(STATUS), "nothing is kept"


def test_an_ipv6_endpoint_is_shown_whole() -> None:
    store = replace(STORE, description="etcd v2 at http://[fd00::9]:2379")
    assert "http://[fd00::9]:2379" in shown(replace(STATUS, store=store))


def test_an_ipv6_lease_key_is_shown_whole() -> None:
    # rich knows :a:, :b: and :ab: as emoji.
    key = "10.5.1.0-24&fd00:b:a::-64"
    refused = RefusedStatus(key=key, public_ip=IPv4Address(0), reason="x", means="x")
    status = replace(STATUS, lease=LeaseStatus(key=key, state="held"), refused=[refused])
    assert shown(status).count(key) == 2


def test_what_holds_is_not_mentioned() -> None:
    text = shown(STATUS)
    for word in ("not ready", "interface:", " s old", "from disk", "firewall"):
        assert word not in text


def test_every_check_that_fails_is_shown() -> None:
    findings = [
        must_hold("lease", False, "192.0.2.9 holds it now"),
        must_hold("firewall", True, "our rules are there"),
        must_hold("subnet-file", False, "Read-only file system", next_step="use another"),
    ]
    text = shown(replace(STATUS, findings=findings))
    assert "not ready: lease: 192.0.2.9 holds it now\n" in text
    assert "not ready: subnet-file: Read-only file system; use another\n" in text
    assert "firewall" not in text


def test_what_is_in_the_way_or_not_known_is_shown() -> None:
    findings = [
        Finding(id="obstacle.firewall", verdict=Verdict.WARN, evidence="a rule", next_step="pass"),
        Finding(id="obstacles", verdict=Verdict.UNKNOWN, evidence="not looked for: no nft"),
        Finding(id="obstacle.hooks", verdict=Verdict.NOTE, evidence="an ingress chain"),
    ]
    text = shown(replace(STATUS, findings=findings))
    assert "warn: obstacle.firewall: a rule; pass\n" in text
    assert "unknown: obstacles: not looked for: no nft\n" in text
    assert "ingress" not in text


def test_warnings_about_the_interface_are_shown() -> None:
    interface = replace(INTERFACE, warnings=["--public-ip is on no interface [NAT]"])
    backend = BackendStatus(type="udp", interface=interface)
    text = shown(replace(STATUS, backend=backend))
    assert "interface: --public-ip is on no interface [NAT]" in text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"age_s": 90}, "answering, revision 77, leases 90 s old"),
        ({"age_s": 0}, "answering, revision 77\n"),
        ({"age_s": None}, "answering, revision 77\n"),
        ({"is_answering": False, "age_s": 0}, "not answering, peers kept"),
        (
            {"age_s": 90, "is_answering": False, "is_from_cache": True},
            "not answering, peers kept, revision 77, leases 90 s old (from disk)",
        ),
    ],
)
def test_how_old_the_leases_are(changes: dict[str, Any], text: str) -> None:
    assert text in shown(replace(STATUS, store=replace(STORE, **changes)))


def test_packets_a_system_call() -> None:
    encap = DirectionStatus(packets_in=1280, packets_out=1280, reads=10, writes=20)
    text = shown(replace(STATUS, counters=CountersStatus(encap=encap)))
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert lines["encap"][-3:] == ["128.0", "64.0", "holds"]
    assert lines["decap"][-3:] == ["-", "-", "holds"]


def test_time_in_the_engine() -> None:
    def one(*counts: tuple[int, int]) -> DirectionStatus:
        latency = [0] * 22
        for bucket, count in counts:
            latency[bucket] = count
        return DirectionStatus(latency=latency)

    both = CountersStatus(encap=one((4, 90), (9, 10)), decap=one((0, 5), (21, 5)))
    assert (
        "time in the engine: encap 50 % within 16 us, 99 % within 512 us;"
        " decap 50 % within 1 us, 99 % above 1 s"
    ) in shown(replace(STATUS, counters=both))
    half = CountersStatus(encap=DirectionStatus(), decap=one((20, 1)))
    assert (
        "time in the engine: decap 50 % within 1,048,576 us, 99 % within 1,048,576 us"
    ) in shown(replace(STATUS, counters=half))
    neither = CountersStatus(encap=DirectionStatus(), decap=one())
    assert "time in the engine" not in shown(replace(STATUS, counters=neither))


def test_a_daemon_that_starts_says_what_it_waits_for() -> None:
    status = Status(
        version="0.2.0",
        pid=7,
        state=DaemonState.STARTING,
        waiting_for="a lease: etcd does not answer",
        started_at=NOW,
        uptime_s=0,
    )
    assert shown(status) == "starting, pid 7: waiting for a lease: etcd does not answer\n"


def test_status_of_all_daemons_is_a_line_each() -> None:
    starting = replace(STATUS, state=DaemonState.STARTING, waiting_for="a lease")
    sick = replace(STATUS, findings=[must_hold("lease", False, "lost")])
    text = printed(
        brief_parts({"/a": STATUS, "/b": "no daemon answers", "/c": starting, "/d": sick})
    )
    assert text.splitlines() == [
        "/a  10.5.1.0/24 of 10.5.0.0/16 on flannel0 (MTU 1472), udp 192.0.2.1:8285 via eth0,"
        " 2 peers, pid 4242: ready",
        "/b  no daemon answers",
        "/c  starting: waiting for a lease",
        "/d  10.5.1.0/24 of 10.5.0.0/16 on flannel0 (MTU 1472), udp 192.0.2.1:8285 via eth0,"
        " 2 peers, pid 4242: not ready (lease)",
    ]


FINDINGS = [
    Finding(id="settings", verdict=Verdict.OK, evidence="all defaults"),
    Finding(
        id="store.unreadable",
        verdict=Verdict.WARN,
        title="unreadable entry",
        evidence="[red]x[/]: " + "y" * 300,
    ),
    Finding(
        id="store",
        verdict=Verdict.FAIL,
        evidence="etcd at http://[fd00::9]:2379",
        next_step="is it running?",
    ),
]


def test_findings_are_lines_of_plain_text() -> None:
    assert printed(finding_parts(FINDINGS)).splitlines() == [
        "OK   settings: all defaults",
        f"WARN unreadable entry: [red]x[/]: {'y' * 300}",
        "FAIL store: etcd at http://[fd00::9]:2379; is it running?",
    ]


# Nothing is ever cut


PROBE = ProbeReport(
    kernel="6.18.5",
    machine="x86_64",
    cpus=2,
    native="ABI 7",
    sums=("avx2", "plain"),
    findings=tuple(
        feature("x", title, is_there=is_there, evidence=evidence, since=since, without=without)
        for title, is_there, evidence, since, without in (
            (
                "TCP super-packet to the TUN",
                True,
                "taken whole",
                "2.6.27 (not 6.1.103, 6.6.44, 6.10.3)",
                "one TUN write per packet, found out at the first refusal",
            ),
            (
                "vnet header",
                False,
                "IFF_VNET_HDR: super-packets cross the TUN whole",
                "2.6.27",
                "engine mmsg: one packet per TUN read and write",
            ),
            (
                "multi-queue",
                True,
                "IFF_MULTI_QUEUE: --workers above 1",
                "3.8",
                "one worker",
            ),
        )
    ),
    not_asked=None,
    engine="gso",
    why="the kernel has super-packets",
    offloads=("tun-tso",),
    missing={},
)


def figure_in(text: str, count: int) -> bool:
    """Whether a count is there whole, exact or to three digits."""
    scaled = re.escape(Figure(count).scaled)
    return bool(re.search(rf"(?<![\d,.]){count:,}(?![\d,.])|(?<![\d,.]){scaled}(?! ?[\d,.])", text))


def directions(counts: st.SearchStrategy[int]) -> st.SearchStrategy[DirectionStatus]:
    return st.builds(
        DirectionStatus,
        packets_in=counts,
        packets_out=counts,
        bytes_out=counts,
        reads=st.integers(1, LARGEST),
        writes=st.integers(1, LARGEST),
        drops=st.fixed_dictionaries({}, optional={"no_route": counts, "too_big": counts}),
    )


@pytest.mark.parametrize("is_terminal", [True, False])
@settings(deadline=None, max_examples=30)
@given(encap=directions(COUNTS), decap=directions(COUNTS), total=COUNTS)
def test_no_counter_is_cut(is_terminal: bool, encap: Any, decap: Any, total: Any) -> None:
    counters = CountersStatus(encap=encap, decap=decap, totals={"socket_overflows": total})
    text = printed(status_parts(replace(STATUS, counters=counters)), is_terminal=is_terminal)
    assert "…" not in text
    for counted in (encap, decap):
        # Whoever wants to check the balance by hand needs these exact, whatever the width.
        for count in (counted.packets_in, counted.packets_out, counted.dropped):
            assert re.search(rf"(?<![\d,]){count:,}(?![\d,])", text)
        assert f"{counted.bytes_out / 1e6:,.1f}" in text
        for label, count in counted.drops.items():
            assert f"{label} {count:,}" in text
    if total:
        assert f"socket_overflows {total:,}" in text
    if is_terminal:
        assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("is_terminal", [True, False])
@settings(deadline=None, max_examples=30)
@given(
    out=COUNTS,
    heard=COUNTS,
    age_s=st.integers(0, 10**7),
    mtu=st.none() | st.integers(68, 65_535),
    address=st.ip_addresses(v=4),
    no_gso=st.booleans(),
)
def test_no_peer_is_cut(
    is_terminal: bool, out: Any, heard: Any, age_s: Any, mtu: Any, address: Any, no_gso: Any
) -> None:
    one = replace(
        peer(255, traffic=traffic(packets_out=out, packets_in=heard, last_heard=NOW - age_s)),
        public_ip=IPv4Address(str(address)),
        port=65_535,
        path=PathStatus(inner_mtu=mtu, no_gso=no_gso, since=NOW),
    )
    text = printed(status_parts(replace(STATUS, peers=[one])), is_terminal=is_terminal)
    assert "…" not in text
    (line,) = (line for line in text.splitlines() if "10.5.255.0/24" in line)
    assert f"{address}:65535" in line
    if is_terminal:
        assert len(line) <= 80
        assert figure_in(line, out)
        assert figure_in(line, heard)
    else:
        assert f" {out:,} " in line
        assert f" {heard:,} " in line
        assert mtu is None or str(mtu) in line


NAMES = st.text(st.characters(categories=["L", "N"], max_codepoint=0x17F), min_size=1, max_size=60)


@pytest.mark.parametrize("is_terminal", [True, False])
@settings(deadline=None, max_examples=30)
@given(names=st.lists(NAMES, min_size=1, max_size=4))
def test_no_finding_and_no_daemon_is_cut(is_terminal: bool, names: Any) -> None:
    findings = [
        Finding(id="x", verdict=Verdict.WARN, title=name, evidence=f"see {name} and {name}")
        for name in names
    ]
    for parts in (
        finding_parts(findings),
        brief_parts(dict.fromkeys(names, replace(STATUS, findings=findings))),
        probe_parts(
            replace(
                PROBE,
                findings=(
                    *PROBE.findings,
                    *(
                        feature("x", name, is_there=False, evidence="e", since="s", without="w")
                        for name in names
                    ),
                ),
            )
        ),
    ):
        text = printed(parts, is_terminal=is_terminal)
        assert "…" not in text
        for name in names:
            assert name in text


def test_a_probe_fits_eighty_columns_and_leaves_out_what_is_empty() -> None:
    text = printed(probe_parts(PROBE), is_terminal=True)
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) < 20
    for word in ("TCP super-packet to the TUN", "IFF_MULTI_QUEUE:", "without it", "engine gso"):
        assert word in text
    whole = replace(PROBE, findings=(PROBE.findings[0], PROBE.findings[2]))
    assert "without it" not in printed(probe_parts(whole), is_terminal=True)
    in_a_pipe = printed(probe_parts(PROBE))
    assert "one packet per TUN read and write" in in_a_pipe
    assert "2.6.27 (not 6.1.103, 6.6.44, 6.10.3)" in in_a_pipe


def test_long_lines_are_wrapped_between_words_on_a_terminal_only() -> None:
    words = " ".join(f"word{number}" for number in range(40))
    lines = printed([Line(drop_lines(CountersStatus(totals={"socket_overflows": 1}))[0])])
    assert lines.count("\n") == 1
    file = printed(finding_parts([Finding(id="x", verdict=Verdict.OK, evidence=words)]))
    assert file.count("\n") == 1
    wrapped = printed(
        finding_parts([Finding(id="x", verdict=Verdict.OK, evidence=words)]), is_terminal=True
    )
    _, *others = wrapped.splitlines()
    assert len(others) >= 3
    assert all(line.startswith("     word") and len(line) <= 80 for line in others)
    assert wrapped.split() == ["OK", "x:", *words.split()]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (9_999, "9,999"),
        (10_000, "10 k"),
        (999_499, "999 k"),
        (999_500, "1 M"),
        (4_282_411_123, "4.28 G"),
        (LARGEST, "9.22 E"),
        (10**22, "1e+04 E"),
    ],
)
def test_scaled_figures_have_three_digits(count: int, text: str) -> None:
    assert Figure(count).scaled == text
