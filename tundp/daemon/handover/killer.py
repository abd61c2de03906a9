"""Ends a predecessor that is silent, from outside the sandbox.

In its sandbox a daemon can signal nobody (Landlock: LANDLOCK_SCOPE_SIGNAL, Linux 6.12), and a
pidfd opened before makes no difference. So a child is forked before, which has nothing but the
pidfd and a pipe, and ends with the pipe.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from typing import Final

_KILL: Final = b"k"


class Killer:
    """For one process, named by pid. Fork it before threads start, and before the sandbox."""

    def __init__(self, pid: int) -> None:
        """pid: 0, or one that is gone by now: it is dead."""
        self._pidfd = -1
        self._pipe = -1
        self._child = 0
        with contextlib.suppress(OSError):
            self._pidfd = os.pidfd_open(pid)
        if self._pidfd < 0:
            return
        orders, self._pipe = os.pipe2(os.O_CLOEXEC)
        self._child = os.fork()
        if self._child == 0:
            _wait(orders, self._pidfd)
        os.close(orders)

    def kill(self) -> None:
        """SIGKILL it."""
        with contextlib.suppress(OSError):
            os.write(self._pipe, _KILL)

    def is_dead(self, limit_s: float) -> bool:
        """Whether it is, within so many seconds (pidfd_open(2): readable). Blocks."""
        if self._pidfd < 0:
            return True
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(limit_s * 1000))

    def close(self) -> None:
        """End the child. Harmless when repeated."""
        pidfd, pipe, child = self._pidfd, self._pipe, self._child
        self._pidfd, self._pipe, self._child = -1, -1, 0
        for fd in (pidfd, pipe):
            if fd >= 0:
                os.close(fd)
        if child:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)


def _wait(orders: int, pidfd: int) -> None:
    """The child's life; does not return."""
    try:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_DFL)
        low, high = sorted((orders, pidfd))
        for first, last in ((0, low), (low + 1, high), (high + 1, os.sysconf("SC_OPEN_MAX"))):
            os.closerange(first, last)
        if os.read(orders, 1) == _KILL:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        # No exit: what a process does at its end is the parent's to do.
        os.kill(os.getpid(), signal.SIGKILL)
