"""Leases in one JSON file: for one machine, for a lab, and for leases written by hand.

    {
      "config": {"Network": "10.5.0.0/16", "Backend": {"Type": "udp"}},
      "leases": {
        "10.5.1.0-24": {"PublicIP": "192.0.2.1"},
        "10.5.2.0-24": {"PublicIP": "192.0.2.2", "Expires": 1790000000.0, "Revision": 7}
      },
      "revision": 7
    }

The first lease is written by hand: without "Expires" it is a reservation and never
expires. "Expires" is Unix time; "Revision" counts writes. Daemons in different network
namespaces of one machine may share the file: a lock beside it orders the writers, the
file is replaced whole, and readers are woken by inotify. Whatever a writer does not
understand it leaves as it found it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from asyncinotify import Inotify, Mask

from tundp.blocking import BlockingThread
from tundp.errors import (
    ConfigNotFound,
    Conflict,
    LeaseFormatError,
    StoreUnavailable,
)
from tundp.files import open_file, read_regular, require_ours, write_atomically
from tundp.lease import codec
from tundp.lease.model import BadEntry, Lease, LeaseAttributes, LeaseKey, Snapshot
from tundp.store.base import StoreWarning

T = TypeVar("T")

EXPIRES: Final = "Expires"
REVISION: Final = "Revision"
EXPIRES_MAX: Final = 1e12
"""No lease lasts for 30,000 years; NaN and Infinity, which json reads, are above it too."""
LOCK_S: Final = 5.0
_POLL_S: Final = 1.0
"""Poll interval, for file systems without inotify (network file systems)."""

Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _State:
    """One version of the file, as `wait` compares it."""

    stamp: tuple[int, ...] | None
    revision: int
    next_expiry: float | None
    """Unix time at which the first lease expires, which is a change, too."""


class FileStore:
    """The Store in one JSON file. `now` is Unix time in seconds."""

    api: Final = ""
    warnings: Final[tuple[StoreWarning, ...]] = ()

    def __init__(self, path: Path, now: Callable[[], float] = time.time) -> None:
        self._asked = path
        # Through symlinks: the file is replaced by rename, and the lock lies beside it.
        self._path = path.resolve()
        self._now = now
        self._thread = BlockingThread("file-store")
        self._waited = _State(None, -1, None)

    @property
    def description(self) -> str:
        """Where the leases live, for people."""
        return f"lease file {self._path}"

    @property
    def round_s(self) -> float:
        """See Store: a file on a network that is gone answers late or never."""
        return 2 * LOCK_S

    async def choose_api(self, api: str) -> None:
        """See Store."""

    async def network_config(self) -> str:
        """See Store."""
        document = await self._thread.run(self._read)
        config = document.get("config")
        if config is None:
            raise ConfigNotFound(
                f'{self._path} has no "config"; write one:'
                ' {"config": {"Network": "10.5.0.0/16"}, "leases": {}}'
            )
        return json.dumps(config)

    async def snapshot(self) -> Snapshot:
        """See Store."""
        snapshot, state = await self._thread.run(self._snapshot)
        if self._waited.revision != snapshot.revision:
            # At the same revision the older stamp stays: a hand edit need not count up.
            self._waited = state
        return snapshot

    async def wait(self, after: int) -> Snapshot:
        """See Store. Gives the new state whenever the file, or a lease's expiry, changes it.

        One waiter at a time. What others read or write meanwhile does not hide a change
        from it: it compares with what it was given last, or else with `after`.
        """
        with _watch_directory(self._path.parent) as changes:
            while await self._thread.run(self._is_still, after):
                await changes(self._patience_s())
            snapshot, self._waited = await self._thread.run(self._snapshot)
        return snapshot

    async def create(
        self, key: LeaseKey, attributes: LeaseAttributes, lease_ttl_s: int | None
    ) -> Lease:
        """See Store."""

        def change(leases: Document) -> None:
            if str(key) in leases:
                raise Conflict(f"{key} exists in {self._path}")

        return await self._put(key, attributes, lease_ttl_s, change)

    async def update(
        self,
        key: LeaseKey,
        attributes: LeaseAttributes,
        lease_ttl_s: int | None,
        *,
        revision: int,
    ) -> Lease:
        """See Store."""
        return await self._put(
            key, attributes, lease_ttl_s, lambda leases: self._guard(leases, key, revision)
        )

    async def delete(self, key: LeaseKey, *, revision: int) -> None:
        """See Store."""

        def change(document: Document) -> None:
            self._guard(document["leases"], key, revision)
            del document["leases"][str(key)]

        await self._thread.run(self._modify, change)

    def reconnect(self) -> None:
        """See Store: a file is where it was."""

    async def close(self) -> None:
        """See Store."""
        self._thread.close()

    async def _put(
        self,
        key: LeaseKey,
        attributes: LeaseAttributes,
        lease_ttl_s: int | None,
        guard: Callable[[Document], None],
    ) -> Lease:
        def change(document: Document) -> int:
            guard(document["leases"])
            value = json.loads(codec.encode_value(attributes))
            if lease_ttl_s is not None:
                value[EXPIRES] = self._now() + lease_ttl_s
            value[REVISION] = document["revision"]
            document["leases"][str(key)] = value
            return int(document["revision"])

        revision = await self._thread.run(self._modify, change)
        return Lease(key=key, attributes=attributes, revision=revision, lease_ttl_s=lease_ttl_s)

    def _guard(self, leases: Document, key: LeaseKey, revision: int) -> None:
        entry = leases.get(str(key))
        if not isinstance(entry, dict) or _revision_of(entry) != revision:
            raise Conflict(f"{key} in {self._path} was changed by somebody else")

    def _modify(self, change: Callable[[Document], T]) -> T:
        """Read, drop expired leases, count the revision up, `change`, and replace the file."""
        try:
            require_ours(self._asked)
            with _locked(self._path):
                document = self._read()
                leases = document.setdefault("leases", {})
                now = self._now()
                for name in [name for name, entry in leases.items() if _is_expired(entry, now)]:
                    del leases[name]
                document["revision"] = _whole(document.get("revision")) + 1
                result = change(document)
                text = json.dumps(document, indent=2) + "\n"
                write_atomically(self._path, text, mode=_mode_of(self._path))
                return result
        except OSError as error:
            why = error.strerror or str(error)
            if error.errno == errno.EROFS:
                why += (
                    " here; a systemd unit with ProtectSystem=strict lets tundp write below"
                    " /var/lib/tundp only, or needs ReadWritePaths= for it"
                )
            raise StoreUnavailable(f"cannot write {self._path}: {why}") from None

    def _snapshot(self) -> tuple[Snapshot, _State]:
        # The stamp comes first: a change in between wakes the next wait, at worst once too often.
        stamp = self._stamp()
        document = self._read()
        now = self._now()
        leases: list[Lease] = []
        bad: list[BadEntry] = []
        expiries: list[float] = []
        for name, entry in document.get("leases", {}).items():
            if _is_expired(entry, now):
                continue
            try:
                lease = _decode(name, entry, now)
            except LeaseFormatError as error:
                bad.append(BadEntry(name, str(error)))
                continue
            leases.append(lease)
            if lease.lease_ttl_s is not None:
                expiries.append(now + lease.lease_ttl_s)
        revision = _whole(document.get("revision"))
        return (
            Snapshot(tuple(leases), revision, tuple(bad)),
            _State(stamp, revision, min(expiries, default=None)),
        )

    def _read(self) -> Document:
        try:
            # Who may put a link into /tmp must not choose what root reads and replaces.
            require_ours(self._asked)
            text = read_regular(self._path, is_strict=True, is_ours=True)
        except FileNotFoundError:
            raise ConfigNotFound(
                f"{self._path} does not exist; write one:"
                ' {"config": {"Network": "10.5.0.0/16"}, "leases": {}}'
            ) from None
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise StoreUnavailable(f"cannot read {self._path}: {why}") from None
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise StoreUnavailable(f"{self._path} is not JSON: {error}") from None
        if not isinstance(document, dict) or not isinstance(document.get("leases", {}), dict):
            raise StoreUnavailable(
                f'{self._path} must be an object with "config" and an object "leases"'
            )
        return document

    def _is_still(self, after: int) -> bool:
        """Whether the file is still in the state that revision `after` stands for."""
        if self._waited.revision != after:
            # Its snapshot came by another way: only the revision tells whether it is old.
            snapshot, state = self._snapshot()
            if snapshot.revision != after:
                return False
            self._waited = state
        expiry = self._waited.next_expiry
        has_expired = expiry is not None and self._now() >= expiry
        return not has_expired and self._stamp() == self._waited.stamp

    def _patience_s(self) -> float:
        if self._waited.next_expiry is None:
            return _POLL_S
        return min(_POLL_S, max(0.0, self._waited.next_expiry - self._now()))

    def _stamp(self) -> tuple[int, ...] | None:
        """Identity of this version of the file (inode, times, size); None if there is no file."""
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size


def _decode(name: str, entry: Any, now: float) -> Lease:
    key = codec.parse_key(name)
    if not isinstance(entry, dict):
        raise LeaseFormatError(f"lease {name} is {json.dumps(entry)[:60]}, not an object")
    value = {field: inner for field, inner in entry.items() if field not in (EXPIRES, REVISION)}
    expires = _expiry_of(entry)
    if expires is None and entry.get(EXPIRES) is not None:
        raise LeaseFormatError(f"{EXPIRES} of lease {name} is not Unix time in seconds")
    return Lease(
        key=key,
        attributes=codec.parse_value(json.dumps(value)),
        revision=_revision_of(entry),
        lease_ttl_s=None if expires is None else expires - now,
    )


def _is_expired(entry: Any, now: float) -> bool:
    expires = _expiry_of(entry)
    return expires is not None and expires <= now


def _expiry_of(entry: Any) -> float | None:
    """Unix time, or None where there is none that can be understood."""
    expires = entry.get(EXPIRES) if isinstance(entry, dict) else None
    if isinstance(expires, bool) or not isinstance(expires, (int, float)):
        return None
    return float(expires) if abs(expires) < EXPIRES_MAX else None


def _revision_of(entry: Document) -> int:
    return _whole(entry.get(REVISION))


def _whole(value: Any) -> int:
    """A counter in the file; a hand-written file need not have one."""
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _mode_of(path: Path) -> int:
    """The mode a rewritten file keeps."""
    return stat.S_IMODE(path.lstat().st_mode)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    # A file of its own: the one with the leases is replaced by every write.
    fd = open_file(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + LOCK_S
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StoreUnavailable(
                        f"{path}.lock has been held for {LOCK_S:.0f} s: by whom tells fuser"
                    ) from None
                time.sleep(0.01)  # on the store's own thread; flock has no timeout
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _watch_directory(directory: Path) -> Iterator[Callable[[float], Any]]:
    """Yield `changed(timeout_s)`, which waits for a change in `directory` or the timeout."""
    try:
        inotify = Inotify()
        inotify.add_watch(directory, Mask.MOVED_TO | Mask.CLOSE_WRITE | Mask.DELETE)
    except OSError:
        yield asyncio.sleep
        return

    async def change(patience_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await inotify.get()

    with inotify:
        yield change
