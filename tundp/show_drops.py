"""What people read of dropped packets: the table of `tundp drops`, and a line for each with -f.

Everything here returns renderables; the command line prints them, with `crop=False`.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from tundp.layout import Cell, Column, Figure, Grid, Line
from tundp.observe.drops import DropExample, DropRow, DropsReport
from tundp.observe.skb_steps import SkbStep
from tundp.show_chaos import chaos_line
from tundp.wire.drop import DropReason

_REASONS = {reason.label: reason for reason in DropReason}


def drops_parts(report: DropsReport) -> Iterator[RenderableType]:
    """The whole report: chaos, reasons, what the kernel dropped, the balance, what was not seen."""
    for each in report.chaos:
        yield chaos_line(each, report.at)
    if report.filter:
        yield Line(Text(f"selected: {report.filter}"))
    if report.drops:
        yield _grid(report)
        yield Text()
        yield from map(_meaning, report.drops)
    else:
        yield Line(Text("no drops selected" if report.filter else "no drops"))
    if report.undecided:
        yield Line(
            Text.assemble(
                ("not looked at: ", "yellow"),
                f"{', '.join(report.undecided)}: no packet of these is recorded",
            )
        )
    if not report.is_exact:
        yield Line(
            Text(
                "counts are of all packets of a reason; the last packets recorded of each decided"
                " which reasons are shown"
            )
        )
    for note in report.notes:
        yield Line(Text.assemble(("note: ", "yellow"), note))
    if report.drops or report.kernel or report.kernel_seen:
        yield Text()
    yield from _seen_lines(report)
    yield from _kernel_lines(report)
    for balance in report.balances:
        verdict = ("holds", "green") if balance.holds else ("VIOLATED", "red")
        yield Line(
            Text.assemble(
                f"{balance.direction}: {balance.packets_in:,} in = {balance.packets_out:,} out +"
                f" {balance.dropped:,} dropped: ",
                verdict,
            )
        )
    if report.chaos:
        yield Line(Text("what chaos lost is in no reason above: encap counts it as out"))


def event_line(example: DropExample) -> Line:
    """One drop as it happens: when, which way, why, which packet, and what that means."""
    at = time.strftime("%H:%M:%S", time.localtime(example.at))
    text = Text.assemble(
        f"{at}.{int(example.at % 1 * 1e6):06d} {example.direction} ",
        (example.reason, "yellow"),
        f" {example.words}",
    )
    if example.packets > 1:
        text.append(f" ({example.packets} packets)")
    if example.peer is not None:
        text.append(f" peer {example.peer}")
    if example.error:
        text.append(f" {errno.errorcode.get(example.error, f'errno {example.error}')}")
    if (known := _REASONS.get(example.reason)) is not None:
        text.append(f": {known.means}")
    return Line(text)


def skb_line(step: SkbStep) -> Line:
    """One drop of the kernel as it happens."""
    at = step.drop.time_ns / 1e9
    return Line(
        Text.assemble(
            f"{time.strftime('%H:%M:%S', time.localtime(at))}.{int(at % 1 * 1e6):06d} kernel ",
            (step.drop.reason, "yellow"),
            f" {step.words}{step.where}: {step.means}",
        )
    )


def _grid(report: DropsReport) -> Grid:
    columns = (
        Column(head="reason"),
        Column(head="packets", is_right=True),
        Column(head="rate", is_right=True, spare=3),
        Column(head="last", is_right=True, spare=1),
        Column(head="peer", spare=2),
        Column(head="last packet", wraps=True),
    )
    return Grid(columns=columns, rows=[_cells(row, report.at) for row in report.drops])


def _cells(row: DropRow, now: float) -> list[Cell]:
    words = "" if row.example is None else row.example.words
    if row.example is not None and row.example.error:
        words += f", {errno.errorcode.get(row.example.error, row.example.error)}"
    return [
        Text(f"{row.direction} {row.reason}", "yellow"),
        Figure(row.count),
        "" if row.rate is None else f"{row.rate:,.0f}/s",
        "" if row.last is None else _age(now - row.last),
        row.peer or "",
        words,
    ]


def _meaning(row: DropRow) -> Line:
    name = (f"{row.direction} {row.reason}", "yellow")
    text = "; ".join(filter(None, (row.means, row.next_step)))
    return Line(Text.assemble(name, f": {text}"))


def _seen_lines(report: DropsReport) -> Iterator[Line]:
    """What the kernel dropped while the command looked."""
    if report.kernel_seen is None:
        return
    seconds = f"{report.kernel_looked_s or 0:.1f} s"
    if report.kernel_seen or report.kernel_lost:
        yield Line(Text(f"dropped by the kernel in these {seconds}:"))
    else:
        yield Line(Text(f"the kernel dropped none in these {seconds}"))
    for row in report.kernel_seen:
        where = f" in {row.function}" if row.function else ""
        device = f", {row.device}" if row.device else ""
        device += " of the pod" if row.is_in_pod else ""
        peer = f", datagrams, peer {row.peer}" if row.is_outer else ""
        text = f" {row.count:,}{where}{device}{peer}: {row.means}; {row.next_step}"
        name = (f"  {row.direction} {row.reason}", "yellow")
        yield Line(Text.assemble(name, f"{text.rstrip('; ')}; last: {row.example}"), indent=6)
    if report.kernel_lost:
        yield Line(Text(f"  {report.kernel_lost:,} came too fast to be looked at"))


def _kernel_lines(report: DropsReport) -> Iterator[Line]:
    ours = [each for each in report.kernel if each.is_ours]
    others = [each for each in report.kernel if not each.is_ours]
    for each in ours:
        yield _kernel_line(each.name, each.count, each.means, each.next_step)
    if others:
        yield Line(
            Text(
                "dropped by the kernel in this network namespace since it was made, by whomever"
                " it was sent:"
            )
        )
    for each in others:
        yield _kernel_line(f"  {each.name}", each.count, each.means, each.next_step)


def _kernel_line(name: str, count: int, means: str, next_step: str) -> Line:
    return Line(Text.assemble((name, "yellow"), f" {count:,}: {means}; {next_step}"), indent=6)


def _age(seconds: float) -> str:
    """0.4 s, 59 s, 5 min, 7 h, 12 d."""
    if seconds < 10:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if whole >= 2 * length:
            return f"{whole // length} {unit}"
    return f"{whole} s"
