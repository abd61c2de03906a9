"""Refused starts are remembered, and a supervisor that never gives up asks once a minute."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tundp.subnet.refusals import PAUSE_MAX_S, Refusals

WHO = "us 192.0.2.1"


def test_a_supervisor_that_restarts_at_once_asks_less_and_less(tmp_path: Path) -> None:
    now = [1e9]
    asked = []
    path = tmp_path / "refused.json"
    while now[0] < 1e9 + 3600:
        refusals = Refusals(path, lambda: now[0])  # each start is a process of its own
        pause_s, why = refusals.pause(WHO)
        assert why == ("" if pause_s == 0 else "they are alive")
        now[0] += pause_s
        asked.append(now[0])
        refusals.note(WHO, "they are alive")
        now[0] += 2.0
    waits = [round(b - a) for a, b in itertools.pairwise(asked)]
    assert waits[:4] == [2, 15, 30, 60]
    assert set(waits[4:]) == {60}


def test_another_address_or_id_is_not_concerned_and_success_forgets(tmp_path: Path) -> None:
    refusals = Refusals(tmp_path / "refused.json", lambda: 100.0)
    for _ in range(3):
        refusals.note(WHO, "alive")
    assert refusals.pause(WHO)[0] > 0
    assert refusals.pause("us 192.0.2.9") == (0.0, "")
    assert refusals.pause("other 192.0.2.1") == (0.0, "")
    refusals.clear()
    assert refusals.pause(WHO) == (0.0, "")
    refusals.clear()


@pytest.mark.parametrize("clock", [0.0, 99.0, 1e12])
def test_a_clock_that_was_set_makes_no_longer_pause(tmp_path: Path, clock: float) -> None:
    path = tmp_path / "refused.json"
    for _ in range(9):
        Refusals(path, lambda: 1e6).note(WHO, "alive")
    assert 0 <= Refusals(path, lambda: clock).pause(WHO)[0] <= PAUSE_MAX_S


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"who": "us 192.0.2.1", "why": "", "count": 1e999, "at": 0}']
)
def test_what_cannot_be_read_is_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "refused.json"
    path.write_text(text)
    refusals = Refusals(path)
    assert refusals.pause(WHO) == (0.0, "")
    refusals.note(WHO, "alive")


def test_nowhere_to_write_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (None, tmp_path / "file" / "refused.json"):
        refusals = Refusals(path)
        refusals.note(WHO, "alive")
        assert refusals.pause(WHO) == (0.0, "")
        refusals.clear()
