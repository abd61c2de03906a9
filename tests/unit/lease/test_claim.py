"""The claim's state machine: every pair of step and input, and what a table cannot show."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import IPv4Address

import pytest

from tundp.lease.claim import ClaimMachine, ClaimRules, Step
from tundp.lease.claim_io import (
    Ask,
    Create,
    Event,
    GiveUp,
    Input,
    LeaseGoneElsewhere,
    LeaseState,
    Look,
    Looked,
    LookFailed,
    Observed,
    Offered,
    Renew,
    Tick,
    Unanswered,
    Unreadable,
    WaitUntil,
    WriteConflicted,
    WriteFailed,
    Wrote,
)
from tundp.lease.codec import parse_key
from tundp.lease.identity import CHALLENGE, HOST, NODE, RUN, Identity
from tundp.lease.model import TTL_UNKNOWN, BadEntry, Lease, LeaseAttributes, LeaseKey, Snapshot

KEY = parse_key("10.5.1.0-24")
INSIDE = parse_key("10.5.1.128-25")
ELSEWHERE = parse_key("10.5.2.0-24")
OUR_IP = IPv4Address("192.0.2.1")
NEW_IP = IPv4Address("192.0.2.2")
THEIR_IP = IPv4Address("192.0.2.9")
US = Identity("us", "host")
SIGNED = {NODE: "us", HOST: "host"}
OFFER = LeaseAttributes(public_ip=OUR_IP)
NOW = 1000.0
RULES = ClaimRules(identity=US, lease_ttl_s=1000, margin_s=300)


def lease(
    revision: int,
    *,
    ip: IPv4Address = OUR_IP,
    extra: dict[str, str] | None = None,
    ttl: float | None = 1000.0,
    key: LeaseKey = KEY,
) -> Lease:
    extra = SIGNED if extra is None else extra
    attributes = LeaseAttributes(public_ip=ip, extra=extra)
    return Lease(key=key, attributes=attributes, revision=revision, lease_ttl_s=ttl)


OTHER = lease(12, ip=THEIR_IP, extra={NODE: "them"})
OVERLAPPING = lease(12, ip=THEIR_IP, extra={}, key=INSIDE)


def seen(*leases: Lease, bad: Sequence[str] = ()) -> Looked:
    return Looked(Snapshot(leases, 20, tuple(BadEntry(name, "rubbish") for name in bad)))


INPUTS: dict[str, tuple[Input, float]] = {
    # Time: while nothing is due; when the renewal is due; when the lease has expired.
    "tick": (Tick(), 0),
    "later": (Tick(), 750),
    "expired": (Tick(), 1100),
    # The watch.
    "gone": (Observed(None), 0),
    "newer": (Observed(lease(12)), 0),
    "challenged": (Observed(lease(12, extra=SIGNED | {CHALLENGE: "beef"})), 0),
    "unsigned": (Observed(lease(12, extra={})), 0),
    "same": (Observed(lease(11)), 0),
    "older": (Observed(lease(10)), 0),
    "other": (Observed(OTHER), 0),
    "older other": (Observed(replace(OTHER, revision=9)), 0),
    "unreadable": (Unreadable("rubbish"), 0),
    "elsewhere": (LeaseGoneElsewhere(), 0),
    # The daemon.
    "offered": (Offered(LeaseAttributes(public_ip=NEW_IP)), 0),
    "offered again": (Offered(OFFER), 0),
    # Answers to writes.
    "wrote": (Wrote(lease(13)), 0),
    "conflicted": (WriteConflicted("changed"), 0),
    "failed": (WriteFailed("no answer"), 0),
    "unanswered": (Unanswered(lease(13)), 0),
    # Answers to snapshots.
    "saw same": (seen(lease(11), lease(5, key=ELSEWHERE)), 0),
    "saw ours": (seen(lease(12)), 0),
    "saw other": (seen(OTHER), 0),
    "saw none": (seen(lease(5, key=ELSEWHERE)), 0),
    "saw overlap": (seen(OVERLAPPING), 0),
    "saw rubbish": (seen(bad=[str(KEY)]), 0),
    "saw nothing": (LookFailed("no answer"), 0),
}


def idle(rules: ClaimRules = RULES, revision: int = 11) -> ClaimMachine:
    """Our lease, just written."""
    machine = ClaimMachine(rules, offer=OFFER, key=KEY)
    machine.acquired(lease(revision), offer=OFFER, now=NOW)
    return machine


def after(*inputs: str | Input, rules: ClaimRules = RULES, revision: int = 11) -> ClaimMachine:
    """The machine after these inputs; "next" begins what is due."""
    machine = idle(rules, revision)
    for each in inputs:
        if each == "next":
            assert not isinstance(machine.next(now=NOW), WaitUntil)
        else:
            machine.apply(INPUTS[each][0] if isinstance(each, str) else each, now=NOW)
    machine.notices.clear()
    return machine


def asking() -> ClaimMachine:
    """Started from the lease cache, at another address than the lease says, and asking whose."""
    machine = ClaimMachine(RULES, offer=OFFER, key=KEY, former_ips={NEW_IP})
    for _ in range(2):
        machine.next(now=NOW)
        if machine.step is Step.LOOKING:
            machine.apply(seen(lease(12, ip=NEW_IP)), now=NOW)
    machine.notices.clear()
    return machine


EXITS = replace(RULES, exits_when_lost=True)
POSITIONS = {
    "held, idle": after(),
    "held, renew": after(Observed(lease(11, extra={})), "next", "failed", revision=10),
    "held, renewing": after(Observed(lease(11, extra={})), "next", revision=10),
    "held, look": after("older", "next", "saw nothing"),
    "held, looking": after("older", "next"),
    "held, overtaken": after("older", "next", "same"),
    "held, regain": after("older", "next", "saw ours"),
    "held, regaining": after("older", "next", "saw ours", "next"),
    "lost, look": after("gone", "next", "saw nothing"),
    "lost, looking": after("gone", "next"),
    "lost, overtaken": after("gone", "next", "same"),
    "lost, regain": after("gone", "next", "saw none"),
    "lost, regaining": after("gone", "next", "saw none", "next"),
    "conflict, look": after("other", "next", "saw other"),
    "conflict, looking": after("other", "next"),
    "conflict, overtaken": after("other", "next", "elsewhere"),
    "conflict, regain": after("other", "next", "saw ours"),
    "conflict, regaining": after("other", "next", "saw ours", "next"),
    "lost, exits": after("gone", "next", rules=EXITS),
    "conflict, exits": after("other", "next", rules=EXITS),
    "lost, ended": after("gone", "next", "saw none", rules=EXITS),
    "lost, asking": asking(),
}


def outcome(where: str, what: str) -> str:
    """State and step after one input, and the wait if what the step calls for is not due yet."""
    machine = copy.deepcopy(POSITIONS[where])
    given, later_s = INPUTS[what]
    try:
        machine.apply(given, now=NOW + later_s)
    except ValueError:
        return "-"
    text = f"{machine.state.value} {machine.step.value}"
    if machine.step in (Step.RENEW, Step.LOOK):
        action = copy.deepcopy(machine).next(now=NOW + later_s)
        if isinstance(action, WaitUntil):
            assert action.at is not None
            text += f" +{action.at - NOW - later_s:.0f}"
    return text


WATCHED = "gone, newer, challenged, unsigned, same, older, other, older other, unreadable"
ANY = f"tick, later, expired, {WATCHED}, elsewhere, offered, offered again"
EXPECTED = {
    # Position: outcome: the inputs that lead there. Any input not named is illegal.
    "held, idle": {
        "held idle": "tick, newer, same, elsewhere, offered again",
        "held renewing": "later",
        "lost looking": "expired",
        "lost look": "gone",
        "held renew": "challenged, unsigned, offered",
        "held look": "older, older other",
        "conflict look": "other, unreadable",
    },
    "held, renew": {
        "held renew +1": "tick, elsewhere, offered again",
        "held renewing": "later",
        "lost looking": "expired",
        "lost look": "gone",
        "held renew": "newer, challenged, unsigned, same, offered",
        "held look": "older, older other",
        "conflict look": "other, unreadable",
    },
    "held, renewing": {
        "held renewing": ANY,
        "held idle": "wrote",
        "held look": "conflicted",
        "held renew +1": "failed",
    },
    "held, look": {
        "held look +1": "tick, elsewhere, offered again",
        "held looking": "later",
        "lost looking": "expired",
        "lost look": "gone",
        "held look": "newer, challenged, unsigned, same, older, older other, offered",
        "conflict look": "other, unreadable",
    },
    "held, looking": {
        "held looking": "tick, later, expired, elsewhere, offered again",
        "lost overtaken": "gone",
        "held overtaken": "newer, challenged, unsigned, same, older, older other, offered",
        "conflict overtaken": "other, unreadable",
        "held idle": "saw same",
        "held regain": "saw ours, saw none",
        "conflict look +60": "saw other, saw overlap, saw rubbish",
        "held look +1": "saw nothing",
    },
    "held, overtaken": {
        "held overtaken": (
            "tick, later, expired, newer, challenged, unsigned, same, older, "
            "older other, elsewhere, offered, offered again"
        ),
        "lost overtaken": "gone",
        "conflict overtaken": "other, unreadable",
        "held idle": "saw same",
        "held regain": "saw ours, saw none",
        "held look": "saw other, saw overlap, saw rubbish, saw nothing",
    },
    "held, regain": {
        "held regaining": "tick, later, expired",
        "lost look": "gone",
        "held look": "newer, challenged, unsigned, same, older, older other, offered",
        "conflict look": "other, unreadable",
        "held regain": "elsewhere, offered again",
    },
    "held, regaining": {
        "held regaining": ANY,
        "held regain": "unanswered",
        "held idle": "wrote",
        "held look +1": "conflicted, failed",
    },
    "lost, look": {
        "lost look +1": "tick, elsewhere, offered again",
        "lost looking": "later, expired",
        "lost look": "gone, same, older, offered",
        "held idle": "newer",
        "held renew": "challenged, unsigned",
        "conflict look": "other, older other, unreadable",
    },
    "lost, looking": {
        "lost looking": "tick, later, expired, elsewhere, offered again",
        "lost overtaken": "gone, same, older, offered",
        "held overtaken": "newer, challenged, unsigned",
        "conflict overtaken": "other, older other, unreadable",
        "lost regain": "saw same, saw ours, saw none",
        "conflict look +60": "saw other, saw overlap, saw rubbish",
        "lost look +1": "saw nothing",
    },
    "lost, overtaken": {
        "lost overtaken": (
            "tick, later, expired, gone, same, older, elsewhere, offered, offered again"
        ),
        "held overtaken": "newer, challenged, unsigned",
        "conflict overtaken": "other, older other, unreadable",
        "lost regain": "saw same, saw ours, saw none",
        "conflict look": "saw other, saw overlap, saw rubbish",
        "lost look": "saw nothing",
    },
    "lost, regain": {
        "lost regaining": "tick, later, expired",
        "lost look": "gone, same, older, offered",
        "held look": "newer, challenged, unsigned",
        "conflict look": "other, older other, unreadable",
        "lost regain": "elsewhere, offered again",
    },
    "lost, regaining": {
        "lost regaining": ANY,
        "lost regain": "unanswered",
        "held idle": "wrote",
        "lost look +1": "conflicted, failed",
    },
    "conflict, look": {
        "conflict look +60": "tick, unreadable, offered again",
        "conflict looking": "later, expired",
        "lost look": "gone",
        "held idle": "newer",
        "held renew": "challenged, unsigned",
        "conflict look": "same, older, other, older other, elsewhere, offered",
    },
    "conflict, looking": {
        "conflict looking": "tick, later, expired, unreadable, offered again",
        "lost overtaken": "gone",
        "held overtaken": "newer, challenged, unsigned",
        "conflict overtaken": "same, older, other, older other, elsewhere, offered",
        "conflict regain": "saw same, saw ours, saw none",
        "conflict look +60": "saw other, saw overlap, saw rubbish",
        "conflict look +1": "saw nothing",
    },
    "conflict, overtaken": {
        "conflict overtaken": (
            "tick, later, expired, same, older, other, older other, unreadable, "
            "elsewhere, offered, offered again"
        ),
        "lost overtaken": "gone",
        "held overtaken": "newer, challenged, unsigned",
        "conflict regain": "saw same, saw ours, saw none",
        "conflict look": "saw other, saw overlap, saw rubbish, saw nothing",
    },
    "conflict, regain": {
        "conflict regaining": "tick, later, expired",
        "lost look": "gone",
        "held look": "newer, challenged, unsigned",
        "conflict look": "same, older, other, older other, elsewhere, offered",
        "conflict regain": "unreadable, offered again",
    },
    "conflict, regaining": {
        "conflict regaining": ANY,
        "conflict regain": "unanswered",
        "held idle": "wrote",
        "conflict look +1": "conflicted, failed",
    },
    "lost, exits": {
        "lost looking": "tick, later, expired, elsewhere, offered again",
        "lost overtaken": "gone, same, older, offered",
        "held overtaken": "newer, challenged, unsigned",
        "conflict overtaken": "other, older other, unreadable",
        "held idle": "saw same, saw ours",
        "lost ended": "saw other, saw none, saw overlap, saw rubbish",
        "lost look +1": "saw nothing",
    },
    "conflict, exits": {
        "conflict looking": "tick, later, expired, unreadable, offered again",
        "lost overtaken": "gone",
        "held overtaken": "newer, challenged, unsigned",
        "conflict overtaken": "same, older, other, older other, elsewhere, offered",
        "held idle": "saw same, saw ours",
        "conflict ended": "saw other, saw none, saw overlap, saw rubbish",
        "conflict look +1": "saw nothing",
    },
    "lost, asking": {
        "lost regaining": ANY,
        "lost regain": "unanswered",
        "held idle": "wrote",
        "lost look +1": "conflicted, failed",
    },
    "lost, ended": {
        "lost ended": f"{ANY}, saw same, saw ours, saw other, saw none, saw overlap, saw rubbish,"
        " saw nothing",
    },
}


@pytest.mark.parametrize("where", POSITIONS)
def test_every_pair_of_step_and_input(where: str) -> None:
    expected = {
        what: text for text, inputs in EXPECTED[where].items() for what in inputs.split(", ")
    }
    found = {what: outcome(where, what) for what in INPUTS}
    assert found == {what: expected.get(what, "-") for what in INPUTS}


def test_the_table_has_a_position_in_every_step_and_an_input_of_every_kind() -> None:
    assert {machine.step for machine in POSITIONS.values()} == set(Step)
    assert ClaimMachine.TRANSITIONS.keys() == set(Step)
    kinds = {kind for row in ClaimMachine.TRANSITIONS.values() for kind in row}
    assert {type(given) for given, _ in INPUTS.values()} == kinds


def test_an_illegal_input_is_an_error_that_changes_nothing() -> None:
    machine = idle()
    with pytest.raises(ValueError, match=r"Wrote.*not legal in step IDLE"):
        machine.apply(Wrote(lease(12)), now=NOW)
    assert machine.lease.revision == 11


# Times


@pytest.mark.parametrize(
    ("ttl_s", "margin_s", "renewal_s"),
    [(86400, 3600, 82800), (1000, 300, 700), (90, 3600, 30), (90, 60, 30), (90, 59, 31)],
)
def test_renewal_time(ttl_s: int, margin_s: int, renewal_s: int) -> None:
    """`margin_s` before the expiry, but not before a third of the lease's life."""
    machine = ClaimMachine(
        replace(RULES, lease_ttl_s=ttl_s, margin_s=margin_s), offer=OFFER, key=KEY
    )
    machine.acquired(lease(11, ttl=ttl_s), offer=OFFER, now=NOW)
    assert machine.next(now=NOW) == WaitUntil(NOW + renewal_s)
    assert machine.next(now=NOW + renewal_s - 0.1) == WaitUntil(NOW + renewal_s)
    assert isinstance(machine.next(now=NOW + renewal_s), Renew)


def test_a_reservation_is_never_renewed_and_stays_one() -> None:
    machine = after(Observed(lease(12, ttl=None)))
    assert machine.expires_at is None
    assert machine.next(now=NOW + 10**9) == WaitUntil(None)
    machine.apply(Offered(LeaseAttributes(public_ip=NEW_IP)), now=NOW)
    action = machine.next(now=NOW)
    assert isinstance(action, Renew)
    assert action.lease_ttl_s is None


def test_a_lease_of_unknown_expiry_is_renewed_only_if_none_is_known() -> None:
    machine = after(Observed(lease(12, ttl=TTL_UNKNOWN)))
    assert (machine.step, machine.expires_at) == (Step.IDLE, NOW + 1000)
    machine = after(Observed(lease(12, ttl=None)), Observed(lease(13, ttl=TTL_UNKNOWN)))
    assert machine.step is Step.RENEW


def test_an_answer_without_expiry_is_not_written_again() -> None:
    machine = after("unsigned", "next", Wrote(lease(13, ttl=TTL_UNKNOWN)))
    assert (machine.step, machine.expires_at) == (Step.IDLE, NOW + 1000)


def test_retries_wait_longer_and_longer_until_one_works() -> None:
    machine = after("gone")
    now, waits = NOW, []
    for _ in range(8):
        assert machine.next(now=now) == Look()
        machine.apply(LookFailed("no answer"), now=now)
        wait = machine.next(now=now)
        assert isinstance(wait, WaitUntil)
        assert wait.at is not None
        waits.append(wait.at - now)
        now = wait.at
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    assert machine.next(now=now) == Look()
    machine.apply(seen(OTHER), now=now)
    machine.apply(Observed(None), now=now)
    assert machine.next(now=now) == Look()
    machine.apply(LookFailed("no answer", jitter=1.0), now=now)
    assert machine.next(now=now) == WaitUntil(now + 0.5), "from the start, and half of it"


def test_a_renewal_that_fails_until_the_expiry_is_a_lost_lease() -> None:
    """Noticed at the expiry itself, though the next try is due only later."""
    machine = idle()
    now = NOW + 700
    for _ in range(50):
        action = machine.next(now=now)
        if machine.state is LeaseState.LOST:
            break
        if isinstance(action, WaitUntil):
            assert action.at is not None
            now = action.at
        else:
            machine.apply(WriteFailed("no answer"), now=now)
    assert now == NOW + 1000
    assert machine.why == "it expired before it could be renewed"


# What is written


def test_a_write_keeps_what_others_keep_in_the_value() -> None:
    extra = {"Rack": "b7", CHALLENGE: "beef", NODE: "us"}
    action = after(Observed(lease(12, extra=extra))).next(now=NOW)
    assert isinstance(action, Renew)
    assert action.lease.revision == 12
    assert action.attributes.extra == {"Rack": "b7", **SIGNED}
    machine = after(Observed(lease(12, extra=extra)), "gone", "next", "saw none")
    action = machine.next(now=NOW)
    assert isinstance(action, Create)
    assert action.attributes.extra == {"Rack": "b7", **SIGNED}


def test_a_regaining_write_is_guarded_by_the_snapshot_not_by_what_we_held() -> None:
    action = after("gone", "next", "saw ours").next(now=NOW)
    assert isinstance(action, Renew)
    assert action.lease.revision == 12


def test_an_offer_made_during_a_write_is_written_after_it() -> None:
    machine = after("unsigned", "next", "offered", "wrote")
    action = machine.next(now=NOW)
    assert isinstance(action, Renew)
    assert action.attributes.public_ip == NEW_IP
    machine.apply(Wrote(lease(14, ip=NEW_IP)), now=NOW)
    assert machine.step is Step.IDLE


def test_an_offer_is_not_forgotten_while_the_lease_is_lost() -> None:
    """Our lease shows up again by itself, and says the former address."""
    machine = after("gone", "next", "saw nothing", "offered", "newer")
    assert (machine.state, machine.step) == (LeaseState.HELD, Step.RENEW)


def test_a_lease_resumed_from_the_cache_is_written_once_whoever_shows_it_first() -> None:
    machine = ClaimMachine(RULES, offer=OFFER, key=KEY, former_ips={NEW_IP})
    assert (machine.state, machine.lease.revision) == (LeaseState.LOST, 0)
    machine.apply(Observed(lease(12, ip=NEW_IP)), now=NOW)
    assert (machine.state, machine.next(now=NOW)) == (LeaseState.LOST, Look())
    found = lease(12, ip=NEW_IP)
    machine.apply(seen(found), now=NOW)
    assert machine.next(now=NOW) == Ask(found)
    assert (machine.state, machine.why) == (
        LeaseState.LOST,
        "it says PublicIP 192.0.2.2, not 192.0.2.1: asking whether another node has our node id"
        " and is alive",
    )
    machine.apply(Unanswered(replace(found, revision=13)), now=NOW)
    action = machine.next(now=NOW)
    assert isinstance(action, Renew)
    assert (action.lease.revision, action.attributes.public_ip) == (13, OUR_IP)
    machine.apply(Wrote(lease(14)), now=NOW)
    assert machine.state is LeaseState.HELD
    machine.apply(Observed(lease(15, ip=NEW_IP)), now=NOW)
    assert machine.why == "192.0.2.2 holds it now", "written since by the other one"


def test_a_cached_lease_that_this_process_wrote_is_not_asked_after() -> None:
    """The first write had no answer, and the address has changed since."""
    rules = replace(RULES, identity=Identity("us", "host", run="r2"))
    ours = {**SIGNED, RUN: "r2"}
    for extra, is_asked in ((ours, False), ({**SIGNED, RUN: "r1"}, True), (SIGNED, True)):
        machine = ClaimMachine(rules, offer=OFFER, key=KEY, former_ips={NEW_IP})
        machine.next(now=NOW)
        machine.apply(seen(), now=NOW)
        assert isinstance(machine.next(now=NOW), Create)
        machine.apply(WriteFailed("no answer"), now=NOW)
        machine.apply(Offered(LeaseAttributes(public_ip=THEIR_IP)), now=NOW)
        machine.next(now=NOW)
        machine.apply(seen(lease(12, extra=extra)), now=NOW)
        assert isinstance(machine.next(now=NOW), Ask if is_asked else Renew), extra


def test_a_lease_at_a_former_address_is_ours_if_it_bears_our_id() -> None:
    moved = after("offered", "next", Wrote(lease(13, ip=NEW_IP)))
    signed_before = copy.deepcopy(moved)
    signed_before.apply(Observed(lease(14)), now=NOW)
    assert signed_before.state is LeaseState.HELD
    moved.apply(Observed(lease(14, extra={})), now=NOW)
    assert moved.state is LeaseState.CONFLICT
    assert moved.why == f"{OUR_IP} holds it now"


def test_an_event_held_back_during_a_write_counts_once_the_answer_is_there() -> None:
    cases: list[tuple[Event, tuple[LeaseState, Step]]] = [
        (Observed(None), (LeaseState.HELD, Step.LOOK)),
        (Unreadable("rubbish"), (LeaseState.HELD, Step.LOOK)),
        (Observed(lease(13)), (LeaseState.HELD, Step.IDLE)),
        (Observed(lease(12)), (LeaseState.HELD, Step.IDLE)),
        (Observed(lease(14, extra=SIGNED | {CHALLENGE: "beef"})), (LeaseState.HELD, Step.RENEW)),
        (Observed(replace(OTHER, revision=14)), (LeaseState.CONFLICT, Step.LOOK)),
        (Observed(replace(OTHER, revision=12)), (LeaseState.HELD, Step.IDLE)),
    ]
    for event, outcome_ in cases:
        machine = after("unsigned", "next", event, "wrote")
        assert (machine.state, machine.step) == outcome_, event


def test_an_event_held_back_during_a_write_without_an_answer_may_be_its_echo() -> None:
    cases: list[tuple[Event, tuple[LeaseState, Step]]] = [
        (Observed(None), (LeaseState.LOST, Step.LOOK)),
        (Unreadable("rubbish"), (LeaseState.CONFLICT, Step.LOOK)),
        (Observed(lease(13)), (LeaseState.HELD, Step.LOOK)),
        (Observed(replace(OTHER, revision=14)), (LeaseState.CONFLICT, Step.LOOK)),
    ]
    for event, outcome_ in cases:
        machine = after("unsigned", "next", event, "failed")
        assert (machine.state, machine.step) == outcome_, event
        assert machine.next(now=NOW) == WaitUntil(NOW + 1), "the store has just failed"


def test_late_echoes_of_our_own_writes_cause_no_writes() -> None:
    """The watch is behind by more than a write takes: each write would cause the next."""
    machine = after("unsigned", "next", "wrote")
    for _ in range(5):
        machine.apply(Observed(lease(12)), now=NOW)
        assert machine.next(now=NOW) == Look()
        machine.apply(seen(lease(13)), now=NOW)
        assert isinstance(machine.next(now=NOW), WaitUntil)


# What is reported


def notices(machine: ClaimMachine, *inputs: Input, now: float = NOW) -> list[str]:
    machine.notices.clear()
    for each in inputs:
        machine.apply(each, now=now)
    return [type(notice).__name__ for notice in machine.notices]


def test_a_write_by_another_with_our_identity_is_reported_once_a_minute() -> None:
    machine = after()
    assert notices(machine, Observed(lease(12))) == ["WrittenByAnother", "Working"]
    assert notices(machine, Observed(lease(13)), now=NOW + 59) == ["Working"]
    assert notices(machine, Observed(lease(14)), now=NOW + 60) == ["WrittenByAnother", "Working"]


def test_what_may_be_our_own_write_is_not_reported_as_anothers() -> None:
    machine = after("unsigned", "next", "failed")
    assert notices(machine, Observed(lease(13))) == []
    resumed = ClaimMachine(RULES, offer=OFFER, key=KEY)
    assert notices(resumed, Observed(lease(13))) == ["StateChanged"]


def test_a_challenge_is_reported_and_answered_by_a_renewal() -> None:
    machine = after()
    challenged = lease(12, extra=SIGNED | {CHALLENGE: "beef"})
    assert notices(machine, Observed(challenged)) == ["Challenged"]
    action = machine.next(now=NOW)
    assert isinstance(action, Renew)
    assert CHALLENGE not in action.attributes.extra


def test_failures_and_their_end_are_reported() -> None:
    machine = after("gone", "next")
    assert notices(machine, LookFailed("no answer")) == ["Failing"]
    machine.next(now=NOW + 1)
    assert notices(machine, seen(lease(12))) == [], "not over before the write is done"
    machine.next(now=NOW + 1)
    assert notices(machine, Wrote(lease(13))) == ["Working", "StateChanged"]


def test_a_failure_is_over_when_our_lease_shows_up_by_itself() -> None:
    """Otherwise the next renewal, a day later, reports an outage of one day."""
    machine = after("gone", "next", "saw nothing")
    assert notices(machine, Observed(lease(12))) == ["WrittenByAnother", "StateChanged", "Working"]
    machine = after("gone", "next", "saw nothing")
    unsigned = Observed(lease(12, extra={}))
    assert "Working" not in notices(machine, unsigned), "a renewal is still to be done"


def test_reasons() -> None:
    for inputs, why in [
        (("gone",), "it was deleted or has expired"),
        (("other",), f"node them at {THEIR_IP} holds it now"),
        (("unreadable",), "its value cannot be read (rubbish)"),
        (("gone", "next", "saw overlap"), f"lease {INSIDE} has addresses of it now"),
        (("gone", "next", "saw rubbish"), "its value cannot be read (rubbish)"),
        ((), ""),
    ]:
        assert after(*inputs).why == why


def test_giving_up_names_the_lease_and_its_state() -> None:
    machine = after("gone", "next", "saw none", rules=EXITS)
    expected = GiveUp(f"lease {KEY} is lost")
    assert machine.next(now=NOW) == machine.next(now=NOW + 10**6) == expected
