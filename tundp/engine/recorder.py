"""The flight recorder: a file in memory (tmpfs) that outlives the process that writes it.

    0               header: MAGIC, length of a JSON document, the document (Identity)
    JOURNAL_AT      control events: u64 count, then ENTRIES slots of u32 length and JSON text
    WORKERS_AT      for each worker the last packets it dropped: engine/taps.py

The workers write their part themselves, without a system call; the event loop writes the rest.
Everything is in host order: the file is read where it was written.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import stat
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

from tundp.engine.taps import examples_len, read_examples
from tundp.errors import PlatformError
from tundp.files import open_file, open_folder
from tundp.wire.drop import DropReason
from tundp.wire.event import Record

MAGIC: Final = b"tundpbx1"
PREVIOUS: Final = ".previous"
"""What the file of the daemon before is called, behind its name."""
NEXT: Final = ".next"
"""Likewise the file of one that is about to take over."""
ENTRIES: Final = 512
ENTRY_LEN: Final = 512
"""Bytes of a control event's slot; a longer text is cut."""
WORKERS_MAX: Final = 64
"""Workers that have a flight recorder; what others drop is counted only."""
_HEADER: Final = struct.Struct("=8sI")
_COUNT: Final = struct.Struct("=Q")
_LENGTH: Final = struct.Struct("=I")
JOURNAL_AT: Final = 4096
WORKERS_AT: Final = JOURNAL_AT + 4096 + ENTRIES * ENTRY_LEN
_SLOTS_AT: Final = JOURNAL_AT + 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Whose flight recorder it is."""

    version: str
    pid: int
    boot_id: str
    """/proc/sys/kernel/random/boot_id: times of CLOCK_MONOTONIC are of this boot."""
    started_at: float
    """Unix time."""
    unix_ns: int
    """Unix time less CLOCK_MONOTONIC at the start."""
    reasons: tuple[str, ...]
    """Names of the drop reasons, by number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlEvent:
    """Something that happened to the node, not to a packet."""

    unix_ns: int
    kind: str
    """One word: lease, path, kernel, log ..."""
    text: str
    """A sentence for people."""
    fields: Mapping[str, Any]
    """The same for programs."""


class FlightRecorder:
    """The file as its daemon has it open. See engine.taps.Recorder."""

    def __init__(self, memory: mmap.mmap, waits_at: Path | None = None) -> None:
        """waits_at: where the file lies until `take_place`."""
        self._waits_at = waits_at
        self._memory = memory
        self._view = memoryview(memory)
        self._count = 0

    def worker(self, number: int) -> memoryview | None:
        """See engine.taps.Recorder."""
        if number >= WORKERS_MAX:
            return None
        length = examples_len(len(DropReason))
        start = WORKERS_AT + number * length
        return self._view[start : start + length]

    def take_place(self, path: Path) -> None:
        """Become the flight recorder at `path`, and the one there the previous one. OSError."""
        if self._waits_at is not None:
            _keep_previous(path)
            os.replace(self._waits_at, path)
            self._waits_at = None

    def leave(self) -> None:
        """Remove a file that has not taken its place."""
        if self._waits_at is not None:
            self._waits_at.unlink(missing_ok=True)
            self._waits_at = None

    def note(self, event: ControlEvent) -> None:
        """Keep a control event; the oldest one gives way."""
        text = _entry(event)
        at = _SLOTS_AT + self._count % ENTRIES * ENTRY_LEN
        # A reader of a dead daemon's file may find any state: a length is written last.
        _LENGTH.pack_into(self._view, at, 0)
        self._view[at + _LENGTH.size : at + _LENGTH.size + len(text)] = text
        _LENGTH.pack_into(self._view, at, len(text))
        self._count += 1
        _COUNT.pack_into(self._view, JOURNAL_AT, self._count)

    def recorded(self) -> Recorded:
        """What is in it now."""
        return Recorded.parse(self._view)


def open_recorder(path: Path, version: str) -> FlightRecorder:
    """A new flight recorder at `path`; the one before is kept as `path` + PREVIOUS.

    PlatformError if the file cannot be made.
    """
    try:
        _keep_previous(path)
        return FlightRecorder(_map(path, version))
    except OSError as error:
        raise _unmade(path, error) from None


def open_successor(path: Path, version: str) -> FlightRecorder:
    """One that waits beside `path`, which is a live daemon's, until it takes its place there.

    PlatformError if the file cannot be made.
    """
    waits_at = path.with_name(path.name + NEXT)
    try:
        waits_at.unlink(missing_ok=True)
        return FlightRecorder(_map(waits_at, version), waits_at)
    except OSError as error:
        raise _unmade(waits_at, error) from None


def _unmade(path: Path, error: OSError) -> PlatformError:
    return PlatformError(
        f"cannot make the flight recorder {path}: {error.strerror or error}", error.errno
    )


def _keep_previous(path: Path) -> None:
    folder = open_folder(path.parent, makes=True)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.replace(path.name, path.name + PREVIOUS, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        os.close(folder)


def _map(path: Path, version: str) -> mmap.mmap:
    fd = open_file(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        length = WORKERS_AT + WORKERS_MAX * examples_len(len(DropReason))
        os.ftruncate(fd, length)
        memory = mmap.mmap(fd, length)
    finally:
        os.close(fd)
    identity = Identity(
        version=version,
        pid=os.getpid(),
        boot_id=_boot_id(),
        started_at=time.time(),
        unix_ns=time.time_ns() - time.monotonic_ns(),
        reasons=tuple(reason.label for reason in DropReason),
    )
    text = json.dumps(asdict(identity)).encode()
    memory[: _HEADER.size + len(text)] = _HEADER.pack(MAGIC, len(text)) + text
    return memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What a flight recorder holds."""

    identity: Identity
    drops: tuple[tuple[int, Record], ...]
    """Worker and record, oldest first."""
    control: tuple[ControlEvent, ...]
    """Oldest first."""

    @classmethod
    def parse(cls, memory: bytes | memoryview) -> Self:
        """The content of a file; ValueError if it is no flight recorder of this version."""
        magic, length = _HEADER.unpack_from(memory)
        if magic != MAGIC:
            raise ValueError("no flight recorder, or one of another version of tundp")
        document = json.loads(bytes(memory[_HEADER.size : _HEADER.size + length]))
        identity = Identity(**(document | {"reasons": tuple(document["reasons"])}))
        drops = sorted(_drops(memory, len(identity.reasons)), key=lambda each: each[1].time_ns)
        return cls(
            identity=identity,
            drops=tuple(drops),
            control=tuple(sorted(_control(memory), key=lambda each: each.unix_ns)),
        )


def read_recorder(path: Path) -> Recorded:
    """The flight recorder at `path`, of a running daemon or a dead one. PlatformError."""
    try:
        fd = open_file(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "is no regular file")
            with os.fdopen(fd, "rb", closefd=False) as file:
                return Recorded.parse(file.read())
        finally:
            os.close(fd)
    except FileNotFoundError:
        raise PlatformError(
            f"there is no flight recorder {path}: no tundp has run here since the boot, or with"
            " another --admin-socket",
            errno.ENOENT,
        ) from None
    except OSError as error:
        raise PlatformError(f"{path}: {error.strerror or error}", error.errno) from None
    except (ValueError, TypeError, KeyError, struct.error) as error:
        raise PlatformError(f"{path}: {error}") from None


def _drops(memory: bytes | memoryview, reason_count: int) -> Iterator[tuple[int, Record]]:
    length = examples_len(reason_count)
    for number in range(WORKERS_MAX):
        start = WORKERS_AT + number * length
        for record in read_examples(memory[start : start + length], reason_count):
            yield number, record


def _control(memory: bytes | memoryview) -> Iterator[ControlEvent]:
    """Slots that hold a whole event."""
    for at in range(_SLOTS_AT, _SLOTS_AT + ENTRIES * ENTRY_LEN, ENTRY_LEN):
        (length,) = _LENGTH.unpack_from(memory, at)
        if not 0 < length <= ENTRY_LEN - _LENGTH.size:
            continue
        with contextlib.suppress(ValueError, TypeError):
            text = bytes(memory[at + _LENGTH.size : at + _LENGTH.size + length])
            yield ControlEvent(**json.loads(text))


def _entry(event: ControlEvent) -> bytes:
    """An event as JSON that fits into a slot: its text is cut, then its fields are left out."""
    room = ENTRY_LEN - _LENGTH.size
    document = asdict(event)
    for text, fields in ((event.text, event.fields), (event.text[:80], {})):
        encoded = json.dumps(document | {"text": text, "fields": fields}).encode()
        if len(encoded) <= room:
            return encoded
    return json.dumps(document | {"text": "", "fields": {}, "kind": event.kind[:32]}).encode()


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
