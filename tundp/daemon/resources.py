"""What a daemon holds open: given by a predecessor, or opened before rights are dropped.

    lock      one daemon for each subnet.env; the lock is the open file's, whoever has it
    admin     the admin socket, listening
    recorder  the flight recorder, a file beside the admin socket
    health    /healthz and /readyz, listening; metrics likewise
    backend   TUN queues and UDP sockets (backend.base.Given)

`open_resources` is the privileged stage of a start: after it the process keeps CAP_NET_ADMIN
and little else, so that a port below 1024 or a directory of another user must be opened here.
What needs the network config (the TUN device, the UDP sockets) is opened later, with
CAP_NET_ADMIN. Whatever was given is not opened again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from dataclasses import dataclass, field

import tundp
from tundp.admin import open_admin_socket
from tundp.backend.base import Given
from tundp.daemon.kept import Kept
from tundp.daemon.lock import take_lock
from tundp.engine.recorder import FlightRecorder, open_recorder
from tundp.errors import PlatformError
from tundp.observe.web import open_listener
from tundp.settings.settings import Settings

_log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Resources:
    """Descriptors, owned until somebody takes them; None: not there, or not wanted."""

    lock: int | None = None
    admin: socket.socket | None = None
    health: socket.socket | None = None
    metrics: socket.socket | None = None
    recorder: FlightRecorder | None = None
    backend: Given = field(default_factory=Given)
    kept: Kept = field(default_factory=Kept)
    """The descriptor store these are put in."""

    def take_backend(self) -> Given:
        """The backend's descriptors; they are the caller's now."""
        given, self.backend = self.backend, Given()
        return given

    def duplicates(self) -> dict[str, int]:
        """Lock and health socket by their names in the store; the caller's. OSError."""
        found = {} if self.lock is None else {"lock": os.dup(self.lock)}
        if self.health is not None and self.health.fileno() >= 0:
            found["health"] = os.dup(self.health.fileno())
        return found

    def close(self) -> None:
        """Close everything that is still here. Harmless when repeated."""
        for sock in (self.admin, self.health, self.metrics):
            if sock is not None:
                sock.close()
        if self.lock is not None:
            os.close(self.lock)
        self.admin = self.health = self.metrics = self.lock = None
        if self.recorder is not None:
            self.recorder.leave()
        self.take_backend().close()


def open_resources(settings: Settings, given: Resources | None = None) -> Resources:
    """Open what `given` lacks; all or none. PlatformError, and `given` is closed.

    Blocks, for a second at most: before the event loop.
    """
    resources = given or Resources()
    try:
        if resources.lock is None:
            resources.lock = take_lock(settings.instance)
        if resources.admin is None:
            resources.admin = open_admin_socket(settings.admin_socket)
        if resources.recorder is None:
            resources.recorder = _open_recorder(settings)
        if resources.health is None and settings.healthz_port:
            resources.health = open_listener(
                settings.healthz_ip, settings.healthz_port, "--healthz-ip and --healthz-port"
            )
        if resources.metrics is None and settings.metrics_addr is not None:
            # Packets flow without metrics: whoever serves them tries again (keep_metrics).
            with contextlib.suppress(PlatformError):
                resources.metrics = open_listener(*settings.metrics_addr, "--metrics-addr")
    except BaseException:
        resources.close()
        raise
    return resources


def _open_recorder(settings: Settings) -> FlightRecorder | None:
    """The flight recorder; packets flow without it."""
    path = settings.instance.recorder(settings.admin_socket)
    try:
        return open_recorder(path, tundp.__version__)
    except PlatformError as error:
        _log.warning("%s; what is dropped is counted, but no packet is kept", error)
        return None
