"""Calls of etcd's v3 API over one grpclib channel at a time, and the list of endpoints."""

from __future__ import annotations

import asyncio
import errno
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from grpclib.client import Channel, UnaryUnaryMethod
from grpclib.config import Configuration
from grpclib.protocol import H2Protocol

from tundp.store.access import (
    REQUEST_TIMEOUT_S,
    Endpoint,
    EtcdAccess,
    parse_endpoints,
)
from tundp.store.endpoints import Endpoints
from tundp.store.etcd3.login import Login
from tundp.store.etcd3.words import FAILURES, auth_answer, denial, why_failed
from tundp.store.names import Names
from tundp.store.tls import H2, TlsFiles

T = TypeVar("T")

PING_S: Final = 8.0
PING_TIMEOUT_S: Final = 4.0
"""A watch on a server that hangs ends after PING_S + PING_TIMEOUT_S. Pings more often than
every 5 s would be refused (etcd --grpc-keepalive-min-time)."""
LOGINS: Final = 3
"""Logins a call waits for at most: a server may restart between login and request."""
_WINDOW_LEN: Final = 64 << 20
"""HTTP/2 window in bytes: a snapshot is one message, and 65,000 leases are 8 MB."""
CONFIG: Final = Configuration(
    _keepalive_time=PING_S,
    _keepalive_timeout=PING_TIMEOUT_S,
    _http2_max_pings_without_data=0,
    _http2_min_sent_ping_interval_without_data=PING_S,
    http2_connection_window_size=_WINDOW_LEN,
    http2_stream_window_size=_WINDOW_LEN,
)
SERVICE: Final = "/etcdserverpb."


class EtcdChannel(Channel):
    """A grpclib channel whose endpoint's name is looked up by `names`, not by the event loop."""

    def __init__(self, endpoint: Endpoint, tls: ssl.SSLContext | None, names: Names) -> None:
        super().__init__(endpoint.host.strip("[]"), endpoint.port, ssl=tls, config=CONFIG)
        self.endpoint = endpoint
        self._names = names
        self._is_used = False

    @property
    def is_connected(self) -> bool:
        """Whether the connection it was made for is still there."""
        return bool(self._connected)

    def close(self) -> None:
        """Close the connection. A TLS one does not wait for the server's close_notify."""
        transport = getattr(getattr(self._protocol, "connection", None), "_transport", None)
        super().close()
        if transport is not None and self._ssl:
            transport.abort()

    async def _create_connection(self) -> H2Protocol:
        """Connect to the first address of the endpoint that answers; called by grpclib.

        Each address gets an equal part of what is left of REQUEST_TIMEOUT_S.
        """
        if self._is_used:
            # grpclib would connect anew, with certificates of before, and nobody would close it.
            raise ConnectionResetError(errno.ECONNRESET, "the connection was lost")
        self._is_used = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + REQUEST_TIMEOUT_S
        addresses = await self._names.addresses(self._host, REQUEST_TIMEOUT_S)
        failures: list[Exception] = []
        for number, address in enumerate(addresses):
            left_s = (deadline - loop.time()) / (len(addresses) - number)
            try:
                async with asyncio.timeout(left_s):
                    _, protocol = await loop.create_connection(
                        self._protocol_factory,
                        address,
                        self._port,
                        ssl=self._ssl,
                        server_hostname=self._host if self._ssl else None,
                    )
            except (OSError, TimeoutError) as error:
                failures.append(error)
            else:
                return protocol
        reasons = [why_failed(failure, self.endpoint) for failure in failures]
        if len(set(reasons)) == 1:
            raise failures[0]
        raise OSError(", ".join(map("{}: {}".format, addresses, reasons)))


class Connection:
    """One HTTP/2 connection, to one endpoint at a time; the others follow when it fails."""

    def __init__(self, access: EtcdAccess, tls: TlsFiles) -> None:
        self._endpoints = Endpoints(parse_endpoints(access.endpoints), "etcd v3")
        self._tls = tls
        self._channel: EtcdChannel | None = None
        self._lock: asyncio.Lock | None = None
        self._login = Login(access)
        self._names = Names()
        self.urls = self._endpoints.urls

    @property
    def limit_s(self) -> float:
        """Limit of one request at one endpoint, in seconds."""
        return REQUEST_TIMEOUT_S

    async def call(
        self, method: str, request: Any, answer_type: type[T], *, once: bool = False
    ) -> T:
        """Send one unary request to the first endpoint that answers. `once`: see `use`."""

        async def ask(channel: EtcdChannel, metadata: dict[str, str]) -> T:
            unary = UnaryUnaryMethod(channel, SERVICE + method, type(request), answer_type)
            return await unary(request, timeout=REQUEST_TIMEOUT_S, metadata=metadata)

        return await self.use(ask, once=once)

    async def use(
        self,
        operation: Callable[[EtcdChannel, dict[str, str]], Awaitable[T]],
        *,
        once: bool = False,
    ) -> T:
        """Await `operation(channel, metadata)` on the first endpoint it succeeds at.

        once: it must not run twice, so it is retried only if it cannot have run.
        """
        attempts = self._endpoints.attempts(once=once)
        logins_left = LOGINS
        while attempts.may_go_on:
            endpoint = self._endpoints.current
            try:
                channel = await self._connect()
            except FAILURES as error:
                attempts.failed(endpoint, why_failed(error, endpoint), may_have_run=False)
                self._leave(None)
                continue
            endpoint, token = channel.endpoint, self._login.token
            # hasleader: a member without a leader fails the request instead of blocking it.
            metadata = {"hasleader": "true"} | ({"token": token} if token else {})
            try:
                result = await operation(channel, metadata)
            except FAILURES as error:
                if (refusal := auth_answer(error)) is not None:
                    if logins_left and self._login.is_worth_another_try(token, refusal):
                        logins_left -= 1
                        continue
                    raise denial(error, endpoint) from None
                attempts.failed(endpoint, why_failed(error, endpoint), may_have_run=True)
                self._leave(channel)
            else:
                self._login.worked(token)
                self._endpoints.answered(endpoint)
                return result
        raise attempts.error()

    def lost(self, channel: EtcdChannel, why: str) -> None:
        """Report that a stream on `channel` broke: the next request starts at another endpoint."""
        self._endpoints.failed(channel.endpoint, why)
        self._leave(channel)

    def reconnect(self) -> None:
        """Connect to the same endpoint anew at the next request; pending requests fail."""
        self._disconnect()

    def close(self) -> None:
        """Close the connection and its name lookups; pending requests fail."""
        self._disconnect()
        self._names.close()

    def _disconnect(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    async def _connect(self) -> EtcdChannel:
        if self._lock is None:
            self._lock = asyncio.Lock()
        async with self._lock:
            if self._channel is not None and not self._channel.is_connected:
                self._disconnect()
            if self._channel is not None:
                if self._login.is_due:
                    async with asyncio.timeout(REQUEST_TIMEOUT_S):
                        await self._login.perform(self._channel, REQUEST_TIMEOUT_S)
                return self._channel
            endpoint = self._endpoints.current
            tls = self._tls.context(H2) if endpoint.scheme == "https" else None
            channel = EtcdChannel(endpoint, tls, self._names)
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    await channel.__connect__()
                    if self._login.is_due:
                        await self._login.perform(channel, REQUEST_TIMEOUT_S)
            except BaseException as error:
                channel.close()
                if isinstance(error, asyncio.CancelledError):
                    # Perhaps by a deadline of the caller's, shorter than ours.
                    self._endpoints.rotate()
                raise
            self._channel = channel
            return channel

    def _leave(self, channel: EtcdChannel | None) -> None:
        """Drop `channel` and go to the next endpoint. None: the current one did not connect."""
        if channel is not self._channel:
            return  # another request has done so already
        if channel is not None:
            channel.close()
            self._channel = None
        self._endpoints.rotate()
