"""systemd's file descriptor store: what a start is given back (sd_listen_fds(3)).

On the way of a start to its first packet: standard library only, and little of it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping, MutableMapping
from typing import Final

FIRST_FD: Final = 3
"""SD_LISTEN_FDS_START (systemd/sd-daemon.h)."""
NAMES: Final = ("lock", "admin", "health", "metrics", "image")
"""Names of single descriptors; queues and sockets have a number: tun-0, udp-0."""
_NUMBERED: Final = ("tun-", "udp-")

unknown: list[str] = []
"""Names of descriptors `taken` has closed, for the log."""


def taken(environ: MutableMapping[str, str]) -> dict[str, int]:
    """Adopt the descriptors this process was given, by name; {} if none were for it.

    They are the caller's, and close-on-exec. The variables are removed: no child is to take
    them for its own. Descriptors of names nobody here knows are closed, and so is the second of
    a name; both are in `unknown`.
    """
    pid, count, names = (
        environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
    )
    if pid != str(os.getpid()) or not count.isdecimal():
        return {}
    found: dict[str, int] = {}
    labels = names.split(":") if names else []
    for number in range(int(count)):
        fd = FIRST_FD + number
        name = labels[number] if number < len(labels) else ""
        try:
            fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        except OSError:
            unknown.append(f"{name} (descriptor {fd} is not open)")
            continue
        if name in found or not _is_known(name):
            os.close(fd)
            unknown.append(name)
        else:
            found[name] = fd
    return found


def in_order(given: Mapping[str, int], prefix: str) -> tuple[int, ...]:
    """The descriptors `prefix`0, `prefix`1, ... as far as there are any without a gap."""
    found: list[int] = []
    while (fd := given.get(f"{prefix}{len(found)}")) is not None:
        found.append(fd)
    return tuple(found)


def _is_known(name: str) -> bool:
    return name in NAMES or any(
        name.startswith(prefix) and name[len(prefix) :].isdecimal() for prefix in _NUMBERED
    )
