"""Starts the command as systemd starts a service: descriptors from 3 on, and what names them."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Final, NoReturn

from tundp.linux import uapi

FIRST_FD: Final = 3
"""SD_LISTEN_FDS_START."""
NOT_FOUND: Final = 127
"""The exit code of a command that is not there, as shells and env(1) have it."""
CANNOT_RUN: Final = 126
_OTHERS: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID", "WATCHDOG_USEC")
"""Variables of the holder's own supervisor that are not for the command."""


def start(
    command: tuple[str, ...],
    environment: Mapping[str, str],
    descriptors: Sequence[tuple[str, int]],
    signals: frozenset[signal.Signals],
) -> int:
    """Start `command` with duplicates of the descriptors, named; its pid. OSError: no process.

    signals: what this process has blocked or handles, and the command shall not. With the holder
    the command ends (PR_SET_PDEATHSIG): without it nobody would restart it, and the next one finds
    its lock taken.
    """
    holder = os.getpid()
    pid = os.fork()
    if not pid:
        _become(command, environment, descriptors, signals, holder)
    return pid


def _become(
    command: tuple[str, ...],
    environment: Mapping[str, str],
    descriptors: Sequence[tuple[str, int]],
    signals: frozenset[signal.Signals],
    holder: int,
) -> NoReturn:
    code = CANNOT_RUN
    try:
        for each in signals:
            signal.signal(each, signal.SIG_DFL)
        # Python ignores it, and a process it starts would, too.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        prctl(uapi.PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == holder:
            own = {name: value for name, value in environment.items() if name not in _OTHERS}
            if descriptors:
                own |= _announced(descriptors)
            if "WATCHDOG_USEC" in environment:
                own["WATCHDOG_USEC"] = environment["WATCHDOG_USEC"]
                own["WATCHDOG_PID"] = str(os.getpid())
            os.execvpe(command[0], command, own)  # noqa: S606
    except OSError as error:
        code = NOT_FOUND if isinstance(error, FileNotFoundError) else CANNOT_RUN
        say(f"cannot run {command[0]}: {error.strerror}")
    finally:
        os._exit(code)


def _announced(descriptors: Sequence[tuple[str, int]]) -> dict[str, str]:
    """Put the descriptors where the command looks for them; the variables that tell."""
    beyond = FIRST_FD + len(descriptors)
    # First out of the way of those that come before: nothing may be overwritten.
    copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, beyond) for _, fd in descriptors]
    for number, copy in enumerate(copies, FIRST_FD):
        os.dup2(copy, number, inheritable=True)
    return {
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDS": str(len(descriptors)),
        "LISTEN_FDNAMES": ":".join(name for name, _ in descriptors),
    }


def prctl(option: int, argument: int | bytes) -> None:
    """Set an attribute of this process; nothing on a kernel without it (man 2 prctl)."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        value = argument if isinstance(argument, bytes) else ctypes.c_ulong(argument)
        libc.prctl(option, value, 0, 0, 0)


def say(text: str) -> None:
    """A line of the log."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"tundp hold: {text}\n")
        sys.stderr.flush()
