"""The admin socket's answers about other nodes: they are asked over the overlay.

GET /v1/peers/ask    ?subnet=10.5.2.0/24&what=hello|reach[&start=N]: who holds a subnet, or how that
                     node reaches its peers; JSON, after two seconds at most
GET /v1/peers/trace  ?subnet=..&filter=TEXT[&for=SECONDS]: what the node sees of the packets that it
                     exchanges with this one; a JSON object a line, until the client goes away:
                     {"hello": {...}} first, then {"record": {...}} and, at least once a second,
                     {"lost": records so far, "is_all": no more there now};
                     {"error": text, "result": ...} last if it fails

404: no lease covers the subnet; 400: a wrong query; 409: this backend or daemon cannot; 503: too
many are asked. `PeerDesk` makes the objects; docs/debugging.md has their members.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from ipaddress import IPv4Network
from typing import Any, Final, Protocol

from aiohttp import web

from tundp.errors import TooBusy, UnknownPeer, Unsupported
from tundp.observe.events import BadQuery, tap_request
from tundp.observe.http_server import HttpServer

ASK_PATH: Final = "/v1/peers/ask"
TRACE_PATH: Final = "/v1/peers/trace"
QUESTIONS: Final = ("hello", "reach")
_START_MAX: Final = 0xFFFFFFFF
_FOR_MAX_S: Final = 86400.0


class PeerDesk(Protocol):
    """Who asks other nodes. UnknownPeer, Unsupported and TooBusy say why not."""

    async def ask(self, subnet: IPv4Network, what: str, start: int) -> Mapping[str, Any]:
        """What became of one of QUESTIONS."""
        ...

    def trace(
        self, subnet: IPv4Network, packets: str, seconds: float | None
    ) -> AsyncGenerator[Mapping[str, Any], None]:
        """The objects of a trace. The first one is made when it is asked for."""
        ...


def serve_peers(server: HttpServer, desk: PeerDesk) -> None:
    """Answer questions about other nodes; before `server.open`."""
    server.add(ASK_PATH, functools.partial(_answer_ask, desk))
    server.add(TRACE_PATH, functools.partial(_stream_trace, desk, server.hold))


async def _answer_ask(desk: PeerDesk, request: web.Request) -> web.Response:
    try:
        subnet, query = _subnet(request.query), request.query
        if (what := query.get("what", "hello")) not in QUESTIONS:
            raise BadQuery(f"what must be {' or '.join(QUESTIONS)}")
        start = query.get("start", "0")
        if not (start.isascii() and start.isdigit() and int(start[:12]) <= _START_MAX):
            raise BadQuery(f"start must be a number from 0 to {_START_MAX}")
        return web.json_response(await desk.ask(subnet, what, int(start[:12])))
    except (BadQuery, UnknownPeer, Unsupported, TooBusy) as error:
        return _refused(error)


async def _stream_trace(
    desk: PeerDesk, hold: Callable[[web.Request], object], request: web.Request
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    try:
        packets = tap_request({"filter": request.query.get("filter", "")}).filter.text
        parts = desk.trace(_subnet(request.query), packets, _seconds(request.query))
        hold(request)
        async with aclosing(parts):
            async for part in parts:
                if not response.prepared:
                    await response.prepare(request)
                await response.write(json.dumps(part).encode() + b"\n")
    except (BadQuery, UnknownPeer, Unsupported, TooBusy) as error:
        if not response.prepared:
            return _refused(error)
    except ConnectionError:
        pass
    return response


def _subnet(query: Mapping[str, str]) -> IPv4Network:
    try:
        return IPv4Network(query.get("subnet", ""), strict=False)
    except ValueError:
        raise BadQuery("subnet must be an IPv4 network or address, as 10.5.2.0/24") from None


def _seconds(query: Mapping[str, str]) -> float | None:
    text = query.get("for")
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= _FOR_MAX_S:
        raise BadQuery(f"for must be a number of seconds, at most {_FOR_MAX_S:.0f}")
    return seconds


def _refused(error: Exception) -> web.Response:
    if isinstance(error, BadQuery):
        return web.json_response({"error": str(error), "position": error.position}, status=400)
    status = 404 if isinstance(error, UnknownPeer) else 503 if isinstance(error, TooBusy) else 409
    return web.json_response({"error": str(error)}, status=status)
