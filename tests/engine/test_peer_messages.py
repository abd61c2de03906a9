"""Engines hand the messages of other nodes over, and nothing else, of nobody else.

left: engine under test, 10.5.1.0 on its TUN -- 192.0.2.1 eth0 ---- eth0 192.0.2.2 right, a socket
                                                                        192.0.2.3 of no lease
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

import pytest

from tests.engine.test_contract import every_engine
from tests.nodes import PORT, EngineNode, engine_node
from tests.packets import ipv4, with_ttl
from tests.peer_packets import PROTO_TALK, cases
from tests.routes import peer as peer_of
from tests.wait import until
from tundp.choices import Engine, SourceCheck
from tundp.linux.udp import open_udp

PEER = peer_of("10.5.2.0/24", "192.0.2.2", hop_id=2)
TUN_ADDRESS, POD, OF_PEER = "10.5.1.0", "10.5.1.9", "10.5.2.0"
NODE = ("192.0.2.1", PORT)
UDP_SEGMENT = 103  # linux/udp.h
IP_MTU_DISCOVER, IP_PMTUDISC_DONT = 10, 0  # linux/in.h


@dataclass(slots=True, kw_only=True)
class World:
    """The engine's node, who sends to it, and the end of the pair that messages come to."""

    node: EngineNode
    peer: socket.socket
    messages: socket.socket
    engine_end: socket.socket
    stack: contextlib.AsyncExitStack
    right: Any

    async def sender(self, address: str, port: int) -> socket.socket:
        """Another socket of the right host."""
        sock = await self.right.call(open_udp, IPv4Address(address), port)
        return self.stack.enter_context(sock)  # type: ignore[no-any-return]

    async def until_counted(self, count: int, what: str) -> None:
        def is_so() -> bool:
            decap = self.node.engine.counters().decap
            return decap.packets_in == count == decap.packets_out + decap.dropped

        await until(is_so, f"{count} packets counted: {what}")

    def taken(self) -> list[bytes]:
        """All that was handed over since the last look."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(self.messages.recv(4096))
        return found


@contextlib.asynccontextmanager
async def world(
    make_lab: Any, engine: Engine, check: SourceCheck = SourceCheck.COUNT, *, is_on: bool = True
) -> AsyncIterator[World]:
    async with make_lab() as lab, contextlib.AsyncExitStack() as stack:
        left, right = await lab.host("left"), await lab.host("right")
        await lab.cable(left, "eth0", right, "eth0")
        await right.configure("eth0", "192.0.2.2/24")
        await right.configure("eth0", "192.0.2.3/24")
        messages, engine_end = (
            stack.enter_context(each)
            for each in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        )
        node = await stack.enter_async_context(
            engine_node(
                left,
                engine.value,
                1,
                peers=[PEER],
                source_check=check,
                peer_fd=engine_end.fileno() if is_on else -1,
            )
        )
        peer = stack.enter_context(await right.call(open_udp, IPv4Address("192.0.2.2"), PORT))
        # The longest message does not fit the cable: fragments outside.
        peer.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)
        node.engine.attach(node.tun)
        yield World(
            node=node,
            peer=peer,
            messages=messages,
            engine_end=engine_end,
            stack=stack,
            right=right,
        )


@every_engine
async def test_exactly_the_messages_are_handed_over(make_lab: Any, engine: Engine) -> None:
    table = cases(TUN_ADDRESS, POD, OF_PEER)
    async with world(make_lab, engine) as all_:
        for count, (name, case) in enumerate(table.items(), start=1):
            all_.peer.sendto(case.datagram, NODE)
            await all_.until_counted(count, name)
            assert all_.taken() == ([case.copy] if case.length else []), name
        # Handed over or not, a packet is decided, counted and delivered as any other.
        counted = all_.node.engine.counters()
        dropped = sum(case.is_dropped for case in table.values())
        assert (counted.decap.packets_out, counted.decap.dropped) == (len(table) - dropped, dropped)
        assert counted.as_dict()["conserved"]


@every_engine
@pytest.mark.parametrize("check", SourceCheck)
async def test_nothing_of_a_stranger_is_handed_over(
    make_lab: Any, engine: Engine, check: SourceCheck
) -> None:
    """Whatever the source check, which delivers some of it: the lease's address and port count."""
    table = cases(TUN_ADDRESS, POD, OF_PEER)
    async with world(make_lab, engine, check) as all_:
        other_port = await all_.sender("192.0.2.2", 40000)
        stranger = await all_.sender("192.0.2.3", PORT)
        unleased = ipv4(
            table["a message"].datagram[20:], PROTO_TALK, source="10.5.9.0", destination=TUN_ADDRESS
        )
        sent = 0
        for name in ("a message", "a refusal"):
            for sock in (other_port, stranger):
                sock.sendto(table[name].datagram, NODE)
                sent += 1
        all_.peer.sendto(unleased, NODE)
        await all_.until_counted(sent + 1, "of strangers")
        assert all_.taken() == []
        all_.peer.sendto(table["a message"].datagram, NODE)
        await all_.until_counted(sent + 2, "one of the peer")
        assert all_.taken() == [table["a message"].copy]


@every_engine
async def test_each_packet_of_a_super_packet_is_looked_at(make_lab: Any, engine: Engine) -> None:
    async with world(make_lab, engine) as all_:
        packets = [
            ipv4(
                number.to_bytes(8, "big") + bytes(92),
                PROTO_TALK if number % 3 else PROTO_TALK + 1,
                frag=0,
                source=OF_PEER,
                destination=TUN_ADDRESS,
            )
            for number in range(20)
        ]
        size = struct.pack("=H", len(packets[0]))
        all_.peer.sendmsg(packets, [(socket.IPPROTO_UDP, UDP_SEGMENT, size)], 0, NODE)
        await all_.until_counted(20, "of one send")
        expected = [with_ttl(packet, 63) for number, packet in enumerate(packets) if number % 3]
        assert all_.taken() == expected


@every_engine
async def test_a_flood_nobody_reads_costs_messages_only(make_lab: Any, engine: Engine) -> None:
    message = cases(TUN_ADDRESS, POD, OF_PEER)["a message"].datagram
    async with world(make_lab, engine) as all_:
        with contextlib.suppress(BlockingIOError):
            while True:
                all_.engine_end.send(b"full")
        for _ in range(100):
            all_.peer.sendto(message, NODE)
        await all_.until_counted(100, "while the pair is full")
        assert set(all_.taken()) == {b"full"}
        all_.messages.close()
        all_.peer.sendto(message, NODE)
        await all_.until_counted(101, "with nobody at the other end")
        counted = all_.node.engine.counters()
        assert (counted.decap.packets_out, counted.errnos) == (101, {})


@every_engine
async def test_without_a_socket_nothing_is_handed_over(make_lab: Any, engine: Engine) -> None:
    message = cases(TUN_ADDRESS, POD, OF_PEER)["a message"].datagram
    async with world(make_lab, engine, is_on=False) as all_:
        all_.peer.sendto(message, NODE)
        await all_.until_counted(1, "with nobody who listens")
        assert all_.taken() == []
        assert all_.node.engine.counters().decap.packets_out == 1
