"""Who listens on a unix socket, and whether that process is stopped: of a daemon that is silent."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from pathlib import Path
from typing import Final

_STOPPED: Final = ("T", "t")
_CONNECT_S: Final = 1.0
_ACCEPTS: Final = 0x10000
"""__SO_ACCEPTCON (include/uapi/linux/net.h): a socket that listens."""
_CREDENTIALS: Final = struct.Struct("=iII")
"""struct ucred: pid, uid, gid (unix(7), SO_PEERCRED)."""


def listener(path: Path) -> int | None:
    """The pid of the process that listens on a unix socket; None if none does, or nobody may know.

    0 if one listens and may not be named. The kernel takes a connection also for a process that is
    stopped or hangs, until so many wait as its backlog has places (unix(7): EAGAIN): then it is who
    has that socket open.
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_CONNECT_S)
        try:
            probe.connect(str(path))
        except (BlockingIOError, TimeoutError):
            return _holder(path)
        ucred = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid: int = _CREDENTIALS.unpack(ucred)[0]
        return pid
    return None


def _holder(path: Path) -> int:
    """The pid of the process with a listening socket of this name; 0 if it cannot be seen."""
    with contextlib.suppress(OSError):
        text = Path("/proc/net/unix").read_text(encoding="utf-8", errors="replace")
        sockets = {
            f"socket:[{words[6]}]"
            for words in (line.split(None, 7) for line in text.splitlines()[1:])
            # Num RefCount Protocol Flags Type St Inode Path (proc_pid_net(5))
            if len(words) == 8 and int(words[3], 16) & _ACCEPTS and words[7] == str(path)
        }
        for pid in sorted(
            int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit()
        ):
            with contextlib.suppress(OSError):
                for each in Path(f"/proc/{pid}/fd").iterdir():
                    if os.readlink(each) in sockets:
                        return pid
    return 0


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
