"""Leases in etcd over its v2 API, through python-etcd."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Final

import etcd

from tundp import collector
from tundp.blocking import entries_in, off_loop
from tundp.errors import (
    Compacted,
    ConfigNotFound,
    Conflict,
    LeaseFormatError,
    StoreError,
)
from tundp.lease import codec
from tundp.lease.model import (
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
from tundp.store.etcd2.connection import Client, Connection, WatchClient, check_credentials
from tundp.store.tls import TlsFiles

_REMOVALS: Final = frozenset({"delete", "expire", "compareAndDelete"})


class Etcd2Store:
    """The Store over etcd's v2 API (etcd 2.x, or 3.0 to 3.5 with --enable-v2)."""

    api: Final = "v2"

    def __init__(self, access: EtcdAccess, tls: TlsFiles | None = None) -> None:
        """`tls`: the certificate files of `access`, where another store uses them, too."""
        self._prefix = "/" + clean_prefix(access.prefix).removeprefix("/")
        if self._prefix == "/":
            self._prefix = ""
        check_credentials(access)
        self._tls = tls or TlsFiles(access)
        self._requests = Connection(access, self._tls, Client, "etcd v2")
        self._watch = Connection(access, self._tls, WatchClient, "etcd v2 watch")

    @property
    def description(self) -> str:
        """Where the leases live, for people."""
        return f"etcd v2 at {self._requests.urls}{self._prefix}"

    @property
    def warnings(self) -> tuple[StoreWarning, ...]:
        """See Store."""
        return self._tls.warnings

    @property
    def round_s(self) -> float:
        """See Store."""
        return self._requests.round_s

    async def choose_api(self, api: str) -> None:
        """See Store."""

    async def network_config(self) -> str:
        """See Store."""
        path = f"{self._prefix}/config"
        try:
            result = await self._requests.call(lambda client: client.read(path, quorum=True))
        except etcd.EtcdKeyNotFound:
            raise ConfigNotFound(
                f"no network config at {path}; write one with: ETCDCTL_API=2"
                f""" etcdctl set {path} '{{"Network": "10.5.0.0/16"}}'"""
            ) from None
        if result.dir or result.value is None:
            raise ConfigNotFound(f"{path} is a directory, not the network config")
        return str(result.value)

    async def snapshot(self) -> Snapshot:
        """See Store."""
        try:
            result = await self._requests.call(
                lambda client: client.read(self._subnets, quorum=True, recursive=True, sorted=True)
            )
        except etcd.EtcdKeyNotFound as error:
            return Snapshot((), _index_of(error, self.description))
        # On a thread: thousands of leases take a while, and the loop has others to serve.
        return await asyncio.to_thread(self._to_snapshot, result)

    async def wait(self, after: int) -> Events:
        """See Store. One event at a time, as the v2 API gives them."""
        result = await self._watch.call(lambda client: client.next_event(self._subnets, after))
        if result is None:
            return Events((), after)
        entries = entries_in(len(result.value or ""))
        events = await off_loop(lambda: self._to_events(result), entries)
        return Events(events, result.modifiedIndex)

    async def create(
        self, key: LeaseKey, attributes: LeaseAttributes, lease_ttl_s: int | None
    ) -> Lease:
        """See Store. Not repeated on another endpoint: the first may have done it."""
        return await self._write(key, attributes, lease_ttl_s, prevExist=False)

    async def update(
        self,
        key: LeaseKey,
        attributes: LeaseAttributes,
        lease_ttl_s: int | None,
        *,
        revision: int,
    ) -> Lease:
        """See Store."""
        return await self._write(key, attributes, lease_ttl_s, prevIndex=revision)

    async def delete(self, key: LeaseKey, *, revision: int) -> None:
        """See Store.

        Not etcd's own compare-and-delete: flannel v0.11 takes its event for a lease with
        an empty value, and its watch sticks. The guard is a write of the same value with
        a TTL of a second; should we end before the plain delete, expiry does its work.
        """
        path = self._path(key)

        def take_out(client: Any) -> None:
            value = client.read(path, quorum=True).value
            client.write(path, value, ttl=1, prevIndex=revision)
            with contextlib.suppress(etcd.EtcdKeyNotFound):
                client.delete(path)

        try:
            await self._requests.call(take_out, once=True)
        except (etcd.EtcdCompareFailed, etcd.EtcdKeyNotFound) as error:
            raise Conflict(f"{path} was changed by somebody else: {error}") from None

    def reconnect(self) -> None:
        """See Store. A request under way ends by its own timeout."""
        self._requests.reconnect()
        self._watch.reconnect()

    async def close(self) -> None:
        """See Store."""
        self._requests.close()
        self._watch.close()

    def _to_snapshot(self, result: etcd.EtcdResult) -> Snapshot:
        if not result.dir:
            # A value where the leases belong: an empty table would take every peer away.
            raise StoreError(f"{self._subnets} is a value in {self.description}, not a directory")
        # Direct children only: what lies deeper is no lease, whatever its last part looks like.
        children = result._children  # noqa: SLF001  (python-etcd offers only all leaves)
        with collector.making(len(children)):
            entries = [self._decode(etcd.EtcdResult(None, raw)) for raw in children]
        leases = tuple(entry for entry in entries if isinstance(entry, Lease))
        bad = tuple(entry for entry in entries if isinstance(entry, BadEntry))
        return Snapshot(leases, result.etcd_index, bad)

    @property
    def _subnets(self) -> str:
        return f"{self._prefix}/subnets"

    def _path(self, key: LeaseKey) -> str:
        # & is legal in a URL path; nothing else a key prints could end one.
        return f"{self._subnets}/{key}"

    def _decode(self, node: etcd.EtcdResult) -> Lease | BadEntry:
        name = self._name_of(node)
        if node.dir:
            return BadEntry(name, "a directory, where only leases belong")
        try:
            key = codec.parse_key(name)
        except LeaseFormatError as error:
            return BadEntry(name, str(error), is_name_bad=True)
        try:
            return Lease(
                key=key,
                attributes=codec.parse_value(node.value or ""),
                revision=node.modifiedIndex,
                lease_ttl_s=node.ttl,
            )
        except LeaseFormatError as error:
            return BadEntry(name, str(error))

    def _to_events(self, result: etcd.EtcdResult) -> tuple[LeaseEvent, ...]:
        if result.action not in _REMOVALS:
            entry = self._decode(result)
            return (Put(entry) if isinstance(entry, Lease) else entry,)
        if result.dir:
            # The whole directory went at once: which leases it held only a snapshot tells.
            raise Compacted(f"directory {result.key} was removed")
        name = self._name_of(result)
        if "/" in name:
            # Inside a directory, which itself is the bad entry.
            return ()
        try:
            return (Gone(codec.parse_key(name)),)
        except LeaseFormatError:
            return (BadEntryGone(name),)

    def _name_of(self, node: etcd.EtcdResult) -> str:
        # What lies in a directory below is no lease, whatever its last part looks like.
        return str(node.key).removeprefix(f"{self._subnets}/")

    async def _write(
        self, key: LeaseKey, attributes: LeaseAttributes, lease_ttl_s: int | None, **guard: Any
    ) -> Lease:
        path = self._path(key)
        value = codec.encode_value(attributes)
        # An empty ttl removes an expiry the key may have; None would leave the field out.
        ttl = "" if lease_ttl_s is None else lease_ttl_s
        try:
            result = await self._requests.call(
                lambda client: client.write(path, value, ttl=ttl, **guard), once=True
            )
        except (etcd.EtcdAlreadyExist, etcd.EtcdCompareFailed, etcd.EtcdKeyNotFound) as error:
            raise Conflict(f"{path} was written by somebody else: {error}") from None
        return Lease(
            key=key,
            attributes=attributes,
            revision=result.modifiedIndex,
            lease_ttl_s=lease_ttl_s,
        )


def _index_of(error: etcd.EtcdKeyNotFound, where: str) -> int:
    index = (error.payload or {}).get("index")
    if not isinstance(index, int):
        raise StoreError(f"{where} answers 'key not found' without an index: {error}")
    return index
