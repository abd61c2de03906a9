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
- it resolves names inside the connect, and connects to one address after another: connecting
  is done here, see `dialler`
- keys are pasted into URLs: only keys printed from parsed values are ever used
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import etcd
from urllib3 import Timeout, make_headers
from urllib3.exceptions import HTTPError, NewConnectionError

from tundp.blocking import BlockingThread
from tundp.errors import (
    AccessDenied,
    Compacted,
    ConfigError,
)
from tundp.printable import SENTENCE_MAX, printable, quoted
from tundp.store import dial
from tundp.store.access import (
    ALT_NAME_HINT,
    CERTIFICATE_HINT,
    REQUEST_TIMEOUT_S,
    Endpoint,
    EtcdAccess,
    parse_endpoints,
)
from tundp.store.endpoints import Attempts, Endpoints
from tundp.store.etcd2.cluster_id import CLUSTER_ID, explain_no_cluster_id
from tundp.store.etcd2.dialler import Dialler, pools
from tundp.store.names import Names
from tundp.store.tls import TlsFiles

T = TypeVar("T")

WATCH_TIMEOUT_S: Final = 15.0
"""Read timeout of a watch, after which it is sent anew. A server that hangs is noticed after one
to two of them: the first looks like a watch without events, the second gets no headers."""
WATCH_TIMEOUT: Final = Timeout(connect=REQUEST_TIMEOUT_S, read=WATCH_TIMEOUT_S)
UNANSWERED_S: Final = 1.0
"""A request cancelled after so long without an answer counts as a failure of its endpoint."""


INDEX: Final = "X-Etcd-Index"
"""Header of every answer about a key: the store's revision (etcd server/etcdserver/api/v2http)."""


_NOT_LATIN: Final = "HTTP basic authentication carries latin-1 only, which is not true of"


class Client(etcd.Client):  # type: ignore[misc]
    """A python-etcd client of one endpoint that never retries."""

    def __init__(
        self, endpoint: Endpoint, access: EtcdAccess, tls: TlsFiles, dialler: Dialler
    ) -> None:
        super().__init__(
            host=endpoint.host,
            port=endpoint.port,
            protocol=endpoint.scheme,
            read_timeout=REQUEST_TIMEOUT_S,
            allow_reconnect=False,
            username=access.username or None,
            password=access.password or None,
        )
        self.endpoint = endpoint
        self.dialler = dialler
        self._user = access.user
        self.http.pool_classes_by_scheme = pools(dialler, tls)
        self.http.connection_pool_kw["retries"] = False

    def interrupt(self) -> None:
        """Give up a connect in progress. A request under way ends by its own timeout."""
        self.dialler.interrupt()

    def _get_headers(self) -> dict[str, str]:
        # Of each request: the password may have changed since the connection was made.
        name, password = self._user.now
        if not (name and password):
            return {}
        try:
            return dict(make_headers(basic_auth=f"{name}:{password}"))
        except UnicodeEncodeError:
            raise etcd.EtcdException(f"{_NOT_LATIN} --etcd-username or --etcd-password") from None

    def _check_cluster_id(self, response: Any) -> None:
        # python-etcd calls this when the headers are here and the body is not.
        if response.status in (200, 201):
            _require_index(response)
            if not response.headers.get(CLUSTER_ID):
                explain_no_cluster_id(self.endpoint.url)
        if response.headers.get(CLUSTER_ID):  # without one python-etcd warns, each time
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

    def __init__(
        self, endpoint: Endpoint, access: EtcdAccess, tls: TlsFiles, dialler: Dialler
    ) -> None:
        super().__init__(endpoint, access, tls, dialler)
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
        super().interrupt()
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
        client_type: Callable[[Endpoint, EtcdAccess, TlsFiles, Dialler], Client],
        what: str,
    ) -> None:
        self._access = access
        self._client_type = client_type
        self._tls = tls
        self._endpoints = Endpoints(parse_endpoints(access.endpoints), what)
        self.urls = self._endpoints.urls
        self._what = what
        self._thread = BlockingThread(what)
        self._names = Names()
        self._lock: asyncio.Lock | None = None
        self._client: Client | None = None
        self._busy: set[Client] = set()
        self._is_closed = False

    @property
    def round_s(self) -> float:
        """Limit of one request, in seconds: each endpoint is tried once."""
        return dial.round_s(len(self._endpoints.order))

    async def call(self, operation: Callable[[Any], T], *, once: bool = False) -> T:
        """Run `operation(client)` on the thread, at the first endpoint it succeeds at.

        once: the operation must not run twice, so only an endpoint that was never
        reached is followed by another one.
        """
        attempts = self._endpoints.attempts(once=once)
        while attempts.may_go_on and not self._is_closed:
            client = await self._connect(attempts)
            if client is None:
                continue
            endpoint = client.endpoint
            user = self._access.user.now
            try:
                result = await self._run(client, operation)
            except _PASSED_ON:
                self._endpoints.answered(endpoint)
                raise
            except etcd.EtcdInsufficientPermissions as error:
                if self._access.user.renew() != user:
                    continue  # etcd has done nothing: the same again, with the new password
                raise AccessDenied(
                    f"etcd at {endpoint.url} denies access ({printable(str(error), SENTENCE_MAX)}):"
                    " check --etcd-username, --etcd-password and the role's permissions;"
                    f" {self._access.user.advice}"
                ) from None
            except Compacted as error:
                # Perhaps this member lags behind the one that gave the snapshot.
                self._endpoints.failed(endpoint, str(error))
                self._leave(client)
                raise
            # RecursionError: the answer is JSON nested beyond reason.
            except (etcd.EtcdException, HTTPError, OSError, ValueError, RecursionError) as error:
                never_sent = _never_sent(error)
                if not never_sent:
                    self._names.blame(endpoint.host.strip("[]"), client.dialler.address)
                attempts.failed(endpoint, _why(error, endpoint), may_have_run=not never_sent)
                self._leave(client)
            else:
                self._endpoints.answered(endpoint)
                return result
        raise attempts.error()

    def reconnect(self) -> None:
        """Use a new client for the next call, and interrupt a watch in progress."""
        client = self._client
        self._drop(client)
        if isinstance(client, WatchClient):
            client.interrupt()

    def close(self) -> None:
        """Interrupt a watch in progress and end the thread."""
        self._is_closed = True
        for client in self._busy:
            client.interrupt()
        self._drop(self._client)
        self._thread.close()
        self._names.close()

    async def _connect(self, attempts: Attempts) -> Client | None:
        """The client, made if there is none; None, and `attempts` knows it, if that failed."""
        if self._lock is None:
            self._lock = asyncio.Lock()
        async with self._lock:
            if self._client is None:
                await self._dial(attempts)
            return self._client

    async def _dial(self, attempts: Attempts) -> None:
        """Connect to the first endpoint that answers; those before it go to the end."""
        order = self._endpoints.order[: attempts.left]
        diallers = [Dialler(endpoint, self._names, REQUEST_TIMEOUT_S) for endpoint in order]
        try:
            winner = await dial.first(
                [dialler.prepare for dialler in diallers],
                stagger_s=dial.ENDPOINT_STAGGER_S,
                discard=Dialler.close,
            )
        except asyncio.CancelledError:
            # By a deadline of somebody else's: the first one has not answered within it.
            self._endpoints.rotate()
            raise
        except dial.NoneSucceededError as error:
            for endpoint, failure in zip(order, error.failures, strict=True):
                attempts.failed(endpoint, _why(failure, endpoint), may_have_run=False)
                self._endpoints.rotate()
            return
        for number, endpoint in enumerate(order[: winner.number]):
            why = _why(winner.failures[number], endpoint)
            attempts.failed(endpoint, why, may_have_run=False)
            self._endpoints.rotate()
        self._client = self._client_type(
            order[winner.number], self._access, self._tls, winner.result
        )

    async def _run(self, client: Client, operation: Callable[[Any], T]) -> T:
        """Run `operation(client)` on the thread; when cancelled, leave both to themselves."""
        abandoned = threading.Event()
        began = asyncio.get_running_loop().time()

        def operate() -> T:
            if abandoned.is_set():
                raise etcd.EtcdException("given up before it was sent")
            return operation(client)

        self._busy.add(client)
        try:
            return await self._thread.run(operate)
        except asyncio.CancelledError:
            abandoned.set()
            client.interrupt()
            waited_s = asyncio.get_running_loop().time() - began
            if waited_s > UNANSWERED_S and not isinstance(client, WatchClient):
                # Given up by somebody with a deadline of his own: no answer is a failure.
                self._names.blame(client.endpoint.host.strip("[]"), client.dialler.address)
                self._leave(client)
            self._drop(client)
            # What is under way ends by its own timeout; the next call does not wait for it.
            self._thread.close()
            self._thread = BlockingThread(self._what)
            raise
        finally:
            self._busy.discard(client)

    def _drop(self, client: Client | None) -> None:
        if client is not None and client is self._client:
            self._client = None
            client.dialler.close()
            client.http.clear()

    def _leave(self, client: Client) -> None:
        """Drop the client and go to the next endpoint, unless another call has done so."""
        if client is self._client:
            self._drop(client)
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
            raise ConfigError(f"{_NOT_LATIN} --etcd-{flag}") from None


def _require_index(response: Any) -> None:
    """EtcdException unless `response` bears the store's index, as every answer of etcd's does."""
    index = response.headers.get(INDEX)
    if index is None or not (index.isascii() and index.isdecimal()):
        response.close()
        found = "no header" if index is None else f"{quoted(index, 20)} as header"
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
    where = f"to {quoted(location, 200)}" if location else "without saying where to"
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
    if isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError) and cause.errno:
        return os.strerror(cause.errno).lower() if cause.errno > 0 else str(cause.strerror)
    if isinstance(cause, TimeoutError):
        return "timed out"
    text = printable(str(cause), SENTENCE_MAX)
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
