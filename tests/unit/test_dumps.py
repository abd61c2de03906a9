"""When drops are a burst."""

from __future__ import annotations

from tundp.daemon.dumps import BURST_FACTOR, BURST_MIN, PAUSE_S, BurstDetector


def looks(rates: list[int], *, start: float = 0.0) -> list[int]:
    """The seconds a burst was seen in."""
    detector, total, found = BurstDetector(), 0, []
    detector.look(0, start)
    for second, rate in enumerate(rates):
        total += rate
        if detector.look(total, start + second):
            found.append(second)
    return found


def test_a_burst_out_of_nothing() -> None:
    assert looks([0, 0, BURST_MIN - 1, 0, 50 * BURST_MIN]) == [4]


def test_a_daily_rate_is_none() -> None:
    assert looks([90] * 200 + [90 * (BURST_FACTOR - 1)] + [90] * 100) == []


def test_many_times_the_daily_rate_is_one() -> None:
    assert looks([90] * 70 + [90 * BURST_FACTOR]) == [70]


def test_one_copy_a_while() -> None:
    rates = ([5000] + [0] * 199) * 5
    assert looks(rates) == [0, int(PAUSE_S)]


def test_before_there_is_an_engine_nothing_is_one() -> None:
    detector = BurstDetector()
    assert [detector.look(drops, 0.0) for drops in (None, None, 10_000_000, None, 5)] == [""] * 5
