"""Whose packets get in: forged addresses, and honest ones that a NAT has rewritten on the way.

One node in each mode, or in those that differ; the senders are bare sockets, as stock flannel's
and as any host on the underlay has them, and a node behind a router that masquerades.
"""

from __future__ import annotations

import os
import socket
from functools import partial

import pytest

from tests.nodes import MakeOverlay, counters, has_decapsulated, must_run
from tests.packets import ipv4, udp
from tests.wait import DEADLINE_S, until
from tundp.lab.overlay import STORE_ADDRESS, LabNode, OverlayLab
from tundp.lab.traffic import ping

ENGINES = os.environ.get("TUNDP_TEST_ENGINES", "reference;gso").split(";")
pytestmark = pytest.mark.parametrize("engine", ENGINES)

BEHIND_NAT = "198.51.100.1"
ROUTER = "198.51.100.254"
MASQUERADE = """
table ip nat {
    chain postrouting {
        type nat hook postrouting priority srcnat;
        oifname "br0" ip saddr 198.51.100.0/24 masquerade
    }
}
"""


async def start(overlay: OverlayLab, engine: str, checks: dict[int, str], *flags: str) -> None:
    for number, node in overlay.nodes.items():
        check = [f"--source-check={checks[number]}"] if number in checks else []
        await overlay.start_daemon(node, *f"--engine={engine}".split(), *check, *flags)
    await overlay.wait_ready()


def packet(source: str, destination: str) -> bytes:
    # So short a life that no kernel forwards it to somebody who would count it, too, and no
    # first fragment, about which it would say so to the source.
    return ipv4(b"", 253, source=source, destination=destination, ttl=2, frag=9)


def from_overlay_port(sender: LabNode, node: LabNode, inner: bytes) -> bytes:
    return udp(inner, source=sender.public_ip, destination=node.public_ip, sport=8285, dport=8285)


async def test_what_is_not_for_us_is_told_counted_or_dropped(
    make_overlay: MakeOverlay, engine: str
) -> None:
    checks = {1: "off", 2: "count", 3: "enforce"}
    async with make_overlay(nodes=3, start=False) as overlay:
        await start(overlay, engine, checks)
        for node in overlay.nodes.values():
            sender = overlay.nodes[node.number % 3 + 1]
            # Its daemon has the port that datagrams come from.
            honest = await sender.host.socket(socket.SOCK_RAW, socket.IPPROTO_RAW)
            honest.connect((node.public_ip, 0))
            forger = await overlay.switch.socket(socket.SOCK_DGRAM)
            source = str(sender.gateway.ip)
            with honest, forger:
                ours = [node.tunnel_address, node.pod_address, node.public_ip]
                foreign = [
                    source,
                    str(node.gateway.network.network_address - 1),
                    str(node.gateway.network.broadcast_address + 1),
                    "203.0.113.5",
                ]
                # The last one is what the kernel says of the underlay's address.
                nobody = ["127.0.0.1", "224.0.0.1", "255.255.255.255", "192.0.2.255"]
                at = (node.public_ip, 8285)
                for destination in (*ours, *foreign, *nobody):
                    honest.send(from_overlay_port(sender, node, packet(source, destination)))
                # Neither end fits.
                forger.sendto(packet(source, "203.0.113.5"), at)
                sent = len(ours) + len(foreign) + len(nobody) + 1
                await until(partial(has_decapsulated, node, sent - 1))
                counted = await counters(node)
                mismatches = counted["source_mismatches"], counted["destination_mismatches"]
                drops = counted["decap"]["drops"]
                always = {"martian_destination": len(nobody)}
                match checks[node.number]:
                    case "off":
                        assert (mismatches, drops) == ((0, 0), always)
                    case "count":
                        assert (mismatches, drops) == ((1, len(foreign) + 1), always)
                    case "enforce":
                        assert mismatches == (0, 0)
                        assert drops == always | {
                            "source_mismatch": 1,
                            "destination_mismatch": len(foreign),
                        }
                assert counted["decap"]["packets_in"] == sent
                assert counted["conserved"]


async def has_dropped(node: LabNode) -> bool:
    """Whether the node has dropped anything that came from peers."""
    return bool((await counters(node))["decap"]["drops"])


async def test_a_peer_behind_nat_gets_in_unless_enforced(
    make_overlay: MakeOverlay, engine: str
) -> None:
    checks = {2: "count", 3: "enforce"}
    async with make_overlay(nodes=3, start=False) as overlay:
        one, two, three = overlay.nodes.values()
        await put_behind_nat(overlay, one)
        await start(overlay, engine, checks)
        answer = await ping(one.host, two.tunnel_address)
        assert answer is not None
        assert answer.is_echo_reply
        assert await ping(one.host, three.tunnel_address, timeout_s=0.3) is None
        # The others are no forgers to each other.
        answer = await ping(two.host, three.tunnel_address)
        assert answer is not None
        assert answer.is_echo_reply

        counted = await counters(two)
        assert counted["source_mismatches"] == 1
        assert counted["destination_mismatches"] == 0
        assert counted["decap"]["drops"] == {}
        await until(lambda: has_dropped(three), "the packet from behind NAT to be dropped")
        counted = await counters(three)
        assert counted["source_mismatches"] == counted["destination_mismatches"] == 0
        assert counted["decap"]["drops"] == {"source_mismatch": 1}
        # The answer came to the address the lease has, from one that is right; but for the router
        # it is a second flow with the same ends, so that it got another port.
        counted = await counters(one)
        assert counted["source_mismatches"] == 1
        assert counted["destination_mismatches"] == 0


async def put_behind_nat(overlay: OverlayLab, node: LabNode) -> None:
    """The switch becomes its router, and masquerades for it."""
    switch = overlay.switch
    port = f"port{node.number}"
    await node.host.netlink.call(
        "take the address",
        "addr",
        "del",
        index=await node.host.index("eth0"),
        address=node.public_ip,
        prefixlen=24,
    )
    await node.host.configure("eth0", f"{BEHIND_NAT}/24")
    await node.host.route("0.0.0.0/0", via=ROUTER)
    await switch.netlink.set_link(await switch.index(port), master=0)
    await switch.configure(port, f"{ROUTER}/24")
    await switch.sysctl("ipv4/ip_forward", 1)
    rules = overlay.directory / "nat.nft"
    rules.write_text(MASQUERADE)
    await must_run(switch, "nft", "-f", str(rules))
    for other in overlay.nodes.values():
        if other is not node:
            await other.host.route("198.51.100.0/24", via=STORE_ADDRESS)


async def test_a_pod_speaks_for_nobody_else(make_overlay: MakeOverlay, engine: str) -> None:
    """An unprivileged socket in a pod of a node that masquerades, against a node that enforces."""
    async with make_overlay(nodes=3, start=False) as overlay:
        await start(overlay, engine, {1: "enforce"}, "--ip-masq")
        one, two, three = overlay.nodes.values()
        for node in (one, two, three):
            await overlay.add_pod(node)
        received = await one.pod.socket(socket.SOCK_DGRAM)
        forger = await two.pod.socket(socket.SOCK_DGRAM)
        honest = await three.pod.socket(socket.SOCK_DGRAM)
        with received, forger, honest:
            received.bind((one.pod_address, 9999))
            received.settimeout(DEADLINE_S)

            def claim(source: str) -> bytes:
                return udp(b"forged", source=source, destination=one.pod_address, dport=9999)

            nested = [
                udp(
                    claim(three.pod_address),
                    source=three.public_ip,
                    destination=destination,
                    sport=8285,
                    dport=8285,
                )
                for destination in (one.public_ip, one.tunnel_address)
            ]
            others = [three.pod_address, three.public_ip, "8.8.8.8", "192.0.2.254", "10.5.199.7"]
            own = [two.pod_address, two.public_ip]
            for data in (*nested, *map(claim, others + own)):
                forger.sendto(data, (one.public_ip, 8285))
            sent = len(nested) + len(others) + len(own)
            await until(partial(has_decapsulated, one, sent - 1))
            honest.sendto(b"honest", (one.pod_address, 9999))
            assert received.recvfrom(64)[0] == b"honest"
            counted = await counters(one)
            assert counted["decap"]["drops"] == {
                "tunnel_in_tunnel": len(nested),
                "source_mismatch": len(others),
                "source_port_mismatch": len(own),
            }
            assert counted["conserved"]


async def test_no_datagram_reaches_loopback(make_overlay: MakeOverlay, engine: str) -> None:
    """Not where kube-proxy has set route_localnet, either."""
    async with make_overlay(nodes=1, start=False) as overlay:
        await start(overlay, engine, {})
        node = overlay.nodes[1]
        await node.host.sysctl("ipv4/conf/all/route_localnet", 1)
        listener = await node.host.socket(socket.SOCK_DGRAM)
        stranger = await overlay.switch.socket(socket.SOCK_DGRAM)
        with listener, stranger:
            listener.bind(("127.0.0.1", 7777))
            listener.settimeout(0.2)
            forged = udp(b"x", source="10.5.177.7", destination="127.0.0.1", dport=7777)
            stranger.sendto(forged, (node.public_ip, 8285))
            await until(partial(has_decapsulated, node, 0))
            with pytest.raises(TimeoutError):
                listener.recv(64)
            counted = await counters(node)
            assert counted["decap"]["drops"] == {"martian_destination": 1}


async def test_a_datagram_in_datagrams_is_one_turn(make_overlay: MakeOverlay, engine: str) -> None:
    async with make_overlay(nodes=1, start=False) as overlay:
        await start(overlay, engine, {1: "off"})
        node = overlay.nodes[1]
        data = udp(b"x", source="10.5.177.7", destination=node.tunnel_address, dport=7777)
        layers = 1
        while len(data) < 65000:
            data = udp(data, source="192.0.2.9", destination=node.public_ip, sport=8285, dport=8285)
            layers += 1
        assert layers > 2000
        stranger = await overlay.switch.socket(socket.SOCK_DGRAM)
        last = await overlay.switch.socket(socket.SOCK_DGRAM)
        with stranger, last:
            stranger.sendto(data, (node.public_ip, 8285))
            await until(partial(has_decapsulated, node, 0))
            # Whatever the first caused is in the queue before this one.
            last.sendto(b"short", (node.public_ip, 8285))
            await until(partial(has_decapsulated, node, 1))
            counted = await counters(node)
            assert counted["decap"]["packets_in"] == 2
            assert counted["decap"]["drops"] == {"tunnel_in_tunnel": 1, "too_short": 1}
