"""sd_notify(3): report readiness and status to systemd. No-op without systemd."""

from __future__ import annotations

import functools
import logging
import os
import socket
import time
from typing import Final

from tundp.backoff import Outage
from tundp.printable import printable

_log = logging.getLogger(__name__)

STATUS_MAX: Final = 1000
"""Characters of a field. A newline in one would begin another: READY=1, MAINPID=..."""


def notify(*fields: str) -> None:
    """Send `fields` such as `READY=1` or `STATUS=...`. Never blocks.

    A failure is a warning, one a minute while it lasts, and in `failure`.
    """
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = f"\0{path[1:]}" if path.startswith("@") else path
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    try:
        with socket.socket(socket.AF_UNIX, kind) as sock:
            sock.connect(address)
            sock.send("\n".join(printable(field, STATUS_MAX) for field in fields).encode())
    except OSError as error:
        _outage(path).failed(error.strerror or error, now=time.monotonic())
    else:
        _outage(path).ended(now=time.monotonic())


def failure() -> str:
    """Why systemd could not be notified the last time; empty if it was, or does not wait."""
    path = os.environ.get("NOTIFY_SOCKET")
    outage = _outage(path) if path else None
    return f"{outage.what}: {outage.error}" if outage is not None and outage.error else ""


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
