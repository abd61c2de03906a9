"""etcd leases of our keys: granted, put on a key, and revoked once no key hangs on them.

An etcd lease that is on no key stays in etcd for its whole TTL, a day. So whatever becomes of
the write it was granted for, it ends on the key or is revoked:

    written      the one that was on the key, whoever put it there, is revoked
    refused      the new one is revoked
    not known    (no answer, cancelled) both are revoked unless in use, once the key has another
                 revision than the write demands, so that it cannot happen any more
    killed       an id follows from the writer, the key and that revision: when this node writes
                 the key next, it finds the id taken, takes the one after it, and revokes the
                 first once it is UNSURE_S old

Revoking deletes every key on an etcd lease, and there may be others than ours: somebody may have
put two keys on one. So each is looked at first, and left alone if any key hangs on it. etcd cannot
revoke on a condition: between look and revocation its granter may put a key on it. So one that
another process has granted is revoked only when every write it was granted for is long over.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from grpclib.client import UnaryUnaryMethod
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from tundp.errors import AccessDenied, StoreError, StoreUnavailable
from tundp.store.etcd3.channel import EtcdChannel
from tundp.store.etcd3.connection import SERVICE, Connection
from tundp.store.etcd3rpc import tundp_etcd3_pb2 as rpc

UNSURE_S: Final = 60.0
"""Age at which a write without an answer counts as one that will not happen any more, ours or that
of the process that granted an id we found taken."""
CLOSE_S: Final = 2.0
"""What revoking may add to the end of the daemon; what is left then expires."""
IDS: Final = 16
"""Ids of one key and revision, before one at random. Each but the first means a write that was
interrupted, or another node that writes the same key."""


@dataclass(frozen=True, slots=True)
class Sight:
    """A key as etcd has it: its revision, and its etcd lease (0: none)."""

    revision: int
    etcd_lease_id: int


@dataclass(frozen=True, slots=True)
class _Unsure:
    """A write whose outcome is not known."""

    etcd_lease_id: int
    guard: int
    """The revision of the key that it demands; 0: that there is none."""
    since: float
    is_taken: bool
    """The etcd lease was granted by another process, which may be about to write the key."""


class Grants:
    """The etcd leases of the keys one store writes. Keys are bytes, as etcd has them."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._attached: dict[bytes, Sight] = {}
        """What our last successful write of a key has made."""
        self._unsure: dict[bytes, list[_Unsure]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._granting: set[asyncio.Task[int | None]] = set()
        self._unused: set[int] = set()
        """To be revoked, those that no key hangs on."""
        self._taken: set[int] = set()
        """So are these, granted by another process, once they are UNSURE_S old."""
        self._before: set[tuple[bytes, int]] = set()
        """Keys and revisions at which they may have been on an etcd lease that is unused now."""
        self._sweep: asyncio.Task[None] | None = None
        self._is_sweep_due = False
        self._is_closed = False

    @property
    def keys(self) -> frozenset[bytes]:
        """The keys `seen` is to be told of."""
        return frozenset(self._attached.keys() | self._unsure.keys())

    async def grant(self, writer: bytes, key: bytes, guard: int, ttl_s: int) -> tuple[int, int]:
        """An etcd lease for the write of `key` at revision `guard`: its id and its TTL in seconds.

        writer: the same for every process of one node. The TTL may be longer than asked for:
        etcd has a minimum.
        """
        unsure = {each.etcd_lease_id for each in self._unsure.get(key, ())}
        known = unsure | self._unused | self._taken
        for number in range(IDS):
            etcd_lease_id = _id_of(writer, key, guard, number)
            if etcd_lease_id in known:
                continue
            granted_s = await self._try_grant(etcd_lease_id, ttl_s)
            if granted_s is not None:
                return etcd_lease_id, granted_s
            self._note(key, guard, etcd_lease_id, is_taken=True)
        etcd_lease_id = random.SystemRandom().getrandbits(61) | 1 << 61
        granted_s = await self._try_grant(etcd_lease_id, ttl_s)
        if granted_s is None:
            raise StoreUnavailable("etcd has an etcd lease with an id chosen at random")
        return etcd_lease_id, granted_s

    async def _try_grant(self, etcd_lease_id: int, ttl_s: int) -> int | None:
        """The granted TTL; None if there is an etcd lease with this id."""

        async def ask(channel: EtcdChannel, metadata: dict[str, str]) -> int | None:
            method = UnaryUnaryMethod(
                channel,
                f"{SERVICE}Lease/LeaseGrant",
                rpc.LeaseGrantRequest,
                rpc.LeaseGrantResponse,
            )
            request = rpc.LeaseGrantRequest(TTL=ttl_s, ID=etcd_lease_id)
            try:
                answer = await method(request, timeout=self._connection.limit_s, metadata=metadata)
            except GRPCError as error:
                if "lease already exists" in (error.message or ""):
                    return None
                raise
            return int(answer.TTL)

        task = asyncio.ensure_future(self._connection.use(ask))
        self._granting.add(task)
        task.add_done_callback(self._granting.discard)
        try:
            # Not cancelled with the caller: etcd may grant it after we looked whether it has.
            granted_s = await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(functools.partial(self._granted_in_vain, etcd_lease_id))
            raise
        except BaseException:
            self.unused(etcd_lease_id)  # it may have been granted
            raise
        if granted_s is not None:
            self._unused.discard(etcd_lease_id)
        return granted_s

    def _granted_in_vain(self, etcd_lease_id: int, task: asyncio.Task[int | None]) -> None:
        is_answered = not task.cancelled() and task.exception() is None
        if is_answered and task.result() is None:
            self._taken.add(etcd_lease_id)
        else:
            self.unused(etcd_lease_id)

    def written(self, key: bytes, sight: Sight, before: int) -> None:
        """Apply a write of ours; `before`: the etcd lease the key was on until then, or 0."""
        known = self._attached.pop(key, None)
        self._attached[key] = sight
        self.unused(before, 0 if known is None else known.etcd_lease_id)
        self.seen({key: sight})

    def unsure(self, key: bytes, guard: int, etcd_lease_id: int) -> None:
        """Note a write at revision `guard` whose outcome is not known."""
        self._note(key, guard, etcd_lease_id, is_taken=False)

    def _note(self, key: bytes, guard: int, etcd_lease_id: int, *, is_taken: bool) -> None:
        write = _Unsure(etcd_lease_id, guard, asyncio.get_running_loop().time(), is_taken)
        self._unsure.setdefault(key, []).append(write)
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(UNSURE_S, self._settle_old)

    def unused(self, *etcd_lease_ids: int) -> None:
        """Revoke these (0: none) in the background, those that no key hangs on."""
        found = set(etcd_lease_ids) - {0}
        if found:
            self._unused |= found
            self._sweep_soon()

    def seen(self, sights: Mapping[bytes, Sight | None], revision: int = 0) -> None:
        """Apply what a read or an event shows of keys; None: there is none at `revision`."""
        for key, sight in sights.items():
            at = revision if sight is None else sight.revision
            known = self._attached.get(key)
            if known is not None and at > known.revision:
                # Written or deleted by somebody else, or by us without an answer.
                del self._attached[key]
                self.unused(known.etcd_lease_id)
            if sight is not None:
                self._settle(key, sight)
        if self._unused or self._taken or self._before:
            self._sweep_soon()  # what could not be revoked before

    def _settle(self, key: bytes, sight: Sight) -> None:
        """Give up writes of `key` that cannot happen any more now that it is at `sight`."""
        writes = self._unsure.get(key, [])
        over = [each for each in writes if each.guard < sight.revision]
        if any(each.etcd_lease_id == sight.etcd_lease_id for each in over):
            self._attached[key] = sight
        self._drop(key, over)

    def _settle_old(self) -> None:
        now = asyncio.get_running_loop().time()
        self._timer = None
        for key, writes in list(self._unsure.items()):
            self._drop(key, [each for each in writes if now - each.since >= UNSURE_S])
        if self._taken:
            self._sweep_soon()
        if self._unsure:
            self._set_timer()

    def _drop(self, key: bytes, writes: list[_Unsure]) -> None:
        if not writes:
            return
        left = [each for each in self._unsure[key] if each not in writes]
        if left:
            self._unsure[key] = left
        else:
            del self._unsure[key]
        self._before |= {(key, each.guard) for each in writes if each.guard}
        for each in writes:
            (self._taken if each.is_taken else self._unused).add(each.etcd_lease_id)
        self._unused.discard(0)
        self._sweep_soon()

    async def close(self) -> None:
        """Revoke what is unused and old enough. Takes CLOSE_S at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                while self._granting:
                    await asyncio.wait(self._granting)
                for key, writes in list(self._unsure.items()):
                    self._drop(key, writes)
                if self._sweep is not None:
                    await asyncio.wait([self._sweep])
        left = [*self._granting, *([] if self._sweep is None else [self._sweep])]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()
        self._is_closed = True

    # The sweep: a task while there is anything to do

    def _sweep_soon(self) -> None:
        if self._is_closed:
            return
        self._is_sweep_due = True
        if self._sweep is None or self._sweep.done():
            self._sweep = asyncio.ensure_future(self._run_sweep())

    async def _run_sweep(self) -> None:
        while self._is_sweep_due:
            self._is_sweep_due = False
            try:
                for key, revision in tuple(self._before):
                    self._unused |= await self._etcd_lease_at(key, revision)
                    self._before.discard((key, revision))
                for etcd_lease_id in tuple(self._unused):
                    if etcd_lease_id in self._unused:
                        await self._revoke_if_unused(etcd_lease_id, self._unused)
                        self._unused.discard(etcd_lease_id)
                for etcd_lease_id in tuple(self._taken):
                    if await self._revoke_if_unused(etcd_lease_id, self._taken, UNSURE_S):
                        self._taken.discard(etcd_lease_id)
            except StoreError:
                # The next write, snapshot or event tries again; else it expires.
                continue

    async def _etcd_lease_at(self, key: bytes, revision: int) -> set[int]:
        """The etcd lease `key` was on at `revision`; none if that is compacted."""

        async def ask(channel: EtcdChannel, metadata: dict[str, str]) -> set[int]:
            method = UnaryUnaryMethod(
                channel, f"{SERVICE}KV/Range", rpc.RangeRequest, rpc.RangeResponse
            )
            request = rpc.RangeRequest(key=key, revision=revision)
            try:
                answer = await method(request, timeout=self._connection.limit_s, metadata=metadata)
            except GRPCError as error:
                if error.status is Status.OUT_OF_RANGE:
                    return set()  # compacted
                raise
            return {int(kv.lease) for kv in answer.kvs} - {0}

        try:
            return await self._connection.use(ask)
        except AccessDenied:
            return set()

    async def _revoke_if_unused(
        self, etcd_lease_id: int, unused: set[int], min_age_s: float = 0.0
    ) -> bool:
        """Revoke it if no key hangs on it; False if it is too young to tell.

        unused: where it is as long as this is wanted.
        """

        async def revoke(channel: EtcdChannel, metadata: dict[str, str]) -> None:
            method = UnaryUnaryMethod(
                channel,
                f"{SERVICE}Lease/LeaseRevoke",
                rpc.LeaseRevokeRequest,
                rpc.LeaseRevokeResponse,
            )
            request = rpc.LeaseRevokeRequest(ID=etcd_lease_id)
            try:
                await method(request, timeout=self._connection.limit_s, metadata=metadata)
            except GRPCError as error:
                if error.status is not Status.NOT_FOUND:  # it has expired
                    raise

        try:
            found = await self._connection.call(
                "Lease/LeaseTimeToLive",
                rpc.LeaseTimeToLiveRequest(ID=etcd_lease_id, keys=True),
                rpc.LeaseTimeToLiveResponse,
            )
            if found.TTL < 0 or found.keys:
                return True
            if found.grantedTTL - found.TTL < min_age_s:
                self._set_timer()
                return False
            # Granted again meanwhile, for another write of the same key: not unused any more.
            if etcd_lease_id in unused:
                await self._connection.use(revoke)
        except AccessDenied:
            pass  # keys hang on it that we may not read or write
        return True


def _id_of(writer: bytes, key: bytes, guard: int, number: int) -> int:
    """The `number`-th id of an etcd lease for a write of `key` at `guard`; positive, 62 bits."""
    digest = hashlib.sha256(b"tundp %d %d %s %s" % (guard, number, key, writer)).digest()
    return int.from_bytes(digest[:8], "big") >> 2 | 1 << 61
