"""How long packets wait for a start: `python -m bench.early [ROUNDS]`, root.

A TUN and a UDP socket in a namespace, an image of the routes, one packet in the TUN's queue. The
installed `tundp run` is executed with these descriptors, ROUNDS times (10); from execve(2) to the
datagram at the other end: median, shortest and longest, and the process's CPU time until then, the
median, which other load on the machine changes little. Then what an image costs: bytes, CPU time
of a write and of a read, and the write's share that holds Python's lock (the event loop waits).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from tundp.backend.udp.image_keeper import content, facts_of
from tundp.choices import Engine, SourceCheck
from tundp.engine import image as images
from tundp.engine.base import EngineContext
from tundp.engine.image import ImageWriter
from tundp.engine.native.engine import NativeEngine
from tundp.lab.lab import Host, Lab
from tundp.lease.fib import FIRST_HOP_ID, Fib, build_fib
from tundp.lease.model import Endpoint, Peer
from tundp.linux.tun import Tun
from tundp.linux.udp import open_udp
from tundp.wire.policy import Policy

LAUNCHER = Path(__file__).parents[1] / "tests" / "given_start.py"
PROGRAM = Path(sys.executable).with_name("tundp")
OWN = IPv4Network("10.0.0.0/24")
PORT = 8285
LEASES = (10, 1_000, 65_000)
WRITES = 20


def fib_of(count: int) -> Fib:
    """Routes to `count` peers; the first is 192.0.2.2, which has 10.0.1.0/24."""
    peers = [
        Peer(
            subnet=IPv4Network((0x0A000100 + number * 256, 24)),
            endpoint=Endpoint(IPv4Address(0xC0000202 + number), PORT),
            hop_id=FIRST_HOP_ID + number,
        )
        for number in range(count)
    ]
    return build_fib(peers, own_subnet=OWN, generation=1)


async def main(rounds: int) -> None:
    """Measure and print."""
    async with Lab(f"be{os.getpid()}") as lab:
        left, right = await lab.host("left"), await lab.host("right")
        await lab.cable(left, "eth0", right, "eth0")
        await left.configure("eth0", "192.0.2.1/24")
        await right.configure("eth0", "192.0.2.2/24")
        print(f"from execve to the first datagram, {rounds} starts each, ms")
        print(f"{'leases':>8} {'median':>8} {'shortest':>9} {'longest':>8} {'CPU':>6}")
        for count in LEASES:
            taken_ms, cpu_ms = zip(*await starts(left, right, count, rounds), strict=True)
            print(
                f"{count:>8} {statistics.median(taken_ms):>8.0f} {min(taken_ms):>9.0f}"
                f" {max(taken_ms):>8.0f} {statistics.median(cpu_ms):>6.0f}"
            )
        print()
        print("one image; ms of CPU, the write's on its own thread")
        print(f"{'leases':>8} {'bytes':>10} {'write':>7} {'with lock':>10} {'read':>7}")
        for count in LEASES:
            print(f"{count:>8} {await costs(left, count)}")


async def starts(left: Host, right: Host, count: int, rounds: int) -> list[tuple[float, float]]:
    """Milliseconds of each start, by the clock and of CPU."""
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(await left.call(open_udp, IPv4Address("192.0.2.1"), PORT))
        peer = stack.enter_context(await right.call(open_udp, IPv4Address("192.0.2.2"), PORT))
        fib = fib_of(count)
        tun, image = await devices(left, stack, sock, fib)
        given = {"tun-0": tun.fd, "udp-0": sock.fileno(), "image": image}
        app = stack.enter_context(await left.socket(socket.SOCK_DGRAM))
        app.bind((str(OWN.network_address), 7000))
        peer.settimeout(30)
        found = []
        for number in range(rounds):
            app.sendto(b"%d" % number, ("10.0.1.9", 7000))
            found.append(await asyncio.to_thread(start, left, given, peer, b"%d" % number))
        return found


async def devices(
    left: Host, stack: contextlib.ExitStack, sock: socket.socket, fib: Fib
) -> tuple[Tun, int]:
    """A TUN that is up, and an image with which an engine carried packets through it."""
    engine = engine_of(sock, fib)
    stack.callback(engine.stop)
    tun = await left.call(Tun, "flannel%d", engine.tun_mode)
    stack.callback(tun.close)
    await left.configure(tun.name, f"{OWN.network_address}/32", mtu=1472)
    await left.netlink.ensure_route(await left.index(tun.name), IPv4Network("10.0.0.0/8"))
    engine.attach(tun)
    engine.detach()
    image = images.make()
    stack.callback(os.close, image)
    ImageWriter(image).write(*content(engine.early_plan(), fib, facts_of(tun, [sock])))
    return tun, image


def engine_of(sock: socket.socket, fib: Fib) -> NativeEngine:
    """The engine `gso`, with these routes."""
    policy = Policy(
        tun_address=int(OWN.network_address), source_check=SourceCheck.ENFORCE, port=PORT
    )
    context = EngineContext(fib=fib, policy=policy, loop=asyncio.get_running_loop())
    return NativeEngine(Engine.GSO, [sock], context)


def start(
    left: Host, given: dict[str, int], peer: socket.socket, payload: bytes
) -> tuple[float, float]:
    """Start a daemon, wait for the datagram with the payload, and kill it."""
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [
            *("ip", "netns", "exec", left.namespace, sys.executable, str(LAUNCHER)),
            *(json.dumps(given), str(writer), str(PROGRAM), "run"),
            "--store=file:/nonexistent/leases.json",
            *("--subnet-file=/tmp/bench-early/subnet.env", "--state-dir=/tmp/bench-early"),
            "--admin-socket=/tmp/bench-early/admin.sock",
        ],
        pass_fds=(*given.values(), writer),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(writer)
    try:
        while not peer.recv(2048).endswith(payload):
            pass
        now_ns = time.monotonic_ns()
        cpu_ns = sum(
            int((task / "schedstat").read_text().split()[0])
            for task in Path(f"/proc/{process.pid}/task").iterdir()
        )
        began_ns, cpu_before_ns = struct.unpack("=QQ", os.read(reader, 16))
    finally:
        process.kill()
        process.wait()
        os.close(reader)
    return (now_ns - began_ns) / 1e6, (cpu_ns - cpu_before_ns) / 1e6


async def costs(left: Host, count: int) -> str:
    """A row of the second table."""
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(await left.call(open_udp, IPv4Address("192.0.2.1"), PORT))
        fib = fib_of(count)
        tun, image = await devices(left, stack, sock, fib)
        engine = engine_of(sock, fib)
        stack.callback(engine.stop)
        engine.attach(tun)
        engine.detach()
        plan, facts = engine.early_plan(), facts_of(tun, [sock])
        writer = ImageWriter(image)
        sizes: list[int] = []
        write_ms, held_ms = on_thread(
            lambda: sizes.append(writer.write(*content(plan, fib, facts)))
        )
        read_ms, _ = on_thread(lambda: images.read(image))
        return f"{sizes[-1]:>10,} {write_ms:>7.2f} {held_ms:>10.2f} {read_ms:>7.2f}"


def on_thread(call: object) -> tuple[float, float]:
    """CPU milliseconds of one call, and the longest another thread waited for Python's lock."""
    assert callable(call)
    cpu: list[float] = []
    is_over = threading.Event()

    def run() -> None:
        for _ in range(WRITES):
            began = time.thread_time()
            call()
            cpu.append((time.thread_time() - began) * 1e3)
        is_over.set()

    thread = threading.Thread(target=run)
    thread.start()
    longest = 0.0
    while not is_over.is_set():
        began = time.monotonic()
        time.sleep(0)
        longest = max(longest, time.monotonic() - began)
    thread.join()
    return statistics.median(cpu), longest * 1e3


def rounds_of(words: Sequence[str]) -> int:
    """The command line's."""
    return int(words[0]) if words else 10


if __name__ == "__main__":
    asyncio.run(main(rounds_of(sys.argv[1:])))
