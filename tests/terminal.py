"""A program on a pseudo-terminal, and what its screen shows: for tests of full-screen programs.

`Screen` understands what ncurses sends to an xterm (ECMA-48, and xterm's own switches); anything
else is an error, so that no test reads a screen that was only half understood.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import struct
import subprocess
import termios
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self

from tests.wait import until

_SEQUENCE = re.compile(
    r"\x1b(?:\[(?P<params>[?>=]?[0-9;]*)(?P<final>[@-~])|[()][0AB]|[=>78MHc]|\][^\x07]*\x07)"
)
_IGNORED = frozenset("mnct")


class Screen:
    """What a terminal shows."""

    def __init__(self, width: int, height: int) -> None:
        self.modes: set[int] = {25}
        """DEC private modes that are on: 25 the cursor is shown, 1049 the other screen."""
        self._rest = ""
        self._last = " "
        self.resize(width, height)

    def resize(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._rows = [[" "] * width for _ in range(height)]
        self._x = self._y = 0
        self._top, self._bottom = 0, height - 1

    @property
    def lines(self) -> list[str]:
        return ["".join(row).rstrip() for row in self._rows]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def feed(self, text: str) -> None:
        text, self._rest = self._rest + text, ""
        at = 0
        while at < len(text):
            if text[at] == "\x1b":
                found = _SEQUENCE.match(text, at)
                if found is None:
                    assert len(text) - at < 40, f"not understood: {text[at : at + 40]!r}"
                    self._rest = text[at:]
                    return
                self._sequence(found)
                at = found.end()
            else:
                self._character(text[at])
                at += 1

    def _character(self, one: str) -> None:
        if one == "\r":
            self._x = 0
        elif one == "\n":
            self._down()
        elif one == "\b":
            self._x = max(0, self._x - 1)
        elif one == "\t":
            self._x = min(self.width - 1, (self._x // 8 + 1) * 8)
        elif one in "\x07\x0e\x0f":
            pass
        else:
            assert one.isprintable(), f"not understood: {one!r}"
            if self._x >= self.width:
                self._x = 0
                self._down()
            self._rows[self._y][self._x] = self._last = one
            self._x += 1

    def _down(self) -> None:
        if self._y == self._bottom:
            self._scroll(1)
        else:
            self._y = min(self.height - 1, self._y + 1)

    def _scroll(self, count: int, first: int | None = None) -> None:
        first = self._top if first is None else first
        for _ in range(abs(count)):
            gone, new = (first, self._bottom) if count > 0 else (self._bottom, first)
            del self._rows[gone]
            self._rows.insert(new, [" "] * self.width)

    def _sequence(self, found: re.Match[str]) -> None:
        final, params = found["final"], found["params"] or ""
        if final is None:
            if found[0] == "\x1bM":
                self._y = max(0, self._y - 1)
            return
        if params[:1] in ("?", ">", "="):
            modes = {int(each) for each in params[1:].split(";") if each}
            if final == "h":
                self.modes |= modes
            elif final == "l":
                self.modes -= modes
            return
        numbers = [int(each or 0) for each in params.split(";")] if params else []
        first = numbers[0] if numbers else 0
        if final in _IGNORED or final in "hl":
            return
        moves: Mapping[str, Callable[[int], None]] = {
            "A": lambda n: self._go(self._x, self._y - n),
            "B": lambda n: self._go(self._x, self._y + n),
            "C": lambda n: self._go(self._x + n, self._y),
            "D": lambda n: self._go(self._x - n, self._y),
            "G": lambda n: self._go(n - 1, self._y),
            "d": lambda n: self._go(self._x, n - 1),
            "S": lambda n: self._scroll(n),
            "T": lambda n: self._scroll(-n),
            "L": lambda n: self._scroll(-n, self._y),
            "M": lambda n: self._scroll(n, self._y),
            "X": lambda n: self._blank(self._y, self._x, self._x + n),
            "P": self._delete,
            "@": self._insert,
            "b": self._repeat,
        }
        if final in moves:
            moves[final](max(1, first))
        elif final in "Hf":
            self._go((numbers[1] if len(numbers) > 1 else 1) - 1, max(1, first) - 1)
        elif final == "r":
            self._top = max(1, first) - 1
            self._bottom = (numbers[1] if len(numbers) > 1 else self.height) - 1
            self._go(0, 0)
        elif final == "K":
            start, end = ((self._x, self.width), (0, self._x + 1), (0, self.width))[first]
            self._blank(self._y, start, end)
        elif final == "J":
            self._erase(first)
        else:
            raise AssertionError(f"not understood: {found[0]!r}")

    def _erase(self, which: int) -> None:
        first = 0 if which else self._y + 1
        last = self._y if which == 1 else self.height
        for y in range(first, last):
            self._blank(y, 0, self.width)
        if which == 0:
            self._blank(self._y, self._x, self.width)
        elif which == 1:
            self._blank(self._y, 0, self._x + 1)

    def _go(self, x: int, y: int) -> None:
        self._x = min(max(0, x), self.width - 1)
        self._y = min(max(0, y), self.height - 1)

    def _blank(self, y: int, start: int, end: int) -> None:
        for x in range(start, min(end, self.width)):
            self._rows[y][x] = " "

    def _repeat(self, count: int) -> None:
        for _ in range(count):
            self._character(self._last)

    def _delete(self, count: int) -> None:
        row = self._rows[self._y]
        del row[self._x : self._x + count]
        row.extend(" " * (self.width - len(row)))

    def _insert(self, count: int) -> None:
        row = self._rows[self._y]
        row[self._x : self._x] = " " * count
        del row[self.width :]


class Terminal:
    """A program whose controlling terminal is one of ours, while the block lasts."""

    def __init__(
        self,
        *argv: str,
        width: int = 80,
        height: int = 24,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.screen = Screen(width, height)
        self.output = ""
        """Everything it has written."""
        self._argv = argv
        self._environment = dict(os.environ, TERM="xterm", LC_ALL="C.UTF-8") | dict(environment)
        self._master, self._slave = os.openpty()
        self._set_size()
        self.modes_before = termios.tcgetattr(self._slave)
        self.process: subprocess.Popen[bytes]

    @property
    def modes(self) -> Sequence[Any]:
        """The terminal's modes now."""
        return termios.tcgetattr(self._slave)

    async def __aenter__(self) -> Self:
        self.process = await asyncio.to_thread(
            subprocess.Popen,
            self._argv,
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            env=self._environment,
            start_new_session=True,
            # The first terminal that the leader of a session opens is its own.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.set_blocking(self._master, False)
        asyncio.get_running_loop().add_reader(self._master, self._read)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        await asyncio.to_thread(self.process.wait)
        asyncio.get_running_loop().remove_reader(self._master)
        os.close(self._master)
        os.close(self._slave)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def resize(self, width: int, height: int) -> None:
        """Another size, of which the program is told by SIGWINCH."""
        self.screen.resize(width, height)
        self._set_size()

    async def shows(self, pattern: str) -> re.Match[str]:
        """Wait until the screen matches a regular expression."""
        found: list[re.Match[str]] = []

        def is_there() -> bool:
            found.extend(re.finditer(pattern, self.screen.text, re.MULTILINE))
            return bool(found)

        try:
            await until(is_there, f"{pattern!r} on the screen")
        except AssertionError as error:
            raise AssertionError(f"{error}\n--- screen:\n{self.screen.text}\n---") from None
        return found[0]

    async def ends(self) -> int:
        """Wait for the program's end; its exit code."""
        await until(lambda: self.process.poll() is not None, "the program to end")
        self._read()
        return int(self.process.returncode)

    def _set_size(self) -> None:
        size = struct.pack("4H", self.screen.height, self.screen.width, 0, 0)
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, size)

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._master, 65536):
                text = data.decode("utf-8", "replace")
                self.output += text
                self.screen.feed(text)
