"""C against Python: same sums, same TTL patch, same routes. A missing build fails, not skips."""

from __future__ import annotations

import random
from ipaddress import IPv4Address, IPv4Network

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.routes import fib_of
from tundp.engine.native import twins
from tundp.engine.native.fib import NativeFib
from tundp.engine.native.self_test import self_test
from tundp.errors import PlatformError
from tundp.wire import checksum


@pytest.mark.parametrize("offset", range(8))
def test_sum_of_every_length_at_every_alignment(offset: int) -> None:
    noise = random.Random(offset).randbytes(1600)
    for length in (*range(130), 1447, 1448, 1449, 1472, 1500):
        data = memoryview(noise)[offset : offset + length]
        assert twins.ones_complement_sum(data) == checksum.ones_complement_sum(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(64),
        b"\xff" * 64,
        b"\xff" * 65535,
        b"\x00\x01",
        b"\x01",
        b"\x80",
        b"\xff\xff\x00\x01",
        b"\xff\xfe\x00\x01",
    ],
    ids=lambda data: f"{len(data)}:{data[:2].hex()}",
)
def test_sum_at_the_edges(data: bytes) -> None:
    assert twins.ones_complement_sum(data) == checksum.ones_complement_sum(data)


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_sum_of_anything(data: bytes) -> None:
    assert twins.ones_complement_sum(data) == checksum.ones_complement_sum(data)


def test_ttl_patch_of_every_checksum() -> None:
    for value in range(0x10000):
        assert twins.after_ttl_decrement(value) == checksum.after_ttl_decrement(value)


subnets = st.builds(
    lambda address, length: IPv4Network((address >> (32 - length) << (32 - length), length)),
    st.integers(0x0A000000, 0x0AFFFFFF) | st.integers(0, 2**32 - 1),
    st.integers(1, 31),
)


@given(st.lists(subnets, max_size=30, unique=True), st.booleans(), st.randoms())
@settings(max_examples=200, deadline=None)
def test_routes_of_any_table(
    networks: list[IPv4Network], has_own: bool, rng: random.Random
) -> None:
    own = IPv4Network("10.5.3.0/24") if has_own else None
    routes = [(net, IPv4Address(0xC0000201 + n % 7)) for n, net in enumerate(networks)]
    fib = fib_of(*(route for route in routes if route[0] != own), own=own)
    edges = [
        edge
        for network in [*networks, IPv4Network("10.5.3.0/24")]
        for end in (int(network.network_address), int(network.broadcast_address))
        for edge in (end - 1, end, end + 1)
        if 0 <= edge < 2**32
    ]
    addresses = np.array([*edges, *(rng.getrandbits(32) for _ in range(50))], np.uint32)
    expected = [fib.index(int(address)) for address in addresses]
    assert NativeFib(fib).indexes(addresses).tolist() == expected


def test_c_reads_the_memory_python_built() -> None:
    fib = fib_of(("10.5.2.0/24", "192.0.2.2"))
    reader = NativeFib(fib)
    address = int(reader._ffi.cast("uintptr_t", reader.struct.table))
    assert address == fib.table.ctypes.data


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hop_count", 3),  # the table names hops 2 and 3
        ("table_count", 255),  # one slot short
        ("level_count", 0),
        ("level_count", 4),
        ("base_len", 30),  # 30 + 8 bits is more than an address has
    ],
)
def test_a_table_that_would_be_read_outside_is_refused(field: str, value: int) -> None:
    fib = fib_of(("10.5.0.0/24", "192.0.2.2"), ("10.5.255.0/24", "192.0.2.3"))
    reader = NativeFib(fib)
    assert reader._lib.tundp_fib_check(reader.struct) == 0
    setattr(reader.struct, field, value)
    assert reader._lib.tundp_fib_check(reader.struct) != 0


@pytest.mark.parametrize("target", [0, 5, 1 << 20])
def test_a_chunk_that_points_backwards_or_outside_is_refused(target: int) -> None:
    fib = fib_of(("10.0.0.0/9", "192.0.2.2"), ("10.200.7.16/28", "192.0.2.3"))
    table = fib.table.copy()
    chunk_slots = np.flatnonzero(table & 0x80000000)
    assert len(chunk_slots)
    table[chunk_slots[0]] = 0x80000000 | target
    fib.table = table
    with pytest.raises(PlatformError, match="generation 1"):
        NativeFib(fib)


def test_self_test_notices_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    fib = fib_of()
    assert self_test(fib) > 65536
    monkeypatch.setattr(checksum, "after_ttl_decrement", lambda value: value)
    with pytest.raises(PlatformError, match="disagree"):
        self_test(fib)
