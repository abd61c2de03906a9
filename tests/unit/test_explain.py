"""Steps and verdict of `tundp explain`, from facts; and how they are shown.

The golden files are what two explanations look like on a terminal, in a pipe and as JSON.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.json_schema import validate
from tests.unit.test_show import printed
from tundp.choices import Measuring, MtuOrigin, SourceCheck
from tundp.cli.program import main
from tundp.finding import Finding
from tundp.finding import Verdict as FindingVerdict
from tundp.linux.obstacles.packet import Packet, range_at
from tundp.linux.obstacles.scene import NOT_JUDGED
from tundp.linux.obstacles.way import Effect, Met, Neighbour, Routed, Walked
from tundp.observe import codec, schema
from tundp.observe.explain.facts import Direction, Facts, Kind, Pass, Tunnel, direction, place
from tundp.observe.explain.judge import explain
from tundp.observe.explain.model import Explanation, Question, Ruling, Step, Verdict
from tundp.observe.ledger import OWN, REFUSED, Ledger, LedgerRow
from tundp.observe.status import (
    ChaosStatus,
    DaemonState,
    MeasuringStatus,
    PathStatus,
    PeerStatus,
    PeerTraffic,
    ReachStatus,
    Status,
    StoreStatus,
)
from tundp.show import explain_parts

GOLDEN = Path(__file__).with_name("golden")
SCHEMAS = schema.PATH.parent
NOW = 1_770_000_000.0
OWN_ADDRESSES = frozenset(map(IPv4Address, ("192.0.2.1", "10.5.1.0", "10.5.1.1")))


def row(subnet: str, public_ip: str, **more: Any) -> LedgerRow:
    key = subnet.replace("/", "-")
    members = {"port": 8285, "key": key, "revision": 41, "backend_type": "udp", **more}
    return LedgerRow(subnet=IPv4Network(subnet), public_ip=IPv4Address(public_ip), **members)


LEASES = Ledger(
    network=IPv4Network("10.5.0.0/16"),
    subnet=IPv4Network("10.5.1.0/24"),
    public_ip=IPv4Address("192.0.2.1"),
    port=8285,
    mtu=1472,
    own_addresses=(IPv4Address("192.0.2.1"),),
    broadcasts=(IPv4Address("192.0.2.255"), IPv4Address("10.5.1.255")),
    revision=42,
    generation=7,
    leases=(
        row("10.5.1.0/24", "192.0.2.1", state=OWN, port=None),
        row("10.5.2.0/24", "192.0.2.2"),
        row(
            "10.5.8.0/24",
            "0.0.0.0",
            state=REFUSED,
            port=None,
            reason="no_public_ip",
            means="has no PublicIP: packets would go to 0.0.0.0, that is back to this node",
        ),
    ),
)
PEER = PeerStatus(
    subnet=IPv4Network("10.5.2.0/24"),
    public_ip=IPv4Address("192.0.2.2"),
    port=8285,
    traffic=PeerTraffic(
        packets_out=12, bytes_out=1000, packets_in=11, bytes_in=900, drops=0, last_heard=NOW + 17
    ),
)
STATUS = Status(
    version="0.2.0",
    pid=4242,
    state=DaemonState.RUNNING,
    started_at=NOW,
    uptime_s=20.0,
    peers=[PEER],
    store=StoreStatus(
        description="etcd v3", is_answering=True, is_from_cache=False, revision=42, age_s=0
    ),
)
ACCEPT = Met(
    effect=Effect.ACCEPTS,
    hook="forward",
    where="iptables table filter, rule 1 of FLANNEL-FWD: -A FLANNEL-FWD -s 10.5.0.0/16 -j ACCEPT",
    kinds="",
    is_sure=True,
    command="",
)
DROP = Met(
    effect=Effect.DROPS,
    hook="forward",
    where="nft table inet t, chain c: tcp dport 443 drop",
    kinds="",
    is_sure=True,
    command="nft 'insert rule inet t c position 2 oifname \"flannel0\" accept'",
)
MASQUERADE = Met(
    effect=Effect.REWRITES,
    hook="postrouting",
    where="iptables table nat, rule 6 of FLANNEL-POSTRTG: -A FLANNEL-POSTRTG -j MASQUERADE",
    kinds="TCP",
    is_sure=True,
    command="",
)
TCP = Packet(
    proto="tcp",
    state="new",
    src=(range_at(IPv4Address("10.5.1.2")),),
    dst=(range_at(IPv4Address("10.5.2.3")),),
)
PASSES = Walked(met=(ACCEPT,), chains=4, left=(TCP,))


def facts(
    source: str = "10.5.1.2", destination: str = "10.5.2.3", *, question: Any = None, **more: Any
) -> Facts:
    """A packet that nothing is in the way of, and what differs."""
    leases = more.pop("leases", LEASES)
    members: dict[str, Any] = {"proto": "tcp", "port": 443, "size": 1400}
    asked = Question(
        source=IPv4Address(source),
        destination=IPv4Address(destination),
        **(members | (question or {})),
    )
    ends = [place(each, leases, OWN_ADDRESSES) for each in (asked.source, asked.destination)]
    what = direction(*ends)
    is_out = what is Direction.ENCAP
    iif, oif = ("cni0", "flannel0") if is_out else ("flannel0", "cni0")
    inner = Pass(
        iif="" if ends[0].kind is Kind.HOST else iif,
        wanted=(oif,),
        route=Routed(f"ip route get {destination} from {source} iif {iif}", device=oif),
        walked=PASSES,
        masqueraded_as=IPv4Address("10.5.1.0"),
    )
    tunnel = Tunnel(
        route=Routed("ip route get 192.0.2.2 from 192.0.2.1", device="eth0") if is_out else None,
        back=None if is_out else Routed("ip route get 192.0.2.1", is_for_host=True),
        next_hop=IPv4Address("192.0.2.2"),
        neighbour=Neighbour(2, IPv4Address("192.0.2.2"), "reachable", "02:00:00:00:00:02"),
        walked=Walked(chains=2),
    )
    usual = Facts(
        question=asked,
        leases=leases,
        leases_of="the running daemon, pid 4242",
        status=STATUS,
        source=ends[0],
        destination=ends[1],
        direction=what,
        device="flannel0",
        uplink="eth0",
        pods=("cni0",),
        gateway="10.5.1.1/24",
        inner=replace(inner, **more.pop("inner", {})),
        tunnel=replace(tunnel, **more.pop("tunnel", {})),
    )
    return replace(usual, **more)


def step(found: Explanation, step_id: str) -> Step:
    (one,) = [each for each in found.steps if each.id == step_id]
    return one


# Who has to do with it


@pytest.mark.parametrize(
    ("source", "destination", "expected"),
    [
        ("10.5.1.2", "10.5.2.3", Direction.ENCAP),
        ("10.5.1.1", "10.5.2.3", Direction.ENCAP),
        ("203.0.113.9", "10.5.2.3", Direction.ENCAP),
        ("10.5.1.2", "10.5.8.3", Direction.ENCAP),
        ("10.5.1.2", "10.5.77.3", Direction.ENCAP),
        ("10.5.2.3", "10.5.1.2", Direction.DECAP),
        ("192.0.2.2", "10.5.1.2", Direction.DECAP),
        ("10.5.77.3", "10.5.1.2", Direction.DECAP),
        ("10.5.2.3", "10.5.1.0", Direction.DECAP),
        ("10.5.2.3", "10.5.77.3", Direction.ELSEWHERE),
        ("192.0.2.2", "10.5.2.3", Direction.ELSEWHERE),
        ("10.5.1.2", "10.5.1.3", Direction.ELSEWHERE),
        ("203.0.113.9", "203.0.113.10", Direction.ELSEWHERE),
        ("10.5.1.2", "203.0.113.9", Direction.ROUTED),
        ("10.5.1.2", "10.5.1.1", Direction.ROUTED),
        ("203.0.113.9", "10.5.1.2", Direction.ROUTED),
        ("10.5.1.2", "192.0.2.2", Direction.ROUTED),
    ],
)
def test_which_half_this_node_has(source: str, destination: str, expected: Direction) -> None:
    ends = [place(IPv4Address(each), LEASES, OWN_ADDRESSES) for each in (source, destination)]
    assert direction(*ends) is expected


# Steps that drop, warn, or do not know


def refused(**more: Any) -> dict[str, Any]:
    return {"inner": {"route": Routed("ip route get", **more)}}


@pytest.mark.parametrize(
    ("given", "step_id", "ruling", "words"),
    [
        ({}, "route", Ruling.OK, "dev flannel0 (ip route get 10.5.2.3 from 10.5.1.2 iif cni0)"),
        (
            {"pods": ()},
            "pod",
            Ruling.DROP,
            "no device of pods leads to 10.5.1.2: there is no bridge",
        ),
        ({"pods_up": False}, "pod", Ruling.DROP, "cni0 is down"),
        (
            {"pod_neighbour": Neighbour(3, IPv4Address("10.5.1.2"), "failed", "")},
            "pod",
            Ruling.WARN,
            "10.5.1.2 did not answer ARP (failed)",
        ),
        (refused(device="eth0"), "route", Ruling.DROP, "dev eth0, and not to flannel0"),
        (refused(errno=101), "route", Ruling.DROP, "there is no route"),
        (
            {
                "inner": {
                    "route": Routed("q", errno=18),
                    "unchecked": Routed("q", device="flannel0"),
                    "rp_filter": 1,
                }
            },
            "route",
            Ruling.DROP,
            "rp_filter is 1 on cni0",
        ),
        (
            {"inner": {"route": None, "why_not": "no daemon runs"}},
            "route",
            Ruling.UNKNOWN,
            "no daemon runs",
        ),
        ({"inner": {"is_link_up": False}}, "route", Ruling.DROP, "which is down"),
        (
            {"inner": {"forwarding_switch": "net.ipv4.ip_forward"}},
            "forwarding",
            Ruling.DROP,
            "net.ipv4.ip_forward is 0",
        ),
        ({}, "firewall", Ruling.OK, "none of 4 base chains drops it; iptables table filter"),
        (
            {
                "inner": {
                    "walked": Walked(
                        met=(DROP,), chains=4, ended=frozenset({("tcp", "new")}), left=()
                    )
                }
            },
            "firewall",
            Ruling.DROP,
            "nft table inet t, chain c: tcp dport 443 drop drops it",
        ),
        (
            # One protocol of those tried.
            {
                "inner": {
                    "walked": Walked(
                        met=(replace(DROP, kinds="TCP"),),
                        ended=frozenset({("tcp", "new")}),
                        left=(replace(TCP, proto="udp"),),
                    )
                }
            },
            "firewall",
            Ruling.WARN,
            "drops TCP",
        ),
        (
            {"inner": {"walked": Walked(met=(replace(DROP, is_sure=False),), left=(TCP,))}},
            "firewall",
            Ruling.WARN,
            "drops some of it",
        ),
        (
            {
                "inner": {
                    "walked": Walked(met=(replace(DROP, effect=Effect.MAY_DROP),), left=(TCP,))
                }
            },
            "firewall",
            Ruling.UNKNOWN,
            "may drop it",
        ),
        (
            {"unread_rules": ["rules of nftables: no nft here"]},
            "firewall",
            Ruling.UNKNOWN,
            "not looked at: rules of nftables: no nft here",
        ),
        (
            {"unread_rules": ["rules of nftables: no nft here"]},
            "masquerade",
            Ruling.UNKNOWN,
            "not applied",
        ),
        (
            {"inner": {"walked": Walked(met=(MASQUERADE,), left=(TCP,))}},
            "masquerade",
            Ruling.WARN,
            "the source becomes 10.5.1.0 (for TCP), by iptables table",
        ),
        ({"unread_others": ["BPF programs: no right"]}, "filters", Ruling.UNKNOWN, "no right"),
        (
            {
                "others": [
                    Finding(
                        id="obstacle.tc",
                        verdict=FindingVerdict.NOTE,
                        evidence="filters of tc on eth0 may drop packets",
                        meaning=NOT_JUDGED,
                    )
                ]
            },
            "filters",
            Ruling.UNKNOWN,
            "may drop packets",
        ),
        ({}, "lease", Ruling.OK, "10.5.2.0/24 at 192.0.2.2:8285, lease 10.5.2.0-24, revision 41"),
        (
            {"status": replace(STATUS, store=replace(STATUS.store, is_answering=False, age_s=90))}
            if STATUS.store is not None
            else {},
            "lease",
            Ruling.WARN,
            "the store does not answer, they are 90 s old",
        ),
        ({"question": {"size": 1472}}, "size", Ruling.OK, "1472 of at most 1472 bytes"),
        (
            {"question": {"size": 1473, "dont_fragment": True}},
            "size",
            Ruling.DROP,
            "the kernel drops it and answers ICMP fragmentation needed, MTU 1472",
        ),
        ({"question": {"size": 1473}}, "size", Ruling.WARN, "the kernel fragments it"),
        (
            {"leases": replace(LEASES, mtu=None), "status": None},
            "size",
            Ruling.UNKNOWN,
            "not known",
        ),
        (
            {"tunnel": {"route": Routed("q", device="flannel0")}},
            "underlay",
            Ruling.DROP,
            "would enter the tunnel again",
        ),
        ({"tunnel": {"route": Routed("q", errno=113)}}, "underlay", Ruling.DROP, "unreachable"),
        ({}, "neighbour", Ruling.OK, "192.0.2.2 is at 02:00:00:00:00:02 (reachable), on eth0"),
        ({"tunnel": {"neighbour": None}}, "neighbour", Ruling.NOTE, "has no entry"),
        (
            {"tunnel": {"neighbour": Neighbour(2, IPv4Address("192.0.2.2"), "failed", "")}},
            "neighbour",
            Ruling.WARN,
            "did not answer ARP",
        ),
        ({}, "peer", Ruling.NOTE, "12 packets sent to it, 11 from it, heard 3 s ago"),
        ({}, "receiver", Ruling.OK, "its source check takes 10.5.1.2 from this node"),
    ],
)
def test_a_step(given: dict[str, Any], step_id: str, ruling: Ruling, words: str) -> None:
    found = explain(facts(**given))
    one = step(found, step_id)
    assert words in one.evidence
    assert one.ruling is ruling
    expected = {Ruling.DROP: Verdict.DROPPED, Ruling.UNKNOWN: Verdict.UNKNOWN}
    assert found.verdict is expected.get(ruling, Verdict.DELIVERED), found.summary


@pytest.mark.parametrize(
    ("destination", "reason", "words"),
    [
        (
            "10.5.77.3",
            "no_route",
            "no lease covers 10.5.77.3: 3 leases at revision 42, the nearest",
        ),
        ("10.5.8.3", "no_route", "is refused (no_public_ip): it has no PublicIP"),
    ],
)
def test_without_a_peer(destination: str, reason: str, words: str) -> None:
    found = explain(facts(destination=destination, tunnel={}))
    one = step(found, "lease")
    assert (one.ruling, one.reason) == (Ruling.DROP, reason)
    assert words in one.evidence
    assert "the sender gets ICMP net unreachable from 10.5.1.0" in one.evidence
    assert "size" not in [each.id for each in found.steps]


def test_a_narrow_path_says_who_says_so() -> None:
    path = PathStatus(
        inner_mtu=1372, mtu_origin=MtuOrigin.ROUTE, since=NOW, origin="mtu 1400 of the route"
    )
    status = replace(STATUS, peers=[replace(PEER, path=path)])
    asked = {"size": 1400, "dont_fragment": True}
    one = step(explain(facts(status=status, question=asked)), "size")
    assert (one.ruling, one.reason) == (Ruling.DROP, "too_big")
    assert "more than the 1372 of the path (route: mtu 1400 of the route)" in one.evidence
    assert "the sender gets ICMP fragmentation needed, MTU 1372 from 10.5.1.0" in one.evidence
    one = step(explain(facts(status=status, question={"size": 1400})), "size")
    assert (one.ruling, "2 fragments" in one.evidence) == (Ruling.WARN, True)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (None, "not measured, as no large packets take it"),
        (Measuring.PENDING, "not measured yet"),
        (Measuring.NO_ANSWER, "not measured: nothing there answers"),
        (Measuring.MEASURED, "measured, and no narrower"),
    ],
)
def test_a_path_that_was_not_measured_is_not_called_wide(
    state: Measuring | None, words: str
) -> None:
    measuring = None if state is None else MeasuringStatus(state=state, since=NOW)
    found = explain(facts(status=replace(STATUS, peers=[replace(PEER, measuring=measuring)])))
    assert f"the path itself is {words}" in step(found, "size").evidence
    limits = [each for each in found.not_looked_at if "datagrams so large" in each]
    assert bool(limits) == (state is not Measuring.MEASURED)


def test_chaos_of_this_node_is_named_on_the_way_out() -> None:
    chaos = ChaosStatus(
        subnet=IPv4Network("10.5.2.0/24"),
        public_ip=IPv4Address("192.0.2.2"),
        port=8285,
        impairment="loss 100%",
        seed=1,
        since=NOW,
        ends_at=NOW + 60,
    )
    status = replace(STATUS, chaos=[chaos])
    found = explain(facts(status=status))
    one = step(found, "chaos")
    assert (one.ruling, one.command) == (Ruling.UNKNOWN, "tundp chaos stop 192.0.2.2")
    assert "on purpose: loss 100%" in one.evidence
    assert found.verdict is Verdict.UNKNOWN
    back = explain(facts("10.5.2.3", "10.5.1.2", status=status))
    assert "chaos" not in [each.id for each in back.steps]


def test_a_silent_peer_is_a_warning() -> None:
    reach = ReachStatus(standing="silent", since=1.0)
    status = replace(STATUS, peers=[replace(PEER, reach=reach)])
    one = step(explain(facts(status=status)), "peer")
    assert (one.ruling, one.command, one.words) == (Ruling.WARN, "", "on 192.0.2.2: tundp status")


@pytest.mark.parametrize(
    ("mode", "verdict", "ruling"),
    [
        (SourceCheck.ENFORCE, Verdict.DROPPED, Ruling.DROP),
        (SourceCheck.COUNT, Verdict.DELIVERED, Ruling.WARN),
        (SourceCheck.OFF, Verdict.DELIVERED, Ruling.OK),
    ],
)
def test_the_source_check_by_its_mode(mode: SourceCheck, verdict: Verdict, ruling: Ruling) -> None:
    leases = replace(LEASES, source_check=mode)
    found = explain(facts("10.5.77.3", "10.5.1.2", leases=leases))
    one = step(found, "source-check")
    assert (found.verdict, one.ruling) == (verdict, ruling)
    assert explain(facts("10.5.2.3", "10.5.1.2", leases=leases)).verdict is Verdict.DELIVERED


def test_what_is_not_masqueraded_is_no_peers_at_the_receiver() -> None:
    found = explain(facts("192.0.2.1", "10.5.2.3"))
    assert step(found, "receiver").ruling is Ruling.OK, "a node may send from its PublicIP"
    outside = facts("203.0.113.9", "10.5.2.3")
    one = step(explain(outside), "receiver")
    assert (one.ruling, one.reason) == (Ruling.WARN, "source_mismatch")
    assert "dropped with --source-check=enforce" in one.evidence
    assert outside.inner is not None
    masked = replace(outside, inner=replace(outside.inner, walked=Walked(met=(MASQUERADE,))))
    assert step(explain(masked), "receiver").ruling is Ruling.OK


def test_a_named_source_nat_is_believed() -> None:
    named = replace(MASQUERADE, where="iptables table nat, ...: -j SNAT --to-source 203.0.113.4")
    found = explain(facts(inner={"walked": Walked(met=(named,))}))
    assert "the source becomes 203.0.113.4" in step(found, "masquerade").evidence
    assert step(found, "receiver").reason == "source_mismatch"


def test_the_first_drop_is_the_verdict() -> None:
    found = explain(facts(destination="10.5.77.3", pods_up=False))
    assert found.summary == "step 3, pod's bridge: cni0 is down"
    assert found.command == "ip link set cni0 up"


ADDRESSES = st.sampled_from(
    [
        *("10.5.1.2", "10.5.1.0", "10.5.1.255", "10.5.2.3", "10.5.8.9", "10.5.77.1", "192.0.2.1"),
        *("192.0.2.2", "203.0.113.5", "127.0.0.1", "224.0.0.1", "0.0.0.0", "255.255.255.255"),
    ]
)


@given(
    ADDRESSES,
    ADDRESSES,
    st.integers(28, 65_535),
    st.booleans(),
    st.sampled_from(["", "tcp", "udp", "icmp"]),
    st.sampled_from(list(SourceCheck)),
)
def test_any_packet_has_a_verdict(
    source: str,
    destination: str,
    size: int,
    is_whole: bool,
    proto: str,
    mode: SourceCheck,
) -> None:
    question = {"size": size, "dont_fragment": is_whole, "proto": proto, "port": None}
    leases = replace(LEASES, source_check=mode)
    found = explain(facts(source, destination, question=question, leases=leases))
    assert found.steps
    drops = [each for each in found.steps if each.ruling is Ruling.DROP]
    assert bool(drops) == (found.verdict is Verdict.DROPPED)
    assert codec.from_json(Explanation, json.loads(json.dumps(found.to_json()))) is not None
    if found.verdict is Verdict.DELIVERED:
        assert all(each.ruling is not Ruling.UNKNOWN for each in found.steps)


# How it looks

EXAMPLES = {
    "delivered": explain(facts(question={"dont_fragment": True})),
    "dropped": explain(
        facts(
            question={"size": 1500, "dont_fragment": True},
            inner={
                "walked": Walked(met=(DROP,), chains=4, ended=frozenset({("tcp", "new")}), left=())
            },
            unread_rules=["tables of legacy iptables (filter), for lack of CAP_NET_RAW"],
        )
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize(("kind", "width"), [("80", 80), ("pipe", 0)])
def test_how_it_looks(name: str, kind: str, width: int) -> None:
    golden = (GOLDEN / f"explain-{name}-{kind}.txt").read_text(encoding="utf-8")
    found = printed(explain_parts(EXAMPLES[name]), width=width or 80, is_terminal=bool(width))
    assert found == golden


@pytest.mark.parametrize("name", EXAMPLES)
def test_its_json(name: str) -> None:
    golden = json.loads((GOLDEN / f"explain-{name}.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(EXAMPLES[name].to_json())) == golden
    rules = json.loads((SCHEMAS / "explain.schema.json").read_text(encoding="utf-8"))

    validate(golden, rules)
    assert codec.from_json(Explanation, golden).verdict is EXAMPLES[name].verdict


# What to do


SHELL = re.compile(r"(ip|sysctl|nft|iptables|tc|tundp status)( |$)")


@pytest.mark.parametrize(
    ("asked", "step_id", "words"),
    [
        (
            facts(
                "10.5.77.3", "10.5.1.2", leases=replace(LEASES, source_check=SourceCheck.ENFORCE)
            ),
            "source-check",
            "the daemon's flag --source-admit=10.5.77.3/32",
        ),
        (
            facts(question={"size": 1500, "dont_fragment": True}),
            "size",
            "in the pod: ip link set eth0 mtu",
        ),
        (
            facts(
                status=replace(
                    STATUS, peers=[replace(PEER, reach=ReachStatus(standing="silent", since=1.0))]
                )
            ),
            "peer",
            "on 192.0.2.2: tundp status",
        ),
    ],
)
def test_what_is_no_line_of_shell_for_this_host_is_no_command(
    asked: Facts, step_id: str, words: str
) -> None:
    found = explain(asked)
    one = step(found, step_id)
    assert words in one.words
    assert all(SHELL.match(each.command) for each in found.steps if each.command)
    assert not any(each.command.startswith("tundp run") for each in found.steps)
    assert words in printed(explain_parts(found), width=300)


def test_names_of_devices_are_quoted() -> None:
    name = "cni0;reboot"
    found = explain(facts(pods=(name,), pods_up=False))
    assert found.command == f"ip link set '{name}' up"


# The command line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["10.5.1.2"], "DST is missing: usage: tundp explain SRC DST [PROTO [PORT]] [flags]"),
        (["here", "10.5.2.3"], "SRC 'here' is no IPv4 address"),
        (["10.5.1.2", "10.5.2.3", "sctp"], "PROTO 'sctp' is none of tcp, udp, icmp"),
        (["10.5.1.2", "10.5.2.3", "tcp", "0"], "PORT '0' is no port"),
        (["10.5.1.2", "10.5.2.3", "icmp", "7"], "ICMP has none"),
        (["10.5.1.2", "10.5.2.3", "tcp", "7", "8"], "unexpected argument '8'"),
        (["10.5.1.2", "10.5.2.3", "--size=27"], "is out of range: 28 to 65535 bytes"),
        (["10.5.1.2", "10.5.2.3", "tcp", "--size=39"], "--size is below the 40 bytes"),
    ],
)
def test_wrong_usage(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *arguments]) == 2
    assert words in capsys.readouterr().err
