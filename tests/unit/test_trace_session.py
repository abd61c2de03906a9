"""`tundp trace` beside a daemon of the test's own: what is shown, and how it ends."""

from __future__ import annotations

import asyncio
import json
import struct
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Final

from tests.unit.test_stories import INNER, drop, outer
from tundp.cli.trace import TraceOptions
from tundp.cli.trace_session import Session
from tundp.observe.events import EventStream
from tundp.observe.stories import Stories
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


async def stream_of(*frames: bytes) -> EventStream:
    reader = asyncio.StreamReader()
    reader.feed_data(b"".join((frame(1, json.dumps(HELLO).encode()), *frames)))
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
