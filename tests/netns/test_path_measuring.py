"""The path to a peer is as wide as what arrives there, whatever ICMP errors say, and whoever.

[node1] eth0 -- left [a] middle ---- middle [b] right -- eth0 [node2]
192.0.2.1                 |                              192.0.2.2
                     [stranger] 203.0.113.9: forges
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import shutil
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from tests.netns.conftest import NETWORK
from tests.nodes import MakeLab, counters, must_run
from tests.wait import DEADLINE_S, until
from tundp.lab.lab import Host, Lab
from tundp.lab.offload import make_wire_like
from tundp.lab.overlay import LabNode, OverlayLab, make_directory
from tundp.lab.traffic import ping, transfer

PAYLOAD_LEN = 4 << 20
HEADERS_LEN = 28
STRANGER = "203.0.113.9"
every_kind_of_engine = pytest.mark.parametrize("engine", ["reference", "simple", "gso"])


@dataclass(slots=True)
class World:
    """Two nodes with pods, and two routers between them."""

    one: LabNode
    two: LabNode
    a: Host
    b: Host
    stranger: Host

    async def set_middle(self, mtu: int) -> None:
        """The link between the routers, at both ends."""
        for router in (self.a, self.b):
            await router.configure("middle", mtu=mtu)

    async def peer(self) -> dict[str, Any]:
        """What node 1 shows of node 2."""
        (found,) = (await self.one.status_document())["peers"]
        peer: dict[str, Any] = found
        return peer

    async def path(self) -> dict[str, Any] | None:
        """What node 1 knows of the path to node 2."""
        found: dict[str, Any] | None = (await self.peer())["path"]
        return found

    async def measuring(self) -> str | None:
        """What measuring the path from node 1 to node 2 has come to; asks by a large packet."""
        await ping(self.one.pod, self.two.pod_address, size=1400, timeout_s=0.2)
        found = (await self.peer())["measuring"]
        return None if found is None else str(found["state"])

    async def is_measured(self, inner_mtu: int | None) -> bool:
        """Whether packets of this size, None: of every size, are what node 1 takes; asks by one."""
        await ping(self.one.pod, self.two.pod_address, size=1400, timeout_s=0.2)
        path = await self.path()
        if inner_mtu is None:
            return path is None
        return path is not None and (path["inner_mtu"], path["mtu_origin"]) == (
            inner_mtu,
            "measured",
        )

    async def transfer(self) -> bool:
        """Whether bytes sent by TCP from pod to pod arrive as they were."""
        _, is_equal = await transfer(
            self.one.pod, self.two.pod, self.two.pod_address, payload_len=PAYLOAD_LEN
        )
        return is_equal

    async def reroute(self) -> None:
        """A change of the route to node 2, after which its path is looked at anew."""
        for word in ("replace", "del"):
            await must_run(
                self.one.host,
                *f"ip route {word} {self.two.public_ip}/32 via 192.0.2.254 dev eth0".split(),
            )


@pytest.fixture
def engine() -> str:
    return "auto"


@contextlib.asynccontextmanager
async def world(
    make_lab: MakeLab,
    engine: str,
    *,
    mtu: int = 1500,
    rules: str = "",
    firewall: Sequence[str] = (),
    silence: str = "",
    prefix: Sequence[str] = (),
) -> AsyncIterator[World]:
    """mtu: of the link between the routers. rules: chains of nft's, on both routers.

    firewall: commands run on both nodes. silence: why node 1 gets no answers: "peer" or "firewall"
    of it. prefix: before the daemons' command.
    """
    directory = make_directory()
    try:
        async with make_lab() as lab:
            overlay = OverlayLab(lab, directory)
            overlay.write_lease_file(NETWORK)
            found = await _build(lab, overlay)
            await found.set_middle(mtu)
            for router in (found.a, found.b):
                if rules:
                    await must_run(router, "nft", f"table ip drops {{ {rules}; }}")
            if silence == "peer":
                await found.two.host.sysctl("ipv4/icmp_echo_ignore_all", 1)
            elif silence == "firewall":
                await must_run(found.two.host, "nft", REQUESTS_DROPPED)
            for node in overlay.nodes.values():
                for command in firewall:
                    await must_run(node.host, *shlex.split(command))
            try:
                for node in overlay.nodes.values():
                    await start(node, overlay.store_flags, f"--engine={engine}", prefix=prefix)
                await overlay.wait_ready()
                for node in overlay.nodes.values():
                    await overlay.add_pod(node)
                yield found
            except BaseException:
                for node in overlay.nodes.values():
                    print(f"--- node{node.number}\n{overlay.log_tail(node)}")
                raise
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def start(
    node: LabNode, store_flags: Sequence[str], *flags: str, prefix: Sequence[str]
) -> None:
    """As tundp.lab.overlay.start_tundp, by a command that begins with `prefix`."""
    with node.log_path.open("ab") as log:
        node.daemon = await node.host.popen(
            [
                *(*prefix, sys.executable, "-m", "tundp", "run"),
                *store_flags,
                *node.interface_flags,
                f"--subnet-file={node.subnet_file}",
                f"--admin-socket={node.admin_socket}",
                f"--state-dir={node.state_dir}",
                *flags,
            ],
            log=log,
        )


async def _build(lab: Lab, overlay: OverlayLab) -> World:
    a, b, stranger = [await lab.host(name) for name in ("a", "b", "stranger")]
    await lab.cable(a, "middle", b, "middle")
    await a.configure("middle", "198.51.100.1/24")
    await b.configure("middle", "198.51.100.2/24")
    await lab.cable(stranger, "eth0", a, "outside")
    await stranger.configure("eth0", f"{STRANGER}/24")
    await a.configure("outside", "203.0.113.254/24")
    await stranger.route("192.0.2.0/24", via="203.0.113.254")
    for number, router, port in ((1, a, "left"), (2, b, "right")):
        host = await lab.host(f"node{number}")
        node = overlay.nodes[number] = LabNode(number, host, overlay.directory)
        await lab.cable(host, "eth0", router, port)
        await host.configure("eth0", f"{node.public_ip}/32")
        await router.configure(port, "192.0.2.254/32")
        await must_run(host, *["ip", "route", "add", "192.0.2.254/32", "dev", "eth0"])
        await host.route("0.0.0.0/0", via="192.0.2.254")
        await must_run(router, "ip", "route", "add", f"{node.public_ip}/32", "dev", port)
        for forwards in (host, router):
            await forwards.sysctl("ipv4/ip_forward", 1)
        await make_wire_like(host, "eth0")
    await a.route("192.0.2.2/32", via="198.51.100.2")
    await b.route("192.0.2.1/32", via="198.51.100.1")
    await b.route("203.0.113.0/24", via="198.51.100.1")
    return World(overlay.nodes[1], overlay.nodes[2], a, b, stranger)


# Forged


def quoted_datagram() -> bytes:
    """The beginning of a datagram of ours from node 1 to node 2: anybody knows as much."""
    return _ipv4("192.0.2.1", "192.0.2.2", 17, struct.pack("!HHHH", 8285, 8285, 1472, 0), 1492)


def quoted_echo_reply() -> bytes:
    """The beginning of an echo reply of node 1's kernel: errors about it make a route exception."""
    return _ipv4("192.0.2.1", "192.0.2.2", 1, bytes(8), 1492)


def icmp(kind: int, code: int, rest: bytes, quote: bytes) -> bytes:
    blank = bytes((kind, code, 0, 0)) + rest + quote
    return blank[:2] + struct.pack("!H", _sum(blank)) + blank[4:]


def _ipv4(source: str, destination: str, proto: int, payload: bytes, total_len: int = 0) -> bytes:
    length = total_len or 20 + len(payload)
    ends = socket.inet_aton(source) + socket.inet_aton(destination)
    blank = struct.pack("!BBHHHBBH", 0x45, 0, length, 1, 0x4000, 64, proto, 0) + ends
    return blank[:10] + struct.pack("!H", _sum(blank)) + blank[12:] + payload


def _sum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


async def forge(world: World, source: str, message: bytes) -> None:
    """One ICMP message to node 1, from the stranger in the name of `source`."""
    sock = await world.stranger.socket(socket.SOCK_RAW, socket.IPPROTO_RAW)
    with sock:
        sock.sendto(_ipv4(source, "192.0.2.1", 1, message), ("192.0.2.1", 0))


async def has_exception(world: World) -> bool:
    """Whether node 1's kernel believes somebody: its route has an MTU that expires."""
    found = await must_run(world.one.host, "ip", "route", "get", world.two.public_ip)
    return "expires" in found and "mtu" in found


@every_kind_of_engine
async def test_what_anybody_can_forge_narrows_nothing(make_lab: MakeLab, engine: str) -> None:
    async with world(make_lab, engine) as all_:
        assert await all_.transfer()
        for mtu in (68, 552, 600, 1280):
            for quote in (quoted_datagram(), quoted_echo_reply()):
                too_big = icmp(3, 4, struct.pack("!HH", 0, mtu), quote)
                for source in (STRANGER, "192.0.2.254", "192.0.2.2"):
                    await forge(all_, source, too_big)
            await until(lambda: has_exception(all_), "the kernel to believe the stranger")
            # A full packet with DF from pod to pod, and back.
            answer = await ping(all_.one.pod, all_.two.pod_address, size=1444, dont_fragment=True)
            assert answer is not None and answer.is_echo_reply, mtu
            assert await all_.transfer()
            assert await all_.path() is None, mtu
        counted = await counters(all_.one)
        assert counted["fragments_out"] == 0
        assert counted["encap"]["drops"] == {}
        assert counted["conserved"]


async def test_forged_unreachables_and_redirects_cost_nothing(make_lab: MakeLab) -> None:
    async with world(make_lab, "auto") as all_:
        assert await all_.transfer()
        for kind, code in ((3, 0), (3, 1), (3, 2), (3, 3), (3, 5), (3, 13), (5, 0), (5, 1)):
            # A redirect to a neighbour that is none: the rest of the message is its address.
            rest = bytes(4) if kind == 3 else socket.inet_aton("192.0.2.77")
            for source in (STRANGER, "192.0.2.254"):
                await forge(all_, source, icmp(kind, code, rest, quoted_datagram()))
        assert await all_.transfer()
        counted = await counters(all_.one)
        assert counted["encap"]["drops"] == counted["errnos"] == {}
        assert await all_.path() is None


# Real

SILENT = "chain out { type filter hook output priority 0; icmp type destination-unreachable drop; }"
"""Routers that fragment, and report nothing."""
SWALLOW = (
    "chain in { type filter hook prerouting priority -500; iifname middle ip length > 1400 drop; };"
    " chain defrag { type filter hook output priority 0; icmp type destination-unreachable drop; }"
)
"""A way between routers that swallows what is larger than 1400, with or without DF."""


@pytest.mark.parametrize(
    ("engine", "mtu", "rules"),
    [
        ("gso", 1492, ""),
        ("gso", 1400, SILENT),
        ("simple", 1300, ""),
        ("reference", 1400, SILENT),
    ],
    ids=["pppoe", "1400 in silence", "1300", "1400 in silence, reference"],
)
async def test_a_narrow_path_is_measured(
    make_lab: MakeLab, engine: str, mtu: int, rules: str
) -> None:
    async with world(make_lab, engine, mtu=mtu, rules=rules) as all_:
        # Before anything is known routers fragment.
        assert await ping(all_.one.pod, all_.two.pod_address, size=1400) is not None
        await until(lambda: all_.is_measured(mtu - HEADERS_LEN), "the path to be measured")
        assert (await all_.one.status_document())["routing"]["narrow_by_origin"]["measured"] == 1
        answer = await ping(all_.one.pod, all_.two.pod_address, size=1444, dont_fragment=True)
        assert answer is not None
        assert (answer.icmp_type, answer.code) == (3, 4)
        assert answer.next_hop_mtu == mtu - HEADERS_LEN
        assert await all_.transfer()
        await all_.set_middle(1500)
        await all_.reroute()
        await until(lambda: all_.is_measured(None), "the path to be wide again")


async def test_a_path_that_swallows_large_packets_is_no_black_hole(make_lab: MakeLab) -> None:
    async with world(make_lab, "auto", rules=SWALLOW) as all_:
        assert await ping(all_.one.pod, all_.two.pod_address, size=1400, timeout_s=0.5) is None
        await until(lambda: all_.is_measured(1372), "the path to be measured")
        assert await all_.transfer()


INVALID_DROPPED = (
    'nft "table ip wall { chain early { type filter hook prerouting priority -150;'
    ' ct state invalid drop; }; }"',
    *(
        f'nft "add chain ip wall in{number} {{ type filter hook input priority {priority}; }};'
        f' add rule ip wall in{number} ct state invalid drop"'
        for number, priority in enumerate((-300, 0, 300))
    ),
)
"""Conntrack has not seen the request, which leaves inside a datagram: its answer is invalid."""
UFW = (
    "iptables -A INPUT -i lo -j ACCEPT",
    "iptables -A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    "iptables -A INPUT -m conntrack --ctstate INVALID -j DROP",
    "iptables -A INPUT -p icmp --icmp-type echo-request -j ACCEPT",
    "iptables -A INPUT -p udp --dport 8285 -j ACCEPT",
    "iptables -P INPUT DROP",
)
FIREWALLD = (
    'nft "table inet wall { chain in { type filter hook input priority filter + 10;'
    " ct state { established, related } accept; iifname lo accept; ct state invalid drop;"
    " icmp type echo-request accept; udp dport 8285 accept;"
    ' reject with icmpx admin-prohibited; }; }"',
)
"""What these make, shortened to what our packets meet."""
NO_RAW = ("setpriv", "--bounding-set=-net_raw", "--inh-caps=-net_raw")


@pytest.mark.parametrize(
    ("firewall", "engine", "prefix"),
    [
        (INVALID_DROPPED, "gso", ()),
        (INVALID_DROPPED, "reference", NO_RAW),
        (UFW, "simple", NO_RAW),
        (FIREWALLD, "mmsg", ()),
    ],
    ids=["nft", "nft, without CAP_NET_RAW", "ufw", "firewalld"],
)
async def test_firewalls_that_drop_invalid_hide_no_answer(
    make_lab: MakeLab, firewall: Sequence[str], engine: str, prefix: Sequence[str]
) -> None:
    async with world(make_lab, engine, rules=SWALLOW, firewall=firewall, prefix=prefix) as all_:
        assert await ping(all_.one.pod, all_.two.pod_address, size=1400, timeout_s=0.5) is None
        await until(lambda: all_.is_measured(1372), "the path to be measured")
        assert await all_.measuring() == "measured"
        assert await all_.transfer()


async def test_a_way_back_that_is_narrower_narrows_nothing(make_lab: MakeLab) -> None:
    """The peer fragments its answers: that says nothing of the way there."""
    async with world(make_lab, "auto") as all_:
        back = f"{all_.one.public_ip}/32 via 192.0.2.254 dev eth0 mtu 1400"
        await must_run(all_.two.host, *f"ip route add {back}".split())

        async def is_known() -> bool:
            return await all_.measuring() == "measured"

        async def is_fragmented() -> bool:
            await all_.measuring()
            return bool((await counters(all_.two))["fragments_out"])

        await until(is_fragmented, "the peer to fragment")
        await all_.reroute()
        await until(is_known, "the path to be measured")
        for _ in range(20):
            assert await all_.is_measured(None)
            await asyncio.sleep(0.2)


REQUESTS_DROPPED = (
    "table ip wall { chain in { type filter hook input priority 0;"
    " iifname flannel0 icmp type echo-request drop; }; }"
)


@pytest.mark.parametrize("silence", ["peer", "firewall"])
async def test_without_answers_packets_stay_as_they_are(make_lab: MakeLab, silence: str) -> None:
    async with world(make_lab, "auto", mtu=1400, silence=silence) as all_:
        looking = asyncio.create_task(identifier_seen(all_.a, "left"))
        assert await all_.transfer()
        await looking  # what measures is under way
        # For longer than a measurement lasts: what is not answered says nothing.
        for _ in range(30):
            assert await ping(all_.one.pod, all_.two.pod_address, size=1400) is not None
            assert await all_.path() is None
            await asyncio.sleep(0.1)
        assert (await counters(all_.one))["fragments_out"] == 0
        # And that is said, wherever somebody may look.
        await until(lambda: is_silent(all_), "the path to be one without an answer")
        document = await all_.one.status_document()
        assert document["backend"]["paths_in_use"] == {"measured": 0, "pending": 0, "no-answer": 1}
        (found,) = [each for each in document["findings"] if each["id"] == "path-mtu"]
        assert found["verdict"] == "warn"
        assert "no echo request is answered by 192.0.2.2 since 20" in found["evidence"]
        assert 0 < document["peers"][0]["measuring"]["since"] <= time.time()


async def is_silent(world: World) -> bool:
    return await world.measuring() == "no-answer"


async def identifier_seen(host: Host, device: str) -> bytes:
    """The ICMP identifier of the echo requests that measure, as seen on the way."""
    sniffer = await host.call(
        socket.socket, socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800)
    )

    def look() -> bytes:
        with sniffer:
            sniffer.settimeout(DEADLINE_S)
            while True:
                inner = sniffer.recv(2048)[HEADERS_LEN:]
                # To the TUN's address, of a size no ping here has.
                if len(inner) == 1472 and inner[9] == 1 and inner[20] == 8:
                    return inner[24:26]

    sniffer.bind((device, 0))
    return await asyncio.to_thread(look)


async def test_answers_to_nothing_are_ignored(make_lab: MakeLab) -> None:
    """Somebody who knows all but the cookie says that full packets arrive."""
    async with world(make_lab, "auto", rules=SWALLOW) as all_:
        looking = asyncio.create_task(identifier_seen(all_.a, "left"))
        while not looking.done():
            await ping(all_.one.pod, all_.two.pod_address, size=1400, timeout_s=0.2)
        reply = icmp(0, 0, await looking + bytes(2), bytes(1444))
        ends = (all_.two.tunnel_address, all_.one.tunnel_address)
        with await all_.stranger.socket(socket.SOCK_DGRAM) as forger:

            async def is_measured() -> bool:
                for _ in range(20):
                    forger.sendto(_ipv4(*ends, 1, reply), (all_.one.public_ip, 8285))
                return await all_.is_measured(1372)

            await until(is_measured, "the path to be measured")
        assert (await counters(all_.one))["source_mismatches"] > 0, "they arrived"
