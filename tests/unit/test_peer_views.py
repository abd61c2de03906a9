"""The other nodes' halves of `tundp trace`: whom it asks, and what of theirs is printed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_peer_trace import ping, sent
from tundp.cli import peer_views
from tundp.cli.trace_session import say
from tundp.wire.filter import parse

FORGED = "9.9\x1b]0;owned\x07\nroot: all is well\u202e"
STATUS: dict[str, Any] = {
    "subnet": "10.5.1.0/24",
    "public_ip": "192.0.2.1",
    "backend": {"port": 8285},
    "peers": [{"public_ip": "192.0.2.2", "subnet": "10.5.2.0/24"}],
}
HELLO = {"version": FORGED, "engine": FORGED, "offset_s": 0.0, "error_s": 0.0}


class Daemon:
    """What the admin socket of this node's daemon says; the filters it is asked for."""

    def __init__(self, *parts: dict[str, Any], status: dict[str, Any]) -> None:
        self.filters: list[str] = []
        self._parts = parts
        self._status = status

    async def status(self, _: Path) -> dict[str, Any]:
        return self._status

    @contextlib.asynccontextmanager
    async def trace(
        self, _: Path, __: IPv4Network, packets: str
    ) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        self.filters.append(packets)

        async def parts() -> AsyncIterator[dict[str, Any]]:
            for part in self._parts:
                yield part
            await asyncio.Event().wait()  # it goes on until it is closed

        yield parts()


def daemon(
    monkeypatch: pytest.MonkeyPatch, *parts: dict[str, Any], status: dict[str, Any] = STATUS
) -> Daemon:
    found = Daemon(*parts, status=status)
    monkeypatch.setattr(peer_views, "fetch_document", found.status)
    monkeypatch.setattr(peer_views, "open_peer_trace", found.trace)
    return found


@pytest.mark.parametrize("part", [{"hello": HELLO}, {"error": FORGED, "result": "refused"}])
async def test_what_another_node_says_is_inert_on_a_terminal(
    part: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon(monkeypatch, part)
    views = peer_views.PeerViews(Path("admin.sock"), parse(""))
    await views.open()
    for news in views.news():
        say(news)
    await views.close()
    line, end = capsys.readouterr().err.split("\n")
    assert "192.0.2.2" in line
    assert r"\x1b]0;owned\x07\nroot: all is well\u202e" in line
    assert line.isprintable()
    assert not end


def test_a_word_of_trace_is_one_inert_line(capsys: pytest.CaptureFixture[str]) -> None:
    say(FORGED)
    assert capsys.readouterr().err == r"9.9\x1b]0;owned\x07\nroot: all is well\u202e" + "\n"


@pytest.mark.parametrize(
    ("packets", "there"),
    [
        ("", ""),
        ("icmp and host 10.5.2.3", "icmp and host 10.5.2.3"),
        ("tcp-syn", "tcp-syn"),
        ("udp port 53", "udp port 53 or fragment"),
        ("greater 1450", ""),
        ("udp and less 100", ""),
        ("not fragment", ""),
        ("tcp port 443 and tcp-fin", ""),
        ("tcp-push", ""),
        ("peer 192.0.2.2", ""),
        ("reason no_route", ""),
    ],
)
async def test_the_other_node_is_asked_for_all_that_a_match_here_becomes(
    packets: str, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = daemon(monkeypatch, {"hello": HELLO})
    views = peer_views.PeerViews(Path("admin.sock"), parse(packets))
    await views.open()
    await views.close()
    assert asked.filters == [there]


@pytest.mark.parametrize(("ended_at", "late_ns"), [(None, 955_000_000), (5.0, 0)])
async def test_what_chaos_of_this_node_delays_is_waited_for(
    ended_at: float | None, late_ns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chaos = {"public_ip": "192.0.2.2", "slowest_s": 0.955, "ended_at": ended_at}
    hello = {"hello": {**HELLO, "subnet": "10.5.2.0/24"}}
    daemon(monkeypatch, hello, status=STATUS | {"chaos": [chaos]})
    views = peer_views.PeerViews(Path("admin.sock"), parse(""))
    await views.open()
    view = views.view_of(sent([ping()]))
    await views.close()
    assert view is not None
    assert view.late_ns == late_ns
    assert view.ends == (IPv4Network("10.5.1.0/24"), IPv4Network("10.5.2.0/24"))
