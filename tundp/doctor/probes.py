"""Harmless questions to peers: echo requests over either network, a datagram to their port."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final

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


@dataclass(frozen=True, slots=True)
class Question:
    """One echo request: to whom, and how long the IPv4 packet is."""

    to: IPv4Address
    packet_len: int = SMALL


class Asker:
    """Sends echo requests from one address and collects the answers."""

    def __init__(self, sock: EchoSocket, source: IPv4Address) -> None:
        self._echo = sock
        self._source = source
        self._waiting: dict[bytes, Question] = {}
        self._sent_at: dict[bytes, float] = {}
        self._rtt_s: dict[Question, float] = {}

    async def ask(self, questions: Collection[Question]) -> dict[Question, float]:
        """Seconds to the first answer, of those that were answered."""
        reader = asyncio.ensure_future(self._read())
        try:
            for number in range(TRIES):
                left = [each for each in questions if each not in self._rtt_s]
                if not left:
                    break
                for each in left:
                    self._send(each)
                await self._wait_for(left, TRY_S if number + 1 < TRIES else WAIT_S)
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
        return {each: self._rtt_s[each] for each in questions if each in self._rtt_s}

    async def _wait_for(self, questions: Collection[Question], limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if all(each in self._rtt_s for each in questions):
                return
            await asyncio.sleep(0.01)

    def _send(self, question: Question) -> None:
        cookie = secrets.token_bytes(echo.COOKIE_LEN)
        packet = echo.build_request(
            question.packet_len,
            source=int(self._source),
            destination=int(question.to),
            identifier=self._echo.identifier,
            cookie=cookie,
        )
        self._waiting[cookie] = question
        self._sent_at[cookie] = time.monotonic()
        # A refusal is no answer; what refuses it has a check of its own.
        with contextlib.suppress(OSError):
            self._echo.sock.sendto(packet[ip.MIN_HEADER_LEN :], (str(question.to), 0))

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            packet = await loop.sock_recv(self._echo.sock, _RECEIVE_LEN)
            answer = echo.read_reply(packet)
            if answer is None or (question := self._waiting.get(answer.cookie)) is None:
                continue
            if answer.source == int(question.to):
                self._rtt_s.setdefault(question, time.monotonic() - self._sent_at[answer.cookie])


@contextlib.asynccontextmanager
async def asking(source: IPv4Address) -> AsyncIterator[Asker]:
    """Ask from this address, with DF set. PlatformError without CAP_NET_RAW, or without it."""
    sock = open_echo_socket()
    try:
        sock.sock.setsockopt(socket.IPPROTO_IP, uapi.IP_MTU_DISCOVER, uapi.IP_PMTUDISC_PROBE)
        sock.confine(str(source))
        yield Asker(sock, source)
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
