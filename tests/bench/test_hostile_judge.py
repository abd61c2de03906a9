"""The judge of `make hostile` finds what it is there to find, and nothing where nothing is."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from pathlib import Path
from typing import Any

import pytest

from bench.hostile import memory
from bench.hostile.common import Score, deck
from bench.hostile.judge import (
    BAD_LINE,
    MB,
    Judge,
    Sample,
    allowed_growth,
    fallen,
    flat,
    growth,
    sample,
    unbalanced,
)


def samples(*megabytes: float) -> list[Sample]:
    return [Sample(2.0 * n, int(rss * MB), 20, 8) for n, rss in enumerate(megabytes)]


def test_a_warm_up_is_no_growth() -> None:
    slope, ends = growth(samples(*range(40, 80), *[80] * 80))
    assert (slope, ends) == (0, 0)


def test_a_steady_leak_is_growth_by_both_measures() -> None:
    slope, ends = growth(samples(*(60 + n / 10 for n in range(300))))
    assert slope / MB == pytest.approx(20, rel=0.05)
    assert ends / MB == pytest.approx(16.6, rel=0.05)  # between the middles of two sixths
    assert min(slope, ends) > allowed_growth(80 * MB, 1200)


def test_peaks_are_no_slope_and_a_step_is_found_by_the_ends() -> None:
    peaks = [90 if n % 10 == 0 else 60 for n in range(300)]
    assert growth(samples(*peaks)) == (0, 0)
    step = [60] * 260 + [90] * 40
    assert growth(samples(*step))[1] == 30 * MB


def test_a_long_run_is_held_to_less_than_a_short_one() -> None:
    assert allowed_growth(60 * MB, 3600) == 8 * MB
    assert allowed_growth(100 * MB, 3600) == 12 * MB
    assert allowed_growth(60 * MB, 20) == 24 * MB


def test_packets_that_are_nowhere_are_found() -> None:
    right = {"packets_in": 5, "packets_out": 3, "drops": {"no_route": 2}}
    assert unbalanced(right) is None
    assert unbalanced(right | {"drops": {"no_route": 1}}) == "5 in, 3 out, 1 dropped"


def test_a_counter_that_falls_or_goes_is_found() -> None:
    before = flat({"encap": {"packets_in": 5, "drops": {"no_route": 2}}, "conserved": True})
    assert before == {"encap.packets_in": 5, "encap.drops.no_route": 2}
    assert fallen(before, before | {"new": 1}) == []
    assert fallen(before, {"encap.packets_in": 4}) == ["encap.packets_in", "encap.drops.no_route"]


@pytest.mark.parametrize(
    ("line", "is_bad"),
    [
        (b"Traceback (most recent call last):", True),
        (b"error   tundp: bug in kernel, starts again in 0.2 s; please report this:", True),
        (b"asyncio: Task exception was never retrieved", True),
        (b"coroutine 'f' was never awaited", True),
        (b"info    tundp: debugging is on; lease 10.5.3.0-24 is held", False),
    ],
)
def test_lines_of_bugs(line: bytes, is_bad: bool) -> None:
    assert bool(BAD_LINE.search(line)) is is_bad


def test_a_fault_excuses_what_was_under_way_and_no_more() -> None:
    score = Score(1)
    score.fault("tun_deleted at node1", 3.0)
    now = time.monotonic()
    why = "tun_deleted at node1"
    assert score.excuses([now, now - 0.3, now - 1.0, now + 4.0]) == [why, why, None, None]


def test_a_long_window_excuses_beyond_a_short_one_inside_it() -> None:
    score = Score(1)
    score.windows += [(20.0, 21.0, "later"), (10.0, 19.0, "long"), (12.0, 13.0, "short")]
    times = [9.9, 10.0, 12.5, 15.0, 19.5, 20.5, 21.5]
    assert score.excuses(times) == [None, "long", "long", "long", None, "later", None]


def test_one_seed_one_order_and_every_kind_each_round() -> None:
    kinds = list("abcdefg")
    one = list(itertools.islice(deck(Score(7).rng("store"), kinds), 14))
    assert one == list(itertools.islice(deck(Score(7).rng("store"), kinds), 14))
    assert sorted(one[:7]) == sorted(one[7:]) == kinds
    assert one != list(itertools.islice(deck(Score(8).rng("store"), kinds), 14))


class Daemon:
    pid = os.getpid()
    code: int | None = None

    def poll(self) -> int | None:
        return self.code


class Node:
    number = 1

    def __init__(self, directory: Path) -> None:
        self.daemon = Daemon()
        self.log_path = directory / "log"
        self.admin_socket = directory / "nobody"

    async def get(self, port: int, path: str) -> tuple[int, str]:
        return 503, "[-]event-loop failed: late by 1200 ms"

    def log_tail(self) -> str:
        return "the end"


def test_daemons_that_end_or_log_a_bug_or_keep_silent_are_found(tmp_path: Path) -> None:
    node: Any = Node(tmp_path)
    node.log_path.write_text("one\nbug in something\nhalf a bug")
    found = Judge(Score(1), [node])

    async def look() -> None:
        await found.look(found.watched[0])

    asyncio.run(look())
    texts = sorted(found.faults)
    assert [text[:9] for text in texts] == ["node1 hea", "node1 log", "node1 no "]
    node.daemon.code = 1
    asyncio.run(look())
    assert "exit code 1" in found.faults["node1 ended"]


def test_a_sample_of_a_process() -> None:
    mine = sample(os.getpid())
    assert mine.rss > MB
    assert mine.fds >= 3
    assert mine.threads >= 1


SMAPS = """\
5581c0000000-5581c0400000 rw-p 00000000 00:00 0                          [heap]
Size:               4096 kB
Rss:                3000 kB
7f0000000000-7f0000400000 rw-p 00000000 00:00 0
Rss:                2000 kB
7f0000400000-7f0004000000 ---p 00000000 00:00 0
Rss:                   0 kB
7f1230100000-7f1230300000 rw-p 00000000 00:00 0
Rss:                1000 kB
7f1240000000-7f1240200000 r-xp 00001000 fe:00 131                        /usr/lib/libc.so.6
Rss:                 500 kB
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0                          [stack]
Rss:                  16 kB
"""


def test_memory_by_place() -> None:
    kb = 1 << 10
    assert memory.parse(SMAPS) == {
        "heap": 3000 * kb,
        "arenas": 2000 * kb,
        "blocks": 1016 * kb,
        "files": 500 * kb,
    }


def test_the_places_of_this_process_are_its_memory() -> None:
    of_all = sum(memory.places(os.getpid()).values())
    assert of_all == pytest.approx(sample(os.getpid()).rss, rel=0.2)
