"""Calls of etcd's v3 API over one grpclib channel at a time, and the list of endpoints."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from grpclib.client import Channel, UnaryUnaryMethod
from grpclib.config import Configuration
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.protocol import H2Protocol

from tundp.errors import (
    AccessDenied,
)
from tundp.store.access import (
    REQUEST_TIMEOUT_S,
    Endpoint,
    EtcdAccess,
    parse_endpoints,
)
from tundp.store.endpoints import Endpoints
from tundp.store.etcd3.words import FAILURES, denial, is_untouched, wants_login, why_failed
from tundp.store.etcd3rpc import tundp_etcd3_pb2 as rpc
from tundp.store.names import Names
from tundp.store.tls import H2, TlsFiles

_log = logging.getLogger(__name__)
T = TypeVar("T")

PING_S: Final = 8.0
PING_TIMEOUT_S: Final = 4.0
"""A watch on a server that hangs ends after PING_S + PING_TIMEOUT_S. Pings more often than
every 5 s would be refused (etcd --grpc-keepalive-min-time)."""
LOGINS: Final = 3
"""Logins of one call: a server may restart between login and request."""
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
        self._access = access
        self._endpoints = Endpoints(parse_endpoints(access.endpoints), "etcd v3")
        self._tls = tls
        self._channel: EtcdChannel | None = None
        self._lock: asyncio.Lock | None = None
        self._token = ""
        self._is_logged_in = False
        self._was_logged_in = False
        self._names = Names()
        self.urls = self._endpoints.urls

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
            endpoint, token = channel.endpoint, self._token
            # hasleader: a member without a leader fails the request instead of blocking it.
            metadata = {"hasleader": "true"} | ({"token": token} if token else {})
            try:
                result = await operation(channel, metadata)
            except FAILURES as error:
                if isinstance(error, GRPCError):
                    if logins_left and self._access.username and wants_login(error):
                        # etcd's simple tokens die with the server that gave them, or of age,
                        # and auth may have been switched on. The first to come logs in for all.
                        logins_left -= 1
                        if self._token == token:
                            self._is_logged_in = False
                        continue
                    if (denied := denial(error, endpoint)) is not None:
                        raise denied from None
                attempts.failed(
                    endpoint, why_failed(error, endpoint), may_have_run=not is_untouched(error)
                )
                self._leave(channel)
            else:
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
            if self._channel is not None:
                if self._access.username and not self._is_logged_in:
                    async with asyncio.timeout(REQUEST_TIMEOUT_S):
                        await self._log_in(self._channel)
                return self._channel
            endpoint = self._endpoints.current
            tls = self._tls.context(H2) if endpoint.scheme == "https" else None
            channel = EtcdChannel(endpoint, tls, self._names)
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    await channel.__connect__()
                    if self._access.username and not self._is_logged_in:
                        await self._log_in(channel)
            except BaseException as error:
                channel.close()
                if isinstance(error, asyncio.CancelledError):
                    # Perhaps by a deadline of the caller's, shorter than ours.
                    self._endpoints.rotate()
                raise
            self._channel = channel
            return channel

    async def _log_in(self, channel: EtcdChannel) -> None:
        """Authenticate: store a token, or that authentication is not enabled."""
        endpoint = channel.endpoint
        method = UnaryUnaryMethod(
            channel,
            f"{SERVICE}Auth/Authenticate",
            rpc.AuthenticateRequest,
            rpc.AuthenticateResponse,
        )
        request = rpc.AuthenticateRequest(
            name=self._access.username, password=self._access.password
        )
        try:
            answer = await method(request, timeout=REQUEST_TIMEOUT_S)
        except GRPCError as error:
            if error.status is Status.FAILED_PRECONDITION:
                self._token, self._is_logged_in = "", True
                return  # auth is not enabled there: everybody is let in
            if error.status is Status.INVALID_ARGUMENT:
                raise AccessDenied(
                    f"etcd at {endpoint.url} denies access ({error.message}):"
                    " check --etcd-username and --etcd-password"
                ) from None
            raise
        self._token, self._is_logged_in = str(answer.token), True
        if self._was_logged_in:
            _log.info(
                "etcd at %s: logged in again as %s; the login before was no longer valid",
                endpoint.url,
                self._access.username,
            )
        self._was_logged_in = True

    def _leave(self, channel: EtcdChannel | None) -> None:
        """Drop `channel` and go to the next endpoint. None: the current one did not connect."""
        if channel is not self._channel:
            return  # another request has done so already
        if channel is not None:
            channel.close()
            self._channel = None
        self._endpoints.rotate()
