"""Obstacles below, beside and behind the rules: BPF programs, bridges, neighbours, NAT, queues.

As in test_obstacles.py: each is planted on node 2, a ping from pod 1 to pod 2 shows that it is
one, the finding names it, and the command of the finding lets the ping pass.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tests.bpf
import tests.conntrack
from tests.netns.test_obstacles import Obstacle, check_each, pings, seen, sh
from tests.nodes import MakeOverlay
from tests.wait import until
from tundp.finding import Verdict
from tundp.linux.command import SYSTEM_PATH
from tundp.linux.obstacles.scene import NOT_JUDGED

BPF = f"{shlex.quote(sys.executable)} {shlex.quote(str(Path(tests.bpf.__file__)))}"
NOTE = Verdict.NOTE
FORGET = f"{shlex.quote(sys.executable)} {shlex.quote(tests.conntrack.__file__)} flush"
"""Only the first packet of a connection asks the rules of NAT: the next one is such a first."""
PROGRAMS = {
    "XDP, generic": Obstacle(
        f"{BPF} xdp eth0 skb",
        "ip link set dev eth0 xdpgeneric off",
        ("XDP", "eth0"),
        "obstacle.xdp",
        NOTE,
    ),
    "XDP, by the driver": Obstacle(
        f"{BPF} xdp eth0 drv",
        "ip link set dev eth0 xdpdrv off",
        ("XDP", "eth0"),
        "obstacle.xdp",
        NOTE,
    ),
    "XDP on the TUN": Obstacle(
        f"{BPF} xdp flannel0 skb",
        "ip link set dev flannel0 xdpgeneric off",
        ("XDP", "flannel0"),
        "obstacle.xdp",
        NOTE,
    ),
}
BRIDGES = {
    "a bridge table, forward": Obstacle(
        "nft 'table bridge guard { chain c { type filter hook input priority 0;"
        " ip saddr 10.5.0.0/16 drop; }; }'",
        "nft delete table bridge guard",
        ("nft table bridge guard, chain c", "10.5.0.0/16 drop", "from pods here to peers"),
    ),
    "policy of a bridge table": Obstacle(
        "nft 'table bridge guard { chain c { type filter hook output priority 0; policy drop;"
        " ip daddr 203.0.113.7 accept; }; }'",
        "nft delete table bridge guard",
        ("nft table bridge guard, policy drop of chain c", "from peers to pods here"),
    ),
    "ebtables": Obstacle(
        "ebtables -A INPUT -p IPv4 --ip-proto icmp -j DROP",
        "nft delete table bridge filter",
        ("nft table bridge filter", "INPUT"),
    ),
}
ROUTES = {
    "a policy rule for the tunnel's port": Obstacle(
        "ip rule add ipproto udp dport 8285 prohibit priority 50",
        "ip rule del priority 1 || true; ip rule del priority 50",
        ("datagrams to 192.0.2.1", "prohibit"),
        "obstacle.tunnel",
    ),
    "a policy rule for what comes in by the TUN": Obstacle(
        "ip rule add iif flannel0 blackhole priority 50",
        "ip rule del priority 1 || true; ip rule del priority 50",
        ("packets from",),
        "obstacle.route",
    ),
    "a VPN's rules: everything but its own mark": Obstacle(
        "ip route add blackhole default table 51820; ip rule add not fwmark 0xca6c table 51820"
        " priority 60; ip rule add table main suppress_prefixlength 16 priority 59",
        "ip rule del priority 1 || true; ip rule del priority 60; ip rule del priority 59;"
        "ip route flush table 51820",
        ("do not go through flannel0", "blackhole"),
        "obstacle.route",
        Verdict.FAIL,
    ),
    "the kernel's rule for main deleted by a network manager": Obstacle(
        "ip rule del priority 32766",
        "ip rule add priority 32766 lookup main || true",
        ("no policy rule leads every packet to the table main",),
        "obstacle.route",
    ),
    "the kernel's rule for local deleted by a network manager": Obstacle(
        "ip rule del priority 0",
        "ip rule add priority 0 lookup local || true",
        ("no policy rule leads every packet to the table local",),
        "obstacle.route",
    ),
    "IPsec that blocks what no policy is for": Obstacle(
        "ip xfrm policy setdefault fwd block",
        "ip xfrm policy setdefault fwd accept",
        ("IPsec", "fwd"),
        "obstacle.ipsec",
    ),
    "ARP that is dropped": Obstacle(
        "nft 'table arp guard { chain c { type filter hook input priority 0; policy drop; }; }';"
        " ip neigh flush dev eth0; ip neigh flush dev cni0",
        "nft delete table arp guard",
        ("arp guard",),
        "obstacle.firewall",
    ),
    "a neighbour's address that is fixed and wrong": Obstacle(
        "ip neigh replace 192.0.2.1 lladdr 02:00:00:00:00:99 nud permanent dev eth0",
        "ip neigh del 192.0.2.1 dev eth0 || true",
        ("192.0.2.1", "02:00:00:00:00:99"),
        "obstacle.neighbour",
        NOTE,
    ),
}
NAT = {
    "a published port that is ours": Obstacle(
        "iptables -t nat -A PREROUTING -p udp -m udp --dport 8285"
        f" -j DNAT --to-destination 172.17.0.2:8285; {FORGET}",
        f"iptables -t nat -F PREROUTING; {FORGET}",
        ("--dport 8285 -j DNAT", "diverts", "of the tunnel (UDP) from peers"),
        forget=FORGET,
    ),
    "a transparent proxy, nft": Obstacle(
        "nft 'table ip proxy { chain p { type nat hook prerouting priority -100;"
        f" meta l4proto udp redirect to :9; }}; }}'; {FORGET}",
        f"nft delete table ip proxy || true; {FORGET}",
        ("redirect to :9", "diverts"),
        forget=FORGET,
    ),
    "a transparent proxy, TPROXY": Obstacle(
        "iptables -t mangle -A PREROUTING -p udp -m udp --dport 8285 -j TPROXY --on-port 99",
        "iptables -t mangle -F PREROUTING",
        ("-j TPROXY", "diverts packets of the tunnel (UDP) from peers"),
    ),
    "packets of root": Obstacle(
        "iptables -A OUTPUT -p udp -m owner --uid-owner 0 -j DROP",
        "iptables -F OUTPUT",
        ("--uid-owner 0 -j DROP", "may drop packets of the tunnel (UDP) to peers"),
    ),
    "what came without IPsec": Obstacle(
        "iptables -I FORWARD -i flannel0 -m policy --dir in --pol none -j DROP",
        "iptables -D FORWARD -i flannel0 -m policy --dir in --pol none -j DROP",
        ("--pol none -j DROP", "may drop packets from peers to pods here"),
    ),
    "a queue that lets nothing through": Obstacle(
        "tc qdisc replace dev flannel0 root pfifo limit 0",
        "tc qdisc del dev flannel0 root || true",
        ("flannel0", "pfifo"),
        "obstacle.tc",
    ),
    "a rule with nobody to ask": Obstacle(
        "iptables -I FORWARD -i flannel0 -j NFQUEUE --queue-num 77",
        "iptables -D FORWARD -i flannel0 -j NFQUEUE --queue-num 77",
        ("NFQUEUE", "may drop"),
    ),
}


async def test_programs_of_the_kernel(make_overlay: MakeOverlay) -> None:
    await check_each(make_overlay, PROGRAMS)


async def test_bridges(make_overlay: MakeOverlay) -> None:
    await check_each(make_overlay, BRIDGES)


async def test_routes_and_neighbours(make_overlay: MakeOverlay) -> None:
    await check_each(make_overlay, ROUTES)


async def test_nat_and_queues(make_overlay: MakeOverlay) -> None:
    await check_each(make_overlay, NAT)


async def test_programs_that_only_bpftool_detaches(make_overlay: MakeOverlay) -> None:
    """There is no bpftool here: what it would do is done by bpf(2)."""
    async with make_overlay(pods=True) as overlay:
        two = overlay.nodes[2]
        await until(lambda: pings(overlay), "the overlay carries pings")
        kept = two.log_path.parent / "kept"
        cases = {
            f"{BPF} tcx eth0 ingress": (
                f"{BPF} tcx-off eth0 ingress $ID",
                r"BPF program (\d+) of tcx on eth0 \(ingress\)",
                r"bpftool net detach tcx_ingress id ID dev eth0",
            ),
            f"{BPF} tcx flannel0 egress {kept}": (
                f"kill $(cat {kept})",
                r"BPF program \d+ of tcx on flannel0 \(egress\)",
                r"bpftool link detach id \d+",
            ),
            f"{BPF} sk_lookup {kept}": (
                f"kill $(cat {kept})",
                r"BPF program \d+ of sk_lookup in this network namespace",
                r"bpftool link  names the link of type netns",
            ),
            f"{BPF} xdp cni0 link:{kept}": (
                f"kill $(cat {kept})",
                r"an XDP program is attached to cni0",
                r"ip link set dev cni0 xdpgeneric off .*by a link: end that program",
            ),
        }
        for plant, (undo, evidence, step) in cases.items():
            number = "0"
            try:
                await sh(two.host, plant)
                assert not await pings(overlay), f"{plant}: this is no obstacle"
                found = await seen(overlay)
                (hit, summary) = found
                match = re.search(evidence, hit.evidence)
                assert match, found
                number = match[1] if match.lastindex else number
                assert re.match(step.replace("ID", number), hit.next_step), hit
                assert (hit.verdict, hit.meaning) == (NOTE, NOT_JUDGED)
                assert "1 that nobody can judge from outside" in summary.evidence
            finally:
                await sh(two.host, undo, ID=number, PATH=SYSTEM_PATH)
            await until(lambda: pings(overlay), f"{undo} ends it")
            assert [each.verdict for each in await seen(overlay)] == [Verdict.OK]


class ControlGroup:
    """One of version 2 that this process is in until it leaves; its children stay."""

    def __init__(self) -> None:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
        top = next((Path(words[1]) for words in mounts if words[2] == "cgroup2"), None)
        if top is None:
            pytest.skip("no control groups of version 2 are mounted here")
        own = Path("/proc/self/cgroup").read_text().split("0::/")[1].strip()
        self._before = top / own
        self.path = top / f"tundp-test-{os.getpid()}"
        self.path.mkdir()

    def join(self) -> None:
        (self.path / "cgroup.procs").write_text(f"{os.getpid()}\n")

    def leave(self) -> None:
        (self._before / "cgroup.procs").write_text(f"{os.getpid()}\n")


@pytest.fixture
def group() -> Iterator[ControlGroup]:
    made = ControlGroup()
    made.join()
    yield made
    made.leave()
    made.path.rmdir()


@pytest.mark.parametrize("way", ["egress", "ingress"])
async def test_a_program_of_the_daemons_control_group(
    make_overlay: MakeOverlay, group: ControlGroup, way: str
) -> None:
    """As systemd attaches for IPAddressDeny=; a socket is in the group it was made in."""
    async with make_overlay(pods=True) as overlay:
        group.leave()
        two = overlay.nodes[2]
        await until(lambda: pings(overlay), "the overlay carries pings")
        assert [each.verdict for each in await seen(overlay)] == [Verdict.OK]
        await sh(two.host, f"{BPF} cgroup {group.path} {way}")
        assert not await pings(overlay), "this is no obstacle"
        hit, summary = await seen(overlay)
        assert (hit.id, hit.verdict, hit.meaning) == ("obstacle.bpf", NOTE, NOT_JUDGED)
        assert f"of the control group {group.path} ({way}) may drop" in hit.evidence
        command = hit.facts["command"]
        assert re.fullmatch(rf"bpftool cgroup detach {group.path} {way} id \d+", command)
        assert "IPAddressDeny=" in hit.next_step
        assert "of control groups" in summary.evidence
        await sh(two.host, f"{BPF} cgroup-off {group.path} {way} {command.split()[-1]}")
        await until(lambda: pings(overlay), "without the program they pass")
        assert [each.verdict for each in await seen(overlay)] == [Verdict.OK]


async def test_an_uplink_in_a_vrf(make_overlay: MakeOverlay) -> None:
    async with make_overlay(pods=True) as overlay:
        two = overlay.nodes[2]
        if (await two.host.run("ip", "link", "add", "red", "type", "vrf", "table", "7")).returncode:
            pytest.skip("this kernel has no VRFs (CONFIG_NET_VRF)")
        await until(lambda: pings(overlay), "the overlay carries pings")
        await sh(two.host, "ip link set red up; ip link set eth0 master red")
        (hit,) = [each for each in await seen(overlay) if each.id == "obstacle.vrf"]
        assert "eth0 belongs to the VRF red" in hit.evidence
        await sh(two.host, hit.facts["command"])
        await until(lambda: pings(overlay), "the command lets them pass")
