"""The C engines `gso`, `mmsg` and `simple`: loops on threads of their own, the GIL released.

`NativeEngine` runs a C loop on a thread of its own until its eventfd is written. Python makes
the FIBs, publishes each by one pointer, and frees it when every worker has been seen with a
newer one. Counters are copied out between two packets.

The C code is the twin of wire/, lease/fib.py and engine/reference.py: tests/twin and
tests/engine hold them equal, and `self_test` compares them on the machine at hand.

Why one room: it is one class with every method of Dataplane, most of them a line or two.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tundp.backoff import Ration
from tundp.choices import Engine, Layout, Offload
from tundp.engine.base import (
    PATH_STATE_S,
    DisabledOffload,
    EarlyPlan,
    EngineContext,
    HopActivity,
    HopsAssigned,
    OffloadState,
    PathLimit,
    PathState,
)
from tundp.engine.changes import changed_hops, changed_paths
from tundp.engine.counter_base import CounterBase
from tundp.engine.counters import Counters, HopCounters
from tundp.engine.native.counting import add_counters
from tundp.engine.native.early import WORKERS
from tundp.engine.native.fib import NativeFib, policy_values
from tundp.engine.native.hops import HopMemory, PathStates
from tundp.engine.native.library import require
from tundp.engine.native.taps import NativeTaps
from tundp.engine.native.twins import sums_variants
from tundp.engine.native.worker import Worker, WorkerSetup
from tundp.engine.taps import Tap, TapRequest
from tundp.lease.fib import Fib
from tundp.linux.limits import open_event
from tundp.linux.offload import SAFE_SEGMENTS, KernelOffloads, find_offloads, set_udp_gro
from tundp.linux.tun import Tun, TunMode
from tundp.linux.udp import device_mtu, set_timestamps
from tundp.wire.ratelimit import ICMP_LOCAL_BUCKETS, ICMP_WIRE_BUCKETS

_log = logging.getLogger(__name__)

_EXPIRE_S: Final = 60.0
_NEED_VNET_HEADER: Final = (
    Offload.TUN_TSO,
    Offload.TUN_USO,
    Offload.TCP_COALESCE,
    Offload.UDP_COALESCE,
)
_BITS: Final = (
    Offload.UDP_SEGMENT,
    Offload.TCP_COALESCE,
    Offload.UDP_COALESCE,
    Offload.UDP_GRO,
)
"""Offloads a worker has a bit of enum tundp_offload for."""
REFUSED: Final = "the TUN refused a super-packet (EINVAL)"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How a native engine shall work."""

    disabled: frozenset[Offload] = frozenset()
    """Offloads to do without."""
    cpus: tuple[int, ...] = ()
    """Threads are bound to these, round robin; none: the scheduler's choice."""
    spin_us: int = 0
    """Poll so long before sleeping, while that pays; 0 never."""
    layout: Layout = Layout.SHARED


class NativeEngine:
    """See the module; see Dataplane for the contract. `engine` picks the C loop.

    One worker per socket and direction set; worker k of the TUN's queue k. With several
    sockets each peer's datagrams stay with one of them (SO_REUSEPORT), and the kernel
    keeps a flow on the queue that last wrote it: order holds within every flow.
    """

    def __init__(
        self,
        engine: Engine,
        socks: Sequence[socket.socket],
        context: EngineContext,
        settings: EngineSettings | None = None,
        kernel: KernelOffloads | None = None,
    ) -> None:
        """kernel: the result of find_offloads, if there is one already."""
        native = require()
        self.name = engine.value
        self._engine = engine
        self._ffi = native.ffi
        self._lib = native.lib
        self._loop = context.loop
        self._policy = context.policy
        self._settings = settings or EngineSettings()
        self._socks = tuple(socks)
        self._tun_gone = asyncio.Event()
        self._gone_lines = Ration(1)
        self._notify_fd = open_event()
        self._echo_fd, self._peer_fd = context.echo_fd, context.peer_fd
        self._kernel = kernel if engine is Engine.GSO else None
        if engine is Engine.GSO and kernel is None:
            self._kernel = find_offloads(self._settings.disabled)
        directions = self._directions()
        self._hops = HopMemory(len(socks) * len(directions))
        self._path_states = PathStates(self._hops.paths, PATH_STATE_S)
        buckets = ICMP_LOCAL_BUCKETS + ICMP_WIRE_BUCKETS
        self._icmp_budget = native.ffi.new("uint64_t[]", buckets)
        self._recorder = context.recorder
        self._workers = self._make_workers(directions)
        self._taps = NativeTaps(self._workers, self._set_timestamps)
        self._base = CounterBase()
        self._has_old_socks = context.has_old_socks
        self._fibs: list[NativeFib] = []
        """What workers may be using, the installed one last."""
        self._ways: dict[int, tuple[int, int]] = {}
        self._missing = {
            offload: DisabledOffload(reason)
            for offload, reason in (self._kernel.missing if self._kernel else {}).items()
        }
        self._ungranted: dict[Offload, DisabledOffload] = {}
        self._refused: dict[Offload, DisabledOffload] = {}
        self._restore_at = 0.0
        self._expire_timer = self._loop.call_later(_EXPIRE_S, self._expire)
        self._loop.add_reader(self._notify_fd, self._on_notify)
        self.install(context.fib)

    @property
    def tun_mode(self) -> TunMode:
        """See Dataplane."""
        return TunMode(
            has_vnet_header=any(self._has(offload) for offload in _NEED_VNET_HEADER),
            wants_tso=self._has(Offload.TUN_TSO),
            wants_uso=self._has(Offload.TUN_USO),
            queues=len(self._socks),
        )

    def attach(self, tun: Tun) -> None:
        """See Dataplane."""
        self.detach()
        self._tun_gone.clear()
        self._set_gro()
        self._ungranted = self._ungranted_by(tun)
        cpus = self._settings.cpus
        for number, worker in enumerate(self._workers):
            name = f"tundp-{self.name}-{number}"
            worker.configure(tun_fd=tun.fds[worker.queue], name=name.encode(), **self._values(tun))
            worker.start(
                name,
                cpus[number % len(cpus)] if cpus else None,
                lambda code: self._loop.call_soon_threadsafe(self._on_end, tun.name, code),
            )

    def detach(self) -> None:
        """See Dataplane."""
        for worker in self._workers:
            worker.stop()

    def install(self, fib: Fib, delta: HopsAssigned | None = None) -> None:
        """See Dataplane. FIBs every worker has left behind are freed here."""
        self._take_in_path_states()
        before = self._fibs[-1].fib if self._fibs else None
        assigned = changed_hops(before, fib) if delta is None else delta.hops_assigned
        self._hops.reassign(assigned)
        self._path_states.reset(assigned)
        for hop_id in assigned:
            self._ways.pop(hop_id, None)
        self._publish(fib)

    def divert(self, ways: Mapping[int, tuple[int, int]]) -> None:
        """See Dataplane. The same routes are published again, with other ways."""
        self._ways = dict(ways)
        self._publish(self._fibs[-1].fib)

    def seen(self) -> int:
        """See Dataplane. Without a thread no FIB but the installed one is in use."""
        installed = self._fibs[-1].fib.generation
        # Workers know of its lower half only.
        return installed - (installed - self._seen() & 0xFFFFFFFF)

    def rebound(self) -> None:
        """See Dataplane. Threads keep no state of a socket: each run makes its own epoll set."""
        self._set_gro()
        if self._taps:
            self._set_timestamps(is_on=True)
        for worker in self._workers:
            worker.rebound()
        self._path_states.take_in(self._hop_count(), self._loop.time())
        self._path_states.reset()

    async def tun_gone(self) -> None:
        """See Dataplane."""
        await self._tun_gone.wait()

    def counters(self) -> Counters:
        """See Dataplane."""
        total = Counters()
        counted = self._ffi.new("struct tundp_counters *")
        for worker in self._workers:
            self._lib.tundp_worker_counters(worker.struct, counted)
            add_counters(total, counted)
        return self._base.with_counted(total, has_old_socks=self._has_old_socks)

    def go_on_from(self, base: CounterBase) -> None:
        """See Dataplane."""
        self._base = base
        self._hops.go_on_from(base, self._fibs[-1].fib.hop_array)

    def base(self) -> CounterBase:
        """See Dataplane."""
        hops = self._hops.base_rows(self._fibs[-1].fib.hop_array)
        return CounterBase(totals=self.counters(), hops=hops)

    def early_plan(self) -> EarlyPlan | None:
        """See Dataplane."""
        cpus = self._settings.cpus
        about = [
            {"queue": worker.queue, "cpu": cpus[number % len(cpus)] if cpus else None}
            for number, worker in enumerate(self._workers)
        ]
        return EarlyPlan(
            about={"engine": self.name, WORKERS: about},
            workers=b"".join(worker.early_config() for worker in self._workers),
        )

    def hop_counters(self, hop_ids: Sequence[int] | None = None) -> Mapping[int, HopCounters]:
        """See Dataplane."""
        return self._hops.counters(hop_ids, self._hop_count())

    def activity(self) -> HopActivity:
        """See Dataplane."""
        return self._hops.activity(self._hop_count())

    def hop_sockets(self) -> int:
        """See Dataplane."""
        return sum(worker.hop_sockets() for worker in self._workers)

    def offloads(self) -> OffloadState:
        """See Dataplane."""
        if self._kernel is None:
            return OffloadState()
        disabled = self._refused | self._ungranted | self._missing
        return OffloadState(
            in_use=tuple(offload for offload in Offload if offload not in disabled),
            disabled={each: disabled[each] for each in Offload if each in disabled},
        )

    def path_states(self) -> Mapping[int, PathState]:
        """See Dataplane."""
        self._take_in_path_states()
        return self._path_states.states()

    def recheck_paths(self) -> None:
        """See Dataplane."""
        self._take_in_path_states()
        if states := self._path_states.learnt():
            ask = functools.partial(device_mtu, IPv4Address(self._socks[0].getsockname()[0]))
            self._path_states.forget(changed_paths(states, self._fibs[-1].fib, ask))

    def limit_path(self, hop_id: int, limit: PathLimit | None) -> None:
        """See Dataplane."""
        self._path_states.limit(hop_id, limit)

    def bytes_out(self) -> npt.NDArray[np.uint64]:
        """See Dataplane."""
        return self._hops.bytes_out(self._hop_count())

    def describe(self) -> str:
        """See Dataplane."""
        if self._kernel is None:
            is_simple = self._engine is Engine.SIMPLE
            return "one packet at a time" if is_simple else "batches, no offloads"
        state = self.offloads()
        used = ", ".join(offload.value for offload in state.in_use)
        text = f"{used or 'no offloads'}; sums {sums_variants()[0]}"
        if Offload.UDP_SEGMENT in state.in_use:
            text += f"; up to {self._kernel.max_segments} datagrams a send"
        for reason in dict.fromkeys(each.reason for each in state.disabled.values()):
            names = [o.value for o, why in state.disabled.items() if why.reason == reason]
            text += f"; without {', '.join(names)}: {reason}"
        return text

    def open_tap(self, request: TapRequest) -> Tap:
        """See Dataplane."""
        return self._taps.open(request)

    def tap_count(self) -> int:
        """See Dataplane."""
        return len(self._taps)

    def heartbeat(self) -> tuple[int, ...]:
        """See Dataplane."""
        return tuple(worker.heartbeat() for worker in self._workers if worker.is_running)

    def stop(self) -> None:
        """See Dataplane."""
        self._expire_timer.cancel()
        self._loop.remove_reader(self._notify_fd)
        for worker in self._workers:
            worker.close()
        # Readers of events may close theirs later: the descriptors' numbers are others' by then.
        self._taps.end()
        os.close(self._notify_fd)

    def _set_gro(self) -> None:
        """Not before packets are read here: whoever does until then may have no room for it."""
        for sock in self._socks:
            set_udp_gro(sock, is_on=self._has(Offload.UDP_GRO))

    def _set_timestamps(self, is_on: bool) -> None:  # noqa: FBT001  (a callback)
        for sock in self._socks:
            set_timestamps(sock, is_on=is_on)

    def _publish(self, fib: Fib) -> None:
        """Give all workers a FIB, and free those that none of them has any more."""
        publication = self._fibs[-1].publication + 1 if self._fibs else 1
        native_fib = NativeFib(fib, self._hops.paths, self._ways, publication)
        self._fibs.append(native_fib)
        for worker in self._workers:
            worker.install(native_fib.struct)
        seen = self._seen() >> 32
        self._fibs = [kept for kept in self._fibs if kept.publication >= seen]

    def _seen(self) -> int:
        """The oldest publication in use, and the lower half of its FIB's generation."""
        running = (worker.seen() for worker in self._workers if worker.is_running)
        return min(running, default=int(self._fibs[-1].struct.generation))

    def _directions(self) -> tuple[int, ...]:
        """The direction set of each worker of a queue."""
        encap, decap = self._lib.TUNDP_ENCAP, self._lib.TUNDP_DECAP
        if self._engine is not Engine.SIMPLE and self._settings.layout is Layout.SPLIT:
            return (encap, decap)
        return (encap | decap,)

    def _make_workers(self, directions: tuple[int, ...]) -> tuple[Worker, ...]:
        workers: list[Worker] = []
        for queue, sock in enumerate(self._socks):
            for direction in directions:
                setup = WorkerSetup(
                    engine=self._engine,
                    queue=queue,
                    udp_fd=sock.fileno(),
                    notify_fd=self._notify_fd,
                    echo_fd=self._echo_fd,
                    peer_fd=self._peer_fd,
                    directions=direction,
                    hop_counters=self._hops.counters_of(len(workers)),
                    hop_queues=self._hops.queues_of(len(workers)),
                    icmp_budget=self._icmp_budget,
                    examples=self._examples(len(workers)),
                )
                workers.append(Worker(setup))
        return tuple(workers)

    def _examples(self, worker: int) -> Any:
        """The flight recorder of a worker, for its struct; NULL if there is none."""
        region = None if self._recorder is None else self._recorder.worker(worker)
        if region is None:
            return self._ffi.NULL
        # By way of an array, which the collector does not see: it clears a memoryview of a cycle
        # before whoever has its buffer, and the process dies of it (CPython 3.11).
        return self._ffi.from_buffer("struct tundp_examples[]", np.frombuffer(region, np.uint8))

    def _values(self, tun: Tun) -> dict[str, Any]:
        """What attaching to a TUN configures, as fields of struct tundp_worker_config."""
        values = {
            "address": int(IPv4Address(self._socks[0].getsockname()[0])),
            "offloads": self._offload_bits(tun),
            "spin_ns": self._settings.spin_us * 1000,
            "policy": policy_values(self._policy),
        }
        if self._kernel is not None:
            values["max_segments"] = self._kernel.max_segments
            values["max_udp_segments"] = max(self._kernel.max_segments, SAFE_SEGMENTS)
        return values

    def _hop_count(self) -> int:
        return len(self._fibs[-1].fib.hop_array)

    def _has(self, offload: Offload) -> bool:
        """Whether the kernel has an offload, and the settings allow it."""
        return self._kernel is not None and offload in self._kernel.offloads

    def _ungranted_by(self, tun: Tun) -> dict[Offload, DisabledOffload]:
        """What the kernel did not grant when the TUN was opened."""
        is_granted = {
            Offload.TUN_TSO: (tun.has_tso, "the kernel does not grant TSO on the TUN"),
            Offload.TUN_USO: (tun.has_uso, "the kernel does not grant USO on the TUN"),
            Offload.UDP_COALESCE: (tun.knows_uso, "the TUN takes no UDP super-packets"),
        }
        return {
            offload: DisabledOffload(reason)
            for offload, (is_there, reason) in is_granted.items()
            if self._has(offload) and not is_there
        }

    def _bit(self, offload: Offload) -> int:
        return int(getattr(self._lib, f"TUNDP_OFFLOAD_{offload.name}"))

    def _offload_bits(self, tun: Tun) -> int:
        if self._kernel is None:
            return 0
        ruled_out = self._ungranted.keys() | self._missing.keys()
        bits = sum(self._bit(offload) for offload in _BITS if offload not in ruled_out)
        return bits | (self._lib.TUNDP_OFFLOAD_VNET_HEADER if tun.has_vnet_header else 0)

    def _on_notify(self) -> None:
        os.eventfd_read(self._notify_fd)
        self._take_in_path_states()
        refused = 0
        for worker in self._workers:
            refused |= worker.disabled()
        for offload in _BITS:
            if refused & self._bit(offload) and offload not in self._refused:
                _log.warning(
                    "%s: %s is off for %.0f minutes; nothing was lost, its packets were"
                    " written one by one",
                    REFUSED,
                    offload.value,
                    PATH_STATE_S / 60,
                )
                self._refused[offload] = DisabledOffload(REFUSED, time.time())
                self._restore_at = self._loop.time() + PATH_STATE_S

    def _take_in_path_states(self) -> None:
        """Read the path state workers wrote, and log each change once."""
        if not self._fibs:
            return
        news = self._path_states.take_in(self._hop_count(), self._loop.time())
        for hop_id, state, before in news:
            address = IPv4Address(int(self._fibs[-1].fib.hop_array["address"][hop_id]))
            if state.inner_mtu != (before.inner_mtu if before else None):
                _log.info("the device to %s: inner packets up to %s", address, state.inner_mtu)
            if state.no_gso and not (before and before.no_gso):
                _log.warning(
                    "the path to %s takes no UDP_SEGMENT: datagrams go one by one for %.0f"
                    " minutes; nothing was lost, the refused ones were sent again",
                    address,
                    PATH_STATE_S / 60,
                )

    def _expire(self) -> None:
        """Forget path state and refused offloads that are PATH_STATE_S old."""
        self._taps.forget()
        self._expire_timer = self._loop.call_later(_EXPIRE_S, self._expire)
        self._take_in_path_states()
        now = self._loop.time()
        self._path_states.expire(now)
        if self._refused and now >= self._restore_at:
            for worker in self._workers:
                worker.restore()
            self._refused.clear()

    def _on_end(self, tun_name: str, code: int) -> None:
        if self._tun_gone.is_set():
            return  # another worker reported it
        if code == errno.EBADFD:
            if self._gone_lines.take(self._loop.time()):
                _log.warning("TUN device %s is gone", tun_name)
        else:
            _log.error("engine %s ended: %s; starting again", self.name, os.strerror(code))
        self.detach()
        self._tun_gone.set()
