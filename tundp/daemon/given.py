"""What the early start began with, as the daemon's resources."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping

from tundp.backend.base import Given
from tundp.choices import OnLeaseLost
from tundp.daemon.resources import Resources
from tundp.early import Start
from tundp.linux import fd_store
from tundp.settings.settings import Settings

_log = logging.getLogger(__name__)


def resources_of(start: Start) -> Resources | None:
    """What a predecessor gave, and who carries packets meanwhile; None if it gave nothing."""
    given = start.descriptors
    if not given:
        return None
    tun_fds = fd_store.in_order(given, "tun-")
    udp_fds = fd_store.in_order(given, "udp-")
    singles = [given[name] for name in fd_store.NAMES if name in given]
    for fd in set(given.values()) - {*tun_fds, *udp_fds, *singles}:
        os.close(fd)  # behind a gap in the numbers
    return Resources(
        lock=given.get("lock"),
        admin=_socket(given, "admin"),
        health=_socket(given, "health"),
        metrics=_socket(given, "metrics"),
        backend=Given(
            tun_fds=tun_fds,
            udp_socks=tuple(socket.socket(fileno=fd) for fd in udp_fds),
            image_fd=given.get("image"),
            early=start.workers,
        ),
    )


def log_start(start: Start, settings: Settings) -> None:
    """Say whether packets flow already, and end that where the settings forbid it."""
    for name in fd_store.unknown:
        _log.warning("descriptor %s given and not known, or given twice: closed", name)
    if start.workers is None:
        if start.descriptors:
            _log.info("no early start: %s", start.why_not)
        return
    if settings.on_lease_lost is OnLeaseLost.EXIT:
        start.workers.close()
        _log.info("no early start: --on-lease-lost=exit starts with none")
        return
    _log.info(
        "early start: %d packet threads carry packets by image %d",
        len(start.workers.threads),
        start.workers.generation,
    )


def _socket(given: Mapping[str, int], name: str) -> socket.socket | None:
    return socket.socket(fileno=given[name]) if name in given else None
