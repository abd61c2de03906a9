"""The node id and the lease cache: files that let a node start while the store is away.

    <state-dir>/node-id           {"NodeID": "7c1f...", "Machine": "..."}
    <state-dir>/last-known.json   network config, own subnet, all leases, and when they were last
                                  known to be the store's; another instance of the same host
                                  has its own, named after it

With the leases a node that starts while etcd is away serves what it knew; flannel waits
for etcd and leaves the node outside the overlay. Nothing here is needed: whatever
cannot be read is as if it were not there, and what cannot be written is a warning.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tundp import collector
from tundp.backoff import Outage
from tundp.errors import SCARCE, LeaseFormatError, PlatformError
from tundp.files import SMALL_LEN, open_file, read_regular, write_atomically
from tundp.instance import Instance
from tundp.lease import codec
from tundp.lease.identity import Identity, clean_host
from tundp.lease.model import TTL_UNKNOWN, Lease, LeaseKey
from tundp.subnet.refusals import Refusals

_log = logging.getLogger(__name__)

SCHEMA: Final = 1
ENTRY_LEN: Final = 80
"""Bytes of a lease on disk, at least."""
_MACHINE_ID: Final = Path("/etc/machine-id")


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedLeases:
    """The leases and the network config of one store, confirmed `age_s` seconds ago."""

    store: str
    """Which store it was: another one's leases are none of ours."""
    api: str
    network_config: str
    own_key: LeaseKey
    leases: tuple[Lease, ...]
    revision: int
    age_s: float


class LeaseCache:
    """The files of one daemon under `directory`; None: nothing is kept."""

    def __init__(self, directory: Path | None, instance: Instance) -> None:
        self._directory = directory
        self._instance = instance
        self._texts = LeaseTexts()
        self._saved: tuple[int, ...] | None = None
        """Which file holds what was saved last, and since when; None if none does."""
        self.saved_at: float | None = None
        """When the leases were last written or confirmed, Unix time."""
        self._errors: dict[Path, str] = {}
        """Why files could not be written the last time."""
        self._owed: tuple[str, str] | None = None
        """What the node id's file must hold, if it could not be written, and what it held."""
        self._outage = Outage(
            _log,
            f"cannot write below {directory}: after a restart this node is a stranger to its own"
            " lease (8 s more), and cannot start while the store is away",
        )

    @property
    def error(self) -> str:
        """Why the last file could not be written; empty if it was."""
        return next((f"{self._directory}: {why}" for why in tuple(self._errors.values())), "")

    @property
    def is_kept(self) -> bool:
        """Whether anything is kept on disk at all."""
        return self._directory is not None

    @property
    def refusals(self) -> Refusals:
        """The starts of this instance that a live node has refused, kept beside the leases."""
        path = self.lease_file
        return Refusals(None if path is None else path.with_name(f"refused-{path.name}"))

    @property
    def lease_file(self) -> Path | None:
        """Where the leases are kept."""
        return None if self._directory is None else self._directory / self._instance.lease_cache

    def known_node_id(self) -> str:
        """The id this node has on disk; empty if it has none yet. Makes none."""
        path = None if self._directory is None else self._directory / "node-id"
        node_id = _read_json(path).get("NodeID")
        suffix = self._instance.node_id_suffix
        return f"{node_id}{suffix}" if isinstance(node_id, str) and node_id else ""

    def identity(self) -> Identity:
        """This node's id, made on the first start and kept.

        One found beside another machine's id is a clone's: a new one is made. Each instance
        of a host is a node of its own. PlatformError if descriptors or memory are too scarce
        to look: a new id in its place would make this node a stranger to its lease.
        """
        host = clean_host(socket.gethostname())
        suffix = self._instance.node_id_suffix
        machine = _machine()
        path = None if self._directory is None else self._directory / "node-id"
        known = _read_json(path, must_be_seen=True)
        node_id = known.get("NodeID")
        is_same = not machine or known.get("Machine") in ("", machine)
        if isinstance(node_id, str) and node_id and is_same:
            return Identity(node_id + suffix, host, _make_run())
        if node_id:
            _log.warning("%s is another machine's (a clone?): making a new node id", path)
        return Identity(self._make_node_id(), host, _make_run())

    def renewed_identity(self, former: Identity) -> Identity:
        """A new id for this node, kept on disk, after `former` was found to be a live node's.

        If the id on disk is not `former` any more, another instance of this host has made it.
        """
        known = self.known_node_id()
        if known and known != former.node_id:
            return Identity(known, former.host, former.run)
        return Identity(self._make_node_id(), former.host, former.run)

    def _make_node_id(self) -> str:
        """A random id, written to disk if there is one, with the instance's suffix."""
        node_id = uuid.uuid4().hex[:16]
        if self._directory is not None:
            text = json.dumps({"NodeID": node_id, "Machine": _machine()}) + "\n"
            self._owed = (text, _text_of(self._directory / "node-id"))
            self.pay()
        return node_id + self._instance.node_id_suffix

    def load(self, store: str | None, node_id: str) -> CachedLeases | None:
        """The cached leases of `store` (None: of whichever it is), or None.

        Those of another node id are a clone's.
        """
        document = _read_json(self.lease_file)
        if document.get("schema") != SCHEMA:
            return None
        if store is None:
            store = str(document.get("store"))
        if document.get("store") != store:
            return None
        if document.get("node_id") != node_id:
            return None
        try:
            with collector.making(len(document["leases"])):
                leases = tuple(
                    Lease(
                        key=codec.parse_key(name),
                        attributes=codec.parse_value(value),
                        revision=0,
                        lease_ttl_s=TTL_UNKNOWN,
                    )
                    for name, value in document["leases"].items()
                )
            return CachedLeases(
                store=store,
                api=str(document["api"]),
                network_config=str(document["network_config"]),
                own_key=codec.parse_key(document["own"]),
                leases=leases,
                revision=int(document["revision"]),
                age_s=max(0.0, time.time() - self._stamp(document)),
            )
        except (
            KeyError,
            TypeError,
            ValueError,
            OverflowError,
            AttributeError,
            OSError,
            LeaseFormatError,
        ) as error:
            _log.warning("%s cannot be used: %r", self.lease_file, error)
            return None

    @property
    def entries_about(self) -> int:
        """How many leases are on disk, roughly: by the length of the file."""
        path = self.lease_file
        try:
            return 0 if path is None else path.stat().st_size // ENTRY_LEN
        except OSError:
            return 0

    def save(
        self,
        *,
        store: str,
        node_id: str,
        api: str,
        network_config: str,
        own_key: LeaseKey,
        leases: Iterable[Lease],
        revision: int,
        synced_at: float | None = None,
    ) -> bool:
        """Write the leases and what identifies them; whether they are on disk now.

        synced_at: when they were last known to be the store's, Unix time; None: now. Blocks for
        the disk: call it on a thread.
        """
        path = self.lease_file
        if path is None:
            return True
        synced_at = time.time() if synced_at is None else synced_at
        document = {
            "schema": SCHEMA,
            "store": store,
            "node_id": node_id,
            "api": api,
            "network_config": network_config,
            "own": str(own_key),
            "revision": revision,
        }
        head = json.dumps(document).removesuffix("}")
        text = f'{_stamped(synced_at)}{head[1:]}, "leases": {{{self._texts.joined(leases)}}}}}\n'
        self._saved = None
        if not self._carry_out(path, lambda: write_atomically(path, text, mode=0o600)):
            return False
        with contextlib.suppress(OSError):
            self._saved, self.saved_at = _version(path.lstat()), synced_at
        return self._saved is not None

    def confirm(self) -> bool:
        """Reset the age of the lease cache: what was saved last is still the store's.

        The age is in the file itself, and changed only in the one that holds what was saved last;
        False if it is not there, or cannot be written: save again.
        """
        path = self.lease_file
        if path is None:
            return True
        if self._saved is None:
            return False
        now = time.time()
        if not self._carry_out(path, lambda: self._write_stamp(path, now)):
            return False
        self.saved_at = now
        return True

    def pay(self) -> bool:
        """Write the node id if it could not be written before; whether it is on disk now.

        One that another instance of this host has written meanwhile stays.
        """
        if self._owed is None or self._directory is None:
            return True
        path = self._directory / "node-id"
        text, before = self._owed
        if _text_of(path) != before:
            self._errors.pop(path, None)
        elif not self._carry_out(path, lambda: write_atomically(path, text, mode=0o600)):
            return False
        self._owed = None
        return True

    def _stamp(self, document: Mapping[str, Any]) -> float:
        """When the leases were confirmed. Files of before 0.2.0 say so by their age."""
        stamp = document.get("confirmed")
        if isinstance(stamp, (int, float)) and not isinstance(stamp, bool):
            return float(stamp)
        assert self.lease_file is not None
        return self.lease_file.stat().st_mtime

    def _write_stamp(self, path: Path, now: float) -> None:
        """Overwrite the first bytes, which takes no room on a full disk."""
        fd = open_file(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            if _version(os.fstat(fd)) != self._saved:
                raise FileNotFoundError(errno.ENOENT, f"{path} was changed or replaced", str(path))
            os.pwrite(fd, _stamped(now).encode("ascii"), 0)
            os.fsync(fd)
            self._saved = _version(os.fstat(fd))
        finally:
            os.close(fd)

    def _carry_out(self, path: Path, write: Callable[[], None]) -> bool:
        """Whether `write` went well. `error` and the log say why not, until each file's did."""
        try:
            write()
        except OSError as error:
            self._errors[path] = error.strerror or str(error)
            self._outage.failed(self._errors[path], now=time.monotonic())
            return False
        self._errors.pop(path, None)
        if not self._errors:
            self._outage.ended(now=time.monotonic())
        return True


class LeaseTexts:
    """Leases as members of a JSON object. Only those that changed since the last time are made."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Lease, str]] = {}
        """By the lease's id(), which is its own as long as this refers to it."""

    def joined(self, leases: Iterable[Lease]) -> str:
        """`"10.5.2.0-24": "{...}", ...`; what is not among `leases` is forgotten."""
        known = self._known
        self._known = fresh = {}
        for lease in leases:
            number = id(lease)
            fresh[number] = known.get(number) or (lease, _member(lease))
        return ", ".join(text for _, text in fresh.values())


def _member(lease: Lease) -> str:
    return f"{json.dumps(str(lease.key))}: {json.dumps(codec.encode_value(lease.attributes))}"


def _version(status: os.stat_result) -> tuple[int, ...]:
    """An inode's number alone may soon be another file's."""
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _stamped(at: float) -> str:
    """The beginning of the lease file, always as long: `confirm` overwrites it."""
    return f'{{"confirmed": {at:<16.1f}, '


def _text_of(path: Path) -> str:
    """What a small file holds; empty if it cannot be read."""
    try:
        return read_regular(path, most_len=SMALL_LEN, is_ours=True)
    except OSError:
        return ""


def _read_json(path: Path | None, *, must_be_seen: bool = False) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        document = json.loads(read_regular(path, is_ours=True))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        if must_be_seen and isinstance(error, OSError) and error.errno in SCARCE:
            raise PlatformError(f"cannot read {path}: {error.strerror}", error.errno) from None
        _log.warning("cannot read %s: %s", path, error)
        return {}
    return document if isinstance(document, dict) else {}


def _make_run() -> str:
    """Tells this process from every other one of this node id."""
    return uuid.uuid4().hex[:8]


def _machine() -> str:
    """Tells this machine from a copy of its disk; the id itself is confidential (machine-id(5))."""
    try:
        text = _MACHINE_ID.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return _digest(text) if text else ""


def _digest(text: str) -> str:
    return hashlib.sha256(f"tundp {text}".encode()).hexdigest()[:16]
