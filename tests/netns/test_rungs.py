"""Every offload switched off, every layout tried: the same packets arrive, in the same order."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.nodes import MakeOverlay, counters
from tests.wait import DEADLINE_S
from tundp.lab.overlay import OverlayLab
from tundp.lab.traffic import ping, transfer
from tundp.linux import uapi
from tundp.linux.offload import Offload

PORT = 7000
NAMES = [offload.value for offload in Offload]


def send_super_packets(sock: socket.socket, address: str, datagrams: list[bytes]) -> None:
    """Equal datagrams as one super-packet, as QUIC senders do; others one by one."""
    size = len(datagrams[0])
    sock.setsockopt(socket.IPPROTO_UDP, uapi.UDP_SEGMENT, size)
    sock.sendto(b"".join(datagrams), (address, PORT))


def receive(sock: socket.socket, count: int) -> list[bytes]:
    sock.settimeout(DEADLINE_S)
    return [sock.recv(65536) for _ in range(count)]


async def exchange(source: Any, destination: Any, address: str) -> None:
    """UDP bursts of many sizes arrive whole and in order."""
    rng = random.Random(7)
    receiver = await destination.socket(socket.SOCK_DGRAM)
    sender = await source.socket(socket.SOCK_DGRAM)
    with receiver, sender:
        receiver.setsockopt(socket.SOL_SOCKET, uapi.SO_RCVBUFFORCE, 8 << 20)
        receiver.bind((address, PORT))
        for size, count in ((1, 60), (63, 60), (100, 128), (999, 60), (1444, 44)):
            bursts = [rng.randbytes(size) for _ in range(count - 1)] + [
                rng.randbytes(size // 2 + 1)
            ]
            # Odd ones between, so that runs end and begin.
            lone = [rng.randbytes(rng.randrange(1, 1400)) for _ in range(20)]
            await asyncio.to_thread(send_super_packets, sender, address, bursts)
            sender.setsockopt(socket.IPPROTO_UDP, uapi.UDP_SEGMENT, 0)
            for datagram in lone:
                sender.sendto(datagram, (address, PORT))
            assert await asyncio.to_thread(receive, receiver, count + len(lone)) == bursts + lone


async def check_everything(overlay: OverlayLab) -> None:
    one, two = overlay.nodes[1], overlay.nodes[2]
    for source, destination in ((one, two), (two, one)):
        assert await ping(source.pod, destination.pod_address, size=4000) is not None
        _, is_equal = await transfer(
            source.pod, destination.pod, destination.pod_address, payload_len=8 << 20
        )
        assert is_equal
        await exchange(source.pod, destination.pod, destination.pod_address)
        await exchange(source.host, destination.host, destination.tunnel_address)
    for node in (one, two):
        counted = await counters(node)
        assert counted["conserved"]
        assert counted["encap"]["drops"] == counted["decap"]["drops"] == {}
        assert counted["errnos"] == {}
        assert counted["offload_fallbacks"] == 0


@pytest.mark.parametrize("without", [*NAMES, ",".join(NAMES)])
async def test_an_offload_switched_off_is_not_used_and_not_missed(
    make_overlay: MakeOverlay, without: str
) -> None:
    async with make_overlay("--engine=gso", f"--disable-offloads={without}", pods=True) as overlay:
        await check_everything(overlay)
        off = without.split(",")
        for node in overlay.nodes.values():
            uses = (await node.status_document())["engine"]["uses"]
            assert f"without {without.replace(',', ', ')}: switched off" in uses
            counted = await counters(node)
            is_off = {
                "encap super_in": {"tun-tso", "tun-uso"} <= set(off),
                "encap super_out": "udp-segment" in off,
                "decap super_out": {"tcp-coalesce", "udp-coalesce"} <= set(off),
            }
            for name, is_unused in is_off.items():
                direction, field = name.split()
                assert (counted[direction][field] == 0) is is_unused, name
            if "udp-gro" in off:
                assert counted["decap"]["super_in"] == 0
                assert counted["decap"]["reads"] == counted["decap"]["packets_in"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--layout=split"],
        ["--workers=2"],
        ["--workers=2", "--layout=split", "--engine=mmsg"],
        ["--cpus=0", "--spin=0"],
        ["--spin=1000"],
    ],
    ids=" ".join,
)
async def test_every_layout_carries_everything(make_overlay: MakeOverlay, flags: list[str]) -> None:
    async with make_overlay(*flags, pods=True) as overlay:
        await check_everything(overlay)


async def test_super_packets_are_what_moves_by_default(make_overlay: MakeOverlay) -> None:
    async with make_overlay(pods=True) as overlay:
        await check_everything(overlay)
        status = await overlay.nodes[1].status_document()
        assert status["engine"]["name"] == "gso"
        for direction in ("encap", "decap"):
            counted = status["counters"][direction]
            assert counted["super_in"] > 0
            assert counted["super_out"] > 0
            assert counted["reads"] < counted["packets_in"] / 4
            assert counted["writes"] < counted["packets_out"] / 4


async def test_threads_have_names_and_cpus(make_overlay: MakeOverlay) -> None:
    cpu = min(os.sched_getaffinity(0))
    async with make_overlay(f"--cpus={cpu}", "--layout=split", nodes=1) as overlay:
        pid = (await overlay.nodes[1].status_document())["pid"]
        found = {}
        for thread in os.listdir(f"/proc/{pid}/task"):
            name = Path(f"/proc/{pid}/task/{thread}/comm").read_text(encoding="utf-8").strip()
            found[name] = os.sched_getaffinity(int(thread))
        assert found["tundp-gso-0"] == found["tundp-gso-1"] == {cpu}


@pytest.mark.parametrize("engine", ["simple", "reference"])
async def test_an_engine_with_one_worker_refuses_two(
    make_overlay: MakeOverlay, engine: str
) -> None:
    async with make_overlay(nodes=1, start=False) as overlay:
        node = overlay.nodes[1]
        await overlay.start_daemon(node, f"--engine={engine}", "--workers=2")
        process = node.daemon
        assert await asyncio.to_thread(process.wait, DEADLINE_S) == 1
        assert f"--workers=2: engine {engine} has one" in node.log_path.read_text()
