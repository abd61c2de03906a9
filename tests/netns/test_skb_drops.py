"""Drops planted in a namespace's kernel, each of which has to be seen by its name.

The reasons expected are those of include/net/dropreason-core.h, written down.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from tests.nodes import MakeLab, answers, must_run
from tests.packets import udp
from tests.wait import until
from tundp.errors import Unsupported
from tundp.lab.lab import Host
from tundp.linux.btf import Btf
from tundp.linux.skb_drops import MOST, Place, SkbDrop, SkbDrops

NETWORK = IPv4Network("10.5.0.0/16")
PORT = 8285
US, WIRE, NOBODY = "192.0.2.1", "192.0.2.2", "192.0.2.77"
POD = "10.5.1.2"
PEERS_POD = "10.5.2.3"
ETH_P_ALL = 3


class Machine:
    """A forwarding host with pods behind pod0, and whoever sends to it over a wire."""

    def __init__(self, host: Host, wire: Host) -> None:
        self.host = host
        self.wire = wire
        self.drops: SkbDrops
        self._frame_head = b""
        self._frames: socket.socket

    async def start(self) -> None:
        """Configure both ends, begin to look."""
        await self.host.configure("eth0", f"{US}/24")
        await self.wire.configure("eth0", f"{WIRE}/24")
        for argv in (
            ("ip", "link", "add", "pod0", "type", "veth", "peer", "name", "pod1"),
            ("ip", "link", "set", "pod1", "up"),
            ("ip", "addr", "add", "10.5.1.1/24", "dev", "pod0"),
            ("ip", "link", "set", "pod0", "mtu", "1300", "up"),
            ("ip", "route", "add", "10.5.2.0/24", "via", WIRE),
            ("ip", "neigh", "add", POD, "lladdr", "02:00:00:00:00:01", "dev", "pod0"),
        ):
            await must_run(self.host, *argv)
        await self.host.sysctl("ipv4/ip_forward", 1)
        text = await must_run(self.host, "ip", "-j", "link", "show", "eth0")
        address = json.loads(text)[0]["address"].replace(":", "")
        self._frame_head = bytes.fromhex(address) + bytes(6) + b"\x08\x00"
        self._frames = await self.wire.call(
            socket.socket, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)
        )
        self._frames.bind(("eth0", 0))
        await until(lambda: answers(self.wire, US), "the wire to be up")
        self.drops = await self.host.call(SkbDrops, NETWORK, PORT)

    def close(self) -> None:
        """Look no longer."""
        self.drops.close()
        self._frames.close()

    def read(self) -> list[SkbDrop]:
        """The drops but those of nobody's namespace: other tests' packets have such addresses."""
        return [drop for drop in self.drops.read() if drop.place is not Place.UNKNOWN]

    def frame(self, packet: bytes, *, link: bytes = b"") -> None:
        """Send a packet to the host over the wire; link: another link address than its own."""
        self._frames.send((link or self._frame_head[:6]) + self._frame_head[6:] + packet)


@contextlib.asynccontextmanager
async def a_machine(make_lab: MakeLab) -> AsyncIterator[Machine]:
    async with make_lab() as lab:
        host, wire = await lab.host("h"), await lab.host("w")
        await lab.cable(host, "eth0", wire, "eth0")
        made = Machine(host, wire)
        try:
            await made.start()
        except Unsupported as error:
            pytest.skip(f"no drops of the kernel here: {error}")
        if not made.drops.has_reasons:
            pytest.skip("this kernel gives no reasons (linux 5.17)")
        with contextlib.closing(made):
            yield made


def to_pod(
    source: str = PEERS_POD, destination: str = POD, *, size: int = 10, ttl: int = 64
) -> bytes:
    return udp(bytes(size), source=source, destination=destination, ttl=ttl)


def datagram(inner: bytes) -> bytes:
    """From the wire to the host's port, with a checksum."""
    return udp(inner, source=WIRE, destination=US, sport=PORT, dport=PORT)


Plant = Callable[[Machine], Awaitable[None]]


async def nft_drop(m: Machine) -> None:
    await must_run(
        m.host,
        "nft",
        "add table ip t; add chain ip t c { type filter hook forward priority 0; };"
        " add rule ip t c ip daddr 10.5.1.7 drop",
    )
    m.frame(to_pod(destination="10.5.1.7"))


async def strict_reverse_path(m: Machine) -> None:
    await m.host.sysctl("ipv4/conf/eth0/rp_filter", 1)
    m.frame(to_pod(source="10.5.1.99"))


async def no_route(m: Machine) -> None:
    m.frame(to_pod(destination="10.5.66.1"))


async def out_of_hops(m: Machine) -> None:
    m.frame(to_pod(ttl=1))


async def broken_header_sum(m: Machine) -> None:
    packet = bytearray(to_pod())
    packet[10] ^= 0x55
    m.frame(bytes(packet))


async def too_big(m: Machine) -> None:
    packet = udp(bytes(1372), source=PEERS_POD, destination=POD, frag=0x4000)
    m.frame(packet)


async def loopback_destination(m: Machine) -> None:
    m.frame(to_pod(destination="127.0.0.1"))


async def our_own_source(m: Machine) -> None:
    await m.host.sysctl("ipv4/conf/eth0/rp_filter", 0)
    m.frame(to_pod(source="10.5.1.1"))


async def anothers_link_address(m: Machine) -> None:
    m.frame(to_pod(), link=bytes.fromhex("02aabbccddee"))


async def no_socket(m: Machine) -> None:
    with await m.wire.socket(socket.SOCK_DGRAM) as sender:
        sender.bind((WIRE, PORT))
        sender.sendto(to_pod(), (US, PORT))


async def full_socket(m: Machine) -> None:
    with await m.host.socket(socket.SOCK_DGRAM) as receiver:
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        receiver.bind((US, PORT))
        with await m.wire.socket(socket.SOCK_DGRAM) as sender:
            for _ in range(20):
                sender.sendto(to_pod(size=900), (US, PORT))


async def wrong_datagram_sum(m: Machine) -> None:
    """Found out by whoever reads it."""
    packet = bytearray(datagram(to_pod()))
    packet[26:28] = b"\x12\x34"
    with await m.host.socket(socket.SOCK_DGRAM) as receiver:
        receiver.bind((US, PORT))
        receiver.setblocking(False)
        m.frame(bytes(packet))
        await asyncio.sleep(0.05)
        with contextlib.suppress(BlockingIOError):
            receiver.recv(2048)


async def no_arp(m: Machine) -> None:
    for name, value in (("mcast_solicit", 1), ("retrans_time_ms", 50)):
        await m.host.sysctl(f"ipv4/neigh/eth0/{name}", value)
    with await m.host.socket(socket.SOCK_DGRAM) as sender:
        sender.bind((US, PORT))
        sender.sendto(to_pod(source=POD, destination=PEERS_POD), (NOBODY, PORT))


def open_tun() -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR)
    tun_set_iff, no_pi = 0x400454CA, 0x1001
    fcntl.ioctl(descriptor, tun_set_iff, struct.pack("16sH22x", b"tun0", no_pi))
    return descriptor


async def full_tun(m: Machine) -> None:
    descriptor = await m.host.call(open_tun)
    try:
        await must_run(m.host, "ip", "link", "set", "tun0", "txqueuelen", "2", "up")
        await must_run(m.host, "ip", "route", "add", "10.5.9.0/24", "dev", "tun0")
        with await m.host.socket(socket.SOCK_DGRAM) as sender:
            for _ in range(20):
                sender.sendto(b"x", ("10.5.9.9", 9))
        await asyncio.sleep(0.05)
    finally:
        os.close(descriptor)


async def full_queue(m: Machine) -> None:
    done = await m.host.run(*["tc", "qdisc", "add", "dev", "pod0", "root", "bfifo", "limit", "1"])
    if done.returncode:
        raise Unsupported(f"no queue of tc: {done.stderr.strip()}")
    m.frame(to_pod())


async def unreachable_route(m: Machine) -> None:
    """The kernel has no reason for it, but a function of its own."""
    await must_run(m.host, "ip", "route", "add", "unreachable", "10.5.67.0/24")
    m.frame(to_pod(destination="10.5.67.1"))


CASES: dict[str, tuple[Plant, str]] = {
    "NETFILTER_DROP": (nft_drop, "eth0"),
    "IP_RPFILTER": (strict_reverse_path, "eth0"),
    "IP_INNOROUTES": (no_route, "eth0"),
    "IP_INHDR": (out_of_hops, "eth0"),
    "IP_CSUM": (broken_header_sum, "eth0"),
    "PKT_TOO_BIG": (too_big, "eth0"),
    "IP_LOCALNET": (loopback_destination, "eth0"),
    "IP_LOCAL_SOURCE": (our_own_source, "eth0"),
    "OTHERHOST": (anothers_link_address, "eth0"),
    "NO_SOCKET": (no_socket, "eth0"),
    "SOCKET_RCVBUFF": (full_socket, "eth0"),
    "UDP_CSUM": (wrong_datagram_sum, "eth0"),
    "NEIGH_FAILED": (no_arp, "eth0"),
    "FULL_RING": (full_tun, "tun0"),
    "QDISC_DROP": (full_queue, "pod0"),
    "NOT_SPECIFIED": (unreachable_route, "eth0"),
}


async def test_each_drop_is_seen_by_its_name(make_lab: MakeLab) -> None:
    async with a_machine(make_lab) as machine:
        known = Btf.of_kernel(["skb_drop_reason"]).enum("skb_drop_reason").values()
        found: list[SkbDrop] = []

        def of(reason: str) -> list[SkbDrop]:
            found.extend(machine.read())
            return [drop for drop in found if (drop.reason, drop.place) == (reason, Place.HERE)]

        for reason, (plant, device) in CASES.items():
            if f"SKB_DROP_REASON_{reason}" not in known:
                warnings.warn(f"this kernel has no {reason}: not tried", stacklevel=1)
                continue
            found.clear()
            try:
                await plant(machine)
            except Unsupported as error:
                warnings.warn(f"{reason}: not tried: {error}", stacklevel=1)
                continue
            await until(lambda reason=reason: of(reason), f"a drop named {reason}", deadline_s=20)
            (first, *_) = of(reason)
            assert first.place is Place.HERE, f"{reason}: {first}"
            assert first.device == device or not device, f"{reason}: {first}"
            assert first.function, reason
            assert abs(first.time_ns - time.time_ns()) < 60e9
            assert first.packet[0] == 0x45 and len(first.packet) >= 28


async def test_only_the_overlays_packets_of_this_namespace_are_seen(make_lab: MakeLab) -> None:
    """Others' drops of the same network, and other networks' of ours, are not."""
    async with a_machine(make_lab) as machine:
        with await machine.wire.socket(socket.SOCK_DGRAM) as sender:
            await must_run(machine.wire, "ip", "addr", "add", "10.5.3.1/32", "dev", "lo")
            sender.sendto(b"in another namespace", ("10.5.3.1", 9))
            sender.sendto(b"of another network and port", (US, 9))
            sender.sendto(to_pod(), (US, PORT))
        seen: list[SkbDrop] = []

        def is_seen() -> bool:
            seen.extend(machine.drops.read())
            return any(drop.place is Place.HERE for drop in seen)

        await until(is_seen, "the drop at the port")
        (ours,) = (drop for drop in seen if drop.place is Place.HERE)
        assert (ours.reason, ours.packet[22:24]) == ("NO_SOCKET", PORT.to_bytes(2, "big"))
        # Of other namespaces nothing comes, but what is in none any more.
        assert not [drop for drop in seen if b"in another namespace" in drop.packet]


async def test_a_pods_drop_is_told_from_ours(make_lab: MakeLab) -> None:
    """By the veth that leads to it; a namespace behind that one is nobody's of ours."""
    async with a_machine(make_lab) as machine:
        if not machine.drops.has_pods:
            pytest.skip("this kernel's BTF has no net_device.priv (linux 6.12)")
        async with make_lab() as lab:
            pod, behind = await lab.host("pod"), await lab.host("behind")
            await lab.cable(machine.host, "veth1", pod, "eth0")
            await lab.cable(pod, "veth2", behind, "eth0")
            await machine.host.configure("veth1", "10.5.4.1/24")
            await pod.configure("eth0", "10.5.4.2/24")
            await pod.configure("veth2", "10.5.5.1/24")
            await behind.configure("eth0", "10.5.5.2/24")
            await behind.route("10.5.4.0/24", "10.5.5.1")
            await pod.sysctl("ipv4/ip_forward", 1)
            await machine.host.route("10.5.5.0/24", "10.5.4.2")
            seen: list[SkbDrop] = []

            def is_seen() -> bool:
                seen.extend(machine.read())
                return bool(seen)

            with await machine.host.socket(socket.SOCK_DGRAM) as sender:
                for address in ("10.5.5.2", "10.5.4.2"):
                    with contextlib.suppress(ConnectionRefusedError):
                        sender.sendto(b"nobody listens", (address, 9))
                await until(is_seen, "the pod's drop")
            assert {(each.reason, each.device, each.place) for each in seen} == {
                ("NO_SOCKET", "eth0", Place.POD)
            }
            assert {socket.inet_ntoa(each.packet[16:20]) for each in seen} == {"10.5.4.2"}


async def test_a_flood_of_drops_is_bounded_and_counted(make_lab: MakeLab) -> None:
    """More than a look shows: those beyond it are counted, and each look stays short."""
    async with a_machine(make_lab) as machine:
        sent = 0
        shown = 0
        for _ in range(3):
            for _ in range(3000):
                machine.frame(to_pod(destination="10.5.66.1"))
                sent += 1
            got = await asyncio.to_thread(machine.drops.read)
            assert len(got) <= MOST
            shown += len(got)

        def is_all() -> bool:
            nonlocal shown
            shown += len(machine.drops.read())
            return machine.drops.lost + shown >= sent

        await until(is_all, "every drop shown or counted")
        assert shown <= 4 * MOST + 100
        assert machine.drops.lost > 0


def programs_of(pid: int) -> set[int]:
    """Ids of the BPF programs a process holds."""
    found = set()
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(OSError):
            for line in path.read_text().splitlines():
                if line.startswith("prog_id:"):
                    found.add(int(line.split()[1]))
    return found


def is_loaded(program: int) -> bool:
    """Whether the kernel still has a program (BPF_PROG_GET_FD_BY_ID, linux/bpf.h)."""
    import ctypes

    from tundp.errors import PlatformError
    from tundp.linux.bpf_call import bpf

    attributes = struct.pack("=III", program, 0, 0)
    try:
        os.close(bpf(13, ctypes.create_string_buffer(attributes, len(attributes))))
    except PlatformError:
        return False
    return True


LOOKER = f"""
import time
from ipaddress import IPv4Network
from tundp.linux.skb_drops import SkbDrops
drops = SkbDrops(IPv4Network("{NETWORK}"), {PORT})
print("looking", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_nothing_is_left_of_a_killed_look(
    make_lab: MakeLab, tmp_path: Path, how: signal.Signals
) -> None:
    async with a_machine(make_lab) as machine:
        log = tmp_path / "looker"
        with log.open("wb") as file:
            looker: subprocess.Popen[bytes] = await machine.host.popen(
                [sys.executable, "-c", LOOKER], log=file
            )
        await until(lambda: "looking" in log.read_text(), "the other process to look")
        (program,) = programs_of(looker.pid)
        assert is_loaded(program)
        looker.send_signal(how)
        await asyncio.to_thread(looker.wait)
        await until(lambda: not is_loaded(program), f"the kernel to free program {program}")
