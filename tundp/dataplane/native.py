"""The only door to tundp._native. Above it nobody sees cdata.

No packet passes here yet: the C engines arrive on top of this build. What is here is
held to its Python twin by tests/twin and by `self_test`, which `tundp demo` runs.
"""

from __future__ import annotations

import os
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tundp.errors import PlatformError, Unsupported
from tundp.lease.fib import Fib
from tundp.wire import checksum

ABI: Final = 1

try:
    from tundp import _native
except ImportError as error:
    _native = None  # type: ignore[assignment]
    _missing = str(error)


def require() -> Any:
    """The extension module, or Unsupported with the way to build it."""
    if _native is None:
        raise Unsupported(f"the native module is not built ({_missing}): run make build")
    if _native.lib.TUNDP_ABI != ABI:
        raise Unsupported(
            f"the native module has ABI {_native.lib.TUNDP_ABI}, this Python code {ABI}:"
            " run make build"
        )
    return _native


def ones_complement_sum(data: bytes | bytearray | memoryview) -> int:
    """As wire.checksum.ones_complement_sum. `data` must be contiguous; it is only borrowed."""
    native = require()
    return int(native.lib.tundp_sum(native.ffi.from_buffer("uint8_t[]", data), len(data)))


def after_ttl_decrement(header_checksum: int) -> int:
    """As wire.checksum.after_ttl_decrement."""
    return int(require().lib.tundp_checksum_after_ttl_decrement(header_checksum))


class NativeFib:
    """A Fib read by C in the very memory Python built it in; keeps that memory alive."""

    def __init__(self, fib: Fib) -> None:
        native = require()
        self._ffi = native.ffi
        self._lib = native.lib
        self._fib = fib
        self._table = native.ffi.from_buffer("uint32_t[]", fib.table)
        self._struct = native.ffi.new("struct tundp_fib *")
        self._struct.base = fib.base
        self._struct.base_len = fib.base_len
        self._struct.level_count = len(fib.strides)
        self._struct.stride = list(fib.strides)
        self._struct.table = self._table
        self._struct.table_count = len(fib.table)
        code = self._lib.tundp_fib_check(self._struct)
        if code:
            raise PlatformError(
                f"FIB generation {fib.generation} is not what C expects: {os.strerror(-code)}",
                -code,
            )

    def indexes(self, addresses: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        """Fib.index of each address (host order, contiguous)."""
        found = np.empty(len(addresses), np.uint32)
        self._lib.tundp_fib_lookup(
            self._struct,
            self._ffi.from_buffer("uint32_t[]", addresses),
            len(addresses),
            self._ffi.from_buffer("uint32_t[]", found, require_writable=True),
        )
        return found


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
    addresses = np.arange(0, 1 << 32, 65521, dtype=np.uint32)
    for address, index in zip(addresses, NativeFib(fib).indexes(addresses), strict=True):
        _expect_equal(f"route of {int(address):#010x}", int(index), fib.index(int(address)))
        compared += 1
    return compared


def _expect_equal(what: str, native: int, reference: int) -> None:
    if native != reference:
        raise PlatformError(f"native and reference disagree on the {what}: {native}, {reference}")
