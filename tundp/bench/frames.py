"""How large the frames are that leave a node: what a lab is, seen on its wire."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import struct
from collections import Counter
from typing import Final

from tundp.bench import validity
from tundp.bench.paths import BenchPath, Ground
from tundp.bench.workloads import WORKLOADS
from tundp.finding import Finding, Verdict
from tundp.linux import uapi

FRAME_LOOK_S: Final = 0.25
TAP_BUFFER_LEN: Final = 256 << 20


async def look_at_frames(lab_kind: str, path: BenchPath, ground: Ground) -> Finding:
    """Run TCP for a moment and see how large the frames are that leave either node."""
    sizes: Counter[int] = Counter()
    missed = 0
    taps: list[socket.socket] = []
    tcp = next(w for w in WORKLOADS if w.name == "tcp1")
    running = asyncio.create_task(tcp.measure(ground, warmup_s=0.05, seconds=FRAME_LOOK_S))
    try:
        taps += [await node.call(_open_tap) for node in ground.nodes]
        while not running.done():
            for tap in taps:
                _drain(tap, sizes)
            await asyncio.sleep(0.002)
        await running
        for tap in taps:
            _drain(tap, sizes)
            seen, dropped = struct.unpack(
                "=II", tap.getsockopt(uapi.SOL_PACKET, uapi.PACKET_STATISTICS, 8)
            )
            missed += dropped if seen else 0
    finally:
        for tap in taps:
            tap.close()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    check = validity.check_frames(sizes, missed, f"{lab_kind} {path.name}")
    if lab_kind != "wire" and check.verdict is Verdict.FAIL and sizes:
        return dataclasses.replace(check, verdict=Verdict.NOTE, meaning="super-packets pass whole")
    return check


def _open_tap() -> socket.socket:
    tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(uapi.ETH_P_ALL))
    tap.setsockopt(socket.SOL_SOCKET, uapi.SO_RCVBUFFORCE, TAP_BUFFER_LEN)
    tap.bind(("eth0", uapi.ETH_P_ALL))
    tap.setblocking(False)
    return tap


def _drain(tap: socket.socket, sizes: Counter[int]) -> None:
    buffer = bytearray(1)
    for _ in range(20_000):
        try:
            # MSG_TRUNC: the length of the whole frame, of which nothing else is wanted.
            length, source = tap.recvfrom_into(buffer, 1, socket.MSG_TRUNC)
        except BlockingIOError:
            return
        if source[2] == socket.PACKET_OUTGOING:
            sizes[length] += 1
