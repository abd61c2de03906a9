"""The archive: what was collected, what was not and why, as one tar.gz in a fixed order."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import secrets
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tundp.errors import PlatformError
from tundp.files import open_folder
from tundp.printable import SENTENCE_MAX, printable

MANIFEST_SCHEMA: Final = 1
FOLDER: Final = "tundp-bugreport"
"""What everything in the archive lies in."""
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One file of a report, redacted."""

    name: str
    about: str
    """What it is, for people."""
    data: bytes
    note: str = ""
    """What is special about it: cut, or of a program that failed."""
    took_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """Something that is not in the report."""

    name: str
    """The member it would have been."""
    reason: str


@dataclass(slots=True)
class Report:
    """What goes into the archive."""

    made_at: int
    """Unix time; the time of every member."""
    head: dict[str, Any]
    """The first members of the manifest."""
    members: list[Member] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)

    def miss(self, name: str, reason: str) -> None:
        """Say that something was left out."""
        self.missing.append(Missing(name=name, reason=printable(reason, SENTENCE_MAX * 2)))

    def manifest(self) -> dict[str, Any]:
        """manifest.json."""
        return {
            "schema": MANIFEST_SCHEMA,
            **self.head,
            "members": [
                {
                    "name": each.name,
                    "about": each.about,
                    "bytes": len(each.data),
                    "sha256": hashlib.sha256(each.data).hexdigest(),
                    "took_s": round(each.took_s, 3),
                    "note": each.note,
                }
                for each in self._ordered()
            ],
            "missing": [
                {"name": each.name, "reason": each.reason}
                for each in sorted(self.missing, key=lambda each: each.name)
            ],
        }

    def missing_text(self) -> str:
        """MISSING.txt."""
        if not self.missing:
            return "Nothing was left out.\n"
        ordered = sorted(self.missing, key=lambda each: each.name)
        lines = [f"{each.name}\n    {each.reason}" for each in ordered]
        return "\n".join(["What is not in this report, and why:", "", *lines, ""])

    def pack(self, readme: str) -> bytes:
        """The archive: README.txt, MISSING.txt and manifest.json, then the members by name."""
        files = [
            ("README.txt", readme.encode()),
            ("MISSING.txt", self.missing_text().encode()),
            ("manifest.json", f"{json.dumps(self.manifest(), indent=2)}\n".encode()),
            *((each.name, each.data) for each in self._ordered()),
        ]
        packed = io.BytesIO()
        # No file name and no time in gzip's own header.
        with (
            gzip.GzipFile(fileobj=packed, mode="wb", filename="", mtime=self.made_at) as zipped,
            tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for name, data in files:
                header = tarfile.TarInfo(f"{FOLDER}/{name}")
                header.size, header.mode, header.mtime = len(data), 0o600, self.made_at
                archive.addfile(header, io.BytesIO(data))
        return packed.getvalue()

    def _ordered(self) -> list[Member]:
        return sorted(self.members, key=lambda each: each.name)


def write_private(path: Path, data: bytes) -> None:
    """Write a file only its owner may read, whole or not at all: beside it first, then renamed.

    PlatformError names what is in the way; nothing is left then.
    """
    try:
        folder = open_folder(path.absolute().parent)
    except OSError as error:
        raise PlatformError(f"cannot write {path}: {error.strerror}", error.errno) from None
    temporary = f".{path.name[:200]}.{secrets.token_hex(4)}"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(temporary, flags, 0o600, dir_fd=folder)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            raise
    except OSError as error:
        step = ""
        if error.errno in _FULL:
            step = f"; the report has {len(data)} bytes, and nothing of it is left: free space, or"
            step += " write it elsewhere with -w"
        text = f"cannot write {path}: {error.strerror}{step}"
        raise PlatformError(text, error.errno) from None
    finally:
        os.close(folder)
