"""The relay of `tundp chaos`: a thread between the engine and peers whose packets are impaired.

    engine  --loopback-->  lane's socket  --decide, wait-->  lane's sender  -->  peer

A lane is one peer's. The engine sends the peer's datagrams to the lane's socket
(Dataplane.divert), UDP_SEGMENT trains cut by the kernel on the way; the lane sends them on from
the backend's address and port, so that the peer sees no other sender. Measuring paths, which has
sockets of its own, hands its requests over by `submit`.

Every datagram is in one count: received + duplicated == sent + lost + too_big + overflow + refused
+ foreign + waiting. What is received was sent here by the engine (packets_out, fragments one by
one, and ICMP errors to the peer), handed over (`own`), or of another sender than the backend's
address and port: `foreign`, which is not sent on.

Times are CLOCK_MONOTONIC in seconds. The wait is epoll's: a packet leaves up to a millisecond late.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from ipaddress import IPv4Address
from typing import Final

from tundp.blocking import start_thread
from tundp.errors import PlatformError
from tundp.linux import uapi
from tundp.linux.limits import open_event
from tundp.linux.udp import open_sender, source_control
from tundp.wire.impair import HOLD_S, Fates, Impairment, flipped, flow_of

_log = logging.getLogger(__name__)

LISTEN_ADDRESS: Final = "127.0.130.134"
"""Where lanes receive: no datagram from the wire may have that destination (RFC 1122)."""
QUEUE_LEN: Final = 4 << 20
"""Bytes that may wait in a lane: 20 ms of 1.6 Gbit/s."""
RECEIVE_BUFFER_LEN: Final = 4 << 20
SEND_BUFFER_LEN: Final = 1 << 20
LINGER_S: Final = 0.25
"""A lane that ends still takes what the engine sent before it knew."""
_RECEIVES: Final = 64
_UNREAD_MAX: Final = 1 << 15
"""More than the buffer holds of the smallest."""
_FLOWS: Final = 4096
_DATAGRAM_LEN: Final = 65_536
_MEMINFO_LEN: Final = 4 * (uapi.SK_MEMINFO_DROPS + 1)


@dataclass(slots=True)
class LaneCounts:
    """Datagrams of one lane; see the module for the sum that holds."""

    received: int = 0
    own: int = 0
    """Of those received, tundp's own requests, which the engine has not counted."""
    sent: int = 0
    lost: int = 0
    too_big: int = 0
    """Lost for --mtu."""
    overflow: int = 0
    """Lost since more waited than there is room for, or this thread was too slow."""
    refused: int = 0
    """Refused by the kernel when they were sent on."""
    foreign: int = 0
    """Discarded: not from the backend's address and port."""
    waiting: int = 0
    duplicated: int = 0
    """Copies made."""
    corrupted: int = 0
    """Of those not lost: with a bit flipped."""
    delayed: int = 0
    reordered: int = 0
    """Held back, for others to overtake."""

    @property
    def holds(self) -> bool:
        """Whether every datagram is accounted for."""
        gone = self.lost + self.too_big + self.overflow + self.refused + self.foreign
        return self.received + self.duplicated == self.sent + gone + self.waiting

    def add(self, other: LaneCounts) -> None:
        """Add another lane's."""
        for name, count in other.as_dict().items():
            setattr(self, name, getattr(self, name) + count)

    def as_dict(self) -> dict[str, int]:
        """By name."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class LanePlan:
    """What a lane is to do."""

    impairment: Impairment
    seed: str
    source: IPv4Address
    """The backend's address: only datagrams from it and `port` are taken, and all leave so."""
    port: int
    peer: tuple[str, int]
    """The endpoint."""
    ends_at: float
    """From then on nothing is impaired, whoever is late to end the lane."""


class Lane:
    """One peer's; made on the loop's thread, then the relay's. OSError if it cannot be opened."""

    def __init__(self, plan: LanePlan) -> None:
        self._plan = plan
        # How many packets tundp sends of itself goes by time: they draw from a generator of theirs.
        self._fates = Fates(plan.impairment, plan.seed)
        self._own_fates = Fates(plan.impairment, f"{plan.seed} own")
        self._control = source_control(plan.source)
        self._from = (str(plan.source), plan.port)
        self._counts = LaneCounts()
        self._queue: list[tuple[float, int, bytes, bool]] = []
        self._queued_len = 0
        self._number = 0
        self._flows: dict[bytes, float] = {}
        self._floor = 0.0
        self._drops_seen = 0
        self.closes_at: float | None = None
        """When it is closed, once it ends."""
        self.is_closed = False
        """Its counts are the last ones."""
        with contextlib.ExitStack() as stack:
            self.sock = stack.enter_context(_open_listener())
            self._sender = stack.enter_context(open_sender(plan.port, SEND_BUFFER_LEN))
            self._prober = stack.enter_context(
                open_sender(plan.port, SEND_BUFFER_LEN, is_probing=True)
            )
            self._stack = stack.pop_all()

    @property
    def way(self) -> tuple[int, int]:
        """Where the engine has to send: address in host order, port."""
        address, port = self.sock.getsockname()
        return int(IPv4Address(address)), port

    def check(self) -> None:
        """Send a datagram here as the engine will. PlatformError: loopback does not carry it.

        Before the relay has the lane. Rules that drop it would else drop all of the peer's.
        """
        with contextlib.suppress(OSError):
            self._sender.sendmsg([b"?"], self._control, 0, self.sock.getsockname())
            self.sock.settimeout(1.0)
            data, sender = self.sock.recvfrom(16)
            if (data, sender) == (b"?", self._from):
                self.sock.setblocking(False)
                return
        raise PlatformError(
            f"a datagram from {self._plan.source} to {LISTEN_ADDRESS} does not arrive: chaos needs"
            " the loopback device, and INPUT rules that let it pass; ip link set dev lo up"
        )

    def receive(self, now: float) -> None:
        """Take the datagrams that are there, at most a batch."""
        for _ in range(_RECEIVES):
            try:
                data, sender = self.sock.recvfrom(_DATAGRAM_LEN)
            except OSError:
                return
            if sender == self._from:
                self.take(data, now)
            else:
                self._counts.received += 1
                self._counts.foreign += 1

    def take(self, packet: bytes, now: float, *, is_own: bool = False) -> None:
        """Decide what becomes of a datagram. is_own: tundp's, to be sent with DF."""
        counts = self._counts
        counts.received += 1
        counts.own += is_own
        if now >= self._plan.ends_at or self.closes_at is not None:
            self._enqueue(packet, self._in_order(packet, now), is_own=is_own)
            return
        fate = (self._own_fates if is_own else self._fates).decide(packet)
        if fate.is_too_big:
            counts.too_big += 1
            return
        if fate.is_lost:
            counts.lost += 1
            return
        if fate.flips_at is not None:
            packet = flipped(packet, fate.flips_at)
            counts.corrupted += 1
        counts.delayed += fate.delay_s > 0
        due = self._in_order(packet, now + fate.delay_s)
        if fate.is_held:
            counts.reordered += 1
            due += HOLD_S
        self._enqueue(packet, due, is_own=is_own)
        if fate.is_doubled:
            counts.duplicated += 1
            self._enqueue(packet, due, is_own=is_own)

    def send_due(self, now: float) -> float | None:
        """Send what is due; when the next one is, None if nothing waits."""
        while self._queue and self._queue[0][0] <= now:
            _, _, packet, is_own = heapq.heappop(self._queue)
            self._queued_len -= len(packet)
            self._send(packet, is_own=is_own)
        return self._queue[0][0] if self._queue else None

    def counts(self) -> LaneCounts:
        """The counts now."""
        counts = LaneCounts(**self._counts.as_dict())
        counts.waiting = len(self._queue)
        # What the socket had no room for was sent here as well.
        drops = self._socket_drops()
        counts.received += drops
        counts.overflow += drops
        return counts

    def close(self) -> None:
        """Close the sockets; what waits is counted as waiting for ever, what is unread as lost."""
        with contextlib.suppress(OSError):
            self.sock.setblocking(False)
            for _ in range(_UNREAD_MAX):  # others of this host may send here for ever
                self.sock.recv(1)
                self._counts.received += 1
                self._counts.overflow += 1
        self._socket_drops()
        self._stack.close()
        self.is_closed = True

    def _in_order(self, packet: bytes, due: float) -> float:
        """When a packet of its flow may leave at the earliest: not before those ahead of it."""
        flow = flow_of(packet)
        due = max(due, self._flows.get(flow, self._floor))
        if len(self._flows) >= _FLOWS and flow not in self._flows:
            # Too many to remember: the latest of them holds for all.
            self._floor = max(self._floor, *self._flows.values())
            self._flows.clear()
            due = max(due, self._floor)
        self._flows[flow] = due
        return due

    def _enqueue(self, packet: bytes, due: float, *, is_own: bool) -> None:
        if self._queued_len + len(packet) > QUEUE_LEN:
            self._counts.overflow += 1
            return
        self._number += 1
        self._queued_len += len(packet)
        heapq.heappush(self._queue, (due, self._number, packet, is_own))

    def _send(self, packet: bytes, *, is_own: bool) -> None:
        sender = self._prober if is_own else self._sender
        try:
            sender.sendmsg([packet], self._control, 0, self._plan.peer)
        except OSError as error:
            self._counts.refused += 1
            _log.debug("chaos to %s: %s", self._plan.peer[0], error)
        else:
            self._counts.sent += 1

    def _socket_drops(self) -> int:
        """Datagrams the socket had no room for (SO_MEMINFO, Linux 4.12), also once it is closed."""
        with contextlib.suppress(OSError):
            words = self.sock.getsockopt(socket.SOL_SOCKET, uapi.SO_MEMINFO, _MEMINFO_LEN)
            if len(words) == _MEMINFO_LEN:
                self._drops_seen = int.from_bytes(words[-4:], sys.byteorder)
        return self._drops_seen


class Relay:
    """The thread and its lanes. Methods are the event loop's, but for `_serve`."""

    def __init__(self, on_bug: Callable[[], object]) -> None:
        """on_bug: called on the thread when an exception ended it."""
        self._on_bug = on_bug
        self._lock = threading.Lock()
        self._lanes: dict[int, Lane] = {}
        """By descriptor of their socket."""
        self._wake_fd = open_event()
        self._epoll = select.epoll()
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._is_stopped = False
        self._thread = threading.Thread(target=self._serve, name="tundp-chaos", daemon=True)
        start_thread(self._thread)

    def add(self, lane: Lane) -> None:
        """Serve a lane from now on; it is the relay's to close."""
        with self._lock:
            self._lanes[lane.sock.fileno()] = lane
            self._epoll.register(lane.sock.fileno(), select.EPOLLIN)

    def submit(self, lane: Lane, packet: bytes) -> None:
        """Hand over a datagram of tundp's own for the peer."""
        with self._lock:
            lane.take(packet, time.monotonic(), is_own=True)
        os.eventfd_write(self._wake_fd, 1)

    def end(self, lane: Lane) -> None:
        """Impair nothing any more, and close the lane once it is empty and the engine knows."""
        with self._lock:
            lane.closes_at = time.monotonic() + LINGER_S
        os.eventfd_write(self._wake_fd, 1)

    def counts(self, lane: Lane) -> LaneCounts:
        """A lane's counts, all of one moment."""
        with self._lock:
            return lane.counts()

    def close(self) -> None:
        """End the thread and every lane. What waits is not sent."""
        self._is_stopped = True
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join()
        for lane in self._lanes.values():
            lane.close()
        self._epoll.close()
        os.close(self._wake_fd)

    def _serve(self) -> None:
        try:
            wait_s: float | None = None
            while not self._is_stopped:
                ready = self._epoll.poll(wait_s)
                with self._lock:
                    wait_s = self._serve_lanes([fd for fd, _ in ready])
        except Exception:  # noqa: BLE001  (ends chaos, not the daemon)
            _log.exception("bug: the thread of tundp chaos ended; please report")
            self._on_bug()

    def _serve_lanes(self, ready: list[int]) -> float | None:
        """One round; how long the next one may wait, seconds."""
        if self._wake_fd in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
        now = time.monotonic()
        for fd in ready:
            if (lane := self._lanes.get(fd)) is not None:
                lane.receive(now)
        dues = []
        for fd, lane in list(self._lanes.items()):
            due = lane.send_due(time.monotonic())
            if lane.closes_at is not None and due is None and lane.closes_at <= now:
                self._epoll.unregister(fd)
                del self._lanes[fd]
                lane.close()
                continue
            dues += [each for each in (due, lane.closes_at) if each is not None]
        return max(0.0, min(dues) - time.monotonic()) if dues else None


def _open_listener() -> socket.socket:
    """The socket a lane receives by, not blocking. OSError."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.IPPROTO_IP, uapi.IP_FREEBIND, 1)
        try:
            sock.setsockopt(socket.SOL_SOCKET, uapi.SO_RCVBUFFORCE, RECEIVE_BUFFER_LEN)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_LEN)
        sock.bind((LISTEN_ADDRESS, 0))
    except OSError:
        sock.close()
        raise
    return sock
