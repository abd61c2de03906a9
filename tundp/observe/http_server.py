"""An HTTP server for short questions whose connections and requests are bounded.

Of the admin socket, of health and of metrics. Whoever may connect is trusted with nothing:

    connections   CONNECTIONS at a time, of each server. One more costs the oldest that has asked
                  nothing yet, else the oldest: a probe is answered beside thousands of silent ones
    requests      one a connection, which is then closed; LINE_LEN bytes of its first line, FIELDS
                  headers of FIELD_LEN; a body only where a path reads one (POST), BODY_LEN bytes at
                  most, never decompressed: a longer one is answered with 413
    time          LIFE_S for request, answer and the client's reading of it; a stream (`hold`) lasts
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Generic, TypeVar

from aiohttp import web

T = TypeVar("T")

BACKLOG: Final = 128
"""Connections the kernel completes before they are accepted."""
CONNECTIONS: Final = 128
"""At a time, of each server; fewer where few files may be open."""
CONNECTIONS_LEAST: Final = 8
FILES_SHARE: Final = 8
"""One of so many files that may be open is a connection's, of each server."""
LIFE_S: Final = 30.0
"""Seconds of one connection: a status of 65,000 peers takes seconds on a busy machine."""
YOUNG_S: Final = 0.5
"""A connection has so long for its request before silent ones are the first to make room."""
LINE_LEN: Final = 2048
FIELD_LEN: Final = 4096
FIELDS: Final = 64
BODY_LEN: Final = 4096
_SWEEP_S: Final = 0.5
_SOON_S: Final = 0.02
"""Between two looks at the connections: while there are any, while there are too many."""
_AT_ONCE: Final = struct.pack("ii", 1, 0)
"""struct linger: on, 0 seconds (socket(7))."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpServer:
    """GET for some paths, and POST for those that `add` names, on a listening socket or several."""

    def __init__(self, routes: Mapping[str, Handler], *, stop_s: float) -> None:
        """stop_s: seconds which answers under way get when it is closed."""
        self._app = web.Application(middlewares=[self._answer_once], client_max_size=BODY_LEN)
        for path, handler in routes.items():
            self.add(path, handler)
        self._runner = web.AppRunner(
            self._app,
            access_log=None,
            handle_signals=False,
            shutdown_timeout=stop_s,
            keepalive_timeout=LIFE_S,
            lingering_time=0.0,
            max_line_size=LINE_LEN,
            max_field_size=FIELD_LEN,
            max_headers=FIELDS,
            auto_decompress=False,
            read_bufsize=BODY_LEN,
        )
        self._most = connections_max()
        self._open: dict[web.RequestHandler, float] = {}
        """Connections by age, the oldest first: when each was accepted, in event loop time."""
        self._transports: dict[web.RequestHandler, asyncio.Transport] = {}
        """A connection that is closing forgets its own, but may have bytes to write."""
        self._asked: set[web.RequestHandler] = set()
        """Those whose request has come."""
        self._held: dict[web.RequestHandler, asyncio.Task[None]] = {}
        """Those whose answer has no end, and who makes it."""
        self._swept_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def add(self, path: str, handler: Handler, *, method: str = "GET") -> None:
        """Answer one more path; before `open`."""
        self._app.router.add_route(method, path, handler)

    def hold(self, request: web.Request) -> None:
        """The answer to a request is a stream: it may last, and makes room for nobody.

        Whoever answers so bounds how many there are.
        """
        self._held[request.protocol] = request.task

    async def open(self) -> None:
        """Make ready to listen."""
        await self._runner.setup()

    async def listen(self, sock: socket.socket) -> asyncio.AbstractServer:
        """Answer on a listening socket, unix or TCP, until what is returned is closed."""
        loop = asyncio.get_running_loop()
        return await loop.create_server(self._accept, sock=sock, backlog=BACKLOG)

    async def close(self) -> None:
        """End every connection. What `listen` returned is the caller's to close, before."""
        if self._timer is not None:
            self._timer.cancel()
        # aiohttp would wait for requests that may never come, and for answers without an end.
        for handler in self._open:
            transport = handler.transport
            if handler not in self._asked and transport is not None:
                _drop(handler, transport)
        for stream in self._held.values():
            stream.cancel()
        await self._runner.cleanup()
        for handler, transport in self._transports.items():
            _drop(handler, transport)

    @web.middleware
    async def _answer_once(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Close the connection after the answer: what is sent behind a request is never kept."""
        self._asked.add(request.protocol)
        try:
            response = await handler(request)
        except web.HTTPException as refusal:
            refusal.force_close()
            raise
        response.force_close()
        return response

    def _accept(self) -> web.RequestHandler:
        assert self._runner.server is not None
        handler = self._runner.server()
        self._open[handler] = asyncio.get_running_loop().time()
        self._look_again()
        return handler

    def _look_again(self) -> None:
        """Look soon if there are too many, else in a while."""
        loop = asyncio.get_running_loop()
        due = loop.time() + (_SOON_S if len(self._open) > self._most else _SWEEP_S)
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = loop.call_at(due, self._sweep)

    def _sweep(self) -> None:
        """Forget connections that have ended; end those that are too old or too many."""
        self._timer = None
        if self._runner.server is None:
            return
        now = asyncio.get_running_loop().time()
        known = set(self._runner.server.connections)
        for handler, since in list(self._open.items()):
            if handler in known:
                if handler.transport is not None:
                    self._transports[handler] = handler.transport
            elif since < self._swept_at:  # else it may not be connected yet
                del self._open[handler]
                self._transports.pop(handler, None)
                self._asked.discard(handler)
                self._held.pop(handler, None)
        self._swept_at = now
        live = [each for each in self._open if each in known and each not in self._held]
        excess = len(live) - self._most
        for number, handler in enumerate(sorted(live, key=lambda each: self._rank(each, now))):
            is_over = number < excess or now - self._open[handler] > LIFE_S
            if is_over and (transport := self._transports.get(handler)) is not None:
                _drop(handler, transport)
        if self._open:
            self._look_again()

    def _rank(self, handler: web.RequestHandler, now: float) -> int:
        """The higher, the later it has to make room; of equal ones the oldest does first."""
        if now - self._open[handler] < YOUNG_S:
            return 2  # its request may be on the way
        return 1 if handler in self._asked else 0


def _drop(handler: web.RequestHandler, transport: asyncio.Transport) -> None:
    """Reset a connection: what is not sent yet is dropped, here and in the kernel.

    A client that never reads would keep it for ever (tcp(7), orphans).
    """
    sock = transport.get_extra_info("socket")
    # Once the handler has lost its transport the number may be another's socket's.
    if sock is not None and handler.transport is transport:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
    transport.abort()


class Shared(Generic[T]):
    """One making of a value for all who ask while it waits; each gets one begun after it asked.

    However many ask at once, one value is being made, and one more is waited for.
    """

    def __init__(self, make: Callable[[], Awaitable[T]]) -> None:
        self._make = make
        self._current: asyncio.Task[T] | None = None
        self._next: asyncio.Task[T] | None = None

    async def get(self) -> T:
        """A value whose making began after this call did. Raises what the making raises."""
        if self._next is None:
            self._next = asyncio.ensure_future(self._run(self._current))
        # Who asks may go away; the others wait for the same one.
        return await asyncio.shield(self._next)

    async def _run(self, before: asyncio.Task[T] | None) -> T:
        if before is not None:
            await asyncio.wait([before])
        self._current, self._next = self._next, None
        return await self._make()


def paced(make: Callable[[], T]) -> Callable[[], Awaitable[T]]:
    """`make`, which keeps the event loop busy, with rests: half of the loop's time at most is its.

    For Shared: as many as may connect would have it made again and again.
    """
    rested_at = 0.0

    async def make_in_time() -> T:
        nonlocal rested_at
        clock = asyncio.get_running_loop().time
        if (rest_s := rested_at - clock()) > 0:
            await asyncio.sleep(rest_s)
        began = clock()
        try:
            return make()
        finally:
            ended = clock()
            rested_at = ended + (ended - began)

    return make_in_time


def connections_max() -> int:
    """Connections of one server at a time: CONNECTIONS, fewer where few files may be open."""
    try:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    except OSError:
        return CONNECTIONS
    if soft == resource.RLIM_INFINITY:
        return CONNECTIONS
    return max(CONNECTIONS_LEAST, min(CONNECTIONS, soft // FILES_SHARE))
