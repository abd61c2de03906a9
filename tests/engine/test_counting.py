"""What is rare on a real kernel and must be counted all the same."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.packets import udp
from tests.routes import fib_of
from tests.wait import until
from tundp.choices import Engine, SourceCheck
from tundp.engine.base import EngineContext
from tundp.engine.native.engine import NativeEngine
from tundp.engine.reference import ReferenceEngine
from tundp.linux import uapi
from tundp.linux.offload import ALL, KernelOffloads
from tundp.linux.tun import Tun
from tundp.linux.udp import open_udp
from tundp.wire.drop import DropReason
from tundp.wire.policy import Policy

LAST = 2**32 - 1


def context() -> EngineContext:
    return EngineContext(
        fib=fib_of(("10.5.2.0/24", "127.0.0.1"), own="10.5.1.0/24"),
        policy=Policy(tun_address=0x0A050100, source_check=SourceCheck.OFF, port=8285),
        loop=asyncio.get_running_loop(),
    )


class Overflowing:
    """A UDP socket whose every datagram tells how many the kernel dropped since it was opened."""

    def __init__(self, reports: list[int]) -> None:
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.bind(("127.0.0.1", 0))
        self.reports = reports

    def fileno(self) -> int:
        return self._sock.fileno()

    def getsockname(self) -> Any:
        return self._sock.getsockname()

    def setsockopt(self, *option: Any) -> None:
        self._sock.setsockopt(*option)

    def getsockopt(self, *option: Any) -> Any:
        return self._sock.getsockopt(*option)

    def ring(self) -> None:
        """Make it readable: the engine then takes every report there is."""
        self._sock.sendto(b"", self.getsockname())

    def close(self) -> None:
        self._sock.close()

    def recvmsg_into(self, buffers: list[memoryview], _: int) -> Any:
        if not self.reports:
            self._sock.recv(1)
            raise BlockingIOError
        drops = struct.pack("=I", self.reports.pop(0) & LAST)
        return 0, [(socket.SOL_SOCKET, uapi.SO_RXQ_OVFL, drops)], 0, ("127.0.0.1", 9)


async def test_socket_overflows_never_go_back() -> None:
    # The kernel counts modulo 2^32, and from zero for a new socket. The C engines:
    # tests/native/test_native.c.
    with contextlib.closing(Overflowing([10, LAST, LAST + 6])) as sock, pair_for_tun() as (_, tun):
        engine = ReferenceEngine(cast(socket.socket, sock), context())
        try:
            engine.attach(tun)
            sock.ring()
            await until(lambda: engine.counters().socket_overflows == LAST + 6)
            engine.detach()
            engine.rebound()
            engine.attach(tun)
            sock.reports = [3, 4]
            sock.ring()
            await until(lambda: engine.counters().socket_overflows == LAST + 6 + 4)
        finally:
            engine.stop()


@contextlib.contextmanager
def pair_for_tun() -> Iterator[tuple[socket.socket, Tun]]:
    """Our end of a socket pair, and the other as a TUN with vnet headers: reads of any length."""
    with contextlib.ExitStack() as stack:
        ours, theirs = map(stack.enter_context, socket.socketpair(type=socket.SOCK_SEQPACKET))
        theirs.setblocking(False)
        granted = dict.fromkeys(("has_vnet_header", "has_tso", "has_uso", "knows_uso"), True)
        fd = theirs.fileno()
        yield ours, cast(Tun, SimpleNamespace(name="pair", fd=fd, fds=(fd,), **granted))


@pytest.mark.parametrize("length", [1, 9])
async def test_a_read_shorter_than_a_vnet_header_is_dropped_by_name(length: int) -> None:
    with open_udp(IPv4Address("127.0.0.1"), 0) as sock, pair_for_tun() as (ours, tun):
        kernel = KernelOffloads(offloads=ALL, max_segments=64, missing={})
        engine = NativeEngine(Engine.GSO, [sock], context(), kernel=kernel)
        try:
            engine.attach(tun)
            ours.send(bytes(length))
            ours.send(bytes(10) + udp(b"x", source="10.5.1.2", destination="10.5.2.2"))
            await until(lambda: engine.counters().encap.packets_in == 2)
            counted = engine.counters().encap
            assert counted.is_conserved
            assert (counted.reads, counted.packets_out) == (2, 1)
            assert counted.drops[DropReason.BAD_VNET_HEADER] == 1
        finally:
            engine.stop()
