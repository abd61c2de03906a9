"""What is said of the paths in use: backend/udp/path.py."""

from __future__ import annotations

import time

import pytest

from tests.routes import peer as peer_of
from tundp.backend.base import PathMeasuring
from tundp.backend.udp.path import Path, path_findings
from tundp.choices import Measuring
from tundp.finding import Verdict

SINCE = 1_770_000_000.0  # 2026-02-02T02:40:00Z


def path(number: int, state: Measuring, since: float = SINCE) -> Path:
    peer = peer_of(f"10.5.{number}.0/24", f"192.0.2.{number}", hop_id=number)
    return Path(number, peer, active_at=0.0, due_at=0.0, measuring=PathMeasuring(state, since))


def test_nothing_is_said_without_a_path_in_use() -> None:
    assert path_findings([]) == []


@pytest.mark.parametrize(
    ("states", "words"),
    [
        ([Measuring.MEASURED], "1 measured"),
        ([Measuring.PENDING], "1 not measured yet"),
        ([Measuring.MEASURED, Measuring.PENDING, Measuring.MEASURED], "2 measured, 1 not measured"),
    ],
)
def test_what_is_well_is_no_warning(states: list[Measuring], words: str) -> None:
    (found,) = path_findings([path(number, each) for number, each in enumerate(states, start=2)])
    assert (found.id, found.verdict) == ("path-mtu", Verdict.OK)
    assert f"paths in use: {words}" in found.evidence


def test_who_does_not_answer_is_named_the_longest_first() -> None:
    paths = [path(2, Measuring.MEASURED)]
    paths += [path(number, Measuring.NO_ANSWER, SINCE - number) for number in range(3, 8)]
    (found,) = path_findings(paths)
    assert (found.verdict, found.is_failure) == (Verdict.WARN, False)
    assert "1 measured, 5 cannot be measured" in found.evidence
    assert "192.0.2.7 since 2026-02-02T02:39:53Z, 192.0.2.6 since" in found.evidence
    assert "192.0.2.4" not in found.evidence
    assert "and 2 more" in found.evidence
    assert "icmp_echo_ignore_all" in found.next_step


def test_the_time_is_that_of_the_change() -> None:
    one = path(2, Measuring.PENDING, SINCE)
    one.note(Measuring.PENDING)
    assert one.measuring.since == SINCE
    before = time.time()
    one.note(Measuring.NO_ANSWER)
    assert one.measuring.state is Measuring.NO_ANSWER
    assert before <= one.measuring.since <= time.time()
