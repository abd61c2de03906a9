"""A terminal's screen and keyboard, by curses: taken, drawn on, and given back whatever happens."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import locale
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Self

from tundp.top.frame import Line, Style, plain_ascii

try:
    import curses
except ImportError:  # a Python built without it
    curses = None  # type: ignore[assignment]

_ESCAPE_MS: Final = 25
"""How long the rest of a key's escape sequence may take."""
_DUMB: Final = ("", "dumb", "unknown")
_KEYS_MAX: Final = 64
"""Keys read at once."""


def why_no_screen() -> str:
    """What keeps this process from drawing on a screen; empty if nothing does."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return "standard input or output is no terminal"
    if curses is None:
        return "this Python has no module curses"
    term = os.environ.get("TERM", "")
    if term in _DUMB:
        return f"TERM is {term!r}" if term else "TERM is not set"
    try:
        curses.setupterm(term, sys.stdout.fileno())
    except curses.error:
        return f"there is no terminfo entry for TERM={term!r}"
    if not curses.tigetstr("cup"):
        return f"TERM={term!r} cannot move the cursor"
    return ""


def takes_utf8(encoding: str) -> bool:
    """Whether text in this encoding may hold any character."""
    try:
        return codecs.lookup(encoding).name == "utf-8"
    except LookupError:
        return False


def _is_utf8_locale() -> bool:
    """Whether the operator's locale is one of UTF-8.

    Python turns LC_CTYPE=C into C.UTF-8 by itself (PEP 538): then it says nothing.
    """
    chosen = os.environ.get("LC_ALL") or os.environ.get("LANG") or "C"
    own = os.environ.get("LC_CTYPE")
    if own and own != "C.UTF-8" and not os.environ.get("LC_ALL"):
        chosen = own
    if chosen in ("C", "POSIX"):
        return False
    return takes_utf8(locale.nl_langinfo(locale.CODESET))


class Screen:
    """The terminal of standard input and output while the block lasts."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.on_change: Callable[[], object] = lambda: None
        """Called when keys were typed, or the screen is another."""
        self._loop = loop
        self._keys: list[str] = []
        self._error: BaseException | None = None
        self._lines: Sequence[Line] = ()
        self._is_utf8 = False
        self._styles: dict[Style, int] = {}

    def __enter__(self) -> Self:
        """Take the terminal. PlatformError never: ask `why_no_screen` before."""
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_ALL, "")
        self._is_utf8 = _is_utf8_locale()
        curses.set_escdelay(_ESCAPE_MS)
        self._window = curses.initscr()
        try:
            self._set_up()
        except BaseException:
            self._give_back()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the terminal back."""
        self._loop.remove_reader(sys.stdin.fileno())
        for number in (signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT):
            self._loop.remove_signal_handler(number)
        self._give_back()

    def _set_up(self) -> None:
        curses.noecho()
        curses.cbreak()
        self._window.keypad(True)
        self._window.nodelay(True)
        with contextlib.suppress(curses.error):
            curses.curs_set(0)
        warning = curses.A_BOLD
        with contextlib.suppress(curses.error):
            curses.start_color()
            curses.use_default_colors()
            curses.init_pair(1, curses.COLOR_RED, -1)
            warning = curses.color_pair(1)
        self._styles = {
            Style.PLAIN: curses.A_NORMAL,
            Style.BOLD: curses.A_BOLD,
            Style.HEAD: curses.A_REVERSE,
            Style.DIM: curses.A_DIM,
            Style.WARNING: warning,
        }
        # In place of those of ncurses, which know nothing of the loop.
        self._loop.add_signal_handler(signal.SIGWINCH, self._guard(self._resize))
        self._loop.add_signal_handler(signal.SIGTSTP, self._guard(self._suspend))
        self._loop.add_signal_handler(signal.SIGCONT, self._guard(self._resume))
        self._loop.add_reader(sys.stdin.fileno(), self._guard(self._read))

    def _give_back(self) -> None:
        with contextlib.suppress(curses.error):
            self._window.keypad(False)
            curses.nocbreak()
            curses.echo()
        with contextlib.suppress(curses.error):
            curses.curs_set(1)
        with contextlib.suppress(curses.error):
            curses.endwin()

    def _guard(self, function: Callable[[], None]) -> Callable[[], None]:
        """A callback of the loop: `check` raises an error in it, the loop does not print it."""

        def call() -> None:
            try:
                function()
            except Exception as error:  # noqa: BLE001
                self._error = error
            self.on_change()

        return call

    def check(self) -> None:
        """Raise what went wrong in a callback."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def typed(self) -> list[str]:
        """What was typed since the last call."""
        found, self._keys = self._keys, []
        return found

    def size(self) -> tuple[int, int]:
        """Lines and columns."""
        found: tuple[int, int] = self._window.getmaxyx()
        return found

    def repaint(self) -> None:
        """Draw everything at the next `draw`, whatever is thought to be there."""
        self._window.clear()

    def draw(self, lines: Sequence[Line]) -> None:
        """Put lines on the screen."""
        self._window.erase()
        height, width = self.size()
        for number, line in enumerate(lines[:height]):
            text = line.text if self._is_utf8 else plain_ascii(line.text)
            style = self._styles[line.style]
            if line.style is Style.HEAD:
                text = text.ljust(width - 1)
            # In the last column of the last line curses raises an error, after drawing.
            with contextlib.suppress(curses.error):
                self._window.addnstr(number, 0, text, width - 1, style)
            if line.mark is not None and line.mark[0] < width - 1:
                start, end = line.mark
                with contextlib.suppress(curses.error):
                    self._window.chgat(
                        number,
                        start,
                        min(end, width - 1) - start,
                        style | curses.A_BOLD | curses.A_UNDERLINE,
                    )
        self._window.refresh()

    def _read(self) -> None:
        """Take what was typed. At the end of the terminal as SIGHUP would."""
        for _ in range(_KEYS_MAX):
            code = self._window.getch()
            if code < 0:
                break
            if code == curses.KEY_RESIZE:
                continue
            self._keys.append(chr(code) if code < 128 else _name(code))
        else:
            return
        poll = select.poll()
        poll.register(sys.stdin.fileno(), 0)
        if any(state & (select.POLLHUP | select.POLLERR) for _, state in poll.poll(0)):
            self._loop.remove_reader(sys.stdin.fileno())
            os.kill(os.getpid(), signal.SIGHUP)

    def _resize(self) -> None:
        columns, lines = os.get_terminal_size(sys.stdout.fileno())
        curses.resizeterm(max(1, lines), max(1, columns))
        self._window.clear()

    def _suspend(self) -> None:
        """Give the terminal back and stop, as the shell expects of ^Z; `_resume` takes it again."""
        curses.endwin()
        os.kill(os.getpid(), signal.SIGSTOP)

    def _resume(self) -> None:
        # The shell has set the terminal's modes meanwhile: a refresh after this sets ours.
        curses.endwin()
        self._resize()


def _name(code: int) -> str:
    """The name of a key that is no character."""
    return curses.keyname(code).decode("ascii", "replace")
