"""sd_notify(3): telling systemd how we are. Silent where there is no systemd."""

from __future__ import annotations

import logging
import os
import socket

_log = logging.getLogger(__name__)


def notify(*fields: str) -> None:
    """Send `fields` such as `READY=1` or `STATUS=...`. Never blocks; a deaf socket is a warning."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = f"\0{path[1:]}" if path.startswith("@") else path
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    try:
        with socket.socket(socket.AF_UNIX, kind) as sock:
            sock.connect(address)
            sock.send("\n".join(fields).encode())
    except OSError as error:
        _log.warning("cannot notify systemd at %s: %s", path, error.strerror)
