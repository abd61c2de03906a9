"""Tables and lines that fit where they are shown, and never lose a figure or a name.

Only a terminal has a width. There a table too wide for it is turned (fields become rows),
then shows large figures scaled (4.28 G), then leaves out the columns that matter least; what
remains is shown whole, whatever its width. In a pipe everything is exact, and a line a line.

Print with `crop=False`: a console's own cropping knows nothing of this.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from tundp.printable import LINE_MAX, printable

WRAPPED_MIN: Final = 20
"""Characters below which a wrapped column cannot be read."""
_UNLIMITED: Final = 1_000_000
_SCALES: Final = ("", " k", " M", " G", " T", " P", " E")


@dataclass(frozen=True, slots=True)
class Figure:
    """A count, to be shown exactly or, if there is no room, to three digits."""

    value: int

    @property
    def exact(self) -> str:
        """1,234,567."""
        return f"{self.value:,}"

    @property
    def scaled(self) -> str:
        """1.23 M, decimal; exact below ten thousand."""
        if abs(self.value) < 10_000:
            return self.exact
        number: float = self.value
        scale = 0
        while abs(number) >= 999.5 and scale + 1 < len(_SCALES):
            number /= 1000
            scale += 1
        return f"{number:.3g}{_SCALES[scale]}"


Cell = str | Text | Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column, or row once the table is turned."""

    head: str
    is_right: bool = False
    """Whether its cells end, rather than begin, in line."""
    wraps: bool = False
    """Whether its cells are sentences that may take several lines."""
    spare: int = 0
    """What is left out first when there is no room: the highest. 0 is never left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A table that chooses its form by the room there is. A column without content is left out."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    turns: bool = False
    """Whether it may be turned: for few rows of many figures."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        limit = options.max_width if console.is_terminal else _UNLIMITED
        unlimited = options.update(width=_UNLIMITED)
        for grid, is_scaled in _forms(_without_empty(self)):
            table = _table(grid, is_scaled=is_scaled)
            natural = Measurement.get(console, unlimited, table).maximum
            narrowest = natural - _slack(grid, is_scaled=is_scaled)
            if narrowest <= limit:
                break
        table.width = max(narrowest, min(natural, limit))
        if self.title:
            yield _uncut(Text(self.title, "italic"))
        yield table


@dataclass(frozen=True, slots=True)
class Line:
    """A sentence. On a terminal it is wrapped between words, what follows is indented."""

    text: Text
    indent: int = 4

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = _printable(self.text)
        if not console.is_terminal or text.cell_len <= options.max_width:
            yield _uncut(text)
            return
        room = max(WRAPPED_MIN, options.max_width - self.indent)
        for number, line in enumerate(text.divide(_breaks(text.plain, room))):
            line.rstrip()
            yield _uncut(Text(" " * self.indent) + line if number else line)


def _breaks(text: str, room: int) -> list[int]:
    """Where lines after the first begin; a word longer than `room` stays whole."""
    found = []
    end = 0
    for line in textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False):
        start = text.index(line, end)
        found.append(start)
        end = start + len(line)
    return found[1:]


def _without_empty(grid: Grid) -> Grid:
    kept = [
        at
        for at, column in enumerate(grid.columns)
        if column.spare == 0 or any(_plain(row[at]) for row in grid.rows)
    ]
    return _only(grid, kept)


def _forms(grid: Grid) -> Iterator[tuple[Grid, bool]]:
    """A grid from its fullest form to its narrowest; whether figures are scaled."""
    yield grid, False
    if grid.turns:
        yield _turned(grid), False
    yield grid, True
    while spare := max((column.spare for column in grid.columns), default=0):
        grid = _only(grid, [at for at, each in enumerate(grid.columns) if each.spare < spare])
        yield grid, False
        yield grid, True


def _only(grid: Grid, kept: Sequence[int]) -> Grid:
    return replace(
        grid,
        columns=[grid.columns[at] for at in kept],
        rows=[[row[at] for at in kept] for row in grid.rows],
    )


def _turned(grid: Grid) -> Grid:
    first, *others = grid.columns
    columns = [first, *(Column(head=_plain(row[0]), is_right=True) for row in grid.rows)]
    rows: list[list[Cell]] = [
        [column.head, *(row[at] for row in grid.rows)] for at, column in enumerate(others, 1)
    ]
    return Grid(columns=columns, rows=rows)


def _slack(grid: Grid, *, is_scaled: bool) -> int:
    """How much narrower than its content a table may become, by wrapping."""
    slack = 0
    for at, column in enumerate(grid.columns):
        if column.wraps:
            widths = (_shown(row[at], is_scaled=is_scaled).cell_len for row in grid.rows)
            slack += max(0, max(widths, default=0) - max(WRAPPED_MIN, len(column.head)))
    return slack


def _table(grid: Grid, *, is_scaled: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column in grid.columns:
        table.add_column(
            Text(column.head),
            justify="right" if column.is_right else "left",
            no_wrap=not column.wraps,
            overflow="fold",
        )
    for row in grid.rows:
        table.add_row(*(_shown(cell, is_scaled=is_scaled) for cell in row))
    return table


def _uncut(text: Text) -> Text:
    copy = text.copy()
    copy.no_wrap, copy.overflow = True, "ignore"
    return copy


def _shown(cell: Cell, *, is_scaled: bool) -> Text:
    if isinstance(cell, Figure):
        return Text(cell.scaled if is_scaled else cell.exact)
    return _printable(cell if isinstance(cell, Text) else Text(cell))


def _printable(text: Text) -> Text:
    """The same, or without its colours if something in it must not reach a terminal."""
    shown = printable(text.plain, LINE_MAX)
    return text if shown is text.plain else Text(shown, text.style)


def _plain(cell: Cell) -> str:
    return _shown(cell, is_scaled=False).plain
