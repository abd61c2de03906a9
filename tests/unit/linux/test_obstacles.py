"""Rules read from both listings, and what becomes of packets in them. Pure: no kernel here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest

from tundp.finding import Verdict
from tundp.linux.obstacles import firewall, nft, sysctls, xtables
from tundp.linux.obstacles.packet import Match, Packet, range_of
from tundp.linux.obstacles.rules import Kind, Passage, Stop, Table
from tundp.linux.obstacles.rulesets import Rulesets
from tundp.linux.obstacles.scene import PeerPlace, Scene

PEER, OWN = IPv4Network("10.5.2.0/24"), IPv4Network("10.5.1.0/24")
SCENE = Scene(
    network=IPv4Network("10.5.0.0/16"),
    subnet=OWN,
    device="flannel0",
    is_open=True,
    is_tunnel=True,
    uplink="eth0",
    address=IPv4Address("192.0.2.1"),
    port=8285,
    peers=(PeerPlace(PEER, IPv4Address("192.0.2.2")),),
    peer_count=1,
    accepts=True,
)


def packet(**changes: Any) -> Packet:
    """A new TCP connection from a peer's pod to one of ours."""
    base: dict[str, Any] = {
        "proto": "tcp",
        "state": "new",
        "src": (range_of(PEER),),
        "dst": (range_of(OWN),),
        "iif": ("flannel0",),
        "oif": ("cni0",),
    }
    return Packet(**base | changes)


UDP = {"proto": "udp", "port": 8285}
ESTABLISHED = {"state": "established"}
YES, PART, NO, UNKNOWN = Match.YES, Match.PART, Match.NO, Match.UNKNOWN


@pytest.mark.parametrize(
    ("rule", "changes", "answer"),
    [
        ("", {}, YES),
        ("-i flannel0", {}, YES),
        ("-i flannel+", {}, YES),
        ("! -i flannel0", {}, NO),
        ("! -i docker0 -o docker0", {}, NO),
        ("! -i cni0 -o cni0", {}, YES),
        ("-o cni0", {"oif": ("cni0", "cni1")}, PART),
        ("-o cni0", {"oif": ()}, NO),
        ("-s 10.5.0.0/16", {}, YES),
        ("-s 10.5.2.7/32", {}, PART),
        ("! -s 10.5.2.7/32", {}, PART),
        ("-s 10.9.0.0/16", {}, NO),
        ("! -d 10.5.1.0/24", {}, NO),
        ("-p tcp", {}, YES),
        ("-p udp", {}, NO),
        ("-p 6", {}, YES),
        ("-p tcp -m tcp --dport 22", {}, PART),
        ("-p tcp -m tcp --dport 22", UDP, NO),
        ("-p udp -m udp --dport 8285", UDP, YES),
        ("-p udp -m udp ! --dport 8285", UDP, NO),
        ("-p udp -m udp --dport 8472", UDP, NO),
        ("-p udp -m multiport --dports 53,8000:8999", UDP, YES),
        ("-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN", {}, YES),
        ("-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN", {}, NO),
        ("-p tcp -m tcp --tcp-flags FIN,SYN,RST,PSH,ACK,URG NONE", {}, NO),
        ("-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN", ESTABLISHED, NO),
        ("-m conntrack --ctstate RELATED,ESTABLISHED", {}, NO),
        ("-m conntrack --ctstate RELATED,ESTABLISHED", ESTABLISHED, YES),
        ("-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT", {}, YES),
        ("-m state --state INVALID", {}, NO),
        ("-m mark --mark 0x8000/0x8000", {}, NO),
        ("-m mark ! --mark 0x10000/0x10000", {}, YES),
        ("-m mark --mark 0x0/0x4000", {}, YES),
        ("-m addrtype --dst-type LOCAL", {}, NO),
        ("-m addrtype --dst-type LOCAL", {"is_for_host": True}, YES),
        ("-m addrtype --src-type LOCAL", {"is_from_host": True}, YES),
        ("-m pkttype --pkt-type broadcast", {}, NO),
        ("-p icmp -m icmp --icmp-type 8", {"proto": "icmp"}, YES),
        ("-p icmp -m icmp --icmp-type 8", {"proto": "icmp"} | ESTABLISHED, NO),
        ("-m iprange --src-range 10.5.2.0-10.5.2.255", {}, YES),
        ("-m physdev --physdev-is-bridged", {}, NO),
        ("-m rpfilter --validmark --invert", {}, NO),
        ("-f", {}, NO),
        ('-m comment --comment "says -j DROP \\" and ! -s 1.2.3.4"', {}, YES),
        # Not understood is never a no.
        ("-m set --match-set bad src", {}, UNKNOWN),
        ("-m set ! --match-set good src", {}, UNKNOWN),
        ("-m limit --limit 3/min --limit-burst 10", {}, UNKNOWN),
        ("-m owner ! --uid-owner 0-9", {}, UNKNOWN),
        ("-m newmatch", {}, YES),
        ("-m newmatch --new-option with words", {}, UNKNOWN),
        ("-m u32 --u32 0x0&0x0=0x0", {}, UNKNOWN),
        # But what is certain beside it decides.
        ("-s 10.9.0.0/16 -m limit --limit 3/min", {}, NO),
    ],
)
def test_a_rule_of_iptables(rule: str, changes: dict[str, Any], answer: Match) -> None:
    made = xtables.parse_rule(f"-A FORWARD {rule} -j DROP", ["FORWARD"])
    assert made.kind is Kind.DROP
    assert made.match(packet(**changes), 0) is answer


def test_what_rules_do_in_iptables() -> None:
    kinds = {
        "-j ACCEPT": Kind.ACCEPT,
        "-j DROP": Kind.DROP,
        "-j REJECT --reject-with icmp-host-prohibited": Kind.DROP,
        "-j MINE": Kind.JUMP,
        "-g MINE": Kind.GOTO,
        "-j RETURN": Kind.RETURN,
        "-j NFQUEUE --queue-num 0": Kind.QUEUE,
        '-j LOG --log-prefix "x -j DROP "': Kind.NONE,
        "-m mark --mark 0x1": Kind.NONE,
    }
    for text, kind in kinds.items():
        assert xtables.parse_rule(f"-A FORWARD {text}", ["MINE"]).kind is kind, text
    made = xtables.parse_rule("-A X -j MARK --set-xmark 0x4000/0x4000", [])
    assert made.marks == 0x4000


def match(op: str, left: Any, right: Any) -> dict[str, Any]:
    return {"match": {"op": op, "left": left, "right": right}}


def meta(key: str) -> dict[str, Any]:
    return {"meta": {"key": key}}


def payload(protocol: str, field: str) -> dict[str, Any]:
    return {"payload": {"protocol": protocol, "field": field}}


SADDR, DPORT = payload("ip", "saddr"), payload("udp", "dport")
STATE = {"ct": {"key": "state"}}
MARK = {"&": [meta("mark"), 0x10]}


@pytest.mark.parametrize(
    ("expression", "changes", "answer"),
    [
        (match("==", meta("iifname"), "flannel*"), {}, YES),
        (match("!=", meta("iifname"), "flannel*"), {}, NO),
        (match("==", meta("oifname"), {"set": ["a", "cni0"]}), {}, YES),
        (match("==", SADDR, {"prefix": {"addr": "10.5.0.0", "len": 16}}), {}, YES),
        (match("==", SADDR, "10.5.2.7"), {}, PART),
        (match("!=", SADDR, {"range": ["10.5.2.0", "10.5.2.255"]}), {}, NO),
        (match("==", SADDR, "@banned"), {}, PART),
        (match("==", SADDR, "@empty"), {}, NO),
        (match("==", SADDR, "@nowhere"), {}, UNKNOWN),
        (match("==", payload("ip6", "saddr"), "::1"), {}, NO),
        (match("!=", payload("ip6", "saddr"), "::1"), {}, NO),
        (match("==", meta("nfproto"), "ipv6"), {}, NO),
        (match("==", meta("l4proto"), {"set": ["tcp", "udp"]}), {}, YES),
        (match("==", DPORT, 8285), UDP, YES),
        (match("!=", DPORT, 8285), UDP, NO),
        (match("!=", DPORT, 53), UDP, YES),
        # It asks for UDP, too.
        (match("!=", DPORT, 53), {}, NO),
        (match("==", DPORT, {"set": [53, {"range": [8000, 9000]}]}), UDP, YES),
        (match("in", STATE, ["established", "related"]), {}, NO),
        (match("in", STATE, "new"), {}, YES),
        (match("in", STATE, "invalid"), {}, NO),
        (match("in", {"ct": {"key": "status"}}, "dnat"), {}, NO),
        (match("==", MARK, 0x10), {}, NO),
        (match("==", MARK, 0), {}, YES),
        (match("==", {"fib": {"result": "oif", "flags": ["saddr", "iif"]}}, False), {}, NO),
        (match("==", {"fib": {"result": "type", "flags": ["daddr"]}}, "local"), {}, NO),
        (match("<", payload("ip", "length"), 100), {}, UNKNOWN),
        (match("==", meta("skuid"), 0), {}, UNKNOWN),
        ({"limit": {"rate": 5, "per": "second"}}, {}, UNKNOWN),
        ({"xt": {"type": "match", "name": "bpf"}}, {}, UNKNOWN),
        ({"some new statement": None}, {}, UNKNOWN),
        (match("==", {"exthdr": {"name": "frag"}}, True), {}, UNKNOWN),
        (match("==", SADDR, {"odd": ["form"]}), {}, UNKNOWN),
        (match("==", {"|": [SADDR, 1]}, None), {}, UNKNOWN),
        ({"counter": {"packets": 0, "bytes": 0}}, {}, YES),
        ({"log": {"prefix": "x"}}, {}, YES),
    ],
)
def test_a_rule_of_nft(expression: Any, changes: dict[str, Any], answer: Match) -> None:
    table = nft_table([[expression, {"drop": None}]])
    (rule,) = table.chains["c"].rules
    assert rule.kind is Kind.DROP
    assert rule.match(packet(**changes), 0) is answer


def nft_table(rules: Sequence[Any], **more: Any) -> Table:
    where = {"family": "inet", "table": "t"}
    objects = [
        {"metainfo": {"version": "1.0.6"}},
        {"table": {"family": "inet", "name": "t"}},
        {"set": {**where, "name": "empty", "type": "ipv4_addr"}},
        {
            "set": {
                **where,
                "name": "banned",
                "elem": ["198.51.100.1", {"elem": {"val": "10.5.2.9", "timeout": 60}}],
            }
        },
        {"chain": {**where, "name": "c", "hook": "forward", "prio": 0} | more},
        {"chain": {**where, "name": "x"}},
        *(
            {"rule": {**where, "chain": "c", "handle": number, "expr": each}}
            for number, each in enumerate(rules, 10)
        ),
        {"rule": {**where, "chain": "x", "handle": 5, "expr": [{"drop": None}]}},
    ]
    (table,) = nft.parse(json.dumps({"nftables": objects}))
    return table


def test_a_verdict_map_is_a_rule_for_each_element() -> None:
    key = {"concat": [payload("ip", "daddr"), meta("l4proto"), payload("th", "dport")]}
    services = [[{"concat": ["10.96.0.1", "tcp", 443]}, {"goto": {"target": "x"}}]]
    table = nft_table(
        [
            [{"vmap": {"key": key, "data": {"set": services}}}],
            [{"vmap": {"key": STATE, "data": {"set": [["invalid", {"drop": None}]]}}}],
        ]
    )
    assert stops(table, packet()) == []
    states = [["established", {"accept": None}], ["new", {"jump": {"target": "x"}}]]
    table = nft_table([[{"vmap": {"key": STATE, "data": {"set": states}}}]])
    assert [each.certainty for each in stops(table, packet())] == [YES]
    assert stops(table, packet(**ESTABLISHED)) == []
    # Where its elements are not listed, anything may happen.
    table = nft_table([[{"vmap": {"key": STATE, "data": "@unknown"}}]])
    assert [each.certainty for each in stops(table, packet())] == [UNKNOWN]


@pytest.mark.parametrize(
    "expression",
    [{}, {"vmap": {"key": STATE, "data": {"set": [["new"]]}}}, {"jump": None}, {"match": []}, 7],
)
def test_a_rule_of_an_unknown_form_may_do_anything(expression: Any) -> None:
    table = nft_table([[expression]])
    assert [each.certainty for each in stops(table, packet())] == [UNKNOWN]


def test_tables_of_families_our_packets_do_not_meet_are_left_out() -> None:
    families = ("ip", "ip6", "inet", "arp", "bridge", "netdev")
    listing = {"nftables": [{"table": {"family": each, "name": "t"}} for each in families]}
    names = nft.table_names(json.dumps(listing))
    assert names == [(each, "t") for each in families if each != "ip6"]


def below_ip(family: str, hook: str, *rules: Any, policy: str = "accept") -> Table:
    where = {"family": family, "table": "t"}
    chain = {**where, "name": "c", "hook": hook, "prio": 0, "policy": policy}
    listed = [
        {"rule": {**where, "chain": "c", "handle": number, "expr": rule}}
        for number, rule in enumerate(rules, 4)
    ]
    (table,) = nft.parse(json.dumps({"nftables": [{"chain": chain}, *listed]}))
    return table


DROP = {"drop": None}
IS_ARP = {
    "match": {
        "op": "==",
        "left": {"payload": {"protocol": "ether", "field": "type"}},
        "right": "arp",
    }
}
FROM_PEERS = {
    "match": {
        "op": "==",
        "left": {"payload": {"protocol": "ip", "field": "saddr"}},
        "right": {"prefix": {"addr": "10.5.2.0", "len": 24}},
    }
}
BY_PORT = {"match": {"op": "==", "left": {"meta": {"key": "oifname"}}, "right": "veth1"}}
ASKS = {
    "match": {
        "op": "==",
        "left": {"payload": {"protocol": "arp", "field": "operation"}},
        "right": "request",
    }
}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (below_ip("bridge", "output", [FROM_PEERS, DROP]), ["drops packets from peers to pods"]),
        (below_ip("bridge", "output", [BY_PORT, IS_ARP, DROP]), ["drops packets of ARP to pods"]),
        (below_ip("bridge", "input", [FROM_PEERS, DROP]), []),
        (below_ip("bridge", "forward", [FROM_PEERS, DROP]), []),
        (
            below_ip("bridge", "prerouting", policy="drop"),
            ["drops packets from pods here to peers", "drops packets of ARP from pods"],
        ),
        (below_ip("arp", "input", [ASKS, DROP]), ["may drop packets of ARP from"]),
        (below_ip("arp", "output", policy="drop"), ["drops packets of ARP to the underlay"]),
    ],
)
async def test_rules_below_ip(table: Table, words: list[str]) -> None:
    found = await judged(table)
    assert len(found) == min(1, len(words))
    assert all(word in found[0].evidence for word in words)


async def test_a_policy_below_ip_is_passed_for_ip_and_for_arp() -> None:
    (found,) = await judged(below_ip("bridge", "output", policy="drop"))
    assert found.facts["command"] == (
        "nft 'add rule bridge t c ip saddr 10.5.0.0/16 ip daddr 10.5.1.0/24 accept'"
        " && nft 'add rule bridge t c ether type arp accept'"
    )
    (found,) = await judged(below_ip("arp", "input", [DROP]))
    assert found.facts["command"] == "nft 'insert rule arp t c position 4 accept'"


def to_port(action: str) -> Table:
    lines = ["*nat", ":PREROUTING ACCEPT [0:0]", f"-A PREROUTING {action}", "COMMIT"]
    (table,) = xtables.parse("\n".join(lines), "iptables")
    return table


@pytest.mark.parametrize(
    ("action", "is_named"),
    [
        ("-p udp -m udp --dport 8285 -j DNAT --to-destination 172.17.0.2:8285", True),
        ("-d 192.0.2.1/32 -p udp -j REDIRECT --to-ports 53", True),
        ("-p udp -m udp --dport 53 -j REDIRECT --to-ports 8285", False),
        ("-p tcp -m tcp --dport 8285 -j REDIRECT --to-ports 1", False),
        ("! -i eth0 -p udp -j DNAT --to-destination 172.17.0.2", False),
        # Services of a cluster: packets between pods are not the port's.
        ("-s 10.5.1.0/24 -p tcp -j REDIRECT --to-ports 15001", False),
        ("-m statistic --mode random --probability 0.5 -j DNAT --to-destination 10.5.1.9", False),
    ],
)
async def test_what_diverts_the_tunnel_is_named(action: str, is_named: bool) -> None:
    found = await judged(to_port(action))
    assert [each.verdict for each in found] == [Verdict.WARN] * is_named
    for each in found:
        assert "diverts packets of the tunnel (UDP) from peers" in each.evidence
        command = "iptables -t nat -I PREROUTING 1 -p udp --dport 8285 -j ACCEPT"
        assert each.facts["command"] == command


def stops(table: Table, *packets: Packet) -> list[Stop]:
    passage = Passage()
    base = next(chain for chain in table.chains.values() if chain.hook == "forward")
    for each in packets:
        passage.through(table, base, each)
    return passage.stops


def forward(*rules: str, policy: str = "ACCEPT", chains: Sequence[str] = ()) -> Table:
    text = "\n".join(
        [
            "*filter",
            f":FORWARD {policy} [0:0]",
            *(f":{name} - [0:0]" for name in chains),
            *(f"-A {rule}" for rule in rules),
            "COMMIT",
        ]
    )
    (table,) = xtables.parse(text, "iptables")
    return table


@pytest.mark.parametrize(
    ("rules", "policy", "expected"),
    [
        ((), "DROP", [YES]),
        (("FORWARD -j ACCEPT",), "DROP", []),
        (("FORWARD -j DROP", "FORWARD -j ACCEPT"), "ACCEPT", [YES]),
        (("FORWARD -j ACCEPT", "FORWARD -j DROP"), "ACCEPT", []),
        (("FORWARD -i eth0 -j ACCEPT", "FORWARD -j DROP"), "ACCEPT", [YES]),
        (("FORWARD -s 10.5.2.7 -j ACCEPT", "FORWARD -j DROP"), "ACCEPT", [PART]),
        (("FORWARD -m set --match-set x src -j ACCEPT", "FORWARD -j DROP"), "ACCEPT", [UNKNOWN]),
        (("FORWARD -m set --match-set x src -j DROP", "FORWARD -j DROP"), "ACCEPT", [UNKNOWN, YES]),
        (("FORWARD -j A", "A -j RETURN", "FORWARD -j DROP"), "ACCEPT", [YES]),
        (("FORWARD -j A", "A -j ACCEPT", "FORWARD -j DROP"), "ACCEPT", []),
        (("FORWARD -j A", "A -j B", "B -j DROP"), "ACCEPT", [YES]),
        (("FORWARD -g A", "FORWARD -j ACCEPT"), "DROP", [YES]),
        (("FORWARD -j A", "A -g B", "A -j ACCEPT", "FORWARD -j DROP"), "ACCEPT", [YES]),
        (("FORWARD -i eth0 -j A", "A -j DROP"), "ACCEPT", []),
        (("FORWARD -j NFQUEUE --queue-num 1", "FORWARD -j DROP"), "ACCEPT", [UNKNOWN]),
        # Nobody can have set the mark; then somebody may have.
        (("FORWARD -m mark --mark 0x1/0x1 -j DROP",), "ACCEPT", []),
        (
            (
                "FORWARD -m set --match-set x src -j MARK --set-xmark 0x1/0x1",
                "FORWARD -m mark --mark 0x1/0x1 -j DROP",
            ),
            "ACCEPT",
            [UNKNOWN],
        ),
        (
            (
                "FORWARD -i eth0 -j MARK --set-xmark 0x1/0x1",
                "FORWARD -m mark --mark 0x1/0x1 -j DROP",
            ),
            "ACCEPT",
            [],
        ),
    ],
)
def test_a_way_through_chains(rules: tuple[str, ...], policy: str, expected: list[Match]) -> None:
    table = forward(*rules, policy=policy, chains=["A", "B"])
    assert [each.certainty for each in stops(table, packet())] == expected


async def judged(
    *tables: Table, scene: Scene = SCENE, pods: Sequence[str] = ("cni0",)
) -> list[Any]:
    rulesets = Rulesets(tables=list(tables))
    judged = firewall.judge(rulesets, scene, pods, {"cni0": ("veth1",)})
    return await firewall.findings(scene, judged)


async def test_one_rule_is_one_finding_with_a_command_for_each_way() -> None:
    (found,) = await judged(forward("FORWARD -i eth1 -j ACCEPT", "FORWARD -j REJECT"))
    assert found.verdict.value == "warn"
    assert "iptables table filter, rule 2 of FORWARD: -A FORWARD -j REJECT" in found.evidence
    assert found.facts["command"] == (
        "iptables -t filter -I FORWARD 2 -i flannel0 -j ACCEPT"
        " && iptables -t filter -I FORWARD 2 -o flannel0 -j ACCEPT"
    )


async def test_before_a_start_the_rules_a_start_makes_count() -> None:
    """FORWARD's policy is Docker's DROP on many hosts, and flannel's rules are there for it."""
    table = forward(policy="DROP")
    assert await judged(table) != []
    before = replace(SCENE, is_open=False)
    assert await judged(table, scene=before) == []
    assert await judged(table, scene=replace(before, accepts=False)) != []
    # But they come last.
    assert await judged(forward("FORWARD -j DROP"), scene=before) != []


async def test_policies_for_single_pods_are_notes() -> None:
    table = forward(
        "FORWARD -d 10.5.1.9/32 -j KUBE-POD-FW-X",
        "KUBE-POD-FW-X -m mark ! --mark 0x10000/0x10000 -j REJECT",
        chains=["KUBE-POD-FW-X"],
    )
    (found,) = await judged(table)
    assert (found.verdict.value, found.next_step) == ("note", "")


async def test_of_many_rules_the_number_is_told() -> None:
    rules = [f"FORWARD -s 10.5.2.{n} -j DROP" for n in range(20)]
    found = await judged(forward(*rules))
    assert len(found) == firewall.SHOWN + 1
    assert found[-1].evidence == f"{20 - firewall.SHOWN} more rules are, or may be, in the way"


def inputs(*rules: str) -> Table:
    text = "\n".join(["*filter", ":INPUT ACCEPT [0:0]", *(f"-A INPUT {rule}" for rule in rules)])
    (table,) = xtables.parse(f"{text}\nCOMMIT\n", "iptables")
    return table


@pytest.mark.parametrize(
    ("rule", "is_found"),
    [
        # A server's port is none that answers to this host come to.
        ("-p tcp -m tcp --dport 3306 -j REJECT --reject-with tcp-reset", False),
        ("-p udp -m udp --dport 8472 -j DROP", False),
        ("-p tcp -m multiport --dports 22,25,3306 -j DROP", False),
        ("-p tcp -m tcp --dport 1:1023 -j DROP", False),
        ("-p tcp -m tcp --sport 3306 -j DROP", True),
        ("-p tcp -m tcp --dport 1024:65535 -j DROP", True),
        ("-p tcp -m tcp ! --dport 22 -j DROP", True),
        ("-p udp -m udp --dport 8285 -j DROP", True),
    ],
)
async def test_a_closed_port_of_a_server_is_no_obstacle(rule: str, *, is_found: bool) -> None:
    assert bool(await judged(inputs(rule))) is is_found


def test_the_ports_of_clients_are_the_kernels(tmp_path: Path) -> None:
    (tmp_path / "range").write_text("20000\t20999\n")
    assert firewall.client_ports(tmp_path / "range") == (20000, 20999)
    assert firewall.client_ports(tmp_path / "none") == (32768, 60999)


def test_a_full_connection_table_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size is the whole machine's, so no namespace can be given a small one."""
    monkeypatch.setattr(sysctls, "ROOT", tmp_path)
    monkeypatch.setattr(sysctls, "namespace_counts", dict)
    (tmp_path / "netfilter").mkdir()
    (tmp_path / "netfilter/nf_conntrack_max").write_text("1000\n")
    for count, verdicts in ((940, []), (960, [Verdict.NOTE]), (1000, [Verdict.WARN])):
        (tmp_path / "netfilter/nf_conntrack_count").write_text(f"{count}\n")
        found = sysctls.findings(SCENE, [])
        assert [(each.id, each.verdict) for each in found] == [
            ("obstacle.conntrack", verdict) for verdict in verdicts
        ]


def test_a_connection_table_that_dropped_is_full_and_its_limit_is_set_where_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A namespace of its own has the limit to read (mode 0444), and none of its own."""
    monkeypatch.setattr(sysctls, "ROOT", tmp_path)
    monkeypatch.setattr(sysctls, "namespace_counts", lambda: {"nf_conntrack.drop": 7})
    (tmp_path / "netfilter").mkdir()
    limit = tmp_path / "netfilter/nf_conntrack_max"
    limit.write_text("1000\n")
    (tmp_path / "netfilter/nf_conntrack_count").write_text("998\n")
    (found,) = sysctls.findings(SCENE, [])
    assert found.verdict is Verdict.WARN
    assert "new connections are dropped (7 packets so far)" in found.evidence
    command = "sysctl -w net.netfilter.nf_conntrack_max=2000"
    assert found.facts == {"command": command}
    limit.chmod(0o444)
    (found,) = sysctls.findings(SCENE, [])
    assert found.facts == {"command": command, "on": "the host"}
    assert found.next_step.startswith(f"on the host: {command}")


def test_no_forwarding_makes_a_node_useless_only_if_it_has_pods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysctls, "ROOT", tmp_path)
    (tmp_path / "ipv4").mkdir()
    (tmp_path / "ipv4/ip_forward").write_text("0\n")
    for pods, verdict in (([], Verdict.WARN), (["cni0"], Verdict.FAIL)):
        (found,) = sysctls.findings(SCENE, pods)
        assert (found.id, found.verdict) == ("obstacle.forwarding", verdict)
