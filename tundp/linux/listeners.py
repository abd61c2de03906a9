"""Who listens on a unix socket, and whether that process is stopped: of a daemon that is silent."""

from __future__ import annotations

import contextlib
import socket
import struct
from pathlib import Path
from typing import Final

_STOPPED: Final = ("T", "t")
_CONNECT_S: Final = 1.0
_CREDENTIALS: Final = struct.Struct("=iII")
"""struct ucred: pid, uid, gid (unix(7), SO_PEERCRED)."""


def listener(path: Path) -> int | None:
    """The pid of the process that listens on a unix socket; None if none does, or nobody may know.

    The kernel takes a connection also for a process that is stopped or hangs.
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_CONNECT_S)
        probe.connect(str(path))
        ucred = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid: int = _CREDENTIALS.unpack(ucred)[0]
        return pid or None
    return None


def is_stopped(pid: int | None) -> bool:
    """Whether a process is stopped by a signal, or by a debugger."""
    return pid is not None and process_state(pid) in _STOPPED


def process_state(pid: int) -> str:
    """The state letter of a process (proc_pid_stat(5)): `T` is stopped; empty if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[0]
