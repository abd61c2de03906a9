"""Flags as people read them on a terminal: name and value, what it does, default, variable."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from typing import Final

from tundp.settings.declare import Flag

WIDTH_MAX: Final = 100
_HELP_COLUMN: Final = 24


def flag_lines(flags: Iterable[Flag], width: int) -> Iterator[str]:
    """The flags, a paragraph each, in lines of at most `width` characters where words allow."""
    width = max(_HELP_COLUMN + 20, min(width, WIDTH_MAX))
    for flag in flags:
        head = f"  --{flag.name} {flag.metavar}".rstrip()
        text = textwrap.wrap(
            describe(flag),
            width - _HELP_COLUMN,
            break_long_words=False,
            break_on_hyphens=False,
        )
        if len(head) <= _HELP_COLUMN - 2:
            yield f"{head:<{_HELP_COLUMN}}{text[0]}"
            text = text[1:]
        else:
            yield head
        yield from (f"{'':<{_HELP_COLUMN}}{line}" for line in text)


def describe(flag: Flag) -> str:
    """What a flag does, its default and its environment variable."""
    text = flag.help
    if words := flag.default_words:
        unit = f" {flag.unit}" if flag.unit and not flag.default_text else ""
        text += f" (default: {words}{unit})"
    if flag.variable:
        text += f" [{flag.variable}]"
    return text
