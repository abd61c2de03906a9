"""Hostile clients of the server behind admin socket, health and metrics, on both event loops."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import resource
import select
import socket
import tempfile
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.loops import LOOPS, run_on
from tests.wait import DEADLINE_S, until
from tundp.observe import http_server
from tundp.observe.http_server import (
    BODY_LEN,
    CONNECTIONS,
    HttpServer,
    Shared,
    connections_max,
    paced,
)

BIG = b"x" * 8_000_000
"""More than the buffers of a socket hold."""
BIG_LEN = len(BIG)
HOST = b" HTTP/1.1\r\nHost: x\r\n\r\n"
GET = b"GET /small HTTP/1.1\r\nHost: x\r\n\r\n"
GET_BIG = b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n"
Connect = Callable[[], Coroutine[Any, Any, tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


async def small(_: web.Request) -> web.Response:
    return web.Response(text="here")


async def length(request: web.Request) -> web.Response:
    return web.Response(text=f"{len(await request.read())} bytes")


async def big(_: web.Request) -> web.Response:
    return web.Response(body=BIG)


@contextlib.asynccontextmanager
async def server(family: str) -> AsyncIterator[Connect]:
    """What connects to a server on a unix or a TCP socket; connections end with the block."""
    with contextlib.ExitStack() as stack:
        kind = socket.AF_UNIX if family == "unix" else socket.AF_INET
        sock = stack.enter_context(socket.socket(kind, socket.SOCK_STREAM))
        sock.setblocking(False)
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="web"))
        path = str(Path(directory) / "s")
        sock.bind(path if family == "unix" else ("127.0.0.1", 0))
        sock.listen(128)
        address = sock.getsockname()

        async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            if family == "unix":
                opened = await asyncio.open_unix_connection(path)
            else:
                opened = await asyncio.open_connection(*address)
            stack.callback(opened[1].close)
            return opened

        web_server = HttpServer({"/small": small, "/big": big}, stop_s=0.1)

        async def ticks(request: web.Request) -> web.StreamResponse:
            web_server.hold(request)
            response = web.StreamResponse()
            await response.prepare(request)
            with contextlib.suppress(ConnectionError):
                while True:
                    await response.write(b"tick")
                    await asyncio.sleep(0.01)
            return response

        web_server.add("/ticks", ticks)
        web_server.add("/length", length, method="POST")
        await web_server.open()
        listening = await web_server.listen(sock)
        try:
            yield connect
        finally:
            listening.close()
            await web_server.close()


@pytest.fixture(params=["tcp", "unix"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=sorted(LOOPS))
def run(request: pytest.FixtureRequest) -> Iterator[Callable[[Coroutine[Any, Any, None]], None]]:
    """Runs a coroutine on each kind of event loop."""
    yield lambda main: run_on(LOOPS[request.param], main, hang_s=DEADLINE_S)


Run = Callable[[Coroutine[Any, Any, None]], None]


async def answer_of(connect: Connect, request: bytes = GET) -> bytes:
    """All a server sends until it closes, and b"" for a reset without any."""
    reader, writer = await connect()
    with contextlib.suppress(ConnectionError):
        writer.write(request)
        await writer.drain()
    found = b""
    with contextlib.suppress(ConnectionError):
        while part := await reader.read(1 << 16):
            found += part
    return found


async def hold(connect: Connect, request: bytes) -> socket.socket:
    """A connection that sends `request` and reads nothing."""
    _, writer = await connect()
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(request)
    sock: socket.socket = writer.get_extra_info("socket")
    return sock


def is_gone(sock: socket.socket) -> bool:
    """Whether the kernel says that the other end has closed or reset; nothing is read."""
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLRDHUP)
    return bool(poll.poll(0))


@pytest.mark.parametrize(
    "request_",
    [b"", GET[:-2], GET_BIG, b"POST /small HTTP/1.1\r\nContent-Length: 99\r\n\r\n"],
    ids=["silent", "half a request", "an answer never read", "a body that never comes"],
)
def test_more_connections_than_there_may_be_cost_old_ones(
    run: Run, family: str, request_: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "CONNECTIONS", 10)
    monkeypatch.setattr(http_server, "LIFE_S", DEADLINE_S * 2)

    async def main() -> None:
        async with server(family) as connect:
            held = [await hold(connect, request_) for _ in range(40)]
            assert b"\r\n\r\nhere" in await answer_of(connect)
            await until(lambda: sum(map(is_gone, held)) >= 30, "all but ten connections are closed")
            assert b"\r\n\r\nhere" in await answer_of(connect)

    run(main())


@pytest.mark.parametrize(
    "request_",
    [b"", GET[:-2], GET_BIG],
    ids=["silent", "half a request", "an answer never read"],
)
def test_no_connection_lasts(
    run: Run, family: str, request_: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "LIFE_S", 0.3)

    async def main() -> None:
        async with server(family) as connect:
            held = await hold(connect, request_)
            await until(lambda: is_gone(held), "the server has closed it")

    run(main())


def test_a_stream_lasts_and_makes_room_for_nobody(
    run: Run, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "LIFE_S", 0.3)
    monkeypatch.setattr(http_server, "YOUNG_S", 0.0)

    async def main() -> None:
        async with server(family) as connect:
            reader, writer = await connect()
            writer.write(b"GET /ticks" + HOST)
            assert b"tick" in await reader.readuntil(b"tick")
            silent, _ = await connect()
            crowd = [await connect() for _ in range(connections_max() + 40)]
            with contextlib.suppress(ConnectionError):
                assert await silent.read() == b""  # too old, as is the stream
            with contextlib.suppress(ConnectionError):
                assert await crowd[0][0].read() == b""
            # More than has been waiting here since the others were closed.
            for _ in range(150):
                await reader.readuntil(b"tick")

    run(main())


def test_one_answer_a_connection(run: Run, family: str) -> None:
    async def main() -> None:
        async with server(family) as connect:
            found = await answer_of(connect, GET * 500)
            assert found.count(b"HTTP/1.1 ") == 1
            assert found.endswith(b"\r\n\r\nhere")
            assert b"connection: close" in found.lower()

    run(main())


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /" + b"x" * 100_000 + HOST, b"400"),
        (b"GET /small" + HOST[:-2] + b"A: " + b"x" * 100_000 + b"\r\n\r\n", b"400"),
        (b"GET /small" + HOST[:-2] + b"A: x\r\n" * 10_000 + b"\r\n", b"400"),
        (
            b"POST /small" + HOST[:-2] + b"Content-Length: 1000000\r\n\r\n" + bytes(1_000_000),
            b"405",
        ),
        (b"POST /small" + HOST[:-2] + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n", b"400"),
        ((b"GET /nowhere" + HOST) * 50, b"404"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"400"),
    ],
    ids=["line", "header", "headers", "body", "chunks", "path", "TLS"],
)
def test_what_is_refused_is_refused_at_once(
    run: Run, family: str, request_: bytes, status: bytes
) -> None:
    async def main() -> None:
        async with server(family) as connect:
            found = await answer_of(connect, request_)
            # A reset may overtake the answer, while more is sent than the server reads.
            assert found.split(b" ", 2)[1:2] in ([status], []), found[:200]
            assert found.count(b"HTTP/1.1 ") <= 1
            assert b"\r\n\r\nhere" in await answer_of(connect)

    run(main())


def post(body: bytes, *fields: bytes) -> bytes:
    """A request whose body has a length."""
    head = (b"Content-Length: %d" % len(body), *fields)
    return b"POST /length" + HOST[:-2] + b"".join(each + b"\r\n" for each in head) + b"\r\n" + body


def test_a_body_is_read_up_to_its_bound(run: Run, family: str) -> None:
    async def main() -> None:
        async with server(family) as connect:
            for body, text in ((b"", b"0 bytes"), (bytes(BODY_LEN), b"4096 bytes")):
                assert (await answer_of(connect, post(body))).endswith(b"\r\n\r\n" + text)
            for body in (bytes(BODY_LEN + 1), bytes(60_000)):
                found = await answer_of(connect, post(body))
                assert found.split(b" ", 2)[1:2] in ([b"413"], []), found[:200]
                assert b" bytes" not in found
            # What it would be decompressed is not looked at.
            bomb = gzip.compress(bytes(2_000_000))
            assert len(bomb) < BODY_LEN
            found = await answer_of(connect, post(bomb, b"Content-Encoding: gzip"))
            assert found.endswith(b"%d bytes" % len(bomb)), found[:200]

    run(main())


@pytest.mark.parametrize("path", ["/length", "/small", "/nowhere"])
def test_bodies_without_end_cost_no_memory(run: Run, family: str, path: str) -> None:
    head = b"POST " + path.encode() + HOST[:-2] + b"Transfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"

    async def flood(connect: Connect) -> int:
        """Send until the server ends it; the bytes that it, or a socket's buffer, took."""
        _, writer = await connect()
        taken = 0
        with contextlib.suppress(ConnectionError):
            writer.write(head)
            while taken < BIG_LEN:
                writer.write(chunk)
                await writer.drain()
                taken += len(chunk)
        return taken

    async def main() -> None:
        async with server(family) as connect:
            await answer_of(connect)
            tracemalloc.start()
            try:
                taken = await asyncio.gather(*(flood(connect) for _ in range(8)))
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            assert max(taken) < BIG_LEN, taken
            assert peak < BIG_LEN, peak  # what the clients have to send is in it
            assert b"\r\n\r\nhere" in await answer_of(connect)

    run(main())


def test_a_thousand_silent_ones_keep_nobody_from_an_answer(run: Run, family: str) -> None:
    async def main() -> None:
        async with server(family) as connect:
            for number in range(600):
                await connect()
                if number % 100 == 99:
                    assert b"\r\n\r\nhere" in await answer_of(connect)

    run(main())


async def test_those_who_ask_at_once_get_one_value() -> None:
    made = 0
    gate = asyncio.Event()

    async def make() -> int:
        nonlocal made
        made += 1
        number = made
        await gate.wait()
        return number

    shared = Shared(make)
    first = [asyncio.ensure_future(shared.get()) for _ in range(50)]
    await until(lambda: made == 1)
    later = [asyncio.ensure_future(shared.get()) for _ in range(50)]
    await asyncio.sleep(0)
    # One who goes away takes nothing from the others.
    first.pop().cancel()
    later.pop().cancel()
    await asyncio.sleep(0)
    assert made == 1
    gate.set()
    assert set(await asyncio.gather(*first)) == {1}
    assert set(await asyncio.gather(*later)) == {2}, "begun after it was asked for"
    assert await shared.get() == 3


async def test_a_crowd_leaves_the_loop_half_of_its_time() -> None:
    """What takes 20 ms is asked for by 100 at a time, again and again: the loop serves others."""
    made = 0

    def make() -> int:
        nonlocal made
        made += 1
        time.sleep(0.02)
        return made

    shared = Shared(paced(make))
    clock = asyncio.get_running_loop().time

    async def ask() -> None:
        while clock() < until_s:
            await shared.get()

    until_s = clock() + 0.6
    began_s = clock()
    await asyncio.gather(*(ask() for _ in range(100)))
    took_s = clock() - began_s
    assert 2 <= made <= took_s / 0.02 / 2 + 1


async def test_a_making_that_fails_fails_for_those_who_waited_only() -> None:
    answers: list[RuntimeError | int] = [RuntimeError("no"), 7]

    async def make() -> int:
        answer = answers.pop(0)
        if isinstance(answer, int):
            return answer
        raise answer

    shared = Shared(make)
    with pytest.raises(RuntimeError, match="no"):
        await shared.get()
    assert await shared.get() == 7


@pytest.mark.parametrize(
    ("files", "most"),
    [(resource.RLIM_INFINITY, CONNECTIONS), (1 << 20, CONNECTIONS), (256, 32), (30, 8)],
)
def test_few_open_files_allow_fewer_connections(
    monkeypatch: pytest.MonkeyPatch, files: int, most: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert connections_max() == most
