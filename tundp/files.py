"""Small files: replaced so that readers see the old text or the new, read without a wait."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import select
import stat
import time
from collections import deque
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
FOLDER_MODE: Final = 0o755
"""Of folders that are made. What is in them says itself who may read it."""
_OPENED: Final = os.O_NOFOLLOW | os.O_CLOEXEC
_WALK: Final = os.O_PATH | os.O_DIRECTORY | _OPENED
_LINKS_MAX: Final = 40
"""As the kernel's own limit (path_resolution(7))."""


STREAM_S: Final = 30.0
"""Seconds a pipe has for all it gives: a program that fetches a secret first is slow."""


def open_folder(path: Path, *, makes: bool = False) -> int:
    """A descriptor (O_PATH) of a folder. makes: it and those above are made, mode 0755 exactly.

    Walked one component after the other. In a folder that anybody may write (/tmp), a symbolic
    link, or a folder of another user, is not followed: somebody else may have put it there.
    OSError; its strerror names that component and what to do.
    """
    parts = deque(Path(os.path.abspath(path)).parts[1:])
    here, links = Path("/"), 0
    folder = os.open(here, _WALK)
    try:
        while parts:
            name = parts.popleft()
            try:
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            except FileNotFoundError:
                if not makes:
                    raise
                _make_folder(name, folder)
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            _require_ours(status, here / name, folder)
            if stat.S_ISLNK(status.st_mode):
                if (links := links + 1) > _LINKS_MAX:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(here / name))
                target = Path(os.readlink(name, dir_fd=folder))
                parts.extendleft(reversed([part for part in target.parts if part != "/"]))
                if target.is_absolute():
                    os.close(folder)
                    folder, here = os.open("/", _WALK), Path("/")
                continue
            below = _open_ours(here / name, _WALK, 0, folder)
            os.close(folder)
            folder, here = below, here / name
    except BaseException:
        os.close(folder)
        raise
    return folder


def _make_folder(name: str, folder: int) -> None:
    """The umask decides nothing: neither 000 nor 077 may make it another's, or ours alone."""
    try:
        os.mkdir(name, FOLDER_MODE, dir_fd=folder)
    except FileExistsError:
        return
    made = os.open(name, os.O_RDONLY | os.O_DIRECTORY | _OPENED, dir_fd=folder)
    try:
        os.fchmod(made, FOLDER_MODE)
    finally:
        os.close(made)


def _require_ours(status: os.stat_result, path: Path, folder: int) -> None:
    """OSError if `path` is somebody else's, or a link, in a folder that anybody may write."""
    if not os.fstat(folder).st_mode & stat.S_IWOTH:
        return
    if stat.S_ISLNK(status.st_mode):
        why = "is a symbolic link"
    elif status.st_uid not in (0, os.geteuid()):
        why = f"belongs to user {status.st_uid}"
    elif stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
        why = "has a second name elsewhere"
    else:
        return
    raise OSError(
        errno.EPERM,
        f"{path} {why} in {path.parent}, which anybody may write, so somebody else may have put it"
        f" there: remove it, or name a folder that is root's alone, below /var/lib or /run",
        str(path),
    )


def _open_ours(path: Path, flags: int, mode: int, folder: int) -> int:
    """Open the last part of `path` in `folder`; what was opened is looked at: it may be another."""
    opened = os.open(path.name, flags | _OPENED, mode, dir_fd=folder)
    try:
        _require_ours(os.fstat(opened), path, folder)
    except BaseException:
        os.close(opened)
        raise
    return opened


def open_file(path: Path, flags: int, mode: int = 0o600) -> int:
    """As os.open, by way of `open_folder`: a file of somebody else's in /tmp is not taken either.

    A link in a folder that only its owner may write is followed. OSError.
    """
    folder, name = _locate(path)
    try:
        return _open_ours(path.parent / name, flags, mode, folder)
    finally:
        os.close(folder)


def require_ours(path: Path) -> None:
    """Raise OSError if `path`, or what leads there, is what `open_file` would not take."""
    folder, _ = _locate(path)
    os.close(folder)


def _locate(path: Path, *, makes: bool = False) -> tuple[int, str]:
    """The folder (O_PATH) and the name a path leads to, links followed. OSError; see above."""
    for _ in range(_LINKS_MAX):
        folder = open_folder(path.parent, makes=makes)
        try:
            status = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
            _require_ours(status, path, folder)
            if not stat.S_ISLNK(status.st_mode):
                return folder, path.name
            target = os.readlink(path.name, dir_fd=folder)
        except FileNotFoundError:
            return folder, path.name
        except BaseException:
            os.close(folder)
            raise
        os.close(folder)
        path = path.parent / target
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def read_regular(
    path: Path, *, most_len: int = MOST_LEN, is_strict: bool = False, is_ours: bool = False
) -> str:
    """The text of a regular file, without a byte order mark.

    is_strict: ValueError for what is not UTF-8, which is U+FFFD otherwise. is_ours: by way of
    `open_file`. OSError if it cannot be read, EISDIR or EINVAL if it is no file (opening a FIFO
    would wait for a writer for ever), EFBIG if it has more than `most_len` bytes; its strerror is
    for people.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    fd = open_file(path, flags) if is_ours else os.open(path, flags)
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


def write_atomically(
    path: Path, text: str, *, mode: int = 0o644, follows_link: bool = False
) -> None:
    """Write beside `path`, sync, rename over it. OSError if that fails; no temp file stays.

    Folders are made as `open_folder` does; mode and owner are exact whatever the umask.
    follows_link: replace what a link at `path` leads to, and not the link.
    """
    if follows_link:
        folder, name = _locate(path, makes=True)
    else:
        folder, name = open_folder(path.parent, makes=True), path.name
    try:
        temporary = f".{name}.{secrets.token_hex(4)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPENED
        fd = os.open(temporary, flags, 0o600, dir_fd=folder)
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
            os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            raise
    finally:
        os.close(folder)


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
    fd = open_file(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        written = os.write(fd, text)
        if written != len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(fd, len(text))
        os.fsync(fd)
    finally:
        os.close(fd)
