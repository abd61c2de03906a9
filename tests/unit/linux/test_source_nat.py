"""Which rules of source NAT packets from pod to pod meet, and what exempts them."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest

from tundp.linux.obstacles import nft, source_nat, xtables
from tundp.linux.obstacles.packet import Match
from tundp.linux.obstacles.scene import PeerPlace, Scene

SCENE = Scene(
    network=IPv4Network("10.5.0.0/16"),
    subnet=IPv4Network("10.5.7.0/24"),
    device="flannel0",
    is_open=True,
    is_tunnel=True,
    uplink="eth0",
    address=IPv4Address("192.0.2.1"),
    port=8285,
    peers=(PeerPlace(IPv4Network("10.5.2.0/24"), IPv4Address("192.0.2.2")),),
    peer_count=1,
    accepts=False,
)
FLANNEL = """\
-A POSTROUTING -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -j RETURN
-A FLANNEL-POSTRTG -s 10.5.7.0/24 -d 10.5.0.0/16 -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 -d 10.5.7.0/24 -j RETURN
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.7.0/24 -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.0.0/16 -j MASQUERADE --random-fully
"""
KUBE_PROXY = """\
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -j MASQUERADE
"""


async def hidden(rules: str, chains: str = "") -> list[tuple[str, str]]:
    """Evidence and command of each finding, of rules of iptables' table nat."""
    text = f"*nat\n:POSTROUTING ACCEPT [0:0]\n{chains}{rules}COMMIT\n"
    tables = xtables.parse(text, "iptables")
    found = await source_nat.findings(tables, SCENE, ["cni0"])
    assert {each.id for each in found} <= {source_nat.ID}
    return [(each.evidence, each.facts["command"]) for each in found]


@pytest.mark.parametrize(
    ("rules", "ways"),
    [
        ("-A POSTROUTING -s 10.5.7.0/24 ! -o cni0 -j MASQUERADE", "from pods here to peers"),
        ("-A POSTROUTING -s 10.5.7.0/24 -j SNAT --to-source 192.0.2.1", "from pods here to peers"),
        ("-A POSTROUTING -o cni0 -j MASQUERADE", "from peers to pods here"),
        ("-A POSTROUTING -p tcp -o flannel0 -j MASQUERADE", "from pods here to peers"),
        ("-A POSTROUTING -d 10.5.2.0/24 -j MASQUERADE", "from pods here to peers"),
    ],
)
async def test_a_rule_that_hides_pods_from_pods_is_found(rules: str, ways: str) -> None:
    ((evidence, command),) = await hidden(f"-A POSTROUTING -d 203.0.113.9 -j RETURN\n{rules}\n")
    assert f"rule 2 of POSTROUTING: {rules}" in evidence
    assert f"gives packets {ways} another source address" in evidence
    assert command == ("iptables -t nat -I POSTROUTING 2 -s 10.5.0.0/16 -d 10.5.0.0/16 -j ACCEPT")


async def test_both_ways_are_told_of_one_rule() -> None:
    ((evidence, _),) = await hidden("-A POSTROUTING -j MASQUERADE\n")
    assert "gives packets from peers to pods here and from pods here to peers another" in evidence


@pytest.mark.parametrize(
    ("rules", "chains"),
    [
        ("-A POSTROUTING -s 10.5.7.0/24 ! -d 10.5.0.0/16 -j MASQUERADE\n", ""),
        ("-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE\n", ""),
        ("-A POSTROUTING -o eth0 -j MASQUERADE\n", ""),
        ("-A POSTROUTING -m mark --mark 0x1 -j MASQUERADE\n", ""),
        ("-A POSTROUTING -m nobody --knows this -j MASQUERADE\n", ""),
        (FLANNEL, ":FLANNEL-POSTRTG - [0:0]\n"),
        (KUBE_PROXY, ":KUBE-POSTROUTING - [0:0]\n"),
        ("-A POSTROUTING -d 10.5.0.0/16 -j ACCEPT\n-A POSTROUTING -j MASQUERADE\n", ""),
    ],
)
async def test_rules_for_others_are_none(rules: str, chains: str) -> None:
    assert await hidden(rules, chains) == []


async def test_the_command_found_ends_it() -> None:
    rule = "-A POSTROUTING -o flannel0 -j MASQUERADE\n"
    ((_, command),) = await hidden(rule)
    inserted = command.removeprefix("iptables -t nat -I POSTROUTING 1 ")
    assert inserted != command
    assert await hidden(f"-A POSTROUTING {inserted}\n{rule}") == []


async def test_of_nft_too() -> None:
    listed = """{"nftables": [{"table": {"family": "ip", "name": "t"}},
 {"chain": {"family": "ip", "table": "t", "name": "p", "type": "nat", "hook": "postrouting",
  "prio": 100, "policy": "accept"}},
 {"rule": {"family": "ip", "table": "t", "chain": "p", "handle": 4, "expr": [
  {"match": {"op": "==", "left": {"meta": {"key": "oifname"}}, "right": "flannel0"}},
  {"masquerade": null}]}}]}"""
    (found,) = await source_nat.findings(nft.parse(listed), SCENE, ["cni0"])
    assert found.facts["command"] == (
        "nft 'insert rule ip t p position 4 ip saddr 10.5.0.0/16 ip daddr 10.5.0.0/16 accept'"
    )


# Packets to addresses outside


@pytest.mark.parametrize(
    ("rules", "certainty"),
    [
        ("-A POSTROUTING -s 10.5.7.0/24 ! -d 10.5.0.0/16 -j MASQUERADE", Match.YES),
        ("-A POSTROUTING -j MASQUERADE", Match.YES),
        ("-A POSTROUTING -o eth0 -j MASQUERADE", Match.YES),
        ("-A POSTROUTING -s 10.0.0.0/8 -j SNAT --to-source 192.0.2.1", Match.YES),
        (":X - [0:0]\n-A X -j MASQUERADE\n-A POSTROUTING -s 10.5.0.0/16 -j X", Match.YES),
        ("-A POSTROUTING -d 10.0.0.0/8 -j RETURN\n-A POSTROUTING -j MASQUERADE", Match.YES),
        # Of others, or of nobody: a chain that no base chain jumps to.
        ("-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE", Match.NO),
        ("-A POSTROUTING -o wlan0 -j MASQUERADE", Match.NO),
        ("-A POSTROUTING ! -s 10.5.0.0/16 -j MASQUERADE", Match.NO),
        ("-A POSTROUTING -s 10.5.7.0/24 -d 10.5.0.0/16 -j MASQUERADE", Match.NO),
        ("-A POSTROUTING -m comment --comment masquerade -j ACCEPT", Match.NO),
        ("-A POSTROUTING -s 10.5.0.0/16 -j ACCEPT\n-A POSTROUTING -j MASQUERADE", Match.NO),
        (":X - [0:0]\n-A X -s 10.5.0.0/16 -j MASQUERADE", Match.NO),
        ("-A POSTROUTING -s 10.5.7.9/32 -j MASQUERADE", Match.PART),
        ("-A POSTROUTING -p tcp -j MASQUERADE", Match.PART),
        ("-A POSTROUTING -m helper --helper ftp -j MASQUERADE", Match.UNKNOWN),
    ],
)
def test_whether_what_pods_send_outside_is_masqueraded(rules: str, certainty: Match) -> None:
    text = f"*nat\n:POSTROUTING ACCEPT [0:0]\n{rules}\nCOMMIT\n"
    found = source_nat.outwards(xtables.parse(text, "iptables"), SCENE, ["cni0"], ["eth0"])
    assert found.certainty is certainty
    assert (found.stop is None) is (certainty is Match.NO)


def test_kube_proxy_masquerades_what_it_marks_and_not_what_pods_send_outside() -> None:
    chains = ":POSTROUTING ACCEPT [0:0]\n:KUBE-POSTROUTING - [0:0]\n"
    alone = source_nat.outwards(
        xtables.parse(f"*nat\n{chains}{KUBE_PROXY}COMMIT\n", "iptables"), SCENE, ["cni0"], ["eth0"]
    )
    assert alone == source_nat.Outwards(Match.NO)
    services = (
        f"*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-MARK-MASQ - [0:0]\n{chains}"
        "-A PREROUTING -d 192.0.2.1/32 -p tcp -m tcp --dport 30080 -j KUBE-MARK-MASQ\n"
        f"-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n{KUBE_PROXY}COMMIT\n"
    )
    marked = source_nat.outwards(xtables.parse(services, "iptables"), SCENE, ["cni0"], ["eth0"])
    assert marked.certainty is Match.NO
    assert marked.by_mark is not None
    assert marked.by_mark.chain.name == "KUBE-POSTROUTING"


async def test_the_name_of_a_chain_is_quoted() -> None:
    rules = "-A POSTROUTING -j X;reboot\n-A X;reboot -s 10.5.7.0/24 -j MASQUERADE\n"
    ((_, command),) = await hidden(rules, ":X;reboot - [0:0]\n")
    assert " -I 'X;reboot' 1 " in command
