"""The watch over the event loop, with a real loop that is really late."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable

import pytest

from tests.loops import run_on
from tests.wait import DEADLINE_S, until, until_sync
from tundp.daemon import stall_watch
from tundp.daemon.stall_watch import LATE_S, Stall, StallWatch


def sleep_long(seconds: float) -> None:
    time.sleep(seconds)


async def watch_while(act: Callable[[], object]) -> StallWatch:
    watch = StallWatch(asyncio.get_running_loop())
    with watch.watching():
        await until(lambda: act() or watch.last is not None, "a delay to be told of")
    return watch


def test_a_callback_that_sleeps_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        watch = asyncio.run(watch_while(lambda: sleep_long(3 * LATE_S)))
    assert watch.last is not None and watch.stalls >= 1
    assert watch.last.late_s >= LATE_S
    assert "unit/test_stall_watch.py" in watch.last.places[0]
    assert " sleep_long < " in watch.last.places[0]
    # It slept: hardly any of it was without a processor that it wanted.
    assert watch.last.waited_s is not None
    assert watch.last.waited_s < watch.last.late_s / 2
    assert watch.last.words() in caplog.text


def test_what_the_late_code_had_is_not_kept() -> None:
    class Large:
        pass

    seen: list[weakref.ref[Large]] = []

    def hold() -> None:
        large = Large()
        if not seen:
            seen.append(weakref.ref(large))
            sleep_long(3 * LATE_S)

    watch = asyncio.run(watch_while(hold))
    assert watch.last is not None and " hold < " in watch.last.places[0]
    gc.collect()
    assert seen[0]() is None


def test_one_that_does_not_end_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stall_watch, "LONG_S", LATE_S)
    told: list[bool] = []

    def hold() -> None:
        if not told:
            until_sync(lambda: "was late by" in caplog.text, "the delay to be told of")
            told.append(True)

    with caplog.at_level(logging.WARNING):
        asyncio.run(watch_while(hold))
    assert told


def test_a_loop_in_time_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall_watch, "PAUSE_S", 0.01)
    monkeypatch.setattr(stall_watch, "LATE_S", DEADLINE_S)

    async def main() -> None:
        watch = StallWatch(asyncio.get_running_loop())
        with watch.watching():
            await asyncio.sleep(0.3)
        assert (watch.stalls, watch.last) == (0, None)

    asyncio.run(main())


def test_the_thread_ends_with_the_block_and_with_the_loop() -> None:
    async def main() -> None:
        with StallWatch(asyncio.get_running_loop()).watching():
            assert "watch loop" in names()

    asyncio.run(main())
    run_on(asyncio.new_event_loop, until(lambda: "watch loop" not in names(), "its end"))


def names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def test_a_delay_in_words() -> None:
    stall = Stall(late_s=1.466, waited_s=1.2, places=("a.py:1 f", "b.py:2 g"), others=("x in y",))
    assert stall.words() == (
        "the event loop was late by 1466 ms, 1200 ms of it without a processor; it was in"
        " a.py:1 f; then in b.py:2 g; beside it x in y"
    )
    unknown = Stall(late_s=0.5, waited_s=None, places=(), others=())
    assert unknown.words() == (
        "the event loop was late by 500 ms, not known how much of it without a processor;"
        " it was in nothing known"
    )
