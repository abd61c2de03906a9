"""From the routing ledger to whoever routes by it: FIBs, not too often, and the log's lines."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from tundp import collector
from tundp.backend.base import FibSink
from tundp.backoff import TokenBucket
from tundp.daemon.journal import Journal
from tundp.lease.fib import Fib
from tundp.lease.routing import Routing, RoutingDelta, merged
from tundp.printable import SENTENCE_MAX, printable, quoted

_log = logging.getLogger(__name__)

LASTING_LEASES: Final = collector.MANY
"""An update of more makes the garbage collector's work noticeable."""
PEERS_NAMED: Final = 20
"""More changes at once are counted in the log, not named."""
LINES_NAMED: Final = 20
"""Of one kind of line, before they are counted only."""
RETRY_S: Final = 5.0
"""Between two tries to publish what a bug kept from being published."""
PUBLISH_SHARE: Final = 5.0
"""FIB rebuilds may use at most one part in so many of event-loop time."""


class Publisher:
    """Gives each new FIB, with what changed since the last one, to every consumer.

    One publication a change; changes that come while a rebuild would cost the event loop
    more than its share are merged into the next one.
    """

    def __init__(self, routing: Routing, journal: Journal | None = None) -> None:
        """journal: where published changes are noted; None: nowhere."""
        self._routing = routing
        self._journal = journal or Journal(None)
        self._applied_at = 0.0
        """When the oldest of what is pending was applied."""
        self._sinks: tuple[FibSink, ...] = ()
        self._pending: list[RoutingDelta] = []
        """What was applied since the last publication, oldest first; merged when it is due."""
        self._timer: asyncio.TimerHandle | None = None
        self._published_at = 0.0
        self._cost_s = 0.0
        self._entries = 0
        """Changed by the parts of an update so far."""
        self._log = DeltaLog()
        self.on_published: Callable[[], None] = _nothing
        """Called when every consumer has a new FIB."""

    def first_fib(self) -> Fib:
        """The FIB a backend is opened with: of everything known by now."""
        known = merged(*self._pending)
        self._pending.clear()
        self._journal.leases(known, revision=self._routing.revision, took_s=None)
        return self._routing.fib()

    def start(self, sinks: Sequence[FibSink]) -> None:
        """Feed `sinks` from now on: they have the FIB of `first_fib`, and get what came since."""
        self._sinks = tuple(sinks)
        if self._pending:
            self._publish_soon()

    def apply(
        self, delta: RoutingDelta, *, is_own_changed: bool = False, is_last: bool = True
    ) -> None:
        """Log and publish a change.

        is_own_changed: this node's own addresses are others now. is_last: of the parts of one
        update, whose peers are counted in the log together.
        """
        self._log.write(delta, is_last=is_last)
        if delta.moves_packets or is_own_changed:
            if not self._pending:
                self._applied_at = time.monotonic()
            self._pending.append(delta)
            if self._sinks:
                self._publish_soon()
        self._entries += delta.changed_leases + len(delta.newly_bad)
        if is_last and self._entries > LASTING_LEASES:
            # Packets need not wait for it.
            collector.settle()
        if is_last:
            self._entries = 0

    def start_over(self, routing: Routing) -> None:
        """Publish all of another ledger; what was pending is void.

        Every hop id of it counts as newly assigned: state kept per hop is forgotten.
        """
        self._routing = routing
        hop_ids = sorted({peer.hop_id for peer in routing.peers.values()})
        whole = RoutingDelta(
            come=tuple(routing.peers.values()), hops_assigned=tuple(hop_ids), is_whole=True
        )
        self._pending = [whole]
        if self._sinks:
            self._publish_soon()

    def close(self) -> None:
        """Publish no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _publish_soon(self) -> None:
        """Publish now, or once the loop has had its share for everything else."""
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            return
        free_at = self._published_at + PUBLISH_SHARE * self._cost_s
        if loop.time() >= free_at:
            self._publish()
        else:
            self._timer = loop.call_at(free_at, self._publish_late)

    def _publish_late(self) -> None:
        """Publish on a timer; again after a while if that fails, as nobody awaits it."""
        self._timer = asyncio.get_running_loop().call_later(RETRY_S, self._publish_late)
        self._publish()

    def _publish(self) -> None:
        """Publish what is pending, which stays pending if a sink fails."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._routing.note_seen(min(sink.seen() for sink in self._sinks))
        fib = self._routing.fib()
        delta = merged(*self._pending)
        for sink in self._sinks:
            sink.install(fib, delta)
        self._pending.clear()
        took_s = time.monotonic() - self._applied_at
        self._journal.leases(delta, revision=self._routing.revision, took_s=took_s)
        self.on_published()
        self.close()
        self._timer = None
        self._published_at = loop.time()
        self._cost_s = self._published_at - began


def _nothing() -> None:
    """Nobody wants to know."""


class DeltaLog:
    """The log's lines about changed leases: the store must not decide how much is logged.

    Of each kind of line LINES_NAMED at once and one a minute, and one that counts the rest.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rations = {kind: TokenBucket(LINES_NAMED) for kind in ("entries", "leases", "peers")}
        self._counts = (0, 0, 0)
        """Peers gone, come and moved in the parts of an update so far."""

    def write(self, delta: RoutingDelta, *, is_last: bool = True) -> None:
        """Name each peer that came, moved or went, and each entry that cannot be used."""
        for bad in delta.newly_bad:
            if self._may_name("entries"):
                why = printable(bad.why, SENTENCE_MAX)
                _log.warning("entry %s ignored: %s", quoted(bad.name), why)
        self._count_rest("entries", logging.WARNING, "entries are ignored")
        for refused in delta.newly_refused:
            if self._may_name("leases"):
                _log.warning(
                    "lease %s (%s) is no peer: it %s",
                    refused.lease.key,
                    refused.lease.attributes.public_ip,
                    refused.refusal.value,
                )
        self._count_rest("leases", logging.WARNING, "leases are no peers")
        before, here = self._counts, (len(delta.gone), len(delta.come), len(delta.moved))
        self._counts = (before[0] + here[0], before[1] + here[1], before[2] + here[2])
        if is_last:
            self._write_peers(delta)
            self._counts = (0, 0, 0)

    def _write_peers(self, delta: RoutingDelta) -> None:
        here = len(delta.gone) + len(delta.come) + len(delta.moved)
        if sum(self._counts) > min(here, PEERS_NAMED):
            if self._may_name("peers"):
                _log.info("peers: %d gone, %d new, %d moved", *self._counts)
            return
        for peer in delta.come:
            if self._may_name("peers"):
                _log.info("peer %s at %s", peer.subnet, peer.endpoint.address)
        for old, new in delta.moved:
            if self._may_name("peers"):
                before = old.endpoint.address
                _log.info("peer %s at %s, before at %s", new.subnet, new.endpoint.address, before)
        for peer in delta.gone:
            if self._may_name("peers"):
                _log.info("peer %s at %s gone", peer.subnet, peer.endpoint.address)
        self._count_rest("peers", logging.INFO, "changes of peers")

    def _may_name(self, kind: str) -> bool:
        return self._rations[kind].take(self._clock())

    def _count_rest(self, kind: str, level: int, what: str) -> None:
        """A line about the ones that were not named, when one may be written."""
        bucket = self._rations[kind]
        if bucket.withheld and bucket.may_summarise(self._clock()):
            _log.log(level, "and %d more %s; see tundp status", bucket.withheld, what)
            bucket.withheld = 0
