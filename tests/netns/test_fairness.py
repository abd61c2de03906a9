"""Neither direction starves the other, however busy it is, and a slow uplink stops only itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.nodes import MakeOverlay, answers, counters, must_run
from tests.packets import ipv4
from tests.wait import until
from tundp.lab.overlay import LabNode
from tundp.linux import uapi

ENGINES = os.environ.get("TUNDP_TEST_ENGINES", "reference;gso;gso --layout=split").split(";")
pytestmark = pytest.mark.parametrize("engine", ENGINES)


@contextlib.contextmanager
def flood(sock: socket.socket, address: tuple[str, int], datagram: bytes) -> Iterator[None]:
    """Datagrams as fast as a thread can make them, 120 in each send: more than we can take."""
    stop = threading.Event()
    burst = datagram * 120

    def send() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError):
                sock.sendto(burst, address)

    sock.setsockopt(socket.IPPROTO_UDP, uapi.UDP_SEGMENT, len(datagram))
    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        sock.close()


async def trickles_through(
    node: LabNode, direction: str, sock: socket.socket, address: Any
) -> None:
    """Single datagrams are taken by `direction` while the flood goes on."""
    before = (await counters(node))[direction]["packets_in"]

    async def taken() -> bool:
        for _ in range(10):
            with contextlib.suppress(OSError):
                sock.sendto(b"x" * 60, address)
        return bool((await counters(node))[direction]["packets_in"] >= before + 20)

    with sock:
        await until(taken)


async def test_a_flood_from_the_wire_leaves_encap_its_turns(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        flooder = await two.host.socket(socket.SOCK_DGRAM)
        trickler = await one.host.socket(socket.SOCK_DGRAM)
        # Nothing that could be merged: each costs a TUN write.
        packet = ipv4(b"", 253, source=two.tunnel_address, destination=one.tunnel_address, frag=0)
        with flood(flooder, (one.public_ip, 8285), packet):
            await until(lambda: _is_above(one, "decap", 10_000))
            await trickles_through(one, "encap", trickler, (two.tunnel_address, 7000))


async def test_a_flood_from_the_tun_leaves_decap_its_turns(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        flooder = await one.host.socket(socket.SOCK_DGRAM)
        trickler = await two.host.socket(socket.SOCK_DGRAM)
        with flood(flooder, (two.tunnel_address, 7000), b"x" * 10):
            await until(lambda: _is_above(one, "encap", 10_000))
            await trickles_through(one, "decap", trickler, (one.public_ip, 8285))


async def test_a_slow_uplink_stops_neither_decap_nor_routes(make_overlay: MakeOverlay) -> None:
    async with make_overlay(pods=True) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        # 4 Mbit/s with a long queue: the shared send buffer fills, then the peer's own.
        shape = "rate 4mbit burst 32kb limit 64mb"
        await must_run(one.host, *f"tc qdisc add dev eth0 root tbf {shape}".split())
        flooder = await one.host.socket(socket.SOCK_DGRAM)
        trickler = await two.host.socket(socket.SOCK_DGRAM)
        with flood(flooder, (two.tunnel_address, 7000), b"x" * 500):

            async def is_full() -> bool:
                return "hop_queue_full" in (await counters(one))["encap"]["drops"]

            await until(is_full)
            await trickles_through(one, "decap", trickler, (one.public_ip, 8285))
        await must_run(one.host, "tc", "qdisc", "del", "dev", "eth0", "root")

        await until(lambda: answers(one.pod, two.pod_address))
        counted = await counters(one)
        assert counted["conserved"]


async def _is_above(node: LabNode, direction: str, count: int) -> bool:
    await asyncio.sleep(0.01)
    return bool((await counters(node))[direction]["packets_in"] > count)
