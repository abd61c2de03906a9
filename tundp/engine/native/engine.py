"""The C engines `gso`, `mmsg` and `simple`: loops on threads of their own, the GIL released.

`NativeEngine` runs a C loop on a thread of its own, GIL released, until its eventfd is
written. Python makes the FIBs, publishes each by one pointer, and frees it when the
worker has been seen with a newer one. Counters are copied out between two packets.

The C code is the twin of wire/, lease/fib.py and engine/reference.py: tests/twin
holds them equal, and `self_test` compares them on the machine at hand.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any, Final

from tundp.choices import Layout, Offload, SourceCheck
from tundp.engine.counters import COUNTERS, DIRECTION_COUNTERS, Counters
from tundp.engine.native.fib import NOTHING, NativeFib, PathFacts
from tundp.engine.native.library import require
from tundp.engine.native.twins import sums_variants
from tundp.engine.native.worker import Worker
from tundp.lease.fib import Fib
from tundp.linux.offload import SAFE_SEGMENTS, KernelOffloads, find_offloads, set_udp_gro
from tundp.linux.tun import Tun, TunMode
from tundp.wire.coalesce import Miss
from tundp.wire.drop import DropReason

_log = logging.getLogger(__name__)

LEARNT_S: Final = 600.0
"""What a path or the TUN refused is tried again after ten minutes (RFC 1191 section 6.3)."""
_FORGET_S: Final = 60.0
RUNS: Final[Mapping[str, str]] = {
    "gso": "tundp_batch_run",
    "mmsg": "tundp_batch_run",
    "simple": "tundp_simple_run",
}
"""Each engine's name and its loop in the extension, fastest first."""
_NEED_VNET_HEADER: Final = (
    Offload.TUN_TSO,
    Offload.TUN_USO,
    Offload.TCP_COALESCE,
    Offload.UDP_COALESCE,
)
_SOURCE_CHECKS: Final = {SourceCheck.OFF: 0, SourceCheck.COUNT: 1, SourceCheck.ENFORCE: 2}


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

    def _make_workers(self, native: Any) -> tuple[Worker, ...]:
        run = getattr(native.lib, RUNS[self.name])
        both = native.lib.TUNDP_ENCAP | native.lib.TUNDP_DECAP
        directions = [both]
        if self.name != "simple" and self._settings.layout is Layout.SPLIT:
            directions = [native.lib.TUNDP_ENCAP, native.lib.TUNDP_DECAP]
        workers = []
        for queue, sock in enumerate(self._socks):
            for direction in directions:
                worker = Worker(native, run, sock, queue)
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
            before = self._learnt[address][0] if address in self._learnt else NOTHING
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


def _add_counters(total: Counters, counted: Any) -> None:
    for spec in COUNTERS:
        setattr(total, spec.name, getattr(total, spec.name) + getattr(counted, spec.name))
    for direction, source in ((total.encap, counted.encap), (total.decap, counted.decap)):
        for spec in DIRECTION_COUNTERS:
            value = getattr(direction, spec.name) + getattr(source, spec.name)
            setattr(direction, spec.name, value)
        for reason in DropReason:
            direction.drops[reason] += source.drops[reason]
    for miss in Miss:
        total.coalesce_misses[miss] += counted.coalesce_misses[miss]
    for number, count in enumerate(counted.errnos):
        if count:
            name = errno.errorcode.get(number, "other")
            total.errnos[name] = total.errnos.get(name, 0) + count
