"""The underlay's socket is replaced under an engine: same descriptor, another address.

left 192.0.2.1, .11 eth0 ---- eth0 192.0.2.2 right       10.5.1.0/24 and 10.5.2.0/24
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from ipaddress import IPv4Interface

import pytest
from pyroute2 import netns

from tests.loops import LOOPS, run_on
from tests.nodes import PORT, EngineNode, MakeLab, engine_node, must_run
from tests.wait import DEADLINE_S, until
from tundp.choices import Layout
from tundp.engine.base import Dataplane
from tundp.engine.native.engine import EngineSettings
from tundp.lab.lab import Host
from tundp.lab.traffic import ping, transfer
from tundp.linux import uapi
from tundp.linux.netlink import enter_namespace
from tundp.wire.drop import DropReason

ENGINES = ["reference", "simple", "mmsg", "gso"]


@contextlib.asynccontextmanager
async def pair(
    make_lab: MakeLab, engine: str, layout: Layout = Layout.SHARED, *, is_attached: bool = True
) -> AsyncIterator[tuple[EngineNode, EngineNode]]:
    async with make_lab() as lab, contextlib.AsyncExitStack() as stack:
        hosts = [await lab.host("left"), await lab.host("right")]
        await lab.cable(hosts[0], "eth0", hosts[1], "eth0")
        settings = EngineSettings(layout=layout)
        nodes = [
            await stack.enter_async_context(engine_node(host, engine, number, settings=settings))
            for number, host in enumerate(hosts, 1)
        ]
        left, right = nodes
        await left.host.netlink.ensure_address(
            await left.host.index("eth0"), IPv4Interface("192.0.2.11/24")
        )
        left.follow(right)
        right.follow(left)
        for node in nodes:
            if is_attached:
                node.engine.attach(node.tun)
        yield left, right


async def call_and_answer(caller: EngineNode, callee: EngineNode) -> None:
    """One datagram there and one back; not `ping`, which uvloop cannot do."""
    listener = await callee.host.socket(socket.SOCK_DGRAM)
    sock = await caller.host.socket(socket.SOCK_DGRAM)
    with listener, sock:
        for each in (listener, sock):
            each.settimeout(DEADLINE_S)
        listener.bind((callee.tun_address, 0))
        sock.sendto(b"call", listener.getsockname())
        call, address = await asyncio.to_thread(listener.recvfrom, 100)
        listener.sendto(b"answer", address)
        assert (call, await asyncio.to_thread(sock.recv, 100)) == (b"call", b"answer")


async def exchange(left: EngineNode, right: EngineNode) -> None:
    """Packets both ways, as single ones and as bulk."""
    for one, other in ((left, right), (right, left)):
        await call_and_answer(one, other)
        _, is_equal = await transfer(one.host, other.host, other.tun_address, payload_len=1 << 20)
        assert is_equal


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("engine", ENGINES)
def test_packets_flow_again_from_the_new_address(make_lab: MakeLab, engine: str, loop: str) -> None:
    async def test() -> None:
        async with pair(make_lab, engine) as (left, right):
            await exchange(left, right)
            before = left.engine.counters().as_dict()
            descriptor = left.sock.fileno()
            await left.move("192.0.2.11")
            # It enforces: nothing from the old address would get in.
            right.follow(left)
            await exchange(left, right)
            assert left.sock.fileno() == descriptor
            assert left.sock.getsockname() == ("192.0.2.11", PORT)
            assert not os.get_inheritable(descriptor)
            after = left.engine.counters().as_dict()
            for direction in ("encap", "decap"):
                assert after[direction]["packets_in"] > before[direction]["packets_in"] > 100
                assert after[direction]["drops"] == {}
            for node in (left, right):
                assert node.engine.counters().is_conserved
            # The first exchange's last segment may have been on its way.
            seen = right.engine.counters().as_dict()["decap"]["drops"]
            assert set(seen) <= {DropReason.SOURCE_MISMATCH.label}
            if engine == "gso":
                assert left.sock.getsockopt(socket.IPPROTO_UDP, uapi.UDP_GRO)
                assert after["decap"]["super_in"] > before["decap"]["super_in"] > 0

    run_on(LOOPS[loop], test())


@pytest.mark.parametrize("engine", ["reference", "gso"])
async def test_a_transfer_survives_one_move_after_the_other(make_lab: MakeLab, engine: str) -> None:
    async with pair(make_lab, engine) as (left, right):
        sending = asyncio.create_task(
            transfer(left.host, right.host, right.tun_address, payload_len=4 << 20)
        )
        for address in ("192.0.2.11", "192.0.2.1") * 3:
            await left.move(address)
            right.follow(left)
        _, is_equal = await sending
        assert is_equal
        for node in (left, right):
            assert node.engine.counters().is_conserved


@pytest.mark.parametrize("engine", ["reference", "gso"])
async def test_what_was_learnt_of_paths_is_forgotten(make_lab: MakeLab, engine: str) -> None:
    async with pair(make_lab, engine) as (left, right):
        for command in (
            "ip link add over0 link eth0 type macvlan mode bridge",
            "ip link set over0 mtu 1400 up",
            f"ip route add {right.address}/32 dev over0 src {left.address}",
        ):
            await must_run(left.host, *command.split())
        with inside(left.host):
            left.engine.attach(left.tun)
            assert await ping(left.host, right.tun_address, size=1400) is not None
            await must_run(left.host, "ip", "link", "set", "over0", "mtu", "1500")
            # Learnt is learnt, for ten minutes.
            assert await ping(left.host, right.tun_address, size=1400) is not None
            assert left.count("fragments_out") == 4
            await left.move("192.0.2.11")
            right.follow(left)
            assert await ping(left.host, right.tun_address, size=1400) is not None
            # Nor does the next FIB remember.
            left.follow(right)
            assert await ping(left.host, right.tun_address, size=1400) is not None
            assert left.count("fragments_out") == 4


@contextlib.contextmanager
def inside(host: Host) -> Iterator[None]:
    """This thread, and those it starts, look paths up as the host does."""
    outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter_namespace(host.namespace)
        yield
    finally:
        netns.setns(outside)
        os.close(outside)


@pytest.mark.parametrize("engine", ["reference", "gso"])
async def test_overflows_of_both_sockets_add_up(make_lab: MakeLab, engine: str) -> None:
    burst = 200

    async with pair(make_lab, engine) as (left, right):
        # Not from its port: that socket has packets of its own to send.
        sender = await right.host.socket(socket.SOCK_DGRAM)
        sent = 0

        def are_accounted_for() -> bool:
            nonlocal sent
            counters = left.engine.counters()
            if counters.decap.packets_in + counters.socket_overflows == sent:
                return True
            # The next datagram tells what was lost before it, unless it is lost itself.
            sender.sendto(b"x", (address, PORT))
            sent += 1
            return False

        def is_any_taken() -> bool:
            return left.engine.counters().decap.packets_in > taken

        with sender:
            for address in ("192.0.2.11", "192.0.2.1"):
                await left.move(address)
                taken = left.engine.counters().decap.packets_in
                # The burst must not wait for the neighbour's address: the kernel drops what
                # is more than it keeps for one that it does not know yet.
                sender.sendto(b"x", (address, PORT))
                sent += 1
                await until(is_any_taken)
                left.engine.detach()
                left.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                taken = left.engine.counters().decap.packets_in
                for _ in range(burst):
                    sender.sendto(b"x" * 500, (address, PORT))
                left.engine.attach(left.tun)
                await until(is_any_taken)
                sent += burst
                await until(are_accounted_for)
        assert left.count("socket_overflows") > burst


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("engine", ENGINES)
def test_full_sockets_are_replaced(make_lab: MakeLab, engine: str, loop: str) -> None:
    async def test() -> None:
        async with pair(make_lab, engine, is_attached=False) as (left, right):
            right.engine.attach(right.tun)
            # A snail of an uplink: the send buffers fill, and stay full.
            shape = "rate 8kbit burst 1600 limit 10mb"
            await must_run(left.host, *f"tc qdisc add dev eth0 root tbf {shape}".split())
            left.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            datagram, somebody = b"x" * 1000, (right.tun_address, 7000)
            flooder = await left.host.socket(socket.SOCK_DGRAM)
            # The engine opens a send socket for the hop: in its node's namespace.
            with flooder, inside(left.host):
                left.engine.attach(left.tun)

                def is_full() -> bool:
                    flooder.sendto(datagram, somebody)
                    return left.engine.counters().encap.drops[DropReason.HOP_QUEUE_FULL] > 0

                await until(is_full)
                assert left.engine.hop_sockets() == 1
                assert left.count("hop_sockets_opened") == 1
                # Nothing waits in an engine.
                await until(has_a_heartbeat(left.engine))
                sent = left.engine.counters().encap.packets_out
                await left.move("192.0.2.11")
                assert left.engine.hop_sockets() == 0
                right.follow(left)
                flooder.sendto(datagram, somebody)

                def is_sent() -> bool:
                    return left.engine.counters().encap.packets_out > sent

                await until(is_sent)
                await must_run(left.host, "tc", "qdisc", "del", "dev", "eth0", "root")
                await call_and_answer(left, right)
            counters = left.engine.counters()
            assert counters.is_conserved
            assert counters.encap.dropped == counters.encap.drops[DropReason.HOP_QUEUE_FULL]

    run_on(LOOPS[loop], test())


@pytest.mark.parametrize(
    ("engine", "layout", "threads"),
    [
        ("reference", Layout.SHARED, 0),
        ("simple", Layout.SHARED, 1),
        ("mmsg", Layout.SHARED, 1),
        ("gso", Layout.SPLIT, 2),
    ],
)
async def test_each_thread_has_a_heartbeat_while_it_runs(
    make_lab: MakeLab, engine: str, layout: Layout, threads: int
) -> None:
    async with pair(make_lab, engine, layout) as (left, _):
        assert len(left.engine.heartbeat()) == threads
        for _ in range(3):  # idle as they are
            await until(has_a_heartbeat(left.engine))
        left.engine.detach()
        assert left.engine.heartbeat() == ()
        left.engine.attach(left.tun)
        assert len(left.engine.heartbeat()) == threads


async def test_a_stuck_thread_has_no_heartbeat(make_lab: MakeLab) -> None:
    async with pair(make_lab, "simple", is_attached=False) as (left, right):
        # What no engine must do: wait for the TUN alone.
        os.set_blocking(left.tun.fd, True)
        waker = await left.host.socket(socket.SOCK_DGRAM)
        try:
            left.engine.attach(left.tun)

            async def has_begun() -> bool:
                return left.engine.heartbeat() == (1,)

            await until(has_begun)
            for _ in range(20):
                await asyncio.sleep(0.01)
                assert left.engine.heartbeat() == (1,)
        finally:
            os.set_blocking(left.tun.fd, False)
            waker.sendto(b"x", (right.tun_address, 7000))
            waker.close()
        await until(has_a_heartbeat(left.engine))


def has_a_heartbeat(engine: Dataplane) -> Callable[[], Awaitable[bool]]:
    """Whether all its threads have made an iteration since this was called."""
    before = engine.heartbeat()

    async def have_moved() -> bool:
        now = engine.heartbeat()
        assert len(now) == len(before)
        return all(count > last for count, last in zip(now, before, strict=True))

    return have_moved
