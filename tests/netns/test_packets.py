"""What crosses the overlay, seen from both ends and from the wire between."""

from __future__ import annotations

import asyncio
import csv
import io
import os
import random
import socket
import struct
import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest

from tests.nodes import MakeOverlay, counters, has_decapsulated
from tests.packets import ipv4, with_ttl
from tests.wait import DEADLINE_S, until
from tundp.lab.lab import Host
from tundp.lab.offload import set_checksum_offload
from tundp.lab.overlay import STORE_ADDRESS, OverlayLab
from tundp.lab.traffic import Answer, ping, transfer
from tundp.wire.drop import DropReason

MARKER = b"\x00the capture ends here"

ENGINES = os.environ.get("TUNDP_TEST_ENGINES", "reference;mmsg;gso").split(";")
pytestmark = pytest.mark.parametrize("engine", ENGINES)


async def checked_ping(host: Host, address: Any, **options: Any) -> Answer:
    answer = await ping(host, address, **options)
    assert answer is not None, f"no answer from {address}"
    return answer


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
async def test_host_ping_costs_two_hops_and_pod_ping_four(
    make_overlay: MakeOverlay, loop: str
) -> None:
    # flannel decrements at both ends: 64 leaves, 62 arrives; two kernels forwarding cost two more.
    async with make_overlay(f"--loop={loop}", pods=True) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        assert (await one.status_document())["loop"] == loop
        answer = await checked_ping(one.host, two.tunnel_address)
        assert answer.is_echo_reply
        assert answer.ttl == 62
        answer = await checked_ping(one.pod, two.pod_address)
        assert answer.is_echo_reply
        assert answer.ttl == 60
        assert answer.source == IPv4Address(two.pod_address)
        for source, address in (
            (one.pod, two.tunnel_address),
            (two.pod, str(one.gateway.ip)),
            (one.host, two.pod_address),
        ):
            assert (await checked_ping(source, address)).is_echo_reply
        for node in (one, two):
            # What nodes and pods say to each other has right addresses all of it.
            counted = await counters(node)
            assert counted["source_mismatches"] == counted["destination_mismatches"] == 0
            assert counted["decap"]["packets_out"] == counted["decap"]["packets_in"] >= 5


async def test_every_size_up_to_the_mtu_and_beyond_it_arrives(make_overlay: MakeOverlay) -> None:
    # 1444 fills the MTU of 1472; more is fragmented by the kernel before it reaches the TUN.
    async with make_overlay(pods=True) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        for size in (0, 1, 7, 8, 1443, 1444, 1445, 2000, 8000):
            answer = await checked_ping(one.pod, two.pod_address, size=size)
            assert answer.is_echo_reply
            assert len(answer.packet) == 28 + size


async def test_tcp_arrives_unchanged_in_both_directions(make_overlay: MakeOverlay) -> None:
    async with make_overlay(pods=True) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        for source, destination in ((one, two), (two, one)):
            _, is_equal = await transfer(
                source.pod, destination.pod, destination.pod_address, payload_len=24 << 20
            )
            assert is_equal
        for node in (one, two):
            counted = await counters(node)
            assert counted["conserved"]
            assert counted["encap"]["packets_in"] > 1000
            assert counted["encap"]["drops"] == {}
            assert counted["decap"]["drops"] == {}


async def test_wire_is_bare_ipv4_in_udp_8285_with_valid_checksums(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    # Judged by tshark, not by our own parser.
    async with make_overlay(pods=True) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        for node in (one, two):
            # veth leaves outer checksums to a NIC that is not there: make the kernel finish them.
            await set_checksum_offload(node.host, "eth0", is_on=False)
        capture = tmp_path / "wire.pcap"
        tcpdump = await overlay.switch.popen(
            [
                "tcpdump",
                "--immediate-mode",
                "--buffer-size=16384",
                "-ni",
                "port1",
                "-U",
                "-w",
                str(capture),
                "udp port 8285",
            ]
        )

        def has_begun() -> bool:
            assert tcpdump.poll() is None, "tcpdump ended"
            return capture.exists() and capture.stat().st_size >= 24  # the file header

        try:
            await until(has_begun)
            subnets = {one.gateway.network, two.gateway.network}
            await checked_ping(one.pod, two.pod_address)
            assert (await transfer(one.pod, two.pod, two.pod_address, payload_len=300_000))[1]
            marker = await overlay.switch.socket(socket.SOCK_DGRAM)
            with marker:
                # Again and again: tcpdump's ring may be full of the transfer at first.
                def has_marker() -> bool:
                    marker.sendto(MARKER, (one.public_ip, 8285))
                    return MARKER in capture.read_bytes()

                await until(has_marker, poll_s=0.05)
        finally:
            tcpdump.terminate()
            await asyncio.to_thread(tcpdump.wait)
        rows = await asyncio.to_thread(decode, capture)
    # The marker is the switch's; TCP may still have said goodbye behind it.
    rows = [row for row in rows if not row["ip.src"].startswith(STORE_ADDRESS)]
    assert len(rows) > 100
    assert {row["udp.srcport"] for row in rows} == {"8285"}
    assert {row["udp.dstport"] for row in rows} == {"8285"}
    assert {tuple(row["frame.protocols"].split(":")[2:6]) for row in rows} == {
        ("ip", "udp", "ip", "icmp"),
        ("ip", "udp", "ip", "tcp"),
    }
    for row in rows:
        outer, inner = row["ip.src"].split(",")[:2]
        assert outer in (one.public_ip, two.public_ip)
        assert any(IPv4Address(inner) in subnet for subnet in subnets)
        assert set(row["ip.checksum.status"].split(",")) == {"1"}, row
        assert row["udp.checksum.status"] == "1", row
        assert row["tcp.checksum.status"] in ("", "1"), row
        assert int(row["udp.length"]) == 8 + int(row["ip.len"].split(",")[1])
        # Routers may fragment what carries packets; what measures the path they may not.
        if "tcp" in row["frame.protocols"]:
            assert row["ip.flags.df"].split(",")[0] in ("0", "False")
        assert row["ip.ttl"].split(",")[0] == "64"
        assert row["ip.dsfield"].split(",")[0] == "0x00"


async def test_traceroute_has_no_star(make_overlay: MakeOverlay) -> None:
    async with make_overlay(pods=True) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        seen = []
        for ttl in range(1, 6):
            answer = await checked_ping(one.pod, two.pod_address, ttl=ttl)
            seen.append((answer.icmp_type, str(answer.source)))
        assert seen == [
            (11, str(one.gateway.ip)),  # node1's kernel forwards to the TUN
            (11, one.tunnel_address),  # tundp on node1
            (11, two.tunnel_address),  # tundp on node2, sent back through the overlay
            (11, two.tunnel_address),  # node2's kernel forwards to the pod
            (0, two.pod_address),
        ]
        assert (await counters(one))["encap"]["drops"] == {"hop_limit_exceeded": 1}
        assert (await counters(two))["decap"]["drops"] == {"hop_limit_exceeded": 1}
        assert (await counters(two))["icmp_to_peers"] == 1


async def test_unleased_destination_is_unreachable_for_pod_and_host(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay(pods=True) as overlay:
        one = overlay.nodes[1]
        nowhere = str(next(unleased(overlay)) + 9)
        answer = await checked_ping(one.pod, nowhere)
        assert (answer.icmp_type, answer.code) == (3, 0)
        assert str(answer.source) == one.tunnel_address
        assert answer.ttl == 7  # flannel sends it with 8, the kernel forwards it once
        assert len(answer.packet) == 56
        assert answer.packet[1] == 0  # TOS
        assert answer.packet[4:8] == bytes(4)  # ID, flags and offset
        answer = await checked_ping(one.host, nowhere)
        assert (answer.icmp_type, answer.code) == (3, 0)
        assert (await counters(one))["encap"]["drops"] == {"no_route": 2}


async def test_narrow_path_is_reported_to_df_and_fragmented_without(
    make_overlay: MakeOverlay,
) -> None:
    # The path to node2 carries 1400, the TUN 1472. flannel would fragment the outer datagram.
    async with make_overlay(pods=True) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        index = await one.host.index("eth0")
        await one.host.netlink.call(
            "narrow the path",
            "route",
            "add",
            dst=f"{two.public_ip}/32",
            oif=index,
            metrics={"mtu": 1400},
        )

        async def is_narrow() -> bool:
            # Without DF first: once the pod has heard of the narrow path it fragments by itself.
            answer = await checked_ping(one.pod, two.pod_address, size=1400)
            assert answer.is_echo_reply
            return bool((await one.status_document())["routing"]["narrow_paths"])

        await until(is_narrow, "the route to be looked up")
        before = (await counters(one))["fragments_out"]
        assert await is_narrow()
        answer = await checked_ping(one.pod, two.pod_address, size=1400, dont_fragment=True)
        assert (answer.icmp_type, answer.code) == (3, 4)
        assert answer.next_hop_mtu == 1372
        assert str(answer.source) == one.tunnel_address
        answer = await checked_ping(one.pod, two.pod_address, size=1344, dont_fragment=True)
        assert answer.is_echo_reply
        counted = await counters(one)
        assert counted["encap"]["drops"] == {"too_big": 1}
        # The node's own answers to what the peer sends to measure the path are fragmented, too.
        answers = 2 * (await two.status_document())["backend"]["path_probes"]
        assert before + 2 <= counted["fragments_out"] <= before + 2 + answers
        assert counted["fragments_out"] % 2 == 0
        assert counted["conserved"]
        _, is_equal = await transfer(one.pod, two.pod, two.pod_address, payload_len=8 << 20)
        assert is_equal


async def test_mtu_follows_the_underlay(make_overlay: MakeOverlay) -> None:
    async with make_overlay(mtu=9000, pods=True) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        assert one.environment["FLANNEL_MTU"] == "8972"
        answer = await checked_ping(one.pod, two.pod_address, size=8944, dont_fragment=True)
        assert answer.is_echo_reply


async def test_garbage_from_the_wire_is_counted_by_name(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        two = overlay.nodes[2]
        good = packet(str(overlay.nodes[1].gateway.ip), two.tunnel_address, 253, b"")
        datagrams = {
            DropReason.TOO_SHORT: [b"", b"x", good[:19], b"\x60" + bytes(18)],
            DropReason.NOT_IPV4: [bytes(20), b"\x60" + bytes(59), b"\xf5" + bytes(1000)],
            DropReason.BAD_HEADER_LENGTH: [b"\x44" + good[1:], b"\x4f" + good[1:]],
            DropReason.BAD_TOTAL_LENGTH: [good[:2] + b"\x00\x15" + good[4:], b"\x45" + bytes(19)],
            DropReason.BAD_HEADER_CHECKSUM: [good[:10] + b"\xab\xcd" + good[12:]],
            DropReason.HOP_LIMIT_EXCEEDED: [with_ttl(good, 1), with_ttl(good, 0)],
        }
        sender = await overlay.switch.socket(socket.SOCK_DGRAM)
        with sender:
            for batch in datagrams.values():
                for datagram in batch:
                    sender.sendto(datagram, (two.public_ip, 8285))
            # The largest datagram there is, padding behind a valid packet, and noise.
            sender.sendto(good + bytes(65507 - len(good)), (two.public_ip, 8285))
            rng = random.Random(5)
            noise = [rng.randbytes(rng.randrange(0, 2000)) for _ in range(500)]
            for datagram in noise:
                sender.sendto(datagram, (two.public_ip, 8285))
        expected = sum(len(batch) for batch in datagrams.values()) + 1 + len(noise)
        await until(lambda: has_decapsulated(two, expected - 1))
        counted = await counters(two)
        assert counted["conserved"]
        assert counted["decap"]["packets_in"] == expected
        assert counted["decap"]["packets_out"] >= 1
        for reason, batch in datagrams.items():
            assert counted["decap"]["drops"][reason.label] >= len(batch)
        answer = await checked_ping(overlay.nodes[1].host, two.tunnel_address)
        assert answer.is_echo_reply


async def test_nobody_may_send_in_our_own_name(make_overlay: MakeOverlay) -> None:
    # accept_local is on for our ICMP, so the kernel would take these for its own.
    async with make_overlay("--source-check=off") as overlay:
        two = overlay.nodes[2]
        own = [two.tunnel_address, str(two.gateway.ip), two.public_ip, "127.0.0.1", "0.0.0.0"]
        listener = await two.host.socket(socket.SOCK_DGRAM)
        sender = await overlay.switch.socket(socket.SOCK_DGRAM)
        with listener, sender:
            listener.bind(("0.0.0.0", 9999))
            listener.setblocking(False)
            for source in own:
                udp = struct.pack("!HHHH", 1, 9999, 9, 0) + b"x"
                sender.sendto(packet(source, two.tunnel_address, 17, udp), (two.public_ip, 8285))
            await until(lambda: has_decapsulated(two, len(own) - 1))
            counted = await counters(two)
            assert counted["decap"]["drops"] == {"martian_source": len(own)}
            with pytest.raises(BlockingIOError):
                listener.recv(100)
            # The same datagram from anybody else arrives: the test would see one that passed.
            udp = struct.pack("!HHHH", 1, 9999, 9, 0) + b"x"
            sender.sendto(
                packet("198.51.100.1", two.tunnel_address, 17, udp), (two.public_ip, 8285)
            )
            assert await asyncio.to_thread(receive_soon, listener) == b"x"


@pytest.mark.parametrize("check", ["off", "count", "enforce"])
async def test_source_check(make_overlay: MakeOverlay, check: str) -> None:
    # The switch is no peer. It claims to send for node1's subnet.
    async with make_overlay(f"--source-check={check}") as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        spoofed = packet(str(one.gateway.ip), two.tunnel_address, 253, b"")
        sender = await overlay.switch.socket(socket.SOCK_DGRAM)
        with sender:
            sender.sendto(spoofed, (two.public_ip, 8285))
        await until(lambda: has_decapsulated(two, 0))
        counted = await counters(two)
        is_dropped = check == "enforce"
        assert counted["decap"]["packets_out"] == (0 if is_dropped else 1)
        assert counted["decap"]["drops"] == ({"source_mismatch": 1} if is_dropped else {})
        assert counted["source_mismatches"] == (1 if check == "count" else 0)
        answer = await checked_ping(one.host, two.tunnel_address)
        assert answer.is_echo_reply


async def test_nobody_listening_and_firewalled_peers_lose_only_their_own_packets(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay(nodes=3) as overlay:
        one, two, three = (overlay.nodes[n] for n in (1, 2, 3))
        index = await one.host.index("eth0")
        await one.host.netlink.call(
            "make node2 unreachable", "route", "add", dst=f"{two.public_ip}/32", type="unreachable"
        )
        assert index
        assert await ping(one.host, two.tunnel_address, timeout_s=0.3) is None
        assert (await checked_ping(one.host, three.tunnel_address)).is_echo_reply
        counted = await counters(one)
        assert counted["encap"]["drops"] == {"send_unreachable": 1}
        assert counted["conserved"]


def packet(source: str, destination: str, protocol: int, payload: bytes) -> bytes:
    return ipv4(payload, protocol, source=source, destination=destination, frag=0, ttl=9)


def receive_soon(sock: socket.socket) -> bytes:
    sock.settimeout(DEADLINE_S)
    return sock.recv(100)


def decode(capture: Any) -> list[dict[str, str]]:
    """Each frame as tshark sees it when told that port 8285 carries IP."""
    fields = [
        "frame.protocols", "ip.src", "ip.len", "ip.ttl", "ip.dsfield", "ip.flags.df",
        "ip.checksum.status", "udp.srcport", "udp.dstport", "udp.length",
        "udp.checksum.status", "tcp.checksum.status",
    ]  # fmt: skip
    argv = ["tshark", "-r", str(capture), "-d", "udp.port==8285,ip", "-T", "fields"]
    argv += ["-E", "header=y", "-E", "separator=;"]
    for layer in ("ip", "udp", "tcp"):
        argv += ["-o", f"{layer}.check_checksum:TRUE"]
    for field in fields:
        argv += ["-e", field]
    text = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    return list(csv.DictReader(io.StringIO(text), delimiter=";"))


def unleased(overlay: OverlayLab) -> Iterator[Any]:
    held = {node.gateway.network for node in overlay.nodes.values()}
    for subnet in IPv4Network("10.5.0.0/16").subnets(new_prefix=24):
        if subnet not in held:
            yield subnet.network_address
