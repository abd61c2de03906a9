"""Harmless questions to peers: echo requests over either network, a datagram to their port."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import secrets
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator, Collection, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final, NamedTuple

from tundp.errors import PlatformError
from tundp.linux import uapi
from tundp.linux.echo_socket import EchoSocket, open_echo_socket
from tundp.wire import echo, ip

TRIES: Final = 3
TRY_S: Final = 0.25
"""Between two tries of one question."""
WAIT_S: Final = 0.75
"""After the last try."""
CLOSED_S: Final = 1.3
"""How long errors about closed ports are waited for: a host sends one a second."""
_UNREACHABLE: Final = 3
_CLOSED: Final = bytes((_UNREACHABLE, 3))
"""ICMP type and code of port unreachable."""
SMALL: Final = 64
"""Bytes of a small echo request, IPv4 header included: fits any path."""
_RECEIVE_LEN: Final = 1 << 16
_RECEIVES: Final = 256
_STAMP: Final = struct.Struct("@ll")
"""struct timespec of SO_TIMESTAMPNS."""
_STAMP_SPACE: Final = socket.CMSG_SPACE(_STAMP.size)


@dataclass(frozen=True, slots=True)
class Question:
    """One echo request: to whom, and how long the IPv4 packet is."""

    to: IPv4Address
    packet_len: int = SMALL
    number: int = 0
    """Tells requests apart that are alike otherwise; requests of a series count from 1."""


@dataclass(frozen=True, slots=True)
class Echo:
    """What came of one echo request of a series."""

    number: int
    rtt_s: float | None
    """None: no answer in time."""
    refusal: int = 0
    """Errno of the send, if this kernel refused it."""


class _Sent(NamedTuple):
    """When a request was sent."""

    monotonic: float
    unix: float

    def until_received(self, messages: Iterable[tuple[int, int, bytes]]) -> float:
        """Seconds until its answer, which was just read, had come by the kernel's time stamp.

        This process may have had other things to do when it came. A clock that was set meanwhile
        makes the stamp useless: then until it was read.
        """
        read_s = time.monotonic() - self.monotonic
        for level, kind, data in messages:
            is_stamp = (level, kind) == (socket.SOL_SOCKET, uapi.SO_TIMESTAMPNS)
            if is_stamp and len(data) == _STAMP.size:
                seconds, nanoseconds = _STAMP.unpack(data)
                stamp_s = seconds + nanoseconds / 1e9 - self.unix
                return stamp_s if 0 < stamp_s < read_s else read_s
        return read_s


class _Pending(NamedTuple):
    """A request of a series that is not decided yet."""

    cookie: bytes
    deadline: float
    """In the loop's time."""


class Asker:
    """Sends echo requests from one address and collects the answers."""

    def __init__(self, sock: EchoSocket, source: IPv4Address) -> None:
        self._echo = sock
        self._source = source
        self._waiting: dict[bytes, Question] = {}
        self._sent_at: dict[bytes, _Sent] = {}
        self._rtt_s: dict[Question, float] = {}
        self._arrived = asyncio.Event()
        self.refusals: dict[Question, int] = {}
        """Errno of the last send of a question, where this kernel refused it."""

    async def ask(
        self, questions: Collection[Question], *, wait_s: float = WAIT_S
    ) -> dict[Question, float]:
        """Seconds to the first answer, of those that were answered; TRIES requests each at most.

        wait_s: after the last request.
        """
        cookies: list[bytes] = []
        try:
            for number in range(TRIES):
                left = [each for each in questions if each not in self._rtt_s]
                if not left:
                    break
                cookies += [self._send(each) for each in left]
                await self._wait_for(left, TRY_S if number + 1 < TRIES else wait_s)
        finally:
            self._forget(cookies)
        return {each: self._rtt_s[each] for each in questions if each in self._rtt_s}

    async def series(
        self, to: IPv4Address, packet_len: int, *, count: int, interval_s: float, wait_s: float
    ) -> AsyncIterator[Echo]:
        """What comes of `count` requests (0: without end), one each `interval_s`; in order.

        wait_s: for each answer. What comes later counts as lost.
        """
        loop = asyncio.get_running_loop()
        began, pending = loop.time(), dict[Question, _Pending]()
        sent = 0
        while pending or not count or sent < count:
            due = None if count and sent >= count else began + sent * interval_s
            if due is not None and loop.time() >= due:
                sent += 1
                question = Question(to, packet_len, sent)
                pending[question] = _Pending(self._send(question), loop.time() + wait_s)
                if loop.time() - due > wait_s:  # stopped, or asleep: do not catch up
                    began = loop.time() - sent * interval_s
            while pending and self._is_decided(
                first := next(iter(pending)), pending[first].deadline
            ):
                self._forget([pending.pop(first).cookie])
                yield self._result(first)
            ends = [] if due is None else [due]
            ends += [each.deadline for each in itertools.islice(pending.values(), 1)]
            if ends:
                await self._wait_until(min(ends))

    def _is_decided(self, question: Question, deadline: float) -> bool:
        is_over = asyncio.get_running_loop().time() >= deadline
        return question in self._rtt_s or question in self.refusals or is_over

    def _forget(self, cookies: Iterable[bytes]) -> None:
        """Answers to these requests no longer count."""
        for cookie in cookies:
            del self._waiting[cookie], self._sent_at[cookie]

    def _result(self, question: Question) -> Echo:
        rtt_s = self._rtt_s.pop(question, None)
        return Echo(question.number, rtt_s, self.refusals.pop(question, 0))

    async def _wait_until(self, deadline: float) -> None:
        """Until an answer arrives, or the loop's time is `deadline`."""
        self._arrived.clear()
        left_s = deadline - asyncio.get_running_loop().time()
        if left_s > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._arrived.wait()

    async def _wait_for(self, questions: Collection[Question], limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if all(each in self._rtt_s for each in questions):
                return
            await asyncio.sleep(0.01)

    def _send(self, question: Question) -> bytes:
        """Send one request; its cookie, to be forgotten by who asks."""
        cookie = secrets.token_bytes(echo.COOKIE_LEN)
        packet = echo.build_request(
            question.packet_len,
            source=int(self._source),
            destination=int(question.to),
            identifier=self._echo.identifier,
            cookie=cookie,
        )
        self._waiting[cookie] = question
        self._sent_at[cookie] = _Sent(time.monotonic(), time.time())
        self.refusals.pop(question, None)
        try:
            self._echo.sock.sendto(packet[ip.MIN_HEADER_LEN :], (str(question.to), 0))
        except OSError as error:
            # A refusal is no answer.
            self.refusals[question] = error.errno or 0
        return cookie

    def receive(self) -> None:
        """Take the answers that have come; never waits."""
        for _ in range(_RECEIVES):
            try:
                packet, messages, _, _ = self._echo.sock.recvmsg(_RECEIVE_LEN, _STAMP_SPACE)
            except OSError:
                break
            answer = echo.read_reply(packet)
            if answer is None or (question := self._waiting.get(answer.cookie)) is None:
                continue
            if answer.source == int(question.to):
                rtt_s = self._sent_at[answer.cookie].until_received(messages)
                self._rtt_s.setdefault(question, rtt_s)
                self._arrived.set()


@contextlib.asynccontextmanager
async def asking(source: IPv4Address) -> AsyncIterator[Asker]:
    """Ask from this address, with DF set. PlatformError without CAP_NET_RAW, or without it."""
    sock = open_echo_socket()
    try:
        sock.sock.setsockopt(socket.IPPROTO_IP, uapi.IP_MTU_DISCOVER, uapi.IP_PMTUDISC_PROBE)
        sock.confine(str(source))
        sock.sock.setsockopt(socket.SOL_SOCKET, uapi.SO_TIMESTAMPNS, 1)
        asker, loop = Asker(sock, source), asyncio.get_running_loop()
        loop.add_reader(sock.sock, asker.receive)
        try:
            yield asker
        finally:
            loop.remove_reader(sock.sock)
    finally:
        sock.close()


async def refuses(source: IPv4Address, to: IPv4Address, port: int) -> bool:
    """Whether the host answers a datagram for `port` with ICMP port unreachable.

    One byte, which no flannel takes for a packet: a listener drops it. PlatformError.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.IPPROTO_IP, uapi.IP_RECVERR, 1)
        sock.bind((str(source), 0))
        sock.connect((str(to), port))
        for _ in range(TRIES):
            try:
                sock.send(b"\0")
            except OSError as error:
                return error.errno == errno.ECONNREFUSED
            for _ in range(10):
                await asyncio.sleep(TRY_S / 10)
                if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED:
                    return True
    except OSError as error:
        raise PlatformError(f"cannot send to {to}:{port}: {error.strerror}", error.errno) from None
    finally:
        sock.close()
    return False


async def closed_ports(for_s: float = CLOSED_S) -> set[tuple[IPv4Address, int]]:
    """Hosts and their UDP ports that say ICMP port unreachable of themselves, whoever sent there.

    A host says it once a second to each of the others (icmp_ratelimit): traffic to a closed port
    leaves none for a question of ours. Empty without CAP_NET_RAW.
    """
    found: set[tuple[IPv4Address, int]] = set()
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError, TimeoutError):
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK
        with socket.socket(socket.AF_INET, kind, socket.IPPROTO_ICMP) as sock:
            wanted = ~(1 << _UNREACHABLE) & 0xFFFFFFFF
            sock.setsockopt(uapi.SOL_RAW, uapi.ICMP_FILTER, wanted.to_bytes(4, sys.byteorder))
            async with asyncio.timeout(for_s):
                while True:
                    if closed := read_closed(await loop.sock_recv(sock, _RECEIVE_LEN)):
                        found.add(closed)
    return found


def read_closed(packet: bytes) -> tuple[IPv4Address, int] | None:
    """The host and UDP port an ICMP port unreachable is about (RFC 792), if that host sent it."""
    head = (packet[0] & 0xF) * 4 if packet else 0
    quoted = packet[head + 8 :]
    if len(quoted) < ip.MIN_HEADER_LEN or packet[head : head + 2] != _CLOSED:
        return None
    inner = (quoted[0] & 0xF) * 4
    if quoted[9] != socket.IPPROTO_UDP or len(quoted) < inner + 4 or packet[12:16] != quoted[16:20]:
        return None
    return IPv4Address(quoted[16:20]), int.from_bytes(quoted[inner + 2 : inner + 4], "big")
