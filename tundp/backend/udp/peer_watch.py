"""Finds out which peers answer: by what the engine counts, echo requests, and the kernel's tables.

    engine.activity      every second: who was sent packets and has sent none since
    echo requests        to those only, within the rate all share; and once a minute to a peer in
                         use, for the round-trip time
    netlink              route and neighbour of those that do not answer
    ICMP errors          what hosts on the way say of empty datagrams to them: shown, never believed

engine/reach.py has the rules and the words. Nothing here changes where a packet goes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from tundp.backend.udp.echoes import MIN_LEN, Echoes, ProberSettings
from tundp.backend.udp.refusals import Refusals
from tundp.backend.udp.usage import Usage
from tundp.backend.udp.ways import find_ways
from tundp.backoff import Ration
from tundp.engine.base import Dataplane, HopActivity
from tundp.engine.reach import Reach, Standing, Unanswered, Unreachable, Way
from tundp.errors import PlatformError
from tundp.finding import Finding, Verdict
from tundp.lease.fib import Fib
from tundp.lease.model import Peer
from tundp.lease.routing import RoutingDelta
from tundp.linux.netlink import Flow, Netlink

_log = logging.getLogger(__name__)

LOOK_S: Final = 1.0
"""Between two looks at what the engine counted."""
SUSPECT_S: Final = 1.0
"""After the first packet without an answer, before the peer is asked."""
ANSWER_S: Final = 1.0
"""What an echo request is waited for."""
MISSES: Final = 3
"""So many in a row without an answer: silent."""
PROVOKE_S: Final = 15.0
"""So long an ICMP error is provoked at each look, until one came; then with each question."""
STALE_S: Final = 3.0
"""After the last ICMP error, before one is provoked at each look again,"""
SPOKE_S: Final = 60.0
"""for so long after it; whoever spoke may have fallen silent."""
PROVOKED: Final = 10
"""Of how many in one look: the rate is for echo requests in the first place."""
AGAIN_S: Final = 5.0
"""Between two questions to a silent peer that is still sent packets."""
ANSWERED_AGAIN_S: Final = 15.0
"""To one that answers them, and sends nothing else."""
IDLE_AGAIN_S: Final = 60.0
"""To one that nothing is sent to meanwhile."""
FORGET_S: Final = 600.0
"""After the last packet to it, before a peer's silence is forgotten."""
ALONE_S: Final = 4.0
"""Where nobody can be asked: of silence, before it is mentioned."""
SUSPECTS_MAX: Final = 1024
"""Peers that are asked at a time; more wait."""
WAYS: Final = 64
"""Of them, whose routes are looked up in one look."""
WAY_AGAIN_S: Final = 2.0
_LINES: Final = 10
_NAMED: Final = 3
"""Peers the finding names."""


@dataclass(slots=True, eq=False)
class _Suspect:
    """A hop with packets nothing came back for."""

    hop_id: int
    peer: Peer
    since: float
    """Of the loop's clock, as all times here."""
    since_unix: float
    asked: int = 0
    missed: int = 0
    asked_at: float | None = None
    """Of the request that is under way."""
    answered_at: float | None = None
    next_at: float = 0.0
    provoked_at: float = 0.0
    cookies: list[bytes] = field(default_factory=list)
    way: Way | None = None
    way_at: float = 0.0
    last_errno: str | None = None
    is_refused: bool = False
    """Whether nothing was sent since, as the kernel refused all of it."""
    is_told: bool = False


class PeerWatch:
    """See the module. A consumer of routes (backend.base.FibSink): they say whose hop is whose."""

    def __init__(
        self,
        netlink: Netlink,
        echoes: Echoes,
        peer_of: Callable[[int], Peer | None],
    ) -> None:
        """peer_of: a peer at a hop, if there is any."""
        self._netlink = netlink
        self._echoes = echoes
        self._refusals = Refusals()
        self._peer_of = peer_of
        self._engine: Dataplane | None = None
        self._settings: ProberSettings | None = None
        self._generation = 0
        self._unanswered = Unanswered()
        self._suspects: dict[int, _Suspect] = {}
        self._usage = Usage()
        self._timed: dict[int, list[bytes]] = {}
        """Cookies of the last question for the round-trip time, by hop id."""
        self._lines = Ration(_LINES)
        self._has_looked = False

    def start(self, engine: Dataplane, settings: ProberSettings, fib: Fib) -> None:
        """Watch the hops of `engine`, which routes by `fib`."""
        self._engine = engine
        self._generation = fib.generation
        self._begin(settings)

    def _begin(self, settings: ProberSettings) -> None:
        self._settings = settings
        self._refusals.open(settings.source)

    def close(self) -> None:
        """Close what was opened. Harmless when repeated."""
        self._refusals.close()

    def install(self, fib: Fib, delta: RoutingDelta) -> None:
        """See FibSink. Called after the prober that knows the peers."""
        self._generation = fib.generation
        for hop_id in delta.hops_assigned:
            self._forget(hop_id)
            self._unanswered.restart(hop_id)
            self._echoes.restart(hop_id)
        for peer in (*delta.gone, *(old for old, _ in delta.moved)):
            if self._peer_of(peer.hop_id) is None:
                self._forget(peer.hop_id)

    def seen(self) -> int:
        """See FibSink."""
        return self._generation

    def reset(self, settings: ProberSettings) -> None:
        """The underlay's address or the MTU is another: begin anew."""
        self._begin(settings)
        self._refusals.clear()
        for hop_id in list(self._suspects):
            self._forget(hop_id)

    async def run(self) -> None:
        """Watch until cancelled."""
        clock = asyncio.get_running_loop().time
        try:
            while True:
                self._look(clock())
                await self._find_ways(clock())
                await asyncio.sleep(LOOK_S)
        finally:
            for cookies in (
                *(each.cookies for each in self._suspects.values()),
                *self._timed.values(),
            ):
                self._echoes.forget(cookies)

    def reaches(self, hop_ids: Collection[int] | None = None) -> Mapping[int, Reach]:
        """See Backend."""
        trips, suspects = self._echoes.round_trips, self._suspects
        found = {}
        for hop_id in list(trips.keys() | suspects.keys()) if hop_ids is None else hop_ids:
            if (suspect := suspects.get(hop_id)) is not None:
                found[hop_id] = self._reach(suspect)
            elif (trip := trips.get(hop_id)) is not None:
                found[hop_id] = Reach(standing=Standing.ANSWERS, since=trip.at, rtt_s=trip.rtt_s)
        return found

    def troubled(self) -> list[tuple[Peer, Reach]]:
        """Peers that are silent, or that the kernel refuses to send to; the longest first."""
        found = [(each.peer, self._reach(each)) for each in self._suspects.values()]
        found = [(peer, reach) for peer, reach in found if reach.standing.is_trouble]
        return sorted(found, key=lambda each: each[1].since)

    def finding(self) -> Finding:
        """Who does not answer. A silent peer makes no node unready: it is not this node's fault."""
        troubled = self.troubled()
        if troubled:
            named = [
                f"{peer.subnet} at {peer.endpoint.address} is {reach.standing.value}:"
                f" {reach.evidence(time.time())}"
                for peer, reach in troubled[:_NAMED]
            ]
            more = len(troubled) - len(named)
            peer, reach = troubled[0]
            return Finding(
                id="peers",
                verdict=Verdict.WARN,
                evidence="; ".join(named) + (f"; and {more} more" if more else ""),
                next_step=reach.next_step(str(peer.endpoint.address), peer.endpoint.port),
                facts={"silent": str(len(troubled))},
            )
        if not self._has_looked:
            return Finding(id="peers", verdict=Verdict.NOTE, evidence="not looked at yet")
        asked = "" if self._echoes.can_ask else "; nobody can be asked: no socket for answers"
        return Finding(
            id="peers",
            verdict=Verdict.OK,
            evidence=f"none that was sent packets lately is silent{asked}",
            facts={"silent": "0"},
        )

    def _look(self, now: float) -> None:
        """One look at the counters; ask whom there is to ask. now: the loop's time."""
        assert self._engine is not None
        activity = self._engine.activity()
        self._echoes.count_for(len(activity.packets_out))
        self._echoes.receive()
        unanswered = self._unanswered.look(activity, self._echoes.replies, now)
        self._has_looked = True
        self._refusals.hear()
        self._end_answered()
        self._find_suspects(unanswered, now)
        for suspect in list(self._suspects.values()):
            self._judge(suspect, activity, now)
        # First: Linux hosts answer one datagram a second, and the next one is an echo request.
        self._provoke(now)
        self._ask_suspects(now)
        self._ask_for_times(activity, now)

    def _end_answered(self) -> None:
        for hop_id, suspect in list(self._suspects.items()):
            if not self._unanswered.is_waiting(hop_id):
                self._end_silence(suspect)

    def _end_silence(self, suspect: _Suspect) -> None:
        if suspect.is_told and self._lines.take(time.monotonic()):
            _log.info("peer %s: answers again", _name(suspect.peer))
        self._forget(suspect.hop_id)

    def _find_suspects(self, unanswered: npt.NDArray[np.int64], now: float) -> None:
        table = self._unanswered
        old = unanswered[now - table.tried_at[unanswered] > FORGET_S]
        for hop_id in old.tolist():
            self._forget(hop_id)
        due = unanswered[now - table.since[unanswered] >= SUSPECT_S]
        for hop_id in due.tolist():
            if len(self._suspects) >= SUSPECTS_MAX:
                break
            since = float(table.since[hop_id])
            if not since or hop_id in self._suspects:
                continue
            if (peer := self._peer_of(hop_id)) is not None:
                began = time.time() - (now - since)
                self._suspects[hop_id] = _Suspect(hop_id, peer, since, began, next_at=now)

    def _judge(self, suspect: _Suspect, activity: HopActivity, now: float) -> None:
        """Count a request without an answer; see whether it was refused at all; tell once."""
        assert self._engine is not None
        if suspect.asked_at is not None and now - suspect.asked_at >= ANSWER_S:
            suspect.asked_at = None
            suspect.missed += 1
        hop_id = suspect.hop_id
        suspect.is_refused = self._unanswered.sent(hop_id) == 0
        if self._unanswered.is_refused(hop_id):
            suspect.last_errno = self._engine.hop_counters([hop_id])[hop_id].last_errno
        if suspect.is_refused and suspect.last_errno == "EMSGSIZE":
            self._forget(hop_id)  # too long for its path: nothing was sent, so nothing is missing
            return
        reach = self._reach(suspect)
        if reach.standing.is_trouble and not suspect.is_told and suspect.way is not None:
            suspect.is_told = True
            if self._lines.take(time.monotonic()):
                endpoint = suspect.peer.endpoint
                _log.warning(
                    "peer %s is %s: %s; %s%s",
                    _name(suspect.peer),
                    reach.standing.value,
                    reach.evidence(time.time()),
                    reach.next_step(str(endpoint.address), endpoint.port),
                    self._lines.withheld_words(),
                )

    def _provoke(self, now: float) -> None:
        """Have hosts on the way say why nothing arrives, if they will: of a few in each look."""
        unexplained = [
            each
            for each in self._suspects.values()
            if each.answered_at is None and (each.next_at <= now or self._is_to_explain(each, now))
        ]
        for suspect in sorted(unexplained, key=lambda each: each.provoked_at)[:PROVOKED]:
            if not self._echoes.may_ask(now):
                return
            suspect.provoked_at = now
            self._echoes.spend(1)
            if suspect.next_at <= now:
                self._refusals.ask(suspect.peer.endpoint)
            else:
                self._refusals.ask_within(LOOK_S, suspect.peer.endpoint)

    def _is_to_explain(self, suspect: _Suspect, now: float) -> bool:
        """Whether nobody said lately why nothing arrives, and somebody may."""
        if (error := self._unreachable(suspect)) is None:
            return now - suspect.since < PROVOKE_S
        is_idle = now - self._unanswered.tried_at[suspect.hop_id] > AGAIN_S
        return not is_idle and STALE_S < time.time() - error.last < SPOKE_S

    def _ask_suspects(self, now: float) -> None:
        if not self._echoes.can_ask:
            return
        due = [
            each
            for each in self._suspects.values()
            if each.next_at <= now and each.asked_at is None
        ]
        for suspect in sorted(due, key=lambda each: each.next_at):
            if not self._echoes.may_ask(now):
                return
            self._ask(suspect, now)

    def _ask(self, suspect: _Suspect, now: float) -> None:
        def answered(_: int) -> None:
            if suspect.is_refused or suspect.missed >= MISSES:
                self._end_silence(suspect)  # what was lost meanwhile is no traffic in one direction
                return
            suspect.answered_at = asyncio.get_running_loop().time()
            suspect.asked_at = None
            suspect.missed = 0
            suspect.next_at = suspect.answered_at + ANSWERED_AGAIN_S

        self._echoes.forget(suspect.cookies[:-MISSES])
        del suspect.cookies[:-MISSES]
        cookies = self._echoes.ask(suspect.peer, [MIN_LEN], answered)
        if cookies is None:
            return
        suspect.cookies += cookies
        suspect.asked += 1
        suspect.asked_at = now
        is_idle = now - self._unanswered.tried_at[suspect.hop_id] > AGAIN_S
        if suspect.missed < MISSES - 1:
            suspect.next_at = now + ANSWER_S
        else:
            suspect.next_at = now + (IDLE_AGAIN_S if is_idle else AGAIN_S)

    def _ask_for_times(self, activity: HopActivity, now: float) -> None:
        """Ask peers in use that answer for the round-trip time, now and then."""
        if not self._echoes.can_ask:
            return
        for hop_id in self._usage.due(activity, self._unanswered.since, now):
            if (peer := self._peer_of(hop_id)) is None:
                continue
            if not self._echoes.may_ask(now):
                return
            self._usage.asked(hop_id, now)
            self._echoes.forget(self._timed.pop(hop_id, ()))
            self._timed[hop_id] = self._echoes.ask(peer, [MIN_LEN], _nothing) or []

    async def _find_ways(self, now: float) -> None:
        """Ask the kernel for route and neighbour of those that do not answer."""
        assert self._settings is not None
        due = [
            each
            for each in self._suspects.values()
            if now - each.way_at >= WAY_AGAIN_S and self._reach(each).standing is not _ONE_WAY
        ]
        due = sorted(due, key=lambda each: each.way_at)[:WAYS]
        if not due:
            return
        try:
            found = await find_ways(
                self._netlink,
                Flow(source=self._settings.source, port=self._settings.port),
                {each.peer.endpoint.address for each in due},
            )
        except PlatformError as error:
            _log.debug("routes and neighbours are not looked up: %s", error)
            return
        for each in due:
            each.way, each.way_at = found[each.peer.endpoint.address], now

    def _reach(self, suspect: _Suspect) -> Reach:
        trip = self._echoes.round_trips.get(suspect.hop_id)
        return Reach(
            standing=self._standing(suspect),
            since=suspect.since_unix,
            sent=self._unanswered.sent(suspect.hop_id),
            asked=suspect.asked,
            missed=suspect.missed,
            rtt_s=None if trip is None else trip.rtt_s,
            way=suspect.way,
            unreachable=self._unreachable(suspect),
            last_errno=suspect.last_errno,
        )

    def _unreachable(self, suspect: _Suspect) -> Unreachable | None:
        error = self._refusals.of(suspect.peer.endpoint.address)
        return error if error is not None and error.last >= suspect.since_unix - LOOK_S else None

    def _standing(self, suspect: _Suspect) -> Standing:
        if suspect.is_refused:
            return Standing.REFUSED
        if suspect.missed >= MISSES:
            return Standing.SILENT
        if suspect.answered_at is not None:
            return Standing.ONE_WAY
        if self._echoes.can_ask:
            return Standing.WAITING
        if asyncio.get_running_loop().time() - suspect.since < ALONE_S:
            return Standing.WAITING
        way = suspect.way
        is_known = way is not None and (way.has_no_neighbour or bool(way.trouble))
        return Standing.SILENT if is_known else Standing.UNHEARD

    def _forget(self, hop_id: int) -> None:
        self._unanswered.forget(hop_id)
        suspect = self._suspects.pop(hop_id, None)
        if suspect is not None:
            self._echoes.forget(suspect.cookies)


_ONE_WAY: Final = Standing.ONE_WAY


def _nothing(_: int) -> None:
    """The round-trip time is kept where answers come in."""


def _name(peer: Peer) -> str:
    return f"{peer.subnet} at {peer.endpoint.address}"
