"""Traffic for labs: pings that read the answers, alone or in a stream; verified TCP streams."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import socket
import struct
import time
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final, Self

from tundp.lab.lab import Host
from tundp.linux import uapi
from tundp.wire import checksum, icmp, ip

_ECHO_REQUEST: Final = 8
_ECHO_REPLY: Final = 0
_ICMP_HEADER: Final = struct.Struct("!BBHHH")
_BLOCK_LEN: Final = 1 << 18
_RECEIVE_BUFFER_LEN: Final = 4 << 20
_LAST_ANSWERS_S: Final = 3.0
"""A stream that ends waits so long for answers still under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back for one echo request."""

    icmp_type: int
    code: int
    source: IPv4Address
    ttl: int
    rtt_s: float
    packet: bytes
    """The whole answer, IP header first."""

    @property
    def is_echo_reply(self) -> bool:
        """Whether the destination itself answered."""
        return self.icmp_type == _ECHO_REPLY

    @property
    def next_hop_mtu(self) -> int:
        """Of a fragmentation-needed error (RFC 1191)."""
        return int.from_bytes(self.packet[26:28], "big")


async def ping(
    host: Host,
    destination: str,
    *,
    size: int = 56,
    ttl: int = 64,
    timeout_s: float = 5.0,
    dont_fragment: bool = False,
) -> Answer | None:
    """Send one echo request of `size` payload bytes; its answer or the ICMP error about it."""
    loop = asyncio.get_running_loop()
    sock = await host.socket(socket.SOCK_RAW, socket.IPPROTO_ICMP)
    with sock:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
        # PROBE sets DF and ignores what the kernel knows of the path.
        discovery = uapi.IP_PMTUDISC_PROBE if dont_fragment else uapi.IP_PMTUDISC_DONT
        sock.setsockopt(socket.IPPROTO_IP, uapi.IP_MTU_DISCOVER, discovery)
        identifier = random.getrandbits(16)
        sent_at = time.perf_counter()
        await loop.sock_sendto(sock, _echo_request(identifier, size), (destination, 0))
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    packet = await loop.sock_recv(sock, 65535)
                    if _is_about(packet, identifier):
                        return _to_answer(packet, time.perf_counter() - sent_at)
        except TimeoutError:
            return None


class PingStream:
    """Echo requests at a steady pace while the block lasts: what was lost, and for how long.

        async with PingStream(host, "10.5.7.0") as stream:
            ...
        assert stream.lost == 0

    A request the kernel refuses to send (no route, device gone) is lost like any other.
    """

    def __init__(self, host: Host, destination: str, *, pause_s: float = 0.01) -> None:
        self._host = host
        self._destination = destination
        self._pause_s = pause_s
        self._identifier = random.getrandbits(16)
        self._sent_at: list[float] = []
        self._answered: set[int] = set()
        self._has_all = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._sock: socket.socket | None = None

    @property
    def sent(self) -> int:
        """Requests so far."""
        return len(self._sent_at)

    @property
    def received(self) -> int:
        """Requests that were answered."""
        return len(self._answered)

    @property
    def lost(self) -> int:
        """Requests that were not; those of the last moments may still be under way."""
        return self.sent - self.received

    @property
    def longest_gap_s(self) -> float:
        """From the first lost request of the longest row of them to the next answered one."""
        longest = 0.0
        began: float | None = None
        for number, sent_at in enumerate(self._sent_at):
            if number in self._answered:
                if began is not None:
                    longest = max(longest, sent_at - began)
                began = None
            elif began is None:
                began = sent_at
        if began is not None:
            longest = max(longest, self._sent_at[-1] - began)
        return longest

    def __str__(self) -> str:
        return f"{self.lost} of {self.sent} pings lost, {self.longest_gap_s:.2f} s at most in a row"

    async def __aenter__(self) -> Self:
        self._sock = await self._host.socket(socket.SOCK_RAW, socket.IPPROTO_ICMP)
        self._sock.setblocking(False)
        # Answers that waited in a queue come all at once, more than the default 208 KB hold.
        self._sock.setsockopt(socket.SOL_SOCKET, uapi.SO_RCVBUFFORCE, _RECEIVE_BUFFER_LEN)
        self._tasks = [asyncio.create_task(step()) for step in (self._send, self._receive)]
        return self

    async def __aexit__(self, *_: object) -> None:
        sending, receiving = self._tasks
        await _ended(sending)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_ANSWERS_S):
                await self._has_all.wait()
        await _ended(receiving)
        assert self._sock is not None
        self._sock.close()

    async def _send(self) -> None:
        assert self._sock is not None
        loop = asyncio.get_running_loop()
        while True:
            request = _echo_request(self._identifier, 56, self.sent & 0xFFFF)
            self._sent_at.append(loop.time())
            self._has_all.clear()
            with contextlib.suppress(OSError):
                await loop.sock_sendto(self._sock, request, (self._destination, 0))
            await asyncio.sleep(self._pause_s)

    async def _receive(self) -> None:
        assert self._sock is not None
        loop = asyncio.get_running_loop()
        while True:
            packet = await loop.sock_recv(self._sock, 65535)
            message = packet[(packet[0] & 0x0F) * 4 :]
            if message[0] == _ECHO_REPLY and _is_about(packet, self._identifier):
                self._note(_ICMP_HEADER.unpack_from(message)[4])

    def _note(self, sequence: int) -> None:
        # The request meant is the latest with these 16 bits.
        number = self.sent - 1 - ((self.sent - 1 - sequence) & 0xFFFF)
        if number >= 0:
            self._answered.add(number)
        if not self.lost:
            self._has_all.set()


async def _ended(task: asyncio.Task[None]) -> None:
    """Cancel `task` and wait for its end; what it failed with is raised."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def transfer(
    source: Host, destination: Host, address: str, *, payload_len: int
) -> tuple[float, bool]:
    """Send random bytes over TCP; seconds taken, and whether the SHA-256 of both ends agree."""
    listener = await destination.socket(socket.SOCK_STREAM)
    with listener:
        listener.bind((address, 0))
        listener.listen(1)
        listener.settimeout(10)
        sender = await source.socket(socket.SOCK_STREAM)
        with sender:
            receiving = asyncio.create_task(asyncio.to_thread(_receive, listener))
            try:
                started = time.perf_counter()
                sender.settimeout(30)
                await asyncio.to_thread(sender.connect, listener.getsockname())
                sent = await asyncio.to_thread(_send, sender, payload_len)
                received = await receiving
                return time.perf_counter() - started, sent == received
            finally:
                receiving.cancel()
                await asyncio.gather(receiving, return_exceptions=True)


def _send(sock: socket.socket, payload_len: int) -> str:
    digest = hashlib.sha256()
    block = bytearray(os.urandom(_BLOCK_LEN))
    left = payload_len
    while left:
        # Every block differs, so that a lost, doubled or swapped one shows.
        struct.pack_into("!Q", block, 0, left)
        piece = memoryview(block)[: min(left, _BLOCK_LEN)]
        digest.update(piece)
        sock.sendall(piece)
        left -= len(piece)
    sock.shutdown(socket.SHUT_WR)
    return digest.hexdigest()


def _receive(listener: socket.socket) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_BLOCK_LEN))
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(30)
        while length := connection.recv_into(buffer):
            digest.update(buffer[:length])
    return digest.hexdigest()


def _echo_request(identifier: int, size: int, sequence: int = 1) -> bytes:
    payload = bytes(number & 0xFF for number in range(size))
    blank = _ICMP_HEADER.pack(_ECHO_REQUEST, 0, 0, identifier, sequence) + payload
    total = checksum.checksum(blank)
    return _ICMP_HEADER.pack(_ECHO_REQUEST, 0, total, identifier, sequence) + payload


def _is_about(packet: bytes, identifier: int) -> bool:
    """Whether `packet` answers, or reports an error about, our echo request."""
    header_len = (packet[0] & 0x0F) * 4
    message = packet[header_len:]
    if len(message) < _ICMP_HEADER.size:
        return False
    if message[0] in (icmp.TYPE_DEST_UNREACHABLE, icmp.TYPE_TIME_EXCEEDED):
        quote = message[8:]
        if len(quote) < ip.MIN_HEADER_LEN:
            return False
        message = quote[(quote[0] & 0x0F) * 4 :]
        expected = _ECHO_REQUEST
    else:
        expected = _ECHO_REPLY
    return (
        len(message) >= _ICMP_HEADER.size
        and message[0] == expected
        and _ICMP_HEADER.unpack_from(message)[3] == identifier
    )


def _to_answer(packet: bytes, rtt_s: float) -> Answer:
    header_len = (packet[0] & 0x0F) * 4
    return Answer(
        icmp_type=packet[header_len],
        code=packet[header_len + 1],
        source=IPv4Address(packet[12:16]),
        ttl=packet[8],
        rtt_s=rtt_s,
        packet=packet,
    )
