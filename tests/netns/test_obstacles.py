"""What stands in the way of packets is named, by `config check` and `readyz?verbose`.

Each obstacle is planted on node 2. A ping from pod 1 to pod 2 shows that it is one; the finding
names it; the command the finding gives makes the ping pass and the finding go.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from tests.loops import LOOPS, run_on
from tests.netns import rulesets
from tests.nodes import (
    HEALTH_PORT,
    OVERLAY,
    PORT,
    MakeOverlay,
    answers,
    log_contains,
    must_run,
)
from tests.stopped import stopped
from tests.wait import until
from tundp.finding import Finding, Verdict
from tundp.lab.lab import Host
from tundp.lab.overlay import LabNode, OverlayLab
from tundp.linux.netlink import Netlink
from tundp.linux.obstacles.look import Looked, look
from tundp.linux.obstacles.scene import PeerPlace, Scene

TUNDP = str(Path(sys.executable).parent / "tundp")


@dataclass(frozen=True)
class Obstacle:
    """A way to lose packets on node 2, and what is to be said of it."""

    plant: str
    """Shell; $POD is node 2's pod, $PEER node 1's subnet, $OWN node 2's."""
    undo: str
    words: tuple[str, ...]
    """All of them in the evidence."""
    finding: str = "obstacle.firewall"
    verdict: Verdict = Verdict.WARN
    forget: str = ""
    """Shell that makes the kernel forget connections it has diverted, after the command."""


FLUSH = "iptables -F; iptables -X; iptables -t raw -F; iptables -P INPUT ACCEPT"
UFW = """iptables-restore --noflush <<'END'
*filter
:INPUT DROP [0:0]
:ufw-before-input - [0:0]
:ufw-user-input - [0:0]
:ufw-not-local - [0:0]
:ufw-logging-deny - [0:0]
-A INPUT -j ufw-before-input
-A ufw-before-input -i lo -j ACCEPT
-A ufw-before-input -m conntrack --ctstate INVALID -j DROP
-A ufw-before-input -p icmp -m icmp --icmp-type 8 -j ACCEPT
-A ufw-before-input -j ufw-not-local
-A ufw-before-input -d 224.0.0.251/32 -p udp -m udp --dport 5353 -j ACCEPT
-A ufw-before-input -j ufw-user-input
-A ufw-not-local -m addrtype --dst-type LOCAL -j RETURN
-A ufw-not-local -m addrtype --dst-type MULTICAST -j RETURN
-A ufw-not-local -m limit --limit 3/min --limit-burst 10 -j ufw-logging-deny
-A ufw-not-local -j DROP
-A ufw-user-input -p tcp -m tcp --dport 22 -j ACCEPT
COMMIT
END
"""
DOCKER_29 = """nft -f - <<'END'
table ip docker-bridges {
  map filter-forward-in-jumps { type ifname : verdict; }
  chain filter-FORWARD {
    type filter hook forward priority 0; policy accept;
    oifname vmap @filter-forward-in-jumps
  }
  chain filter-forward-in__cni0 {
    ct state established,related counter accept
    iifname "cni0" counter accept comment "ICC"
    counter drop comment "UNPUBLISHED PORT DROP"
  }
}
add element ip docker-bridges filter-forward-in-jumps { "cni0" : jump filter-forward-in__cni0 }
END
"""
OBSTACLES = {
    "reject first in FORWARD": Obstacle(
        "iptables -I FORWARD -j REJECT --reject-with icmp-host-prohibited",
        "iptables -D FORWARD -j REJECT --reject-with icmp-host-prohibited",
        ("-A FORWARD -j REJECT", "drops packets from peers to pods", "from pods here to peers"),
    ),
    "reject in the legacy back end": Obstacle(
        "iptables-legacy -A FORWARD -i flannel0 -j REJECT",
        "iptables-legacy -F FORWARD",
        ("iptables-legacy table filter", "-A FORWARD -i flannel0 -j REJECT"),
    ),
    "another nft table": Obstacle(
        "nft 'table inet other { chain c { type filter hook forward priority -10;"
        ' iifname "flannel*" drop; }; }\'',
        "nft delete table inet other",
        ("nft table inet other, chain c", 'iifname "flannel*" drop'),
    ),
    "policy of an nft table": Obstacle(
        "nft 'table ip strict { chain c { type filter hook prerouting priority -200; policy drop;"
        ' iifname != "flannel0" accept; }; }\'',
        "nft delete table ip strict",
        ("policy drop of chain c",),
    ),
    "a set": Obstacle(
        "nft 'table ip banned { set s { type ipv4_addr; flags interval;"
        " elements = { 198.51.100.7, 10.5.0.0/16 }; }; chain c { type filter hook forward"
        " priority 0; ip saddr @s drop; }; }'",
        "nft delete table ip banned",
        ("ip saddr @s drop", "drops packets from peers"),
    ),
    "Docker 28, filter": Obstacle(
        "iptables -N DOCKER; iptables -N DOCKER-FORWARD; iptables -I FORWARD -j DOCKER-FORWARD;"
        "iptables -A DOCKER-FORWARD -o cni0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT;"
        "iptables -A DOCKER-FORWARD -o cni0 -j DOCKER;"
        "iptables -A DOCKER ! -i cni0 -o cni0 -j DROP",
        "iptables -D FORWARD -j DOCKER-FORWARD; iptables -F DOCKER-FORWARD; iptables -F DOCKER;"
        "iptables -X DOCKER-FORWARD; iptables -X DOCKER",
        ("-A DOCKER ! -i cni0 -o cni0 -j DROP", "first packets of a connection from peers"),
    ),
    "Docker 28, raw": Obstacle(
        "iptables -t raw -A PREROUTING -d $POD ! -i cni0 -j DROP",
        "iptables -t raw -F",
        ("table raw", "! -i cni0 -j DROP", "drops some of the packets from peers"),
    ),
    "Docker 29, nft": Obstacle(
        DOCKER_29,
        "nft delete table ip docker-bridges",
        ("docker-bridges", "UNPUBLISHED PORT DROP"),
    ),
    "INPUT drops our port": Obstacle(
        "iptables -A INPUT -p udp -m udp --dport 8285 -j DROP",
        "iptables -F INPUT",
        ("--dport 8285 -j DROP", "of the tunnel (UDP) from peers"),
    ),
    "INPUT accepts another port only": Obstacle(
        "iptables -A INPUT -i lo -j ACCEPT; iptables -A INPUT -p udp --dport 8472 -j ACCEPT;"
        "iptables -A INPUT -s 192.0.2.254 -j ACCEPT; iptables -P INPUT DROP",
        "iptables -P INPUT ACCEPT; iptables -F INPUT",
        ("policy drop of chain INPUT", "of the tunnel (UDP) from peers"),
    ),
    "ufw": Obstacle(
        UFW,
        "iptables -P INPUT ACCEPT; iptables -F INPUT; for c in before-input user-input not-local"
        " logging-deny; do iptables -F ufw-$c; done; for c in before-input user-input not-local"
        " logging-deny; do iptables -X ufw-$c; done",
        ("policy drop of chain INPUT",),
    ),
    "OUTPUT drops": Obstacle(
        "iptables -A OUTPUT -o eth0 -p udp -m multiport --dports 53,8000:8999 -j DROP",
        "iptables -F OUTPUT",
        ("8000:8999 -j DROP", "of the tunnel (UDP) to peers"),
    ),
    "a match nobody knows": Obstacle(
        "iptables -I FORWARD -m length --length 0:65535 -j DROP",
        "iptables -D FORWARD -m length --length 0:65535 -j DROP",
        ("-m length", "may drop"),
    ),
    "ip_forward": Obstacle(
        "sysctl -q -w net.ipv4.ip_forward=0",
        "sysctl -q -w net.ipv4.ip_forward=1",
        ("net.ipv4.ip_forward is 0",),
        "obstacle.forwarding",
        Verdict.FAIL,
    ),
    "forwarding of the device": Obstacle(
        "sysctl -q -w net.ipv4.conf.flannel0.forwarding=0",
        "sysctl -q -w net.ipv4.conf.flannel0.forwarding=1",
        ("forwarding is 0 on flannel0",),
        "obstacle.forwarding",
        Verdict.FAIL,
    ),
    "forwarding of the bridge": Obstacle(
        "sysctl -q -w net.ipv4.conf.cni0.forwarding=0",
        "sysctl -q -w net.ipv4.conf.cni0.forwarding=1",
        ("forwarding is 0 on cni0",),
        "obstacle.forwarding",
        Verdict.FAIL,
    ),
    "ip rule": Obstacle(
        "ip route add default via 192.0.2.254 table 100; ip rule add to 10.5.0.0/16 table 100"
        " priority 100",
        "ip rule del priority 1; ip rule del priority 100; ip route flush table 100",
        ("table 100 (ip rule)", "eth0"),
        "obstacle.route",
        Verdict.FAIL,
    ),
    "a blackhole route": Obstacle(
        "ip route add blackhole $PEER",
        "ip route del blackhole $PEER || true",
        ("blackhole",),
        "obstacle.route",
        Verdict.FAIL,
    ),
    "another overlay's device": Obstacle(
        "ip link add flannel.1 type vxlan id 1 dev eth0 dstport 8472; ip link set flannel.1 up;"
        "ip route add $PEER dev flannel.1",
        "ip link del flannel.1",
        ("flannel.1",),
        "obstacle.route",
        Verdict.FAIL,
    ),
}


async def sh(host: Host, script: str, **variables: str) -> None:
    done = await host.run("sh", "-c", script, environment=variables)
    assert done.returncode == 0, f"{script}: {done.stdout}{done.stderr}"


async def seen(overlay: OverlayLab, *, keeps_route: bool = False) -> list[Finding]:
    """What a look at node 2 finds, the summary last."""
    one, two = overlay.nodes[1], overlay.nodes[2]
    scene = Scene(
        network=OVERLAY,
        subnet=two.gateway.network,
        device="flannel0",
        is_open=True,
        is_tunnel=True,
        uplink="eth0",
        address=IPv4Address(two.public_ip),
        port=PORT,
        peers=(PeerPlace(one.gateway.network, IPv4Address(one.public_ip)),),
        peer_count=1,
        accepts=True,
        pid=two.daemon.pid,
        keeps_route=keeps_route,
    )

    async def ask() -> Looked:
        async with Netlink() as netlink:
            return await look(netlink, scene)

    looked = await two.host.call(lambda: run_on(LOOPS["asyncio"], ask()))
    return [*looked.findings, looked.summary]


async def check(node: LabNode) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and findings of `config check` about obstacles."""
    done = await node.host.run(
        *(TUNDP, "config", "check", "--json", f"--admin-socket={node.admin_socket}")
    )
    found = json.loads(done.stdout)
    return done.returncode, [each for each in found if each["id"].startswith("obstacle")]


async def pings(overlay: OverlayLab) -> bool:
    one, two = overlay.nodes[1], overlay.nodes[2]
    return await answers(one.pod, two.pod_address)


async def verbose(node: LabNode) -> tuple[int, str]:
    return await node.get(HEALTH_PORT, "/readyz?verbose")


async def settled(node: LabNode) -> bool:
    """Whether a look has been had, and found nothing."""
    _, text = await verbose(node)
    return "[+]obstacles ok: " in text and "[!]" not in text


async def test_each_obstacle_is_named_and_can_be_passed(make_overlay: MakeOverlay) -> None:
    await check_each(make_overlay, OBSTACLES)


async def check_each(make_overlay: MakeOverlay, obstacles: Mapping[str, Obstacle]) -> None:
    """Each is planted on the second node, loses the ping, is named, and its command mends it."""
    async with make_overlay(pods=True) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        variables = {
            "POD": two.pod_address,
            "PEER": str(one.gateway.network),
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        }
        await until(lambda: pings(overlay), "the overlay carries pings")
        found = await seen(overlay)
        assert [each.verdict for each in found] == [Verdict.OK], found
        failures = []
        for name, obstacle in obstacles.items():
            try:
                await sh(two.host, obstacle.plant, **variables)
                await named_and_passed(overlay, name, obstacle, variables)
            except AssertionError as error:
                failures.append(f"{name}: {error}")
            await sh(two.host, obstacle.undo, **variables)
            await until(lambda: pings(overlay), f"{name}: pings pass after the test's own undo")
        assert not failures, "\n".join(failures)


async def named_and_passed(
    overlay: OverlayLab, name: str, obstacle: Obstacle, variables: dict[str, str]
) -> None:
    """It keeps pings from passing, is named, and the command named lets them pass."""
    two = overlay.nodes[2]
    # The ping takes its time not to be answered.
    is_through, found = await asyncio.gather(pings(overlay), seen(overlay))
    assert not is_through, "this is no obstacle"
    named = [each for each in found if each.id == obstacle.finding]
    hits = [each for each in named if all(word in each.evidence for word in obstacle.words)]
    assert hits, f"not named in {found}"
    assert hits[0].verdict is obstacle.verdict, hits[0]
    command = hits[0].facts["command"]
    assert hits[0].next_step.startswith(command)
    await sh(two.host, command, **variables)
    if obstacle.forget:
        await sh(two.host, obstacle.forget)
    await until(lambda: pings(overlay), f"{command} helps")
    found = await seen(overlay)
    assert [each.verdict for each in found] == [Verdict.OK], found


async def test_a_strict_filter_is_a_note_and_a_loop_a_warning(make_overlay: MakeOverlay) -> None:
    async with make_overlay(pods=True) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await until(lambda: pings(overlay), "the overlay carries pings")

        async def pings_from_a_node() -> bool:
            argv = ("ping", "-c1", "-W1", "-I", one.public_ip, two.pod_address)
            return (await one.host.run(*argv)).returncode == 0

        assert await pings_from_a_node()
        await sh(two.host, "sysctl -q -w net.ipv4.conf.flannel0.rp_filter=1")
        assert not await pings_from_a_node(), "this is no obstacle"
        assert await pings(overlay), "pods are not concerned"
        (note, _) = await seen(overlay)
        assert (note.id, note.verdict) == ("obstacle.rp_filter", Verdict.NOTE)
        assert "rp_filter is 1 on flannel0" in note.evidence
        await sh(two.host, note.facts["command"])
        assert await pings_from_a_node()

        await sh(two.host, f"ip route add {one.public_ip} dev flannel0")
        (loop, *_) = await seen(overlay)
        assert (loop.id, loop.verdict) == ("obstacle.tunnel", Verdict.WARN)
        assert f"datagrams to {one.public_ip} would enter flannel0 again" in loop.evidence


async def test_before_a_start_the_check_names_what_will_be_in_the_way(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay(nodes=1, start=False) as overlay:
        one = overlay.nodes[1]
        # Rules of ours will accept what the policy drops, but come after the REJECT.
        await sh(one.host, "iptables -P FORWARD DROP; iptables -A INPUT -p udp -j DROP")
        argv = (TUNDP, "config", "check", "--json", "--iface=eth0", *overlay.store_flags)
        found = json.loads((await one.host.run(*argv)).stdout)
        (hit,) = [each for each in found if each["id"].startswith("obstacle.")]
        assert "-A INPUT -p udp -j DROP: drops packets of the tunnel (UDP)" in hit["evidence"]
        await sh(one.host, "iptables -F INPUT; iptables -A FORWARD -j REJECT")
        found = json.loads((await one.host.run(*argv)).stdout)
        (hit,) = [each for each in found if each["id"].startswith("obstacle.")]
        assert "-A FORWARD -j REJECT" in hit["evidence"]


CLEAN = {
    "kube-proxy": ("iptables-restore", rulesets.KUBE_PROXY),
    "kube-proxy, legacy": ("iptables-legacy-restore", rulesets.KUBE_PROXY),
    "Docker 27": ("iptables-restore", rulesets.DOCKER_27),
    "Docker 28 for others": ("iptables-restore", rulesets.DOCKER_28),
    "k3s": ("iptables-restore", rulesets.K3S),
    "kube-proxy, nft": ("nft -f -", rulesets.KUBE_PROXY_NFT),
    "firewalld with the device trusted": ("nft -f -", rulesets.FIREWALLD),
}


async def test_no_false_alarm(make_overlay: MakeOverlay) -> None:
    async with make_overlay("--iptables-forward-rules=false", pods=True) as overlay:
        two = overlay.nodes[2]
        await until(lambda: pings(overlay), "the overlay carries pings")
        for name, (program, rules) in CLEAN.items():
            await sh(two.host, f"{program} <<'END'\n{rules}END")
            assert await pings(overlay), f"{name}: this is an obstacle"
            found = await seen(overlay)
            assert [each.verdict for each in found] == [Verdict.OK], (name, found)
            await sh(
                two.host,
                "nft flush ruleset; for t in filter nat mangle raw; do"
                " printf '*%s\\nCOMMIT\\n' $t | iptables-legacy-restore; done;"
                " iptables-legacy -P FORWARD ACCEPT",
            )


async def test_the_daemons_own_missing_route_is_not_called_an_obstacle(
    make_overlay: MakeOverlay,
) -> None:
    """A route another program removes again and again is one fault, which has a name already."""
    async with make_overlay() as overlay:
        two = overlay.nodes[2]
        await until(partial(log_contains, two, "peer 10.5."), "a peer")
        with stopped(two.daemon.pid):
            await sh(two.host, "ip route del 10.5.0.0/16 dev flannel0")
            (fail, _) = await seen(overlay)
            assert (fail.id, fail.verdict) == ("obstacle.route", Verdict.FAIL)
            assert 'an "unreachable" route takes it' in fail.evidence
            (summary,) = await seen(overlay, keeps_route=True)
            assert summary.verdict is Verdict.OK
            # What is not its own it names, be its own there or not.
            peer = overlay.nodes[1].gateway.network
            await sh(two.host, "ip route add 10.5.0.0/16 dev flannel0")
            await sh(two.host, f"ip route add blackhole {peer}")
            (fail, *_) = await seen(overlay, keeps_route=True)
            assert 'a "blackhole" route takes it' in fail.evidence


async def test_the_daemon_and_the_check_tell(make_overlay: MakeOverlay) -> None:
    flags = (f"--healthz-port={HEALTH_PORT}",)
    async with make_overlay(*flags, pods=True) as overlay:
        two = overlay.nodes[2]
        await until(lambda: pings(overlay), "the overlay carries pings")
        await until(lambda: settled(two), "a look that finds nothing")

        async def tells(status: int, *words: str) -> bool:
            code, text = await verbose(two)
            return code == status and all(word in text for word in words)

        await sh(two.host, "iptables -I FORWARD -j REJECT")
        await until(
            lambda: tells(200, "[!]obstacle.firewall warning: ", "-A FORWARD -j REJECT"),
            "readyz names the rule, and the node stays ready",
        )
        code, found = await check(two)
        assert code == 0
        (hit,) = [each for each in found if each["id"] == "obstacle.firewall"]
        assert "-A FORWARD -j REJECT" in hit["evidence"]
        status = await must_run(two.host, TUNDP, "status", f"--admin-socket={two.admin_socket}")
        assert "warn: obstacle.firewall: iptables table filter, rule 1 of FORWARD" in status
        await sh(two.host, "iptables -D FORWARD -j REJECT")
        await until(lambda: settled(two), "the finding goes with the rule")
        await until(
            lambda: "no longer in the way: iptables table filter" in two.log_path.read_text()
        )

        # What the daemon gave up the right to read is not called fine. Nobody reports such tables.
        await sh(
            two.host, "iptables-legacy -A FORWARD -i flannel0 -j DROP; ip rule add from 203.0.113.1"
        )
        await until(
            lambda: tells(200, "[?]obstacles unknown: ", "legacy iptables (filter), for lack of"),
            "readyz says what was not looked at",
        )
        assert any("legacy table filter" in each["evidence"] for each in (await check(two))[1])
        await sh(two.host, "iptables-legacy -F FORWARD")

        # Nothing at all passes: whoever rolls out nodes one by one must stop here. The kernel
        # reports a rule, and no switch.
        await sh(two.host, "sysctl -q -w net.ipv4.ip_forward=0; ip rule add from 203.0.113.2")
        await until(
            lambda: tells(503, "[-]obstacle.forwarding failed: net.ipv4.ip_forward is 0"),
            "readyz fails",
        )
        code, found = await check(two)
        assert code == 1
        assert "sysctl -w net.ipv4.ip_forward=1" in found[0]["next_step"]
