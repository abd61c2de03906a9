"""The reference engine: one packet at a time, in Python, readable. The oracle for the C ones.

A packet's way, from read to send:

    encap  os.readv(TUN) -> wire.encapsulate -> sendto(peer)
    decap  recvmsg_into  -> wire.decapsulate -> os.write(TUN)
    reply  an ICMP error: from encap it is written to the TUN; from decap it goes
           through encapsulate to the peer that holds the packet's source

Each direction owns one buffer, read into and patched in place: a packet is parsed once
and never copied here. The event loop calls back while a descriptor is readable, and a
call carries at most BUDGET packets, so timers, the store and route changes get their
turn under any load. When the socket is full, the one packet in hand waits and the TUN is
not read until there is room: the queue builds up in the kernel, where it belongs.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final

from tundp.engine.counters import Counters, DirectionCounters
from tundp.lease.fib import Fib, NextHop
from tundp.linux import uapi, udp
from tundp.linux.tun import Tun, TunMode
from tundp.wire import ip, overhead
from tundp.wire.drop import DropReason, send_reason, tun_reason
from tundp.wire.encap import (
    Deliver,
    Drop,
    Forward,
    Reply,
    SourceCheck,
    decapsulate,
    encapsulate,
)
from tundp.wire.ratelimit import ICMP_BURST, ICMP_RATE_PER_S, TokenBucket

_log = logging.getLogger(__name__)

BUDGET: Final = 64
"""Packets per callback and direction before the loop gets control again."""
BUFFER_LEN: Final = 65536
PATH_MTU_S: Final = 600.0
"""A learnt path MTU is forgotten after ten minutes (RFC 1191 section 6.3)."""
_UNLIMITED: Final = 0xFFFF
_OVERFLOW: Final = struct.Struct("=I")
_ANCILLARY_LEN: Final = socket.CMSG_SPACE(_OVERFLOW.size)


@dataclass(slots=True)
class _Unsent:
    """The one packet that waits for room in the socket, or what is left of its fragments."""

    packets: list[memoryview | bytes]
    hop: NextHop
    datagram_count: int
    bytes_out: int


class ReferenceEngine:
    """See the module; see Dataplane for the contract. The socket must not block."""

    name = "reference"

    def __init__(
        self,
        sock: socket.socket,
        *,
        tunnel_address: IPv4Address,
        fib: Fib,
        source_check: SourceCheck,
        loop: asyncio.AbstractEventLoop,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._sock = sock
        self._source = _bound_address(sock)
        self._tunnel_address = int(tunnel_address)
        self._fib = fib
        self._source_check = source_check
        self._loop = loop
        self._clock_ns = clock_ns
        self._icmp_bucket = TokenBucket(rate_per_s=ICMP_RATE_PER_S, burst=ICMP_BURST)
        self._counters = Counters()
        self._tun_buffer = memoryview(bytearray(BUFFER_LEN))
        self._udp_buffer = memoryview(bytearray(BUFFER_LEN))
        self._tun: Tun | None = None
        self._tun_lost = asyncio.Event()
        self._unsent: _Unsent | None = None
        self._path_mtus: dict[str, tuple[int, float]] = {}
        self._overflows_before = 0
        loop.add_reader(sock.fileno(), self._on_udp_readable)

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
        self._tun_lost.clear()
        if not self._unsent:
            self._loop.add_reader(tun.fd, self._on_tun_readable)

    def detach(self) -> None:
        """See Dataplane."""
        if self._tun is not None:
            self._loop.remove_reader(self._tun.fd)
            self._tun = None

    def install(self, fib: Fib) -> None:
        """See Dataplane."""
        self._fib = fib

    def rebound(self) -> None:
        """See Dataplane. A packet that waits for room waits for the new socket's."""
        fd = self._sock.fileno()
        # The kernel has dropped the old socket from the loop's epoll set, the loop does not
        # know: asyncio then raises ENOENT for a second callback, having forgotten both.
        for remove in (self._loop.remove_writer, self._loop.remove_reader):
            with contextlib.suppress(OSError):
                remove(fd)
        self._loop.add_reader(fd, self._on_udp_readable)
        if self._unsent:
            self._loop.add_writer(fd, self._on_udp_writable)
        self._source = _bound_address(self._sock)
        self._path_mtus.clear()
        self._overflows_before = self._counters.socket_overflows

    async def tun_lost(self) -> None:
        """See Dataplane."""
        await self._tun_lost.wait()

    def counters(self) -> Counters:
        """See Dataplane."""
        return self._counters

    def pulse(self) -> tuple[int, ...]:
        """See Dataplane. It has no thread: the loop that asks is the one that carries."""
        return ()

    def stop(self) -> None:
        """See Dataplane. A packet that still waited for the socket is counted as dropped."""
        self.detach()
        self._loop.remove_reader(self._sock.fileno())
        if self._unsent:
            self._loop.remove_writer(self._sock.fileno())
            self._unsent = None
            self._counters.encap.drops[DropReason.SEND_NO_BUFFER] += 1

    # encap: TUN -> UDP

    def _on_tun_readable(self) -> None:
        self._counters.wakeups += 1
        self._counters.syscalls += 1  # the loop's wait that led here
        for _ in range(BUDGET):
            if self._tun is None or self._unsent:
                return
            self._counters.syscalls += 1
            try:
                length = os.readv(self._tun.fd, [self._tun_buffer])
            except BlockingIOError:
                return
            except OSError as error:
                self._on_tun_error(error)
                return
            counters = self._counters.encap
            counters.reads += 1
            counters.packets_in += 1
            counters.bytes_in += length
            self._encapsulate(self._tun_buffer[:length], counters)

    def _encapsulate(self, packet: memoryview, counters: DirectionCounters) -> None:
        original = bytes(packet[: ip.MIN_HEADER_LEN])
        verdict = self._verdict(packet)
        refused = 0
        if isinstance(verdict, Forward):
            refused = self._send_all(verdict)
        if isinstance(verdict, Forward) and refused == errno.EMSGSIZE:
            # This teaches us the path MTU; the packet, put back as it was, then gets the
            # verdict it should have had. What the second try says, stands.
            self._learn_path_mtu(verdict.hop)
            packet[: len(original)] = original
            verdict = self._verdict(packet)
            if isinstance(verdict, Forward):
                refused = self._send_all(verdict)
        match verdict:
            case Forward():
                if refused:
                    counters.drops[send_reason(refused)] += 1
            case Reply(reason, answer):
                counters.drops[reason] += 1
                self._reply_to_tun(answer)
            case Drop(reason):
                counters.drops[reason] += 1

    def _verdict(self, packet: memoryview) -> Forward[NextHop] | Reply | Drop:
        return encapsulate(
            packet,
            lookup=self._fib.lookup,
            path_mtu=self._path_mtu,
            tunnel_address=self._tunnel_address,
        )

    def _send_all(self, forward: Forward[NextHop]) -> int:
        """Send, or keep what the socket has no room for, and count; the errno of a refusal.

        A packet counts as out once, when the last of its fragments is on its way.
        """
        packets, hop = forward.packets, forward.hop
        bytes_out = sum(len(packet) for packet in packets)
        for number, packet in enumerate(packets):
            self._counters.syscalls += 1
            try:
                self._sock.sendto(packet, hop.sockaddr)
            except BlockingIOError:
                self._wait_for_socket(packets[number:], hop, bytes_out)
                return 0
            except OSError as error:
                _log.debug("send to %s: %s", hop.sockaddr[0], error)
                return error.errno or errno.EIO
        self._count_sent(len(packets), bytes_out)
        return 0

    def _count_sent(self, datagram_count: int, bytes_out: int) -> None:
        self._counters.encap.packets_out += 1
        self._counters.encap.writes += 1
        self._counters.encap.bytes_out += bytes_out
        if datagram_count > 1:
            self._counters.fragments_out += datagram_count

    def _wait_for_socket(
        self, packets: tuple[memoryview | bytes, ...], hop: NextHop, bytes_out: int
    ) -> None:
        # The TUN is not read until these are gone, so its buffer keeps them meanwhile.
        self._counters.send_waits += 1
        self._unsent = _Unsent(list(packets), hop, len(packets), bytes_out)
        if self._tun is not None:
            self._loop.remove_reader(self._tun.fd)
        self._loop.add_writer(self._sock.fileno(), self._on_udp_writable)

    def _on_udp_writable(self) -> None:
        unsent = self._unsent
        assert unsent is not None
        while unsent.packets:
            self._counters.syscalls += 1
            try:
                self._sock.sendto(unsent.packets[0], unsent.hop.sockaddr)
            except BlockingIOError:
                return
            except OSError as error:
                reason = send_reason(error.errno)
                self._counters.encap.drops[reason] += 1
                break
            unsent.packets.pop(0)
        else:
            self._count_sent(unsent.datagram_count, unsent.bytes_out)
        self._unsent = None
        self._loop.remove_writer(self._sock.fileno())
        if self._tun is not None:
            self._loop.add_reader(self._tun.fd, self._on_tun_readable)

    def _reply_to_tun(self, answer: bytes) -> None:
        if not self._may_reply() or self._tun is None:
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
            if ancillary:
                self._count_overflows(ancillary)
            counters = self._counters.decap
            counters.reads += 1
            counters.packets_in += 1
            counters.bytes_in += length
            self._decapsulate(self._udp_buffer[:length], sender[0], counters)

    def _decapsulate(self, datagram: memoryview, sender: str, counters: DirectionCounters) -> None:
        verdict = decapsulate(
            datagram,
            outer_source=int.from_bytes(socket.inet_aton(sender), "big"),
            is_ours=self._fib.is_own,
            admits=self._fib.admits,
            source_check=self._source_check,
            tunnel_address=self._tunnel_address,
        )
        match verdict:
            case Deliver(packet, source_matches, destination_matches):
                if not source_matches:
                    self._counters.source_mismatches += 1
                if not destination_matches:
                    self._counters.destination_mismatches += 1
                self._deliver(packet, counters)
            case Reply(reason, answer):
                counters.drops[reason] += 1
                self._reply_to_peer(answer)
            case Drop(reason):
                counters.drops[reason] += 1

    def _deliver(self, packet: memoryview, counters: DirectionCounters) -> None:
        if self._tun is None:
            counters.drops[DropReason.TUN_GONE] += 1
            return
        self._counters.syscalls += 1
        try:
            os.write(self._tun.fd, packet)
        except OSError as error:
            counters.drops[tun_reason(error.errno)] += 1
            _log.debug("TUN write of %s: %s", bytes(packet[: ip.MIN_HEADER_LEN]).hex(), error)
            self._on_tun_error(error)
            return
        counters.packets_out += 1
        counters.writes += 1
        counters.bytes_out += len(packet)

    def _reply_to_peer(self, answer: bytes) -> None:
        if not self._may_reply():
            return
        verdict = self._verdict(memoryview(bytearray(answer)))
        if isinstance(verdict, Forward):
            try:
                for packet in verdict.packets:
                    self._counters.syscalls += 1
                    self._sock.sendto(packet, verdict.hop.sockaddr)
                if len(verdict.packets) > 1:
                    self._counters.fragments_out += len(verdict.packets)
            except OSError as error:
                _log.debug("ICMP error to %s: %s", verdict.hop.sockaddr[0], error)
            else:
                self._counters.icmp_to_peers += 1
                return
        self._counters.icmp_undeliverable += 1

    # both directions

    def _may_reply(self) -> bool:
        if self._icmp_bucket.take(self._clock_ns()):
            return True
        self._counters.icmp_rate_limited += 1
        return False

    def _on_tun_error(self, error: OSError) -> None:
        """Sort a TUN error: a deleted device is reported, anything else is a passing state."""
        if error.errno in (errno.EBADFD, errno.EBADF) and self._tun is not None:
            _log.warning("TUN device %s is gone", self._tun.name)
            self.detach()
            self._tun_lost.set()

    def _path_mtu(self, hop: NextHop) -> int:
        # Empty unless some path is narrower than the TUN: then nothing is looked up at all.
        if not self._path_mtus:
            return _UNLIMITED
        address = hop.sockaddr[0]
        known = self._path_mtus.get(address)
        if known is None:
            return _UNLIMITED
        mtu, expires_at = known
        if self._loop.time() >= expires_at:
            del self._path_mtus[address]
            return _UNLIMITED
        return mtu

    def _learn_path_mtu(self, hop: NextHop) -> None:
        address = hop.sockaddr[0]
        outer = udp.path_mtu(self._source, address)
        if outer is None:
            return
        mtu = max(ip.MIN_MTU, overhead.inner_mtu(outer))
        self._path_mtus[address] = (mtu, self._loop.time() + PATH_MTU_S)
        _log.info("path to %s carries %d bytes: inner packets up to %d", address, outer, mtu)

    def _count_overflows(self, ancillary: list[tuple[int, int, bytes]]) -> None:
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == uapi.SO_RXQ_OVFL:
                # Cumulative since the socket was opened, modulo 2^32; sent once it is not 0.
                since_opened = _OVERFLOW.unpack(data)[0]
                self._counters.socket_overflows = self._overflows_before + since_opened


def _bound_address(sock: socket.socket) -> IPv4Address:
    return IPv4Address(sock.getsockname()[0])
