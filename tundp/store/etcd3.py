"""Leases in etcd over its v3 API: our own stubs (etcd3rpc) over grpclib, in pure Python.

The clients that exist have no TLS, no authentication, or a watch that hangs. grpclib runs
on any event loop, and a server that stops answering is noticed by HTTP/2 pings.

    snapshot   one Range, linearizable, whatever the number of leases; no TTL is asked for
    wait       one Watch stream, kept open between calls; progress notices move a quiet one
    create     LeaseGrant, Txn{version == 0: Put}
    update     LeaseGrant, Txn{mod_revision == revision: Put}, LeaseRevoke of our old one
    delete     Txn{mod_revision == revision: DeleteRange}

A lease of etcd's own, the thing with a TTL, is always called etcd lease here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from google.protobuf.message import DecodeError
from grpclib.client import Channel, StreamStreamMethod, UnaryUnaryMethod
from grpclib.config import Configuration
from grpclib.const import Status
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError
from grpclib.protocol import H2Protocol

from tundp.errors import (
    AccessDenied,
    Compacted,
    ConfigNotFound,
    Conflict,
    LeaseFormatError,
    StoreError,
    StoreUnavailable,
)
from tundp.lease import codec
from tundp.lease.model import (
    TTL_UNKNOWN,
    BadEntry,
    BadEntryGone,
    Events,
    Gone,
    Lease,
    LeaseAttributes,
    LeaseEvent,
    LeaseKey,
    Put,
    Snapshot,
)
from tundp.store.access import (
    CERTIFICATE_HINT,
    REQUEST_TIMEOUT_S,
    Endpoint,
    EtcdAccess,
    clean_prefix,
    parse_endpoints,
    tls_context,
)
from tundp.store.etcd3rpc import tundp_etcd3_pb2 as rpc
from tundp.store.names import Names

_log = logging.getLogger(__name__)
T = TypeVar("T")

PING_S: Final = 8.0
PING_TIMEOUT_S: Final = 4.0
"""A watch on a server that hangs ends after PING_S + PING_TIMEOUT_S. Pings more often than
every 5 s would be refused (etcd --grpc-keepalive-min-time)."""
LOGINS: Final = 3
"""Tries of one call to log in again: a server may restart while we do."""
_WINDOW_LEN: Final = 64 << 20
"""HTTP/2 window: a snapshot is one message, and 65,000 leases are 8 MB."""
_CONFIG: Final = Configuration(
    _keepalive_time=PING_S,
    _keepalive_timeout=PING_TIMEOUT_S,
    _http2_max_pings_without_data=0,
    _http2_min_sent_ping_interval_without_data=PING_S,
    http2_connection_window_size=_WINDOW_LEN,
    http2_stream_window_size=_WINDOW_LEN,
)
_SERVICE: Final = "/etcdserverpb."
_FAILURES: Final = (
    GRPCError,
    ProtocolError,
    StreamTerminatedError,
    OSError,
    ssl.SSLError,
    TimeoutError,
    DecodeError,
)
_NO_USER: Final = "user name is empty"
"""What etcd says to a request without a token once auth is on."""
_UNTOUCHED: Final = frozenset({Status.UNAUTHENTICATED, Status.PERMISSION_DENIED})
"""Refusals after which nothing was done for certain."""


class Etcd3Store:
    """The Store over etcd's v3 API (etcd 3.x)."""

    def __init__(self, access: EtcdAccess) -> None:
        self._prefix = clean_prefix(access.prefix)
        self._connection = _Connection(access)
        self._watch: _Watch | None = None
        self._cluster_id: int | None = None
        self._etcd_leases: dict[LeaseKey, int] = {}
        self._revocations: set[asyncio.Task[None]] = set()

    @property
    def description(self) -> str:
        """Where the leases live, for people."""
        return f"etcd v3 at {self._connection.urls}{self._path()}"

    async def network_config(self) -> str:
        """See Store."""
        key = f"{self._prefix}/config"
        answer = await self._connection.call(
            "KV/Range", rpc.RangeRequest(key=key.encode()), rpc.RangeResponse
        )
        if not answer.kvs:
            raise ConfigNotFound(
                f"no network config at {key} in the v3 API; write one with:"
                f""" etcdctl put {key} '{{"Network": "10.5.0.0/16"}}'"""
            )
        return str(answer.kvs[0].value.decode(errors="replace"))

    async def snapshot(self) -> Snapshot:
        """See Store."""
        answer = await self._connection.call(
            "KV/Range",
            rpc.RangeRequest(key=self._subnets, range_end=_after_prefix(self._subnets)),
            rpc.RangeResponse,
        )
        self._cluster_id = answer.header.cluster_id
        # On a thread: thousands of leases take a while, and the loop has others to serve.
        return await asyncio.to_thread(self._to_snapshot, answer)

    async def wait(self, after: int) -> Events:
        """See Store. All events that have come are one batch."""
        if self._watch is None or self._watch.revision != after:
            await self._close_watch()
            self._watch = _Watch(self._connection, self._subnets, after, self._cluster_id)
        watch = self._watch
        try:
            responses = await watch.next()
        except Exception:
            await self._close_watch()
            raise
        events = tuple(self._to_event(event) for answer in responses for event in answer.events)
        return Events(events, watch.revision)

    async def create(
        self, key: LeaseKey, attributes: LeaseAttributes, lease_ttl_s: int | None
    ) -> Lease:
        """See Store."""
        is_absent = rpc.Compare(target=rpc.Compare.VERSION, key=self._name(key), version=0)
        return await self._write(key, attributes, lease_ttl_s, is_absent)

    async def update(
        self,
        key: LeaseKey,
        attributes: LeaseAttributes,
        lease_ttl_s: int | None,
        *,
        revision: int,
    ) -> Lease:
        """See Store."""
        return await self._write(key, attributes, lease_ttl_s, self._is_at(key, revision))

    async def delete(self, key: LeaseKey, *, revision: int) -> None:
        """See Store."""
        removal = rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=self._name(key)))
        await self._transact(key, self._is_at(key, revision), removal)
        self._revoke_soon(self._etcd_leases.pop(key, 0))

    def reconnect(self) -> None:
        """See Store."""
        self._connection.reconnect()

    async def close(self) -> None:
        """See Store."""
        await self._close_watch()
        await asyncio.gather(*self._revocations, return_exceptions=True)
        self._connection.close()
        await asyncio.sleep(0)  # the transport ends in the loop's next turn: let there be one

    def _to_snapshot(self, answer: rpc.RangeResponse) -> Snapshot:
        entries = [self._decode(kv) for kv in answer.kvs]
        leases = tuple(entry for entry in entries if isinstance(entry, Lease))
        bad = tuple(entry for entry in entries if isinstance(entry, BadEntry))
        return Snapshot(leases, answer.header.revision, bad)

    def _path(self) -> str:
        return self._prefix if self._prefix.startswith("/") else f"/{self._prefix}"

    @property
    def _subnets(self) -> bytes:
        return f"{self._prefix}/subnets/".encode()

    def _name(self, key: LeaseKey) -> bytes:
        return self._subnets + str(key).encode()

    def _is_at(self, key: LeaseKey, revision: int) -> rpc.Compare:
        return rpc.Compare(target=rpc.Compare.MOD, key=self._name(key), mod_revision=revision)

    async def _write(
        self,
        key: LeaseKey,
        attributes: LeaseAttributes,
        lease_ttl_s: int | None,
        guard: rpc.Compare,
    ) -> Lease:
        etcd_lease_id, granted_s = 0, None
        if lease_ttl_s is not None:
            granted = await self._connection.call(
                "Lease/LeaseGrant", rpc.LeaseGrantRequest(TTL=lease_ttl_s), rpc.LeaseGrantResponse
            )
            # Never less than asked for; a little more where that is below etcd's least.
            etcd_lease_id, granted_s = granted.ID, granted.TTL
        value = codec.encode_value(attributes).encode()
        put = rpc.RequestOp(
            request_put=rpc.PutRequest(key=self._name(key), value=value, lease=etcd_lease_id)
        )
        try:
            revision = await self._transact(key, guard, put)
        except Conflict:
            self._revoke_soon(etcd_lease_id)
            raise
        # The key hangs on the new etcd lease now; the old one, if it was ours, holds nothing.
        # Nobody waits for that: what is renewed is renewed.
        self._revoke_soon(self._etcd_leases.pop(key, 0))
        self._etcd_leases[key] = etcd_lease_id
        return Lease(key=key, attributes=attributes, revision=revision, lease_ttl_s=granted_s)

    async def _transact(self, key: LeaseKey, guard: rpc.Compare, op: rpc.RequestOp) -> int:
        """Do `op` if `guard` holds, else Conflict; the revision it made.

        Never sent twice: the first time it may have been done, and its answer lost.
        """
        answer = await self._connection.call(
            "KV/Txn",
            rpc.TxnRequest(compare=[guard], success=[op]),
            rpc.TxnResponse,
            once=True,
        )
        if not answer.succeeded:
            raise Conflict(f"{self._name(key).decode()} was written by somebody else")
        return int(answer.header.revision)

    def _revoke_soon(self, etcd_lease_id: int) -> None:
        if etcd_lease_id:
            task = asyncio.ensure_future(self._revoke(etcd_lease_id))
            self._revocations.add(task)
            task.add_done_callback(self._revocations.discard)

    async def _revoke(self, etcd_lease_id: int) -> None:
        """Give back an etcd lease nothing hangs on; should that fail, it expires by itself."""
        with contextlib.suppress(StoreError):
            await self._connection.call(
                "Lease/LeaseRevoke",
                rpc.LeaseRevokeRequest(ID=etcd_lease_id),
                rpc.LeaseRevokeResponse,
                once=True,
            )

    def _decode(self, kv: rpc.KeyValue) -> Lease | BadEntry:
        name = self._name_of(kv)
        try:
            return Lease(
                key=codec.parse_key(name),
                attributes=codec.parse_value(kv.value.decode()),
                revision=kv.mod_revision,
                lease_ttl_s=TTL_UNKNOWN if kv.lease else None,
            )
        except LeaseFormatError as error:
            return BadEntry(name, str(error))
        except UnicodeDecodeError:
            return BadEntry(name, "its value is not UTF-8 text")

    def _to_event(self, event: rpc.Event) -> LeaseEvent:
        if event.type == rpc.Event.PUT:
            entry = self._decode(event.kv)
            return Put(entry) if isinstance(entry, Lease) else entry
        name = self._name_of(event.kv)
        try:
            return Gone(codec.parse_key(name))
        except LeaseFormatError:
            return BadEntryGone(name)

    def _name_of(self, kv: rpc.KeyValue) -> str:
        return str(kv.key[len(self._subnets) :].decode(errors="backslashreplace"))

    async def _close_watch(self) -> None:
        if self._watch is not None:
            watch, self._watch = self._watch, None
            await watch.close()


class _Channel(Channel):
    """A grpclib channel whose endpoint's name is looked up by `names`, not by the event loop."""

    def __init__(self, endpoint: Endpoint, tls: ssl.SSLContext | None, names: Names) -> None:
        super().__init__(endpoint.host.strip("[]"), endpoint.port, ssl=tls, config=_CONFIG)
        self._endpoint = endpoint
        self._names = names

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
        reasons = [_why(failure, self._endpoint) for failure in failures]
        if len(set(reasons)) == 1:
            raise failures[0]
        raise OSError(", ".join(map("{}: {}".format, addresses, reasons)))


class _Connection:
    """One HTTP/2 connection to one endpoint at a time, and the list to go through."""

    def __init__(self, access: EtcdAccess) -> None:
        self._access = access
        self._endpoints = list(parse_endpoints(access.endpoints))
        self._tls = tls_context(access)
        self._tls.set_alpn_protocols(["h2"])
        self._channel: Channel | None = None
        self._lock: asyncio.Lock | None = None
        self._token = ""
        self._is_logged_in = False
        self._names = Names()
        self.urls = ",".join(endpoint.url for endpoint in self._endpoints)

    async def call(
        self, method: str, request: Any, answer_type: type[T], *, once: bool = False
    ) -> T:
        """One request on the first endpoint that answers. `once`: see `use`."""

        async def ask(channel: Channel, metadata: dict[str, str]) -> T:
            unary = UnaryUnaryMethod(channel, _SERVICE + method, type(request), answer_type)
            return await unary(request, timeout=REQUEST_TIMEOUT_S, metadata=metadata)

        return await self.use(ask, once=once)

    async def use(
        self,
        operation: Callable[[Channel, dict[str, str]], Awaitable[T]],
        *,
        once: bool = False,
    ) -> T:
        """`operation(channel, metadata)` on the first endpoint that lets it through.

        once: it must not run twice, so it is tried again only where it cannot have run.
        """
        failures: list[str] = []
        logins_left = LOGINS
        tries_left = len(self._endpoints)
        while tries_left:
            endpoint = self._endpoints[0]
            try:
                channel = await self._connect()
            except _FAILURES as error:
                failures.append(f"{endpoint.url}: {_why(error, endpoint)}")
                self._rotate(None)
                tries_left -= 1
                continue
            token = self._token
            # A member cut off from the leader must say so rather than let us wait.
            metadata = {"hasleader": "true"} | ({"token": token} if token else {})
            try:
                return await operation(channel, metadata)
            except GRPCError as error:
                if logins_left and self._access.username and _wants_login(error):
                    # etcd's simple tokens die with the server that gave them, or of age, and
                    # auth may have been switched on. Whoever comes first logs in for all.
                    logins_left -= 1
                    if self._token == token:
                        self._is_logged_in = False
                    continue
                if (denied := _denial(error, endpoint)) is not None:
                    raise denied from None
                failures.append(f"{endpoint.url}: {_why(error, endpoint)}")
                is_done = once and error.status not in _UNTOUCHED
            except _FAILURES as error:
                failures.append(f"{endpoint.url}: {_why(error, endpoint)}")
                is_done = once
            self._rotate(channel)
            tries_left -= 1
            if is_done:
                break
        raise StoreUnavailable(f"etcd does not answer: {'; '.join(failures)}")

    def lost(self, channel: Channel) -> None:
        """A stream on `channel` broke: whoever comes next starts with another endpoint."""
        self._rotate(channel)

    def reconnect(self) -> None:
        """Have a new connection to the same endpoint; what waits on the old one fails."""
        self._disconnect()

    def close(self) -> None:
        """Close the connection for good."""
        self._disconnect()
        self._names.close()

    def _disconnect(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    async def _connect(self) -> Channel:
        if self._lock is None:
            self._lock = asyncio.Lock()
        async with self._lock:
            endpoint = self._endpoints[0]
            if self._channel is not None:
                if self._access.username and not self._is_logged_in:
                    async with asyncio.timeout(REQUEST_TIMEOUT_S):
                        await self._log_in(self._channel, endpoint)
                return self._channel
            tls = self._tls if endpoint.scheme == "https" else None
            channel = _Channel(endpoint, tls, self._names)
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    await channel.__connect__()
                    if self._access.username and not self._is_logged_in:
                        await self._log_in(channel, endpoint)
            except BaseException:
                channel.close()
                raise
            self._channel = channel
            return channel

    async def _log_in(self, channel: Channel, endpoint: Endpoint) -> None:
        """Get a token, or find that none is needed."""
        method = UnaryUnaryMethod(
            channel,
            f"{_SERVICE}Auth/Authenticate",
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

    def _rotate(self, channel: Channel | None) -> None:
        """Leave `channel`'s endpoint (None: the one that could not be connected) for the next."""
        if channel is not self._channel:
            return  # somebody else has left it already
        if channel is not None:
            channel.close()
            self._channel = None
        self._endpoints.append(self._endpoints.pop(0))


class _Watch:
    """A watch stream in a task of its own, and what came of it and was not taken yet."""

    def __init__(
        self, connection: _Connection, prefix: bytes, after: int, cluster_id: int | None
    ) -> None:
        self.revision = after
        self._connection = connection
        self._prefix = prefix
        self._cluster_id = cluster_id
        self._queue: asyncio.Queue[rpc.WatchResponse | Exception] = asyncio.Queue()
        self._task = asyncio.ensure_future(self._run())

    async def next(self) -> list[rpc.WatchResponse]:
        """What has come since the last call, at least one; `revision` moves on."""
        found = [await self._queue.get()]
        while not self._queue.empty():
            found.append(self._queue.get_nowait())
        taken: list[rpc.WatchResponse] = []
        for answer in found:
            if isinstance(answer, Exception):
                if taken:
                    self._queue.put_nowait(answer)
                    break
                raise answer
            taken.append(answer)
        self.revision = max(self.revision, *map(_revision_of, taken))
        return taken

    async def close(self) -> None:
        """End the stream."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            await self._connection.use(self._pump)
        except Exception as error:  # noqa: BLE001  (whoever waits gets it, a bug of ours, too)
            self._queue.put_nowait(error)

    async def _pump(self, channel: Channel, metadata: dict[str, str]) -> None:
        method = StreamStreamMethod(
            channel, f"{_SERVICE}Watch/Watch", rpc.WatchRequest, rpc.WatchResponse
        )
        create = rpc.WatchCreateRequest(
            key=self._prefix,
            range_end=_after_prefix(self._prefix),
            start_revision=self.revision + 1,
            progress_notify=True,
        )
        async with method.open(metadata=metadata) as stream:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                await stream.send_message(rpc.WatchRequest(create_request=create))
                created = await stream.recv_message()
            if created is not None:
                self._check_created(created)
            try:
                while (answer := await stream.recv_message()) is not None:
                    self._check(answer)
                    if not answer.created:
                        self._queue.put_nowait(answer)
            except _FAILURES as error:
                # Not on to the next endpoint from here: a snapshot comes first.
                self._connection.lost(channel)
                raise StoreUnavailable(f"the watch broke: {_words(error)}") from None
        self._connection.lost(channel)
        raise StoreUnavailable("the watch was ended by etcd")

    def _check_created(self, answer: rpc.WatchResponse) -> None:
        self._check(answer)
        header = answer.header
        if self._cluster_id not in (None, header.cluster_id):
            raise Compacted("another etcd cluster answers: its data was replaced")
        if header.revision < self.revision:
            raise Compacted(
                f"the store is at revision {header.revision}, below {self.revision}:"
                " its data was replaced, or this member lags"
            )

    def _check(self, answer: rpc.WatchResponse) -> None:
        if answer.compact_revision:
            raise Compacted(f"events up to revision {answer.compact_revision} are compacted")
        if answer.canceled:
            if _NO_USER in answer.cancel_reason:
                raise GRPCError(Status.UNAUTHENTICATED, answer.cancel_reason)
            if "permission denied" in answer.cancel_reason:
                raise AccessDenied(
                    f"etcd denies the watch ({answer.cancel_reason}): the role needs to read"
                    f" all keys under {self._prefix.decode()}"
                )
            if "token" in answer.cancel_reason:
                raise GRPCError(Status.UNAUTHENTICATED, answer.cancel_reason)
            raise StoreUnavailable(
                f"etcd cancelled the watch: {answer.cancel_reason or 'no reason'}"
            )


def _revision_of(answer: rpc.WatchResponse) -> int:
    """Up to where a response tells all: its last event, as the header may be far ahead of it."""
    if answer.events:
        return int(answer.events[-1].kv.mod_revision)
    return int(answer.header.revision)


def _wants_login(error: GRPCError) -> bool:
    return error.status is Status.UNAUTHENTICATED or _NO_USER in (error.message or "")


def _after_prefix(prefix: bytes) -> bytes:
    """The end of the range of all keys that start with `prefix`, which ends in a slash."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


def _denial(error: GRPCError, endpoint: Endpoint) -> AccessDenied | None:
    message = error.message or ""
    if error.status is not Status.PERMISSION_DENIED and not _wants_login(error):
        return None
    return AccessDenied(
        f"etcd at {endpoint.url} denies access ({message}):"
        " check --etcd-username, --etcd-password and the role's permissions"
    )


def _why(error: BaseException, endpoint: Endpoint) -> str:
    if isinstance(error, ssl.SSLError):
        return f"TLS: {_words(error)}"
    if endpoint.scheme == "https" and isinstance(error, (StreamTerminatedError, ConnectionError)):
        # With TLS 1.3 the handshake is over for us before the server looks at our certificate.
        return f"{_words(error)} ({CERTIFICATE_HINT})"
    return _words(error)


def _words(error: BaseException) -> str:
    """The reason in a few words."""
    if isinstance(error, GRPCError):
        return (error.message or error.status.name).removeprefix("etcdserver: ")
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno).lower()  # asyncio's own text names the address again
    return str(getattr(error, "strerror", None) or error) or type(error).__name__
