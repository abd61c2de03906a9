"""Stops a process, and returns when it has stopped.

kill(2) returns before the threads of the other process have taken SIGSTOP: one that runs on
another processor goes on until it is interrupted, and may answer a question meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from tests.wait import until_sync


def stop(pid: int) -> None:
    """Send SIGSTOP to a process and wait until every thread of it has stopped, or ended."""
    os.kill(pid, signal.SIGSTOP)
    until_sync(lambda: thread_states(pid) <= set("TtZX"), f"process {pid} to stop", poll_s=0.002)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Let a process stand still meanwhile."""
    stop(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def thread_states(pid: int) -> set[str]:
    """State letters of a process' threads (proc_pid_stat(5)); none once it is gone."""
    found = set()
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            # The name before it may hold anything, spaces and brackets too.
            found.add(stat.read_text().rpartition(")")[2].split()[0])
    return found
