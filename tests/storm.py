"""Sends packets that faults show in: `python tests/storm.py WHAT ...`, in a lab host's namespace.

Written from the RFCs and linux/udp.h alone, without code of the product. Each ends by itself.

    bursts ADDRESS                 64 datagrams at once, every 20 ms: more than a short queue holds
    flood ADDRESS                  as many datagrams as one process can send, cut by the kernel
    forged ADDRESS SOURCE DESTINATION  datagrams for the overlay's port, with a packet in them whose
                                   sender is somebody else
"""

from __future__ import annotations

import socket
import struct
import sys
import time
from collections.abc import Iterator

ENDS_S = 40.0
DISCARD = 9
PORT = 8285
UDP_SEGMENT = 103
_SEGMENT_LEN, _SEGMENTS = 400, 100


def bursts(address: str) -> None:
    """Bursts, each packet one send."""
    sock = _connected(address)
    for _ in _ticks(0.02):
        for _ in range(64):
            _send(sock, bytes(100))


def flood(address: str) -> None:
    """Super-packets, which the kernel or the daemon cuts."""
    sock = _connected(address)
    sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, _SEGMENT_LEN)
    for _ in _ticks(0.001):
        _send(sock, bytes(_SEGMENT_LEN * _SEGMENTS))


def forged(address: str, source: str, destination: str) -> None:
    """UDP in IPv4 (RFC 791, RFC 768; checksum of UDP not used) in a datagram of the overlay."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("", PORT))
    sock.connect((address, PORT))
    inside = struct.pack("!HHHH", 4000, DISCARD, 12, 0) + b"true"
    ends = socket.inet_aton(source) + socket.inet_aton(destination)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(inside), 0, 0, 64, 17, 0) + ends
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    total = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    packet = head[:10] + struct.pack("!H", total) + head[12:] + inside
    for _ in _ticks(0.05):
        _send(sock, packet)


def _connected(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect((address, DISCARD))
    return sock


def _send(sock: socket.socket, data: bytes) -> None:
    try:
        sock.send(data)
    except OSError:  # an ICMP error of one before, or no room: the next one goes
        time.sleep(0.001)


def _ticks(pause_s: float) -> Iterator[None]:
    end = time.monotonic() + ENDS_S
    while time.monotonic() < end:
        yield
        time.sleep(pause_s)


def main(what: str, *addresses: str) -> None:
    """Send what the command line says."""
    if what == "forged":
        forged(*addresses)
    elif what == "bursts":
        bursts(*addresses)
    else:
        flood(*addresses)


if __name__ == "__main__":
    main(*sys.argv[1:])
