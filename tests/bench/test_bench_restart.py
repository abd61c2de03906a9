"""`tundp bench restart`: what it makes of what it measured. A real one is in test_bench.py."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tundp.bench.restart_report import restart_parts, to_markdown, write_restart_reports
from tundp.bench.restart_results import RestartResults, RestartSettings, Run
from tundp.errors import ConfigError
from tundp.lab import restarts
from tundp.lab.generators import Numbered
from tundp.lab.losses import Circumstances, Stream, StreamsResult, judge

SENT = 100


def result(*, lost: int = 0, late_s: float = 0.0, reset: str = "") -> StreamsResult:
    """Of a hundred datagrams there and back, some of the first ones lost on the way there."""
    sent_ns = np.arange(SENT, dtype=np.uint64) * np.uint64(1_000_000)
    there, back = (
        judge(
            name,
            sent_ns,
            Numbered(np.arange(first, SENT, dtype=np.uint64), sent_ns[first:]),
            Circumstances(started_ns=0, rate=1000, late_s=late_s),
        )
        for name, first in (("pod1 > pod2", lost), ("pod2 > pod1", 0))
    )
    stream = Stream(received=1, corrupt=0, error=reset, longest_stall_s=0.05, stall_at_s=0.0)
    return StreamsResult(rate=1000, seconds=0.1, directions=(there, back), stream=stream, marks=())


def run(event: str, number: int = 0, **changes: object) -> Run:
    """A run that lost nothing, but for what is changed."""
    plain = Run(
        lab="virtual",
        event=event,
        load="1000",
        round=number,
        took_s=1.0,
        leaked=0,
        leaks="",
        error="",
        result=result(),
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def results(*runs: Run, **why_not: str) -> RestartResults:
    """Of two events in one lab."""
    return RestartResults(
        settings=RestartSettings(runs=5, loads=("1000",), only=("virtual", "stop", "replace")),
        environment={"kernel": "6.18"},
        started="2026-01-01T00:00:00+00:00",
        why_not=why_not,
        runs=list(runs),
        is_partial=False,
    )


def verdicts(found: RestartResults) -> dict[str, str]:
    return {row.event: row.verdict for row in found.rows}


def test_a_row_is_whole_only_if_every_run_is() -> None:
    nothing = [run("none")]
    assert verdicts(results(*nothing, run("stop"), run("stop", 1)))["stop"] == "whole"
    for changes, verdict in (
        ({"result": result(lost=3)}, "loses"),
        ({"result": result(reset="Connection reset by peer")}, "loses"),
        ({"leaked": 1}, "leaks"),
        ({"error": "no other daemon is ready", "result": None}, "failed"),
    ):
        found = results(*nothing, run("stop"), run("stop", 1, **changes))
        assert verdicts(found)["stop"] == verdict
        assert found.is_comparable


def test_an_event_without_a_command_is_no_pass() -> None:
    found = results(run("none"), run("stop"), replace="this tundp has no tundp run --replace")
    assert verdicts(found)["replace"] == "not available"
    assert "| not available: this tundp has no tundp run --replace |" in to_markdown(found)


def test_a_run_whose_sender_was_late_is_left_out_and_told() -> None:
    late = run("stop", 1, result=result(lost=90, late_s=0.3))
    found = results(run("none"), run("stop"), late)
    (row,) = [row for row in found.rows if row.event == "stop"]
    assert (row.lost, row.verdict, len(row.sound)) == ([0], "whole", 1)
    assert not found.is_comparable
    assert found.headline.startswith("NOT COMPARABLE: senders virtual stop 1000 run 2: pod1 > pod2")
    only_late = results(run("none"), late)
    assert verdicts(only_late)["stop"] == "not measured"


@pytest.mark.parametrize(
    "null",
    [
        run("none", result=result(lost=1)),
        run("none", leaked=2),
        run("none", error="nothing flows", result=None),
    ],
    ids=["lost", "leaked", "failed"],
)
def test_a_null_run_that_loses_makes_it_not_comparable(null: Run) -> None:
    found = results(run("none"), null, run("stop"))
    assert "NOT COMPARABLE: null test virtual 1000 run 1" in found.headline
    assert not found.is_comparable


def test_without_a_null_run_nothing_is_comparable() -> None:
    assert not results(run("stop")).is_comparable
    interrupted = results(run("none"), run("stop"))
    interrupted.is_partial = True
    assert not interrupted.is_comparable
    assert "PARTIAL" in interrupted.headline


def test_reports_hold_every_figure(tmp_path: Path) -> None:
    lossy = run("stop", 1, result=result(lost=3), leaked=2, leaks="2: 2 of 10.5.1.2 > 10.5.2.2")
    found = results(run("none"), run("stop"), lossy, replace="no --replace")
    write_restart_reports(found, tmp_path)
    document = json.loads((tmp_path / "restart.json").read_text())
    assert document["schema"] == 1
    row = next(each for each in document["rows"] if each["event"] == "stop")
    assert row["lost"] == {"median": 1.5, "max": 3, "sum": 3}
    assert (row["leaked"], row["sent"], row["verdict"]) == (2, 400, "leaks")
    assert len(document["runs"]) == 3
    direction = document["runs"][2]["result"]["directions"][0]
    assert direction["losses"] == [{"first": 0, "count": 3, "at_s": 0.0, "for_s": 0.002}]
    for width in (60, 300):
        console = Console(force_terminal=True, width=width, record=True, file=io.StringIO())
        for part in restart_parts(found):
            console.print(part, crop=False)
        text = console.export_text()
        assert "leaks" in text
        assert "2 of 10.5.1.2 > 10.5.2.2" in text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loads": ("fast",)}, "--loads fast: is neither tcp nor datagrams a second"),
        ({"loads": ("0",)}, "--loads 0"),
        ({"loads": ("1000000",)}, "--loads 1000000"),
        ({"only": ("reboot",)}, "--only reboot: no such event or lab; events: none, stop"),
    ],
)
def test_wrong_settings_say_what_there_is(settings: dict[str, tuple[str, ...]], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RestartSettings(**{"runs": 1, "loads": ("1000",), "only": (), **settings})  # type: ignore[arg-type]


def test_what_this_tundp_has_no_command_for_is_found_out() -> None:
    stop = restarts.STOP
    assert restarts.why_not(stop) is None
    known = dataclasses.replace(stop, needs=("status", "--json"))
    assert restarts.why_not(known) is None
    for needs in (("status", "--no-such-flag"), ("no-such-command", "usage")):
        unknown = dataclasses.replace(stop, needs=needs)
        assert restarts.why_not(unknown) == "this tundp has no SIGTERM, start again"
