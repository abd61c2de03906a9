"""`tundp chaos`: packets for single peers impaired on purpose, for a while.

begin     a lane of the relay for each peer (chaos_relay.py), and the engine sends there
end       the engine sends to the peer again; by time, by command, with the daemon, or when the
          peer's endpoint goes, since what comes after it is another's

It is kept by endpoint: all subnets of the peer's node are impaired. Nothing of it is on disk. One
direction, from here to the peer.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from tundp.backend.udp.chaos_relay import Lane, LaneCounts, LanePlan, Relay
from tundp.backend.udp.echoes import Echoes, ProberSettings
from tundp.engine.base import Dataplane
from tundp.errors import PlatformError, Unsupported
from tundp.finding import Finding, worries
from tundp.lease.fib import FIRST_HOP_ID, Fib
from tundp.lease.model import Peer
from tundp.lease.routing import RoutingDelta
from tundp.wire.impair import LONGEST_S, Impairment

_log = logging.getLogger(__name__)

LANES_MAX: Final = 64
"""Peers at a time: each takes three descriptors."""
ENDED_KEPT: Final = 16
ALL: Final = "all"
STOP_STEP: Final = "tundp chaos stop"

Note = Callable[..., object]
"""daemon.journal.Journal.note."""


class ChaosRefused(Unsupported):
    """What was asked for is not done, and why."""


@dataclass(slots=True, kw_only=True, eq=False)
class Run:
    """Chaos for one peer, now or once."""

    hop_id: int
    subnet: IPv4Network
    """One of the peer's."""
    address: IPv4Address
    port: int
    impairment: Impairment
    seed: int
    since: float
    """Unix time, as the others here."""
    ends_at: float
    due_at: float
    """When it ends, CLOCK_MONOTONIC: whatever is done to the clock."""
    lane: Lane = field(repr=False)
    ended_at: float | None = None
    why_ended: str = ""

    @property
    def who(self) -> str:
        """The peer, in words."""
        return f"{self.subnet} at {self.address}:{self.port}"


class Chaos:
    """See the module. Methods are called on the event loop's thread."""

    def __init__(
        self,
        echoes: Echoes,
        peer_at: Callable[[int], Peer | None],
        on_change: Callable[[Iterable[int]], object],
    ) -> None:
        """echoes: what they ask goes the way packets go. peer_at: one of the peers at a hop.

        on_change: called with hop ids whose path is another than before.
        """
        echoes.divert = self.take
        self._peer_at = peer_at
        self._on_change = on_change
        self._engine: Dataplane | None = None
        self._settings: ProberSettings | None = None
        self._fib: Fib | None = None
        self._relay: Relay | None = None
        self._running: dict[int, Run] = {}
        """By hop id."""
        self._ended: deque[Run] = deque(maxlen=ENDED_KEPT)
        self._closing: list[Run] = []
        """Not listed any more, but their lanes may still take and send what was on its way."""
        self._past = LaneCounts()
        """Of those that are not kept any more: their lanes are closed."""
        self._timer: asyncio.TimerHandle | None = None
        self._busy = asyncio.Lock()
        self.note: Note = lambda *_, **__: None

    def start(self, engine: Dataplane, settings: ProberSettings, fib: Fib) -> None:
        """Impair packets of this engine, on demand."""
        self._engine, self._settings, self._fib = engine, settings, fib

    def reset(self, settings: ProberSettings) -> None:
        """The underlay's address or MTU is another."""
        before, self._settings = self._settings, settings
        if before is not None and (before.source, before.port) != (settings.source, settings.port):
            self._end(list(self._running.values()), "this node's underlay address changed")

    def install(self, fib: Fib, delta: RoutingDelta) -> None:
        """See FibSink; after the engine, which has dropped ways of hop ids assigned anew."""
        self._fib = fib
        assigned = set(delta.hops_assigned)
        gone = [
            run
            for run in self._running.values()
            if run.hop_id in assigned or not self._is_there(run)
        ]
        self._end(gone, "the peer's lease moved or went")

    def seen(self) -> int:
        """See FibSink."""
        return 0 if self._fib is None else self._fib.generation

    async def begin(
        self, who: str, impairment: Impairment, *, for_s: float, seed: int | None
    ) -> list[Run]:
        """Impair what is sent to a peer, or to `all`. ChaosRefused, PlatformError; all or nothing.

        who: a peer's subnet, PublicIP or any address in its subnet. for_s: seconds.
        """
        if not 0 < for_s <= LONGEST_S:
            raise ChaosRefused("the time is out of range: above 0 and at most 1h")
        if impairment.is_none:
            raise ChaosRefused("nothing to impair: --loss, --delay, --reorder, ...")
        async with self._busy:
            hops = self._hops_of(who)
            if already := [self._running[hop].who for hop in hops if hop in self._running]:
                raise ChaosRefused(
                    f"{already[0]} is impaired already: {STOP_STEP} {self._name(hops, who)}"
                )
            if len(self._running) + len(hops) > LANES_MAX:
                raise ChaosRefused(
                    f"{who}: {len(hops)} peers, and chaos takes {LANES_MAX} at a time,"
                    f" of which {len(self._running)} are taken: name single ones"
                )
            seed = secrets.randbelow(1 << 32) if seed is None else seed
            settings = self._settings
            runs = await asyncio.to_thread(self._open, hops, impairment, for_s, seed)
            if not all(map(self._is_there, runs)) or settings != self._settings:
                for run in runs:
                    run.lane.close()
                raise ChaosRefused(f"{who}: a lease or this node's address changed just now")
            self._take(runs)
        for run in runs:
            text = (
                f"chaos begins: packets to {run.who} are impaired on purpose for {for_s:g} s:"
                f" {impairment.words}; seed {seed}"
            )
            _log.warning("%s; %s ends it", text, STOP_STEP)
            self._tell("begin", text, run)
        return runs

    def stop(self, who: str = ALL, why: str = "stopped by command") -> list[Run]:
        """End chaos for a peer, or all of it; what was ended. ChaosRefused."""
        hops = list(self._running) if who == ALL else self._hops_of(who)
        runs = [self._running[hop] for hop in hops if hop in self._running]
        self._end(runs, why)
        return runs

    def runs(self) -> Sequence[Run]:
        """What is impaired now, then the last ones that ended, newest first."""
        return (*self._running.values(), *reversed(self._ended))

    def counts(self, run: Run) -> LaneCounts:
        """What became of a run's datagrams."""
        return run.lane.counts() if self._relay is None else self._relay.counts(run.lane)

    def totals(self) -> LaneCounts:
        """What became of all datagrams of all runs since the start."""
        self._settle()
        found = LaneCounts()
        found.add(self._past)
        for run in (*self.runs(), *self._closing):
            found.add(self.counts(run))
        return found

    def take(self, hop_id: int, packet: bytes) -> bool:
        """Send one of tundp's own requests to a peer as its packets go; False: nothing is impaired.

        Asking who answers, and how much a path takes, sees what pods see.
        """
        run = self._running.get(hop_id)
        if run is None or self._relay is None:
            return False
        self._relay.submit(run.lane, packet)
        return True

    def findings(self) -> list[Finding]:
        """A warning while anything is impaired: so that nobody forgets."""
        return worries("chaos", self.words(), next_step=STOP_STEP)

    def words(self) -> str:
        """What is impaired now, in one line; empty for nothing."""
        return "; ".join(
            f"packets to {run.who} are impaired on purpose until"
            f" {time.strftime('%H:%M:%S', time.localtime(run.ends_at))}: {run.impairment.words}"
            for run in self._running.values()
        )

    def close(self) -> None:
        """The engine is stopped: end the thread. What waits is not sent."""
        if self._timer is not None:
            self._timer.cancel()
        now = time.time()
        for run in self._running.values():
            run.ended_at, run.why_ended = now, "the daemon ended"
            self._tell("end", f"chaos to {run.who} ended: the daemon ended", run)
        self._running.clear()
        if self._relay is not None:
            self._relay.close()

    def _hops_of(self, who: str) -> list[int]:
        """The hop ids a name means; ChaosRefused."""
        fib = self._fib
        if fib is None or self._engine is None:
            raise ChaosRefused("the daemon is starting: it carries no packets yet")
        if who == ALL:
            found = [int(hop) for hop in fib.hop_array["address"].nonzero()[0]]
            if not found:
                raise ChaosRefused("there are no peers")
            return found
        try:
            network = IPv4Network(who)
        except ValueError:
            raise ChaosRefused(
                f"{who!r} is no peer: its subnet, its PublicIP, an address in its subnet, or all"
            ) from None
        first, last = int(network.network_address), int(network.broadcast_address)
        if first == last and fib.peer(first) is not None:
            return [int(hop) for hop in (fib.hop_array["address"] == first).nonzero()[0]]
        hop = fib.index(first)
        if hop < FIRST_HOP_ID or fib.index(last) != hop:
            raise ChaosRefused(f"{who} is no peer's: tundp status lists subnets and PublicIPs")
        return [hop]

    def _is_there(self, run: Run) -> bool:
        """Whether the hop is still the endpoint that chaos began with."""
        hops = () if self._fib is None else self._fib.hop_array
        if run.hop_id >= len(hops):
            return False
        address, port, _ = hops[run.hop_id].tolist()
        return (address, port) == (int(run.address), run.port)

    def _name(self, hops: Sequence[int], who: str) -> str:
        return who if len(hops) == 1 else ""

    def _open(
        self, hops: Sequence[int], impairment: Impairment, for_s: float, seed: int
    ) -> list[Run]:
        """Lanes for some hops, not yet used. On a thread: a check may wait for a second."""
        assert self._settings is not None and self._fib is not None
        now, due_at, runs = time.time(), time.monotonic() + for_s, list[Run]()
        try:
            for hop_id in hops:
                address, port, _ = self._fib.hop_array[hop_id].tolist()
                peer = self._peer_at(hop_id)
                endpoint = str(IPv4Address(address)), port
                plan = LanePlan(
                    impairment=impairment,
                    seed=f"{seed} {endpoint[0]}:{port}",
                    source=self._settings.source,
                    port=self._settings.port,
                    peer=endpoint,
                    ends_at=due_at,
                )
                lane = Lane(plan)
                runs.append(
                    Run(
                        hop_id=hop_id,
                        subnet=IPv4Network(address) if peer is None else peer.subnet,
                        address=IPv4Address(address),
                        port=port,
                        impairment=impairment,
                        seed=seed,
                        since=now,
                        ends_at=now + for_s,
                        due_at=due_at,
                        lane=lane,
                    )
                )
            runs[0].lane.check()
        except (OSError, PlatformError) as error:
            for run in runs:
                run.lane.close()
            if isinstance(error, PlatformError):
                raise
            raise PlatformError(f"no socket for chaos: {error.strerror}", error.errno) from None
        return runs

    def _take(self, runs: Sequence[Run]) -> None:
        """Serve lanes, and have the engine send there."""
        if self._relay is None:
            loop = asyncio.get_running_loop()
            self._relay = Relay(lambda: loop.call_soon_threadsafe(self._on_bug))
        for run in runs:
            self._relay.add(run.lane)
            self._running[run.hop_id] = run
        self._divert([run.hop_id for run in runs])

    def _divert(self, changed: Iterable[int]) -> None:
        """Have the engine send what is impaired to the lanes, and all else to the peers."""
        assert self._engine is not None
        self._engine.divert({hop_id: run.lane.way for hop_id, run in self._running.items()})
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._running:
            left_s = min(run.due_at for run in self._running.values()) - time.monotonic()
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, left_s), self._on_time)
        self._on_change(changed)

    def _on_time(self) -> None:
        now = time.monotonic()
        due = [run for run in self._running.values() if run.due_at <= now + 0.01]
        self._timer = None
        self._end(due, "its time is over")
        if not due and self._running:
            self._divert(())

    def _on_bug(self) -> None:
        self._end(list(self._running.values()), "a bug of its thread: see the log")
        if self._relay is not None:
            self._relay.close()
            self._relay = None

    def _end(self, runs: Sequence[Run], why: str) -> None:
        if not runs:
            return
        assert self._relay is not None
        for run in runs:
            del self._running[run.hop_id]
        self._divert([run.hop_id for run in runs])
        for run in runs:
            run.ended_at, run.why_ended = time.time(), why
            if len(self._ended) == ENDED_KEPT:
                self._closing.append(self._ended[0])
            self._ended.append(run)
            self._relay.end(run.lane)
            counts = self.counts(run)
            text = (
                f"chaos to {run.who} ended: {why}; of {counts.received} datagrams"
                f" {counts.lost + counts.too_big + counts.overflow} lost, {counts.duplicated}"
                f" duplicated, {counts.corrupted} corrupted"
            )
            _log.warning("%s", text)
            self._tell("end", text, run)
        self._settle()

    def _settle(self) -> None:
        """Keep of runs that are not listed any more, once their lanes are closed, only the sum."""
        closed = [run for run in self._closing if run.lane.is_closed]
        for run in closed:
            self._closing.remove(run)
            self._past.add(self.counts(run))

    def _tell(self, what: str, text: str, run: Run) -> None:
        """Keep a control event in the flight recorder."""
        self.note(
            "chaos",
            text,
            what=what,
            peer=str(run.address),
            subnet=str(run.subnet),
            impairment=run.impairment.words,
            seed=str(run.seed),
        )
