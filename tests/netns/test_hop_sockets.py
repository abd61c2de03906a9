"""What one peer cannot take in takes nothing from the others: sockets, TUN reads, counters.

Nodes 1 and 2 live; leases of the rest are reservations with addresses nobody has, or a third node
behind a slow class of node 1's uplink.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from tests.nodes import MakeOverlay, answers, counters, has_received, must_run
from tests.stopped import stop
from tests.wait import until
from tundp.lab.lab import Host
from tundp.lab.overlay import LabNode, OverlayLab
from tundp.lab.traffic import PingStream
from tundp.linux.device import QUEUE_LEN
from tundp.wire.drop import DropReason

FULL = "hop_queue_full"
PIDFD_GETFD = 438
"""asm-generic/unistd.h, 5.6."""
ENGINES = ["reference", "simple", "mmsg", "gso", "mmsg --workers=2", "gso --workers=2"]
every_engine = pytest.mark.parametrize("engine", ENGINES)
one_of_each_kind = pytest.mark.parametrize("engine", ["reference", "gso"])
SILENT = range(101, 133)


@contextlib.contextmanager
def chatter(
    sock: socket.socket, addresses: Sequence[str], *, per_s: int, length: int = 200
) -> Iterator[list[str]]:
    """A datagram to each address `per_s` times a second, or as near to that as it gets.

    What the kernel took is listed, by address.
    """
    stop = threading.Event()
    taken: list[str] = []

    def send() -> None:
        began, rounds = time.monotonic(), 0
        while not stop.wait(0.005):
            due = int((time.monotonic() - began) * per_s)
            for _ in range(min(due - rounds, 50)):
                for address in addresses:
                    with contextlib.suppress(OSError):
                        sock.sendto(bytes(length), (address, 9))
                        taken.append(address)
            rounds = due

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    try:
        yield taken
    finally:
        stop.set()
        thread.join()
        sock.close()


def reserve(overlay: OverlayLab, numbers: Sequence[int]) -> None:
    """Leases without an end: 10.5.N.0/24 at 192.0.2.N, those above 249 in 198.18.0.0/15."""
    leases = {
        f"10.5.{number}.0-24" if number < 256 else f"10.6.{number - 256}.0-24": {
            "PublicIP": f"192.0.2.{number}" if number < 250 else f"198.18.0.{number - 249}"
        }
        for number in numbers
    }
    config = {"Network": "10.4.0.0/14", "Backend": {"Type": "udp"}}
    overlay.lease_file.write_text(json.dumps({"config": config, "leases": leases}))


def inside(number: int) -> str:
    """An address in the subnet of that lease."""
    return f"10.5.{number}.9" if number < 256 else f"10.6.{number - 256}.9"


async def start(overlay: OverlayLab, engine: str, numbers: Sequence[int], live: int = 2) -> None:
    reserve(overlay, [*range(1, live + 1), *numbers])
    for node in list(overlay.nodes.values())[:live]:
        await overlay.start_daemon(node, *f"--engine={engine}".split())
    for node in list(overlay.nodes.values())[:live]:
        await node.wait_for_peers(live + len(numbers) - 1)
        # None of the kernel's own packets in what is counted.
        await node.host.sysctl("ipv6/conf/flannel0/disable_ipv6", 1)


async def pings_lose_nothing(one: LabNode, two: LabNode, count: int) -> None:
    """A ping each 50 ms both ways, while something else goes on."""
    async with (
        PingStream(one.host, two.tunnel_address, pause_s=0.05) as there,
        PingStream(two.host, one.tunnel_address, pause_s=0.05) as back,
    ):
        for stream in (there, back):
            await until(lambda stream=stream: has_received(stream, count), f"{count} answers")
    for stream in (there, back):
        # Those of the last moments may still be under way.
        assert stream.lost <= 2, f"{stream}"


async def device_counts(host: Host) -> tuple[int, int]:
    """The kernel's own count of packets it handed to the TUN's reader, and of those it dropped."""
    (link,) = json.loads(await must_run(host, *["ip", "-j", "-s", "link", "show", "flannel0"]))
    sent = link["stats64"]["tx"]
    return sent["packets"], sent["dropped"]


async def peer_drops(node: LabNode) -> dict[str, int]:
    """Packets each peer's queue had no room for, by PublicIP; peers without any left out."""
    peers = (await node.status_document())["peers"]
    return {p["public_ip"]: n for p in peers if (n := p["traffic"]["queue_full"])}


async def is_accounted_for(
    node: LabNode, guilty: set[str], sent: int = 0, *, answered: int = 0
) -> bool:
    """Everything the kernel routed into the TUN is in our counters, under the right names.

    sent: datagrams the test sent to the guilty peers' subnets, and nobody else did. answered: at
    most so many of what they send to measure the path may have been answered.
    """
    await until(lambda: is_quiet(node), "the TUN's queue is empty")
    counted = await counters(node)
    assert counted["conserved"]
    packets, dropped = await device_counts(node.host)
    document = await node.status_document()
    assert document["kernel"]["tun_queue_drops"] == dropped
    assert counted["encap"]["reads"] == counted["encap"]["packets_in"] == packets
    assert set(counted["encap"]["drops"]) <= {FULL, DropReason.SEND_FAILED.label}
    by_peer = await peer_drops(node)
    assert set(by_peer) <= guilty
    assert sum(by_peer.values()) == counted["encap"]["drops"].get(FULL, 0)
    rows = [p["traffic"] for p in document["peers"] if p["public_ip"] in guilty]
    accounted = sum(row["packets_out"] + row["drops"] for row in rows)
    if sent:
        # The kernel does not tell whose packets it dropped at the TUN's queue.
        told = f"{accounted} of {sent}, {dropped} dropped, {answered} answered"
        assert sent - dropped <= accounted <= sent + answered, told
    return True


async def is_quiet(node: LabNode) -> bool:
    before = (await counters(node))["encap"]["packets_in"]
    await asyncio.sleep(0.1)
    return bool((await counters(node))["encap"]["packets_in"] == before)


async def has_full(node: LabNode, count: int) -> bool:
    return bool((await counters(node))["encap"]["drops"].get(FULL, 0) >= count)


@every_engine
async def test_silent_neighbours_take_nothing_from_a_live_peer(
    make_overlay: MakeOverlay, engine: str
) -> None:
    async with make_overlay(start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await start(overlay, engine, SILENT)
        sock = await one.host.socket(socket.SOCK_DGRAM)
        with chatter(sock, [inside(number) for number in SILENT], per_s=100) as sent:
            await pings_lose_nothing(one, two, 60)
            await until(lambda: has_full(one, 32), "32 packets their peers' queues had no room for")
            engine_now = (await one.status_document())["engine"]
            assert engine_now["hop_sockets"] >= 16
        assert await is_accounted_for(one, {f"192.0.2.{n}" for n in SILENT}, len(sent))


@one_of_each_kind
async def test_more_silent_neighbours_than_sockets(make_overlay: MakeOverlay, engine: str) -> None:
    # 300 of them, 256 sockets: what is stuck longest gives way, never the live peer.
    numbers = [*range(100, 250), *range(300, 450)]
    async with make_overlay(start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await must_run(one.host, "ip", "route", "add", "198.18.0.0/15", "dev", "eth0")
        await start(overlay, engine, numbers)
        sock = await one.host.socket(socket.SOCK_DGRAM)
        # Large ones fill a socket sooner, and the shared one in a moment.
        with chatter(sock, [inside(number) for number in numbers], per_s=20, length=1400):

            async def are_out() -> bool:
                return bool((await one.status_document())["engine"]["hop_sockets"] >= 256)

            await until(are_out, "all sockets are in use")
            await pings_lose_nothing(one, two, 40)
            assert (await one.status_document())["engine"]["hop_sockets"] <= 256
        guilty = {f"192.0.2.{n}" if n < 250 else f"198.18.0.{n - 249}" for n in numbers}
        # While all of them got theirs at once there was none for the live peer, for 0.1 s at most.
        assert (await peer_drops(one)).get(two.public_ip, 0) <= 10
        await is_accounted_for(one, guilty | {two.public_ip})


@every_engine
async def test_a_slow_class_of_the_uplink_slows_its_own_peer_alone(
    make_overlay: MakeOverlay, engine: str
) -> None:
    async with make_overlay(start=False, nodes=3) as overlay:
        one, two, three = overlay.nodes[1], overlay.nodes[2], overlay.nodes[3]
        await start(overlay, engine, [], live=3)
        for command in (
            "qdisc add dev eth0 root handle 1: htb default 10",
            "class add dev eth0 parent 1: classid 1:10 htb rate 10gbit",
            "class add dev eth0 parent 1: classid 1:30 htb rate 2mbit",
            "qdisc add dev eth0 parent 1:30 handle 30: pfifo limit 3000",
            "filter add dev eth0 parent 1: protocol ip prio 1 u32"
            f" match ip dst {three.public_ip}/32 flowid 1:30",
        ):
            await must_run(one.host, "tc", *command.split())
        sock = await one.host.socket(socket.SOCK_DGRAM)
        with chatter(sock, [three.tunnel_address], per_s=2000, length=1400) as sent:
            await pings_lose_nothing(one, two, 60)
            await until(lambda: has_full(one, 32), "the slow peer's queue is full")
            document = await one.status_document()
            assert document["engine"]["hop_sockets"] >= 1
            before = (await peer_drops(one))[three.public_ip]
            shown = await must_run(
                one.host,
                sys.executable,
                "-m",
                "tundp",
                "status",
                f"--admin-socket={one.admin_socket}",
            )
            rows = [line for line in shown.splitlines() if line.startswith("10.5.")]
            (row,) = [line for line in rows if three.public_ip in line]
            after = (await peer_drops(one))[three.public_ip]
            figures = [int(word.replace(",", "")) for word in re.findall(r"[\d,]+", row)]
            assert any(before <= figure <= after for figure in figures), (before, row, after)
        probes = (await three.status_document())["backend"]["path_probes"]
        assert await is_accounted_for(one, {three.public_ip}, len(sent), answered=probes)


@one_of_each_kind
async def test_a_blackhole_route_is_its_own_peers_loss(
    make_overlay: MakeOverlay, engine: str
) -> None:
    async with make_overlay(start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await start(overlay, engine, [101, *SILENT[16:]])
        await must_run(one.host, "ip", "route", "add", "blackhole", "192.0.2.101/32")
        sock = await one.host.socket(socket.SOCK_DGRAM)
        with chatter(sock, [inside(number) for number in [101, *SILENT[16:]]], per_s=200):
            await pings_lose_nothing(one, two, 40)
            await until(lambda: has_full(one, 32), "the silent neighbours' queues are full")
        await is_accounted_for(one, {f"192.0.2.{number}" for number in SILENT[16:]})
        assert (await counters(one))["encap"]["drops"]["send_failed"] > 0


@one_of_each_kind
async def test_a_peer_that_comes_alive_again(make_overlay: MakeOverlay, engine: str) -> None:
    """From its own socket as before, on the wire exactly as from the shared one."""
    async with make_overlay(start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await start(overlay, engine, SILENT)
        await must_run(one.host, "ip", "link", "set", "lo", "down")
        sock = await one.host.socket(socket.SOCK_DGRAM)
        wire = await two.host.call(
            socket.socket, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800)
        )
        with (
            wire,
            chatter(sock, [inside(number) for number in SILENT], per_s=200),
        ):
            await until(lambda: has_full(one, 32), "all queues are full")
            await two.host.configure("eth0", "192.0.2.101/24")

            seen = set()
            wire.settimeout(0.2)

            async def is_heard() -> bool:
                with contextlib.suppress(TimeoutError):
                    packet = (await asyncio.to_thread(wire.recv, 2048))[14:]
                    # Of datagrams to it: DF, TTL and protocol; addresses; ports. What measures
                    # the path is larger.
                    to_it = packet[16:20] == socket.inet_aton("192.0.2.101") and packet[9] == 17
                    if to_it and len(packet) < 500:
                        seen.add((packet[6:10], packet[12:20], packet[20:24]))
                return bool(seen)

            await until(is_heard, "datagrams to the address that lives now", poll_s=0)
        addresses = socket.inet_aton("192.0.2.1") + socket.inet_aton("192.0.2.101")
        port = (8285).to_bytes(2, "big")
        assert seen == {(b"\x00\x00\x40\x11", addresses, port + port)}
        assert (await one.status_document())["engine"]["hop_sockets"] > 0


async def test_what_the_kernel_drops_before_us_has_a_name(make_overlay: MakeOverlay) -> None:
    async with make_overlay(start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await start(overlay, "mmsg", [])
        sock = await one.host.socket(socket.SOCK_DGRAM)
        stop(one.daemon.pid)
        try:
            for _ in range(QUEUE_LEN + 300):
                sock.sendto(b"x", (two.tunnel_address, 9))
        finally:
            sock.close()
            one.daemon.send_signal(signal.SIGCONT)
        await is_accounted_for(one, set())
        dropped = (await one.status_document())["kernel"]["tun_queue_drops"]
        assert dropped == 300
        # A new device begins at 0; ours does not.
        await must_run(one.host, "ip", "link", "del", "flannel0")
        await until(lambda: answers(one.host, two.tunnel_address), "the device is there again")
        assert (await device_counts(one.host))[1] == 0
        assert (await one.status_document())["kernel"]["tun_queue_drops"] == dropped
        shown = await must_run(
            one.host, sys.executable, "-m", "tundp", "status", f"--admin-socket={one.admin_socket}"
        )
        assert f"tun_queue_full {dropped}" in shown


async def test_bad_checksums_from_the_wire_are_shown(make_overlay: MakeOverlay) -> None:
    async with make_overlay(start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await start(overlay, "mmsg", [])
        sender = await two.host.socket(socket.SOCK_RAW, socket.IPPROTO_UDP)
        bad = struct.pack("!HHHH", 8285, 8285, 108, 0xBEEF) + bytes(100)
        with sender:
            for _ in range(1000):
                sender.sendto(bad, (one.public_ip, 0))

        async def is_shown() -> bool:
            lost = (await one.status_document())["kernel"]
            return bool(lost["udp_checksum_errors"] == lost["udp_errors"] == 1000)

        await until(is_shown, "1,000 datagrams with a wrong checksum")


@every_engine
async def test_no_socket_uses_what_anybody_says_of_a_path(
    make_overlay: MakeOverlay, engine: str
) -> None:
    """linux/in.h: IP_PMTUDISC_INTERFACE is 4; PROBE, 3, which ignores it as well, measures."""
    async with make_overlay(start=False) as overlay:
        one = overlay.nodes[1]
        await start(overlay, engine, SILENT)
        sock = await one.host.socket(socket.SOCK_DGRAM)
        with chatter(sock, [inside(number) for number in SILENT], per_s=100):
            await until(lambda: has_full(one, 1), "a hop that has a socket of its own")
            found = [each for each in discoveries(one.daemon.pid) if each != 3]
        assert len(found) > 1
        assert set(found) == {4}


def discoveries(pid: int) -> list[int]:
    """IP_MTU_DISCOVER of each UDP socket that a process has bound."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    found = []
    try:
        for number in os.listdir(f"/proc/{pid}/fd"):
            fd = libc.syscall(PIDFD_GETFD, pidfd, int(number), 0)
            if fd < 0:
                continue  # closed meanwhile
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                os.close(fd)
                continue
            with socket.socket(fileno=fd) as sock:
                if (sock.family, sock.type) == (socket.AF_INET, socket.SOCK_DGRAM):
                    found.append(sock.getsockopt(socket.IPPROTO_IP, 10))  # IP_MTU_DISCOVER
    finally:
        os.close(pidfd)
    return found
