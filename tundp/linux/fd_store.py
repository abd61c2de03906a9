"""The file descriptor store of whoever started this process: what outlives a daemon.

systemd's (sd_listen_fds(3), FDSTORE=1 of sd_pid_notify_with_fds(3)), and that of `tundp hold`,
which speaks the same protocol. The names, everywhere the same:

    tun-0, tun-1, ...   the queues of the TUN device, in order
    udp-0, udp-1, ...   the sockets of the underlay, one for each worker
    lock                the lock of subnet.env
    admin               the admin socket, listening; health, metrics likewise
    image               a memfd with all that packets need

Imports next to nothing: it is the first thing a start does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from typing import Final

QUEUES: Final = ("tun-", "udp-")
"""What the numbered names begin with."""
SINGLE: Final = ("lock", "admin", "health", "metrics", "image")
FIRST_FD: Final = 3
"""SD_LISTEN_FDS_START."""
_MOST: Final = 4096
"""More descriptors than any store has: a number beyond is a mistake, and costs no loop."""
_FORGET_S: Final = 1.0


def taken(environ: MutableMapping[str, str]) -> dict[str, int]:
    """Adopt the descriptors this process was started with, by name; the caller's from here on.

    They are close-on-exec, and the variables that announce them are removed: they are for this
    process and no child. An unknown name, or the second of one, is closed and said, and an unknown
    one removed from the store. Empty if there are none, or if they are another process's.
    """
    pid = environ.pop("LISTEN_PID", "")
    count = environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdecimal() or int(count) > _MOST:
        return {}
    found: dict[str, int] = {}
    for number in range(int(count)):
        fd = FIRST_FD + number
        name = names[number] if number < len(names) else ""
        try:
            os.set_inheritable(fd, False)
        except OSError as error:
            _say(f"descriptor {fd} ({name}) was announced and is not there: {error.strerror}")
            continue
        if name in found:
            _say(f"descriptor {fd}: there is a {name} already, closed")
            os.close(fd)
        elif is_known(name):
            found[name] = fd
        else:
            _say(
                f"descriptor {fd} has the name {name!r}, which this version has no use for: closed"
            )
            os.close(fd)
            remove(name)
    return found


def is_known(name: str) -> bool:
    """Whether it is one of the names above."""
    number = next((name[len(kind) :] for kind in QUEUES if name.startswith(kind)), None)
    return name in SINGLE if number is None else number.isascii() and number.isdecimal()


def numbered(found: dict[str, int], kind: str) -> tuple[int, ...]:
    """The descriptors `tun-0`, `tun-1` ... of a kind, in the order of their numbers."""
    names = [name for name in found if name.startswith(kind)]
    return tuple(found[name] for name in sorted(names, key=lambda each: int(each[len(kind) :])))


def in_order(found: Mapping[str, int], kind: str) -> tuple[int, ...]:
    """The same, as far as there are any without a gap; descriptors stay whose they are."""
    fds: list[int] = []
    while (fd := found.get(f"{kind}{len(fds)}")) is not None:
        fds.append(fd)
    return tuple(fds)


def is_there() -> bool:
    """Whether what is put in the store outlives this process.

    systemd says so since 254 (FDSTORE, the number of descriptors it keeps); for older ones our
    unit does.
    """
    room = os.environ.get("FDSTORE", "")
    return bool(os.environ.get("NOTIFY_SOCKET")) and room.isdecimal() and int(room) > 0


def put(name: str, fd: int) -> bool:
    """Store a duplicate of `fd`; whether it was sent. What has the name already stays, too.

    FDPOLL=0: systemd would drop a socket with an ICMP error in its queue, which polls as EPOLLERR.
    """
    from tundp.linux.notify import notify

    return notify("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=(fd,))


def remove(name: str) -> bool:
    """Let the store close all that has this name, soon; whether it was told."""
    from tundp.linux.notify import notify

    return not name or notify("FDSTOREREMOVE=1", f"FDNAME={name}")


def settle() -> bool:
    """Wait until the store has done what it was told; False after a second. Blocks."""
    from tundp.linux.notify import barrier

    return not is_there() or barrier(_FORGET_S)


def _say(text: str) -> None:
    import logging

    logging.getLogger(__name__).warning("%s", text)
