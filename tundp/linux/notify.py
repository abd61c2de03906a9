"""sd_notify(3): report readiness and status to systemd, and hand it descriptors. No-op without."""

from __future__ import annotations

import array
import errno
import functools
import logging
import os
import select
import socket
import time
from collections.abc import Sequence
from typing import Final

from tundp.backoff import Outage
from tundp.printable import printable

_log = logging.getLogger(__name__)

STATUS_MAX: Final = 1000
"""Characters of a field. A newline in one would begin another: READY=1, MAINPID=..."""
FULL_S: Final = 0.5
"""A message with descriptors waits so long for room in the receiver's queue."""


def notify(*fields: str, fds: Sequence[int] = ()) -> bool:
    """Send `fields` such as `READY=1` or `STATUS=...`; whether they went out, or nobody listens.

    fds: descriptors the receiver gets duplicates of (SCM_RIGHTS, unix(7)); borrowed. Without
    them it never blocks, with them for FULL_S at most, where the receiver's queue is full
    (net.unix.max_dgram_qlen). A failure is a warning, one a minute while it lasts, and in
    `failure`.
    """
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return True
    text = "\n".join(printable(field, STATUS_MAX) for field in fields).encode()
    try:
        _send(f"\0{path[1:]}" if path.startswith("@") else path, text, fds)
    except OSError as error:
        _outage(path).failed(error.strerror or error, now=time.monotonic())
        return False
    _outage(path).ended(now=time.monotonic())
    return True


def barrier(limit_s: float) -> bool:
    """Wait until the receiver has dealt with all that was sent before (sd_notify_barrier(3)).

    False: not within limit_s. Blocks. systemd >= 246 closes the pipe it is sent when it comes to
    it; an older one when it drops what it does not know, which is the same moment.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            is_sent = notify("BARRIER=1", fds=(writer,))
        finally:
            os.close(writer)
        if not is_sent:
            return False
        poll = select.poll()
        poll.register(reader, 0)
        return bool(poll.poll(limit_s * 1000))
    finally:
        os.close(reader)


def is_wanted() -> bool:
    """Whether anybody waits for notifications."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


def failure() -> str:
    """Why systemd could not be notified the last time; empty if it was, or does not wait."""
    path = os.environ.get("NOTIFY_SOCKET")
    outage = _outage(path) if path else None
    return f"{outage.what}: {outage.error}" if outage is not None and outage.error else ""


def _send(address: str, text: bytes, fds: Sequence[int]) -> None:
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.connect(address)
        until = time.monotonic() + FULL_S
        while True:
            try:
                sock.sendmsg([text], rights)
            except BlockingIOError:
                left_s = until - time.monotonic()
                if not fds or left_s <= 0:
                    raise
                poll = select.poll()
                poll.register(sock, select.POLLOUT)
                if not poll.poll(left_s * 1000):
                    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from None
            else:
                return


@functools.cache
def _outage(path: str) -> Outage:
    return Outage(_log, f"cannot notify systemd at {path}")


def watchdog_s() -> float | None:
    """Seconds within which systemd wants WATCHDOG=1 again; None if it does not wait for one.

    sd_watchdog_enabled(3): the variables count only for the process they name.
    """
    text = os.environ.get("WATCHDOG_USEC", "")
    pid = os.environ.get("WATCHDOG_PID", "")
    if not text.isdecimal() or int(text) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(text) / 1e6
