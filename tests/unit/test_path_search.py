"""How a path's MTU is found by what is answered: backend/udp/path_search.py."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tundp.backend.udp import path_search
from tundp.backend.udp.path_search import (
    COMMON,
    CONFIRM,
    FLOOR,
    SILENT,
    TRIES,
    Answer,
    PathSearch,
)

FULL = 1472
PACES_MAX = 80


def run(
    search: PathSearch, arrives: Callable[[int, int], bool], *, delay: int = 0
) -> tuple[Answer | None, list[tuple[int, ...]]]:
    """Feed a search by a path; arrives: (size, number of the pace) -> whether it is answered.

    delay: paces an answer takes; with 0 it is there before the next one.
    """
    asked = []
    due: list[tuple[int, int, int]] = []
    for pace in range(PACES_MAX):
        for at, size, of_round in due:
            if at == pace and search.result is None:
                search.answered(size, of_round)
        sizes = search.next_sizes()
        if search.result is not None:
            assert sizes == ()
            break
        assert list(sizes) == sorted(set(sizes), reverse=True)
        asked.append(sizes)
        for size in sizes:
            if not arrives(size, pace):
                continue
            if delay:
                due.append((pace + delay, size, search.round))
            elif search.result is None:
                search.answered(size, search.round)
    return search.result, asked


def test_a_wide_path_costs_one_packet() -> None:
    assert run(PathSearch(FULL, None), lambda size, _: True) == (Answer.FULL, [(FULL,)])


@pytest.mark.parametrize("delay", [0, 1, 2, 5])
@pytest.mark.parametrize(
    ("carries", "largest"),
    [
        (1464, 1464),  # PPPoE
        (1372, 1372),
        (1380, 1372),
        (1272, 1272),
        (1252, 1252),
        (600, 592),
        (FLOOR, FLOOR),
        (560, FLOOR),
    ],
)
def test_a_narrow_path_is_the_largest_common_size_that_arrives(
    carries: int, largest: int, delay: int
) -> None:
    search = PathSearch(FULL, None)
    result, asked = run(search, lambda size, _: size <= carries, delay=delay)
    assert (result, search.largest) == (Answer.NARROW, largest)
    assert sum(FULL in sizes for sizes in asked) > CONFIRM, "the full size has every chance"
    assert sum(map(len, asked)) < 200 + 30 * delay, "packets"


def test_a_narrow_path_takes_no_longer_than_before() -> None:
    """Eight paces of 0.4 s there were, and there are sixteen of 0.16 s."""
    _, asked = run(PathSearch(FULL, None), lambda size, _: size <= 1372)
    assert len(asked) <= 16
    assert sum(map(len, asked)) <= 80


def lossy(rng: random.Random, loss: float, carries: int = FULL) -> Callable[[int, int], bool]:
    """A path that loses a request or its answer with this probability, whatever the size."""
    return lambda size, _: size <= carries and rng.random() >= loss


@pytest.mark.parametrize(
    ("loss", "most"),
    # Six lost full packets passed for a narrow path: 0.3 ** 6 are 15 of 20,000.
    [(0.3, 0), (0.5, 20_000 * 0.5**CONFIRM)],
)
def test_random_loss_makes_no_path_narrow(loss: float, most: float) -> None:
    rng = random.Random(7)
    results = [run(PathSearch(FULL, None), lossy(rng, loss))[0] for _ in range(20_000)]
    assert results.count(Answer.NARROW) <= most
    assert results.count(Answer.FULL) > 19_900
    assert results.count(Answer.FULL) + results.count(Answer.UNKNOWN) >= 20_000 - most


def test_the_odds_of_a_wide_path_to_pass_for_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is seen to hold where it is not too small to be met: with fewer rounds."""
    assert 0.3**CONFIRM < 1e-6
    monkeypatch.setattr(path_search, "CONFIRM", 3)
    rng = random.Random(11)
    loss, searches = 0.5, 20_000
    results = [run(PathSearch(FULL, None), lossy(rng, loss))[0] for _ in range(searches)]
    assert 0 < results.count(Answer.NARROW) <= searches * loss**3


def test_a_narrow_path_that_loses_packets_is_not_called_narrower() -> None:
    rng, unknown = random.Random(3), 0
    for known in (None, 1372):
        for _ in range(3_000):
            search = PathSearch(FULL, known)
            result, _ = run(search, lossy(rng, 0.3, carries=1372))
            unknown += result is Answer.UNKNOWN
            assert (result, search.largest) in ((Answer.NARROW, 1372), (Answer.UNKNOWN, 0))
    assert unknown < 15, "and hardly ever silent"


def test_an_outage_in_the_middle_makes_no_path_narrow() -> None:
    """Full and small packets are lost alike while it is down: that says nothing of its width."""
    for begins in range(1, 12):
        for lasts in range(1, 30):
            search = PathSearch(FULL, None)

            def arrives(size: int, pace: int, up: tuple[int, int] = (begins, lasts)) -> bool:
                # As long as it is up only small ones, so that there is something to go on with.
                if pace < up[0]:
                    return size < FULL
                return pace >= sum(up)

            assert run(search, arrives)[0] is not Answer.NARROW


@pytest.mark.parametrize("carries", [0, 68, 500, FLOOR - 1])
def test_nothing_is_known_of_a_path_below_the_floor_or_a_silent_peer(carries: int) -> None:
    search = PathSearch(FULL, None)
    assert run(search, lambda size, _: size <= carries)[0] is Answer.UNKNOWN


@pytest.mark.parametrize("lost", range(SILENT - 1))
def test_lost_tries_do_not_narrow_a_path(lost: int) -> None:
    search = PathSearch(FULL, None)
    assert run(search, lambda _, pace: pace > lost)[0] is Answer.FULL


@pytest.mark.parametrize("lost", range(TRIES, CONFIRM + 1))
def test_full_packets_lost_in_a_row_are_asked_for_again(lost: int) -> None:
    search = PathSearch(FULL, None)
    assert run(search, lambda size, pace: size < FULL or pace >= lost)[0] is Answer.FULL


def test_a_late_answer_counts_while_the_search_lasts() -> None:
    search = PathSearch(FULL, None)
    for _ in range(SILENT + 1):
        search.next_sizes()
    search.answered(FULL, 0)
    assert search.result is Answer.FULL


def test_what_is_known_is_confirmed_without_another_search() -> None:
    search = PathSearch(FULL, 1372)
    result, asked = run(search, lambda size, _: size <= 1372)
    assert (result, search.largest) == (Answer.NARROW, 1372)
    assert {size for sizes in asked for size in sizes} == {FULL, 1384, 1372, FLOOR}


@pytest.mark.parametrize(("carries", "largest"), [(1400, 1400), (1300, 1292), (FLOOR, FLOOR)])
def test_a_narrow_path_that_changes_is_searched_anew(carries: int, largest: int) -> None:
    search = PathSearch(FULL, 1372)
    assert run(search, lambda size, _: size <= carries)[0] is Answer.NARROW
    assert search.largest == largest


def test_jumbo_frames() -> None:
    search = PathSearch(8972, None)
    assert run(search, lambda size, _: size <= 1472)[0] is Answer.NARROW
    assert search.largest == 1472


def test_every_size_is_below_the_next_and_above_the_floor() -> None:
    assert list(COMMON) == sorted(set(COMMON), reverse=True)
    assert COMMON[-1] > FLOOR
