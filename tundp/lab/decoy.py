"""A decoy for the default gateway: it counts what of the overlay goes there instead.

eth0 [node] eth1 ── port<number> [decoy]
      198.51.100.1/30      198.51.100.2/30, the node's default route

A node without a route into the overlay sends the overlay's packets, unencapsulated, to its default
gateway: to a stranger. The decoy is that stranger. It counts each IPv4 packet with a source or a
destination in the overlay's network; encapsulated ones have the nodes' own addresses outside.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network
from typing import Final, Self

from tundp.errors import LabError
from tundp.lab.lab import Host, Lab
from tundp.lab.overlay import LabNode
from tundp.linux import uapi
from tundp.linux.socket_filter import attach_filter
from tundp.wire import checksum

HOST: Final = "decoy"
DEVICE: Final = "eth1"
_KEPT_LEN: Final = 64
_KINDS_MAX: Final = 5
_PROVE_S: Final = 10.0
_IP_HEADER: Final = struct.Struct("!BBHHHBBH4s4s")
_STATISTICS: Final = struct.Struct("=II")
_SOURCE_OFF: Final = 12
_DESTINATION_OFF: Final = 16


class Decoy:
    """The namespace, and the packet socket that counts while the block lasts. See `add_decoy`.

    Entering it is a LabError unless packets of each node are seen to be counted.
    """

    def __init__(self, host: Host, nodes: Iterable[LabNode], network: IPv4Network) -> None:
        self._host = host
        self._nodes = tuple(nodes)
        self._network = network
        self._sock: socket.socket | None = None
        self._leaked = 0
        self._kinds: Counter[str] = Counter()

    async def __aenter__(self) -> Self:
        self._sock = await self._host.socket(
            socket.SOCK_DGRAM, socket.htons(uapi.ETH_P_IP), family=socket.AF_PACKET
        )
        try:
            self._sock.setblocking(False)
            attach_filter(self._sock, _filter(self._network))
            for node in self._nodes:
                await self.prove(node)
        except BaseException:
            self._sock.close()
            raise
        self.clear()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._sock is not None:
            self._count()
            self._sock.close()

    @property
    def leaked(self) -> int:
        """Packets of the overlay so far.

        The kernel counts them (PACKET_STATISTICS, packet(7)), with those the socket's queue had no
        room for: a flood is counted whole.
        """
        self._count()
        return self._leaked

    def _count(self) -> None:
        if self._sock is None or self._sock.fileno() < 0:
            return
        while True:
            try:
                self._look_at(self._sock.recv(_KEPT_LEN))
            except BlockingIOError:
                break
        raw = self._sock.getsockopt(uapi.SOL_PACKET, uapi.PACKET_STATISTICS, _STATISTICS.size)
        self._leaked += int(_STATISTICS.unpack(raw)[0])

    @property
    def seen(self) -> str:
        """What it was, in words: "12 of 10.5.7.2 > 10.5.9.2 (UDP)"; empty if there was nothing."""
        total = self.leaked
        kinds = [f"{count} of {kind}" for kind, count in self._kinds.most_common(_KINDS_MAX)]
        return f"{total}: {', '.join(kinds)}" if total else ""

    def clear(self) -> None:
        """Count from 0 again."""
        self._count()
        self._leaked = 0
        self._kinds.clear()

    def _look_at(self, packet: bytes) -> None:
        source, destination = (
            IPv4Address(packet[off : off + 4]) for off in (_SOURCE_OFF, _DESTINATION_OFF)
        )
        protocol = {1: "ICMP", 6: "TCP", 17: "UDP"}.get(packet[9], f"protocol {packet[9]}")
        self._kinds[f"{source} > {destination} ({protocol})"] += 1

    async def prove(self, node: LabNode, *, patience_s: float = _PROVE_S) -> None:
        """Plant a packet on the node's device; LabError if it is not counted."""
        before = self.leaked
        deadline = time.monotonic() + patience_s
        sock = await node.host.socket(
            socket.SOCK_DGRAM, socket.htons(uapi.ETH_P_IP), family=socket.AF_PACKET
        )
        with sock:
            broadcast = (DEVICE, uapi.ETH_P_IP, 0, 0, b"\xff" * 6)
            while self.leaked == before:
                if time.monotonic() > deadline:
                    raise LabError(
                        f"the decoy gateway does not see what {node.host.namespace} sends it"
                    )
                with contextlib.suppress(OSError):  # the device may not be up yet
                    sock.sendto(_planted(self._network), broadcast)
                await asyncio.sleep(0.01)


async def add_decoy(lab: Lab, nodes: Iterable[LabNode], network: str = "10.5.0.0/16") -> Decoy:
    """Make it the default gateway of these nodes, which must have none.

        async with await add_decoy(lab, nodes) as decoy:
            ...
        assert decoy.leaked == 0

    Its namespace, and the nodes' route to it, go with the lab.
    """
    nodes = tuple(nodes)
    host = await lab.host(HOST)
    for node in nodes:
        port = f"port{node.number}"
        await lab.cable(node.host, DEVICE, host, port)
        base = IPv4Address("198.51.100.0") + 4 * node.number
        await node.host.configure(DEVICE, f"{base + 1}/30")
        await host.configure(port, f"{base + 2}/30")
        await node.host.route("0.0.0.0/0", via=str(base + 2))
    return Decoy(host, nodes, IPv4Network(network))


def _filter(network: IPv4Network) -> list[tuple[int, int, int, int]]:
    """IPv4 packets, header first, with a source or destination in `network`."""
    mask, wanted = int(network.netmask), int(network.network_address)
    return [
        (0x20, 0, 0, _DESTINATION_OFF),  # ld [16]
        (0x54, 0, 0, mask),  # and #mask
        (0x15, 3, 0, wanted),  # jeq #network, keep
        (0x20, 0, 0, _SOURCE_OFF),  # ld [12]
        (0x54, 0, 0, mask),
        (0x15, 0, 1, wanted),  # jeq #network, keep, drop
        (0x06, 0, 0, _KEPT_LEN),  # keep: ret
        (0x06, 0, 0, 0),  # drop: ret
    ]


def _planted(network: IPv4Network) -> bytes:
    """An empty packet of protocol 253 (RFC 3692: for experiments) into the overlay."""
    addresses = (IPv4Address("198.51.100.1").packed, network[1].packed)
    blank = _IP_HEADER.pack(0x45, 0, _IP_HEADER.size, 0, 0, 64, 253, 0, *addresses)
    total = checksum.checksum(blank)
    return _IP_HEADER.pack(0x45, 0, _IP_HEADER.size, 0, 0, 64, 253, total, *addresses)
