"""CPU time of a process's threads, and which process owns a unix socket: proc(5), unix(7)."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")
_TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")
_CREDENTIALS: Final = struct.Struct("3i")
"""struct ucred: pid, uid, gid."""


@dataclass(frozen=True, slots=True)
class Thread:
    """One thread."""

    tid: int
    name: str
    user_s: float
    """CPU time in user mode since it was started, by whole clock ticks."""
    system_s: float


def threads_of(pid: int) -> Iterator[Thread]:
    """The threads of a process; those that end meanwhile are left out, all if it is gone."""
    try:
        entries = list((_PROC / str(pid) / "task").iterdir())
    except OSError:
        return
    for entry in entries:
        try:
            text = (entry / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        # The name is in parentheses and may hold some: the fields begin behind the last one.
        head, _, rest = text.rpartition(")")
        fields = rest.split()
        yield Thread(
            tid=int(entry.name),
            name=head.partition("(")[2],
            user_s=int(fields[11]) * _TICK_S,
            system_s=int(fields[12]) * _TICK_S,
        )


def owner_of(path: Path, pid: int) -> int | None:
    """The process that listens on a unix socket, by its number here; None if it is not seen.

    pid: the number that process knows itself by, in a process namespace of its own maybe.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            probe.connect(str(path))
            found = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    except OSError:
        return None
    listener: int = _CREDENTIALS.unpack(found)[0]
    # 0: of a namespace that is not seen from here. A service manager may have opened the socket.
    return listener if listener and _own_number(listener) == pid else None


def _own_number(pid: int) -> int | None:
    """The number a process has in its innermost process namespace."""
    try:
        text = (_PROC / str(pid) / "status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    return pid
