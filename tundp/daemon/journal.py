"""What happened to the node, as control events of the flight recorder: leases, and the log.

Packets are the engine's (engine/taps.py). What is logged at INFO and above is kept here as well,
so that the last 512 lines are there after a crash, and beside the packets they explain.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Final

from tundp.engine.recorder import ControlEvent, FlightRecorder
from tundp.lease.model import Peer
from tundp.lease.routing import RoutingDelta
from tundp.printable import LINE_MAX, printable

NAMED_MAX: Final = 64
"""Changed leases of one update that are noted one by one; of more, how many there are."""
_OWN_WORDS: Final = "tundp.daemon.publish"
"""Its log lines are the lease events, told with less."""


class Journal:
    """Notes control events; harmless without a flight recorder. Any thread may note."""

    def __init__(self, recorder: FlightRecorder | None) -> None:
        self._recorder = recorder
        self._lock = threading.Lock()

    def note(self, kind: str, text: str, **fields: str | float | None) -> None:
        """Keep an event. kind: one word."""
        if self._recorder is None:
            return
        event = ControlEvent(
            unix_ns=time.time_ns(), kind=kind, text=printable(text, LINE_MAX), fields=fields
        )
        with self._lock:
            self._recorder.note(event)

    def leases(self, delta: RoutingDelta, *, revision: int | None, took_s: float | None) -> None:
        """Keep what a published change of the routes was.

        revision: the store's, of the newest update in it. took_s: from the update to the packet
        path, seconds; None: it was there before the first packet.
        """
        changes = [
            *(("gone", peer, None) for peer in delta.gone),
            *(("come", None, peer) for peer in delta.come),
            *(("moved", before, after) for before, after in delta.moved),
        ]
        took_ms = None if took_s is None else round(took_s * 1000, 3)
        for what, before, after in changes[:NAMED_MAX]:
            subnet = (after or before).subnet  # type: ignore[union-attr]  # one of them is there
            self.note(
                "lease",
                f"{subnet} {what}{_where(before, after)}, revision {revision}",
                what=what,
                subnet=str(subnet),
                before=_endpoint(before),
                after=_endpoint(after),
                revision=revision,
                took_ms=took_ms,
            )
        if len(changes) > NAMED_MAX:
            left = len(changes) - NAMED_MAX
            self.note("lease", f"{left} more leases changed", revision=revision, took_ms=took_ms)

    def handler(self) -> logging.Handler:
        """What keeps log lines."""
        return _Handler(self)


class _Handler(logging.Handler):
    """A log line is a control event."""

    def __init__(self, journal: Journal) -> None:
        super().__init__(logging.INFO)
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        if record.name == _OWN_WORDS and record.levelno < logging.WARNING:
            return
        try:
            self._journal.note(
                "log", record.getMessage(), level=record.levelname.lower(), logger=record.name
            )
        except Exception:  # noqa: BLE001  (as every handler)
            self.handleError(record)


def _where(before: Peer | None, after: Peer | None) -> str:
    ends = [_endpoint(peer) for peer in (before, after) if peer is not None]
    return f" {' -> '.join(filter(None, ends))}" if any(ends) else ""


def _endpoint(peer: Peer | None) -> str | None:
    return None if peer is None else f"{peer.endpoint.address}:{peer.endpoint.port}"
