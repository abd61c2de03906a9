"""Chaos by the admin socket, server and client.

GET /v1/chaos     {"chaos": [observe.status.ChaosStatus, ...]}: what lasts, then what ended
POST /v1/chaos    observe.chaos.Order begins; {"stop": PEER or "all"} ends. The same answer, of
                  what was begun or ended; {"error": text} with 409 if nothing was done

The command is a messenger: the daemon ends what it began, whatever becomes of who asked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, Protocol

from aiohttp import web

from tundp.admin import send_document
from tundp.errors import PlatformError, Unsupported
from tundp.observe import codec
from tundp.observe.chaos import Order
from tundp.observe.codec import Malformed
from tundp.observe.http_server import HttpServer
from tundp.observe.status import ChaosStatus

CHAOS_PATH: Final = "/v1/chaos"


class ChaosDesk(Protocol):
    """Where chaos is asked for. Unsupported and PlatformError say why nothing was done."""

    async def begin_chaos(self, document: Mapping[str, Any]) -> Sequence[ChaosStatus]:
        """Begin what an Order's document asks for; what began."""
        ...

    def stop_chaos(self, peer: str) -> Sequence[ChaosStatus]:
        """End chaos for a peer, or `all`; what was ended."""
        ...

    def chaos(self) -> Sequence[ChaosStatus]:
        """What lasts, then what ended."""
        ...


def serve_chaos(server: HttpServer, desk: ChaosDesk) -> None:
    """Answer the requests of the module; before the server is opened."""

    async def answer(_: web.Request) -> web.Response:
        try:
            return _answer(desk.chaos())
        except Unsupported as error:
            return _refusal(error)

    async def act(request: web.Request) -> web.Response:
        try:
            document = json.loads(await request.read())
        except (ValueError, RecursionError):
            return _refusal("the request is no JSON")
        try:
            stop = document.get("stop") if isinstance(document, dict) else None
            if stop is None:
                return _answer(await desk.begin_chaos(document))
            if not isinstance(stop, str):
                return _refusal("stop is no text: a peer, or all")
            return _answer(desk.stop_chaos(stop))
        except (Unsupported, PlatformError) as error:
            return _refusal(error)

    server.add(CHAOS_PATH, answer)
    server.add(CHAOS_PATH, act, method="POST")


async def begin_chaos(path: Path, order: Order) -> list[ChaosStatus]:
    """Have the daemon behind `path` impair packets; what began. PlatformError with its reason."""
    return _read(path, await send_document(path, CHAOS_PATH, order.to_json()))


async def stop_chaos(path: Path, peer: str) -> list[ChaosStatus]:
    """Have the daemon behind `path` end chaos for a peer, or `all`; what was ended."""
    return _read(path, await send_document(path, CHAOS_PATH, {"stop": peer}))


async def fetch_chaos(path: Path) -> list[ChaosStatus]:
    """What the daemon behind `path` impairs, then what ended."""
    return _read(path, await send_document(path, CHAOS_PATH, None))


def _answer(found: Sequence[ChaosStatus]) -> web.Response:
    return web.json_response({"chaos": [codec.to_json(each) for each in found]})


def _refusal(error: Exception | str) -> web.Response:
    return web.json_response({"error": str(error)}, status=HTTPStatus.CONFLICT)


def _read(path: Path, document: Any) -> list[ChaosStatus]:
    try:
        return [codec.from_json(ChaosStatus, each) for each in document["chaos"]]
    except (KeyError, TypeError, Malformed) as error:
        raise PlatformError(f"{path}: {error}; restart the daemon with this version") from None
