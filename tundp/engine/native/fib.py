"""A Fib as C reads it: the same memory, borrowed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tundp.engine.native.library import require
from tundp.errors import PlatformError
from tundp.lease.fib import Fib

UNLIMITED: Final = 0xFFFF


@dataclass(frozen=True, slots=True)
class PathFacts:
    """What sending to a peer has taught: the largest inner packet, and if UDP_SEGMENT fails."""

    inner_mtu: int
    is_single: bool


NOTHING: Final = PathFacts(UNLIMITED, is_single=False)


class NativeFib:
    """A Fib read by C in the very memory Python built it in; keeps that memory alive."""

    def __init__(self, fib: Fib, learnt: Mapping[int, PathFacts] | None = None) -> None:
        """learnt: peer address (host order) to what is known of the path to it."""
        native = require()
        self.fib = fib
        self._ffi = native.ffi
        self._lib = native.lib
        self.inner_mtu = np.full(len(fib.hop_array), UNLIMITED, np.uint16)
        self.single = np.zeros(len(fib.hop_array), np.uint8)
        for address, facts in (learnt or {}).items():
            for index in self._indexes_of(address):
                self.inner_mtu[index] = facts.inner_mtu
                self.single[index] = facts.is_single
        self._arrays = {
            "table": native.ffi.from_buffer("uint32_t[]", fib.table),
            "hops": native.ffi.from_buffer("struct tundp_hop[]", fib.hop_array),
            "inner_mtu": native.ffi.from_buffer("uint16_t[]", self.inner_mtu),
            "single": native.ffi.from_buffer("uint8_t[]", self.single),
            "peers": native.ffi.from_buffer("uint32_t[]", fib.peer_array),
            "own": _ascending(native.ffi, fib.own_addresses),
        }
        self.struct = native.ffi.new("struct tundp_fib *", self._arrays)
        self.struct.base = fib.base
        self.struct.base_len = fib.base_len
        self.struct.level_count = len(fib.strides)
        self.struct.stride = list(fib.strides)
        self.struct.table_count = len(fib.table)
        self.struct.hop_count = len(fib.hop_array)
        self.struct.peer_count = len(fib.peer_array)
        self.struct.own_count = len(fib.own_addresses)
        self.struct.generation = fib.generation
        code = self._lib.tundp_fib_check(self.struct)
        if code:
            raise PlatformError(
                f"FIB generation {fib.generation} is not what C expects: {os.strerror(-code)}",
                -code,
            )

    def indexes(self, addresses: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        """Fib.index of each address (host order, contiguous)."""
        found = np.empty(len(addresses), np.uint32)
        self._lib.tundp_fib_lookup(
            self.struct,
            self._ffi.from_buffer("uint32_t[]", addresses),
            len(addresses),
            self._ffi.from_buffer("uint32_t[]", found, require_writable=True),
        )
        return found

    def learnt(self) -> dict[int, PathFacts]:
        """What workers have learnt of paths, by peer address."""
        # A few among thousands, asked for at every change of routes: no loop over all.
        known = np.flatnonzero((self.inner_mtu != UNLIMITED) | (self.single != 0))
        return {
            int(self.fib.hop_array["address"][index]): PathFacts(
                int(self.inner_mtu[index]), bool(self.single[index])
            )
            for index in known
        }

    def forget(self, address: int) -> None:
        """Let the path to a peer be tried again as if nothing were known."""
        for index in self._indexes_of(address):
            self.inner_mtu[index] = UNLIMITED
            self.single[index] = 0

    def forget_all(self) -> None:
        """Let every path be tried again."""
        self.inner_mtu[:] = UNLIMITED
        self.single[:] = 0

    def _indexes_of(self, address: int) -> npt.NDArray[np.intp]:
        return np.flatnonzero(self.fib.hop_array["address"] == address)


def _ascending(ffi: Any, addresses: frozenset[int]) -> Any:
    return ffi.from_buffer("uint32_t[]", np.array(sorted(addresses), np.uint32))
