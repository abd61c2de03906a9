"""C against Python on the machine at hand, before it carries packets."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

from tundp.engine.native.fib import NativeFib
from tundp.engine.native.twins import (
    after_ttl_decrement,
    coalesce,
    ones_complement_sum,
    segment,
    sums_variants,
    variant_copy,
    variant_sum,
)
from tundp.errors import PlatformError
from tundp.lease.fib import Fib
from tundp.wire import checksum, ip, transport, vnet
from tundp.wire import segment as wire_segment
from tundp.wire.coalesce import Coalescer
from tundp.wire.vnet import VnetHeader


def self_test(fib: Fib) -> int:
    """Compare C with Python on this machine and on `fib`; the number of comparisons.

    PlatformError on the first difference: a miscompiled module must not carry packets.
    """
    compared = 0
    for length in range(130):
        data = bytes(number * 37 + length & 0xFF for number in range(length))
        _expect_equal(
            f"sum of {length} bytes",
            ones_complement_sum(data),
            checksum.ones_complement_sum(data),
        )
        compared += 1
    for value in range(0x10000):
        _expect_equal(
            f"checksum {value:#06x} after a TTL decrement",
            after_ttl_decrement(value),
            checksum.after_ttl_decrement(value),
        )
        compared += 1
    for variant, name in enumerate(sums_variants()):
        for length in range(400):
            data = bytes(number * 91 + length & 0xFF for number in range(length))
            expected = checksum.ones_complement_sum(data)
            _expect_equal(f"{name} sum of {length} bytes", variant_sum(variant, data), expected)
            _expect_equal(
                f"{name} copy of {length} bytes", variant_copy(variant, data), (data, expected)
            )
            compared += 2
    addresses = np.arange(0, 1 << 32, 65521, dtype=np.uint32)
    for address, index in zip(addresses, NativeFib(fib).indexes(addresses), strict=True):
        _expect_equal(f"route of {int(address):#010x}", int(index), fib.index(int(address)))
        compared += 1
    for header, packet in _super_packets():
        made = wire_segment.segment(header, memoryview(packet))
        assert isinstance(made, list)
        _expect_equal(f"packets of {header}", segment(header, packet), [bytes(m) for m in made])
        merger = Coalescer()
        for one in made:
            merger.add(one)
        merger.flush()
        _expect_equal(
            f"merge of {header}",
            coalesce([bytes(one) for one in made]),
            (merger.written, merger.misses),
        )
        compared += 2
    return compared


def _super_packets() -> Iterator[tuple[VnetHeader, bytes]]:
    """A TCP and a UDP super-packet, as a TUN hands them over."""
    payload = bytes(number * 31 & 0xFF for number in range(4321))
    tcp = struct.pack("!HHIIBBHHH", 5201, 443, 0xFFFFFF00, 7, 0x50, 0x18, 512, 0, 0)
    udp = struct.pack("!HHHH", 5201, 443, 8 + len(payload), 0)
    for ip_proto, gso_type, transport_header in (
        (transport.PROTO_TCP, vnet.GSO_TCPV4, tcp),
        (transport.PROTO_UDP, vnet.GSO_UDP_L4, udp),
    ):
        body = transport_header + payload
        packet = bytearray(
            ip.build_header(
                payload_len=len(body),
                source=0x0A050101,
                destination=0x0A050201,
                ip_proto=ip_proto,
                ttl=64,
                identification=0xFFFE,
                flags_offset=ip.FLAG_DF,
            )
            + body
        )
        field = ip.MIN_HEADER_LEN + transport.checksum_off(ip_proto)
        packet[field : field + 2] = transport.pseudo_sum(packet, len(body)).to_bytes(2, "big")
        yield (
            VnetHeader(
                flags=vnet.NEEDS_CSUM,
                gso_type=gso_type,
                gso_size=1000,
                csum_start=ip.MIN_HEADER_LEN,
                csum_offset=transport.checksum_off(ip_proto),
            ),
            bytes(packet),
        )


def _expect_equal(what: str, native: object, reference: object) -> None:
    if native != reference:
        raise PlatformError(f"native and reference disagree on the {what}: {native}, {reference}")
