"""Small files: replaced so that readers see the old text or the new, read without a wait."""

from __future__ import annotations

import errno
import os
import select
import stat
import tempfile
import time
from pathlib import Path
from typing import Final

_CANNOT_REPLACE: Final = frozenset(
    {errno.EBUSY, errno.EROFS, errno.EACCES, errno.EPERM, errno.EXDEV}
)
"""Errors of the directory that say nothing of the file in it: a file that is a mount point
(rename(2): EBUSY), a directory that is read-only or another user's."""
MOST_LEN: Final = 256 << 20
"""Bytes of a file that is read: 65,000 leases take 10 MB."""


SMALL_LEN: Final = 1 << 20
"""The same of settings, units, subnet.env (200 bytes) and the like."""


STREAM_S: Final = 30.0
"""Seconds a pipe has for all it gives: a program that fetches a secret first is slow."""


def read_regular(path: Path, *, most_len: int = MOST_LEN, is_strict: bool = False) -> str:
    """The text of a regular file, without a byte order mark.

    is_strict: ValueError for what is not UTF-8, which is U+FFFD otherwise. OSError if it cannot
    be read, EISDIR or EINVAL if it is no file (opening a FIFO would wait for a writer for ever),
    EFBIG if it has more than `most_len` bytes; its strerror is for people.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is no regular file", str(path))
        if status.st_size > most_len:
            raise OSError(errno.EFBIG, f"has more than {most_len} bytes", str(path))
        errors = "strict" if is_strict else "replace"
        with os.fdopen(fd, encoding="utf-8-sig", errors=errors, closefd=False) as file:
            return file.read()
    finally:
        os.close(fd)


def read_stream(path: Path, *, most_len: int = SMALL_LEN, limit_s: float = STREAM_S) -> bytes:
    """All a file, a pipe or a terminal gives until its end, as behind /dev/stdin.

    A pipe is at its end when whoever writes has closed it. OSError, with a strerror for people:
    ETIMEDOUT if that takes longer than `limit_s` seconds, EFBIG for more than `most_len` bytes.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        deadline = time.monotonic() + limit_s
        text = b""
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not poll.poll(left_s * 1000):
                seen = f"{len(text)} bytes and no end" if text else "nobody wrote to it"
                raise OSError(errno.ETIMEDOUT, f"{seen} within {limit_s:g} s", str(path))
            try:
                part = os.read(fd, most_len + 1 - len(text))
            except BlockingIOError:
                continue
            if not part:
                return text
            text += part
            if len(text) > most_len:
                raise OSError(errno.EFBIG, f"has more than {most_len} bytes", str(path))
    finally:
        os.close(fd)


def write_atomically(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Write beside `path`, sync, rename over it. OSError if that fails; no temp file stays."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_replacing(path: Path, text: str) -> None:
    """As `write_atomically`, but where the file cannot be replaced it is written in place.

    A single file mounted into a container (`docker run -v`, a subPath) cannot be renamed over.
    Written in place, a reader may see the new text cut off for a moment, never mixed with the
    old one's lines. OSError, of the replacing, if neither works.
    """
    try:
        write_atomically(path, text)
    except OSError as error:
        if error.errno not in _CANNOT_REPLACE or not path.is_file():
            raise
        try:
            _write_in_place(path, text.encode())
        except OSError:
            raise error from None


def _write_in_place(path: Path, text: bytes) -> None:
    """One write over the old text, which is cut off behind it if it was longer."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        written = os.write(fd, text)
        if written != len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(fd, len(text))
        os.fsync(fd)
    finally:
        os.close(fd)
