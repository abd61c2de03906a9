"""A packet in one line, as tcpdump's readers know it.

    10.5.1.2 > 10.5.2.3 ICMP echo request id 7 seq 1, 84 B
    10.5.1.2:40110 > 10.5.2.3:443 TCP [S] seq 1, 60 B

Never fails: of a broken or cut packet it says what is there.
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address
from typing import Final

from tundp.wire.socket_wait import WAIT_MAX

_MIN_HEADER: Final = 20
_FLAGS: Final = ((0x02, "S"), (0x01, "F"), (0x04, "R"), (0x08, "P"), (0x10, "."), (0x20, "U"))
"""tcpdump's letters, RFC 9293 section 3.1."""
_PROTOCOLS: Final = {1: "ICMP", 2: "IGMP", 4: "IPIP", 6: "TCP", 17: "UDP", 47: "GRE", 50: "ESP"}
_ICMP: Final = {
    0: "echo reply",
    3: "unreachable",
    4: "source quench",
    5: "redirect",
    8: "echo request",
    11: "time exceeded",
    12: "parameter problem",
}
_UNREACHABLE: Final = {
    0: "net unreachable",
    1: "host unreachable",
    2: "protocol unreachable",
    3: "port unreachable",
    4: "fragmentation needed",
    13: "administratively prohibited",
}


def packet(data: bytes, length: int | None = None) -> str:
    """One line on the packet that begins with `data`; length: of the whole of it, bytes."""
    whole = len(data) if length is None else length
    size = f"{whole} B"
    if len(data) < _MIN_HEADER:
        return f"no IPv4 header, {size}: {data.hex() or 'empty'}"
    if data[0] >> 4 != 4:
        return f"IP version {data[0] >> 4}, {size}: {data[:24].hex()}"
    header_len = (data[0] & 0x0F) * 4
    protocol = data[9]
    source, destination = IPv4Address(data[12:16]), IPv4Address(data[16:20])
    name = _PROTOCOLS.get(protocol, f"protocol {protocol}")
    (fragment,) = struct.unpack_from(">H", data, 6)
    offset = (fragment & 0x1FFF) * 8
    if offset:
        tail = f", fragment at {offset}, IP id {data[4] << 8 | data[5]}"
        return f"{source} > {destination} {name}{tail}, {size}"
    rest = data[header_len:] if header_len >= _MIN_HEADER else b""
    first = ", first fragment" if fragment & 0x2000 else ""
    if protocol in (6, 17) and len(rest) >= 4:
        ports = struct.unpack_from(">HH", rest)
        detail = _tcp(rest) if protocol == 6 else ""
        text = f"{source}:{ports[0]} > {destination}:{ports[1]} {name}{detail}"
    elif protocol == 1 and len(rest) >= 2:
        text = f"{source} > {destination} {name} {_icmp(rest)}"
    else:
        text = f"{source} > {destination} {name}"
    ttl = f", TTL {data[8]}" if data[8] <= 1 else ""
    return f"{text}{first}{ttl}, {size}"


def socket_wait(wait_ns: int) -> str:
    """`socket wait 31us`, of a Record's `wait_ns`; empty where that is not known."""
    if not wait_ns:
        return ""
    if wait_ns == WAIT_MAX:
        return f"socket wait {WAIT_MAX / 1e9:.1f}s or more"
    if wait_ns < 10_000_000:
        return f"socket wait {wait_ns / 1000:.0f}us"
    return f"socket wait {wait_ns / 1_000_000:.1f}ms"


def _tcp(segment: bytes) -> str:
    if len(segment) < 14:
        return ""
    (seq,) = struct.unpack_from(">I", segment, 4)
    flags = "".join(letter for bit, letter in _FLAGS if segment[13] & bit)
    return f" [{flags or 'none'}] seq {seq}"


def _icmp(message: bytes) -> str:
    kind, code = message[0], message[1]
    if kind == 3:
        return _UNREACHABLE.get(code, f"unreachable, code {code}")
    text = _ICMP.get(kind, f"type {kind} code {code}")
    if kind in (0, 8) and len(message) >= 8:
        identifier, sequence = struct.unpack_from(">HH", message, 4)
        return f"{text} id {identifier} seq {sequence}"
    return text
