"""Harmless questions to peers: what is remembered of requests that are over."""

from __future__ import annotations

import asyncio
import socket
from ipaddress import IPv4Address

import pytest

from tundp.doctor.probes import Asker, Question
from tundp.linux.echo_socket import EchoSocket

HERE = IPv4Address("127.0.0.1")
PEERS = 200
EACH = 3


async def test_the_cost_of_a_peer_does_not_grow_with_the_peers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel refuses all requests (port 0 of a UDP socket), so that none is answered."""
    compared = 0
    same = Question.__eq__

    def counted(one: Question, other: object) -> bool:
        nonlocal compared
        compared += 1
        return same(one, other)

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        asker = Asker(EchoSocket(sock, 1), HERE)
        asked = [Question(HERE + number) for number in range(PEERS)]
        assert not await asker.ask(asked, wait_s=0.0)
        monkeypatch.setattr(Question, "__eq__", counted)

        async def series(to: IPv4Address) -> list[int]:
            found = asker.series(to, 64, count=EACH, interval_s=0.0, wait_s=5.0)
            return [each.refusal async for each in found]

        refusals = await asyncio.gather(*(series(each.to) for each in asked))
    assert all(len(each) == EACH and all(each) for each in refusals), "each is refused"
    # A few for each request: in tables, if hashes collide or equal questions are not identical.
    assert compared < 10 * PEERS * EACH
