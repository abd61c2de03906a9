"""The table of SECURITY.md, row by row: what each source check lets in, from whom, in every engine.

The node is 192.0.2.1 with 10.5.1.0/24. Peers are 192.0.2.2 (10.5.2.0/24) and 192.0.2.3
(10.5.3.0/24); 192.0.2.9 is a stranger. What gets in is seen on the TUN, not asked of the engine.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Final

import pytest

from tests.engine.test_contract import ENGINES
from tests.nodes import PORT, EngineNode, engine_node
from tests.packets import ipv4
from tests.routes import fib_of
from tests.wait import DEADLINE_S, until
from tundp.choices import Engine, SourceCheck
from tundp.linux.udp import open_udp
from tundp.wire.drop import DropReason

STRANGER, PEER, PEER_PROCESS = "a stranger", "a peer", "a process on a peer"
SENDERS: Final = {
    STRANGER: ("192.0.2.9", PORT),
    PEER: ("192.0.2.2", PORT),
    PEER_PROCESS: ("192.0.2.2", 40000),
}
HONEST, OURS = "10.5.2.7", "10.5.1.9"
ADMITTED = IPv4Network("203.0.113.0/24")
PASSES = None
ETH_P_IP = 0x0800

IN_EVERY_MODE = {
    # row: source, destination, port of the inner datagram, reason
    "our tunnel address": ("10.5.1.0", OURS, 9, "martian_source"),
    "our underlay address": ("192.0.2.1", OURS, 9, "martian_source"),
    "our own pod": ("10.5.1.77", OURS, 9, "martian_source"),
    "our subnet's last": ("10.5.1.255", OURS, 9, "martian_source"),
    "from loopback": ("127.0.0.1", OURS, 9, "martian_source"),
    "from 0/8": ("0.1.2.3", OURS, 9, "martian_source"),
    "from a group": ("224.0.0.1", OURS, 9, "martian_source"),
    "from everybody": ("255.255.255.255", OURS, 9, "martian_source"),
    "from the link's broadcast": ("192.0.2.255", OURS, 9, "martian_source"),
    "to loopback": (HONEST, "127.0.0.1", 9, "martian_destination"),
    "to 127.8.9.10": (HONEST, "127.8.9.10", 9, "martian_destination"),
    "to 0/8": (HONEST, "0.1.2.3", 9, "martian_destination"),
    "to a group": (HONEST, "224.0.0.1", 9, "martian_destination"),
    "to everybody": (HONEST, "255.255.255.255", 9, "martian_destination"),
    "to the link's broadcast": (HONEST, "192.0.2.255", 9, "martian_destination"),
    "to the bridge's broadcast": (HONEST, "10.5.1.255", 9, "martian_destination"),
    "nested, to our underlay address": (HONEST, "192.0.2.1", PORT, "tunnel_in_tunnel"),
    "nested, to our tunnel address": (HONEST, "10.5.1.0", PORT, "tunnel_in_tunnel"),
    "nested, to another node": (HONEST, "192.0.2.3", PORT, "tunnel_in_tunnel"),
    "nested, from a node's address": ("192.0.2.3", "192.0.2.1", PORT, "tunnel_in_tunnel"),
}
SOURCE, SOURCE_PORT = "source_mismatch", "source_port_mismatch"
DESTINATION = "destination_mismatch"
ENFORCED = {
    # row: source, destination; reason under enforce from a stranger, a peer, a process on it
    "a pod of the sender's": (HONEST, OURS, SOURCE, PASSES, SOURCE_PORT),
    "the sender itself": ("192.0.2.2", OURS, SOURCE, PASSES, SOURCE_PORT),
    "another peer's pod": ("10.5.3.7", OURS, SOURCE, SOURCE, SOURCE),
    "another node": ("192.0.2.3", OURS, SOURCE, SOURCE, SOURCE),
    "the gateway": ("192.0.2.254", OURS, SOURCE, SOURCE, SOURCE),
    "a resolver": ("8.8.8.8", OURS, SOURCE, SOURCE, SOURCE),
    "an unleased part of the network": ("10.5.99.7", OURS, SOURCE, SOURCE, SOURCE),
    "class E": ("240.1.2.3", OURS, SOURCE, SOURCE, SOURCE),
    "admitted": ("203.0.113.7", OURS, SOURCE, PASSES, SOURCE_PORT),
    "to our tunnel address": (HONEST, "10.5.1.0", SOURCE, PASSES, SOURCE_PORT),
    "to our underlay address": (HONEST, "192.0.2.1", SOURCE, PASSES, SOURCE_PORT),
    "to the gateway": (HONEST, "192.0.2.254", SOURCE, DESTINATION, SOURCE_PORT),
    "to another peer's pod": (HONEST, "10.5.3.7", SOURCE, DESTINATION, SOURCE_PORT),
    "to the world": (HONEST, "8.8.8.8", SOURCE, DESTINATION, SOURCE_PORT),
}


def datagram(source: str, destination: str, port: int, ident: int) -> bytes:
    # So short a life that no kernel forwards it.
    body = struct.pack("!HHHH", 5000, port, 8, 0)
    return ipv4(body, 17, source=source, destination=destination, ident=ident, ttl=2, frag=0)


def rows() -> Iterator[tuple[str, str, bytes, tuple[str | None, ...]]]:
    """Sender, row, datagram, and the reason it is dropped for under off, count, enforce."""
    ident = 0
    for number, sender in enumerate(SENDERS):
        for name, (source, destination, port, reason) in IN_EVERY_MODE.items():
            ident += 1
            yield sender, name, datagram(source, destination, port, ident), (reason,) * 3
        for name, (source, destination, *reasons) in ENFORCED.items():
            ident += 1
            expected = (PASSES, PASSES, reasons[number])
            yield sender, name, datagram(source, destination, 9, ident), expected


@pytest.mark.parametrize("check", SourceCheck)
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.value)
async def test_who_and_what_gets_in(make_lab: Any, engine: Engine, check: SourceCheck) -> None:
    mode = list(SourceCheck).index(check)
    async with make_lab() as lab, contextlib.AsyncExitStack() as stack:
        left, right = await lab.host("left"), await lab.host("right")
        await lab.cable(left, "eth0", right, "eth0")
        for address in ("192.0.2.2/24", "192.0.2.9/24"):
            await right.configure("eth0", address)
        node: EngineNode = await stack.enter_async_context(
            engine_node(left, engine.value, 1, source_check=check, admitted=[ADMITTED])
        )
        node.engine.install(
            fib_of(
                ("10.5.2.0/24", "192.0.2.2"),
                ("10.5.3.0/24", "192.0.2.3"),
                own="10.5.1.0/24",
                own_addresses=["192.0.2.1"],
                broadcasts=["192.0.2.255", "10.5.1.255"],
            )
        )
        seen = stack.enter_context(
            await left.call(socket.socket, socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        )
        seen.bind((node.tun.name, ETH_P_IP))
        seen.settimeout(DEADLINE_S)
        senders = {}
        for sender, (address, port) in SENDERS.items():
            sock = await right.call(open_udp, IPv4Address(address), port)
            senders[sender] = stack.enter_context(sock)
        node.engine.attach(node.tun)

        reasons: Counter[str] = Counter()
        mismatches = 0
        for sent, (sender, row, data, expected) in enumerate(rows(), start=1):
            senders[sender].sendto(data, ("192.0.2.1", PORT))
            await until(partial(has_received, node, sent), row, poll_s=0)
            counted = node.engine.counters()
            drops = {
                reason.label: count
                for reason, count in zip(DropReason, counted.decap.drops, strict=True)
                if count
            }
            told = counted.source_mismatches + counted.destination_mismatches
            if (reason := expected[mode]) is not None:
                reasons[reason] += 1
            else:
                packet, (_, _, kind, *_) = seen.recvfrom(2048)
                assert kind == socket.PACKET_HOST
                assert packet[4:6] == data[4:6], f"{row} from {sender} gets in"
            assert drops == reasons, f"{row} from {sender}"
            is_told = (
                check is SourceCheck.COUNT and expected[0] is None and expected[-1] is not None
            )
            assert (told > mismatches) is is_told, f"{row} from {sender}"
            mismatches = told
        seen.settimeout(0.05)
        with pytest.raises(TimeoutError):
            seen.recv(2048)
        assert node.engine.counters().as_dict()["conserved"]


def has_received(node: EngineNode, count: int) -> bool:
    return node.engine.counters().decap.packets_in == count
