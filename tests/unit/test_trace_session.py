"""`tundp trace` beside a daemon of the test's own: what is shown, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import struct
import time
from collections.abc import AsyncIterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Final

import pytest

from tests.unit.test_stories import INNER, drop, outer
from tests.wait import until
from tundp.cli import capture_session
from tundp.cli.capture import CaptureOptions
from tundp.cli.trace import TraceOptions
from tundp.cli.trace_session import Session
from tundp.observe.events import EventStream, Hello, frames
from tundp.observe.stories import Stories
from tundp.wire.event import Record, Stage
from tundp.wire.filter import parse

HELLO: Final = {
    "version": "0.2.0",
    "node": "192.0.2.1",
    "network": "10.5.0.0/16",
    "subnet": "10.5.1.0/24",
    "tun": "flannel0",
    "mtu": 1472,
    "port": 8285,
    "engine": "gso",
    "workers": 1,
    "unix_ns": 0,
    "reasons": [],
}


def frame(kind: int, data: bytes) -> bytes:
    return struct.pack("=II", kind, len(data)) + data


class NoPeers:
    async def subnets_of(self, address: IPv4Address) -> tuple[IPv4Network, ...]:
        return ()


async def stream_of(*frames: bytes, is_open: bool = False) -> EventStream:
    reader = asyncio.StreamReader()
    reader.feed_data(b"".join((frame(1, json.dumps(HELLO).encode()), *frames)))
    if not is_open:
        reader.feed_eof()
    stream = EventStream(reader.readexactly, NoPeers())
    await stream.begin()
    return stream


async def shown_of(packet: bytes, text: str = "") -> int:
    """How many stories a drop of the kernel makes in a trace of both nodes."""
    session, stories = Session(TraceOptions(), Path("none"), parse(text)), Stories(has_paths=True)
    session._add_drops([drop(packet)], await stream_of(), stories, 0)
    return len(stories)


async def test_a_drop_whose_inside_is_out_of_sight_is_shown_beside_peers() -> None:
    """A train of datagrams: that nodes' own messages are not shown must not hide it."""
    train = outer(INNER)[:28]
    assert await shown_of(train) == 1
    assert await shown_of(train, "peer 192.0.2.2") == 1
    assert await shown_of(train, "peer 192.0.2.3") == 0
    assert await shown_of(train, "udp") == 0, "nobody can know"
    assert await shown_of(outer(INNER)) == 1
    message = INNER[:9] + bytes([253]) + INNER[10:]
    assert await shown_of(outer(message)) == 0, "a message between the nodes"


@contextlib.asynccontextmanager
async def daemon(path: Path, *parts: bytes) -> AsyncIterator[asyncio.Event]:
    """Answers the first question with `parts`, then is silent; set once it is asked."""
    asked = asyncio.Event()
    answers: list[asyncio.Task[None] | None] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers.append(asyncio.current_task())
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"".join(parts))
        asked.set()
        await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(answer, path)
    async with server:
        yield asked
        await asyncio.wait([each for each in answers if each is not None], timeout=20)


async def test_what_waits_is_shown_when_the_time_is_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A read whose send has not come yet waits 0.2 s; it was read before the trace ended."""
    record = Record(
        stage=Stage.TUN_READ,
        packet_id=1,
        hop=0,
        length=len(INNER),
        packet=INNER,
        time_ns=time.time_ns(),
    )
    records = frame(2, struct.pack("=II", 0, 0) + record.pack())
    hello = frame(1, json.dumps(HELLO).encode())
    options = TraceOptions(for_=0.1, kernel=False, peers=False)
    path = tmp_path / "socket"
    async with daemon(path, b"HTTP/1.1 200 OK\r\n\r\n", hello, records):
        assert await Session(options, path, parse("")).run() == 0
    shown = capsys.readouterr().out
    assert "#1 10.5.1.2:7000 > 10.5.2.3" in shown, shown


@pytest.mark.parametrize("command", ["trace", "trace beside peers", "capture"])
async def test_a_signal_ends_the_wait_for_a_silent_daemon(tmp_path: Path, command: str) -> None:
    path = tmp_path / "socket"
    async with daemon(path) as asked:
        session: Session | capture_session.Session
        if command == "capture":
            session = capture_session.Session(CaptureOptions(), path, "")
        else:
            options = TraceOptions(kernel=False, peers=command == "trace beside peers")
            session = Session(options, path, parse(""))
        running = asyncio.ensure_future(session.run())
        await asyncio.wait_for(asked.wait(), 20)
        os.kill(os.getpid(), signal.SIGINT)
        async with asyncio.timeout(20):
            assert await running == 0


async def test_an_end_of_nft_monitor_is_said_and_the_trace_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    session = Session(TraceOptions(peers=False), Path("none"), parse(""))
    stream = await stream_of(is_open=True)

    async def nothing() -> AsyncIterator[object]:
        empty: list[object] = []
        for each in empty:
            yield each

    showing = asyncio.ensure_future(session._show_all(stream, {"paths": nothing()}))
    said = ""

    def is_said() -> bool:
        nonlocal said
        said += capsys.readouterr().err
        return "nft monitor ended after" in said or showing.done()

    await until(is_said, "a word about nft")
    assert not showing.done()
    session._stop.set()
    await showing
    await session._say_end(stream)
    assert "netfilter's rules were not looked at from then on" in said
    assert "nft monitor ended after" in capsys.readouterr().err, "also at the end"


class Ring:
    """A tap whose rings take a while to be read."""

    def __init__(self) -> None:
        self.read_at: list[int] = []

    def read(self) -> list[tuple[int, bytes]]:
        self.read_at.append(time.monotonic_ns())
        return []

    def lost(self) -> list[int]:
        return [0]

    def close(self) -> None:
        pass


async def test_a_note_says_up_to_when_everything_was_told() -> None:
    """By the time before the look, so that what is written during it is not said to be told."""
    ring, before = Ring(), time.time_ns()
    told = frames(ring, Hello.parse(json.dumps(HELLO).encode()))
    sent = [await anext(told) for _ in range(2)]
    await told.aclose()
    stream = EventStream(reader_of(*sent).readexactly, NoPeers())
    await stream.begin()
    assert stream.heard_ns is None
    assert [each async for each in stream.raw()] == []
    assert stream.heard_ns is not None
    assert before <= stream.heard_ns <= ring.read_at[0] + time.time_ns() - time.monotonic_ns()
    old = await stream_of(frame(3, json.dumps({"lost": {}}).encode()))
    assert [each async for each in old.raw()] == []
    assert old.heard_ns is None, "a daemon of 0.1 does not say"


def reader_of(*parts: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    reader.feed_data(b"".join(parts))
    reader.feed_eof()
    return reader
