"""The report: a terminal table, report.md, and report.html that needs nothing but itself."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tundp.bench.paths import BASELINE, NULL
from tundp.bench.results import Difference, Results, status_of, workload_named
from tundp.bench.stats import Estimate
from tundp.errors import Unsupported
from tundp.files import write_atomically
from tundp.finding import Finding


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One cost column: which value, how it is headed and printed."""

    value: str
    head: str
    form: str = "{:.2f}"


COLUMNS: Final = (
    Column(value="cpu_s_per_gb", head="CPU s/GB"),
    Column(value="user_s_per_gb", head="user"),
    Column(value="system_s_per_gb", head="system"),
    Column(value="softirq_s_per_gb", head="softirq"),
    Column(value="cpu_ns_per_packet", head="ns/pkt", form="{:.0f}"),
    Column(value="syscalls_per_packet", head="calls/pkt"),
    Column(value="crossings_per_packet", head="crossings/pkt"),
    Column(value="copied_per_byte", head="B copied/B"),
    Column(value="packets_per_encap_reads", head="pkts/TUN read", form="{:.1f}"),
    Column(value="packets_per_encap_writes", head="pkts/send", form="{:.1f}"),
    Column(value="packets_per_decap_reads", head="pkts/receive", form="{:.1f}"),
    Column(value="packets_per_decap_writes", head="pkts/TUN write", form="{:.1f}"),
    Column(value="wakeups_per_packet", head="wakeups/pkt", form="{:.3f}"),
    Column(value="switches_per_packet", head="switches/pkt", form="{:.3f}"),
)
LATENCIES: Final = (
    *(Column(value=f"p{p}_us", head=f"p{p} us", form="{:.0f}") for p in ("50", "90", "99", "99.9")),
    Column(value="transactions_per_s", head="per second", form="{:,.0f}"),
)
LOSS: Final = (
    Column(value="loss", head="lost", form="{:.1%}"),
    Column(value="gbps", head="Gbit/s"),
)
LAB_TEXT: Final = {
    "virtual": "virtual lab: veth passes super-packets whole, nothing is segmented or summed",
    "wire": "wire lab: MTU-size frames with finished checksums on the underlay",
}
_NOT_MEASURED: Final = "n/a"
_CELL_MAX: Final = 300
_BRIEF: Final = frozenset(
    {"cpu_s_per_gb", "cpu_ns_per_packet", "syscalls_per_packet", "loss", "p99_us"}
)
"""Columns that fit a terminal; the files have them all."""
_NOTES: Final = (
    "Medians over interleaved rounds; in brackets the bootstrap 95 % interval of the ratio to"
    " kernel VXLAN, paired by round. A verdict needs the interval to clear the noise, which is"
    " what VXLAN measured against itself.",
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


def print_report(results: Results, console: Console) -> None:
    """The tables on a terminal."""
    console.print(Text(results.headline, style="bold red" if results.reds else "bold green"))
    for lab in results.labs():
        for workload in results.workloads(lab):
            table = Table(
                title=f"{lab} · {workload_named(workload).label}",
                title_justify="left",
                box=box.SIMPLE_HEAD,
                pad_edge=False,
            )
            head, *rows = _table(results, lab, workload, is_brief=True)
            for number, text in enumerate(head):
                table.add_column(text, justify="left" if number == 0 else "right", no_wrap=True)
            for row in rows:
                table.add_row(*map(Text, row))
            console.print(table)


def print_difference(differences: Sequence[Difference], console: Console) -> None:
    """The table of `tundp bench diff`."""
    table = Table(box=box.SIMPLE_HEAD)
    for text in ("lab", "workload", "row", "value", "before", "after", "noise", "verdict"):
        table.add_column(text)
    for each in differences:
        colour = {"better": "green", "worse": "red", "gone": "red"}.get(each.verdict, "dim")
        table.add_row(
            each.lab,
            each.workload,
            each.row,
            each.metric,
            "-" if each.before is None else f"{each.before:.2f}x",
            "-" if each.after is None else f"{each.after:.2f}x",
            f"±{each.noise:.1%}",
            Text(each.verdict, style=colour),
        )
    console.print(table)


def to_markdown(results: Results) -> str:
    """report.md."""
    lines = ["# tundp bench", "", f"**{results.headline}**", "", "## Validity", ""]
    lines += _markdown_table([("check", "value", "", "why"), *map(_check_row, results.checks)])
    lines += ["", "## Machine", ""]
    lines += _markdown_table([("what", "value"), *results.environment.items()])
    lines += ["", "## Rows", ""]
    lines += _markdown_table(_rows_table(results))
    for lab in results.labs():
        lines += ["", f"## {LAB_TEXT[lab]}"]
        for workload in results.workloads(lab):
            lines += ["", f"### {workload_named(workload).label}", ""]
            lines += _markdown_table(_table(results, lab, workload))
    lines += ["", "## How to read this", "", *(f"- {note}" for note in _NOTES), ""]
    return "\n".join(lines)


def to_html(results: Results, plots: Sequence[tuple[str, str]]) -> str:
    """report.html; `plots` are captions and SVG texts."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>tundp bench</title>",
        f"<style>{_STYLE}</style><h1>tundp bench</h1>",
        f"<p class={'red' if results.reds or results.is_partial else 'green'}>"
        f"{html.escape(results.headline)}</p>",
        f"<p>{html.escape(results.started)}, profile {html.escape(results.profile)},"
        f" {len(results.samples)} measurements, tundp {html.escape(results.environment['tundp'])}"
        f" commit {html.escape(results.environment['commit'])}</p>",
    ]
    for caption, svg in plots:
        parts.append(f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>")
    parts.append("<h2>Validity</h2>")
    parts.append(_html_table([("check", "value", "", "why"), *map(_check_row, results.checks)]))
    for lab in results.labs():
        parts.append(f"<h2>{html.escape(LAB_TEXT[lab])}</h2>")
        for workload in results.workloads(lab):
            parts.append(f"<h3>{html.escape(workload_named(workload).label)}</h3>")
            parts.append(_html_table(_table(results, lab, workload)))
    parts.append("<h2>Rows</h2>" + _html_table(_rows_table(results)))
    parts.append(
        "<h2>Machine</h2>" + _html_table([("what", "value"), *results.environment.items()])
    )
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
    head = (
        "path",
        kind.unit,
        "vs VXLAN",
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
                "-" if is_baseline else results.verdict(lab, row, workload),
                *(
                    _show(results.cell(lab, row, workload, column.value), column.form)
                    for column in columns
                ),
            )
        )
    return rows


def _columns_of(workload: str) -> tuple[Column, ...]:
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


def _check_row(check: Finding) -> tuple[str, ...]:
    return check.title, check.evidence, status_of(check), check.meaning


def _show(cell: Estimate | None, form: str) -> str:
    return _NOT_MEASURED if cell is None else form.format(cell.median)


def _show_ratio(ratio: Estimate | None, *, is_brief: bool) -> str:
    if ratio is None:
        return _NOT_MEASURED
    if is_brief:
        return f"{ratio.median:.2f}x"
    return f"{ratio.median:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"


def _markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(map(_markdown_cell, cells)) + " |"

    head, *body = rows
    return [line(head), "|" + "---|" * len(head), *map(line, body)]


def _markdown_cell(text: str) -> str:
    """One line without markup of its own: reasons carry whatever a daemon's log said."""
    line = " ".join(text.split())
    shown = line if len(line) <= _CELL_MAX else f"{line[: _CELL_MAX - 3]}..."
    return shown.replace("|", "\\|").replace("<", "&lt;")


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    def cells(row: Sequence[str], tag: str) -> Iterator[str]:
        for cell in row:
            name = f" class={cell}" if cell in ("better", "worse", "red", "INVALID") else ""
            yield f"<{tag}{name}>{html.escape(cell)}</{tag}>"

    head, *body = rows
    lines = [f"<tr>{''.join(cells(head, 'th'))}</tr>"]
    lines += [f"<tr>{''.join(cells(row, 'td'))}</tr>" for row in body]
    return f"<table>{''.join(lines)}</table>"


_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; color: #222 }
table { border-collapse: collapse; margin: .5em 0 1.5em; font-size: 13px }
td, th { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left; white-space: nowrap }
td:last-child { min-width: 4em } th { border-bottom: 2px solid #888 }
figure { margin: 1.5em 0 } figure svg { max-width: 100%; height: auto }
figcaption { color: #555 } .green, .better { color: #1a7f37; font-weight: 600 }
.red, .worse, .INVALID { color: #b42318; font-weight: 600 }
"""
