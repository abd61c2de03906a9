"""Delays between tries, and the log of an outage."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from tundp.backoff import REASONS, REMIND_S, Backoff, Contest, Outage, Ration

LOG = logging.getLogger("tundp.test")


@pytest.mark.parametrize(
    ("rng", "expected", "breaks"),
    [
        (lambda: 0.0, [1.0, 2.0, 4.0, 5.0, 5.0], "doubles up to the ceiling"),
        (lambda: 1.0, [0.5, 1.0, 2.0, 2.5, 2.5], "never shorter than half"),
        (lambda: 0.5, [0.75, 1.5, 3.0, 3.75, 3.75], "jitter does not add up"),
    ],
)
def test_delays(rng: Callable[..., Any], expected: list[float], breaks: str) -> None:
    backoff = Backoff(1.0, 5.0, rng)
    assert [backoff.next_s() for _ in expected] == expected, breaks


def test_reset_starts_over() -> None:
    backoff = Backoff(0.2, 60.0, lambda: 0.0)
    for _ in range(5):
        backoff.next_s()
    backoff.reset()
    assert backoff.next_s() == 0.2
    assert backoff.next_s() == 0.4


def test_default_jitter_stays_in_its_range_and_varies() -> None:
    delays = set()
    for _ in range(50):
        delays.add(Backoff(1.0, 5.0).next_s())
    assert all(0.5 <= delay <= 1.0 for delay in delays)
    assert len(delays) > 10


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[..., Any]:
    caplog.set_level(logging.INFO, logger=LOG.name)

    def taken() -> list[tuple[str, str]]:
        found = [(record.levelname, record.getMessage()) for record in caplog.records]
        caplog.clear()
        return found

    return taken


def test_an_outage_is_told_once_then_once_a_minute_then_its_end(lines: Any) -> None:
    outage = Outage(LOG, "etcd")
    assert not outage.is_on
    outage.failed("refused", now=100.0)
    assert outage.is_on
    assert lines() == [("WARNING", "etcd: refused; retrying")]
    for second in range(1, 60):
        outage.failed("refused", now=100.0 + second)
    assert lines() == []
    outage.failed("refused", now=100.0 + REMIND_S)
    assert lines() == [("WARNING", "etcd: refused; retrying (failed 59 more times since)")]
    outage.failed("refused", now=101.0 + REMIND_S)
    outage.ended(now=162.5)
    assert lines() == [("INFO", "etcd: working again after 62.5 s")]
    assert not outage.is_on


def test_another_error_is_told_at_once(lines: Any) -> None:
    outage = Outage(LOG, "etcd")
    outage.failed("refused", now=0.0)
    outage.failed("refused", now=1.0)
    outage.failed(OSError("no route"), now=2.0)
    assert lines() == [
        ("WARNING", "etcd: refused; retrying"),
        ("WARNING", "etcd: no route; retrying (failed 1 more times since)"),
    ]


def test_success_without_failure_is_silent(lines: Any) -> None:
    outage = Outage(LOG, "etcd")
    outage.ended(now=1.0)
    outage.failed("x", now=2.0)
    outage.ended(now=3.0)
    lines()
    outage.ended(now=4.0)
    assert lines() == []


def test_what_fails_and_works_by_turns_costs_two_lines_a_minute(lines: Any) -> None:
    outage = Outage(LOG, "etcd")
    for second in range(300):
        outage.failed("refused" if second % 3 else "no route", now=2.0 * second)
        assert outage.error
        outage.ended(now=2.0 * second + 1)
        assert not outage.error
    told = lines()
    assert len(told) <= 20, told
    assert told[0] == ("WARNING", "etcd: no route; retrying")
    assert told[1] == ("INFO", "etcd: working again after 1.0 s")
    assert told[2] == ("WARNING", "etcd: no route; retrying (failed 29 more times since)")
    assert told[-1][0] == "INFO", "the last word is how it is"


def test_words_that_change_each_time_cost_two_lines_a_minute(lines: Any) -> None:
    outage = Outage(LOG, "etcd")
    for second in range(600):
        outage.failed(f"refused, port {second}", now=float(second))
    told = lines()
    assert len(told) <= 20 + REASONS, told
    assert [text for _, text in told[:4]] == [
        f"etcd: refused, port {n}; retrying" for n in range(4)
    ]
    assert "more times since" in told[4][1]


def test_an_outage_nobody_was_told_of_is_told_once_it_lasts(lines: Any) -> None:
    outage = Outage(LOG, "etcd")
    outage.failed("refused", now=0.0)
    outage.ended(now=1.0)
    lines()
    outage.failed("refused", now=2.0)
    assert lines() == [] and outage.is_on
    outage.failed("refused", now=61.0)
    outage.ended(now=62.0)
    assert lines() == [
        ("WARNING", "etcd: refused; retrying (failed 1 more times since)"),
        ("INFO", "etcd: working again after 60.0 s"),
    ]


def test_a_contest_is_named_from_the_third_time_on_and_ends_by_itself(lines: Any) -> None:
    contest = Contest(LOG)
    assert contest.words(now=0.0) == ""
    for second in range(600):
        contest.undone("rules were gone; put back", now=float(second))
        assert bool(contest.words(now=float(second))) == (second >= 2)
    told = [text for _, text in lines()]
    assert len(told) <= 20, told
    assert told[0] == "rules were gone; put back"
    assert "another program has undone it 60 times in the last minute" in told[2]
    assert contest.words(now=656.0)
    assert contest.words(now=660.0) == ""


def test_a_ration_counts_what_it_refuses() -> None:
    ration = Ration(3)
    assert [ration.take(float(second)) for second in range(5)] == [True, True, True, False, False]
    assert ration.withheld == 2
    assert ration.take(REMIND_S)
    assert ration.withheld_words() == " (and 2 more since)"
    assert ration.withheld_words() == ""


def test_percent_signs_in_errors_are_only_text(lines: Any) -> None:
    Outage(LOG, "etcd %s").failed("100% %d", now=0.0)
    assert lines() == [("WARNING", "etcd %s: 100% %d; retrying")]
