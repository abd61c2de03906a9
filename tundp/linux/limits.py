"""What the sandbox of this process keeps from it: system calls, open files, threads, proc(5).

Containers, units and hardened hosts refuse what a kernel has: a seccomp filter answers EPERM,
a limit is reached, a file system is not mounted. Asked by trying, without effect.
"""

from __future__ import annotations

import os
import resource
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tundp.blocking import start_thread
from tundp.errors import FILES_STEP, SCARCE, PlatformError
from tundp.finding import Finding, Verdict

LEAST_FILES: Final = 24
"""Open files below which no daemon starts; with very few libuv aborts the process."""
ENOUGH_FILES: Final = 64
"""Open files a daemon gets by with: 30 of its own with one worker, and its callers'."""
_NR_OPEN: Final = Path("/proc/sys/fs/nr_open")
_NR_OPEN_DEFAULT: Final = 1 << 20
"""The same where it cannot be read (fs/file.c)."""
_SECCOMP_STEP: Final = (
    "allow {name} in the seccomp profile of the container or in SystemCallFilter= of the unit"
)


def open_event() -> int:
    """A descriptor for eventfd_write(3) and eventfd_read(3), readable in between; non-blocking.

    An eventfd(2); where that is refused a unix datagram socket connected to itself, which keeps
    the values apart and accepts nobody else's. The caller's. PlatformError.
    """
    try:
        return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    except OSError as error:
        if error.errno in SCARCE:
            raise PlatformError(f"cannot open an eventfd: {error.strerror}", error.errno) from None
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            sock.bind("")  # unix(7): to a free abstract address
            sock.connect(sock.getsockname())
            return sock.detach()
    except OSError as error:
        raise PlatformError(
            f"cannot open a socket in place of an eventfd: {error.strerror}", error.errno
        ) from None


def why_no_eventfd() -> str:
    """Why eventfd(2) is refused to this process, whatever is open; empty if it is not."""
    try:
        os.close(os.eventfd(0, os.EFD_CLOEXEC))
    except OSError as error:
        return "" if error.errno in SCARCE else str(error.strerror)
    return ""


def raise_file_limit() -> str:
    """Allow as many open files as the hard limit does; why that failed, empty if it did not.

    No more than the kernel has (fs.nr_open), which may have been lowered since.
    """
    try:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = _nr_open()
        wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
    except (OSError, ValueError) as error:  # ValueError: setrlimit(2) answered EPERM
        return str(getattr(error, "strerror", None) or error)
    return ""


def findings() -> list[Finding]:
    """What is missing, and what that means; those that keep a daemon from running are failures."""
    return [*_threads(), *_files(), *_calls(), *_proc()]


def _threads() -> Iterator[Finding]:
    thread = threading.Thread(target=lambda: None, name="probe", daemon=True)
    try:
        start_thread(thread)
    except PlatformError as error:
        yield Finding(
            id="limits.threads",
            verdict=Verdict.FAIL,
            title="threads",
            evidence=str(error),
        )
    else:
        thread.join()


def _files() -> Iterator[Finding]:
    try:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE))
    except (OSError, ValueError) as error:
        yield Finding(
            id="limits.rlimits",
            verdict=Verdict.WARN,
            title="limits",
            evidence=f"getrlimit or setrlimit: {getattr(error, 'strerror', None) or error}",
            meaning="the limit of open files stays as it is, whatever that is",
            next_step=_SECCOMP_STEP.format(name="getrlimit, setrlimit and prlimit64"),
        )
        return
    if hard != resource.RLIM_INFINITY and hard < ENOUGH_FILES:
        yield Finding(
            id="limits.files",
            verdict=Verdict.WARN if hard >= LEAST_FILES else Verdict.FAIL,
            title="open files",
            evidence=f"only {hard} files may be open (RLIMIT_NOFILE)",
            meaning=f"a daemon has about 30 open, more with --workers and callers: under"
            f" {ENOUGH_FILES} connections, files and programs fail, under {LEAST_FILES} it cannot"
            " start",
            next_step=FILES_STEP,
        )


def _calls() -> Iterator[Finding]:
    if why_not := why_no_eventfd():
        yield Finding(
            id="limits.eventfd",
            verdict=Verdict.WARN,
            title="eventfd",
            evidence=f"eventfd2: {why_not}",
            meaning="uvloop cannot run: the event loop is asyncio's, a little slower in the"
            " control plane; packets are as fast",
            next_step=_SECCOMP_STEP.format(name="eventfd2"),
        )


def _proc() -> Iterator[Finding]:
    if not has_proc():
        yield Finding(
            id="limits.proc",
            verdict=Verdict.WARN,
            title="/proc",
            evidence="there is no /proc",
            meaning="switches such as ip_forward, tables of legacy iptables, lost datagrams and"
            " other flannels are not seen, and device settings are not made",
            next_step="mount one: mount -t proc proc /proc",
        )


def has_proc() -> bool:
    """Whether proc(5) is mounted on /proc: what is missing there is missing in the kernel."""
    return os.path.exists("/proc/self/stat")


def _nr_open() -> int:
    try:
        return int(_NR_OPEN.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return _NR_OPEN_DEFAULT
