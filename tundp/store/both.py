"""Leases in both APIs of one etcd cluster, for flannels of both ages in one overlay.

Why one room: two halves of one state, judged together.

The v2 and v3 key spaces know nothing of each other: a flannel up to 0.17 sees only v2, a
later one only v3. This store shows the union of both, and writes our own lease into
both, v2 first: a subnet is ours when nobody has it in either. While one of the two is away
its last word counts, the other is followed, and the lease in the other is renewed.

What it does not do is copy other nodes' leases from one to the other: an old flannel and
a new one see us, and we see both, but they do not see each other.

A lease's `revision` here is a number of our own that stands for its revisions in the two
stores, rising whenever either does; so is that of a snapshot.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from dataclasses import replace
from itertools import islice
from typing import Any, Final

from tundp.backoff import Backoff, Outage, Ration
from tundp.errors import (
    Compacted,
    ConfigError,
    ConfigNotFound,
    Conflict,
    LeaseFormatError,
    StoreError,
    StoreUnavailable,
)
from tundp.lease.codec import parse_key
from tundp.lease.identity import identity_of
from tundp.lease.model import (
    TTL_UNKNOWN,
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
from tundp.lease.network import NetworkConfig
from tundp.lease.table import LeaseTable
from tundp.store.base import Store, StoreWarning

_log = logging.getLogger(__name__)

AWAY_LOOK_S: Final = 1.0
RENEW_NOW_S: Final = 1.0
"""TTL reported for a lease that only one of the two stores has, so that its holder renews it (and
writes it to both) immediately."""
_CONTESTED_STEP: Final = "stop one of the two nodes and delete its entry"
CONTESTED_NAMED: Final = 10
"""Warnings about subnets of two nodes; the store decides how many there are."""
_VIEWS: Final = 8
"""Snapshots `wait` can continue from. The claim takes some beside the watch, but fewer."""


class _Side:
    """The known state of one of the two stores, and the pending wait for its next update."""

    def __init__(self, store: Store, snapshot: Snapshot) -> None:
        self.table = LeaseTable()
        self._store = store
        self._revision = 0
        self._waiting: asyncio.Task[Events | Snapshot] | None = None
        self._outage = Outage(_log, store.description)
        self.is_away = False
        self.touched: set[str] = set()
        """Names of entries that changed since the state was given last."""
        self.is_whole = True
        """Whether more changed than is in `touched`."""
        self.apply(snapshot)

    def wait(self) -> asyncio.Task[Events | Snapshot]:
        """The pending wait for this store's next update; started if there is none."""
        if self._waiting is None:
            self._waiting = asyncio.ensure_future(self._next())
        return self._waiting

    def known(self) -> Snapshot:
        """The last known state of this store."""
        leases = tuple(self.table.leases.values())
        return Snapshot(leases, self._revision, tuple(self.table.bad_entries.values()))

    async def _next(self) -> Events | Snapshot:
        """The next update. Retries while the store does not answer: the other one goes on."""
        try:
            return await self._store.wait(self._revision)
        except Compacted:
            pass
        except StoreError as error:
            self._failed(error)
        backoff = Backoff(0.5, 5.0)
        while True:
            try:
                snapshot = await self._store.snapshot()
            except StoreError as error:
                self._failed(error)
                await asyncio.sleep(backoff.next_s())
            else:
                self.is_away = False
                self._outage.ended(now=asyncio.get_running_loop().time())
                return snapshot

    def _failed(self, error: StoreError) -> None:
        self.is_away = True
        self._outage.failed(error, now=asyncio.get_running_loop().time())

    def take(self) -> None:
        """Apply the pending wait's update if it has completed; raise its exception."""
        if self._waiting is not None and self._waiting.done():
            task, self._waiting = self._waiting, None
            self.apply(task.result())

    async def stop(self) -> None:
        if self._waiting is not None:
            task, self._waiting = self._waiting, None
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def apply(self, update: Events | Snapshot) -> None:
        self._revision = update.revision
        if isinstance(update, Snapshot):
            self.table.apply(update)
            self.is_whole = True
        else:
            news = tuple(filter(self._is_news, update.events))
            self.touched.update(map(_name_of, news))
            self.table.apply(Events(news, update.revision))

    def wrote(self, lease: Lease) -> None:
        """Apply our own write now; the watch reports it later."""
        self.touched.add(str(lease.key))
        self.table.apply(Events((Put(lease),), self._revision))

    def _is_news(self, event: LeaseEvent) -> bool:
        if not isinstance(event, Put):
            return True
        key = event.lease.key
        known = self.table.leases.get(key)
        # What made an unreadable entry readable is news, though it be our own write.
        if known is None or str(key) in self.table.bad_entries:
            return True
        return event.lease.revision > known.revision


_View = tuple[_Side, _Side]
_Pair = tuple[int | None, int | None]
ParseNetworkConfig = Callable[[str, str], NetworkConfig]


class BothStore:
    """The Store over two others, v2 and v3. See Store; `wait` gives events where it can."""

    api: Final = ""

    def __init__(self, v2: Store, v3: Store, *, parse: ParseNetworkConfig) -> None:
        """parse: text and origin of a network config to what it says; ConfigError."""
        self._stores = (v2, v3)
        self._parse = parse
        self._count = 0
        self._count_given = -1
        """The revision of what `wait` gave last."""
        self._versions: dict[LeaseKey, tuple[int, tuple[int | None, int | None]]] = {}
        self._contested: dict[LeaseKey, str] = {}
        # By the revision of the snapshot it gave: the last few, since several may look.
        self._views: dict[int, _View] = {}
        self._watched: _View | None = None
        self._latest: _View | None = None
        self._own: LeaseAttributes | None = None
        """What we wrote last: which of two differing leases of a subnet is ours."""
        self._own_key: LeaseKey | None = None
        self._halves = Ration()
        self._own_changed = asyncio.Event()

    @property
    def description(self) -> str:
        """Where the leases live, for people."""
        return " and ".join(store.description for store in self._stores)

    @property
    def warnings(self) -> tuple[StoreWarning, ...]:
        """Subnets that the two give to different nodes, and warnings of either, once."""
        texts = list(islice(self._contested.values(), CONTESTED_NAMED))
        if more := len(self._contested) - len(texts):
            texts.append(f"and {more} more subnets")
        contested = (
            StoreWarning(id="contested", evidence=text, next_step=_CONTESTED_STEP) for text in texts
        )
        v2, v3 = (store.warnings for store in self._stores)
        return (*contested, *dict.fromkeys((*v2, *v3)))

    @property
    def round_s(self) -> float:
        """See Store. Both are asked at once."""
        return max(store.round_s for store in self._stores)

    async def choose_api(self, api: str) -> None:
        """See Store."""

    async def network_config(self) -> str:
        """See Store. Both must have one, and they must agree."""
        texts = await self._both(
            *(store.network_config() for store in self._stores), missing=ConfigNotFound
        )
        v2, v3 = (
            self._parse(text, store.description)
            for text, store in zip(texts, self._stores, strict=True)
        )
        if v2 != v3:
            raise ConfigError(
                f"the network configs of {self.description} differ: with --etcd-api=both they"
                " must say the same"
            )
        return str(texts[1])

    async def snapshot(self) -> Snapshot:
        """See Store."""
        heard = await asyncio.gather(
            *(store.snapshot() for store in self._stores), return_exceptions=True
        )
        for number, answer in enumerate(heard):
            other = heard[1 - number]
            if not isinstance(answer, BaseException):
                continue
            is_bearable = isinstance(answer, StoreUnavailable) and self._latest is not None
            if not is_bearable or isinstance(other, BaseException):
                raise answer
        sides = []
        for number, answer in enumerate(heard):
            if isinstance(answer, Snapshot):
                sides.append(_Side(self._stores[number], answer))
            else:
                assert self._latest is not None
                # One store does not answer: its last state still counts; follow the other.
                side = _Side(self._stores[number], self._latest[number].known())
                side.is_away = True
                sides.append(side)
        return self._give((sides[0], sides[1]))

    async def wait(self, after: int) -> Events | Snapshot:
        """See Store. What is waited from is the state `after` was the revision of."""
        view = self._views.get(after)
        if view is None:
            raise Compacted("too many snapshots ago")
        is_next = view is self._watched and after == self._count_given
        if view is not self._watched:
            await self._stop_watching()
            self._watched = view
        changed = asyncio.ensure_future(self._own_changed.wait())
        try:
            done: set[Any] = set()
            while not done:
                done, _ = await asyncio.wait(
                    [*(side.wait() for side in view), changed],
                    timeout=AWAY_LOOK_S,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if not done and all(side.is_away for side in view):
                    raise StoreUnavailable(f"neither {self.description} answers")
            for side in view:
                side.take()
        except BaseException:
            await self._stop_watching()
            raise
        finally:
            changed.cancel()
        is_own = self._own_changed.is_set()
        self._own_changed.clear()
        if is_own or not is_next or any(side.is_whole for side in view):
            given: Events | Snapshot = self._give(view)
        else:
            given = self._give_events(view)
        self._count_given = given.revision
        return given

    async def create(
        self, key: LeaseKey, attributes: LeaseAttributes, lease_ttl_s: int | None
    ) -> Lease:
        """See Store. Taken back in v2 when somebody has it in v3."""
        return await self._write(key, attributes, lease_ttl_s, (None, None))

    async def update(
        self,
        key: LeaseKey,
        attributes: LeaseAttributes,
        lease_ttl_s: int | None,
        *,
        revision: int,
    ) -> Lease:
        """See Store. Where only one of the two has it, it is created in the other."""
        return await self._write(key, attributes, lease_ttl_s, self._revisions(key, revision))

    async def delete(self, key: LeaseKey, *, revision: int) -> None:
        """See Store."""
        for store, at in zip(self._stores, self._revisions(key, revision), strict=True):
            if at is not None:
                await store.delete(key, revision=at)
        self._versions.pop(key, None)

    def reconnect(self) -> None:
        """See Store."""
        for store in self._stores:
            store.reconnect()

    async def close(self) -> None:
        """See Store."""
        await self._stop_watching()
        for store in self._stores:
            await store.close()

    async def _write(
        self,
        key: LeaseKey,
        attributes: LeaseAttributes,
        lease_ttl_s: int | None,
        before: tuple[int | None, int | None],
    ) -> Lease:
        self._refuse_contested(key)
        written: list[Lease | None] = []
        away: StoreUnavailable | None = None
        for number, (store, at) in enumerate(zip(self._stores, before, strict=True)):
            try:
                if at is None:
                    lease = await store.create(key, attributes, lease_ttl_s)
                else:
                    lease = await store.update(key, attributes, lease_ttl_s, revision=at)
            except Conflict:
                if written and written[0] is not None and before[0] is None:
                    with contextlib.suppress(Conflict):
                        await self._stores[0].delete(key, revision=written[0].revision)
                raise
            except StoreUnavailable as error:
                self._wrote(attributes)  # it may have been
                if before == (None, None):
                    raise  # a new lease needs both
                # Write to the other store all the same: it must not lose the lease, too.
                away = error
                written.append(None)
                continue
            self._wrote(attributes)
            self._own_key = key
            written.append(lease)
            if self._watched is not None:
                self._watched[number].wrote(lease)
        revisions = tuple(
            at if lease is None else lease.revision
            for at, lease in zip(before, written, strict=True)
        )
        if away is not None:
            # Keep the revision the caller knows: it will retry.
            self._versions[key] = (self._versions[key][0], (revisions[0], revisions[1]))
            raise away
        ttls = [lease.lease_ttl_s for lease in written if lease is not None]
        return Lease(
            key=key,
            attributes=attributes,
            revision=self._version(key, (revisions[0], revisions[1])),
            lease_ttl_s=min((ttl for ttl in ttls if ttl is not None), default=None),
        )

    def _wrote(self, attributes: LeaseAttributes) -> None:
        """Record what we wrote. Wakes the watch: another of two differing leases may be ours."""
        if self._own != attributes:
            self._own = attributes
            self._own_changed.set()

    def _refuse_contested(self, key: LeaseKey) -> None:
        """Raise Conflict if the two stores lease `key` to two different nodes."""
        if self._latest is None:
            return
        v2, v3 = (side.table.leases.get(key) for side in self._latest)
        if v2 is not None and v3 is not None and _holders_differ(v2, v3):
            raise Conflict(
                f"{key} is leased to {v2.attributes.public_ip} in etcd v2 and to"
                f" {v3.attributes.public_ip} in v3"
            )

    def _revisions(self, key: LeaseKey, revision: int) -> tuple[int | None, int | None]:
        version, revisions = self._versions.get(key, (0, (None, None)))
        if version != revision:
            raise Conflict(f"{key} was written by somebody else since we looked")
        return revisions

    def _version(self, key: LeaseKey, revisions: tuple[int | None, int | None]) -> int:
        """The revision that stands for this pair of store revisions of `key`."""
        number, known = self._versions.get(key, (0, (None, None)))
        if number and revisions == known:
            return number
        if key == self._own_key:
            self._note_half(key, known, revisions)
        self._count += 1
        self._versions[key] = (self._count, revisions)
        return self._count

    def _note_half(self, key: LeaseKey, before: _Pair, now: _Pair) -> None:
        """Log that our own lease is gone from one of the two; its renewal creates it again."""
        is_half = None not in before and now.count(None) == 1
        if is_half and self._halves.take(asyncio.get_running_loop().time()):
            where, more = self._stores[now.index(None)].description, self._halves.withheld_words()
            _log.warning(
                "lease %s was deleted in %s, or expired: written again%s", key, where, more
            )

    def _give(self, view: _View) -> Snapshot:
        """The union of both stores as a snapshot that `wait` can continue from."""
        v2, v3 = (side.table.leases for side in view)
        leases = [self._merge(key, v2.get(key), v3.get(key)) for key in {**v2, **v3}]
        for key in [key for key in self._versions if key not in v2 and key not in v3]:
            del self._versions[key]
            self._contested.pop(key, None)
        self._note_given(view)
        bad = {**view[0].table.bad_entries, **view[1].table.bad_entries}
        return Snapshot(tuple(leases), self._count, tuple(bad.values()))

    def _note_given(self, view: _View) -> None:
        """The state of now has a revision of its own, from which `wait` can continue."""
        for side in view:
            side.touched.clear()
            side.is_whole = False
        self._count += 1
        self._latest = view
        self._views[self._count] = view
        while len(self._views) > _VIEWS:
            del self._views[next(iter(self._views))]

    def _give_events(self, view: _View) -> Events:
        """What changed in either store since the last time. Costs that, and not all there is."""
        names = sorted(view[0].touched | view[1].touched)
        events = tuple(event for name in names for event in self._events_of(name, view))
        self._note_given(view)
        return Events(events, self._count)

    def _events_of(self, name: str, view: _View) -> list[LeaseEvent]:
        """The state of one entry, as events that bring it about whatever it was before."""
        v2, v3 = (side.table for side in view)
        bad = v3.bad_entries.get(name) or v2.bad_entries.get(name)
        unreadable: list[LeaseEvent] = [] if bad is None else [bad]
        try:
            key = parse_key(name)
        except LeaseFormatError:
            return unreadable or [BadEntryGone(name)]
        one, other = v2.leases.get(key), v3.leases.get(key)
        if one is not None or other is not None:
            return [Put(self._merge(key, one, other)), *unreadable]
        self._versions.pop(key, None)
        self._contested.pop(key, None)
        return [Gone(key), *unreadable]

    def _merge(self, key: LeaseKey, v2: Lease | None, v3: Lease | None) -> Lease:
        revisions = (
            None if v2 is None else v2.revision,
            None if v3 is None else v3.revision,
        )
        version = self._version(key, revisions)
        one = v3 or v2
        assert one is not None
        if v2 is None or v3 is None:
            # If it is ours, a renewal is due, which creates it in the other store.
            self._contested.pop(key, None)
            ttl = None if one.is_reservation else RENEW_NOW_S
            return replace(one, revision=version, lease_ttl_s=ttl)
        if _holders_differ(v2, v3):
            text = (
                f"subnet {key.subnet} is leased to {v2.attributes.public_ip} in etcd v2 and to"
                f" {v3.attributes.public_ip} in v3"
            )
            if self._contested.get(key) != text:
                self._contested[key] = text
                _log.error("two nodes: %s: packets go to the latter; %s", text, _CONTESTED_STEP)
            # If one of the two entries is ours, report the other: the claim must see the conflict.
            is_ours = self._own is not None and not _holders_differ(
                v3, replace(v3, attributes=self._own)
            )
            one = v2 if is_ours else v3
        else:
            self._contested.pop(key, None)
        ttls = [lease.lease_ttl_s for lease in (v2, v3) if lease.lease_ttl_s is not None]
        ttl = TTL_UNKNOWN if any(t != t for t in ttls) else min(ttls, default=None)
        return replace(one, revision=version, lease_ttl_s=ttl)

    async def _both(
        self, *coroutines: Coroutine[Any, Any, Any], missing: type[Exception] | None = None
    ) -> list[Any]:
        """Await both coroutines; return their results, or raise the first exception."""
        results = await asyncio.gather(*coroutines, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                if missing is not None and isinstance(result, missing):
                    raise type(result)(f"{result} (--etcd-api=both needs it in both APIs)")
                raise result
        return list(results)

    async def _stop_watching(self) -> None:
        if self._watched is not None:
            view, self._watched = self._watched, None
            for side in view:
                await side.stop()


def _name_of(event: LeaseEvent) -> str:
    match event:
        case Put(lease):
            return str(lease.key)
        case Gone(key):
            return str(key)
        case _:
            return event.name


def _holders_differ(one: Lease, other: Lease) -> bool:
    mine, theirs = identity_of(one), identity_of(other)
    if mine is not None and theirs is not None:
        return mine.node_id != theirs.node_id
    return one.attributes.public_ip != other.attributes.public_ip
