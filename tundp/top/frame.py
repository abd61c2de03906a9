"""One round of `tundp top` as lines of text: as many as fit on a screen, or all for a pipe. Pure.

No line is wider than the screen: what does not fit is left out whole, columns by their worth.
Only rows that fit are made into text.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto, unique
from typing import Final

from rich.cells import cell_len, set_cell_size

from tundp.observe.top import DirectionRate, TopRound
from tundp.printable import LINE_MAX, printable
from tundp.top.columns import (
    COLUMNS,
    Shown,
    cell,
    exact,
    figure,
    fit_columns,
    is_trouble,
    rows_of,
    since,
    sorted_rows,
)
from tundp.top.view import KEYS, View

_TALL: Final = 14
"""Lines of a screen from which CPU time and an empty line have room."""
_HINT: Final = ("? help", "q quit", "TAB view", "< > sort", "r reverse", "f filter", "SPACE pause")
"""What the last line offers, as far as there is room."""
_ASCII: Final = str.maketrans({"…": "~", "µ": "u"})


@unique
class Style(Enum):
    """How a line is drawn."""

    PLAIN = auto()
    BOLD = auto()
    HEAD = auto()
    DIM = auto()
    WARNING = auto()


@dataclass(frozen=True, slots=True)
class Line:
    """One line, no wider than the screen."""

    text: str
    style: Style = Style.PLAIN
    mark: tuple[int, int] | None = None
    """Where in it the head of the column that is sorted by begins and ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Where the lines go."""

    width: int | None
    """Characters of a line; None: as many as wanted."""
    height: int | None
    """Lines; None: likewise."""
    is_exact: bool = False
    """Whether figures have every digit, as in a pipe."""


def plain_ascii(text: str) -> str:
    """The same for a terminal, a file or a pipe that takes no other characters."""
    return text.translate(_ASCII).encode("ascii", "backslashreplace").decode("ascii")


def screen(found: TopRound | None, view: View, size: Size, trouble: str = "") -> list[Line]:
    """The whole screen. found: the last round, None before there is one.

    trouble: what keeps figures from coming; empty if nothing does.
    """
    height = size.height or 0
    if view.has_help:
        return _cut([Line("keys of tundp top", Style.BOLD), *map(Line, _key_lines(size))], size)
    is_tall = height >= _TALL
    lines = []
    if found is not None:
        lines += [Line(_title(found, view, size), Style.BOLD)]
        lines += [Line(_direction(each, size)) for each in found.directions]
        if is_tall:
            lines += [Line(text) for text in _cpu(found, size)]
    lines += [_message(found, view, size, trouble)]
    if is_tall:
        lines.append(Line(""))
    if found is not None:
        room = max(0, height - len(lines) - 2)
        view.page = room
        lines += _table(found, view, size, room)
    lines = lines[: max(0, height - 1)]
    lines += [Line("")] * (height - 1 - len(lines))
    lines.append(_last_line(view, size))
    return _cut(lines[:height], size)


def plain(found: TopRound, view: View, size: Size, rows: int | None) -> Iterator[str]:
    """A round as text, at most so many rows of its table."""
    yield _title(found, view, size)
    yield from (_direction(each, size) for each in found.directions)
    yield from _cpu(found, size)
    yield from _notes(found, view)
    yield from (line.text.rstrip() for line in _table(found, view, size, rows))


def _cut(lines: Sequence[Line], size: Size) -> list[Line]:
    """The last resort: whatever is too wide ends at the edge."""
    width = size.width
    return [
        line
        if width is None or cell_len(line.text) <= width
        else Line(set_cell_size(line.text, width), line.style, line.mark)
        for line in lines
    ]


def _fit(parts: Sequence[str], size: Size, between: str = "  ") -> str:
    """As many of the parts as have room, from the first one on."""
    text = ""
    for part in filter(None, parts):
        longer = f"{text}{between}{part}" if text else part
        if size.width is not None and text and len(longer) > size.width:
            break
        text = longer
    return printable(text, LINE_MAX)


def _title(found: TopRound, view: View, size: Size) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(found.at))
    every = f"every {found.interval_s:g} s"
    parts = (
        f"tundp {found.node or '(no lease yet)'}",
        clock,
        "PAUSED" if view.is_paused else every,
        f"{found.peers_total:,} peers",
        f"{found.silent_peers} silent" if found.silent_peers else "",
        f"{found.engine or 'kernel'} engine",
        f"pid {found.pid}, up {since(found.uptime_s)}",
        found.subnet,
    )
    return _fit(parts, size)


def _direction(each: DirectionRate, size: Size) -> str:
    number = exact if size.is_exact else figure
    parts = [
        f"{each.direction}: {number(each.packets_s)} p/s",
        f"{number(each.bits_s)} b/s",
        f"{number(each.drops_s)} dropped/s" if each.drops_s or size.is_exact else "",
        "" if each.packets_per_read is None else f"{each.packets_per_read:g} packets/read",
        "" if each.packets_per_write is None else f"{each.packets_per_write:g}/write",
        f"{number(each.reads_s)} reads/s",
        f"{number(each.writes_s)} writes/s",
    ]
    return _fit(parts, size)


def _cpu(found: TopRound, size: Size) -> Iterator[str]:
    number = exact if size.is_exact else figure
    parts = [
        f"{each.name} {each.user:.0%} user {each.system:.0%} system"
        + (f" ({each.threads} threads)" if each.threads > 1 and each.name == "packets" else "")
        for each in found.threads
    ]
    if not parts:
        parts = ["not seen from here" if found.seconds else "not known yet"]
    calls = f"{number(found.syscalls_s)} syscalls/s" if found.engine else ""
    queue = f"TUN queue dropped {found.tun_queue_drops:,}" if found.tun_queue_drops else ""
    yield _fit([f"cpu: {parts[0]}", *parts[1:], calls, queue], size)


def _notes(found: TopRound, view: View) -> Iterator[str]:
    yield from found.notes
    flows = found.flows
    if view.shown is not Shown.FLOWS or flows is None:
        return
    if flows.filter:
        yield f"filter: {flows.filter}"
    if flows.error:
        yield flows.error
    if flows.lost:
        share = flows.records / (flows.records + flows.lost)
        yield (
            f"sampled: {flows.lost:,} of {flows.records + flows.lost:,} records lost, rates are"
            f" estimates from {share:.0%} of them; a narrower filter loses fewer"
        )
    if flows.unlisted:
        yield f"too many flows: {flows.unlisted:,} packets are of flows not listed"


def _message(found: TopRound | None, view: View, size: Size, trouble: str) -> Line:
    """What matters most: that no figures come; else what was not seen; else what is shown."""
    if trouble:
        return Line(printable(trouble, LINE_MAX), Style.WARNING)
    if found is None:
        return Line("asking the daemon")
    if notes := list(_notes(found, view)):
        style = Style.PLAIN if notes[0].startswith("filter:") else Style.WARNING
        return Line(_fit(notes, size, "; "), style)
    if not found.seconds:
        return Line("rates come with the next look", Style.DIM)
    return Line("")


def _last_line(view: View, size: Size) -> Line:
    prompt = view.prompt
    if prompt is None:
        order = "reversed" if view.is_reversed else ""
        parts = (f"{view.shown.value} by {view.sort}", order, *_HINT)
        return Line(_fit(parts, size), Style.DIM)
    if prompt.error:
        return Line(_fit([prompt.error], size), Style.WARNING)
    text = f"{prompt.label}: {prompt.text}_"
    # The end is what is being typed.
    return Line(printable(text, LINE_MAX)[-size.width :] if size.width else text)


def _key_lines(size: Size) -> Iterator[str]:
    """A key a line, or, where that has no room, as many as fit on each."""
    if size.height is None or size.height >= len(KEYS) + 3:
        yield from (f"  {keys:<9}{does}" for keys, _, does in KEYS)
        yield ""
    else:
        rest = [f"{keys} {word}" for keys, word, _ in KEYS]
        while rest:
            line = _fit(rest, size)
            yield line
            rest = rest[line.count("  ") + 1 :]
    yield "any key goes back"


def _table(found: TopRound, view: View, size: Size, room: int | None) -> Iterator[Line]:
    """The head and the rows that fit, sorted."""
    shown, columns = view.shown, COLUMNS[view.shown]
    rows = sorted_rows(rows_of(found, shown), shown, view.sort, is_reversed=view.is_reversed)
    if room is not None:
        view.offset = max(0, min(view.offset, len(rows) - room))
        rows = rows[view.offset : view.offset + room]
    cells = [[column.words(row, is_exact=size.is_exact) for column in columns] for row in rows]
    kept, widths = fit_columns(columns, cells, size.width)
    heads, at = [], 0
    mark: tuple[int, int] | None = None
    for number, width in zip(kept, widths, strict=True):
        column = columns[number]
        if column.id == view.sort:
            mark = at, at + width
        heads.append(cell(column.head, width, column))
        at += width + 1
    yield Line(" ".join(heads), Style.HEAD, mark)
    for row, words in zip(rows, cells, strict=True):
        text = " ".join(
            cell(words[number], width, columns[number])
            for number, width in zip(kept, widths, strict=True)
        )
        yield Line(text, Style.WARNING if is_trouble(row) else Style.PLAIN)
    if not rows:
        yield Line(_nothing(found, shown), Style.DIM)


def _nothing(found: TopRound, shown: Shown) -> str:
    if shown is Shown.PEERS:
        return "no peers"
    if shown is Shown.DROPS:
        return "no drops since the daemon's start"
    return "no packets yet" if found.flows is not None else "flows are not looked at yet"
