"""What the operator of `tundp top` chose, and what each key changes of it. Pure: no terminal here.

Keys are named as curses.keyname has them (`KEY_LEFT`), characters as themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto, unique
from typing import Final

from tundp.errors import FilterError
from tundp.top.columns import FIRST_SORT, Shown, sort_names
from tundp.wire.filter import parse as parse_filter

KEYS: Final = (
    ("q", "quit", "quit"),
    ("? h", "help", "this help"),
    ("TAB", "view", "next view: peers, flows, drops"),
    ("p l d", "views", "peers, flows, drops"),
    ("< >", "sort", "sort by the column before, after; also LEFT, RIGHT"),
    ("r", "reverse", "reverse the order"),
    ("f /", "filter", "filter of flows, as tcpdump takes it; empty: none"),
    ("SPACE", "pause", "pause, go on"),
    ("+ -", "interval", "longer, shorter interval"),
    ("i", "seconds", "interval in seconds"),
    ("UP DOWN", "scroll", "scroll; also PAGE UP, PAGE DOWN, HOME, END"),
    ("^L", "redraw", "draw the screen again"),
)
"""The keys, and what each does in a word and as the help lists it."""
INTERVAL_MIN: Final = 0.1
INTERVAL_MAX: Final = 3600.0
PROMPT_MAX: Final = 1000
"""Characters that can be typed at a prompt."""
_STEPS: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)
_ENTER: Final = ("\n", "\r", "KEY_ENTER", "^J", "^M")
_ERASE: Final = ("KEY_BACKSPACE", "\x7f", "\b", "^?", "^H")
_CANCEL: Final = ("\x1b", "^[")
_CLEAR: Final = ("\x15", "^U")
_SCROLL: Final = ("KEY_UP", "KEY_DOWN", "KEY_PPAGE", "KEY_NPAGE", "KEY_HOME", "KEY_END")


@unique
class Action(Enum):
    """What has to be done after a key."""

    NOTHING = auto()
    DRAW = auto()
    """The same figures, shown otherwise."""
    REPAINT = auto()
    """The whole screen: something else wrote on it."""
    QUIT = auto()
    FILTER = auto()
    """Another filter, or flows are shown or no longer shown: the events wanted are others."""
    INTERVAL = auto()
    """Another interval, or no pause any more."""


@dataclass(slots=True, kw_only=True)
class Prompt:
    """A line being typed."""

    label: str
    text: str
    error: str = ""


@dataclass(slots=True, kw_only=True)
class View:
    """What is shown, and how."""

    shown: Shown = Shown.PEERS
    sorts: dict[Shown, str] = field(default_factory=lambda: dict(FIRST_SORT))
    turned: dict[Shown, bool] = field(default_factory=lambda: dict.fromkeys(Shown, False))
    """Whether the order of a view is reversed."""
    filter: str = ""
    """Canonical text."""
    interval: float = 2.0
    is_paused: bool = False
    has_help: bool = False
    offset: int = 0
    """The first row that is shown; the table cuts it to what there is."""
    page: int = 10
    """Rows on the screen, as of the last time it was drawn."""
    prompt: Prompt | None = None

    @property
    def sort(self) -> str:
        """What the rows of the view are sorted by."""
        return self.sorts[self.shown]

    @property
    def is_reversed(self) -> bool:
        """Whether the view's order is."""
        return self.turned[self.shown]

    def press(self, key: str) -> Action:
        """Apply a key; unknown ones do nothing."""
        if self.prompt is not None:
            return self._type(self.prompt, key)
        if self.has_help:
            self.has_help = False
            return Action.QUIT if key == "q" else Action.DRAW
        if key in _SCROLL:
            return self._scroll(key)
        found = _BOUND.get(key)
        return Action.NOTHING if found is None else found(self)

    def show(self, shown: Shown) -> Action:
        """Show another table."""
        before, self.shown, self.offset = self.shown, shown, 0
        return Action.FILTER if Shown.FLOWS in (before, shown) else Action.DRAW

    def next_view(self) -> Action:
        """Show the next table."""
        order = list(Shown)
        return self.show(order[(order.index(self.shown) + 1) % len(order)])

    def sort_by(self, step: int) -> Action:
        """Sort by a column further on."""
        names = sort_names(self.shown)
        self.sorts[self.shown] = names[(names.index(self.sort) + step) % len(names)]
        return Action.DRAW

    def reverse(self) -> Action:
        """Turn the order around."""
        self.turned[self.shown] = not self.is_reversed
        return Action.DRAW

    def pause(self) -> Action:
        """Stop, or go on."""
        self.is_paused = not self.is_paused
        return Action.DRAW if self.is_paused else Action.INTERVAL

    def help(self) -> Action:
        """Show the keys."""
        self.has_help = True
        return Action.DRAW

    def step_interval(self, step: int) -> Action:
        """Make the interval the next round number up or down."""
        others = [each for each in _STEPS if (each - self.interval) * step > 0]
        if not others:
            return Action.NOTHING
        self.interval = min(others) if step > 0 else max(others)
        return Action.INTERVAL

    def ask_filter(self) -> Action:
        """Begin to type a filter."""
        self.prompt = Prompt(label="filter", text=self.filter)
        return Action.DRAW

    def ask_interval(self) -> Action:
        """Begin to type an interval."""
        self.prompt = Prompt(label="seconds", text="")
        return Action.DRAW

    def _scroll(self, key: str) -> Action:
        page = max(1, self.page - 1)
        steps = {"KEY_UP": -1, "KEY_DOWN": 1, "KEY_PPAGE": -page, "KEY_NPAGE": page}
        self.offset = {"KEY_HOME": 0, "KEY_END": 1 << 30}.get(
            key, max(0, self.offset + steps.get(key, 0))
        )
        return Action.DRAW

    def _type(self, prompt: Prompt, key: str) -> Action:
        if key in _ENTER:
            return self._enter(prompt)
        if key in _CANCEL:
            self.prompt = None
        elif key in _ERASE:
            prompt.text, prompt.error = prompt.text[:-1], ""
        elif key in _CLEAR:
            prompt.text, prompt.error = "", ""
        elif len(key) == 1 and key.isprintable() and len(prompt.text) < PROMPT_MAX:
            prompt.text, prompt.error = prompt.text + key, ""
        else:
            return Action.NOTHING
        return Action.DRAW

    def _enter(self, prompt: Prompt) -> Action:
        """Take what was typed; the prompt stays if it is wrong, with the reason."""
        if prompt.label == "filter":
            try:
                self.filter = parse_filter(prompt.text).text
            except FilterError as error:
                prompt.error = str(error)
                return Action.DRAW
            self.prompt = None
            return self.show(Shown.FLOWS)
        if prompt.text:
            try:
                seconds = float(prompt.text)
            except ValueError:
                seconds = 0.0
            if not INTERVAL_MIN <= seconds <= INTERVAL_MAX:
                prompt.error = f"a number of seconds from {INTERVAL_MIN:g} to {INTERVAL_MAX:g}"
                return Action.DRAW
            self.interval = seconds
        self.prompt = None
        return Action.INTERVAL


_BOUND: Final[Mapping[str, Callable[[View], Action]]] = {
    "q": lambda _: Action.QUIT,
    "?": View.help,
    "h": View.help,
    "\t": View.next_view,
    "^I": View.next_view,
    "p": lambda view: view.show(Shown.PEERS),
    "l": lambda view: view.show(Shown.FLOWS),
    "d": lambda view: view.show(Shown.DROPS),
    "<": lambda view: view.sort_by(-1),
    "KEY_LEFT": lambda view: view.sort_by(-1),
    ">": lambda view: view.sort_by(1),
    "KEY_RIGHT": lambda view: view.sort_by(1),
    "r": View.reverse,
    "f": View.ask_filter,
    "/": View.ask_filter,
    " ": View.pause,
    "+": lambda view: view.step_interval(1),
    "-": lambda view: view.step_interval(-1),
    "i": View.ask_interval,
    "\x0c": lambda _: Action.REPAINT,
    "^L": lambda _: Action.REPAINT,
}
