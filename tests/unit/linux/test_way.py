"""One packet's way through listed rules: which one drops, accepts, rewrites; by which port."""

from __future__ import annotations

import asyncio
import struct
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from tundp.linux.netlink import Netlink
from tundp.linux.obstacles import firewall, nft, remedy, sysctls, xtables
from tundp.linux.obstacles.packet import Packet, range_at
from tundp.linux.obstacles.rules import Table
from tundp.linux.obstacles.scene import Scene
from tundp.linux.obstacles.way import Effect, Walked, Way, connections, decode_neighbour

SCENE = Scene(
    network=IPv4Network("10.5.0.0/16"),
    subnet=IPv4Network("10.5.1.0/24"),
    device="flannel0",
    is_open=True,
    is_tunnel=True,
    uplink="eth0",
    address=IPv4Address("192.0.2.1"),
    port=8285,
    peers=(),
    peer_count=1,
    accepts=True,
)
FLANNEL = """*nat
:PREROUTING ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:FLANNEL-POSTRTG - [0:0]
-A POSTROUTING -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -s 10.5.1.0/24 -d 10.5.0.0/16 -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 -d 10.5.1.0/24 -j RETURN
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.1.0/24 -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.0.0/16 -j MASQUERADE --random-fully
COMMIT
"""


def filtering(*rules: str, policy: str = "ACCEPT", table: str = "filter") -> str:
    lines = "".join(f"-A FORWARD {rule}\n" for rule in rules)
    return f"*{table}\n:FORWARD {policy} [0:0]\n{lines}COMMIT\n"


def packets(
    proto: str = "tcp",
    *,
    port: int | None = 443,
    source: str = "10.5.1.2",
    destination: str = "10.5.2.3",
    states: tuple[str, ...] = ("new", "established"),
) -> list[Packet]:
    return [
        Packet(
            proto=proto,
            state=state,
            src=(range_at(IPv4Address(source)),),
            dst=(range_at(IPv4Address(destination)),),
            iif=("cni0",),
            oif=("flannel0",),
            port=port,
            is_port_of_destination=True,
        )
        for state in states
    ]


def walk(tables: list[Table], sent: list[Packet]) -> Walked:
    way = Way(Netlink.__new__(Netlink))  # nothing is asked of the kernel
    way.tables = tables
    return asyncio.run(way.walk(firewall.THROUGH, sent, remedy.from_pods(SCENE), SCENE))


def walk_rules(text: str, sent: list[Packet] | None = None) -> Walked:
    return walk(xtables.parse(text, "iptables"), packets() if sent is None else sent)


@pytest.mark.parametrize(
    ("rule", "effects", "ends"),
    [
        ("-j DROP", [Effect.DROPS], True),
        ("-p tcp -m tcp --dport 443 -j REJECT", [Effect.DROPS], True),
        ("-p tcp -m tcp --dport 80 -j DROP", [], False),
        # The source port is the sender's choice: of some packets only.
        ("-p tcp -m tcp --sport 443 -j DROP", [Effect.DROPS], False),
        ("-p tcp -m multiport --ports 443 -j DROP", [Effect.DROPS], True),
        ("-p tcp -m multiport --ports 80 -j DROP", [Effect.DROPS], False),
        ("-p udp -j DROP", [], False),
        ("-i docker0 -j DROP", [], False),
        ("-m string --string x --algo bm -j DROP", [Effect.MAY_DROP], False),
        ("-j ACCEPT", [Effect.ACCEPTS], False),
        ("-j NFQUEUE --queue-num 0", [Effect.MAY_DROP], False),
    ],
)
def test_what_one_rule_does(rule: str, effects: list[Effect], ends: bool) -> None:
    found = walk_rules(filtering(rule))
    assert [each.effect for each in found.met] == effects
    assert (("tcp", "new") in found.ended) == ends
    assert bool(found.left) != ends


def test_a_drop_ends_the_way_and_has_its_command() -> None:
    found = walk_rules(filtering("-s 10.5.1.2 -j ACCEPT", "-j DROP") + filtering("-j DROP"))
    # Two tables of one name are read in order: an accept ends its own base chain only.
    assert [(each.effect, each.where) for each in found.met] == [
        (
            Effect.ACCEPTS,
            "iptables table filter, rule 1 of FORWARD: -A FORWARD -s 10.5.1.2 -j ACCEPT",
        ),
        (Effect.DROPS, "iptables table filter, rule 1 of FORWARD: -A FORWARD -j DROP"),
    ]
    assert found.met[1].command == "iptables -t filter -I FORWARD 1 -o flannel0 -j ACCEPT"
    assert found.chains == 2
    again = walk_rules(filtering("-j DROP", table="mangle") + filtering("-j DROP"))
    assert len(again.met) == 1, "behind a drop there is nothing"


def test_a_policy_is_named() -> None:
    (met,) = walk_rules(filtering(policy="DROP")).met
    assert met.where == "iptables table filter, policy drop of chain FORWARD"
    assert met.is_sure


def test_later_packets_are_told_apart() -> None:
    found = walk_rules(filtering("-m conntrack --ctstate ESTABLISHED -j DROP"))
    assert [each.kinds for each in found.met] == ["later packets of a connection"]
    assert found.ended == {("tcp", "established")}


@pytest.mark.parametrize(
    ("source", "destination", "is_applied"),
    [
        ("10.5.1.2", "10.5.2.3", False),
        ("10.5.2.3", "10.5.1.2", False),
        ("10.5.1.2", "203.0.113.1", True),
        ("203.0.113.1", "10.5.2.3", True),
        ("203.0.113.1", "10.5.1.2", False),
    ],
)
def test_masquerade(source: str, destination: str, is_applied: bool) -> None:
    sent = packets(source=source, destination=destination)
    found = walk_rules(FLANNEL, sent)
    rewrites = [each for each in found.met if each.effect is Effect.REWRITES]
    assert bool(rewrites) == is_applied
    # Only the first packet of a connection meets the table, for all of the connection.
    assert all(each.kinds == "" for each in rewrites)
    untracked = "*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -j NOTRACK\nCOMMIT\n"
    assert not walk_rules(untracked + FLANNEL, sent).met


def test_nft_masquerade_and_source_port() -> None:
    tables = nft.parse(NFT)
    found = walk(tables, packets(states=("new",)))
    assert [(each.effect, each.is_sure) for each in found.met] == [
        (Effect.DROPS, False),
        (Effect.REWRITES, True),
    ]


NFT = """{"nftables": [
{"table": {"family": "ip", "name": "t", "handle": 1}},
{"chain": {"family": "ip", "table": "t", "name": "f", "handle": 1, "type": "filter",
 "hook": "forward", "prio": 0, "policy": "accept"}},
{"chain": {"family": "ip", "table": "t", "name": "p", "handle": 2, "type": "nat",
 "hook": "postrouting", "prio": 100, "policy": "accept"}},
{"rule": {"family": "ip", "table": "t", "chain": "f", "handle": 3, "expr": [
 {"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "sport"}}, "right": 443}},
 {"drop": null}]}},
{"rule": {"family": "ip", "table": "t", "chain": "p", "handle": 4, "expr": [
 {"masquerade": null}]}}
]}"""


@pytest.mark.parametrize(("count", "verdicts"), [(10, []), (97, ["note"]), (100, ["warn"])])
def test_a_full_connection_table_is_found(
    count: int, verdicts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netfilter").mkdir()
    (tmp_path / "netfilter" / "nf_conntrack_count").write_text(f"{count}\n")
    (tmp_path / "netfilter" / "nf_conntrack_max").write_text("100\n")
    monkeypatch.setattr(sysctls, "ROOT", tmp_path)
    monkeypatch.setattr(sysctls, "namespace_counts", dict)
    assert [each.verdict.value for each in connections(SCENE)] == verdicts


def test_a_neighbour_is_decoded() -> None:
    # linux/neighbour.h: struct ndmsg, then attributes of 4-byte headers, padded to 4.
    head = struct.pack("=BxxxiHBB", 2, 7, 0x02, 0, 1)
    address = struct.pack("=HH4s", 8, 1, bytes((192, 0, 2, 9)))
    link = struct.pack("=HH6sxx", 10, 2, bytes.fromhex("020000000001"))
    found = decode_neighbour(memoryview(head + address + link))
    assert found is not None
    assert (found.index, str(found.address), found.state) == (7, "192.0.2.9", "reachable")
    assert found.link_address == "02:00:00:00:00:01"
    assert decode_neighbour(memoryview(struct.pack("=BxxxiHBB", 10, 7, 2, 0, 1))) is None
