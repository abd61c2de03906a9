"""The claim on our own subnet as a pure state machine: inputs and `now` in, actions out.

State of the lease (LeaseState), shown to operators:

    HELD      the last revision we know of our key is ours, and has not expired
    LOST      deleted, expired, or not asked for yet: the same subnet is created again
    CONFLICT  another node holds our key, or nobody can tell who does: checked every RETRY_S

Step of the machine (Step), what it does about it:

    step        lease state  meaning                                  `next` gives
    IDLE        HELD         nothing is due before the renewal time   WaitUntil, then Renew
    RENEW       HELD         a renewal is due, or due at a retry      WaitUntil, Renew
    RENEWING    HELD         a renewal is in flight                   WaitUntil
    LOOK        any          a snapshot is due, or due at a retry     WaitUntil, Look
    LOOKING     any          a snapshot is being read                 WaitUntil
    OVERTAKEN   any          so it is, and an event arrived since     WaitUntil
    REGAIN      any          the snapshot allows a guarded write      Create or Renew, Ask
    REGAINING   any          that write or challenge is in flight     WaitUntil
    ENDED       any          lost, and so we exit; or a duplicate's   GiveUp, GiveWay

Every legal pair of step and input is an entry of ClaimMachine.TRANSITIONS, at the end of this
file; any other pair is an error of the caller. The rules behind the table:

  * A lease is written only where it is absent (Create) or ours (Renew), and always guarded
    by the revision that was judged, so another node's lease is never written over.
  * Events that arrive during a write are held back until its answer: an event may be the
    echo of the write itself. Only the latest one counts.
  * An event older than our last write is an echo, or the store was restored from a
    backup. Only a snapshot can tell which.
  * A snapshot that shows the very revision we hold causes no write: a write would make
    another event, and so on for ever where events are late.
  * An event makes a pending retry due at once; nothing else shortens a wait. So there are at
    most two actions (a snapshot and a write) for each event, and for each wait that ended.

  * Who finds its lease written by another process with our node id and PublicIP answers it once
    in that lease (TundpAnswer); who is answered so gives way: the one before us is alive.
  * A lease with our node id and another PublicIP than ours is challenged before this process
    writes it for the first time: from us before we moved, or from a live node we are a clone of.

flannel writes renewals without a guard (a node back from suspend takes its subnet from
whoever got it since) and exits with code 0 when its lease is gone.

Pure: no clock, no I/O, no randomness. Times are monotonic seconds of the caller's clock.
Why one room: table, rules and transitions are read and checked against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address
from typing import Any, ClassVar, Final

from tundp.lease.allocate import overlap
from tundp.lease.claim_io import (
    Action,
    Ask,
    Challenged,
    Create,
    Event,
    Failing,
    GiveUp,
    GiveWay,
    Input,
    LeaseGoneElsewhere,
    Look,
    Looked,
    LookFailed,
    Notice,
    Observed,
    Offered,
    Renew,
    Renewed,
    StateChanged,
    Tick,
    Unanswered,
    Unreadable,
    WaitUntil,
    Working,
    WriteConflicted,
    WriteFailed,
    WrittenByAnother,
    Wrote,
)
from tundp.lease.claim_io import LeaseState as LeaseState
from tundp.lease.identity import (
    Identity,
    Other,
    Ours,
    answer_in,
    challenge_in,
    holder_of,
    is_written_by,
    other_run,
    signed,
)
from tundp.lease.model import TTL_UNKNOWN, Lease, LeaseAttributes, LeaseKey, Snapshot
from tundp.lease.table import keys_of

RETRY_S: Final = 60.0
"""Longest wait between two tries, and the wait between two snapshots in CONFLICT."""
FIRST_RETRY_S: Final = 1.0
"""Wait after a first failure; it doubles up to RETRY_S."""
WARN_S: Final = 60.0
"""Least time between two WrittenByAnother notices."""
_NOW: Final = float("-inf")


class Step(Enum):
    """What the machine is doing; see the module's table."""

    IDLE = "idle"
    RENEW = "renew"
    RENEWING = "renewing"
    LOOK = "look"
    LOOKING = "looking"
    OVERTAKEN = "overtaken"
    REGAIN = "regain"
    REGAINING = "regaining"
    ENDED = "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimRules:
    """What the machine goes by, constant for its life."""

    identity: Identity | None
    """None: leases are told apart by PublicIP only, as flannel does."""
    lease_ttl_s: int
    margin_s: float
    """A lease is renewed this long before it expires, or at a third of its life if sooner."""
    exits_when_lost: bool = False
    retry_s: float = RETRY_S


Transition = Callable[["ClaimMachine", Any, float], None]


class ClaimMachine:
    """The claim on one key. Feed `apply`, then do what `next` gives; drain `notices`."""

    def __init__(
        self,
        rules: ClaimRules,
        *,
        offer: LeaseAttributes,
        key: LeaseKey,
        former_ips: Collection[IPv4Address] = (),
    ) -> None:
        """A claim on `key` that is LOST until `acquired`, or until the store shows more.

        offer: the attributes our lease shall have; identity and foreign fields are added.
        former_ips: addresses under which a lease with our node id is ours, until our first write.
        """
        self.state = LeaseState.LOST
        self.why = "the store has not been asked yet"
        """Why the lease is LOST or in CONFLICT; empty while HELD."""
        self.step = Step.LOOK
        self.lease = Lease(
            key=key,
            attributes=signed(offer, rules.identity, offer),
            revision=0,
            lease_ttl_s=TTL_UNKNOWN,
        )
        """The lease as last written or seen; kept, to be regained, when lost."""
        self.expires_at: float | None = None
        """When `lease` expires; None for a reservation, or while unknown."""
        self.notices: list[Notice] = []
        self._rules = rules
        self._offer = offer
        self._offer_written: LeaseAttributes | None = None
        """The offer our lease was last written with; None while that is not certain."""
        self._former_ips: set[IPv4Address] = set()
        self._cached_ips = set(former_ips)
        self._has_written = False
        """Whether a write of ours is known to have happened."""
        self._not_before = _NOW
        """Earliest time of what RENEW or LOOK call for."""
        self._retry_s = FIRST_RETRY_S
        self._warn_at = _NOW
        self._answer = ""
        """The process with our node id and PublicIP that our next write answers."""
        self._plan: Create | Renew | Ask | None = None
        """The write or the challenge that REGAIN calls for."""
        self._action: Action | None = None
        """What Tick has begun."""
        self._offer_in_flight = offer
        self._held_back: Event | None = None
        """The latest event that arrived during the write in flight."""

    def acquired(self, lease: Lease, *, offer: LeaseAttributes, now: float) -> None:
        """`lease` was just written by us, to say what `offer` says."""
        self._offer_in_flight = offer
        self._written(lease, now)

    def taken_over(
        self, lease: Lease, *, is_held: bool, expires_at: float | None, now: float
    ) -> None:
        """Go on for the process before us, whose run we have: what it wrote, we wrote.

        lease: as it last knew it. Nothing is written for the change of hands.
        """
        self._has_written = True
        self._cached_ips.clear()
        self.lease, self.expires_at = lease, expires_at
        if is_held:
            said = lease.attributes
            if said == signed(self._offer, self._rules.identity, said, answer=answer_in(lease)):
                self._offer_written = self._offer
            self._hold(lease, now)

    def apply(self, given: Input, *, now: float) -> None:
        """Make the transition for `given`; ValueError if it is not legal in this step."""
        transition = self.TRANSITIONS[self.step].get(type(given))
        if transition is None:
            raise ValueError(f"{given} is not legal in step {self.step.name}")
        transition(self, given, now)

    def next(self, *, now: float) -> Action:
        """What to do now. Anything but WaitUntil and GiveUp must be answered by an input."""
        self._action = None
        self.apply(Tick(), now=now)
        action = self._action
        return WaitUntil(self._next_time()) if action is None else action

    def holder_of(self, lease: Lease) -> Ours | Other:
        """Whose `lease` is."""
        return holder_of(
            lease,
            public_ip=self._offer.public_ip,
            identity=self._rules.identity,
            former_ips=self._former_ips | self._cached_ips,
        )

    @property
    def renews_at(self) -> float | None:
        """When the renewal is due; None for a reservation."""
        if self.expires_at is None:
            return None
        # A margin as long as the lease itself (short leases in tests) leaves a third.
        return self.expires_at - min(self._rules.margin_s, self._rules.lease_ttl_s * 2 / 3)

    # Transitions: Tick

    def _tick(self, _: Tick, now: float) -> None:
        """IDLE, RENEW, LOOK: notice the expiry, then begin what is due."""
        is_held = self.state is LeaseState.HELD
        if is_held and self.expires_at is not None and now >= self.expires_at:
            self._become(LeaseState.LOST, "it expired before it could be renewed")
            self.step = Step.LOOK
        if self.step is Step.IDLE and self.renews_at is not None and now >= self.renews_at:
            self.step = Step.RENEW
        if now < self._not_before:
            return
        if self.step is Step.RENEW:
            self._write(self._renewal_of(self.lease), Step.RENEWING)
        elif self.step is Step.LOOK:
            self.step = Step.LOOKING
            self._action = Look()

    def _tick_regain(self, _: Tick, now: float) -> None:
        self._write(self._plan, Step.REGAINING)

    def _tick_ended(self, _: Tick, now: float) -> None:
        if self._is_answered(self.lease):
            self._action = GiveWay(
                f"another node has our node id and our PublicIP {self._offer.public_ip}, and is"
                f" alive: it answers in lease {self.lease.key}. Is this machine a clone of it? Give"
                " one of them another --iface or --public-ip, or stop it"
            )
        else:
            self._action = GiveUp(f"lease {self.lease.key} is {self.state.value}")

    def _is_answered(self, lease: Lease) -> bool:
        """Whether the holder before us tells this very process that it is alive."""
        identity = self._rules.identity
        return identity is not None and answer_in(lease) == identity.run != ""

    # Transitions: events of the watch, and offers

    def _observe(self, given: Observed, now: float) -> None:
        lease = given.lease
        if lease is None:
            self._become(LeaseState.LOST, "it was deleted or has expired")
            self._require_look()
            return
        holder = self.holder_of(lease)
        is_older = lease.revision < self.lease.revision
        if isinstance(holder, Other):
            if not (is_older and self.state is LeaseState.HELD):
                self._become(LeaseState.CONFLICT, f"{holder.who} holds it now")
            self._require_look()
        elif is_older or self._must_ask(lease):
            self._require_look()
        elif lease.revision > self.lease.revision:
            self._observe_newer(lease, now)
        else:
            self._hasten()

    def _observe_newer(self, lease: Lease, now: float) -> None:
        """Our lease in a revision that we do not know."""
        if challenge_in(lease) is not None:
            self.notices.append(Challenged(lease.key))
        elif (
            self._offer_written is not None
            and now >= self._warn_at
            and not is_written_by(lease, self._rules.identity)
        ):
            # While a write of ours is unanswered, this may be it. One that bears our run is what
            # a store with two halves has left of it.
            self._warn_at = now + WARN_S
            self.notices.append(WrittenByAnother(lease.key, self._offer.public_ip))
        before, was_held = self.step, self.state is LeaseState.HELD
        self._note_run(lease)
        self._hold(lease, now)
        if self._is_answered(lease):
            self.step = Step.ENDED
            return
        if before in (Step.LOOKING, Step.OVERTAKEN):
            self.step = Step.OVERTAKEN
        elif was_held and before in (Step.RENEW, Step.LOOK):
            self.step = before
        elif before is Step.REGAIN:
            self.step = Step.LOOK
        if self.step is Step.IDLE:
            # What failed will not be tried again, so it is over.
            self._worked()

    def _note_run(self, lease: Lease) -> None:
        """Another process has taken our lease over: our next write tells it that we are alive."""
        if not answer_in(lease) and challenge_in(lease) is None:
            self._answer = other_run(lease, self._rules.identity)

    def _observe_unreadable(self, given: Unreadable, now: float) -> None:
        """Repeated by every update of the watch while it lasts: only the first one counts."""
        if self.state is not LeaseState.CONFLICT:
            self._become(LeaseState.CONFLICT, f"its value cannot be read ({given.why})")
            self._require_look()

    def _gone_elsewhere(self, _: LeaseGoneElsewhere, now: float) -> None:
        if self.state is LeaseState.CONFLICT:
            self._require_look()

    def _hold_back(self, given: Event, now: float) -> None:
        self._held_back = given

    def _offered(self, given: Offered, now: float) -> None:
        if given.attributes == self._offer:
            return
        self._note_offer(given, now)
        if self.step is Step.IDLE:
            self.step = Step.RENEW
        self._hasten()

    def _note_offer(self, given: Offered, now: float) -> None:
        """During a write: its answer is followed by a renewal if the offer has changed."""
        if given.attributes.public_ip != self._offer.public_ip:
            self._former_ips.add(self._offer.public_ip)
        self._offer = given.attributes

    def _ignore(self, given: Input, now: float) -> None:
        """No effect in this step."""

    # Transitions: answers

    def _looked(self, given: Looked, now: float) -> None:
        is_overtaken = self.step is Step.OVERTAKEN
        is_held = self.state is LeaseState.HELD
        found, why = self._judge(given.snapshot)
        if found is not None and self._is_answered(found):
            self.lease, self.step = found, Step.ENDED
            return
        if found is not None and self._must_ask(found):
            self.step, self._plan = Step.REGAIN, Ask(found)
            why = (
                f"it says PublicIP {found.attributes.public_ip}, not {self._offer.public_ip}:"
                " asking whether another node has our node id and is alive"
            )
            self._become(LeaseState.LOST, why)
            self.why = why
        elif self._rules.exits_when_lost and not is_held:
            if found is None:
                self.step = Step.ENDED
            else:
                self._worked()
                self._hold(found, now)
        elif found is not None and is_held and found.revision == self.lease.revision:
            self._worked()
            self._hold(found, now)
        elif not why:
            self.step = Step.REGAIN
            self._plan = self._creation() if found is None else self._renewal_of(found)
        elif is_overtaken and is_held:
            # What made us hold it is newer than this.
            self._look_at(_NOW)
        else:
            self._worked()
            self._become(LeaseState.CONFLICT, why)
            self._look_at(_NOW if is_overtaken else now + self._rules.retry_s)

    def _look_failed(self, given: LookFailed, now: float) -> None:
        is_overtaken = self.step is Step.OVERTAKEN
        retry_at = self._failed(given.why, given.jitter, now)
        self._look_at(_NOW if is_overtaken else retry_at)

    def _renewed(self, given: Wrote, now: float) -> None:
        self.notices.append(Renewed(given.lease.key))
        self._regained(given, now)

    def _regained(self, given: Wrote, now: float) -> None:
        lease = given.lease
        self._worked()
        self._written(lease, now)
        event, self._held_back = self._held_back, None
        if isinstance(event, Observed) and event.lease is not None:
            if event.lease.revision > lease.revision:
                self._observe(event, now)
        elif event is not None:
            # Before our write, or after it? Only a snapshot can tell.
            self._look_at(_NOW)

    def _unanswered(self, given: Unanswered, now: float) -> None:
        """Ours, or a dead node's: the write is guarded by the revision of the challenge."""
        self._held_back = None
        self.step, self._plan = Step.REGAIN, self._renewal_of(given.lease)

    def _renewal_conflicted(self, given: WriteConflicted, now: float) -> None:
        """Renewed by hand, gone, or another node's: only a snapshot can tell."""
        self._held_back = None
        self._look_at(_NOW)

    def _regain_conflicted(self, given: WriteConflicted, now: float) -> None:
        self._held_back = None
        why = f"lease {self.lease.key} changes faster than it can be regained: {given.why}"
        self._look_at(self._failed(why, given.jitter, now))

    def _renewal_failed(self, given: WriteFailed, now: float) -> None:
        """Whether or not it happened, its guard makes it safe to try again."""
        is_known = self._held_back is None
        self._regain_failed(given, now)
        if is_known:
            self.step = Step.RENEW

    def _regain_failed(self, given: WriteFailed, now: float) -> None:
        self._offer_written = None
        retry_at = self._failed(given.why, given.jitter, now)
        event, self._held_back = self._held_back, None
        if isinstance(event, Unreadable):
            self._observe_unreadable(event, now)
        elif event is not None and (
            event.lease is None or isinstance(self.holder_of(event.lease), Other)
        ):
            self._observe(event, now)
        # Any other event may be the echo of this very write. None is a reason to hurry: the
        # store has just failed.
        self._look_at(retry_at)

    # Parts of transitions

    def _must_ask(self, lease: Lease) -> bool:
        """Whether `lease`, ours by node id, may be of a live node that we are a clone of."""
        return (
            not self._has_written
            and lease.attributes.public_ip != self._offer.public_ip
            and isinstance(self.holder_of(lease), Ours)
            and not is_written_by(lease, self._rules.identity)
        )

    def _judge(self, snapshot: Snapshot) -> tuple[Lease | None, str]:
        """Our lease in `snapshot` if it is ours, and why it may not be written, if so."""
        key = self.lease.key
        if key in keys_of(snapshot.bad):
            why = next(entry.why for entry in snapshot.bad if entry.name == str(key))
            return None, f"its value cannot be read ({why})"
        found = next((lease for lease in snapshot.leases if lease.key == key), None)
        if found is not None:
            holder = self.holder_of(found)
            return (
                (None, f"{holder.who} holds it now") if isinstance(holder, Other) else (found, "")
            )
        others = [*(lease.key for lease in snapshot.leases), *keys_of(snapshot.bad)]
        overlapping = next((other for other in others if overlap(other, key)), None)
        if overlapping is not None:
            return None, f"lease {overlapping} has addresses of it now"
        return None, ""

    def _hold(self, lease: Lease, now: float) -> None:
        """`lease` is ours: HELD, and a renewal is due if it does not say what it must."""
        self.lease = lease
        is_expiry_unknown = False
        if lease.lease_ttl_s is None:
            self.expires_at = None
        elif lease.is_ttl_known:
            self.expires_at = now + lease.lease_ttl_s
        else:
            is_expiry_unknown = self.expires_at is None or self.expires_at <= now
            if is_expiry_unknown:
                self.expires_at = None
        self._become(LeaseState.HELD, "")
        holder = self.holder_of(lease)
        is_due = (
            is_expiry_unknown
            or self._offer_written != self._offer
            or challenge_in(lease) is not None
            or bool(self._answer)
            # Another node could take an unsigned lease for its own. One that bears our node id is
            # not written again, whoever wrote it: a clone would write it again, too, for ever.
            or not (isinstance(holder, Ours) and holder.is_signed)
        )
        self.step = Step.RENEW if is_due else Step.IDLE
        self._not_before = _NOW

    def _written(self, lease: Lease, now: float) -> None:
        """`lease` is what our own write has made."""
        self._has_written = True
        self._cached_ips.clear()
        self._offer_written = self._offer_in_flight
        self._answer = ""
        self._hold(lease, now)
        if not lease.is_ttl_known:
            self.expires_at = now + self._rules.lease_ttl_s
        # Whatever the store made of it, it is not written again for that.
        self.step = Step.IDLE if self._offer_written == self._offer else Step.RENEW

    def _become(self, state: LeaseState, why: str) -> None:
        before, self.state = self.state, state
        if state is not before or state is LeaseState.CONFLICT:
            self.why = why
        if state is not before:
            self.notices.append(StateChanged(self.lease.key, before, state, why))

    def _require_look(self) -> None:
        if self.step in (Step.IDLE, Step.RENEW, Step.REGAIN):
            self.step = Step.LOOK
        self._hasten()

    def _hasten(self) -> None:
        """An event: what is due later is due now; a snapshot being read may be too old."""
        self._not_before = _NOW
        if self.step is Step.LOOKING:
            self.step = Step.OVERTAKEN
        elif self.step is Step.REGAIN:
            self.step = Step.LOOK

    def _look_at(self, at: float) -> None:
        self.step = Step.LOOK
        self._not_before = at

    def _failed(self, why: str, jitter: float, now: float) -> float:
        """Note a failure; when to try again."""
        self.notices.append(Failing(why))
        wait_s = min(self._retry_s, self._rules.retry_s)
        self._retry_s = min(wait_s * 2, self._rules.retry_s)
        return now + wait_s * (1 - jitter / 2)

    def _worked(self) -> None:
        self._retry_s = FIRST_RETRY_S
        self.notices.append(Working())

    def _renewal_of(self, lease: Lease) -> Renew:
        attributes = signed(
            self._offer, self._rules.identity, lease.attributes, answer=self._answer
        )
        ttl_s = None if lease.is_reservation else self._rules.lease_ttl_s
        return Renew(lease, attributes, ttl_s)

    def _creation(self) -> Create:
        attributes = signed(self._offer, self._rules.identity, self.lease.attributes)
        return Create(self.lease.key, attributes, self._rules.lease_ttl_s)

    def _write(self, action: Action | None, step: Step) -> None:
        self._action = action
        self._offer_in_flight = self._offer
        self.step = step

    def _next_time(self) -> float | None:
        """When something is due though no input arrives."""
        if self.step is Step.IDLE:
            return self.renews_at
        if self.step not in (Step.RENEW, Step.LOOK):
            return None
        if self.state is LeaseState.HELD and self.expires_at is not None:
            return min(self._not_before, self.expires_at)
        return self._not_before

    # The table

    _EVENTS: ClassVar[Mapping[type, Transition]] = {
        Observed: _observe,
        Unreadable: _observe_unreadable,
        LeaseGoneElsewhere: _gone_elsewhere,
        Offered: _offered,
    }
    _EVENTS_DURING_A_WRITE: ClassVar[Mapping[type, Transition]] = {
        Observed: _hold_back,
        Unreadable: _hold_back,
        LeaseGoneElsewhere: _ignore,
        Offered: _note_offer,
    }
    _EVENTS_AFTER_THE_END: ClassVar[Mapping[type, Transition]] = {
        Observed: _ignore,
        Unreadable: _ignore,
        LeaseGoneElsewhere: _ignore,
        Offered: _ignore,
    }
    TRANSITIONS: ClassVar[Mapping[Step, Mapping[type, Transition]]] = {
        Step.IDLE: {Tick: _tick, **_EVENTS},
        Step.RENEW: {Tick: _tick, **_EVENTS},
        Step.RENEWING: {
            Tick: _ignore,
            **_EVENTS_DURING_A_WRITE,
            Wrote: _renewed,
            WriteConflicted: _renewal_conflicted,
            WriteFailed: _renewal_failed,
        },
        Step.LOOK: {Tick: _tick, **_EVENTS},
        Step.LOOKING: {Tick: _ignore, **_EVENTS, Looked: _looked, LookFailed: _look_failed},
        Step.OVERTAKEN: {Tick: _ignore, **_EVENTS, Looked: _looked, LookFailed: _look_failed},
        Step.REGAIN: {Tick: _tick_regain, **_EVENTS},
        Step.REGAINING: {
            Tick: _ignore,
            **_EVENTS_DURING_A_WRITE,
            Wrote: _regained,
            Unanswered: _unanswered,
            WriteConflicted: _regain_conflicted,
            WriteFailed: _regain_failed,
        },
        Step.ENDED: {
            Tick: _tick_ended,
            **_EVENTS_AFTER_THE_END,
            Looked: _ignore,
            LookFailed: _ignore,
        },
    }
