"""Writes the seed corpus: real packets, in the shape each fuzz target takes its input.

    python3 -m tests.native.fuzz.make_corpus [DIRECTORY]

What it writes is kept in the repository, so that fuzzing needs no Python; run it again after
a change here. Vnet headers are in the byte order of the machines we run on, little-endian.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

from tests import packets
from tests.packets import ACK, CWR, DF, FIN, MF, PSH, ROUTER_ALERT, SYN
from tests.packets import ipv4 as inner_ipv4
from tundp.wire.filter import parse

CORPUS = Path(__file__).with_name("corpus")

# Where fuzz.h's FIB sends packets, and whose packets it takes from 127.0.0.1.
WIDE, NARROW, OWN, NO_ROUTE = "10.5.0.7", "10.5.0.2", "10.5.0.4", "10.5.0.5"
POD = "10.5.0.6"

TIMESTAMPS = bytes.fromhex("0101080a0012d68700a1b2c3")
OF_SYN = bytes.fromhex("020405b40402080a0012d6870000000001030307")
RECORD_ROUTE = bytes.fromhex("0707040a05000100")

NEEDS_CSUM, TCPV4, TCPV6, UDP_L4, ECN = 1, 1, 4, 5, 0x80
TCP_FIELD, UDP_FIELD = 16, 6

# The choices of the targets' first bytes.
ASIS, MEND = b"\0", b"\1"


def fields(
    *,
    source: str = POD,
    to: str = WIDE,
    ident: int = 0x1234,
    flags: int = DF,
    ttl: int = 64,
    options: bytes = b"",
) -> packets.IpFields:
    return {
        "source": source,
        "destination": to,
        "ident": ident,
        "frag": flags,
        "ttl": ttl,
        "ip_options": options,
    }


def ipv4(payload: bytes, proto: int, **ip: Any) -> bytes:
    return packets.ipv4(payload, proto, **fields(**ip))


def tcp(
    payload: bytes,
    *,
    seq: int = 1000,
    tcp_flags: int = ACK,
    tcp_options: bytes = TIMESTAMPS,
    is_partial: bool = False,
    **ip: Any,
) -> bytes:
    """is_partial: with the checksum a stack leaves a device to finish."""
    whole = packets.tcp(
        payload,
        seq,
        tcp_flags,
        tcp_options,
        sport=40000,
        dport=5201,
        ack=7777,
        window=502,
        **fields(**ip),
    )
    return packets.super_packet(whole) if is_partial else whole


def udp(payload: bytes, *, is_partial: bool = False, **ip: Any) -> bytes:
    whole = packets.udp(payload, sport=40000, dport=4433, **fields(**ip))
    return packets.super_packet(whole) if is_partial else whole


def icmp(kind: int = 8, body: bytes = b"abcdefghijklmnop", **ip: Any) -> bytes:
    return packets.icmp_echo(body, kind=kind, **fields(**ip))


def vnet(kind: int, gso_size: int, hdr_len: int, start: int, field: int) -> bytes:
    flags = NEEDS_CSUM if start else 0
    return struct.pack("<BBHHHH", flags, kind, hdr_len, gso_size, start, field)


def records(*packets: bytes) -> bytes:
    return b"".join(struct.pack("!H", len(packet)) + packet for packet in packets)


def text(length: int) -> bytes:
    return bytes(i * 11 & 0xFF for i in range(length))


def tcp_flow(count: int, **fields: Any) -> list[bytes]:
    return [tcp(text(100), seq=1000 + 100 * i, ident=5 + i, **fields) for i in range(count)]


def udp_flow(count: int) -> list[bytes]:
    return [udp(text(150), ident=5 + i, flags=0) for i in range(count)]


PLAIN = vnet(0, 0, 0, 0, 0)
# A neighbour solicitation's head: the kernel sends such on any new device.
IPV6 = bytes.fromhex(
    "6000000000083a40fe800000000000000000000000000001ff0200000000000000000000000000028000abcd00010001"
)
SUPER_TCP = vnet(TCPV4, 300, 52, 20, TCP_FIELD) + tcp(
    text(1000), tcp_flags=ACK | PSH | FIN, is_partial=True
)
SUPER_CWR = vnet(TCPV4 | ECN, 99, 52, 20, TCP_FIELD) + tcp(
    text(500), tcp_flags=ACK | CWR | PSH, is_partial=True
)
SUPER_OPTIONS = vnet(TCPV4, 100, 44, 24, TCP_FIELD) + tcp(
    text(350), tcp_options=b"", options=ROUTER_ALERT, is_partial=True
)
SUPER_UDP = vnet(UDP_L4, 300, 28, 20, UDP_FIELD) + udp(text(1000), is_partial=True)


def singles() -> dict[str, bytes]:
    """A packet each: what encapsulation and decapsulation are given."""
    data = tcp(text(300))
    return {
        "tcp": data,
        "syn": tcp(b"", tcp_flags=SYN, tcp_options=OF_SYN),
        "udp": udp(text(120), to=NARROW, flags=0),
        "fragment": ipv4(text(160), 17, flags=MF | 3, to=NARROW),
        "options": udp(text(120), options=RECORD_ROUTE + ROUTER_ALERT, to=NARROW, flags=0),
        "echo": icmp(to=NO_ROUTE),
        "ttl": udp(b"late", ttl=1),
        "own": udp(b"ours", source="10.5.0.1"),
        "ipv6": IPV6,
        "truncated": data[:60],
    }


def for_segment() -> dict[str, bytes]:
    return {
        "tcp": SUPER_TCP,
        "tcp-cwr": SUPER_CWR,
        "tcp-options": SUPER_OPTIONS,
        "udp": SUPER_UDP,
        "plain": PLAIN + tcp(text(300)),
        "plain-tcp": vnet(0, 0, 52, 20, TCP_FIELD) + tcp(text(77), is_partial=True),
        "plain-udp": vnet(0, 0, 28, 20, UDP_FIELD) + udp(text(77), is_partial=True),
        "plain-odd": vnet(0, 0, 0, 20, 7) + udp(text(77), is_partial=True),
        "tcpv6": vnet(TCPV6, 300, 74, 40, TCP_FIELD) + IPV6,
    }


def for_coalesce() -> dict[str, bytes]:
    pushed = tcp(text(60), seq=1400, ident=9, tcp_flags=ACK | PSH)
    lone = [tcp(b"", seq=1400), tcp(b"", tcp_flags=SYN, tcp_options=OF_SYN), icmp()]
    odd = [udp(text(9), options=ROUTER_ALERT), ipv4(text(64), 17, flags=MF), IPV6]
    other = [tcp(text(100), seq=1000 + 100 * i, source="10.5.0.7") for i in range(2)]
    growing = [udp(text(150 + i), ident=5 + i, flags=0) for i in range(3)]
    return {
        "tcp": records(*tcp_flow(4), pushed),
        "growing": records(*growing),
        "tcp-no-df": records(*tcp_flow(3, flags=0), pushed),
        "udp": records(*udp_flow(4), udp(text(10), ident=9, flags=0)),
        "mixed": records(*tcp_flow(2), *udp_flow(2), *other, *lone, *tcp_flow(1), *odd),
        "gap": records(*tcp_flow(2), *tcp_flow(2), tcp(text(100), seq=1300, ttl=9)),
    }


def for_engine() -> dict[str, bytes]:
    """Choices and refusals: see fuzz_engine.c."""
    flows = [PLAIN + packet for packet in (*tcp_flow(6), *udp_flow(6))]
    trains = records(SUPER_TCP, SUPER_UDP, SUPER_CWR)
    small = [PLAIN + udp(text(150), to=NARROW, flags=0), PLAIN + icmp(ttl=1), PLAIN + IPV6]
    wide = SUPER_UDP[:10] + udp(text(700), to=NARROW, flags=0, is_partial=True)
    # A record said to be longer than the input is filled up: 60 kB of it.
    whole = udp(text(20))
    big = whole[:2] + b"\0\0" + whole[4:]
    long = struct.pack("!H", 60010) + PLAIN + big
    # No super-packet for all its bits: the kernel's ECN flag alone.
    long_ecn = struct.pack("!H", 60010) + vnet(ECN, 1, 0, 0, 0) + big
    return {
        "flows": b"\x01\x00" + records(*flows),
        "flows-gro": b"\x41\x00" + records(*flows[6:]),
        "flows-no-super": b"\x01\x10" + records(*flows),
        "flows-short": b"\x29\x09" + records(*flows),
        "trains": b"\x01\x00" + trains,
        "trains-no-segment": b"\x01\x01" + trains,
        "trains-too-big": b"\x01\x03" + records(SUPER_TCP[:4] + b"\xff\x07" + SUPER_TCP[6:]),
        "trains-busy": b"\x01\x04" + trains,
        "single": b"\x03\x00" + records(*small),
        "narrow": b"\x81\x00" + records(wide, *small),
        "long": b"\x09\x00" + long,
        "long-ecn": b"\x09\x00" + long_ecn,
        "turns": b"\x11\x00"
        + records(*small, flows[0], *[PLAIN + icmp(kind=0, to="10.5.0.1")] * 3),
    }


def for_fib() -> dict[str, bytes]:
    chunk = 0x80000000

    def fib(base: int, base_len: int, strides: list[int], table: list[int]) -> bytes:
        head = struct.pack("!IBB", base, base_len, len(strides))
        head += bytes([*strides, 0, 0, 0][:3]) + bytes([10])
        return head + struct.pack(f"!{len(table)}I", *table)

    return {
        "two-levels": fib(0x0A050000, 29, [2, 1], [7, 8, chunk | 4, 7, 9, 0]),
        "three-levels": fib(
            0x0A050000, 16, [2, 3, 1], [1, 2, chunk | 4, 3, *range(7), chunk | 12, 4, 5]
        ),
        "flat": fib(0, 0, [4], list(range(10)) + [0] * 6),
        "loop": fib(0x0A050000, 29, [2, 1], [7, 8, chunk, 7, 9, 0]),
        "behind": fib(0x0A050000, 29, [2, 1], [7, 8, chunk | 5, 7, 9, 0]),
        "one": fib(0x0A050001, 32, [0], [1]),
    }


def for_filter() -> dict[str, bytes]:
    """A program, 14 bytes an instruction, then a packet: see fuzz_filter.c."""

    def seed(text: str, packet: bytes) -> bytes:
        ops = parse(text).ops
        packed = (struct.pack("!BBIII", op.kind, op.field, op.low, op.high, op.mask) for op in ops)
        return bytes([len(ops)]) + b"".join(packed) + packet

    web = tcp(text(30), tcp_flags=SYN, tcp_options=b"")
    late = icmp(kind=11, body=web[:40])
    return {
        "everything": seed("", web),
        "tcp": seed("tcp port 5201 and not fragment or quoted udp", web),
        "cut": seed("tcp-syn and less 99 or drop", web[:33]),
        "quoted": seed(f"quoted (host {POD} or {WIDE}) and quoted port 40000", late),
        "quote-cut": seed("not (encap or peer 127.0.0.1) and not (decap or ip)", late[:51]),
    }


def corpus() -> dict[str, dict[str, bytes]]:
    packets = singles()
    to_peer = {name: ASIS + packet for name, packet in packets.items()}
    from_peer = {name: bytes([i << 1 & 6]) + p for i, (name, p) in enumerate(packets.items())}
    # The source check enforced, and passed.
    from_peer["to-us"] = b"\x04" + udp(b"for us", to=OWN)
    from_peer["message"] = b"\x04" + ipv4(b"nonce..." + text(60), 253, to="10.5.0.1", flags=0)
    quoted = inner_ipv4(b"nonce...", 253, source="10.5.0.1", destination=POD, frag=0)
    refusal = b"\x03\x02" + bytes(6) + quoted
    from_peer["refusal"] = b"\x04" + ipv4(refusal, 1, to="10.5.0.1", flags=0)
    from_peer["answer"] = b"\x04" + icmp(kind=0, body=text(60), to="10.5.0.1", flags=MF)
    fragments = {
        name: ASIS + struct.pack("!H", mtu) + packets[name]
        for name, mtu in (("udp", 68), ("fragment", 100), ("options", 120))
    }
    return {
        "fuzz_encapsulate": to_peer,
        "fuzz_decapsulate": from_peer,
        "fuzz_fragment": fragments,
        "fuzz_segment": {name: MEND + one for name, one in for_segment().items()},
        "fuzz_coalesce": {name: b"\x00\x3f" + one for name, one in for_coalesce().items()},
        "fuzz_fib": for_fib(),
        "fuzz_filter": for_filter(),
        "fuzz_engine": for_engine(),
    }


def main(directory: Path) -> None:
    for target, inputs in corpus().items():
        (directory / target).mkdir(parents=True, exist_ok=True)
        for name, data in inputs.items():
            (directory / target / name).write_bytes(data)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else CORPUS)
