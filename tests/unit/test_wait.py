"""The tests' own waiting: it ends, and says what was awaited and what was seen last."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from tests.wait import steadily, together, until, until_sync


def counter() -> Callable[..., Any]:
    numbers = itertools.count()
    return lambda: next(numbers)


async def test_until_returns_the_first_true_value() -> None:
    assert await until(counter(), poll_s=0) == 1
    count = counter()

    async def fourth() -> str:
        return "yes" if count() == 3 else ""

    assert await until(fourth, poll_s=0) == "yes"


async def test_until_says_what_it_waited_for_and_what_it_saw_last() -> None:
    with pytest.raises(AssertionError) as caught:
        await until(list, "a peer", deadline_s=0)
    assert str(caught.value) == "not within 0 s: a peer\nlast seen: []"
    with pytest.raises(AssertionError, match=r"until\(lambda: None"):
        await until(lambda: None, deadline_s=0)


def test_until_sync_returns_the_first_true_value_and_ends() -> None:
    assert until_sync(counter(), poll_s=0) == 1
    with pytest.raises(AssertionError, match="not within 0 s: rain\nlast seen: 0"):
        until_sync(lambda: 0, "rain", deadline_s=0)


async def test_steadily_fails_at_the_first_false_value() -> None:
    count = counter()
    with pytest.raises(AssertionError, match="no longer true"):
        await steadily(lambda: count() < 3, for_s=60)
    assert count() == 4


async def test_together_runs_all_at_a_time_and_names_the_one_that_failed() -> None:
    barrier = asyncio.Barrier(2)
    await together({"one": barrier.wait(), "two": barrier.wait()})
    hangs = asyncio.Event()

    async def fail() -> None:
        assert hangs.is_set(), "rain"

    with pytest.raises(AssertionError, match="rain") as caught:
        await together({"waits": hangs.wait(), "fails": fail()})
    assert caught.value.__notes__ == ["case: fails"]


async def test_an_error_of_the_condition_is_no_false() -> None:
    with pytest.raises(ZeroDivisionError):
        await until(lambda: 1 // 0)
