"""What `tundp explain` says of a packet, and what becomes of the same packet once it is sent.

Each case plants something, asks, and then sends the packet: by a raw socket at its source, looked
for by a raw socket at its destination. That, and nothing of the product, decides who is right.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from tests.loops import LOOPS, run_on
from tests.nodes import MakeOverlay, answers, must_run
from tests.packets import DF, SYN, icmp_echo, tcp, udp
from tests.wait import until
from tundp.daemon.explain import explain_packet
from tundp.daemon.known_leases import known_leases
from tundp.lab.lab import Host
from tundp.lab.overlay import STORE_ADDRESS, LabNode, OverlayLab
from tundp.lab.traffic import ping
from tundp.linux.netlink import Netlink
from tundp.observe.explain.model import Explanation, Question, Ruling, Step, Verdict
from tundp.settings.settings import Settings

TUNDP = str(Path(sys.executable).parent / "tundp")
GONE_S = 0.4
"""How long a packet is waited for that must not come."""
STRANGER = "203.0.113.7"
"""An address of node 1 in no lease, and of no underlay."""
UNLEASED = "10.5.250.9"
REFUSED_SUBNET = "10.5.251.0-24"
PROTOCOLS = {
    "icmp": socket.IPPROTO_ICMP,
    "tcp": socket.IPPROTO_TCP,
    "udp": socket.IPPROTO_UDP,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is planted, the packet, who is asked, and what shall be said.

    $POD1, $POD2, $SUBNET1, $SUBNET2 stand for addresses of the lab, $STRANGER for STRANGER.
    """

    plant: str = ":"
    undo: str = ":"
    at: int = 1
    """The node on which it is planted."""
    source: str = "$POD1"
    destination: str = "$POD2"
    sender: str = "pod1"
    """The host that sends: `pod1`, `node1`, ..."""
    receiver: str = "pod2"
    proto: str = "icmp"
    port: int | None = None
    size: int = 84
    df: bool = False
    asks: int = 1
    """The node that is asked."""
    verdict: Verdict
    step: str = ""
    """The id of the step that says so: that drops it, or warns."""
    words: tuple[str, ...] = ()
    """All of them in what that step has seen."""
    reason: str = ""
    arrives: bool | None = None
    """Whether the packet arrives; None: as the verdict says."""
    seen_source: str = ""
    """The source it arrives with, if that is another one."""
    mends: bool = False
    """Whether the step's command makes the packet arrive."""


def dropped(step: str, *words: str, **more: Any) -> Case:
    """A case whose packet is dropped at one step."""
    return Case(verdict=Verdict.DROPPED, step=step, words=words, **more)


NFT_PORT = (
    "nft 'table inet t { chain c { type filter hook forward priority 0; tcp dport 443 drop; }; }'"
)
NFT_SOURCE_PORT = NFT_PORT.replace("dport", "sport")
NFT_GONE = "nft delete table inet t"
POLICY = (
    "nft 'table inet t { chain c { type filter hook forward priority 5; policy drop;"
    ' iifname "flannel0" accept; }; }\''
)
INPUT = "iptables -I INPUT -p udp --dport 8285 -j DROP"
OUTPUT = "iptables -I OUTPUT -p udp --dport 8285 -j DROP"
FORWARD = "iptables -I FORWARD -s $POD1 -j REJECT"
KEEP_SOURCE = "iptables -t nat -I POSTROUTING -s $STRANGER -j ACCEPT"
LATER = "iptables -I FORWARD -m conntrack --ctstate ESTABLISHED -j DROP"

CASES: Mapping[str, Case] = {
    "nothing in the way": Case(verdict=Verdict.DELIVERED),
    "nothing in the way, tcp": Case(verdict=Verdict.DELIVERED, proto="tcp", port=443),
    "nothing in the way, the other half": Case(verdict=Verdict.DELIVERED, asks=2),
    "nft drops a port": dropped(
        "firewall",
        "nft table inet t, chain c: tcp dport 443 drop drops",
        plant=NFT_PORT,
        undo=NFT_GONE,
        proto="tcp",
        port=443,
        mends=True,
    ),
    "nft drops another port": Case(
        verdict=Verdict.DELIVERED, plant=NFT_PORT, undo=NFT_GONE, proto="tcp", port=80
    ),
    "nft drops a source port": Case(
        verdict=Verdict.DELIVERED,
        step="firewall",
        words=("tcp sport 443 drop drops some of",),
        plant=NFT_SOURCE_PORT,
        undo=NFT_GONE,
        proto="tcp",
        port=443,
    ),
    "a policy drops": dropped(
        "firewall", "policy drop of chain c", plant=POLICY, undo=NFT_GONE, mends=True
    ),
    "a policy passes the other half": Case(
        verdict=Verdict.DELIVERED, plant=POLICY, undo=NFT_GONE, at=2, asks=2
    ),
    "iptables rejects": dropped(
        "firewall",
        "rule 1 of FORWARD: -A FORWARD -s",
        plant=FORWARD,
        undo="iptables -F FORWARD",
        mends=True,
    ),
    "iptables rejects at the receiver": dropped(
        "firewall",
        "rule 1 of FORWARD",
        plant=FORWARD,
        undo="iptables -F FORWARD",
        at=2,
        asks=2,
        mends=True,
    ),
    "iptables policy, and no rule of ours": dropped(
        "firewall",
        "policy drop of chain FORWARD",
        plant="iptables -P FORWARD DROP",
        undo="iptables -P FORWARD ACCEPT; iptables -F FORWARD",
        mends=True,
    ),
    "later packets only": Case(
        verdict=Verdict.DELIVERED,
        step="firewall",
        words=("drops later packets of a connection",),
        plant=LATER,
        undo="iptables -F FORWARD",
        proto="udp",
        port=53,
    ),
    "the tunnel's port at the sender": dropped(
        "tunnel-firewall",
        "rule 1 of OUTPUT",
        plant=OUTPUT,
        undo="iptables -F OUTPUT",
        mends=True,
    ),
    "the tunnel's port at the receiver": dropped(
        "tunnel-firewall",
        "rule 1 of INPUT",
        plant=INPUT,
        undo="iptables -F INPUT",
        at=2,
        asks=2,
        mends=True,
    ),
    "a more specific route": dropped(
        "route",
        "dev eth0",
        plant="ip route add $SUBNET2 dev eth0",
        undo="ip route del $SUBNET2 dev eth0",
        mends=True,
    ),
    "a blackhole route": dropped(
        "route",
        plant="ip route add blackhole $SUBNET2",
        undo="ip route del blackhole $SUBNET2",
        mends=True,
    ),
    "a policy rule": dropped(
        "route",
        plant="ip route add unreachable default table 99; ip rule add to $SUBNET2 lookup 99",
        undo="ip rule del to $SUBNET2 lookup 99; ip rule del priority 1; ip route flush table 99",
        mends=True,
    ),
    "a mark that a policy rule is for": dropped(
        "route",
        "mark 0x7",
        plant="iptables -t mangle -A PREROUTING -s $POD1 -j MARK --set-mark 7;"
        "ip route add unreachable default table 99; ip rule add fwmark 7 lookup 99",
        undo="iptables -t mangle -F PREROUTING; ip rule del fwmark 7 lookup 99;"
        "ip rule del priority 1; ip route flush table 99",
        mends=True,
    ),
    "a mark on this host's own": dropped(
        "route",
        "mark 0x7",
        plant="iptables -t mangle -A OUTPUT -d $POD2 -j MARK --set-mark 7;"
        "ip route add default dev eth0 table 99; ip rule add fwmark 7 lookup 99",
        undo="iptables -t mangle -F OUTPUT; ip rule del fwmark 7 lookup 99;"
        "ip rule del priority 1; ip route flush table 99",
        source="$TUN1",
        sender="node1",
        mends=True,
    ),
    "a policy rule for a port": dropped(
        "route",
        "ipproto tcp dport 443",
        plant="ip route add unreachable default table 99;"
        "ip rule add ipproto tcp dport 443 lookup 99",
        undo="ip rule del ipproto tcp dport 443; ip rule del priority 1; ip route flush table 99",
        proto="tcp",
        port=443,
        mends=True,
    ),
    "a policy rule for another port": Case(
        verdict=Verdict.DELIVERED,
        plant="ip route add unreachable default table 99;"
        "ip rule add ipproto tcp dport 443 lookup 99",
        undo="ip rule del ipproto tcp dport 443; ip route flush table 99",
        proto="tcp",
        port=80,
    ),
    "another destination": Case(
        verdict=Verdict.UNKNOWN,
        step="firewall",
        words=("gives it another destination: explain that one, too",),
        plant="iptables -t nat -I PREROUTING -s $POD1 -p udp --dport 53"
        " -j DNAT --to-destination 10.5.249.7",
        undo="iptables -t nat -F PREROUTING",
        proto="udp",
        port=53,
        arrives=False,
    ),
    "untracked, and no state": dropped(
        "firewall",
        "--ctstate UNTRACKED",
        plant="iptables -t raw -A PREROUTING -s $POD1 -j NOTRACK;"
        "iptables -A FORWARD -m conntrack --ctstate UNTRACKED -j DROP",
        undo="iptables -t raw -F; iptables -F FORWARD",
        mends=True,
    ),
    "a filter of tc": Case(
        verdict=Verdict.UNKNOWN,
        step="filters",
        words=("filters of tc on eth0 (egress: bpf)",),
        plant="tc qdisc add dev eth0 clsact;"
        "tc filter add dev eth0 egress protocol ip bpf bytecode '1,6 0 0 2,' da",
        undo="tc qdisc del dev eth0 clsact",
        arrives=False,
        mends=True,
    ),
    "an IPsec policy": Case(
        verdict=Verdict.UNKNOWN,
        step="filters",
        plant="ip xfrm policy add src $SUBNET1 dst $SUBNET2 dir fwd action block;"
        "ip xfrm policy add src $SUBNET1 dst $SUBNET2 dir out action block",
        undo="ip xfrm policy flush",
        arrives=False,
    ),
    "legacy iptables": dropped(
        "firewall",
        "iptables-legacy table filter, rule 1 of FORWARD",
        plant="iptables-legacy -A FORWARD -i cni0 -j DROP",
        undo="iptables-legacy -F FORWARD",
        mends=True,
    ),
    "a rule that is not understood": Case(
        verdict=Verdict.UNKNOWN,
        step="firewall",
        words=("-m length --length 60:90 -j DROP may drop it",),
        plant="iptables -A FORWARD -m length --length 60:90 -j DROP",
        undo="iptables -F FORWARD",
        arrives=False,
        mends=True,
    ),
    "no forwarding": dropped(
        "forwarding",
        "net.ipv4.ip_forward is 0",
        plant="sysctl -qw net.ipv4.ip_forward=0",
        undo="sysctl -qw net.ipv4.ip_forward=1",
        at=2,
        asks=2,
        mends=True,
    ),
    "the bridge is down": dropped(
        "",
        plant="ip link set cni0 down",
        undo="ip link set cni0 up",
        at=2,
        asks=2,
    ),
    "no lease": dropped(
        "lease", "no lease covers", "net unreachable", destination="10.5.249.9", reason="no_route"
    ),
    "a refused lease": dropped(
        "lease",
        "is refused (no_public_ip): it has no PublicIP",
        "net unreachable",
        destination="10.5.251.9",
        reason="no_route",
    ),
    "too large for the device, DF": dropped(
        "size", "1500 bytes with DF, more than the MTU 1472", size=1500, df=True
    ),
    "too large for the device": Case(
        verdict=Verdict.DELIVERED, step="size", words=("the kernel fragments it",), size=1500
    ),
    "as large as the device": Case(verdict=Verdict.DELIVERED, size=1472, df=True),
    "masqueraded": Case(
        verdict=Verdict.DELIVERED,
        step="masquerade",
        words=("the source becomes 10.5.", "FLANNEL-POSTRTG", "MASQUERADE"),
        source="$STRANGER",
        sender="node1",
        seen_source="$TUN1",
    ),
    "a pod to the outside": Case(
        verdict=Verdict.DELIVERED,
        step="masquerade",
        words=("the source becomes 192.0.2.1", "FLANNEL-POSTRTG"),
        destination=STORE_ADDRESS,
        receiver="switch",
        seen_source="192.0.2.1",
    ),
    "not masqueraded, and enforced": Case(
        verdict=Verdict.DELIVERED,  # by this node
        step="receiver",
        words=("is source_mismatch there",),
        reason="source_mismatch",
        plant=KEEP_SOURCE,
        undo=KEEP_SOURCE.replace("-I", "-D"),
        source="$STRANGER",
        sender="node1",
        arrives=False,
    ),
    "not masqueraded, at the receiver": dropped(
        "source-check",
        "source_mismatch",
        plant=KEEP_SOURCE.replace("$STRANGER", UNLEASED),
        undo=KEEP_SOURCE.replace("$STRANGER", UNLEASED).replace("-I", "-D"),
        source=UNLEASED,
        sender="node1",
        asks=2,
        reason="source_mismatch",
    ),
    "a strict filter": dropped(
        "route",
        "rp_filter is 1 on flannel0",
        plant="sysctl -qw net.ipv4.conf.flannel0.rp_filter=1",
        undo="sysctl -qw net.ipv4.conf.flannel0.rp_filter=0",
        at=2,
        asks=2,
        source="192.0.2.1",
        sender="node1",
        mends=True,
    ),
    "a fixed neighbour": Case(
        verdict=Verdict.UNKNOWN,
        step="neighbour",
        words=("02:00:00:00:00:99 (permanent)",),
        plant="ip neigh replace 192.0.2.2 lladdr 02:00:00:00:00:99 dev eth0 nud permanent",
        undo="ip neigh del 192.0.2.2 dev eth0",
        arrives=False,
        mends=True,
    ),
}


async def test_each_packet_fares_as_was_said(make_overlay: MakeOverlay) -> None:
    async with lab(make_overlay) as overlay:
        names = variables(overlay)
        failures = []
        for name, case in CASES.items():
            node = overlay.nodes[case.at].host
            try:
                await sh(node, case.plant, names)
                await fares_as_said(overlay, case, names)
            except AssertionError as error:
                failures.append(f"{name}: {error}")
            finally:
                await sh(node, f"{case.undo}; :", names)
            await until(lambda: pings(overlay), f"{name}: pings pass after the test's own undo")
        assert not failures, "\n\n".join(failures)


async def fares_as_said(overlay: OverlayLab, case: Case, names: Mapping[str, str]) -> None:
    """What is said of the packet, and what becomes of it; then the command, and the packet."""
    probe = probe_of(overlay, case, names)
    found = await ask(overlay.nodes[case.asks], probe.question)
    said = "\n".join(f"{each.id}: {each.ruling.value} {each.evidence}" for each in found.steps)
    assert found.verdict is case.verdict, f"{found.verdict} {found.summary}\n{said}"
    told = step_of(found, case)
    if told is not None:
        assert all(word in told.evidence for word in case.words), f"{told}\n{said}"
        assert told.reason == case.reason, told
    expected = case.arrives
    if expected is None:
        expected = case.verdict is Verdict.DELIVERED
    arrived = await probe.send(is_awaited=expected)
    assert (arrived is not None) == expected, f"arrived: {arrived}; said: {found.summary}\n{said}"
    if arrived is not None:
        seen = names.get(case.seen_source.removeprefix("$"), case.seen_source)
        assert arrived == (seen or str(probe.question.source)), "its source"
    if case.mends:
        assert told is not None
        assert told.command, told
        await sh(overlay.nodes[case.asks].host, told.command, names)
        assert await probe.send(is_awaited=True), f"{told.command} does not help: {told}"


def step_of(found: Explanation, case: Case) -> Step | None:
    """The step that is meant: the first that drops, or the named one."""
    if case.verdict is Verdict.DROPPED:
        step = next(each for each in found.steps if each.ruling is Ruling.DROP)
        assert case.step in ("", step.id), step
        return step
    return next((each for each in found.steps if each.id == case.step), None)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The packet in question, really sent."""

    question: Question
    sender: Host
    receiver: Host

    async def send(self, *, is_awaited: bool) -> str | None:
        """The source it arrives with; None if it does not.

        is_awaited: send again until it arrives, as on a busy machine.
        """
        deadline = time.monotonic() + (20 if is_awaited else 0)
        proto = PROTOCOLS[self.question.proto]
        out = await self.sender.socket(socket.SOCK_RAW, socket.IPPROTO_RAW)
        there = await self.receiver.socket(socket.SOCK_RAW, proto)
        with out, there:
            there.setblocking(False)
            while True:
                token = secrets.token_bytes(8)
                with contextlib.suppress(OSError):  # an ICMP error, or no route at all
                    out.sendto(self._packet(token), (str(self.question.destination), 0))
                arrived = await self._arrived(there, token)
                if arrived is not None or time.monotonic() > deadline:
                    return arrived

    async def _arrived(self, sock: socket.socket, token: bytes) -> str | None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GONE_S):
                while True:
                    packet = await loop.sock_recv(sock, 65535)
                    # Not an ICMP error that quotes it, nor the echo's reply.
                    is_it = packet[12:20][4:] == self.question.destination.packed
                    if token in packet and is_it:
                        return str(IPv4Address(packet[12:16]))
        return None

    def _packet(self, token: bytes) -> bytes:
        asked = self.question
        heads = {"icmp": 28, "udp": 28, "tcp": 40}
        payload = token.ljust(asked.size - heads[asked.proto], b"\0")
        frag = DF if asked.dont_fragment else 0
        # A connection of its own: one that conntrack knows keeps the NAT it began with.
        own = 20_000 + int.from_bytes(token[:2], "big") // 2
        ends: Any = {
            "source": str(asked.source),
            "destination": str(asked.destination),
            "frag": frag,
            "ident": 0,
        }
        if asked.proto == "icmp":
            return icmp_echo(payload, echo_id=own, **ends)
        if asked.proto == "udp":
            return udp(payload, sport=own, dport=asked.port or 0, **ends)
        return tcp(payload, flags=SYN, sport=own, dport=asked.port or 0, **ends)


def probe_of(overlay: OverlayLab, case: Case, names: Mapping[str, str]) -> Probe:
    """The packet of a case."""
    hosts = {"switch": overlay.switch}
    for number, node in overlay.nodes.items():
        hosts |= {f"node{number}": node.host, f"pod{number}": node.pod}
    return Probe(
        question=Question(
            source=IPv4Address(names.get(case.source[1:], case.source)),
            destination=IPv4Address(names.get(case.destination[1:], case.destination)),
            proto=case.proto,
            port=case.port,
            size=case.size,
            dont_fragment=case.df,
        ),
        sender=hosts[case.sender],
        receiver=hosts[case.receiver],
    )


@contextlib.asynccontextmanager
async def lab(make_overlay: MakeOverlay) -> AsyncIterator[OverlayLab]:
    """Two nodes that masquerade and enforce, with no rules of ours in FORWARD."""
    flags = ("--iptables-forward-rules=false", "--ip-masq", "--source-check=enforce")
    async with make_overlay(*flags, pods=True) as overlay:
        document = json.loads(overlay.lease_file.read_text(encoding="utf-8"))
        document["leases"][REFUSED_SUBNET] = {"PublicIP": "0.0.0.0"}
        overlay.lease_file.write_text(json.dumps(document), encoding="utf-8")
        one = overlay.nodes[1]
        await one.host.configure("lo", f"{STRANGER}/32", f"{UNLEASED}/32")
        for node in overlay.nodes.values():
            # Pods that can send what no path carries.
            for device in ("veth1", "cni0"):
                await node.host.configure(device, mtu=1500)
            await node.pod.configure("eth0", mtu=1500)
        keep = f"-s {one.public_ip} -d {overlay.nodes[2].gateway.network} -j ACCEPT"
        await must_run(one.host, *f"iptables -t nat -I POSTROUTING {keep}".split())
        await until(lambda: pings(overlay), "the overlay carries pings")
        await until(lambda: has_refused(one), "the refused lease is known")
        yield overlay


async def has_refused(node: LabNode) -> bool:
    """Whether a lease is refused."""
    return bool((await node.status_document())["refused"])


async def pings(overlay: OverlayLab) -> bool:
    one, two = overlay.nodes[1], overlay.nodes[2]
    return await answers(one.pod, two.pod_address)


def variables(overlay: OverlayLab) -> dict[str, str]:
    one, two = overlay.nodes[1], overlay.nodes[2]
    return {
        "POD1": one.pod_address,
        "POD2": two.pod_address,
        "TUN1": one.tunnel_address,
        "SUBNET1": str(one.gateway.network),
        "SUBNET2": str(two.gateway.network),
        "STRANGER": STRANGER,
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    }


async def sh(host: Host, script: str, names: Mapping[str, str]) -> None:
    done = await host.run("sh", "-c", script, environment=dict(names))
    assert done.returncode == 0, f"{script}: {done.stdout}{done.stderr}"


async def ask(node: LabNode, question: Question) -> Explanation:
    """What is said on a node."""
    settings = replace(Settings(), admin_socket=node.admin_socket)

    async def asked() -> Explanation:
        async with Netlink() as netlink:
            about = (question.source, question.destination)
            known = await known_leases(settings, netlink, asks_daemon=True, about=about)
            return await explain_packet(netlink, known, question)

    return await node.host.call(lambda: run_on(LOOPS["asyncio"], asked()))


async def test_the_answer_is_the_one_that_comes(make_overlay: MakeOverlay) -> None:
    async with lab(make_overlay) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        asked = Question(
            source=IPv4Address(one.pod_address), destination=IPv4Address("10.5.249.1"), size=84
        )
        found = await ask(one, asked)
        assert f"ICMP net unreachable from {one.tunnel_address}" in found.summary
        answer = await ping(one.pod, "10.5.249.1")
        assert answer is not None
        assert (answer.icmp_type, answer.code) == (3, 0)
        assert str(answer.source) == one.tunnel_address

        # The operator's route is narrower than the device: what the engine has of it, is said.
        await must_run(one.host, *f"ip route add {two.public_ip} dev eth0 mtu 1400".split())
        asked = replace(
            asked, destination=IPv4Address(two.pod_address), size=1400, dont_fragment=True
        )

        async def is_narrow() -> Explanation | None:
            # Of a hop in use only, which is more than the pings a busy machine makes in a second.
            for _ in range(8):
                await ping(one.pod, two.pod_address, size=1200, timeout_s=0.5)
            found = await ask(one, asked)
            return found if found.verdict is Verdict.DROPPED else None

        narrow = await until(is_narrow, "the path is known to be narrow")
        assert narrow is not None
        (step,) = [each for each in narrow.steps if each.ruling is Ruling.DROP]
        assert (step.id, step.reason) == ("size", "too_big")
        assert "1400 bytes with DF, more than the 1372 of the path (route" in step.evidence
        assert f"fragmentation needed, MTU 1372 from {one.tunnel_address}" in step.evidence
        answer = await ping(one.pod, two.pod_address, size=1372, dont_fragment=True)
        assert answer is not None
        assert (answer.icmp_type, answer.code, answer.next_hop_mtu) == (3, 4, 1372)
        assert (await ask(one, replace(asked, size=1372))).verdict is Verdict.DELIVERED
        fragmented = await ask(one, replace(asked, dont_fragment=False))
        assert fragmented.verdict is Verdict.DELIVERED
        assert any("2 fragments" in each.evidence for each in fragmented.steps)


async def test_routes_to_nodes_without_a_tunnel(make_overlay: MakeOverlay) -> None:
    network = {"Network": "10.5.0.0/16", "Backend": {"Type": "host-gw"}}
    async with make_overlay(pods=True, network=network) as overlay:
        one = overlay.nodes[1]
        names = variables(overlay)
        await until(lambda: pings(overlay), "the overlay carries pings")
        astray = dropped(
            "route",
            "via 192.0.2.254 dev eth0 (table 99, ip rule), and not to 192.0.2.2",
            plant="ip rule add to $SUBNET2 lookup 99;"
            "ip route add $SUBNET2 via 192.0.2.254 table 99",
            undo="ip rule del to $SUBNET2 lookup 99; ip rule del priority 1",
            mends=True,
        )
        for case in (
            Case(verdict=Verdict.DELIVERED, size=1500, df=True),
            Case(verdict=Verdict.DELIVERED, asks=2),
            dropped("route", destination="10.5.249.9"),
            astray,
        ):
            await sh(one.host, case.plant, names)
            await fares_as_said(overlay, case, names)
            await sh(one.host, f"{case.undo}; :", names)


async def test_the_command_tells_by_its_exit_code(make_overlay: MakeOverlay) -> None:
    async with lab(make_overlay) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        to_pod = (TUNDP, "explain", one.pod_address, two.pod_address)
        running = f"--admin-socket={one.admin_socket}"
        done = await one.host.run(*to_pod, "tcp", "443", running)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"DELIVERED: sent in a datagram to {two.public_ip}:8285" in done.stdout
        done = await one.host.run(*to_pod[:3], "10.5.249.1", running, "--json")
        document = json.loads(done.stdout)
        assert (done.returncode, document["verdict"]) == (1, "dropped")
        # Between two pods of other nodes this one has no part.
        done = await one.host.run(*to_pod[:2], two.pod_address, two.pod_address, running)
        assert done.returncode == 3
        assert "does not pass this node" in done.stdout

        # Without a daemon the leases are those of the store, read and not written.
        assert await one.stop_daemon() == 0
        before = overlay.lease_file.read_bytes()
        flags = (*overlay.store_flags, "--iface=eth0", f"--state-dir={one.state_dir}")
        done = await one.host.run(*to_pod, running, *flags, "--json")
        document = json.loads(done.stdout)
        assert (done.returncode, document["verdict"]) == (3, "unknown"), done.stdout
        assert "read once: no daemon answers" in document["leases_of"]
        said = {each["id"]: each for each in document["steps"]}
        assert f"at {two.public_ip}:8285" in said["lease"]["evidence"]
        assert said["route"]["evidence"] == "no daemon runs, and there is no device flannel0"
        done = await one.host.run(*to_pod[:3], "10.5.249.1", *flags)
        assert done.returncode == 1
        assert "no lease covers 10.5.249.1" in done.stdout
        assert overlay.lease_file.read_bytes() == before
