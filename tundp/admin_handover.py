"""Handover by the admin socket: the request, and the connection that becomes the handover's.

GET /v1/handover    HandoverDesk.report as JSON: who this daemon is, and how the last one ended
POST /v1/handover   daemon.handover.protocol.Hello; answered with 101 Switching Protocols, and the
                    connection is the handover's, or {"error": text} with 409 if there is none

The connection is taken from the HTTP server as a duplicate of its descriptor, once that has
closed its own: nothing that comes behind the request is read by HTTP.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from aiohttp import web

from tundp.admin import fetch_document
from tundp.errors import TundpError
from tundp.observe.http_server import HttpServer

HANDOVER_PATH: Final = "/v1/handover"
_CLOSING_S: Final = 2.0


class HandoverDesk(Protocol):
    """Who hands over: daemon.handover.giver.Giver."""

    def report(self) -> Mapping[str, Any]:
        """A JSON object."""
        ...

    def accept(self, document: Any) -> str:
        """Why whoever sent this document gets nothing; empty if `begin` may be called."""
        ...

    def abandon(self) -> None:
        """Nothing came of an `accept` that was empty."""
        ...

    def begin(self, conn: socket.socket, document: Any) -> None:
        """Hand over by `conn`, owned from here on; right after `accept`, once."""
        ...


def serve_handover(server: HttpServer, desk: HandoverDesk) -> None:
    """Answer the requests of the module; before the server is opened."""

    async def answer(_: web.Request) -> web.Response:
        return web.json_response(desk.report())

    async def hand_over(request: web.Request) -> web.StreamResponse:
        try:
            document = json.loads(await request.read())
            why = desk.accept(document)
        except (ValueError, RecursionError):
            why = "the request is no JSON"
        except TundpError as error:
            why = str(error)
        if why:
            return web.json_response({"error": why}, status=409)
        response = web.StreamResponse(
            status=101, headers={"Connection": "Upgrade", "Upgrade": "tundp-handover"}
        )
        response.force_close()
        conn: socket.socket | None = None
        try:
            transport = request.transport
            if transport is None:
                raise web.HTTPBadRequest
            conn = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
            await response.prepare(request)
            await response.write_eof()
        except BaseException:
            # Whoever asked is gone again: the place is free.
            if conn is not None:
                conn.close()
            desk.abandon()
            raise
        task = asyncio.ensure_future(_begin(desk, conn, document, transport))
        _beginning.add(task)
        task.add_done_callback(_beginning.discard)
        return response

    server.add(HANDOVER_PATH, answer)
    server.add(HANDOVER_PATH, hand_over, method="POST")


_beginning: Final[set[asyncio.Task[None]]] = set()
"""Tasks of a moment, kept from the garbage collector."""


async def _begin(
    desk: HandoverDesk, conn: socket.socket, document: Any, transport: asyncio.Transport
) -> None:
    """Begin once HTTP reads no more."""
    deadline = asyncio.get_running_loop().time() + _CLOSING_S
    # A transport has no event for it.
    while not transport.is_closing() and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    # The server closes its own after this round of the loop.
    await asyncio.sleep(0)
    desk.begin(conn, document)


async def fetch_handover(path: Path, *, limit_s: float | None = None) -> dict[str, Any]:
    """HandoverDesk.report of the daemon behind `path`. PlatformError, BadQuery."""
    return await fetch_document(path, HANDOVER_PATH, limit_s=limit_s)
