"""Where a capture goes: a file, files in a ring by size, a pipe, or standard output.

Whole blocks only: a file on a full disk ends with the last block that fit. A pipe whose reader is
slow never blocks the event loop, and a reader that is gone is noticed without a write.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tundp.errors import Interrupted, PlatformError
from tundp.files import open_file

FLUSH_LEN: Final = 1 << 18
"""Bytes that wait for the end of a batch at most."""
DRAIN_S: Final = 2.0
"""Seconds the reader of a pipe has, at the end, for what still waits."""
FIFO_POLL_S: Final = 0.05
"""Between two tries to open a FIFO nobody reads yet."""
_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """When to begin a next file, and how many there are."""

    file_len: int = 0
    """Bytes after which the next file begins; 0 for one file without end."""
    files: int = 0
    """After so many the first one is written over; 0 for never."""

    def path(self, base: Path, number: int) -> Path:
        """The path of file `number`, from 0, as tcpdump's -C and -W name them."""
        if not self.file_len:
            return base
        if not self.files:
            return base if number == 0 else base.with_name(f"{base.name}{number}")
        width = len(str(self.files - 1))
        return base.with_name(f"{base.name}{number % self.files:0{width}d}")


class CaptureOutput:
    """One descriptor at a time, and the blocks that wait for it."""

    def __init__(self, fd: int, name: str, *, base: Path | None = None, ring: Ring | None = None):
        """fd: owned from here on. name: for messages. base: what `ring` makes names of."""
        self._fd = fd
        self.name = name
        self.exposed = ""
        """Of the first of its files that others may read: that it is so, and why."""
        self._base = base
        self._ring = ring or Ring()
        self._number = 0
        self._written = 0
        """Bytes of the file at hand that are with the kernel."""
        self._buffer = bytearray()
        self._blocks: deque[int] = deque()
        """Lengths of the blocks in the buffer, of the first one what is left of it."""
        self._whole = 0
        """Where in the file the last whole block ends."""
        mode = os.fstat(fd).st_mode
        self._is_file = stat.S_ISREG(mode)
        self.is_pipe = stat.S_ISFIFO(mode)

    @property
    def pending(self) -> int:
        """Bytes that wait."""
        return len(self._buffer)

    @property
    def is_full(self) -> bool:
        """Whether the next block belongs into the next file."""
        size = self._written + len(self._buffer)
        return bool(self._ring.file_len) and size >= self._ring.file_len

    def put(self, block: bytes) -> None:
        """Append one block, or one line; it is written by the next flush."""
        self._buffer += block
        self._blocks.append(len(block))

    async def flush(self) -> None:
        """Write what waits.

        BrokenPipeError if nobody reads the pipe. PlatformError, for people, for a file that
        cannot be written: it ends with the last whole block then.
        """
        while self._buffer:
            try:
                count = os.write(self._fd, self._buffer)
            except BlockingIOError:
                await _writable(self._fd)
                continue
            except BrokenPipeError:
                self._buffer.clear()
                raise
            except OSError as error:
                self._give_up()
                raise PlatformError(self._why(error), error.errno) from None
            del self._buffer[:count]
            self._written += count
            self._pass_blocks()

    def next_file(self) -> None:
        """Close the file, which is flushed, and open the ring's next one."""
        assert self._base is not None
        self._number += 1
        os.close(self._fd)
        self._fd = -1
        path = self._ring.path(self._base, self._number)
        self._fd, exposed = open_regular(path)
        self.exposed = self.exposed or exposed
        self.name = str(path)
        self._written = self._whole = 0

    def close(self) -> None:
        """Close the descriptor; what waits is lost."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @contextlib.asynccontextmanager
    async def watched(self, gone: asyncio.Event) -> AsyncIterator[None]:
        """Set `gone` as soon as nobody reads the pipe any more; nothing for a file."""
        if not self.is_pipe:
            yield
            return
        loop = asyncio.get_running_loop()

        def notice() -> None:
            # The write end of a pipe is never readable: this is its error condition.
            loop.remove_reader(self._fd)
            gone.set()

        loop.add_reader(self._fd, notice)
        try:
            yield
        finally:
            loop.remove_reader(self._fd)

    def _pass_blocks(self) -> None:
        end = self._whole
        while self._blocks and end + self._blocks[0] <= self._written:
            end += self._blocks.popleft()
        self._whole = end

    def _give_up(self) -> None:
        """Drop what waits, and cut the file behind its last whole block."""
        self._buffer.clear()
        self._blocks.clear()
        if self._is_file:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._whole)
                os.lseek(self._fd, self._whole, os.SEEK_SET)
            self._written = self._whole

    def _why(self, error: OSError) -> str:
        text = f"cannot write {self.name}: {error.strerror}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            text += (
                "; it ends with the last packet that fitted: free space, or keep only the newest"
                " packets with -C and -W"
            )
        return text


async def _writable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def set_ready() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_writer(fd, set_ready)
    try:
        await ready
    finally:
        loop.remove_writer(fd)


def open_regular(path: Path) -> tuple[int, str]:
    """A descriptor of a file made or emptied, mode 0600: packets are nobody else's business.

    A file that was there gets that mode, too, before its first packet. The second value is empty,
    or says that others may read it: on FAT and another user's file modes cannot be changed.
    PlatformError if it cannot be opened.
    """
    try:
        fd = open_file(path, _FLAGS, 0o600)
    except OSError as error:
        raise PlatformError(f"cannot write {path}: {error.strerror}", error.errno) from None
    status = os.fstat(fd)
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISREG(status.st_mode) or not mode & 0o077:
        return fd, ""
    why = ""
    try:
        os.fchmod(fd, 0o600)
    except OSError as error:
        why = f" ({error.strerror})"
    mode = stat.S_IMODE(os.fstat(fd).st_mode)
    if not mode & 0o077:
        return fd, ""
    return (
        fd,
        f"{path} has mode {mode:o}, which cannot be changed{why}: others may read its packets",
    )


def open_output(path: Path, ring: Ring) -> CaptureOutput:
    """The output to a file, or to the first of a ring. PlatformError if it cannot be opened."""
    first = ring.path(path, 0)
    fd, exposed = open_regular(first)
    output = CaptureOutput(fd, str(first), base=path, ring=ring)
    output.exposed = exposed
    return output


async def open_fifo(path: Path, stop: asyncio.Event) -> CaptureOutput:
    """The output to a FIFO, once somebody has opened it to read.

    Interrupted if `stop` is set before, PlatformError if it cannot be opened.
    """
    while True:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            return CaptureOutput(fd, str(path))
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise PlatformError(f"cannot write {path}: {error.strerror}", error.errno) from None
        if stop.is_set():
            raise Interrupted(f"nobody opened {path} to read what would be written there")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), FIFO_POLL_S)


def open_standard_output(fd: int = 1) -> CaptureOutput:
    """The output to a descriptor that other processes may have, too.

    A pipe is opened a second time, so that being non-blocking is ours alone.
    """
    if stat.S_ISFIFO(os.fstat(fd).st_mode):
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC
            return CaptureOutput(os.open(f"/proc/self/fd/{fd}", flags), "standard output")
    return CaptureOutput(os.dup(fd), "standard output")
