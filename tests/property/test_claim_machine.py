"""Random histories of one key, through the claim's state machine: no loop, no clock, no store.

A model of a store (one key, and one that overlaps it) executes the machine's actions and
delivers events late; others write, delete, challenge, and restore it from a backup. The
model marks for itself whose each value is, so nothing is judged by the code under test.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tundp.lease.claim import ClaimMachine, ClaimRules, Step
from tundp.lease.claim_io import (
    Ask,
    Create,
    Failing,
    GiveUp,
    GiveWay,
    Input,
    LeaseGoneElsewhere,
    LeaseState,
    Look,
    Looked,
    LookFailed,
    Observed,
    Offered,
    Renew,
    StateChanged,
    Tick,
    Unreadable,
    WaitUntil,
    Working,
    WriteConflicted,
    WriteFailed,
    Wrote,
)
from tundp.lease.codec import parse_key
from tundp.lease.identity import CHALLENGE, NODE, Identity
from tundp.lease.model import TTL_UNKNOWN, BadEntry, Lease, LeaseAttributes, Snapshot

KEY = parse_key("10.5.1.0-24")
OVERLAPPING = parse_key("10.5.1.128-25")
OUR_IPS = [IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")]
THEIR_IP = IPv4Address("192.0.2.9")
US = Identity("us", "host")
TTL_S = 1000
MARGIN_S = 300
RETRY_S = 60.0
IN_FLIGHT = {Step.RENEWING, Step.LOOKING, Step.OVERTAKEN, Step.REGAINING}
STATES_OF = {
    Step.IDLE: {LeaseState.HELD},
    Step.RENEW: {LeaseState.HELD},
    Step.RENEWING: {LeaseState.HELD},
    Step.ENDED: {LeaseState.LOST, LeaseState.CONFLICT},
}


@dataclass(frozen=True, slots=True)
class Value:
    """What is under the key."""

    writer: str
    """us, other, or hand: somebody without a node id, for whoever has that PublicIP."""
    revision: int
    attributes: LeaseAttributes | None
    """None: cannot be read."""
    expires_at: float | None = None


@dataclass
class World:
    """The store, the events not yet delivered, and the machine between them."""

    machine_type: type[ClaimMachine] = ClaimMachine
    exits: bool = False
    tells_ttl: bool = True
    """Whether events and snapshots say when a lease expires (v2 and file do, v3 does not)."""
    now: float = 5000.0
    value: Value | None = None
    backup: Value | None = None
    has_overlapping: bool = False
    revision: int = 10
    late: deque[tuple[Input, bool]] = field(default_factory=deque)
    """Events not yet delivered, and whether each is the echo of a write of ours."""
    action: Look | Create | Renew | Ask | None = None
    """In flight, not yet executed."""
    answer: Input | None = None
    """Executed, not yet delivered."""
    actions_left: int = 0
    """A stimulus (event, offer, wait that is over) costs at most a renewal, and a snapshot and a
    write after it; one stimulus that arrives meanwhile may be pending."""
    writes_left: int = 0
    """Likewise, but the echo of a write of ours is no reason for a write."""
    seen: Snapshot | None = None
    """The last snapshot that the machine was given."""
    is_failing: bool = False
    is_executing: bool = False
    told: LeaseState = LeaseState.LOST
    """The state according to the notices."""
    has_ended: bool = False

    def __post_init__(self) -> None:
        rules = ClaimRules(
            identity=US,
            lease_ttl_s=TTL_S,
            margin_s=MARGIN_S,
            exits_when_lost=self.exits,
            retry_s=RETRY_S,
        )
        self.offer = LeaseAttributes(public_ip=OUR_IPS[0])
        self.machine = self.machine_type(rules, offer=self.offer, key=KEY)
        self.put("us", ip=OUR_IPS[0])
        self.late.clear()
        self.machine.acquired(self.written_lease(), offer=self.offer, now=self.now)
        self.check()

    # The store

    def lease(self) -> Lease | None:
        value = self.value
        if value is None or value.attributes is None:
            return None
        ttl = None
        if value.expires_at is not None:
            ttl = value.expires_at - self.now if self.tells_ttl else TTL_UNKNOWN
        return Lease(key=KEY, attributes=value.attributes, revision=value.revision, lease_ttl_s=ttl)

    def is_ours(self, writer: str, ip: IPv4Address) -> bool:
        return writer == "us" or (writer == "hand" and ip == self.offer.public_ip)

    def put(self, writer: str, *, ip: IPv4Address, ttl: float | None = TTL_S) -> None:
        extra = {"us": {NODE: "us"}, "other": {NODE: "other"}, "hand": {}}[writer]
        self.write(writer, LeaseAttributes(public_ip=ip, extra=extra), ttl=ttl)

    def write(self, writer: str, attributes: LeaseAttributes | None, *, ttl: float | None) -> None:
        self.revision += 1
        expires_at = None if ttl is None else self.now + ttl
        self.value = Value(writer, self.revision, attributes, expires_at)
        lease = self.lease()
        event = Unreadable("rubbish") if lease is None else Observed(lease)
        self.late.append((event, self.is_executing))

    def delete(self) -> None:
        if self.value is not None:
            self.revision += 1
            self.value = None
            self.late.append((Observed(None), False))

    def expire(self) -> None:
        value = self.value
        if value is not None and value.expires_at is not None and value.expires_at <= self.now:
            self.delete()

    def snapshot(self) -> Snapshot:
        lease = self.lease()
        leases: tuple[Lease, ...] = () if lease is None else (lease,)
        if self.has_overlapping:
            other = LeaseAttributes(public_ip=THEIR_IP)
            leases += (Lease(key=OVERLAPPING, attributes=other, revision=1, lease_ttl_s=None),)
        is_bad = self.value is not None and lease is None
        return Snapshot(leases, self.revision, (BadEntry(str(KEY), "rubbish"),) if is_bad else ())

    def execute(self) -> None:
        """The action in flight takes effect."""
        action, self.action = self.action, None
        self.is_executing = True
        self.answer = self.result_of(action)
        self.is_executing = False

    def result_of(self, action: Look | Create | Renew | Ask | None) -> Input | None:
        match action:
            case Ask():
                raise AssertionError("asked after a lease that it has written before")
            case Look():
                return Looked(self.snapshot())
            case Create():
                if self.value is not None:
                    return WriteConflicted("exists")
            case Renew():
                before = self.value
                if before is None or before.revision != action.lease.revision:
                    return WriteConflicted("changed")
                assert before.writer != "other", "wrote over another node's lease"
                assert before.attributes is not None, "wrote over what nobody can read"
                assert before.attributes.public_ip != THEIR_IP, "wrote over a flannel's lease"
                assert (before.expires_at is None) == (action.lease_ttl_s is None)
            case None:
                return None
        self.write("us", action.attributes, ttl=action.lease_ttl_s)
        return Wrote(self.written_lease())

    def written_lease(self) -> Lease:
        """The answer to a write; every store tells the expiry here."""
        lease = self.lease()
        assert lease is not None
        assert self.value is not None
        if self.value.expires_at is None:
            return lease
        return replace(lease, lease_ttl_s=self.value.expires_at - self.now)

    # Between the store and the machine

    def tell(self, given: Input) -> None:
        """Give the machine an input, and hold it to what that input must lead to."""
        before = self.machine.state
        known = self.machine.lease
        is_writing = self.machine.step in (Step.RENEWING, Step.REGAINING)
        self.machine.apply(given, now=self.now)
        after = self.machine.state
        if self.machine.step is Step.ENDED:
            return
        if not is_writing:
            match given:
                case Observed(None):
                    assert after is LeaseState.LOST
                case Unreadable():
                    assert after is LeaseState.CONFLICT
                case Observed(Lease() as lease) if not self.is_ours(*told_by(lease)):
                    if lease.revision > known.revision or before is not LeaseState.HELD:
                        assert after is LeaseState.CONFLICT
                case Observed(Lease() as lease) if lease.revision > known.revision:
                    assert after is LeaseState.HELD
                    assert self.machine.lease == lease
        elif isinstance(given, Observed | Unreadable | LeaseGoneElsewhere | Offered):
            assert after is before, "an event during a write is held back"
        self.check()

    def deliver(self) -> None:
        """The next event arrives."""
        if self.late:
            event, is_echo = self.late.popleft()
            # Any event makes a pending retry due at once.
            self.stimulate(may_write=not is_echo or self.is_failing)
            self.tell(event)

    def stimulate(self, *, may_write: bool = True) -> None:
        self.actions_left = min(self.actions_left + 3, 6)
        if may_write:
            self.writes_left = min(self.writes_left + 2, 4)

    def reply(self, outcome: str) -> None:
        """The action in flight ends: answered, or without an answer (done or not)."""
        if self.action is None and self.answer is None:
            return
        is_look = self.machine.step in (Step.LOOKING, Step.OVERTAKEN)
        if outcome != "undone" and self.action is not None:
            self.execute()
        self.action = None
        answer, self.answer = self.answer, None
        if outcome != "answered":
            answer = LookFailed("lost", 0.5) if is_look else WriteFailed("lost", 0.5)
        assert answer is not None
        if isinstance(answer, Looked):
            self.seen = answer.snapshot
        self.tell(answer)

    @property
    def is_busy(self) -> bool:
        return self.action is not None or self.answer is not None

    def begin(self) -> WaitUntil | None:
        """Ask the machine what to do, if nothing is in flight; the wait, if it is one."""
        if self.is_busy or self.has_ended:
            return None
        action = self.machine.next(now=self.now)
        self.check()
        match action:
            case WaitUntil(at):
                assert at is None or at > self.now, "a wait that is over: a hot loop"
                if at is None:
                    assert self.machine.step is Step.IDLE
                    assert self.machine.expires_at is None
                if self.machine.state is LeaseState.HELD and self.machine.expires_at is not None:
                    assert self.machine.expires_at > self.now, "held, though expired"
                return action
            case GiveUp():
                assert self.exits
                assert self.machine.state is not LeaseState.HELD
                self.has_ended = True
            case GiveWay():
                raise AssertionError("no other process bears our node id here")
            case _:
                self.action = action
                self.actions_left -= 1
                self.writes_left -= not isinstance(action, Look)
                assert self.actions_left >= 0, "an action storm"
                assert self.writes_left >= 0, "writes that cause each other"
            # What it writes it does on what it has seen.
        if isinstance(action, Create):
            assert self.seen is not None
            assert not self.seen.leases and not self.seen.bad, "created though it was not free"
        return None

    def advance(self, seconds: float) -> None:
        """Time passes; the driver wakes up whenever the machine wants it to."""
        end = self.now + seconds
        while (wait := self.begin()) is not None and wait.at is not None and wait.at <= end:
            self.now = wait.at
            self.expire()
            self.stimulate()
        self.now = end
        self.expire()

    def check(self) -> None:
        """What holds at every moment."""
        machine = self.machine
        for notice in machine.notices:
            match notice:
                case StateChanged(_, before, after, _):
                    assert before is self.told
                    self.told = after
                case Failing():
                    self.is_failing = True
                case Working():
                    self.is_failing = False
        machine.notices.clear()
        assert machine.state is self.told, "a state change without a notice"
        assert (machine.state is LeaseState.HELD) == (not machine.why)
        assert machine.state in STATES_OF.get(machine.step, set(LeaseState))
        if machine.state is LeaseState.HELD:
            assert machine.lease.attributes.public_ip != THEIR_IP

    # The end of a history

    def drain(self) -> None:
        """Everything is answered and every event arrives, each as late as possible."""
        for _ in range(100):
            self.reply("answered")
            if self.begin() is not None or self.has_ended:
                if not self.late or self.has_ended:
                    return
                self.deliver()
        raise AssertionError("no end of actions and events")

    def settle(self) -> None:
        """Nobody else does anything any more. Only after failures time has to pass."""
        self.drain()
        for _ in range(3):
            if self.is_failing and not self.has_ended:
                assert self.machine.step is not Step.IDLE, "failures, and nothing to try again"
                self.advance(RETRY_S)
                self.drain()
        if self.has_ended:
            return
        assert not self.is_failing
        machine, value = self.machine, self.value
        is_ours = (
            value is not None
            and value.attributes is not None
            and self.is_ours(value.writer, value.attributes.public_ip)
        )
        if value is not None and is_ours:
            assert machine.state is LeaseState.HELD, (machine.state, machine.step)
            assert machine.lease.revision == value.revision, "held, but not as it is"
            assert value.attributes is not None
            assert value.attributes.extra.get(NODE) == "us"
            assert CHALLENGE not in value.attributes.extra, "a challenge without an answer"
            assert value.attributes.public_ip == self.offer.public_ip, "the offer was not written"
        else:
            assert machine.state is LeaseState.CONFLICT, (machine.state, machine.step, value)
            assert value is not None or self.has_overlapping


def told_by(lease: Lease) -> tuple[str, IPv4Address]:
    """Who wrote it, and the address it gives; read here independently."""
    writer = {"us": "us", "other": "other"}.get(lease.attributes.extra.get(NODE, ""), "hand")
    return writer, lease.attributes.public_ip


KINDS = [
    "begin", "begin", "begin", "answered", "answered", "answered", "lost", "undone", "execute",
    "deliver", "deliver", "deliver", "short", "short", "long", "foreign", "delete", "rubbish",
    "by hand", "challenge", "renewed elsewhere", "reservation", "offer", "overlap", "no overlap",
    "back up", "restore", "events", "events", "serve", "serve", "outage", "during a write",
]  # fmt: skip
Op = tuple[str, float]


def play(world: World, ops: Sequence[Op]) -> None:
    for kind, amount in ops:
        if world.has_ended:
            return
        step(world, kind, amount)


def step(world: World, kind: str, amount: float) -> None:
    match kind:
        case "begin":
            world.begin()
        case "answered" | "lost" | "undone":
            world.reply(kind)
        case "execute":
            if world.action is not None:
                world.execute()
        case "deliver":
            world.deliver()
        case "short":
            world.advance(amount)
        case "long":
            world.advance(amount * TTL_S * 1.2)
        case "foreign":
            world.put("other" if amount < 0.5 else "hand", ip=THEIR_IP)
        case "delete":
            world.delete()
        case "rubbish":
            world.write("other", None, ttl=None)
        case "by hand":
            world.put("hand", ip=world.offer.public_ip)
        case "renewed elsewhere":
            world.put("us", ip=world.offer.public_ip, ttl=TTL_S * amount + 1)
        case "reservation":
            world.put("us", ip=world.offer.public_ip, ttl=None)
        case "challenge":
            value = world.value
            if value is not None and value.attributes is not None:
                extra = {**value.attributes.extra, CHALLENGE: "beef"}
                world.write(value.writer, replace(value.attributes, extra=extra), ttl=TTL_S)
        case "offer":
            world.offer = LeaseAttributes(public_ip=OUR_IPS[amount < 0.5])
            world.stimulate()
            world.tell(Offered(world.offer))
        case "overlap":
            world.has_overlapping = True
        case "no overlap":
            if world.has_overlapping:
                world.has_overlapping = False
                world.late.append((LeaseGoneElsewhere(), False))
        case "back up":
            world.backup = world.value
        case "restore":
            # With its old, lower revision; later writes have higher ones than ever.
            world.value = world.backup
            world.expire()
            lease = world.lease()
            event: Input = Unreadable("old")
            if world.value is None or lease is not None:
                event = Observed(lease)
            world.late.append((event, False))
        case "events":
            while world.late:
                world.deliver()
        case "serve":
            for _ in range(4):
                world.begin()
                world.reply("answered")
        case "during a write":
            # Once it is done, and before its answer.
            for _ in range(3):
                world.begin()
                if isinstance(world.action, Create | Renew):
                    world.execute()
                    step(
                        world, ["foreign", "delete", "rubbish", "challenge"][int(amount * 3.99)], 0
                    )
                    step(world, "events", 0)
                world.reply("answered")
        case "outage":
            for _ in range(8):
                world.begin()
                world.reply("undone")


OPS = st.lists(st.tuples(st.sampled_from(KINDS), st.floats(0, 1)), max_size=60)


@settings(max_examples=1000, deadline=None)
@given(OPS, st.booleans())
@example([("delete", 0), ("deliver", 0), ("begin", 0), ("execute", 0), ("foreign", 0)], True)
def test_any_history_ends_as_the_store_has_it(ops: list[Op], tells_ttl: bool) -> None:
    world = World(tells_ttl=tells_ttl)
    play(world, ops)
    world.settle()


@settings(max_examples=300, deadline=None)
@given(OPS, st.booleans())
def test_a_claim_that_exits_does_so_only_without_its_lease(ops: list[Op], tells_ttl: bool) -> None:
    world = World(exits=True, tells_ttl=tells_ttl)
    play(world, ops)
    if not world.has_ended:
        world.settle()


# The histories find planted defects


def replacing(kind: type, transition: Any, *steps: Step) -> type[ClaimMachine]:
    """The machine with other transitions for this kind of input in these steps."""
    rows = {step: dict(row) for step, row in ClaimMachine.TRANSITIONS.items()}
    for step in steps:
        rows[step][kind] = transition
    return type("Planted", (ClaimMachine,), {"TRANSITIONS": rows})


def ignoring(kind: type, *steps: Step) -> type[ClaimMachine]:
    return replacing(kind, ClaimMachine._ignore, *steps)


class TakesAnyLease(ClaimMachine):
    def _judge(self, snapshot: Snapshot) -> tuple[Lease | None, str]:
        return next((lease for lease in snapshot.leases if lease.key == KEY), None), ""


class TakesOverlapped(ClaimMachine):
    def _judge(self, snapshot: Snapshot) -> tuple[Lease | None, str]:
        found, why = super()._judge(snapshot)
        return (found, "") if "addresses" in why else (found, why)


def observe_unguarded(machine: ClaimMachine, given: Observed, now: float) -> None:
    """As flannel: whatever the store shows of anybody's is written over at the renewal."""
    if given.lease is not None:
        machine.lease = replace(machine.lease, revision=given.lease.revision)


def look_and_write(machine: ClaimMachine, given: Looked, now: float) -> None:
    """A snapshot with our own revision causes a write, whose late event causes a snapshot."""
    machine.lease = replace(machine.lease, revision=-1)
    ClaimMachine._looked(machine, given, now)


def tick_without_expiry(machine: ClaimMachine, given: Tick, now: float) -> None:
    expires_at, machine.expires_at = machine.expires_at, None
    ClaimMachine._tick(machine, given, now)
    machine.expires_at = expires_at


class NeverWaits(ClaimMachine):
    def _failed(self, why: str, jitter: float, now: float) -> float:
        return now


class ForgetsTheOffer(ClaimMachine):
    def _written(self, lease: Lease, now: float) -> None:
        super()._written(lease, now)
        self.step = Step.IDLE


class SaysNothing(ClaimMachine):
    def _become(self, state: LeaseState, why: str) -> None:
        self.state, self.why = state, why


class TurnsReservationsIntoLeases(ClaimMachine):
    def _renewal_of(self, lease: Lease) -> Renew:
        return replace(super()._renewal_of(lease), lease_ttl_s=TTL_S)


PLANTED: dict[str, type[ClaimMachine]] = {
    "takes any lease": TakesAnyLease,
    "creates inside another's lease": TakesOverlapped,
    "renews over anybody": replacing(Observed, observe_unguarded, Step.IDLE),
    "writes what it holds": replacing(Looked, look_and_write, Step.LOOKING),
    "never waits": NeverWaits,
    "never expires": replacing(Tick, tick_without_expiry, Step.IDLE, Step.RENEW),
    "forgets an offer made during a write": ForgetsTheOffer,
    "changes state silently": SaysNothing,
    "gives reservations an expiry": TurnsReservationsIntoLeases,
    "misses events while idle": ignoring(Observed, Step.IDLE),
    "misses events during a renewal": ignoring(Observed, Step.RENEWING),
    "misses events during a creation": ignoring(Observed, Step.REGAINING),
    "misses events during a snapshot": ignoring(Observed, Step.LOOKING),
    "misses unreadable values": ignoring(Unreadable, Step.IDLE),
    "misses unreadable values during a write": ignoring(Unreadable, Step.REGAINING),
    "never looks at an old conflict": ignoring(LeaseGoneElsewhere, Step.LOOK),
    "misses offers": ignoring(Offered, Step.IDLE),
    "misses offers during a write": ignoring(Offered, Step.RENEWING),
    "gives up renewing after a conflict": replacing(
        WriteConflicted,
        lambda machine, given, now: machine._hold(machine.lease, now),
        Step.RENEWING,
    ),
    "takes a lost answer for success": replacing(
        WriteFailed, lambda machine, given, now: machine._written(machine.lease, now), Step.RENEWING
    ),
    "applies an event during a write at once": replacing(
        Observed, ClaimMachine._observe, Step.REGAINING
    ),
}


def find_failure(machine_type: type[ClaimMachine], histories: int) -> str:
    """How the first of these random histories fails; empty if none does."""
    for seed in range(histories):
        rng = random.Random(seed)
        ops = [(rng.choice(KINDS), rng.random()) for _ in range(rng.randrange(60))]
        try:
            world = World(machine_type=machine_type, tells_ttl=rng.random() < 0.5)
            play(world, ops)
            world.settle()
        except Exception as error:  # noqa: BLE001  (a defect may show itself in any way)
            return f"history {seed}: {error!r}"
    return ""


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_defect_is_found(name: str) -> None:
    assert find_failure(PLANTED[name], 1000), f"{name}: not found"


def test_nothing_is_found_without_a_defect() -> None:
    assert find_failure(ClaimMachine, 3000) == ""
