"""The tests' own terminal shows what ECMA-48 says."""

from __future__ import annotations

import pytest

from tests.terminal import Screen


@pytest.mark.parametrize(
    ("sent", "lines"),
    [
        ("abc\r\ndef", ["abc", "def", ""]),
        ("abcdefgh", ["abcdef", "gh", ""]),
        ("a\x1b[2;3Hb\x1b[1;1Hc", ["c", "  b", ""]),
        ("abcdef\x1b[1;3H\x1b[K", ["ab", "", ""]),
        ("abcdef\x1b[1;3H\x1b[1K", ["   def", "", ""]),
        ("abcdef\x1b[1;2H\x1b[2X", ["a  def", "", ""]),
        ("abcdef\x1b[1;2H\x1b[2P", ["adef", "", ""]),
        ("abcdef\x1b[1;2H\x1b[2@", ["a  bcd", "", ""]),
        ("a\x1b[4b", ["aaaaa", "", ""]),
        ("a\r\nb\r\nc\r\nd", ["b", "c", "d"]),
        ("a\r\nb\r\nc\x1b[1;1H\x1b[M", ["b", "c", ""]),
        ("a\r\nb\r\nc\x1b[1;1H\x1b[L", ["", "a", "b"]),
        ("a\r\nb\x1b[1;1H\x1b[J", ["", "", ""]),
        ("ab\x1b[31;1mc\x1b(B\x1b[m\x1b[1Gx", ["xbc", "", ""]),
    ],
)
def test_a_screen(sent: str, lines: list[str]) -> None:
    screen = Screen(6, 3)
    for one in sent:  # sequences come in pieces
        screen.feed(one)
    assert screen.lines == lines


def test_modes_and_what_is_not_understood() -> None:
    screen = Screen(6, 3)
    screen.feed("\x1b[?1049h\x1b[?25l")
    assert screen.modes == {1049}
    screen.feed("\x1b[?1049l\x1b[?25h")
    assert screen.modes == {25}
    with pytest.raises(AssertionError, match="not understood"):
        screen.feed("\x1b[5q")
