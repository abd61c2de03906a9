"""Calls of etcd's v3 API over one grpclib channel at a time, and the list of endpoints."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Final, TypeVar

from grpclib.client import UnaryUnaryMethod
from grpclib.config import Configuration

from tundp.store import dial
from tundp.store.access import (
    REQUEST_TIMEOUT_S,
    Endpoint,
    EtcdAccess,
    parse_endpoints,
)
from tundp.store.endpoints import Attempts, Endpoints
from tundp.store.etcd3.channel import EtcdChannel
from tundp.store.etcd3.login import Login
from tundp.store.etcd3.words import (
    FAILURES,
    EtcdLeaseGoneError,
    auth_answer,
    denial,
    is_etcd_lease_gone,
    why_failed,
    words,
)
from tundp.store.names import Names
from tundp.store.tls import H2, TlsFiles

_log = logging.getLogger(__name__)
T = TypeVar("T")

PING_S: Final = 8.0
PING_TIMEOUT_S: Final = 4.0
"""A watch on a server that hangs ends after PING_S + PING_TIMEOUT_S. Pings more often than
every 5 s would be refused (etcd --grpc-keepalive-min-time)."""
UNANSWERED_S: Final = 1.0
"""A request cancelled after so long without an answer counts as a failure of its endpoint."""
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


class Connection:
    """One HTTP/2 connection, to one endpoint at a time; the others follow when it fails."""

    def __init__(self, access: EtcdAccess, tls: TlsFiles) -> None:
        self._endpoints = Endpoints(parse_endpoints(access.endpoints), "etcd v3")
        self._tls = tls
        self._channel: EtcdChannel | None = None
        self._lock: asyncio.Lock | None = None
        self._login = Login(access)
        self._names = Names()
        self._ping_s: dict[Endpoint, float] = {}
        """Of endpoints that asked for fewer pings."""
        self.urls = self._endpoints.urls

    @property
    def limit_s(self) -> float:
        """Limit of one request at one endpoint, in seconds."""
        return REQUEST_TIMEOUT_S

    @property
    def round_s(self) -> float:
        """Limit of one request, in seconds: each endpoint is tried once."""
        return dial.round_s(len(self._endpoints.order))

    async def call(
        self, method: str, request: Any, answer_type: type[T], *, once: bool = False
    ) -> T:
        """Send one unary request to the first endpoint that answers. `once`: see `use`."""

        async def ask(channel: EtcdChannel, metadata: dict[str, str]) -> T:
            unary = UnaryUnaryMethod(channel, SERVICE + method, type(request), answer_type)
            began = asyncio.get_running_loop().time()
            try:
                return await unary(request, timeout=REQUEST_TIMEOUT_S, metadata=metadata)
            except asyncio.CancelledError:
                if asyncio.get_running_loop().time() - began > UNANSWERED_S:
                    # Given up by somebody with a deadline of his own: no answer is a failure.
                    self._leave(channel)
                raise

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
        may_calm_down = not once
        while attempts.may_go_on:
            channel = await self._connect(attempts)
            if channel is None:
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
                if channel.is_told_to_calm_down and may_calm_down:
                    may_calm_down = False
                    self.resume(channel)
                    continue
                if is_etcd_lease_gone(error):
                    self._login.worked(token)
                    self._endpoints.answered(endpoint)
                    raise EtcdLeaseGoneError(f"etcd at {endpoint.url}: {words(error)}") from None
                attempts.failed(endpoint, why_failed(error, endpoint), may_have_run=True)
                self._leave(channel)
            else:
                self._login.worked(token)
                self._endpoints.answered(endpoint)
                return result
        raise attempts.error()

    def resume(self, channel: EtcdChannel) -> None:
        """Report that the server ended `channel`: the next request connects to it again.

        Pings come half as often from now on if it ended the connection because of them.
        """
        endpoint = channel.endpoint
        if channel is self._channel:
            if channel.is_told_to_calm_down:
                ping_s = 2 * self._ping_s.get(endpoint, CONFIG._keepalive_time or PING_S)  # noqa: SLF001  (grpclib's only name for it)
                self._ping_s[endpoint] = ping_s
                _log.info("%s asks for fewer pings: every %g s from now on", endpoint.url, ping_s)
            self._disconnect()

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

    async def _connect(self, attempts: Attempts) -> EtcdChannel | None:
        """The connection, made if there is none; None, and `attempts` knows it, if that failed."""
        if self._lock is None:
            self._lock = asyncio.Lock()
        async with self._lock:
            if self._channel is not None and not self._channel.is_connected:
                self.resume(self._channel)
            channel = self._channel
            try:
                if channel is None:
                    channel = await self._dial(attempts)
                if channel is not None and self._login.is_due:
                    async with asyncio.timeout(REQUEST_TIMEOUT_S):
                        await self._login.perform(channel, REQUEST_TIMEOUT_S)
            except FAILURES as error:
                assert channel is not None  # a dial that fails gives None
                why = why_failed(error, channel.endpoint)
                attempts.failed(channel.endpoint, why, may_have_run=False)
                self._leave(channel)
                return None
            return channel

    async def _dial(self, attempts: Attempts) -> EtcdChannel | None:
        """Connect to the first endpoint that answers; those before it go to the end."""
        order = self._endpoints.order[: attempts.left]
        try:
            winner = await dial.first(
                [functools.partial(self._open, endpoint) for endpoint in order],
                stagger_s=dial.ENDPOINT_STAGGER_S,
                discard=EtcdChannel.close,
            )
        except asyncio.CancelledError:
            # By a deadline of somebody else's: the first one has not answered within it.
            self._endpoints.rotate()
            raise
        except dial.NoneSucceededError as error:
            for endpoint, failure in zip(order, error.failures, strict=True):
                attempts.failed(endpoint, why_failed(failure, endpoint), may_have_run=False)
                self._endpoints.rotate()
            return None
        for number, endpoint in enumerate(order[: winner.number]):
            why = why_failed(winner.failures[number], endpoint)
            attempts.failed(endpoint, why, may_have_run=False)
            self._endpoints.rotate()
        self._channel = winner.result
        return winner.result

    async def _open(self, endpoint: Endpoint) -> EtcdChannel:
        tls = self._tls.context(H2) if endpoint.scheme == "https" else None
        config = CONFIG
        if (ping_s := self._ping_s.get(endpoint)) is not None:
            config = replace(
                CONFIG, _keepalive_time=ping_s, _http2_min_sent_ping_interval_without_data=ping_s
            )
        channel = EtcdChannel(endpoint, tls, self._names, config, REQUEST_TIMEOUT_S)
        try:
            await channel.__connect__()
        except BaseException:
            channel.close()
            raise
        return channel

    def _leave(self, channel: EtcdChannel) -> None:
        """Drop `channel` and go to the next endpoint, unless another request has done so."""
        if channel is self._channel:
            channel.blame_address()
            self._disconnect()
            self._endpoints.rotate()
