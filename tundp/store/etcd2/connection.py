"""python-etcd wrapped: clients without retries, an interruptible watch, endpoints in turn.

python-etcd blocks, so each client lives on a thread of its own, one for requests and
one for the watch. Its defects that matter here, and what is done about them:

- it retries (also a PUT whose answer was lost): urllib3's retries are switched off
- its own failover drains the list of endpoints, crashes, and is not thread-safe:
  every client has one endpoint, and going to the next one is done here
- a blocked watch cannot be cancelled: `WatchClient` keeps the response in flight, and
  cancelling shuts its socket down
- a watch that waits for an index the store has not reached yet (data wiped, restored)
  would sleep through every event until then: the headers, which come at once, carry
  the store's index
- keys are pasted into URLs: only keys printed from parsed values are ever used
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import etcd
from urllib3 import HTTPSConnectionPool, Timeout
from urllib3.connection import HTTPSConnection
from urllib3.exceptions import HTTPError, NewConnectionError

from tundp.blocking import BlockingThread
from tundp.errors import (
    AccessDenied,
    Compacted,
    ConfigError,
)
from tundp.store.access import (
    ALT_NAME_HINT,
    CERTIFICATE_HINT,
    REQUEST_TIMEOUT_S,
    Endpoint,
    EtcdAccess,
    parse_endpoints,
)
from tundp.store.endpoints import Endpoints
from tundp.store.tls import HTTP, TlsFiles

T = TypeVar("T")

WATCH_TIMEOUT_S: Final = 15.0
"""Read timeout of a watch, after which it is sent anew. A server that hangs is noticed after one
to two of them: the first looks like a watch without events, the second gets no headers."""
WATCH_TIMEOUT: Final = Timeout(connect=REQUEST_TIMEOUT_S, read=WATCH_TIMEOUT_S)


INDEX: Final = "X-Etcd-Index"
"""Header of every answer about a key: the store's revision (etcd server/etcdserver/api/v2http)."""


class Client(etcd.Client):  # type: ignore[misc]
    """A python-etcd client of one endpoint that never retries."""

    def __init__(self, endpoint: Endpoint, access: EtcdAccess, tls: TlsFiles) -> None:
        super().__init__(
            host=endpoint.host,
            port=endpoint.port,
            protocol=endpoint.scheme,
            read_timeout=REQUEST_TIMEOUT_S,
            allow_reconnect=False,
            username=access.username or None,
            password=access.password or None,
        )
        self.http.connection_pool_kw["retries"] = False
        if endpoint.scheme == "https":
            self.http.connection_pool_kw["ssl_context"] = tls.context(HTTP)
            self.http.pool_classes_by_scheme = {"https": _pool_class(tls)}

    def _check_cluster_id(self, response: Any) -> None:
        # python-etcd calls this when the headers are here and the body is not.
        if response.status in (200, 201):
            _require_index(response)
        super()._check_cluster_id(response)

    def _handle_server_response(self, response: Any) -> Any:
        """The answer if it is a success, else its error. EtcdException for what no etcd sends."""
        if 300 <= response.status < 400:
            raise etcd.EtcdException(_redirection(response))
        try:
            return super()._handle_server_response(response)
        except (*_PASSED_ON, *_HISTORY_LOST):
            # python-etcd takes any 404 with JSON in it for etcd's "key not found".
            _require_index(response)
            raise


class WatchClient(Client):
    """A client whose blocked watch can be interrupted from another thread."""

    def __init__(self, endpoint: Endpoint, access: EtcdAccess, tls: TlsFiles) -> None:
        super().__init__(endpoint, access, tls)
        self._lock = threading.Lock()
        self._in_flight: Any = None
        self._waits_after = -1
        self._is_interrupted = False

    def next_event(self, path: str, after: int) -> etcd.EtcdResult | None:
        """Wait for the next event under `path` after index `after`; None on timeout."""
        self._waits_after = after
        try:
            return self.read(
                path, wait=True, recursive=True, waitIndex=after + 1, timeout=WATCH_TIMEOUT
            )
        except etcd.EtcdWatchTimedOut:
            if self._in_flight is None:
                raise  # not even headers, which a quiet watch gets at once: it hangs
            # No events, or no majority? A member without one never answers a watch: ask it.
            with contextlib.suppress(etcd.EtcdKeyNotFound):
                self.read(f"{path.rpartition('/')[0]}/config", quorum=True)
            return None
        except _HISTORY_LOST as error:
            raise Compacted(str(error)) from None
        except etcd.EtcdException as error:
            # etcd ends a long poll it gives up on with 200 and an empty body.
            if "not valid JSON" in str(error):
                return None
            raise
        finally:
            self._waits_after = -1
            with self._lock:
                self._in_flight = None

    def interrupt(self) -> None:
        """Interrupt a read in progress, now or when its headers arrive. Thread-safe."""
        with self._lock:
            self._is_interrupted = True
            if self._in_flight is not None:
                _shut_down(self._in_flight)

    def _check_cluster_id(self, response: Any) -> None:
        with self._lock:
            self._in_flight = response
            if self._is_interrupted:
                _shut_down(response)
        super()._check_cluster_id(response)
        index = response.headers.get(INDEX)
        if response.status == 200 and int(index) < self._waits_after:
            _shut_down(response)
            response.close()
            raise etcd.EtcdClusterIdChanged(
                f"the store is at index {index}, below {self._waits_after}: its data was replaced"
            )


class Connection:
    """One thread with one client, of one endpoint at a time; the others follow when it fails."""

    def __init__(
        self,
        access: EtcdAccess,
        tls: TlsFiles,
        client_type: Callable[[Endpoint, EtcdAccess, TlsFiles], Any],
        what: str,
    ) -> None:
        self._access = access
        self._client_type = client_type
        self._tls = tls
        self._endpoints = Endpoints(parse_endpoints(access.endpoints), what)
        self.urls = self._endpoints.urls
        self._thread = BlockingThread(what)
        self._client: Any = None
        self._is_stale = False
        self._calls: set[threading.Event] = set()

    async def call(self, operation: Callable[[Any], T], *, once: bool = False) -> T:
        """Run `operation(client)` on the thread, at the first endpoint it succeeds at.

        once: the operation must not run twice, so only an endpoint that was never
        reached is followed by another one.
        """
        abandoned = threading.Event()
        self._calls.add(abandoned)
        try:
            return await self._thread.run(self._try_endpoints, operation, abandoned, once=once)
        except asyncio.CancelledError:
            self._abandon(abandoned)
            raise
        finally:
            self._calls.discard(abandoned)

    def reconnect(self) -> None:
        """Use a new client for the next call, and interrupt a watch in progress."""
        self._is_stale = True
        client = self._client
        if isinstance(client, WatchClient):
            client.interrupt()

    def close(self) -> None:
        """Interrupt a watch in progress and end the thread."""
        for abandoned in self._calls:
            self._abandon(abandoned)
        self._thread.close()

    def _abandon(self, abandoned: threading.Event) -> None:
        # Order matters: `_try_endpoints` checks the event after setting `_client`.
        abandoned.set()
        client = self._client
        if isinstance(client, WatchClient):
            client.interrupt()

    def _try_endpoints(
        self, operation: Callable[[Any], T], abandoned: threading.Event, *, once: bool
    ) -> T:
        attempts = self._endpoints.attempts(once=once)
        while attempts.may_go_on:
            endpoint = self._endpoints.current
            if self._is_stale:
                self._is_stale = False
                self._drop_client()
            if self._client is None:
                self._client = self._client_type(endpoint, self._access, self._tls)
            if abandoned.is_set():
                self._drop_client()
                break
            try:
                result = operation(self._client)
            except _PASSED_ON:
                self._endpoints.answered(endpoint)
                raise
            except etcd.EtcdInsufficientPermissions as error:
                raise AccessDenied(
                    f"etcd at {endpoint.url} denies access ({error}):"
                    " check --etcd-username, --etcd-password and the role's permissions"
                ) from None
            except Compacted as error:
                # Perhaps this member lags behind the one that gave the snapshot.
                self._endpoints.failed(endpoint, str(error))
                self._rotate()
                raise
            # RecursionError: the answer is JSON nested beyond reason.
            except (etcd.EtcdException, HTTPError, OSError, ValueError, RecursionError) as error:
                attempts.failed(
                    endpoint, _why(error, endpoint), may_have_run=not _never_sent(error)
                )
                self._rotate()
            else:
                self._endpoints.answered(endpoint)
                if abandoned.is_set():
                    # The interruption came after the call: a new client, lest it hits the next.
                    self._drop_client()
                return result
        raise attempts.error()

    def _drop_client(self) -> None:
        if self._client is not None:
            self._client.http.clear()
            self._client = None

    def _rotate(self) -> None:
        self._drop_client()
        self._endpoints.rotate()


_CLOSED_ON_US: Final = ("EOF", "reset by peer", "Connection aborted", "closed connection")
"""Failures of a server that rejects our certificate, depending on timing."""
_PASSED_ON: Final = (
    etcd.EtcdKeyNotFound,
    etcd.EtcdAlreadyExist,
    etcd.EtcdCompareFailed,
)
"""etcd's negative answers, as opposed to failures: the caller maps them to its own errors."""
_HISTORY_LOST: Final = (
    etcd.EtcdEventIndexCleared,
    etcd.EtcdWatcherCleared,
    etcd.EtcdClusterIdChanged,
)
"""Errors of a watch that lost events: a new snapshot is needed."""


def check_credentials(access: EtcdAccess) -> None:
    """ConfigError for a user or password that HTTP basic authentication cannot carry."""
    for flag, text in (("username", access.username), ("password", access.password)):
        try:
            text.encode("latin-1")
        except UnicodeEncodeError:
            raise ConfigError(
                f"--etcd-{flag} must be latin-1: HTTP basic auth as python-etcd sends it"
                " carries nothing else"
            ) from None


def _pool_class(tls: TlsFiles) -> type[HTTPSConnectionPool]:
    """A pool whose connections use the certificate files as they are at each connect.

    urllib3 connects anew by itself when a server has closed an idle connection.
    """

    class RereadingConnection(HTTPSConnection):
        def connect(self) -> None:
            self.ssl_context = tls.context(HTTP)
            super().connect()

    class RereadingPool(HTTPSConnectionPool):
        ConnectionCls = RereadingConnection

    return RereadingPool


def _require_index(response: Any) -> None:
    """EtcdException unless `response` bears the store's index, as every answer of etcd's does."""
    index = response.headers.get(INDEX)
    if index is None or not (index.isascii() and index.isdecimal()):
        response.close()
        found = "no header" if index is None else f"{index[:20]!r} as header"
        raise etcd.EtcdException(
            f"its answer has {found} {INDEX}, without which nothing in it can be relied on: a proxy"
            " takes it out, or this is no etcd; name etcd itself in --etcd-endpoints"
        )


def _redirection(response: Any) -> str:
    """Words for an answer that leads elsewhere, of whose address only the server is shown."""
    location = response.headers.get("Location") or ""
    with contextlib.suppress(ValueError):
        parts = urlsplit(location)
        if parts.hostname:
            location = f"{parts.scheme or 'http'}://{parts.netloc.rpartition('@')[2]}"
    where = f"to {location[:200]!r}" if location else "without saying where to"
    return (
        f"it redirects requests {where} (HTTP {response.status}), which is not followed: user and"
        " password would go there; name the server that answers in --etcd-endpoints"
    )


def _shut_down(response: Any) -> None:
    # OSError: the peer was faster, which is just as good. AttributeError: no socket any more.
    with contextlib.suppress(OSError, AttributeError):
        response.connection.sock.shutdown(socket.SHUT_RDWR)


def _never_sent(error: Exception) -> bool:
    return isinstance(getattr(error, "cause", None), NewConnectionError)


def _why(error: Exception, endpoint: Endpoint) -> str:
    """The innermost reason in a few words: urllib3 nests several."""
    cause: BaseException | None = getattr(error, "cause", None) or error
    text = str(cause)
    if INDEX in text or text.startswith("it redirects"):
        return text  # ours: says all there is
    if "404 page not found" in text:
        return "no v2 API there (start etcd with --enable-v2)"
    for known, words in (
        ("Connection refused", "connection refused"),
        ("timed out", "timed out"),
        ("No route to host", "no route to host"),
        ("Network is unreachable", "network is unreachable"),
        ("Name or service not known", "name not known"),
        ("IncompleteRead", "connection closed"),
    ):
        if known in text:
            return words
    if "Hostname mismatch" in text or "IP address mismatch" in text:
        return f"{text} ({ALT_NAME_HINT})"
    if endpoint.scheme == "https" and any(word in text for word in _CLOSED_ON_US):
        return f"{text} ({CERTIFICATE_HINT})"
    return text
