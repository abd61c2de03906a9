"""Text that somebody else chose, as it is shown: in the log, on a terminal, in JSON and on pages.

Keys and values of the store, a server's answers, names of hosts, interfaces, chains and files may
hold anything: an escape sequence that clears the screen, a newline with a forged line after it, a
bidirectional override that reorders what is read, a megabyte. `printable` is the one function
for all of them; the log, status, findings and pages apply it to everything they are given.
"""

from __future__ import annotations

from typing import Final

NAME_MAX: Final = 80
"""Characters of a name that somebody else chose."""
SENTENCE_MAX: Final = 200
"""The same of a reason, which may quote a few of them, or of a server's answer."""
LINE_MAX: Final = 4000
"""The same of a whole line of the log, a finding or a text in status."""


def printable(text: str, limit: int = NAME_MAX) -> str:
    """`text` on one line, of `limit` characters at most, the last of them an ellipsis if cut.

    What str.isprintable refuses (controls, escapes, newlines, bidirectional and other format
    characters, lone surrogates, blanks other than the space) is written as Python escapes it.
    A backslash stays as it is, so that applying this again changes nothing.
    """
    if len(text) <= limit and text.isprintable():
        return text
    shown = "".join(map(_escaped, text[: limit + 1]))
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def quoted(text: str, limit: int = NAME_MAX) -> str:
    """The same in quotes, which are not counted."""
    return f"'{printable(text, limit)}'"


def _escaped(character: str) -> str:
    return character if character.isprintable() else repr(character)[1:-1]
