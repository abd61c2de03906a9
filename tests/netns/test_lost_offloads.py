"""The kernel refuses a super-packet while we run: the same packets go one by one, at once.

A kernel that refuses is had by promising ours more than it takes: it says EINVAL to more
than 128 datagrams in one send, or packets in one UDP super-packet to the TUN.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

import pytest

from tundp.choices import Engine, SourceCheck
from tundp.engine.base import PATH_STATE_S, EngineContext
from tundp.engine.native.engine import REFUSED, NativeEngine
from tundp.engine.native.hops import NO_GSO_ORIGIN
from tundp.lease.fib import build_fib
from tundp.lease.peers import Peer
from tundp.linux import uapi
from tundp.linux.offload import ALL, KernelOffloads, Offload, set_udp_gro
from tundp.linux.tun import Tun
from tundp.linux.udp import open_udp
from tundp.wire import ip, transport
from tundp.wire.policy import Policy

PORT = 8285
TOO_MANY = 200
OWN = IPv4Network("10.5.1.0/24")
PEER = Peer(IPv4Network("10.5.2.0/24"), IPv4Address("192.0.2.2"))
DEADLINE_S = 20.0


@dataclass
class Node:
    """One engine in this process, its TUN on a lab host; the peer is a bare socket."""

    engine: NativeEngine
    tun: Tun
    host: object
    peer: socket.socket


@contextlib.asynccontextmanager
async def node(make_lab, offloads=ALL):
    async with make_lab() as lab:
        left, right = await lab.host("left"), await lab.host("right")
        await lab.cable(left, "eth0", right, "eth0")
        await left.configure("eth0", "192.0.2.1/24")
        await right.configure("eth0", "192.0.2.2/24")
        sock = await left.call(open_udp, IPv4Address("192.0.2.1"), PORT)
        peer = await right.call(open_udp, PEER.address, PORT)
        peer.settimeout(DEADLINE_S)
        engine = NativeEngine(
            Engine.GSO,
            [sock],
            EngineContext(
                fib=build_fib([PEER], own_subnet=None, port=PORT, generation=1),
                policy=Policy(tun_address=int(OWN.network_address), source_check=SourceCheck.COUNT),
                loop=asyncio.get_running_loop(),
            ),
            kernel=KernelOffloads(offloads=offloads, max_segments=TOO_MANY, missing={}),
        )
        tun = await left.call(Tun, "flannel%d", engine.tun_mode)
        try:
            await left.configure(tun.name, f"{OWN.network_address}/32", mtu=1472)
            await left.netlink.ensure_route(await left.index(tun.name), IPv4Network("10.5.0.0/16"))
            yield Node(engine, tun, left, peer)
        finally:
            engine.stop()
            tun.close()
            sock.close()
            peer.close()


def datagram(number: int) -> bytes:
    return number.to_bytes(4, "big") * 5


def overlay_packet(number: int) -> bytes:
    """From a pod of the peer to our TUN's address, port 7000, all checksums right."""
    body = datagram(number)
    header = ip.build_header(
        payload_len=8 + len(body),
        source=int(PEER.subnet.network_address) + 2,
        destination=int(OWN.network_address),
        ip_proto=transport.PROTO_UDP,
        ttl=64,
        identification=number,
        flags_offset=ip.FLAG_DF,
    )
    packet = bytearray(header + bytes.fromhex("1b581b58") + (8 + len(body)).to_bytes(2, "big"))
    packet += b"\0\0" + body
    transport.finish(packet, 20, 26, transport.pseudo_sum(packet, 8 + len(body)))
    return bytes(packet)


async def test_a_refused_send_goes_singly_and_stays_so_for_a_while(make_lab, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    async with node(make_lab) as one:
        sender = await one.host.socket(socket.SOCK_DGRAM)
        with sender:
            sender.setsockopt(socket.IPPROTO_UDP, uapi.UDP_SEGMENT, len(datagram(0)))
            # Two super-packets wait in the TUN when the engine begins: one run of 200 and a rest.
            for first in (0, 128):
                burst = b"".join(datagram(first + each) for each in range(128))
                sender.sendto(burst, (str(PEER.subnet.network_address + 2), PORT))
            one.engine.attach(one.tun)
            arrived = [await asyncio.to_thread(one.peer.recv, 2048) for _ in range(256)]
            assert [packet[28:] for packet in arrived] == [datagram(each) for each in range(256)]
            assert {packet[8] for packet in arrived} == {63}
            await asyncio.sleep(0.05)  # the notice reaches the loop
            counted = one.engine.counters()
            assert counted.is_conserved
            assert counted.encap.packets_out == 256
            assert counted.errnos == {"EINVAL": 1}
            assert counted.offload_fallbacks == 1
            assert caplog.text.count("takes no UDP_SEGMENT") == 1
            # Afterwards nothing is refused any more, since nothing is asked.
            sender.sendto(b"".join(map(datagram, range(100))), ("10.5.2.2", PORT))
            for each in range(100):
                packet = await asyncio.to_thread(one.peer.recv, 2048)
                assert packet[28:] == datagram(each)
            assert one.engine.counters().offload_fallbacks == 1
            supers = one.engine.counters().encap.super_out
            ((hop_id, path),) = one.engine.path_states().items()
            assert (path.inner_mtu, path.no_gso, path.origin) == (None, True, NO_GSO_ORIGIN)
            hop = one.engine.hop_counters([hop_id])[hop_id]
            assert (hop.packets_out, hop.last_errno) == (356, "EINVAL")
            # A new FIB does not forget it, time does.
            one.engine.install(build_fib([PEER], own_subnet=None, port=PORT, generation=2))
            sender.sendto(b"".join(map(datagram, range(100))), ("10.5.2.2", PORT))
            for _ in range(100):
                await asyncio.to_thread(one.peer.recv, 2048)
            assert one.engine.counters().encap.super_out == supers
            now = asyncio.get_running_loop().time()
            monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now + PATH_STATE_S + 1)
            one.engine._expire()
            sender.sendto(b"".join(map(datagram, range(100))), ("10.5.2.2", PORT))
            for _ in range(100):
                await asyncio.to_thread(one.peer.recv, 2048)
            assert one.engine.counters().encap.super_out == supers + 1
            assert one.engine.path_states() == {}


async def test_a_refused_tun_write_goes_singly_and_stays_so_for_a_while(
    make_lab, caplog, monkeypatch
):
    caplog.set_level(logging.INFO)
    async with node(make_lab) as one:
        receiver = await one.host.socket(socket.SOCK_DGRAM)
        with receiver:
            receiver.bind((str(OWN.network_address), 7000))
            receiver.settimeout(DEADLINE_S)
            size = len(overlay_packet(0))
            one.peer.setsockopt(socket.IPPROTO_UDP, uapi.UDP_SEGMENT, size)
            for first in (0, 128):
                burst = b"".join(overlay_packet(first + each) for each in range(128))
                one.peer.sendto(burst, ("192.0.2.1", PORT))
            one.engine.attach(one.tun)
            arrived = [await asyncio.to_thread(receiver.recv, 2048) for _ in range(256)]
            assert arrived == [datagram(each) for each in range(256)]
            await asyncio.sleep(0.05)
            counted = one.engine.counters()
            assert counted.is_conserved
            assert counted.decap.packets_out == 256
            assert counted.decap.bytes_in == counted.decap.bytes_out == 256 * size
            assert counted.errnos == {"EINVAL": 1}
            assert counted.offload_fallbacks == 1
            assert caplog.text.count("udp-coalesce is off for 10 minutes") == 1
            assert Offload.UDP_COALESCE not in one.engine.offloads().in_use
            assert one.engine.offloads().disabled[Offload.UDP_COALESCE].reason == REFUSED
            assert f"without udp-coalesce: {REFUSED}" in one.engine.describe()
            # The 56 behind the first 200 were merged already, and few enough.
            assert counted.decap.super_out == 1
            one.peer.sendto(b"".join(map(overlay_packet, range(100))), ("192.0.2.1", PORT))
            for each in range(100):
                assert await asyncio.to_thread(receiver.recv, 2048) == datagram(each)
            assert one.engine.counters().decap.super_out == 1
            now = asyncio.get_running_loop().time()
            monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now + PATH_STATE_S + 1)
            one.engine._expire()
            one.peer.sendto(b"".join(map(overlay_packet, range(100))), ("192.0.2.1", PORT))
            for each in range(100):
                assert await asyncio.to_thread(receiver.recv, 2048) == datagram(each)
            assert one.engine.counters().decap.super_out == 2
            assert Offload.UDP_COALESCE in one.engine.offloads().in_use


@pytest.mark.parametrize("is_on", [True, False])
async def test_udp_gro_is_what_the_engine_says(make_lab, is_on):
    offloads = ALL if is_on else ALL - {Offload.UDP_GRO}
    async with node(make_lab, offloads) as one:
        sock = one.engine._socks[0]
        assert bool(sock.getsockopt(socket.IPPROTO_UDP, uapi.UDP_GRO)) is is_on
        assert set_udp_gro(sock, is_on=False) is False
