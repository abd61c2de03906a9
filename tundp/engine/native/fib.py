"""A Fib as C reads it: the same memory, borrowed; and a policy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tundp.choices import SourceCheck
from tundp.engine.native.library import require
from tundp.errors import PlatformError
from tundp.lease.fib import Fib
from tundp.wire.policy import NO_ECHO_ID, Policy


class NativeFib:
    """A Fib read by C in the very memory Python built it in; keeps that memory alive.

    paths: path state by hop id, an array of `struct tundp_path`; none: nothing is known.
    ways: address and port (host order) that datagrams of single hops are sent to, by hop id.
    publication: grows with each one a worker is given; several may be of one FIB.
    """

    def __init__(
        self,
        fib: Fib,
        paths: npt.NDArray[np.void] | None = None,
        ways: Mapping[int, tuple[int, int]] | None = None,
        publication: int = 0,
    ) -> None:
        native = require()
        self.fib = fib
        self.publication = publication
        self._ffi = native.ffi
        self._lib = native.lib
        if paths is None:
            size = native.ffi.sizeof("struct tundp_path")
            paths = np.zeros(len(fib.hop_array), np.dtype((np.void, size)))
        way_array = fib.hop_array
        if ways:
            way_array = fib.hop_array.copy()
            for hop_id, (address, port) in ways.items():
                way_array[hop_id] = (address, port, 0)
        self._arrays = {
            "table": native.ffi.from_buffer("uint32_t[]", fib.table),
            "hops": native.ffi.from_buffer("struct tundp_hop[]", fib.hop_array),
            "ways": native.ffi.from_buffer("struct tundp_hop[]", way_array),
            "paths": native.ffi.from_buffer("struct tundp_path[]", paths),
            "peers": native.ffi.from_buffer("uint32_t[]", fib.peer_array),
            "peer_hops": native.ffi.from_buffer("uint32_t[]", fib.peer_hops),
            "own": _ascending(native.ffi, fib.own_addresses),
            "broadcasts": _ascending(native.ffi, fib.broadcasts),
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
        self.struct.broadcast_count = len(fib.broadcasts)
        self.struct.generation = publication << 32 | fib.generation & 0xFFFFFFFF
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


def fib_sections(fib: Fib) -> tuple[bytes, dict[str, npt.NDArray[np.uint8]]]:
    """A FIB for an image: its struct without a pointer, and its arrays as bytes, by member."""
    native_fib = NativeFib(fib)
    struct = native_fib.struct
    arrays = {
        "table": fib.table,
        "hops": fib.hop_array,
        "peers": fib.peer_array,
        "peer_hops": fib.peer_hops,
        "own": np.array(sorted(fib.own_addresses), np.uint32),
        "broadcasts": np.array(sorted(fib.broadcasts), np.uint32),
    }
    ffi = require().ffi
    for name in (*arrays, "ways", "paths"):
        setattr(struct, name, ffi.NULL)
    return bytes(ffi.buffer(struct)), {
        name: np.ascontiguousarray(array).view(np.uint8) for name, array in arrays.items()
    }


def policy_values(policy: Policy) -> dict[str, Any]:
    """A policy as fields of struct tundp_policy."""
    return {
        "tun_address": policy.tun_address,
        "source_check": list(SourceCheck).index(policy.source_check),
        "port": policy.port,
        "admitted_count": len(policy.admitted),
        "echo_id": NO_ECHO_ID if policy.echo_id is None else policy.echo_id,
        "admitted": [each._asdict() for each in policy.admitted],
    }


def _ascending(ffi: Any, addresses: frozenset[int]) -> Any:
    return ffi.from_buffer("uint32_t[]", np.array(sorted(addresses), np.uint32))
