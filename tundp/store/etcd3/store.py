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
from typing import Final

from tundp.errors import (
    ConfigNotFound,
    Conflict,
    LeaseFormatError,
    StoreError,
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
    EtcdAccess,
    clean_prefix,
)
from tundp.store.base import StoreWarning
from tundp.store.etcd3.connection import Connection
from tundp.store.etcd3.watch import Watch, after_prefix
from tundp.store.etcd3rpc import tundp_etcd3_pb2 as rpc


class Etcd3Store:
    """The Store over etcd's v3 API (etcd 3.x)."""

    api: Final = "v3"
    warnings: Final[tuple[StoreWarning, ...]] = ()

    def __init__(self, access: EtcdAccess) -> None:
        self._prefix = clean_prefix(access.prefix)
        self._connection = Connection(access)
        self._watch: Watch | None = None
        self._cluster_id: int | None = None
        self._etcd_leases: dict[LeaseKey, int] = {}
        self._revocations: set[asyncio.Task[None]] = set()

    @property
    def description(self) -> str:
        """Where the leases live, for people."""
        return f"etcd v3 at {self._connection.urls}{self._path()}"

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
        return await asyncio.to_thread(self._to_snapshot, answer)

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
        await asyncio.sleep(0)  # the transport is closed in the next iteration of the loop

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
            # At least what was asked for: etcd has a minimum.
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
        # The key is attached to the new etcd lease; revoke our old one in the background.
        self._revoke_soon(self._etcd_leases.pop(key, 0))
        self._etcd_leases[key] = etcd_lease_id
        return Lease(key=key, attributes=attributes, revision=revision, lease_ttl_s=granted_s)

    async def _transact(self, key: LeaseKey, guard: rpc.Compare, op: rpc.RequestOp) -> int:
        """Commit `op` if `guard` holds, else raise Conflict; return the new revision.

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
        return int(answer.header.revision)

    def _revoke_soon(self, etcd_lease_id: int) -> None:
        if etcd_lease_id:
            task = asyncio.ensure_future(self._revoke(etcd_lease_id))
            self._revocations.add(task)
            task.add_done_callback(self._revocations.discard)

    async def _revoke(self, etcd_lease_id: int) -> None:
        """Revoke an etcd lease no key is attached to. If that fails, it expires."""
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
