"""Numbered UDP packets both ways through a daemon, from within one machine: what was lost.

argv: our TUN's address, the peer's pod and node, the tunnel's port, the file for the result. Sends
until somebody makes the file STOP, then waits for the last ones.

    outward   a socket -> TUN of the daemon -> eth0 -> peer0, where they are seen (packet(7))
    inward    peer0, as the peer's node would send them -> eth0 -> daemon -> TUN -> a socket
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import struct
import sys
import time
from pathlib import Path

STOP = Path("/run/sequence.stop")
PORT = 9999
PAUSE_S = 0.05
"""So few that they fit the queues, however busy the machine is."""
LAST_S = 20.0


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def udp_packet(source: str, destination: str, port: int, payload: bytes) -> bytes:
    """An IPv4 packet with a UDP datagram without checksum (RFC 768)."""
    udp = struct.pack("!HHHH", port, port, 8 + len(payload), 0) + payload
    addresses = socket.inet_aton(source) + socket.inet_aton(destination)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0) + addresses
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + udp


def numbers_in(frame: bytes, port: int) -> list[int]:
    """The numbers of our packets in a frame of the tunnel, which may be a super-packet."""
    found: list[int] = []
    at = 14 + 20 + 8
    is_tunnel = frame[12:14] == b"\x08\x00" and frame[23] == 17
    if not is_tunnel or struct.unpack_from("!H", frame, 36)[0] != port:
        return found
    while at + 36 <= len(frame):
        length = struct.unpack_from("!H", frame, at + 2)[0]
        if frame[at + 9] == 17 and struct.unpack_from("!H", frame, at + 22)[0] == PORT:
            found.append(struct.unpack_from("!Q", frame, at + 28)[0])
        at += max(length, 20)
    return found


def main(address: str, pod: str, node: str, port: int, result: Path) -> None:
    inside = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    inside.bind((address, PORT))
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    wire.bind(("peer0", 0))
    to = bytes.fromhex(Path("/sys/class/net/eth0/address").read_text().strip().replace(":", ""))
    by = bytes.fromhex(Path("/sys/class/net/peer0/address").read_text().strip().replace(":", ""))
    sent = {"outward": 0, "inward": 0}
    got: dict[str, set[int]] = {"outward": set(), "inward": set()}
    due, last = time.monotonic(), 0.0
    while not last or time.monotonic() < last:
        if not last and time.monotonic() >= due:
            number = struct.pack("!Q", sent["outward"])
            with contextlib.suppress(OSError):  # counted as sent: no device is a loss
                inside.sendto(number, (pod, PORT))
            inner = udp_packet(pod, address, PORT, number)
            wire.send(to + by + b"\x08\x00" + udp_packet(node, "192.0.2.1", port, inner))
            sent = {name: count + 1 for name, count in sent.items()}
            due += PAUSE_S
            if STOP.exists():
                last = time.monotonic() + LAST_S
        if last and all(len(got[name]) == count for name, count in sent.items()):
            break
        ready, _, _ = select.select([inside, wire], [], [], max(0, due - time.monotonic()))
        if inside in ready:
            got["inward"].add(struct.unpack("!Q", inside.recv(2048)[:8])[0])
        if wire in ready:
            frame, (_, _, kind, *_) = wire.recvfrom(1 << 17)
            if kind != socket.PACKET_OUTGOING:
                got["outward"].update(numbers_in(frame, port))
    counts = {name: [count, len(got[name])] for name, count in sent.items()}
    result.with_suffix(".new").write_text(json.dumps(counts))
    result.with_suffix(".new").rename(result)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), Path(sys.argv[5]))
