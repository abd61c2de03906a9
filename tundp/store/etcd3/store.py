"""Leases in etcd over its v3 API: our own stubs (etcd3rpc) over grpclib, in pure Python.

The clients that exist have no TLS, no authentication, or a watch that hangs. grpclib runs
on any event loop, and a server that stops answering is noticed by HTTP/2 pings.

    snapshot   one Range, linearizable, whatever the number of leases; no TTL is asked for
    wait       one Watch stream, kept open between calls; progress notices move a quiet one
    create     LeaseGrant, Txn{version == 0: Put}
    update     LeaseGrant, Txn{mod_revision == revision: Put}; the etcd lease the key was on is
               revoked afterwards (LeaseTimeToLive, LeaseRevoke), if no other key is on it
    delete     Txn{mod_revision == revision: DeleteRange}

A lease of etcd's own, the thing with a TTL, is always called etcd lease here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Set
from typing import Final

from tundp import collector
from tundp.blocking import entries_in, off_loop
from tundp.errors import (
    AccessDenied,
    ConfigNotFound,
    Conflict,
    LeaseFormatError,
)
from tundp.lease import codec
from tundp.lease.identity import CHALLENGE, NODE
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
    EtcdAccess,
    clean_prefix,
)
from tundp.store.base import StoreWarning
from tundp.store.etcd3.connection import Connection
from tundp.store.etcd3.grants import Grants, Sight
from tundp.store.etcd3.watch import Watch, after_prefix
from tundp.store.etcd3.words import EtcdLeaseGoneError
from tundp.store.etcd3rpc import tundp_etcd3_pb2 as rpc
from tundp.store.tls import TlsFiles

GRANTS: Final = 3
"""Etcd leases granted for one write, if those before were gone when it came."""


class Etcd3Store:
    """The Store over etcd's v3 API (etcd 3.x)."""

    api: Final = "v3"

    def __init__(self, access: EtcdAccess, tls: TlsFiles | None = None) -> None:
        """`tls`: the certificate files of `access`, where another store uses them, too."""
        self._prefix = clean_prefix(access.prefix)
        self._tls = tls or TlsFiles(access)
        self._connection = Connection(access, self._tls)
        self._watch: Watch | None = None
        self._cluster_id: int | None = None
        self._grants = Grants(self._connection)

    @property
    def description(self) -> str:
        """Where the leases live, for people."""
        return f"etcd v3 at {self._connection.urls}{self._path()}"

    @property
    def warnings(self) -> tuple[StoreWarning, ...]:
        """See Store."""
        return self._tls.warnings

    @property
    def round_s(self) -> float:
        """See Store."""
        return self._connection.round_s

    async def choose_api(self, api: str) -> None:
        """See Store."""

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
            rpc.RangeRequest(key=self._subnets, range_end=after_prefix(self._subnets)),
            rpc.RangeResponse,
        )
        self._cluster_id = answer.header.cluster_id
        # On a thread: thousands of leases take a while, and the loop has others to serve.
        snapshot, sights = await asyncio.to_thread(self._to_snapshot, answer, self._grants.keys)
        self._grants.seen(sights, snapshot.revision)
        return snapshot

    async def wait(self, after: int) -> Events:
        """See Store. All events that have come are one batch."""
        if self._watch is None or self._watch.revision != after:
            await self._close_watch()
            self._watch = Watch(self._connection, self._subnets, after, self._cluster_id)
        watch = self._watch
        try:
            responses = await watch.next()
        except Exception:
            await self._close_watch()
            raise
        found = [event for answer in responses for event in answer.events]
        for event in found:
            self._note_sight(event)
        lens = sum(len(event.kv.value) for event in found)
        events = await off_loop(lambda: tuple(map(self._to_event, found)), entries_in(lens))
        return Events(events, watch.revision)

    async def create(
        self, key: LeaseKey, attributes: LeaseAttributes, lease_ttl_s: int | None
    ) -> Lease:
        """See Store."""
        is_absent = rpc.Compare(target=rpc.Compare.VERSION, key=self._name(key), version=0)
        return await self._write(key, attributes, lease_ttl_s, is_absent, at=0)

    async def update(
        self,
        key: LeaseKey,
        attributes: LeaseAttributes,
        lease_ttl_s: int | None,
        *,
        revision: int,
    ) -> Lease:
        """See Store."""
        guard = self._is_at(key, revision)
        return await self._write(key, attributes, lease_ttl_s, guard, at=revision)

    async def delete(self, key: LeaseKey, *, revision: int) -> None:
        """See Store."""
        name = self._name(key)
        removal = rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=name, prev_kv=True))
        answer = await self._transact(key, self._is_at(key, revision), removal)
        removed = answer.responses[0].response_delete_range.prev_kvs
        self._grants.seen({name: None}, answer.header.revision)
        self._grants.unused(*(kv.lease for kv in removed))

    def reconnect(self) -> None:
        """See Store."""
        self._connection.reconnect()

    async def close(self) -> None:
        """See Store."""
        await self._close_watch()
        await self._grants.close()
        self._connection.close()
        await asyncio.sleep(0)  # the transport is closed in the next iteration of the loop

    def _to_snapshot(
        self, answer: rpc.RangeResponse, own: Set[bytes]
    ) -> tuple[Snapshot, dict[bytes, Sight | None]]:
        """The snapshot, and what it shows of the keys in `own`."""
        sights: dict[bytes, Sight | None] = dict.fromkeys(own)
        sights |= {kv.key: _sight_of(kv) for kv in answer.kvs if kv.key in own}
        with collector.making(len(answer.kvs)):
            entries = [self._decode(kv) for kv in answer.kvs]
        leases = tuple(entry for entry in entries if isinstance(entry, Lease))
        bad = tuple(entry for entry in entries if isinstance(entry, BadEntry))
        return Snapshot(leases, answer.header.revision, bad), sights

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
        *,
        at: int,
    ) -> Lease:
        """Write `key` if `guard` holds, which demands that it is at revision `at` (0: absent).

        With another etcd lease where the one granted for it is gone already: an etcd that hung, or
        whose leader changed, in between.
        """
        for _ in range(GRANTS - 1):
            with contextlib.suppress(EtcdLeaseGoneError):
                return await self._try_write(key, attributes, lease_ttl_s, guard, at=at)
        return await self._try_write(key, attributes, lease_ttl_s, guard, at=at)

    async def _try_write(
        self,
        key: LeaseKey,
        attributes: LeaseAttributes,
        lease_ttl_s: int | None,
        guard: rpc.Compare,
        *,
        at: int,
    ) -> Lease:
        """The same, once. EtcdLeaseGoneError: nothing was written."""
        name = self._name(key)
        etcd_lease_id, granted_s = 0, None
        if lease_ttl_s is not None:
            writer = _writer_of(attributes)
            etcd_lease_id, granted_s = await self._grants.grant(writer, name, at, lease_ttl_s)
        value = codec.encode_value(attributes).encode()
        put = rpc.RequestOp(
            request_put=rpc.PutRequest(key=name, value=value, lease=etcd_lease_id, prev_kv=True)
        )
        try:
            answer = await self._transact(key, guard, put)
        except (Conflict, AccessDenied, EtcdLeaseGoneError):
            self._grants.unused(etcd_lease_id)
            raise
        except BaseException:
            self._grants.unsure(name, at, etcd_lease_id)
            raise
        revision = int(answer.header.revision)
        before = answer.responses[0].response_put.prev_kv.lease
        self._grants.written(name, Sight(revision, etcd_lease_id), before)
        return Lease(key=key, attributes=attributes, revision=revision, lease_ttl_s=granted_s)

    async def _transact(
        self, key: LeaseKey, guard: rpc.Compare, op: rpc.RequestOp
    ) -> rpc.TxnResponse:
        """Commit `op` if `guard` holds, else raise Conflict; return etcd's answer.

        Never retried after it was sent: it may have been committed, and the answer lost.
        """
        answer = await self._connection.call(
            "KV/Txn",
            rpc.TxnRequest(compare=[guard], success=[op]),
            rpc.TxnResponse,
            once=True,
        )
        if not answer.succeeded:
            raise Conflict(f"{self._name(key).decode()} was written by somebody else")
        return answer

    def _decode(self, kv: rpc.KeyValue) -> Lease | BadEntry:
        name = self._name_of(kv)
        try:
            key = codec.parse_key(name)
        except LeaseFormatError as error:
            return BadEntry(name, str(error), is_name_bad=True)
        try:
            return Lease(
                key=key,
                attributes=codec.parse_value(kv.value.decode()),
                revision=kv.mod_revision,
                lease_ttl_s=TTL_UNKNOWN if kv.lease else None,
            )
        except LeaseFormatError as error:
            return BadEntry(name, str(error))
        except UnicodeDecodeError:
            return BadEntry(name, "its value is not UTF-8 text")

    def _note_sight(self, event: rpc.Event) -> None:
        if event.kv.key in self._grants.keys:
            is_put = event.type == rpc.Event.PUT
            sight = _sight_of(event.kv) if is_put else None
            self._grants.seen({event.kv.key: sight}, event.kv.mod_revision)

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


def _writer_of(attributes: LeaseAttributes) -> bytes:
    """Who writes a lease value: the same for every process of a node, another for every node.

    A challenge is written by another node than the one whose name the value bears.
    """
    extra = attributes.extra
    return f"{attributes.public_ip} {extra.get(NODE, '')} {extra.get(CHALLENGE, '')}".encode()


def _sight_of(kv: rpc.KeyValue) -> Sight:
    return Sight(kv.mod_revision, kv.lease)
