"""The reference engine: one packet at a time, in Python, readable.

The oracle for what the C engines decide, send, count and forget; not for how `gso` batches:
wire/segment.py and wire/coalesce.py specify that, and no packet here goes through them.

A packet's way, from read to send:

    encap  os.readv(TUN) -> wire.encapsulate -> sendto(peer)
    decap  recvmsg_into  -> wire.decapsulate -> os.write(TUN)
    reply  an ICMP error: from encap it is written to the TUN; from decap it goes
           through encapsulate to the peer that holds the packet's source

Each direction owns one buffer, read into and patched in place: a packet is parsed once
and never copied here. The event loop calls back while a descriptor is readable, and a
call carries at most BUDGET packets, so that timers, the store and route changes are
served under any load. Nothing waits here: when the socket is full, the hop gets one of its own
(hop_sockets.py), and what that has no room for is dropped.

Why one room: whoever wants to know what an engine does reads it here, top to bottom.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv4Address
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from tundp.backoff import Ration
from tundp.engine import latency
from tundp.engine.base import (
    EMSGSIZE_ORIGIN,
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
from tundp.engine.counters import Counters, DirectionCounters, HopCounters
from tundp.engine.hop_sockets import HopSockets
from tundp.engine.hops import HopLedger
from tundp.engine.taps import Events, Tap, TapRequest
from tundp.lease.fib import Fib
from tundp.linux import uapi, udp
from tundp.linux.offload import set_udp_gro
from tundp.linux.tun import Tun, TunMode
from tundp.wire import ip, overhead, ratelimit
from tundp.wire.drop import DropReason, send_reason, tun_reason
from tundp.wire.encap import (
    Deliver,
    Drop,
    Forward,
    Reply,
    decapsulate,
    encapsulate,
    narrow,
)
from tundp.wire.event import Stage
from tundp.wire.socket_wait import Clocks, SocketWaits

_log = logging.getLogger(__name__)

BUDGET: Final = 64
"""Packets per callback and direction before the loop gets control again."""
BUFFER_LEN: Final = 65536
_ROUTED: Final = (DropReason.HOP_LIMIT_EXCEEDED, DropReason.TOO_BIG)
"""Encap drops that happen to a packet with a next hop."""
_UNLIMITED: Final = 0xFFFF
_UINT32: Final = 0xFFFFFFFF
_OVERFLOW: Final = struct.Struct("=I")
_STAMPS: Final = struct.Struct("=qq32x")
_ANCILLARY_LEN: Final = socket.CMSG_SPACE(_OVERFLOW.size) + socket.CMSG_SPACE(_STAMPS.size)


class _Hop(NamedTuple):
    """A next hop with its id, as the packet rules hand it through."""

    hop_id: int
    sockaddr: tuple[str, int]
    is_local: bool


class _Arrival(NamedTuple):
    """Where a datagram came from."""

    hop_id: int
    sender: tuple[int, int]
    """Address and port, host order."""


class ReferenceEngine:
    """See the module; see Dataplane for the contract. The socket must not block."""

    name = "reference"

    def __init__(
        self,
        sock: socket.socket,
        context: EngineContext,
        *,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._sock = sock
        self._source = _bound_address(sock)
        self._policy = context.policy
        self._echo_fd, self._peer_fd = context.echo_fd, context.peer_fd
        self._loop = context.loop
        self._clock_ns = clock_ns
        buckets = ratelimit.icmp_buckets()
        self._icmp_local = buckets[: ratelimit.ICMP_LOCAL_BUCKETS]
        self._icmp_wire = buckets[ratelimit.ICMP_LOCAL_BUCKETS :]
        self._counters = Counters()
        self._tun_buffer = memoryview(bytearray(BUFFER_LEN))
        self._udp_buffer = memoryview(bytearray(BUFFER_LEN))
        self._tun: Tun | None = None
        self._tun_gone = asyncio.Event()
        self._gone_lines = Ration(1)
        self._hop_sockets = HopSockets(sock)
        self._overflows = 0
        self._hops = HopLedger()
        self._events = Events(
            self.seen,
            context.recorder.worker(0) if context.recorder else None,
            on_use=self._on_tap_use,
        )
        self._waits = SocketWaits()
        self._ways: dict[int, tuple[str, int]] = {}
        self._base = CounterBase()
        self._has_old_socks = context.has_old_socks
        self._fib = context.fib
        self.install(context.fib)

    @property
    def tun_mode(self) -> TunMode:
        """See Dataplane."""
        return TunMode()

    def describe(self) -> str:
        """See Dataplane."""
        return "one packet at a time, in Python"

    def attach(self, tun: Tun) -> None:
        """See Dataplane."""
        self.detach()
        self._tun = tun
        self._tun_gone.clear()
        # An engine before this one may have had it on.
        set_udp_gro(self._sock, is_on=False)
        self._loop.add_reader(tun.fd, self._on_tun_readable)
        self._loop.add_reader(self._sock.fileno(), self._on_udp_readable)

    def detach(self) -> None:
        """See Dataplane."""
        self._loop.remove_reader(self._sock.fileno())
        if self._tun is not None:
            self._loop.remove_reader(self._tun.fd)
            self._tun = None

    def install(self, fib: Fib, delta: HopsAssigned | None = None) -> None:
        """See Dataplane."""
        assigned = changed_hops(self._fib, fib) if delta is None else delta.hops_assigned
        self._hops.reassign(assigned)
        for hop_id in assigned:
            self._ways.pop(hop_id, None)
        self._fib = fib
        self._hop_of_peer = dict(zip(fib.peer_array.tolist(), fib.peer_hops.tolist(), strict=True))

    def divert(self, ways: Mapping[int, tuple[int, int]]) -> None:
        """See Dataplane."""
        self._ways = {
            hop_id: (str(IPv4Address(address)), port) for hop_id, (address, port) in ways.items()
        }

    def seen(self) -> int:
        """See Dataplane. The next packet uses what was installed last."""
        return self._fib.generation

    def rebound(self) -> None:
        """See Dataplane."""
        self._hop_sockets.close()
        if self._events.has_taps:
            self._on_tap_use(is_on=True)
        self._source = _bound_address(self._sock)
        self._hops.forget_paths()
        self._overflows = 0

    async def tun_gone(self) -> None:
        """See Dataplane."""
        await self._tun_gone.wait()

    def counters(self) -> Counters:
        """See Dataplane."""
        self._counters.hop_sockets_opened = self._hop_sockets.opened
        return self._base.with_counted(self._counters, has_old_socks=self._has_old_socks)

    def go_on_from(self, base: CounterBase) -> None:
        """See Dataplane."""
        self._base = base
        self._hops.go_on_from(base, self._fib.hop_array)

    def base(self) -> CounterBase:
        """See Dataplane."""
        return CounterBase(totals=self.counters(), hops=self._hops.base_rows(self._fib.hop_array))

    def early_plan(self) -> EarlyPlan | None:
        """See Dataplane. Python is what an early start does not wait for."""
        return None

    def hop_counters(self, hop_ids: Sequence[int] | None = None) -> Mapping[int, HopCounters]:
        """See Dataplane."""
        return self._hops.counters(hop_ids)

    def activity(self) -> HopActivity:
        """See Dataplane."""
        return self._hops.activity(len(self._fib.hops))

    def hop_sockets(self) -> int:
        """See Dataplane."""
        return len(self._hop_sockets)

    def offloads(self) -> OffloadState:
        """See Dataplane. It has none."""
        return OffloadState()

    def path_states(self) -> Mapping[int, PathState]:
        """See Dataplane."""
        return self._hops.paths(self._loop.time())

    def recheck_paths(self) -> None:
        """See Dataplane."""
        ask = functools.partial(udp.device_mtu, self._source)
        self._hops.forget_paths(changed_paths(self._hops.learnt(self._loop.time()), self._fib, ask))

    def limit_path(self, hop_id: int, limit: PathLimit | None) -> None:
        """See Dataplane."""
        self._hops.limit(hop_id, limit)

    def bytes_out(self) -> npt.NDArray[np.uint64]:
        """See Dataplane."""
        return self._hops.bytes_out(len(self._fib.hops))

    def open_tap(self, request: TapRequest) -> Tap:
        """See Dataplane."""
        return self._events.open_tap(request)

    def tap_count(self) -> int:
        """See Dataplane."""
        return self._events.tap_count

    def heartbeat(self) -> tuple[int, ...]:
        """See Dataplane. It has no thread: the loop that asks is the one that carries."""
        return ()

    def stop(self) -> None:
        """See Dataplane."""
        self.detach()
        self._hop_sockets.close()

    # encap: TUN -> UDP

    def _on_tun_readable(self) -> None:
        self._counters.wakeups += 1
        self._counters.syscalls += 1  # the loop's wait that led here
        self._hop_sockets.sweep(self._clock_ns())
        for _ in range(BUDGET):
            if self._tun is None:
                return
            self._counters.syscalls += 1
            try:
                length = os.readv(self._tun.fd, [self._tun_buffer])
            except BlockingIOError:
                return
            except OSError as error:
                self._on_tun_error(error)
                return
            is_measured = self._counters.encap.reads % latency.EVERY == 0
            began_ns = self._clock_ns() if is_measured else 0
            counters = self._counters.encap
            counters.reads += 1
            counters.packets_in += 1
            counters.bytes_in += length
            packet = self._tun_buffer[:length]
            self._events.passed(Stage.TUN_READ, packet, packet_id=counters.reads)
            try:
                self._encapsulate(packet, counters)
            except Exception:  # noqa: BLE001  (a bug costs its packet, not the daemon)
                self._on_bug(counters, DropReason.SEND_FAILED, packet)
            if is_measured:
                counters.add_latency(1, self._clock_ns() - began_ns)

    def _encapsulate(self, packet: memoryview, counters: DirectionCounters) -> None:
        verdict = self._verdict(packet)
        hop_id = self._hop_id_of(verdict, packet)
        refused = 0
        if isinstance(verdict, Forward):
            packet = packet[: ip.read(packet).total_len]
            refused = self._send_all(verdict, packet)
        if isinstance(verdict, Forward) and refused == errno.EMSGSIZE:
            # Learn the path MTU and decide the packet again. The second result is final.
            verdict = narrow(
                packet,
                hop=verdict.hop,
                mtu=self._learn_inner_mtu(verdict.hop),
                tun_address=self._policy.tun_address,
            )
            if isinstance(verdict, Forward):
                refused = self._send_all(verdict, packet)
        match verdict:
            case Forward():
                if refused:
                    self._drop_encap(send_reason(refused), hop_id, packet, refused)
            case Reply(reason, answer):
                self._drop_encap(reason, hop_id, packet, refused)
                self._reply_to_tun(answer)
            case Drop(reason):
                self._drop_encap(reason, hop_id, packet, refused)

    def _hop_id_of(self, verdict: Forward[_Hop] | Reply | Drop, packet: memoryview) -> int:
        """The hop a packet is counted for: 0 before it is routed, or to this node itself."""
        if isinstance(verdict, Forward):
            return verdict.hop.hop_id
        if verdict.reason in _ROUTED:
            return self._fib.index(ip.read(packet).destination)
        return 0

    def _verdict(self, packet: memoryview) -> Forward[_Hop] | Reply | Drop:
        return encapsulate(
            packet,
            lookup=self._lookup,
            path_mtu=self._inner_mtu,
            tun_address=self._policy.tun_address,
        )

    def _lookup(self, address: int) -> _Hop | None:
        hop_id = self._fib.index(address)
        hop = self._fib.hops[hop_id]
        return None if hop is None else _Hop(hop_id, hop.sockaddr, hop.is_local)

    def _send_all(self, forward: Forward[_Hop], packet: memoryview) -> int:
        """Send `packet`, and count; the errno of a refusal.

        A packet counts as out once, when the last of its fragments is on its way.
        """
        packets, hop = forward.packets, forward.hop
        try:
            for datagram in packets:
                self._send(datagram, hop)
        except OSError as error:
            _log.debug("send to %s: %s", hop.sockaddr[0], error)
            return self._count_refused_send(error, hop.hop_id)
        self._count_sent(hop.hop_id, len(packets), sum(len(datagram) for datagram in packets))
        if self._events.has_taps:
            self._events.passed(
                Stage.UDP_SEND,
                packet,
                packet_id=self._counters.encap.reads,
                hop=hop.hop_id,
                peer=self._endpoint(hop.hop_id),
                together=len(packets),
            )
        return 0

    def _send(self, packet: memoryview | bytes, hop: _Hop) -> None:
        self._counters.syscalls += 1
        to = self._ways.get(hop.hop_id, hop.sockaddr) if self._ways else hop.sockaddr
        self._hop_sockets.send(packet, hop.hop_id, to, self._clock_ns())

    def _count_sent(self, hop_id: int, datagram_count: int, bytes_out: int) -> None:
        hop = self._hops.count(hop_id)
        hop.packets_out += 1
        hop.bytes_out += bytes_out
        self._counters.encap.packets_out += 1
        self._counters.encap.writes += 1
        self._counters.encap.bytes_out += bytes_out
        if datagram_count > 1:
            self._counters.fragments_out += datagram_count

    def _reply_to_tun(self, answer: bytes) -> None:
        bucket = self._icmp_local[ratelimit.local_bucket(answer)]
        if not self._may_reply(bucket) or self._tun is None:
            return
        self._counters.syscalls += 1
        try:
            os.write(self._tun.fd, answer)
        except OSError as error:
            self._counters.icmp_undeliverable += 1
            _log.debug("ICMP error to the TUN: %s", error)
        else:
            self._counters.icmp_to_tun += 1

    # decap: UDP -> TUN

    def _on_udp_readable(self) -> None:
        self._counters.wakeups += 1
        self._counters.syscalls += 1  # the loop's wait that led here
        for _ in range(BUDGET):
            self._counters.syscalls += 1
            if self._events.has_taps:
                self._waits.call(time.time_ns())
            try:
                length, ancillary, _, sender = self._sock.recvmsg_into(
                    [self._udp_buffer], _ANCILLARY_LEN
                )
            except BlockingIOError:
                return
            except OSError as error:
                # An ICMP error for an earlier datagram, delivered here: that send is history.
                _log.debug("receive: %s", error)
                continue
            is_measured = self._counters.decap.reads % latency.EVERY == 0
            began_ns = self._clock_ns() if is_measured else 0
            if ancillary:
                self._count_overflows(ancillary)
            wait_ns = self._wait_ns(ancillary) if self._events.has_taps else 0
            counters = self._counters.decap
            counters.reads += 1
            counters.packets_in += 1
            counters.bytes_in += length
            datagram = self._udp_buffer[:length]
            try:
                outer_source = int.from_bytes(socket.inet_aton(sender[0]), "big")
                arrival = _Arrival(
                    self._hop_of_peer.get(outer_source, 0), (outer_source, sender[1])
                )
                self._count_heard(arrival.hop_id, length)
                self._events.passed(
                    Stage.UDP_RECEIVE,
                    datagram,
                    packet_id=counters.reads,
                    hop=arrival.hop_id,
                    peer=arrival.sender,
                    wait_ns=wait_ns,
                )
                self._decapsulate(datagram, arrival)
            except Exception:  # noqa: BLE001  (a bug costs its packet, not the daemon)
                self._on_bug(counters, DropReason.TUN_FAILED, datagram)
            if is_measured:
                counters.add_latency(1, self._clock_ns() - began_ns)

    def _decapsulate(self, datagram: memoryview, arrival: _Arrival) -> None:
        verdict = decapsulate(datagram, sender=arrival.sender, table=self._fib, policy=self._policy)
        match verdict:
            case Deliver(packet, source_matches, destination_matches, echo_len, peer_len):
                if not source_matches:
                    self._counters.source_mismatches += 1
                if not destination_matches:
                    self._counters.destination_mismatches += 1
                self._hand_over(self._echo_fd, packet[:echo_len])
                self._hand_over(self._peer_fd, packet[:peer_len])
                self._deliver(packet, arrival)
            case Reply(reason, answer):
                self._drop_decap(reason, arrival, datagram)
                self._reply_to_peer(answer, arrival.hop_id)
            case Drop(reason):
                self._drop_decap(reason, arrival, datagram)

    def _hand_over(self, fd: int, data: memoryview) -> None:
        if data and fd >= 0:
            self._counters.syscalls += 1
            # Where nobody takes it, it is as if it had been lost.
            with contextlib.suppress(OSError):
                os.write(fd, data)

    def _deliver(self, packet: memoryview, arrival: _Arrival) -> None:
        counters = self._counters.decap
        if self._tun is None:
            self._drop_decap(DropReason.TUN_GONE, arrival, packet)
            return
        self._counters.syscalls += 1
        try:
            os.write(self._tun.fd, packet)
        except OSError as error:
            self._count_errno(error)
            self._drop_decap(tun_reason(error.errno), arrival, packet, error.errno or 0)
            _log.debug("TUN write of %s: %s", bytes(packet[: ip.MIN_HEADER_LEN]).hex(), error)
            self._on_tun_error(error)
            return
        counters.packets_out += 1
        counters.writes += 1
        counters.bytes_out += len(packet)
        self._events.passed(
            Stage.TUN_WRITE,
            packet,
            packet_id=counters.reads,
            hop=arrival.hop_id,
            peer=arrival.sender,
        )

    def _reply_to_peer(self, answer: bytes, about: int) -> None:
        """Answer a packet that came from hop `about`, to the peer that holds its source."""
        if not self._may_reply(self._icmp_wire[ratelimit.wire_bucket(about)]):
            return
        verdict = self._verdict(memoryview(bytearray(answer)))
        if isinstance(verdict, Forward):
            try:
                for packet in verdict.packets:
                    self._send(packet, verdict.hop)
                if len(verdict.packets) > 1:
                    self._counters.fragments_out += len(verdict.packets)
            except OSError as error:
                _log.debug("ICMP error to %s: %s", verdict.hop.sockaddr[0], error)
            else:
                self._counters.icmp_to_peers += 1
                return
        self._counters.icmp_undeliverable += 1

    # both directions

    def _may_reply(self, bucket: ratelimit.TokenBucket) -> bool:
        if bucket.take(self._clock_ns()):
            return True
        self._counters.icmp_rate_limited += 1
        return False

    def _on_tun_error(self, error: OSError) -> None:
        """Sort a TUN error: a deleted device is reported, anything else is a passing state."""
        if error.errno in (errno.EBADFD, errno.EBADF) and self._tun is not None:
            if self._gone_lines.take(time.monotonic()):
                _log.warning("TUN device %s is gone", self._tun.name)
            self.detach()
            self._tun_gone.set()

    def _on_bug(self, counters: DirectionCounters, reason: DropReason, packet: memoryview) -> None:
        """Drop the packet an exception was raised for; its traceback is logged, less and less."""
        bugs = self._counters.errnos["exception"] = self._counters.errnos.get("exception", 0) + 1
        if bugs & (bugs - 1) == 0:
            _log.exception(
                "bug: packet dropped as %s, %d so far; please report", reason.label, bugs
            )
        if counters.packets_in > counters.packets_out + counters.dropped:
            if counters is self._counters.encap:
                self._drop_encap(reason, 0, packet)
            else:
                self._drop_decap(reason, _Arrival(0, (0, 0)), packet)

    def _drop_encap(
        self, reason: DropReason, hop_id: int, packet: memoryview, error: int = 0
    ) -> None:
        """Count a packet from the TUN as dropped. error: errno it was refused with."""
        counters = self._counters.encap
        self._drop(counters, reason, hop_id)
        self._events.dropped(
            Stage.UDP_SEND,
            packet,
            reason=reason,
            packet_id=counters.reads,
            hop=hop_id,
            peer=self._endpoint(hop_id),
            error=error,
        )

    def _drop_decap(
        self, reason: DropReason, arrival: _Arrival, packet: memoryview, error: int = 0
    ) -> None:
        """Count a packet from the wire as dropped. error: errno it was refused with."""
        counters = self._counters.decap
        self._drop(counters, reason, arrival.hop_id)
        self._events.dropped(
            Stage.TUN_WRITE,
            packet,
            reason=reason,
            packet_id=counters.reads,
            hop=arrival.hop_id,
            peer=arrival.sender,
            error=error,
        )

    def _endpoint(self, hop_id: int) -> tuple[int, int]:
        """Address and port of a hop; (0, 0) of hop 0."""
        address, port, _ = self._fib.hop_array[hop_id].tolist()
        return address, port

    def _drop(self, counters: DirectionCounters, reason: DropReason, hop_id: int) -> None:
        counters.drops[reason] += 1
        hop = self._hops.count(hop_id)
        hop.drops += 1
        hop.queue_full += reason is DropReason.HOP_QUEUE_FULL

    def _count_heard(self, hop_id: int, length: int) -> None:
        hop = self._hops.count(hop_id)
        hop.packets_in += 1
        hop.bytes_in += length
        hop.last_heard = time.time()

    def _count_errno(self, error: OSError) -> str:
        name = errno.errorcode.get(error.errno or 0, "other")
        self._counters.errnos[name] = self._counters.errnos.get(name, 0) + 1
        return name

    def _count_refused_send(self, error: OSError, hop_id: int) -> int:
        """Count the errno of a refused send to a hop, and return it."""
        hop = self._hops.count(hop_id)
        hop.last_errno = self._count_errno(error)
        hop.last_refused_ns = time.monotonic_ns()
        return error.errno or errno.EIO

    def _inner_mtu(self, hop: _Hop) -> int:
        return self._known_mtu(hop) or _UNLIMITED

    def _known_mtu(self, hop: _Hop) -> int | None:
        state = self._hops.path(hop.hop_id, self._loop.time())
        return None if state is None else state.inner_mtu

    def _learn_inner_mtu(self, hop: _Hop) -> int | None:
        """The largest inner packet the path to a hop carries, when its device refused one."""
        address = hop.sockaddr[0]
        outer = udp.device_mtu(self._source, address, hop.sockaddr[1])
        if outer is not None:
            mtu = max(ip.MIN_MTU, overhead.inner_mtu(outer))
            self._hops.learn_path(hop.hop_id, mtu, EMSGSIZE_ORIGIN, self._loop.time())
            _log.info(
                "the device to %s takes %d bytes: inner packets up to %d", address, outer, mtu
            )
        return self._known_mtu(hop)

    def _count_overflows(self, ancillary: list[tuple[int, int, bytes]]) -> None:
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == uapi.SO_RXQ_OVFL:
                # Cumulative since the socket was opened, modulo 2^32; sent once it is not 0.
                since_opened = _OVERFLOW.unpack(data)[0]
                self._counters.socket_overflows += since_opened - self._overflows & _UINT32
                self._overflows = since_opened

    def _on_tap_use(self, is_on: bool) -> None:  # noqa: FBT001  (a callback)
        udp.set_timestamps(self._sock, is_on=is_on)
        self._waits.begin(_clocks())

    def _wait_ns(self, ancillary: list[tuple[int, int, bytes]]) -> int:
        """How long the datagram just received waited in the socket; 0 not known."""
        self._waits.returned(_clocks())
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == uapi.SO_TIMESTAMPING_NEW:
                seconds, nanoseconds = _STAMPS.unpack(data)
                stamp_ns = seconds * 1_000_000_000 + nanoseconds
                return self._waits.wait_ns(stamp_ns)
        return 0


def _clocks() -> Clocks:
    return Clocks(time.time_ns(), time.monotonic_ns())


def _bound_address(sock: socket.socket) -> IPv4Address:
    return IPv4Address(sock.getsockname()[0])
