"""The kernel refuses a super-packet while we run: the same packets go one by one, at once.

A kernel that refuses is had by promising ours more than it takes: it says EINVAL to more
than 128 datagrams in one send, or packets in one UDP super-packet to the TUN.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from ipaddress import IPv4Network
from typing import Any

import pytest

from tests.nodes import PORT, MakeLab, engine_node
from tests.packets import udp
from tests.routes import peer as peer_of
from tests.wait import DEADLINE_S, until
from tundp.choices import SourceCheck
from tundp.engine.base import NO_GSO_ORIGIN, PATH_STATE_S
from tundp.engine.native.engine import REFUSED
from tundp.linux import uapi
from tundp.linux.offload import ALL, KernelOffloads, Offload, set_udp_gro
from tundp.linux.udp import open_udp

TOO_MANY = 200
OWN = IPv4Network("10.5.1.0/24")
PEER = peer_of("10.5.2.0/24", "192.0.2.2")


@contextlib.asynccontextmanager
async def node(make_lab: MakeLab, offloads: Any = ALL) -> AsyncIterator[Any]:
    """A node that believes the kernel takes 200 datagrams at once; its peer is a bare socket."""
    kernel = KernelOffloads(offloads=offloads, max_segments=TOO_MANY, missing={})
    async with make_lab() as lab:
        left, right = await lab.host("left"), await lab.host("right")
        await lab.cable(left, "eth0", right, "eth0")
        await right.configure("eth0", "192.0.2.2/24")
        with await right.call(open_udp, PEER.endpoint.address, PORT) as peer:
            peer.settimeout(DEADLINE_S)
            async with engine_node(
                left, "gso", 1, peers=[PEER], source_check=SourceCheck.COUNT, kernel=kernel
            ) as one:
                yield one, peer


def datagram(number: int) -> bytes:
    return number.to_bytes(4, "big") * 5


def overlay_packet(number: int) -> bytes:
    """From a pod of the peer to our TUN's address, port 7000, all checksums right."""
    return udp(
        datagram(number),
        source=int(PEER.subnet.network_address) + 2,
        destination=int(OWN.network_address),
        ident=number,
        sport=7000,
        dport=7000,
    )


async def test_a_refused_send_goes_singly_and_stays_so_for_a_while(
    make_lab: MakeLab, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    async with node(make_lab) as (one, peer):
        sender = await one.host.socket(socket.SOCK_DGRAM)
        with sender:
            sender.setsockopt(socket.IPPROTO_UDP, uapi.UDP_SEGMENT, len(datagram(0)))
            # Two super-packets wait in the TUN when the engine begins: one run of 200 and a rest.
            for first in (0, 128):
                burst = b"".join(datagram(first + each) for each in range(128))
                sender.sendto(burst, (str(PEER.subnet.network_address + 2), PORT))
            one.engine.attach(one.tun)
            arrived = [await asyncio.to_thread(peer.recv, 2048) for _ in range(256)]
            assert [packet[28:] for packet in arrived] == [datagram(each) for each in range(256)]
            assert {packet[8] for packet in arrived} == {63}
            await until(lambda: "takes no UDP_SEGMENT" in caplog.text)
            counted = one.engine.counters()
            assert counted.is_conserved
            assert counted.encap.packets_out == 256
            assert counted.errnos == {"EINVAL": 1}
            assert counted.offload_fallbacks == 1
            assert caplog.text.count("takes no UDP_SEGMENT") == 1
            # Afterwards nothing is refused any more, since nothing is asked.
            sender.sendto(b"".join(map(datagram, range(100))), ("10.5.2.2", PORT))
            for each in range(100):
                packet = await asyncio.to_thread(peer.recv, 2048)
                assert packet[28:] == datagram(each)
            assert one.engine.counters().offload_fallbacks == 1
            supers = one.engine.counters().encap.super_out
            ((hop_id, path),) = one.engine.path_states().items()
            assert (path.inner_mtu, path.no_gso, path.origin) == (None, True, NO_GSO_ORIGIN)
            hop = one.engine.hop_counters([hop_id])[hop_id]
            assert (hop.packets_out, hop.last_errno) == (356, "EINVAL")
            # A new FIB does not forget it, time does.
            one.install([PEER])
            sender.sendto(b"".join(map(datagram, range(100))), ("10.5.2.2", PORT))
            for _ in range(100):
                await asyncio.to_thread(peer.recv, 2048)
            assert one.engine.counters().encap.super_out == supers
            now = asyncio.get_running_loop().time()
            monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now + PATH_STATE_S + 1)
            one.engine._expire()
            sender.sendto(b"".join(map(datagram, range(100))), ("10.5.2.2", PORT))
            for _ in range(100):
                await asyncio.to_thread(peer.recv, 2048)
            assert one.engine.counters().encap.super_out == supers + 1
            assert one.engine.path_states() == {}


async def test_a_refused_tun_write_goes_singly_and_stays_so_for_a_while(
    make_lab: MakeLab, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    async with node(make_lab) as (one, peer):
        receiver = await one.host.socket(socket.SOCK_DGRAM)
        with receiver:
            receiver.bind((str(OWN.network_address), 7000))
            receiver.settimeout(DEADLINE_S)
            # Merged while nobody reads, as by an engine that had the socket before.
            set_udp_gro(one.engine._socks[0], is_on=True)
            size = len(overlay_packet(0))
            peer.setsockopt(socket.IPPROTO_UDP, uapi.UDP_SEGMENT, size)
            for first in (0, 128):
                burst = b"".join(overlay_packet(first + each) for each in range(128))
                peer.sendto(burst, ("192.0.2.1", PORT))
            one.engine.attach(one.tun)
            arrived = [await asyncio.to_thread(receiver.recv, 2048) for _ in range(256)]
            assert arrived == [datagram(each) for each in range(256)]
            await until(lambda: "udp-coalesce is off" in caplog.text)
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
            peer.sendto(b"".join(map(overlay_packet, range(100))), ("192.0.2.1", PORT))
            for each in range(100):
                assert await asyncio.to_thread(receiver.recv, 2048) == datagram(each)
            assert one.engine.counters().decap.super_out == 1
            now = asyncio.get_running_loop().time()
            monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now + PATH_STATE_S + 1)
            one.engine._expire()
            peer.sendto(b"".join(map(overlay_packet, range(100))), ("192.0.2.1", PORT))
            for each in range(100):
                assert await asyncio.to_thread(receiver.recv, 2048) == datagram(each)
            assert one.engine.counters().decap.super_out == 2
            assert Offload.UDP_COALESCE in one.engine.offloads().in_use


@pytest.mark.parametrize("is_on", [True, False])
async def test_udp_gro_is_what_the_engine_says(make_lab: MakeLab, is_on: bool) -> None:
    offloads = ALL if is_on else ALL - {Offload.UDP_GRO}
    async with node(make_lab, offloads) as (one, _):
        sock = one.engine._socks[0]
        one.engine.attach(one.tun)
        assert bool(sock.getsockopt(socket.IPPROTO_UDP, uapi.UDP_GRO)) is is_on
        assert set_udp_gro(sock, is_on=False) is False
