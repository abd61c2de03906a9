"""The report of `tundp bench restart`: a table for a terminal, restart.md, restart.json."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from rich.console import RenderableType
from rich.text import Text

from tundp.bench.report import LAB_TEXT, check_row, markdown_table
from tundp.bench.restart_results import FULL_TCP, RestartResults, Row, spread
from tundp.files import write_atomically
from tundp.layout import Cell, Column, Grid, Line

JSON: Final = "restart.json"
MARKDOWN: Final = "restart.md"
_COLOURS: Final = {"whole": "green", "loses": "red", "leaks": "bold red", "failed": "bold red"}
_HEAD: Final = (
    *("event", "verdict", "runs", "lost, median (max)", "of", "leaked"),
    *("longest silence, median (max)", "twice", "out of order", "TCP resets", "ready after"),
)
_WORDS: Final = 2
"""Columns of words; figures follow."""
_NEEDED: Final = 7
"""Columns that stay whatever the terminal's width."""
_NOTES: Final = (
    "Numbered datagrams both ways between two pods, each behind a bridge, and a TCP stream of"
    " 1 MB/s beside them; the load `tcp` is one stream at full speed alone. Node 1's daemon is"
    " restarted.",
    "Lost is what never came, of both directions; leaked is what a decoy for the default gateway of"
    " both nodes saw of the overlay, in all runs. Silence is the longest time between two arrivals"
    " of one direction, of the stream where there are no datagrams.",
    "A row is whole if in every run each datagram came once and in order, no stream was reset and"
    " nothing leaked. An event this tundp has no command for is not available, and no pass.",
    "One machine plays both nodes: whoever starts a daemon here fights it for the same cores.",
)


def restart_parts(results: RestartResults) -> Iterator[RenderableType]:
    """The headline and the tables for a terminal; print them with `crop=False`."""
    style = "bold green" if results.is_comparable else "bold red"
    yield Line(Text(results.headline, style=style))
    for lab, load, rows in _tables(results):
        columns = [
            Column(head=head, is_right=at >= _WORDS, spare=max(0, at - _NEEDED + 1))
            for at, head in enumerate(_HEAD)
        ]
        yield Text()
        yield Grid(
            columns=columns,
            rows=[_coloured(row) for row in rows],
            title=f"{lab} · {_load_text(load)}",
        )
    for row in results.rows:
        for text in dict.fromkeys(run.leaks for run in row.runs if run.leaks):
            yield Line(Text(f"leaked, {row.lab} {row.event} {row.load}: {text}", style="red"))
        for text in dict.fromkeys(run.error for run in row.runs if run.error):
            yield Line(Text(f"failed, {row.lab} {row.event} {row.load}: {text}", style="red"))


def write_restart_reports(results: RestartResults, directory: Path) -> None:
    """restart.json and restart.md."""
    results.save(directory / JSON)
    write_atomically(directory / MARKDOWN, to_markdown(results))


def to_markdown(results: RestartResults) -> str:
    """restart.md."""
    lines = ["# tundp bench restart", "", f"**{results.headline}**", "", "## Validity", ""]
    lines += markdown_table([("check", "value", "", "why"), *map(check_row, results.all_checks)])
    lines += ["", "## Machine", ""]
    lines += markdown_table([("what", "value"), *results.environment.items()])
    for lab, load, rows in _tables(results):
        lines += ["", f"## {LAB_TEXT[lab]}: {_load_text(load)}", ""]
        lines += markdown_table([_HEAD, *map(_cells, rows)])
    lines += ["", "## How to read this", "", *(f"- {note}" for note in _NOTES), ""]
    return "\n".join(lines)


def _tables(results: RestartResults) -> Iterator[tuple[str, str, list[Row]]]:
    for lab in results.settings.labs:
        for load in results.settings.loads:
            yield lab, load, [row for row in results.rows if (row.lab, row.load) == (lab, load)]


def _load_text(load: str) -> str:
    if load == FULL_TCP:
        return "one TCP stream at full speed"
    return f"{int(load):,} datagrams a second each way"


def _coloured(row: Row) -> list[Cell]:
    event, verdict, *figures = _cells(row)
    return [event, Text(verdict, style=_COLOURS.get(row.verdict, "dim")), *figures]


def _cells(row: Row) -> tuple[str, ...]:
    if row.why_not is not None or not row.sound:
        reason = row.why_not or next((run.error for run in row.runs if run.error), "no sound run")
        return row.label, f"{row.verdict}: {reason}", str(len(row.runs)), *["-"] * 8
    runs = f"{len(row.sound)} of {len(row.runs)}"
    sent = sum(each.sent for each in row.sound)
    return (
        row.label,
        row.verdict,
        runs,
        _spread(row.lost, "{:,.0f}") if sent else "-",
        f"{sent:,}" if sent else "-",
        str(row.leaked),
        _spread([each * 1e3 for each in row.silences_s], "{:,.0f}") + " ms",
        str(sum(each.duplicates for each in row.sound)),
        str(sum(each.reordered for each in row.sound)),
        str(row.resets),
        _spread([run.took_s for run in row.runs if run.is_sound], "{:.2f}") + " s",
    )


def _spread(values: list[int] | list[float], form: str) -> str:
    found = spread(values)
    if found is None:
        return "-"
    return f"{form.format(found['median'])} ({form.format(found['max'])})"
