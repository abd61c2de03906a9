"""Fills a namespace's connection table and empties it: `python tests/conntrack.py fill|flush`.

Written from linux/netfilter/nfnetlink_conntrack.h alone, without code of the product. The entries
are of UDP connections that were answered (IPS_ASSURED): the kernel gives none of these up for a new
one. The limit is the whole machine's, and is not changed: what counts is one namespace's entries.

Exit code 77, and a sentence, where that cannot be done.
"""

from __future__ import annotations

import socket
import struct
import sys
from pathlib import Path

NETLINK_NETFILTER = 12
NEW, DELETE = 0x100, 0x102
"""NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_NEW, _DELETE."""
REQUEST, ACK, CREATE = 0x1, 0x4, 0x400
NESTED = 0x8000
TUPLE_ORIG, TUPLE_REPLY, STATUS, TIMEOUT = 1, 2, 3, 7
SEEN_REPLY, ASSURED, CONFIRMED = 2, 4, 8
LIFE_S = 300
MOST = 1 << 19
"""Entries, of a third of a kilobyte each."""
BATCH = 200
SYSCTLS = Path("/proc/sys/net/netfilter")


def attribute(kind: int, value: bytes) -> bytes:
    """struct nlattr and its value, padded to 4 bytes."""
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def direction(kind: int, source: bytes, destination: bytes, ports: tuple[int, int]) -> bytes:
    """CTA_TUPLE_ORIG or _REPLY of a UDP connection."""
    ip = attribute(1, source) + attribute(2, destination)
    proto = attribute(1, bytes([socket.IPPROTO_UDP]))
    proto += attribute(2, struct.pack("!H", ports[0])) + attribute(3, struct.pack("!H", ports[1]))
    return attribute(kind | NESTED, attribute(1 | NESTED, ip) + attribute(2 | NESTED, proto))


def message(number: int) -> bytes:
    """A request to make connection number N, from an address of 198.18.0.0/15 (RFC 2544)."""
    client = struct.pack("!I", 0xC6120000 + number % (1 << 17))
    server, ports = socket.inet_aton("198.51.100.1"), (1024 + number // (1 << 17), 53)
    body = struct.pack("=BBH", socket.AF_INET, 0, 0)
    body += direction(TUPLE_ORIG, client, server, ports)
    body += direction(TUPLE_REPLY, server, client, (ports[1], ports[0]))
    body += attribute(TIMEOUT, struct.pack("!I", LIFE_S))
    body += attribute(STATUS, struct.pack("!I", SEEN_REPLY | ASSURED | CONFIRMED))
    return struct.pack("=IHHII", 16 + len(body), NEW, REQUEST | CREATE, number, 0) + body


def fill() -> int:
    """Make connections until no more go in."""
    most = int((SYSCTLS / "nf_conntrack_max").read_text())
    if not 0 < most <= MOST:
        print(f"nf_conntrack_max is {most}: too many connections to make", file=sys.stderr)
        return 77
    try:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
    except OSError as error:
        print(f"no netfilter netlink here: {error}", file=sys.stderr)
        return 77
    with sock:
        for first in range(0, most + most // 20, BATCH):
            sock.send(b"".join(map(message, range(first, first + BATCH))))
            if first == 0 and (refused := answer(sock)):
                print(f"the kernel makes no connection for us: errno {refused}", file=sys.stderr)
                return 77
    print((SYSCTLS / "nf_conntrack_count").read_text().strip(), "of", most)
    return 0


def answer(sock: socket.socket) -> int:
    """The errno of the first refusal so far; 0 if there is none."""
    sock.setblocking(False)
    try:
        data = sock.recv(1 << 16)
    except BlockingIOError:
        return 0
    finally:
        sock.setblocking(True)
    return -int(struct.unpack_from("=i", data, 16)[0])


def flush() -> int:
    """Forget every connection of this namespace."""
    body = struct.pack("=BBH", socket.AF_UNSPEC, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as sock:
        sock.send(struct.pack("=IHHII", 16 + len(body), DELETE, REQUEST | ACK, 1, 0) + body)
        return answer(sock)


if __name__ == "__main__":
    sys.exit({"fill": fill, "flush": flush}[sys.argv[1]]())
