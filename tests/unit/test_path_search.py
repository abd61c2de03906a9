"""How a path's MTU is found by what is answered: backend/udp/path_search.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tundp.backend.udp.path_search import COMMON, FLOOR, TRIES, Answer, PathSearch

FULL = 1472


def run(
    search: PathSearch, arrives: Callable[[int, int], bool], *, paces: int = 40
) -> tuple[Answer | None, list[tuple[int, ...]]]:
    """Feed a search by a path; arrives: (size, number of the pace) -> whether it is answered."""
    asked = []
    for pace in range(paces):
        sizes = search.next_sizes()
        if search.result is not None:
            assert sizes == ()
            break
        asked.append(sizes)
        for size in sizes:
            if arrives(size, pace):
                search.answered(size)
    return search.result, asked


def test_a_wide_path_costs_one_packet() -> None:
    assert run(PathSearch(FULL, None), lambda size, _: True) == (Answer.FULL, [(FULL,)])


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
def test_a_narrow_path_is_the_largest_common_size_that_arrives(carries: int, largest: int) -> None:
    search = PathSearch(FULL, None)
    result, asked = run(search, lambda size, _: size <= carries)
    assert (result, search.largest) == (Answer.NARROW, largest)
    assert sum(FULL in sizes for sizes in asked) >= 2 * TRIES, "the full size has every chance"


@pytest.mark.parametrize("carries", [0, 68, 500, FLOOR - 1])
def test_nothing_is_known_of_a_path_below_the_floor_or_a_silent_peer(carries: int) -> None:
    search = PathSearch(FULL, None)
    assert run(search, lambda size, _: size <= carries)[0] is Answer.UNKNOWN


@pytest.mark.parametrize("lost", range(TRIES - 1))
def test_lost_tries_do_not_narrow_a_path(lost: int) -> None:
    search = PathSearch(FULL, None)
    assert run(search, lambda _, pace: pace > lost)[0] is Answer.FULL


def test_full_packets_lost_for_a_whole_check_are_asked_for_again() -> None:
    search = PathSearch(FULL, None)
    assert run(search, lambda size, pace: size < FULL or pace > TRIES + 1)[0] is Answer.FULL


def test_a_late_answer_counts_while_the_search_lasts() -> None:
    search = PathSearch(FULL, None)
    for _ in range(TRIES + 1):
        search.next_sizes()
    search.answered(FULL)
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
