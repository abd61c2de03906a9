"""What people read of `tundp matrix`: a line a peer, the grid of all nodes, what is in trouble.

Everything here returns renderables; the command line prints them, with `crop=False`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from rich.console import RenderableType
from rich.text import Text

from tundp.layout import Cell as GridCell
from tundp.layout import Column, Grid, Line
from tundp.observe.matrix import Cell, Matrix, MatrixNode, MatrixOutcome, Reached
from tundp.observe.ping import Answer
from tundp.printable import LINE_MAX, printable
from tundp.show_ping import milliseconds

FOLDED: Final = 40
"""Nodes from which on the grid has those with trouble only."""
SENTENCES: Final = 20
_OUTCOMES: Final = {
    MatrixOutcome.OK: ("ok:", "green"),
    MatrixOutcome.PARTLY: ("partly:", "yellow"),
    MatrixOutcome.SILENT: ("FAILS:", "red"),
}
_CONTROL: Final = {
    Answer.SILENT: "daemon silent",
    Answer.OFF: "not asked (peer tools off)",
    Answer.NOT_SENT: "not sent",
    Answer.NOT_ASKED: "not asked",
}


def matrix_parts(found: Matrix) -> Iterator[RenderableType]:
    """The table, the grid, what somebody should look at, and what it comes to."""
    numbers = {str(row.subnet): number for number, row in enumerate(found.rows, 1)}
    yield Line(Text(f"{found.node} at {found.public_ip} asked {len(found.peers)} peers"))
    yield Text()
    yield peers_grid(found.peers, numbers)
    if len(found.rows) > 1:
        yield Text()
        yield from _mesh(found, numbers)
    yield Text()
    for sentence in found.sentences[:SENTENCES]:
        yield Line(Text(printable(sentence, LINE_MAX), "yellow"))
    if (more := len(found.sentences) - SENTENCES) > 0:
        yield Line(Text(f"and {more:,} more: -o json", "yellow"))
    for note in found.notes:
        yield Line(Text(f"note: {printable(note, LINE_MAX)}"))
    mark, colour = _OUTCOMES[found.outcome]
    yield Line(Text.assemble((mark, colour), f" {_summary(found)}  ({found.took_s:.1f} s)"))


def peers_grid(peers: Sequence[MatrixNode], numbers: Mapping[str, int]) -> Grid:
    """A line a peer, the worst first."""
    columns = (
        Column(head="#", is_right=True, spare=3),
        Column(head="peer subnet"),
        Column(head="at"),
        Column(head="host", spare=4),
        Column(head="underlay", is_right=True, spare=1),
        Column(head="overlay", is_right=True),
        Column(head="lost", is_right=True),
        Column(head="path MTU", is_right=True, spare=1),
        Column(head="what answers", spare=2),
    )
    rows: list[list[GridCell]] = [
        [
            str(numbers.get(str(peer.subnet), "")),
            str(peer.subnet),
            str(peer.public_ip),
            peer.host,
            _time(peer.underlay_rtt_ms, is_asked=peer.is_asked),
            _time(peer.overlay_rtt_ms, is_asked=peer.is_asked),
            Text(f"{peer.lost}/{peer.sent}", "red" if peer.lost else "") if peer.sent else "",
            _mtu(peer),
            peer.implementation or (_CONTROL.get(peer.control, "") if peer.is_asked else ""),
        ]
        for peer in peers
    ]
    return Grid(columns=columns, rows=rows or [["", "none yet", *[""] * 7]])


def _time(rtt_ms: float | None, *, is_asked: bool) -> Text:
    if rtt_ms is not None:
        return Text(milliseconds(rtt_ms))
    return Text("x", "red") if is_asked else Text("?", "yellow")


def _mtu(peer: MatrixNode) -> Text:
    if peer.is_full_size_lost:
        return Text(f"<{peer.path_mtu}!", "red")
    return Text("" if peer.path_mtu is None else str(peer.path_mtu))


def _mesh(found: Matrix, numbers: Mapping[str, int]) -> Iterator[RenderableType]:
    """Rows: who tells; columns: of whom."""
    shown = list(numbers)
    if len(shown) > FOLDED:
        trouble = _troubled(found)
        shown = [each for each in shown if each in trouble]
        yield Line(
            Text(
                f"{len(numbers)} nodes: the grid has the {len(shown)} with trouble, without"
                f" {len(numbers) - len(shown)} others; -o json has all"
            )
        )
        if not shown:
            return
    columns = [
        Column(head="from \\ to", is_right=False),
        *(Column(head=str(numbers[each]), is_right=True) for each in shown),
    ]
    rows: list[list[GridCell]] = []
    silent_rows = []
    for row in found.rows:
        name = str(row.subnet)
        if name not in shown:
            continue
        label = f"{numbers[name]} {name}"
        if not row.is_told:
            silent_rows.append((numbers[name], row.why_not))
        rows.append([label, *(_cell(name, to, row.reached, is_told=row.is_told) for to in shown)])
    yield Grid(columns=columns, rows=rows)
    yield Line(
        Text(
            "ms of the last echo request that was answered; ok: packets come, not asked; x: nothing"
            " comes back; ?: nothing known, as of pairs that exchange nothing"
        )
    )
    for why in dict.fromkeys(why for _, why in silent_rows):
        who = ", ".join(str(number) for number, each in silent_rows if each == why)
        yield Line(Text(f"row {who}: {printable(why, LINE_MAX)}"))


def _cell(one: str, other: str, reached: Mapping[str, Reached], *, is_told: bool) -> Text:
    if one == other:
        return Text("-")
    if not is_told:
        return Text("?")
    each = reached.get(other)
    if each is None or each.cell is Cell.UNKNOWN:
        return Text("?")
    if each.cell is Cell.SILENT:
        return Text("x", "red")
    return Text("ok" if each.rtt_ms is None else f"{each.rtt_ms:.2f}", "green")


def _troubled(found: Matrix) -> set[str]:
    """Nodes that somebody does not hear, or that do not hear somebody."""
    names = {
        name
        for row in found.rows
        for to, each in row.reached.items()
        if each.cell is Cell.SILENT
        for name in (str(row.subnet), to)
    }
    return names | {str(peer.subnet) for peer in found.peers if peer.urgency < 2}


def _summary(found: Matrix) -> str:
    answering = sum(peer.is_reached for peer in found.peers)
    asked = sum(peer.is_asked for peer in found.peers)
    text = f"{answering} of {asked} peers asked answer through the overlay"
    pairs = sum(row.is_told for row in found.rows[1:])
    return f"{text}; {pairs} of {len(found.rows[1:])} told how they reach the others"
