"""Tells what kept the event loop from running when it was late: code, or no processor.

A thread asks the loop for a sign of life. When none comes it notes where the loop's thread is,
and what other threads of Python do, one of which may hold the interpreter; when one comes, it says
how much of the delay the loop's thread was ready and had no processor (schedstat:
Documentation/scheduler/sched-stats.rst).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

from tundp.backoff import Ration

_log = logging.getLogger(__name__)

LATE_S: Final = 0.4
"""An event loop that is later than this is told of."""
LONG_S: Final = 5.0
"""One that lasts longer is told of before its end, too."""
PAUSE_S: Final = 0.5
"""Between a sign of life and the next question."""
_LINES: Final = 3
_FRAMES: Final = 6
"""Innermost frames that are named of the loop's thread; of another, half of them."""
_OTHERS: Final = 3
_PLACES: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """One delay of the event loop."""

    late_s: float
    waited_s: float | None
    """How long of it the loop's thread was ready to run and had no processor; None: unknown."""
    places: tuple[str, ...]
    """Where it was, each time somebody looked: `file:line function`, the innermost first."""
    others: tuple[str, ...]
    """What other threads were in at the first look, by their name."""

    def words(self) -> str:
        """One sentence for the log."""
        waited = "not known how much" if self.waited_s is None else f"{self.waited_s * 1e3:.0f} ms"
        text = (
            f"the event loop was late by {self.late_s * 1e3:.0f} ms, {waited} of it without a"
            f" processor; it was in {'; then in '.join(self.places) or 'nothing known'}"
        )
        return f"{text}; beside it {'; '.join(self.others)}" if self.others else text


class StallWatch:
    """See the module. `stalls` is how many there were."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """For the loop that runs in the calling thread."""
        self.stalls = 0
        self.last: Stall | None = None
        self._loop = loop
        self._watched = threading.get_ident()
        self._schedstat = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        self._is_over = threading.Event()
        self._lines = Ration(_LINES)
        self._thread = threading.Thread(target=self._run, name="watch loop", daemon=True)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the block runs."""
        self._thread.start()
        try:
            yield
        finally:
            self._is_over.set()

    def _run(self) -> None:
        while not self._is_over.wait(PAUSE_S):
            came = threading.Event()
            began, waited = time.monotonic(), self._waited_s()
            try:
                self._loop.call_soon_threadsafe(came.set)
            except RuntimeError:  # closed
                return
            places: list[str] = []
            others: tuple[str, ...] = ()
            is_told = False
            while not came.wait(LATE_S):
                if self._is_over.is_set():
                    return
                others = self._look(places) or others
                if not is_told and time.monotonic() - began >= LONG_S:
                    # It may never end: a watchdog kills the process before.
                    is_told = True
                    self._tell(self._stall(began, waited, places, others))
            if time.monotonic() - began >= LATE_S:
                self._tell(self._stall(began, waited, places, others))

    def _look(self, places: list[str]) -> tuple[str, ...]:
        """Note where the loop's thread is; at the first look, what other threads do."""
        # A frame holds all that its function has: none of them is kept.
        frames = sys._current_frames()  # noqa: SLF001
        others = () if places else tuple(self._others(frames))
        place = _place(frames.get(self._watched), _FRAMES)
        if place not in places[-1:] and len(places) < _PLACES:
            places.append(place)
        return others

    def _stall(
        self, began: float, waited: float | None, places: list[str], others: tuple[str, ...]
    ) -> Stall:
        after = self._waited_s()
        return Stall(
            late_s=time.monotonic() - began,
            waited_s=None if waited is None or after is None else after - waited,
            places=tuple(places),
            others=others,
        )

    def _tell(self, stall: Stall) -> None:
        self.stalls += 1
        self.last = stall
        if self._lines.take(time.monotonic()):
            _log.warning("%s%s", stall.words(), self._lines.withheld_words())

    def _others(self, frames: dict[int, FrameType]) -> Iterator[str]:
        """Threads but the watched one and this, which are in code of ours."""
        mine = threading.get_ident()
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        told = 0
        for ident, frame in frames.items():
            if ident in (self._watched, mine) or told == _OTHERS or _is_idle(frame):
                continue
            told += 1
            yield f"{names.get(ident, 'a thread')} in {_place(frame, _FRAMES // 2)}"

    def _waited_s(self) -> float | None:
        """How long the loop's thread has waited for a processor so far."""
        try:
            return int(self._schedstat.read_text().split()[1]) / 1e9
        except (OSError, ValueError, IndexError):
            return None


def _is_idle(frame: FrameType) -> bool:
    """Whether a thread waits for work."""
    return Path(frame.f_code.co_filename).name in ("threading.py", "queue.py", "thread.py")


def _place(frame: FrameType | None, count: int) -> str:
    """The innermost `count` frames, without what the functions were given."""
    found: list[str] = []
    while frame is not None and len(found) < count:
        code = frame.f_code
        file = "/".join(Path(code.co_filename).parts[-2:])
        found.append(f"{file}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return " < ".join(found)
