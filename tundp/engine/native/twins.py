"""The C twins of wire/ as Python calls them: for tests, the self-test and micro-benchmarks."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from tundp.engine.native.library import require
from tundp.wire import transport, vnet
from tundp.wire.coalesce import Miss, Written
from tundp.wire.drop import REASONS, DropReason
from tundp.wire.socket_wait import Clocks
from tundp.wire.vnet import VnetHeader

_RECORD: Final = struct.Struct("=II")


def ones_complement_sum(data: bytes | bytearray | memoryview) -> int:
    """As wire.checksum.ones_complement_sum. `data` must be contiguous; it is only borrowed."""
    native = require()
    return int(native.lib.tundp_sum(native.ffi.from_buffer("uint8_t[]", data), len(data)))


def after_ttl_decrement(header_checksum: int) -> int:
    """As wire.checksum.after_ttl_decrement."""
    return int(require().lib.tundp_checksum_after_ttl_decrement(header_checksum))


def before_ttl_decrement(header_checksum: int) -> int:
    """As wire.checksum.before_ttl_decrement."""
    return int(require().lib.tundp_checksum_before_ttl_decrement(header_checksum))


def wait_ns(stamp_ns: int, now: Clocks, before: Clocks) -> int:
    """As wire.socket_wait.wait_ns."""
    native = require()
    clocks = (native.ffi.new("struct tundp_clocks *", each._asdict()) for each in (now, before))
    return int(native.lib.tundp_wait_ns(stamp_ns, *clocks))


def latency_bucket(elapsed_ns: int) -> int:
    """As engine.latency.bucket."""
    return int(require().lib.tundp_latency_bucket(elapsed_ns))


def sums_variants() -> list[str]:
    """The checksum variants this CPU has, by name; engines use the first."""
    native = require()
    names: list[str] = []
    while (name := native.lib.tundp_sums_name(len(names))) != native.ffi.NULL:
        names.append(native.ffi.string(name).decode())
    return names


def variant_sum(variant: int, data: bytes | bytearray | memoryview) -> int:
    """ones_complement_sum as the vector variant of that number computes it."""
    native = require()
    borrowed = native.ffi.from_buffer("uint8_t[]", data)
    return int(native.lib.tundp_sums_run(variant, native.ffi.NULL, borrowed, len(data)))


def variant_copy(variant: int, data: bytes | bytearray | memoryview) -> tuple[bytes, int]:
    """The copy a vector variant makes, and the sum it computes on the way."""
    native = require()
    out = bytearray(len(data))
    value = native.lib.tundp_sums_run(
        variant,
        native.ffi.from_buffer("uint8_t[]", out),
        native.ffi.from_buffer("uint8_t[]", data),
        len(data),
    )
    return bytes(out), int(value)


def segment(
    header: VnetHeader, packet: bytes | bytearray | memoryview, *, lowers_ttl: bool = False
) -> list[bytes] | DropReason:
    """As wire.segment.segment; with lowers_ttl the packets of a split have a TTL of one less."""
    native = require()
    vnet = native.ffi.new("struct tundp_vnet *", header._asdict())
    most = len(packet) // max(header.gso_size, 1) + 2
    out = bytearray(len(packet) + most * transport.HEADERS_MAX)
    lens = native.ffi.new("uint32_t[]", most)
    count = native.lib.tundp_segment(
        vnet,
        native.ffi.from_buffer("uint8_t[]", packet),
        len(packet),
        lowers_ttl,
        native.ffi.from_buffer("uint8_t[]", out),
        len(out),
        lens,
        most,
    )
    if count < 0:
        return REASONS[int(-1 - count)]
    found, at = [], 0
    for number in range(count):
        found.append(bytes(out[at : at + lens[number]]))
        at += lens[number]
    return found


def coalesce(
    packets: Sequence[bytes],
    *,
    is_tcp_on: bool = True,
    is_udp_on: bool = True,
    max_udp_segments: int = 64,
) -> tuple[list[Written], list[int]]:
    """One batch through the C coalescer: what wire.coalesce.Coalescer writes, and its misses."""
    native = require()
    room = bytearray(b"".join(bytes(vnet.LEN) + packet for packet in packets))
    out = bytearray(len(room) + 8 * len(packets))
    misses = native.ffi.new("uint64_t[]", len(Miss))
    lens = native.ffi.new("uint32_t[]", [len(packet) for packet in packets])
    batch = native.ffi.new(
        "struct tundp_coalesce_input *",
        {
            "packets": native.ffi.from_buffer("uint8_t[]", room),
            "lens": lens,
            "count": len(packets),
            "is_tcp_on": is_tcp_on,
            "is_udp_on": is_udp_on,
            "max_udp_segments": max_udp_segments,
        },
    )
    used = native.lib.tundp_coalesce(
        batch,
        native.ffi.new("uint8_t[]", native.lib.TUNDP_COALESCE_SCRATCH),
        native.ffi.from_buffer("uint8_t[]", out),
        len(out),
        misses,
    )
    written, at = [], 0
    while at < used:
        count, length = _RECORD.unpack_from(out, at)
        at += _RECORD.size
        header = vnet.parse(out[at : at + vnet.LEN])
        at += vnet.LEN
        written.append(Written(header, bytes(out[at : at + length]), count))
        at += length
    return written, list(misses)
