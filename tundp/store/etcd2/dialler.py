"""Connections for python-etcd, made on the event loop: names apart, several addresses at once.

urllib3 resolves a name inside its connect, which nothing can give up, and gives each of its
addresses the whole timeout, one after another. Its thread asks here for a connected socket.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import os
import socket
from typing import Any

from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import NewConnectionError

from tundp.store import dial
from tundp.store.access import Endpoint
from tundp.store.names import Names
from tundp.store.tls import HTTP, TlsFiles

_SLACK_S = 1.0
"""How much longer than its limit a connect may take while the event loop is busy."""


class Dialler:
    """Connects to one endpoint: first on the event loop, later whenever urllib3's thread asks."""

    def __init__(self, endpoint: Endpoint, names: Names, limit_s: float) -> None:
        self.address = ""
        """Last connected to."""
        self._endpoint = endpoint
        self._host = endpoint.host.strip("[]")
        self._names = names
        self._limit_s = limit_s
        self._ready: socket.socket | None = None
        self._loop = asyncio.get_running_loop()
        self._dialling: concurrent.futures.Future[socket.socket] | None = None

    async def prepare(self) -> Dialler:
        """Connect, for the first request. OSError or TimeoutError."""
        self._ready = await self._connect()
        return self

    def connect(self, connection: HTTPConnection) -> socket.socket:
        """A connected socket, on urllib3's thread. Raises what urllib3 does."""
        sock, self._ready = self._ready, None
        if sock is None:
            self._dialling = asyncio.run_coroutine_threadsafe(self._connect(), self._loop)
            try:
                sock = self._dialling.result(self._limit_s + _SLACK_S)
            except (OSError, TimeoutError, concurrent.futures.CancelledError) as error:
                self._dialling.cancel()
                number = getattr(error, "errno", None)
                why = os.strerror(number) if number and number > 0 else str(error) or "timed out"
                raise NewConnectionError(connection, why) from error
        sock.settimeout(self._limit_s)
        return sock

    def interrupt(self) -> None:
        """Give up a connect the thread waits for. Thread-safe."""
        if self._dialling is not None:
            self._dialling.cancel()

    def close(self) -> None:
        """Close a connection nobody has asked for."""
        sock, self._ready = self._ready, None
        if sock is not None:
            sock.close()

    async def _connect(self) -> socket.socket:
        async with asyncio.timeout(self._limit_s):
            addresses = await self._names.addresses(self._host, self._limit_s)
            try:
                winner = await dial.first(
                    [functools.partial(self._connect_to, address) for address in addresses],
                    stagger_s=dial.address_stagger_s(len(addresses), self._limit_s),
                    discard=socket.socket.close,
                )
            except dial.NoneSucceededError as error:
                raise error.failures[0] from None
        self.address = addresses[winner.number]
        return winner.result

    async def _connect_to(self, address: str) -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().sock_connect(sock, (address, self._endpoint.port))
        except BaseException:
            sock.close()
            raise
        return sock


def pools(dialler: Dialler, tls: TlsFiles) -> dict[str, Any]:
    """urllib3's classes of connection pools by scheme, whose connections `dialler` makes.

    They use the certificate files as they are at each connect: urllib3 connects anew by itself
    when a server has closed an idle connection.
    """

    class Http(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return dialler.connect(self)

    class Https(HTTPSConnection):
        def connect(self) -> None:
            self.ssl_context = tls.context(HTTP)
            super().connect()

        def _new_conn(self) -> socket.socket:
            return dialler.connect(self)

    class HttpPool(HTTPConnectionPool):
        ConnectionCls = Http

    class HttpsPool(HTTPSConnectionPool):
        ConnectionCls = Https

    return {"http": HttpPool, "https": HttpsPool}
