"""The only door to tundp._native. Above it nobody sees cdata.

`NativeEngine` runs a C loop on a thread of its own, GIL released, until its eventfd is
written. Python makes the FIBs, publishes each by one pointer, and frees it when the
worker has been seen with a newer one. Counters are copied out between two packets.

The C code is the twin of wire/, lease/fib.py and dataplane/reference.py: tests/twin
holds them equal, and `self_test` compares them on the machine at hand.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import threading
from collections.abc import Mapping
from ipaddress import IPv4Address
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tundp.dataplane.base import Counters, DirectionCounters
from tundp.errors import PlatformError, Unsupported
from tundp.lease.fib import Fib
from tundp.linux.tun import Tun
from tundp.wire import checksum
from tundp.wire.drop import DropReason
from tundp.wire.encap import SourceCheck

_log = logging.getLogger(__name__)

ABI: Final = 2
UNLIMITED: Final = 0xFFFF
PATH_MTU_S: Final = 600.0
"""A learnt path MTU is forgotten after ten minutes (RFC 1191 section 6.3)."""
_FORGET_S: Final = 60.0
RUNS: Final[Mapping[str, str]] = {"simple": "tundp_simple_run"}
"""Each engine's name and its loop in the extension."""
_SOURCE_CHECKS: Final = {SourceCheck.OFF: 0, SourceCheck.COUNT: 1, SourceCheck.ENFORCE: 2}

try:
    from tundp import _native
except ImportError as import_error:
    _native = None  # type: ignore[assignment]
    _missing = str(import_error)


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

    def __init__(self, fib: Fib, path_mtus: Mapping[int, int] | None = None) -> None:
        """path_mtus: peer address (host order) to the largest inner packet its path carries."""
        native = require()
        self.fib = fib
        self._ffi = native.ffi
        self._lib = native.lib
        self.inner_mtu = np.full(len(fib.hops), UNLIMITED, np.uint16)
        if path_mtus:
            for index, hop in enumerate(fib.hops):
                if hop is not None:
                    self.inner_mtu[index] = path_mtus.get(hop.address, UNLIMITED)
        self._arrays = {
            "table": native.ffi.from_buffer("uint32_t[]", fib.table),
            "hops": native.ffi.from_buffer("struct tundp_hop[]", fib.hop_array),
            "inner_mtu": native.ffi.from_buffer("uint16_t[]", self.inner_mtu),
            "peers": _ascending(native.ffi, fib.peer_addresses),
            "own": _ascending(native.ffi, fib.own_addresses),
        }
        self.struct = native.ffi.new("struct tundp_fib *", self._arrays)
        self.struct.base = fib.base
        self.struct.base_len = fib.base_len
        self.struct.level_count = len(fib.strides)
        self.struct.stride = list(fib.strides)
        self.struct.table_count = len(fib.table)
        self.struct.hop_count = len(fib.hops)
        self.struct.peer_count = len(fib.peer_addresses)
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

    def learnt(self) -> dict[int, int]:
        """Path MTUs the worker has learnt: peer address to inner bytes."""
        return {
            hop.address: int(self.inner_mtu[index])
            for index, hop in enumerate(self.fib.hops)
            if hop is not None and self.inner_mtu[index] != UNLIMITED
        }


def _ascending(ffi: Any, addresses: frozenset[int]) -> Any:
    return ffi.from_buffer("uint32_t[]", np.array(sorted(addresses), np.uint32))


class NativeEngine:
    """See the module; see Dataplane for the contract. `name` picks the C loop from RUNS."""

    def __init__(
        self,
        name: str,
        sock: socket.socket,
        *,
        tunnel_address: IPv4Address,
        fib: Fib,
        source_check: SourceCheck,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        native = require()
        self.name = name
        self._ffi = native.ffi
        self._lib = native.lib
        self._run = getattr(native.lib, RUNS[name])
        self._loop = loop
        self._thread: threading.Thread | None = None
        self._tun_lost = asyncio.Event()
        self._control_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._worker = native.ffi.new("struct tundp_worker *")
        self._lib.tundp_worker_init(self._worker)
        self._worker.udp_fd = sock.fileno()
        self._worker.control_fd = self._control_fd
        self._worker.address = int(IPv4Address(sock.getsockname()[0]))
        self._worker.rules.tunnel_address = int(tunnel_address)
        self._worker.rules.source_check = _SOURCE_CHECKS[source_check]
        self._fibs: list[NativeFib] = []
        self._path_mtus: dict[int, tuple[int, float]] = {}
        self._forget_timer = loop.call_later(_FORGET_S, self._forget_path_mtus)
        self.install(fib)

    def attach(self, tun: Tun) -> None:
        """See Dataplane."""
        self.detach()
        self._tun_lost.clear()
        self._worker.tun_fd = tun.fd
        self._worker.stop = 0
        self._thread = threading.Thread(
            target=self._serve, args=(tun.name,), name=f"dataplane-{self.name}", daemon=True
        )
        self._thread.start()

    def detach(self) -> None:
        """See Dataplane. Waits for the thread, which ends after at most a burst of packets."""
        if self._thread is not None:
            self._lib.tundp_worker_stop(self._worker)
            self._thread.join()
            self._thread = None

    def install(self, fib: Fib) -> None:
        """See Dataplane. FIBs the worker has left behind are freed here."""
        self._remember_path_mtus()
        native_fib = NativeFib(fib, {address: mtu for address, (mtu, _) in self._path_mtus.items()})
        self._lib.tundp_worker_install(self._worker, native_fib.struct)
        seen = self._lib.tundp_worker_seen(self._worker)
        # Without a thread nobody holds an old one, and nobody would ever be seen with a new.
        held = self._fibs if self._thread is not None else []
        self._fibs = [kept for kept in held if kept.fib.generation >= seen]
        self._fibs.append(native_fib)

    async def tun_lost(self) -> None:
        """See Dataplane."""
        await self._tun_lost.wait()

    def counters(self) -> Counters:
        """See Dataplane."""
        counted = self._ffi.new("struct tundp_counters *")
        self._lib.tundp_worker_counters(self._worker, counted)
        return Counters(
            encap=_direction(counted.encap),
            decap=_direction(counted.decap),
            **{name: int(getattr(counted, name)) for name in _SHARED_COUNTERS},
        )

    def _forget_path_mtus(self) -> None:
        """Let paths be tried at full size again once what was learnt of them is old."""
        self._forget_timer = self._loop.call_later(_FORGET_S, self._forget_path_mtus)
        self._remember_path_mtus()
        now = self._loop.time()
        for address, (_, expires_at) in list(self._path_mtus.items()):
            if now >= expires_at:
                del self._path_mtus[address]
                fib = self._fibs[-1]
                for index, hop in enumerate(fib.fib.hops):
                    if hop is not None and hop.address == address:
                        fib.inner_mtu[index] = UNLIMITED

    def stop(self) -> None:
        """See Dataplane."""
        self._forget_timer.cancel()
        self.detach()
        os.close(self._control_fd)

    def _serve(self, tun_name: str) -> None:
        code = self._run(self._worker)
        if code:
            self._loop.call_soon_threadsafe(self._on_end, tun_name, -code)

    def _on_end(self, tun_name: str, code: int) -> None:
        if code == errno.EBADFD:
            _log.warning("TUN device %s is gone", tun_name)
        else:
            _log.error("engine %s ended: %s; starting again", self.name, os.strerror(code))
        self.detach()
        self._tun_lost.set()

    def _remember_path_mtus(self) -> None:
        if not self._fibs:
            return
        expires_at = self._loop.time() + PATH_MTU_S
        for address, mtu in self._fibs[-1].learnt().items():
            if self._path_mtus.get(address, (None, 0))[0] != mtu:
                _log.info("path to %s: inner packets up to %d", IPv4Address(address), mtu)
                self._path_mtus[address] = (mtu, expires_at)


_SHARED_COUNTERS: Final = (
    "fragments_out",
    "icmp_to_tun",
    "icmp_to_peers",
    "icmp_rate_limited",
    "icmp_undeliverable",
    "source_mismatches",
    "socket_overflows",
    "send_waits",
    "syscalls",
    "wakeups",
)


def _direction(counted: Any) -> DirectionCounters:
    return DirectionCounters(
        packets_in=counted.packets_in,
        bytes_in=counted.bytes_in,
        packets_out=counted.packets_out,
        bytes_out=counted.bytes_out,
        drops=[counted.drops[reason] for reason in DropReason],
    )


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
