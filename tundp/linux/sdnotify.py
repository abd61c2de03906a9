"""sd_notify(3): telling systemd how we are. Silent where there is no systemd."""

from __future__ import annotations

import os
import socket


def notify(*fields: str) -> None:
    """Send `fields` such as `READY=1` or `STATUS=...`. OSError if the socket is there but deaf."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = f"\0{path[1:]}" if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect(address)
        sock.sendall("\n".join(fields).encode())
