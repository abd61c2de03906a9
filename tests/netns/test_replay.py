"""What `tundp replay` decides about captured packets, and what a real daemon did with them.

The daemon's counters are the oracle: the packets are taken off its devices by packet sockets, and
written to a file by this test.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tests.nodes import MakeOverlay, answers, counters, must_run
from tests.packets import icmp_echo, udp
from tests.wait import until
from tundp.lab.lab import Host
from tundp.lab.overlay import OverlayLab

TUNDP = str(Path(sys.executable).parent / "tundp")
ETH_P_ALL = 3
ETHERNET, RAW = 1, 101


class Sniffer:
    """A packet socket on one device (packet(7))."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    @classmethod
    async def on(cls, host: Host, device: str) -> Sniffer:
        def opened() -> socket.socket:
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
            sock.bind((device, 0))
            sock.setblocking(False)
            return sock

        return cls(await host.call(opened))

    def close(self) -> list[bytes]:
        """Everything that came."""
        frames = []
        with self._sock:
            while True:
                try:
                    frames.append(self._sock.recv(65535))
                except BlockingIOError:
                    return frames


def write_pcap(path: Path, frames: list[bytes], linktype: int) -> None:
    """A classic pcap file (draft-ietf-opsawg-pcap)."""
    head = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, linktype)
    body = b"".join(struct.pack("<IIII", 0, 0, len(each), len(each)) + each for each in frames)
    path.write_bytes(head + body)


async def send_some(overlay: OverlayLab) -> None:
    """Packets of which node 2 delivers some, and drops others by name."""
    one, two = overlay.nodes[1], overlay.nodes[2]
    pod = two.pod_address

    def datagram(inner: bytes, sport: int = 8285) -> bytes:
        ends: Any = {"source": one.public_ip, "destination": two.public_ip}
        return udp(inner, sport=sport, dport=8285, **ends)

    def inner(source: str, destination: str = pod, **more: Any) -> bytes:
        return icmp_echo(b"x" * 8, kind=0, source=source, destination=destination, **more)

    honest = str(one.gateway.ip + 5)
    out = await one.host.socket(socket.SOCK_RAW, socket.IPPROTO_RAW)
    with out:
        out.connect((two.public_ip, 0))
        for packet in (
            datagram(inner(honest)),
            datagram(inner(honest, ttl=1)),
            datagram(inner("203.0.113.5")),
            datagram(inner(honest, "10.5.222.1")),
            datagram(inner(pod, two.tunnel_address)),
            datagram(inner(honest, "127.0.0.1")),
            datagram(inner(honest), sport=9),
            datagram(b"\x45\0\0\x14abc"),
            datagram(b"\x60" + bytes(30)),
            datagram(udp(b"x", source=honest, destination=two.public_ip, dport=8285)),
        ):
            out.send(packet)


async def test_decisions_are_what_the_daemon_did(make_overlay: MakeOverlay, tmp_path: Path) -> None:
    async with make_overlay("--source-check=enforce", pods=True) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await until(lambda: answers(one.pod, two.pod_address), "the overlay carries pings")
        outside = await Sniffer.on(two.host, "eth0")
        before = await counters(two)
        await send_some(overlay)
        sent = 10

        async def all_in() -> dict[str, Any] | None:
            now = await counters(two)
            came = now["decap"]["packets_in"] - before["decap"]["packets_in"]
            return now if came >= sent else None

        after = await until(all_in, "the daemon has received them all")
        assert after is not None
        write_pcap(tmp_path / "eth0.pcap", outside.close(), ETHERNET)
        found = await replayed(overlay, tmp_path / "eth0.pcap")
        drops = Counter(after["decap"]["drops"])
        drops.subtract(before["decap"]["drops"])
        judged = [each for each in found if each["direction"] == "decap"]
        assert len(judged) == after["decap"]["packets_in"] - before["decap"]["packets_in"]
        assert Counter(each["reason"] for each in judged if each["reason"]) == +drops
        assert len(+drops) == 9, "each of these drops has a name of its own"
        delivered = after["decap"]["packets_out"] - before["decap"]["packets_out"]
        assert sum(each["verdict"] == "deliver" for each in judged) == delivered

        # The other direction, from the TUN.
        inside = await Sniffer.on(two.host, "flannel0")
        before = await counters(two)
        for destination in (one.pod_address, "10.5.250.1", "10.5.250.2"):
            await answers(two.pod, destination, timeout_s=0.2)
        after = await counters(two)
        write_pcap(tmp_path / "flannel0.pcap", inside.close(), RAW)
        found = await replayed(overlay, tmp_path / "flannel0.pcap")
        judged = [each for each in found if each["direction"] == "encap"]
        came = after["encap"]["packets_in"] - before["encap"]["packets_in"]
        assert len(judged) == came == 3, found
        assert sum(each["verdict"] == "forward" for each in judged) == 1
        lost = after["encap"]["drops"]["no_route"] - before["encap"]["drops"].get("no_route", 0)
        assert sum(each["reason"] == "no_route" for each in judged) == lost == 2


async def replayed(overlay: OverlayLab, path: Path) -> list[dict[str, Any]]:
    """The decisions about a file by node 2's own table."""
    two = overlay.nodes[2]
    argv = (TUNDP, "replay", str(path), f"--admin-socket={two.admin_socket}", "-o", "json")
    decisions: list[dict[str, Any]] = json.loads(await must_run(two.host, *argv))["decisions"]
    return decisions
