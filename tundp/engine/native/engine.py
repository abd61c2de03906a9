"""The only door to tundp._native. Above it nobody sees cdata.

`NativeEngine` runs a C loop on a thread of its own, GIL released, until its eventfd is
written. Python makes the FIBs, publishes each by one pointer, and frees it when the
worker has been seen with a newer one. Counters are copied out between two packets.

The C code is the twin of wire/, lease/fib.py and engine/reference.py: tests/twin
holds them equal, and `self_test` compares them on the machine at hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import logging
import mmap
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tundp.choices import Layout as Layout
from tundp.choices import Offload, SourceCheck
from tundp.engine.base import Counters, DirectionCounters
from tundp.errors import PlatformError, Unsupported
from tundp.lease.fib import Fib
from tundp.linux.offload import (
    SAFE_SEGMENTS,
    KernelOffloads,
    find_offloads,
    set_udp_gro,
)
from tundp.linux.tun import Tun, TunMode
from tundp.wire import checksum, ip, transport, vnet
from tundp.wire import segment as wire_segment
from tundp.wire.coalesce import Coalescer, Miss, Written
from tundp.wire.drop import DropReason
from tundp.wire.vnet import VnetHeader

_log = logging.getLogger(__name__)

ABI: Final = 4
UNLIMITED: Final = 0xFFFF
LEARNT_S: Final = 600.0
"""What a path or the TUN refused is tried again after ten minutes (RFC 1191 section 6.3)."""
_FORGET_S: Final = 60.0
RUNS: Final[Mapping[str, str]] = {
    "gso": "tundp_batch_run",
    "mmsg": "tundp_batch_run",
    "simple": "tundp_simple_run",
}
"""Each engine's name and its loop in the extension, fastest first."""
_HUGE: Final = 2 << 20
_HEADERS_MAX: Final = 120
"""IPv4 and TCP headers with all their options."""
_RECORD: Final = struct.Struct("=II")
_NEED_VNET_HEADER: Final = (
    Offload.TUN_TSO,
    Offload.TUN_USO,
    Offload.TCP_COALESCE,
    Offload.UDP_COALESCE,
)
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
    out = bytearray(len(packet) + most * _HEADERS_MAX)
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
        return DropReason(-1 - count)
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
    used = native.lib.tundp_coalesce(
        native.ffi.from_buffer("uint8_t[]", room),
        native.ffi.new("uint32_t[]", [len(packet) for packet in packets]),
        len(packets),
        is_tcp_on,
        is_udp_on,
        max_udp_segments,
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


@dataclass(frozen=True, slots=True)
class PathFacts:
    """What sending to a peer has taught: the largest inner packet, and if UDP_SEGMENT fails."""

    inner_mtu: int
    is_single: bool


_NOTHING: Final = PathFacts(UNLIMITED, is_single=False)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How a native engine shall work."""

    disabled: frozenset[Offload] = frozenset()
    """Offloads to do without."""
    cpus: tuple[int, ...] = ()
    """Each thread in turn is bound to one; none: the scheduler's choice."""
    spin_us: int = 0
    """Poll so long before sleeping, while that pays; 0 never."""
    layout: Layout = Layout.SHARED


class _Worker:
    """One thread, its C struct and the memory that points to."""

    def __init__(self, native: Any, run: Any, sock: socket.socket, queue: int) -> None:
        self._native = native
        self._run = run
        self._sock = sock  # keeps the descriptor open
        self.queue = queue
        self._memory: mmap.mmap | None = None
        self._thread: threading.Thread | None = None
        self.control_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.struct = native.ffi.new("struct tundp_worker *")
        native.lib.tundp_worker_init(self.struct)
        self.struct.udp_fd = sock.fileno()
        self.struct.control_fd = self.control_fd

    @property
    def is_running(self) -> bool:
        return self._thread is not None

    def allocate_batch(self) -> None:
        """Memory of its own, from the kernel: nobody else's data on its pages."""
        length = -(-self._native.lib.tundp_batch_len() // _HUGE) * _HUGE
        self._memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.struct.batch = self._native.ffi.cast(
            "struct tundp_batch *", self._native.ffi.from_buffer(self._memory)
        )

    def start(self, name: str, cpu: int | None, on_end: Callable[[int], object]) -> None:
        self.struct.stop = 0
        self.struct.name = name.encode()[: self._native.lib.TUNDP_NAME_LEN - 1]
        self._thread = threading.Thread(
            target=self._serve, args=(cpu, on_end), name=name, daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Waits for the thread, which ends after at most a burst of packets."""
        if self._thread is not None:
            self._native.lib.tundp_worker_stop(self.struct)
            self._thread.join()
            self._thread = None

    def beat(self) -> int:
        return int(self._native.lib.tundp_worker_beat(self.struct))

    def rebound(self, address: IPv4Address) -> None:
        """The descriptor leads to a new socket, whose overflows the kernel counts from zero."""
        self.struct.address = int(address)
        self.struct.overflows_before = self.struct.counters.socket_overflows

    def close(self) -> None:
        self.stop()
        os.close(self.control_fd)
        self.struct.control_fd = -1

    def _serve(self, cpu: int | None, on_end: Callable[[int], object]) -> None:
        if cpu is not None:
            try:
                os.sched_setaffinity(0, {cpu})
            except OSError as error:
                # Taken away since the flag was checked: better anywhere than nowhere.
                _log.warning("cannot stay on CPU %d: %s", cpu, error.strerror)
        code = self._run(self.struct)
        if code:
            on_end(-code)


class NativeEngine:
    """See the module; see Dataplane for the contract. `name` picks the C loop from RUNS.

    One worker per socket and direction set; worker k of the TUN's queue k. With several
    sockets each peer's datagrams stay with one of them (SO_REUSEPORT), and the kernel
    keeps a flow on the queue that last wrote it: order holds within every flow.
    """

    def __init__(
        self,
        name: str,
        socks: Sequence[socket.socket],
        *,
        tunnel_address: IPv4Address,
        fib: Fib,
        source_check: SourceCheck,
        loop: asyncio.AbstractEventLoop,
        settings: EngineSettings | None = None,
        kernel: KernelOffloads | None = None,
    ) -> None:
        """kernel: what find_offloads said, if it was asked already."""
        native = require()
        self.name = name
        self._ffi = native.ffi
        self._lib = native.lib
        self._loop = loop
        self._settings = settings or EngineSettings()
        self._socks = tuple(socks)
        self._tun_lost = asyncio.Event()
        self._notify_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._kernel = kernel if name == "gso" else None
        if name == "gso" and kernel is None:
            self._kernel = find_offloads(self._settings.disabled)
        self._workers = self._make_workers(native)
        for worker in self._workers:
            worker.struct.notify_fd = self._notify_fd
            worker.struct.address = int(self._address())
            worker.struct.rules.tunnel_address = int(tunnel_address)
            worker.struct.rules.source_check = _SOURCE_CHECKS[source_check]
            worker.struct.spin_ns = self._settings.spin_us * 1000
        for sock in self._socks:
            set_udp_gro(sock, is_on=self._uses(Offload.UDP_GRO))
        self._fibs: list[NativeFib] = []
        self._learnt: dict[int, tuple[PathFacts, float]] = {}
        self._lost = 0
        self._lost_at = 0.0
        self._forget_timer = loop.call_later(_FORGET_S, self._forget)
        loop.add_reader(self._notify_fd, self._on_notify)
        self.install(fib)

    @property
    def tun_mode(self) -> TunMode:
        """See Dataplane."""
        return TunMode(
            has_vnet_header=any(self._uses(offload) for offload in _NEED_VNET_HEADER),
            wants_tso=self._uses(Offload.TUN_TSO),
            wants_uso=self._uses(Offload.TUN_USO),
            queues=len(self._socks),
        )

    def attach(self, tun: Tun) -> None:
        """See Dataplane."""
        self.detach()
        self._tun_lost.clear()
        cpus = self._settings.cpus
        for number, worker in enumerate(self._workers):
            worker.struct.tun_fd = tun.fds[worker.queue]
            worker.struct.offloads = self._offload_bits(tun)
            if self._kernel is not None:
                worker.struct.max_segments = self._kernel.max_segments
                worker.struct.max_udp_segments = max(self._kernel.max_segments, SAFE_SEGMENTS)
            worker.start(
                f"tundp-{self.name}-{number}",
                cpus[number % len(cpus)] if cpus else None,
                lambda code: self._loop.call_soon_threadsafe(self._on_end, tun.name, code),
            )

    def detach(self) -> None:
        """See Dataplane."""
        for worker in self._workers:
            worker.stop()

    def install(self, fib: Fib) -> None:
        """See Dataplane. FIBs every worker has left behind are freed here."""
        self._remember()
        native_fib = NativeFib(
            fib, {address: facts for address, (facts, _) in self._learnt.items()}
        )
        for worker in self._workers:
            self._lib.tundp_worker_install(worker.struct, native_fib.struct)
        # Without a thread nobody holds an old one, and nobody would ever be seen with a new.
        running = [worker for worker in self._workers if worker.is_running]
        seen = min(
            (self._lib.tundp_worker_seen(worker.struct) for worker in running),
            default=fib.generation,
        )
        self._fibs = [kept for kept in self._fibs if kept.fib.generation >= seen]
        self._fibs.append(native_fib)

    def rebound(self) -> None:
        """See Dataplane. Threads keep nothing of a socket: each run makes its own epoll set."""
        for sock in self._socks:
            set_udp_gro(sock, is_on=self._uses(Offload.UDP_GRO))
        for worker in self._workers:
            worker.rebound(self._address())
        self._learnt.clear()
        for native_fib in self._fibs:
            native_fib.forget_all()

    async def tun_lost(self) -> None:
        """See Dataplane."""
        await self._tun_lost.wait()

    def counters(self) -> Counters:
        """See Dataplane."""
        total = Counters()
        counted = self._ffi.new("struct tundp_counters *")
        for worker in self._workers:
            self._lib.tundp_worker_counters(worker.struct, counted)
            _add_counters(total, counted)
        return total

    def describe(self) -> str:
        """See Dataplane."""
        if self._kernel is None:
            return "one packet at a time" if self.name == "simple" else "batches, no offloads"
        used = [o.value for o in Offload if o in self._kernel.offloads]
        text = f"{', '.join(used) or 'no offloads'}; sums {sums_variants()[0]}"
        if self._uses(Offload.UDP_SEGMENT):
            text += f"; up to {self._kernel.max_segments} datagrams a send"
        for why in dict.fromkeys(self._kernel.missing.values()):
            names = [o.value for o in Offload if self._kernel.missing.get(o) == why]
            text += f"; without {', '.join(names)}: {why}"
        return text

    def pulse(self) -> tuple[int, ...]:
        """See Dataplane."""
        return tuple(worker.beat() for worker in self._workers if worker.is_running)

    def stop(self) -> None:
        """See Dataplane."""
        self._forget_timer.cancel()
        self._loop.remove_reader(self._notify_fd)
        for worker in self._workers:
            worker.close()
        os.close(self._notify_fd)

    def _make_workers(self, native: Any) -> tuple[_Worker, ...]:
        run = getattr(native.lib, RUNS[self.name])
        both = native.lib.TUNDP_ENCAP | native.lib.TUNDP_DECAP
        directions = [both]
        if self.name != "simple" and self._settings.layout is Layout.SPLIT:
            directions = [native.lib.TUNDP_ENCAP, native.lib.TUNDP_DECAP]
        workers = []
        for queue, sock in enumerate(self._socks):
            for direction in directions:
                worker = _Worker(native, run, sock, queue)
                worker.struct.directions = direction
                if self.name != "simple":
                    worker.allocate_batch()
                workers.append(worker)
        return tuple(workers)

    def _address(self) -> IPv4Address:
        return IPv4Address(self._socks[0].getsockname()[0])

    def _uses(self, offload: Offload) -> bool:
        return self._kernel is not None and offload in self._kernel.offloads

    def _offload_bits(self, tun: Tun) -> int:
        lib = self._lib
        if self._kernel is None:
            return 0
        is_granted = {
            lib.TUNDP_OFFLOAD_VNET_HEADER: tun.has_vnet_header,
            lib.TUNDP_OFFLOAD_UDP_SEGMENT: self._uses(Offload.UDP_SEGMENT),
            lib.TUNDP_OFFLOAD_UDP_GRO: self._uses(Offload.UDP_GRO),
            lib.TUNDP_OFFLOAD_TCP_COALESCE: self._uses(Offload.TCP_COALESCE),
            lib.TUNDP_OFFLOAD_UDP_COALESCE: self._uses(Offload.UDP_COALESCE) and tun.knows_uso,
        }
        return sum(bit for bit, is_there in is_granted.items() if is_there)

    def _on_notify(self) -> None:
        os.eventfd_read(self._notify_fd)
        self._remember()
        lost = 0
        for worker in self._workers:
            lost |= self._lib.tundp_worker_lost(worker.struct)
        for offload, bit in (
            (Offload.TCP_COALESCE, self._lib.TUNDP_OFFLOAD_TCP_COALESCE),
            (Offload.UDP_COALESCE, self._lib.TUNDP_OFFLOAD_UDP_COALESCE),
        ):
            if lost & ~self._lost & bit:
                _log.warning(
                    "the TUN refused a super-packet (EINVAL): %s is off for %.0f minutes;"
                    " nothing was lost, its packets were written one by one",
                    offload.value,
                    LEARNT_S / 60,
                )
                self._lost_at = self._loop.time()
        self._lost = lost

    def _remember(self) -> None:
        """Take up what workers have learnt of paths, and say it once."""
        if not self._fibs:
            return
        expires_at = self._loop.time() + LEARNT_S
        for address, facts in self._fibs[-1].learnt().items():
            before = self._learnt[address][0] if address in self._learnt else _NOTHING
            if facts.inner_mtu != before.inner_mtu:
                _log.info(
                    "path to %s: inner packets up to %d", IPv4Address(address), facts.inner_mtu
                )
            if facts.is_single and not before.is_single:
                _log.warning(
                    "the path to %s takes no UDP_SEGMENT: datagrams go one by one for %.0f"
                    " minutes; nothing was lost, the refused ones were sent again",
                    IPv4Address(address),
                    LEARNT_S / 60,
                )
            if facts != before:
                self._learnt[address] = (facts, expires_at)

    def _forget(self) -> None:
        """Try again at full size, and with every offload, what was learnt long ago."""
        self._forget_timer = self._loop.call_later(_FORGET_S, self._forget)
        self._remember()
        now = self._loop.time()
        for address, (_, expires_at) in list(self._learnt.items()):
            if now >= expires_at:
                del self._learnt[address]
                self._fibs[-1].forget(address)
        if self._lost and now >= self._lost_at + LEARNT_S:
            self._lost = 0
            for worker in self._workers:
                self._lib.tundp_worker_restore(worker.struct)

    def _on_end(self, tun_name: str, code: int) -> None:
        if self._tun_lost.is_set():
            return  # another worker's news
        if code == errno.EBADFD:
            _log.warning("TUN device %s is gone", tun_name)
        else:
            _log.error("engine %s ended: %s; starting again", self.name, os.strerror(code))
        self.detach()
        self._tun_lost.set()


_SHARED_COUNTERS: Final = (
    "fragments_out",
    "icmp_to_tun",
    "icmp_to_peers",
    "icmp_rate_limited",
    "icmp_undeliverable",
    "source_mismatches",
    "destination_mismatches",
    "socket_overflows",
    "send_waits",
    "syscalls",
    "wakeups",
    "spins",
    "spin_hits",
    "offload_fallbacks",
)
_DIRECTION_COUNTERS: Final = tuple(
    field.name for field in dataclasses.fields(DirectionCounters) if field.name != "drops"
)


def _add_counters(total: Counters, counted: Any) -> None:
    for name in _SHARED_COUNTERS:
        setattr(total, name, getattr(total, name) + getattr(counted, name))
    for direction, source in ((total.encap, counted.encap), (total.decap, counted.decap)):
        for name in _DIRECTION_COUNTERS:
            setattr(direction, name, getattr(direction, name) + getattr(source, name))
        for reason in DropReason:
            direction.drops[reason] += source.drops[reason]
    for miss in Miss:
        total.coalesce_misses[miss] += counted.coalesce_misses[miss]
    for number, count in enumerate(counted.errnos):
        if count:
            name = errno.errorcode.get(number, "other")
            total.errnos[name] = total.errnos.get(name, 0) + count


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
