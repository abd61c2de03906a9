"""The judge of numbered datagrams: against cases by hand, and against a slow one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tundp.lab.generators import Numbered
from tundp.lab.losses import Circumstances, Direction, judge

MS = 1_000_000
START = 5_000 * MS
"""When the streams of these tests began, ns."""


def judged(
    numbers: list[int], *, sent: int = 10, at_ms: list[int] | None = None, **given_: int
) -> Direction:
    """A direction with number n sent after n ms, and arrivals 1 ms apart unless told."""
    moments = range(1, len(numbers) + 1) if at_ms is None else at_ms
    return judge(
        "a > b",
        np.array([START + n * MS for n in range(sent)], np.uint64),
        Numbered(
            np.array(numbers, np.uint64), np.array([START + at * MS for at in moments], np.uint64)
        ),
        Circumstances(started_ns=START, rate=1000, **given_),
    )


def test_all_in_order_is_nothing_lost() -> None:
    found = judged(list(range(10)))
    assert (found.sent, found.received, found.lost, found.losses) == (10, 10, 0, ())
    assert (found.duplicates, found.reordered, found.corrupt) == (0, 0, 0)
    assert found.longest_silence_s == pytest.approx(0.001)
    assert found.longest_delay_s == pytest.approx(0.001)
    assert found.held == pytest.approx(1.0)
    assert found.faults == []


def test_losses_are_rows_with_their_times() -> None:
    found = judged([1, 2, 5, 6, 9])
    rows = [(loss.first, loss.count, loss.at_s, loss.for_s) for loss in found.losses]
    assert rows == [(0, 1, 0.0, 0.0), (3, 2, 0.003, 0.001), (7, 2, 0.007, 0.001)]
    assert found.lost == 5
    assert "5 of 10 lost (1 from 0.000 s for 0 ms, 2 from 0.003 s for 1 ms" in str(found)


def test_the_last_ones_lost_are_found_too() -> None:
    assert [(loss.first, loss.count) for loss in judged([0, 1, 2], sent=6).losses] == [(3, 3)]
    assert [(loss.first, loss.count) for loss in judged([], sent=6).losses] == [(0, 6)]


def test_copies_are_no_reordering_and_do_not_hide_a_loss() -> None:
    found = judged([0, 1, 1, 2, 0, 4], sent=5)
    assert (found.lost, found.duplicates, found.reordered) == (1, 2, 0)


def test_what_comes_after_a_higher_number_is_out_of_order() -> None:
    # 1 and 2 were overtaken by 3; 4 was not.
    assert judged([0, 3, 1, 2, 4], sent=5).reordered == 2


def test_a_number_never_sent_is_corrupt() -> None:
    found = judged([0, 1, 77], sent=2, corrupt=3)
    assert (found.received, found.lost, found.corrupt) == (2, 0, 4)


def test_silence_counts_from_the_first_sending_and_to_the_last() -> None:
    between = judged([0, 1, 2, 3], sent=4, at_ms=[1, 2, 302, 303])
    assert (between.longest_silence_s, between.silence_at_s) == pytest.approx((0.3, 0.002))
    assert between.longest_delay_s == pytest.approx(0.3)
    first = judged([3], sent=4, at_ms=[40])
    assert (first.longest_silence_s, first.silence_at_s) == pytest.approx((0.04, 0.0))
    last = judged([0], sent=50, at_ms=[1])
    assert (last.longest_silence_s, last.silence_at_s) == pytest.approx((0.048, 0.001))


def test_what_is_no_measurement_says_why() -> None:
    slow = judge(
        "a > b",
        np.array([START, START + 100 * MS], np.uint64),
        Numbered(np.array([0, 1], np.uint64), np.array([START, START + 100 * MS], np.uint64)),
        Circumstances(started_ns=START, rate=1000, missed=3, late_s=0.2),
    )
    assert slow.faults == [
        "a > b: the sender held 2.0% of its rate",
        "a > b: the sender was 200 ms late",
        "a > b: the receiver itself lost 3",
    ]


def test_nothing_sent_is_no_crash() -> None:
    found = judged([], sent=0)
    assert (found.sent, found.lost, found.longest_silence_s) == (0, 0, 0.0)


CASES = st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1))))


@given(CASES)
def test_it_agrees_with_a_slow_judge(case: tuple[int, list[int]]) -> None:
    sent, numbers = case
    seen: set[int] = set()
    reordered = 0
    for number in numbers:
        reordered += number not in seen and any(other > number for other in seen)
        seen.add(number)
    found = judged(numbers, sent=sent)
    rows = [range(loss.first, loss.first + loss.count) for loss in found.losses]
    missing = [number for row in rows for number in row]
    assert missing == sorted(set(range(sent)) - seen)
    # Rows are as long as they can be.
    assert not {row.stop for row in rows} & {row.start for row in rows}
    assert found.lost == len(missing)
    assert found.duplicates == len(numbers) - len(seen)
    assert found.reordered == reordered
