"""Runs a daemon with descriptors it was given. argv: JSON of names to numbers, then its flags."""

from __future__ import annotations

import json
import os
import socket
import sys

from tundp.backend.base import Given
from tundp.daemon import process
from tundp.daemon.resources import Resources
from tundp.settings.sources import load_settings

given = json.loads(sys.argv[1])


def sock(name: str) -> socket.socket | None:
    return socket.socket(fileno=given[name]) if name in given else None


settings = load_settings(sys.argv[2:], os.environ)
process.serve(
    settings,
    process.open_store(settings),
    Resources(
        lock=given.get("lock"),
        admin=sock("admin"),
        health=sock("health"),
        backend=Given(
            tun_fds=tuple(given.get("tun", ())),
            udp_socks=tuple(socket.socket(fileno=fd) for fd in given.get("udp", ())),
        ),
    ),
)
