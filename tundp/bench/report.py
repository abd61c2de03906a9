"""The report: a terminal table, report.md, and report.html that needs nothing but itself."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import RenderableType
from rich.text import Text

from tundp.bench.paths import BASELINE, NULL
from tundp.bench.results import Difference, Results, status_of, workload_named
from tundp.bench.stats import Estimate
from tundp.errors import Unsupported
from tundp.files import write_atomically
from tundp.finding import Finding
from tundp.layout import Cell, Column, Grid, Line
from tundp.printable import LINE_MAX, printable


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One cost column: which value, how it is headed and printed."""

    value: str
    head: str
    form: str = "{:.2f}"


COLUMNS: Final = (
    Measure(value="cpu_s_per_gb", head="CPU s/GB"),
    Measure(value="user_s_per_gb", head="user"),
    Measure(value="system_s_per_gb", head="system"),
    Measure(value="softirq_s_per_gb", head="softirq"),
    Measure(value="cpu_ns_per_packet", head="ns/pkt", form="{:.0f}"),
    Measure(value="syscalls_per_packet", head="calls/pkt"),
    Measure(value="crossings_per_packet", head="crossings/pkt"),
    Measure(value="copied_per_byte", head="B copied/B"),
    Measure(value="packets_per_encap_reads", head="pkts/TUN read", form="{:.1f}"),
    Measure(value="packets_per_encap_writes", head="pkts/send", form="{:.1f}"),
    Measure(value="packets_per_decap_reads", head="pkts/receive", form="{:.1f}"),
    Measure(value="packets_per_decap_writes", head="pkts/TUN write", form="{:.1f}"),
    Measure(value="wakeups_per_packet", head="wakeups/pkt", form="{:.3f}"),
    Measure(value="switches_per_packet", head="switches/pkt", form="{:.3f}"),
)
LATENCIES: Final = (
    *(
        Measure(value=f"p{p}_us", head=f"p{p} us", form="{:.0f}")
        for p in ("50", "90", "99", "99.9")
    ),
    Measure(value="transactions_per_s", head="per second", form="{:,.0f}"),
)
LOSS: Final = (
    Measure(value="loss", head="lost", form="{:.1%}"),
    Measure(value="gbps", head="Gbit/s"),
)
LAB_TEXT: Final = {
    "virtual": "virtual lab: veth passes super-packets whole, nothing is segmented or summed",
    "wire": "wire lab: MTU-size frames with finished checksums on the underlay",
}
_NOT_MEASURED: Final = "n/a"
_COMPARED: Final = 4
"""The last of the columns that say how a path compares; what it costs follows."""
_CELL_MAX: Final = 300
_BRIEF: Final = frozenset(
    {"cpu_s_per_gb", "cpu_ns_per_packet", "syscalls_per_packet", "loss", "p99_us"}
)
"""Columns that fit a terminal; the files have them all."""
_NOTES: Final = (
    "Medians over interleaved rounds; in brackets the bootstrap 95 % interval of the ratio to"
    " kernel VXLAN, paired by round. A verdict needs the interval to clear the noise, which is"
    " what VXLAN measured against itself; above 25 % of it nothing is compared. Same is an interval"
    " within 10 % of 1; undecided is what the noise leaves open.",
    "The row `bare` is a forwarder that reads super-packets from its TUN and sends each by"
    " UDP_SEGMENT, and the other way round, without lookup, checksums, counters or copies. It is no"
    " product: its inner checksums are wrong on the wire. It is no limit either: engines that copy"
    " packets into one piece have been faster than it is with its many pieces.",
    "CPU is the whole machine's, generators included, from /proc/stat. Syscalls, crossings,"
    " copies and wakeups are the daemons' own exact counters, both nodes; kernel paths have no"
    " daemon, so n/a. They are per packet that crossed the overlay, TCP's acknowledgements"
    " included; ns and switches are per MTU-size data segment of TCP, or per datagram.",
    "Packets per TUN read, send, receive and TUN write are means over data and acknowledgements"
    " alike, both nodes. Crossings are these four calls, per packet: 4 without super-packets."
    " What veth carries whole in the virtual lab shows in the mean frame size above.",
    "One machine plays both hosts: there is no NIC, no interrupt and no link limit, and both"
    " ends fight for the same cores.",
)


def write_reports(results: Results, directory: Path) -> list[str]:
    """results.json, report.md, report.html; what could not be made, for the user."""
    results.save(directory / "results.json")
    write_atomically(directory / "report.md", to_markdown(results))
    try:
        from tundp.bench.plots import draw

        plots = draw(results)
        missing = []
    except Unsupported as error:
        plots, missing = [], [str(error)]
    write_atomically(directory / "report.html", to_html(results, plots))
    return missing


def report_parts(results: Results) -> Iterator[RenderableType]:
    """The headline and the tables for a terminal; print them with `crop=False`."""
    yield Line(Text(results.headline, style="bold red" if results.reds else "bold green"))
    for lab in results.labs():
        for workload in results.workloads(lab):
            head, *rows = _table(results, lab, workload, is_brief=True)
            columns = [
                # What a path costs may be left out, last first; how it compares stays.
                Column(head=text, is_right=number > 0, spare=max(0, number - _COMPARED))
                for number, text in enumerate(head)
            ]
            yield Text()
            yield Grid(
                columns=columns, rows=rows, title=f"{lab} · {workload_named(workload).label}"
            )


def difference_parts(differences: Sequence[Difference]) -> Iterator[RenderableType]:
    """The table of `tundp bench diff`; print it with `crop=False`."""
    if not differences:
        yield Text("nothing in common to compare")
        return
    columns = [
        *(Column(head=head) for head in ("lab", "workload", "row", "value")),
        *(Column(head=head, is_right=True) for head in ("before", "after")),
        Column(head="noise", is_right=True, spare=1),
        Column(head="verdict"),
    ]
    rows: list[list[Cell]] = []
    for each in differences:
        colour = {"better": "green", "worse": "red", "gone": "red"}.get(each.verdict, "dim")
        rows.append(
            [
                each.lab,
                each.workload,
                each.row,
                each.metric,
                "-" if each.before is None else f"{each.before:.2f}x",
                "-" if each.after is None else f"{each.after:.2f}x",
                f"±{each.noise:.1%}",
                Text(each.verdict, style=colour),
            ]
        )
    yield Grid(columns=columns, rows=rows)


def to_markdown(results: Results) -> str:
    """report.md."""
    lines = ["# tundp bench", "", f"**{_markdown_cell(results.headline)}**", "", "## Validity", ""]
    lines += markdown_table([("check", "value", "", "why"), *map(check_row, results.checks)])
    lines += ["", "## Machine", ""]
    lines += markdown_table([("what", "value"), *results.environment.items()])
    lines += ["", "## Rows", ""]
    lines += markdown_table(_rows_table(results))
    for lab in results.labs():
        lines += ["", f"## {LAB_TEXT[lab]}"]
        for workload in results.workloads(lab):
            lines += ["", f"### {workload_named(workload).label}", ""]
            lines += markdown_table(_table(results, lab, workload))
    lines += ["", "## How to read this", "", *(f"- {note}" for note in _NOTES), ""]
    return "\n".join(lines)


def to_html(results: Results, plots: Sequence[tuple[str, str]]) -> str:
    """report.html; `plots` are captions and SVG texts."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>tundp bench</title>",
        f"<style>{_STYLE}</style><h1>tundp bench</h1>",
        f"<p class={'red' if results.reds or results.is_partial else 'green'}>"
        f"{_html(results.headline)}</p>",
        f"<p>{_html(results.started)}, profile {_html(results.profile)},"
        f" {len(results.samples)} measurements, tundp {_html(results.environment['tundp'])}"
        f" commit {_html(results.environment['commit'])}</p>",
    ]
    for caption, svg in plots:
        parts.append(
            f"<figure><figcaption>{_html(caption)}</figcaption>"
            f"<div class=scroll>{svg}</div></figure>"
        )
    parts.append("<h2>Validity</h2>")
    parts.append(
        _html_table(
            [("check", "value", "", "why"), *map(check_row, results.checks)],
            "What was asked of the machine: one red line, and the numbers are not comparable.",
        )
    )
    for lab in results.labs():
        parts.append(f"<h2>{html.escape(LAB_TEXT[lab])}</h2>")
        for workload in results.workloads(lab):
            kind = workload_named(workload)
            better = "more" if kind.more_is_better else "less"
            parts.append(f"<h3>{html.escape(kind.label)}</h3>")
            parts.append(
                _html_table(_table(results, lab, workload), f"{kind.unit}: {better} is better.")
            )
    parts.append("<h2>Rows</h2>")
    parts.append(_html_table(_rows_table(results), "Every path, and where it was measured."))
    parts.append("<h2>Machine</h2>")
    parts.append(_html_table([("what", "value"), *results.environment.items()], "What it ran on."))
    parts.append("<h2>How to read this</h2>")
    parts += [f"<p>{html.escape(note)}</p>" for note in _NOTES]
    return "\n".join(parts)


def _table(
    results: Results, lab: str, workload: str, *, is_brief: bool = False
) -> list[tuple[str, ...]]:
    """Head and rows of one workload in one lab, the baseline on top."""
    kind = workload_named(workload)
    columns = [c for c in _columns_of(workload) if not is_brief or c.value in _BRIEF]
    noise = results.noise(lab, workload, kind.headline)
    has_limit = any(
        results.of_limit(lab, row, workload, kind.headline) for row in results.row_names(lab)
    )
    head = (
        "path",
        kind.unit,
        "vs VXLAN",
        *(("of bare",) if has_limit else ()),
        "verdict"
        if noise is None
        else f"±{noise:.1%}"
        if is_brief
        else f"verdict (noise ±{noise:.1%})",
        *(column.head for column in columns),
    )
    rows = [head]
    for row in results.row_names(lab):
        cell = results.cell(lab, row, workload, kind.headline)
        ratio = results.ratio(lab, row, workload, kind.headline)
        is_baseline = row in (BASELINE, NULL)
        rows.append(
            (
                row if is_brief else results.label(row),
                _show(cell, "{:,.2f}"),
                _show_ratio(ratio, is_brief=is_brief),
                *(
                    (
                        _show_ratio(
                            results.of_limit(lab, row, workload, kind.headline), is_brief=is_brief
                        ),
                    )
                    if has_limit
                    else ()
                ),
                "-" if is_baseline else results.verdict(lab, row, workload),
                *(
                    _show(results.cell(lab, row, workload, column.value), column.form)
                    for column in columns
                ),
            )
        )
    return rows


def _columns_of(workload: str) -> tuple[Measure, ...]:
    if workload.startswith(("tcp_", "udp_")):
        return (*LATENCIES, *(c for c in COLUMNS if c.value not in _PER_BYTE))
    if workload.startswith("udp"):
        return (*LOSS, *COLUMNS)
    return COLUMNS


_PER_BYTE: Final = frozenset(
    {"cpu_s_per_gb", "user_s_per_gb", "system_s_per_gb", "softirq_s_per_gb", "copied_per_byte"}
)


def _rows_table(results: Results) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("row", "what", "virtual", "wire")]
    for name in dict.fromkeys(row.name for row in results.rows):
        by_lab = {row.lab: row for row in results.rows if row.name == name}
        rows.append(
            (
                name,
                next(iter(by_lab.values())).label,
                *(
                    (by_lab[lab].why_not or "measured") if lab in by_lab else "not asked for"
                    for lab in ("virtual", "wire")
                ),
            )
        )
    return rows


def check_row(check: Finding) -> tuple[str, ...]:
    """A line of the validity block."""
    return check.title, check.evidence, status_of(check), check.meaning


def _show(cell: Estimate | None, form: str) -> str:
    return _NOT_MEASURED if cell is None else form.format(cell.median)


def _show_ratio(ratio: Estimate | None, *, is_brief: bool) -> str:
    if ratio is None:
        return _NOT_MEASURED
    if is_brief:
        return f"{ratio.median:.2f}x"
    return f"{ratio.median:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; the first row is its head."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(map(_markdown_cell, cells)) + " |"

    head, *body = rows
    return [line(head), "|" + "---|" * len(head), *map(line, body)]


def _markdown_cell(text: str) -> str:
    """One line without markup of its own: reasons carry whatever a daemon's log said."""
    shown = printable(" ".join(text.split()), _CELL_MAX)
    return shown.replace("|", "\\|").replace("<", "&lt;")


def _html(text: str) -> str:
    """The same for the page."""
    return html.escape(printable(" ".join(text.split()), LINE_MAX))


_FIGURE: Final = re.compile(r"[-±]?\d[\d,.]*( ?%|x)?( \[[\d., ]*\])?|n/a|-")


def _html_table(rows: Sequence[Sequence[str]], caption: str) -> str:
    """A table that scrolls by itself where there is no room; columns of figures end in line."""
    head, *body = rows
    is_figures = [
        bool(body) and all(_FIGURE.fullmatch(row[at]) for row in body) for at in range(len(head))
    ]

    def cells(row: Sequence[str], tag: str) -> Iterator[str]:
        for cell, is_figure in zip(row, is_figures, strict=True):
            names = ["figure"] if is_figure else []
            names += [cell] if cell in ("better", "worse", "red", "INVALID") else []
            attribute = f' class="{" ".join(names)}"' if names else ""
            yield f"<{tag}{attribute}>{_html(cell)}</{tag}>"

    lines = [f"<caption>{_html(caption)}</caption>"]
    lines += [f"<tr>{''.join(cells(head, 'th'))}</tr>"]
    lines += [f"<tr>{''.join(cells(row, 'td'))}</tr>" for row in body]
    return f"<div class=scroll><table>{''.join(lines)}</table></div>"


_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; color: #222 }
table { border-collapse: collapse; font-size: 13px }
caption { caption-side: top; text-align: left; color: #555; padding-bottom: .3em }
td, th { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: left }
td.figure, th.figure { text-align: right; white-space: nowrap }
td:first-child, th:first-child { white-space: nowrap } th { border-bottom: 2px solid #888 }
.scroll { overflow-x: auto; margin: .5em 0 1.5em }
figure { margin: 1.5em 0 } figure svg { min-width: 640px; max-width: 100%; height: auto }
figcaption { color: #555 } .green, .better { color: #1a7f37; font-weight: 600 }
.red, .worse, .INVALID { color: #b42318; font-weight: 600 }
"""
