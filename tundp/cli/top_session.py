"""One `tundp top` while it runs: looks, keys and their end, on a screen or below each other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import sys
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tundp.cli.output import EXIT_FAILED, EXIT_OK, print_error
from tundp.cli.top_screen import Screen, takes_utf8, why_no_screen
from tundp.errors import PlatformError
from tundp.observe.top import TopRound
from tundp.top.columns import Shown, sorted_rows
from tundp.top.frame import Size, plain, plain_ascii, screen
from tundp.top.source import Source
from tundp.top.view import Action, View

if TYPE_CHECKING:
    from tundp.cli.top import TopOptions

_ROWS: Final = 20
_PATIENCE_S: Final = 3.0
"""An answer that takes longer is said to be missing."""


class Session:
    """One `tundp top` while it runs."""

    def __init__(self, options: TopOptions, path: Path, view: View) -> None:
        self._options = options
        self._path = path
        self._view = view
        self._source = Source(path, interval=view.interval)
        self._stop = asyncio.Event()
        self._wake = asyncio.Event()
        self._trouble = ""
        self._round: TopRound | None = None

    async def run(self) -> int:
        """Show rounds until a key, a signal or --count ends it; the exit code.

        PlatformError if no daemon answers at the start.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._end)
        try:
            await self._unless_stopped(self._begin())
            if self._stop.is_set():
                return EXIT_OK
            if self._is_plain():
                return await self._print_rounds()
            with Screen(loop) as shown:
                is_counted_out = await self._run_screen(shown)
            if is_counted_out and self._round is not None:
                # What was asked for in so many rounds is gone with the screen.
                self._print(self._round)
            return EXIT_OK
        finally:
            await self._source.close()

    async def _begin(self) -> None:
        """The look that rounds begin with."""
        await self._source.set_flows(self._wanted_flows())
        await self._source.flows_begin()
        self._round = await self._source.look()

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something that may take as long as a daemon likes, until a signal ends it."""
        task = asyncio.ensure_future(work)
        stopped = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if self._stop.is_set():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        else:
            task.result()

    def _end(self) -> None:
        self._stop.set()
        self._wake.set()

    def _is_plain(self) -> bool:
        """Whether there is no screen, or none is wanted; says why if one could be expected."""
        if self._options.plain or self._options.output.value == "json":
            return True
        why = why_no_screen()
        if why and sys.stdout.isatty():
            print_error(f"no screen: {why}; printing below each other", "tundp top")
        return bool(why)

    def _wanted_flows(self) -> str | None:
        return self._view.filter if self._view.shown is Shown.FLOWS else None

    # Below each other

    async def _print_rounds(self) -> int:
        """Print --count rounds, each after its interval; a failed one counts."""
        left = self._options.count
        has_failed = False
        while left is None or left > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._source.interval):
                    await self._stop.wait()
            if self._stop.is_set():
                return EXIT_OK
            left = None if left is None else left - 1
            await self._unless_stopped(self._look())
            if self._stop.is_set():
                return EXIT_OK
            if self._trouble:
                if not has_failed:
                    print_error(self._trouble, "tundp top")
                has_failed = True
                continue
            has_failed = False
            assert self._round is not None, "a look gives a round or trouble"
            self._print(self._round)
        return EXIT_FAILED if has_failed else EXIT_OK

    def _print(self, found: TopRound) -> None:
        if self._options.output.value == "json":
            print(json.dumps(self._listed(found).to_json()), flush=True)
            return
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        size = Size(width=width, height=None, is_exact=width is None)
        lines = [*plain(self._noted(found), self._view, size, self._options.rows or _ROWS), ""]
        is_utf8 = takes_utf8(sys.stdout.encoding)
        print("\n".join(lines if is_utf8 else map(plain_ascii, lines)), flush=True)

    def _listed(self, found: TopRound) -> TopRound:
        """A round with the rows asked for, sorted."""
        view, most = self._view, self._options.rows
        found = self._noted(found)
        for shown, name in ((Shown.PEERS, "peers"), (Shown.DROPS, "drops")):
            rows = getattr(found, name)
            ordered = sorted_rows(rows, shown, view.sorts[shown], is_reversed=view.turned[shown])
            found = replace(found, **{name: ordered[:most]})  # type: ignore[arg-type]
        if found.flows is not None:
            ordered = sorted_rows(
                found.flows.rows,
                Shown.FLOWS,
                view.sorts[Shown.FLOWS],
                is_reversed=view.turned[Shown.FLOWS],
            )
            flows = replace(found.flows, rows=ordered[:most])  # type: ignore[arg-type]
            found = replace(found, flows=flows)
        return found

    def _noted(self, found: TopRound) -> TopRound:
        """A round that says so if the daemon needs long to answer."""
        if not self._source.is_slowed:
            return found
        note = (
            f"the daemon needs long to answer ({found.peers_total:,} peers): a look every"
            f" {self._source.interval:.1f} s instead of {self._view.interval:g} s"
        )
        return replace(found, notes=[*found.notes, note])

    # On a screen

    async def _run_screen(self, shown: Screen) -> bool:
        """Look and draw in turn with what keys and signals want, until one of them ends it.

        Whether --count ended it.
        """
        left = self._options.count
        shown.on_change = self._wake.set
        self._draw(shown)
        clock = asyncio.get_running_loop().time
        next_look = clock() + self._source.interval
        looking: asyncio.Task[None] | None = None
        asked_at = clock()
        try:
            while not self._stop.is_set():
                if looking is None and not self._view.is_paused and clock() >= next_look:
                    looking, asked_at = asyncio.ensure_future(self._look()), clock()
                    looking.add_done_callback(lambda _: self._wake.set())
                if looking is None or not looking.done():
                    wait = None if self._view.is_paused else next_look - clock()
                    await self._sleep(1.0 if looking else wait)
                    if looking and clock() - asked_at > _PATIENCE_S:
                        self._trouble = f"no answer from the daemon for {clock() - asked_at:.0f} s"
                if looking is not None and looking.done():
                    looking.result()
                    looking = None
                    next_look = clock() + self._source.interval
                    left = None if left is None else max(0, left - 1)
                    if left == 0 and not self._trouble:
                        return True
                shown.check()
                if await self._apply(shown):
                    return False
                if looking is None:
                    next_look = min(next_look, clock() + self._source.interval)
                self._draw(shown)
            return False
        finally:
            if looking is not None:
                looking.cancel()
                await asyncio.gather(looking, return_exceptions=True)

    async def _sleep(self, seconds: float | None) -> None:
        """Until something happens, or so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if seconds is None else max(0.0, seconds)):
                await self._wake.wait()
        self._wake.clear()

    async def _look(self) -> None:
        try:
            self._round = await self._source.look()
            self._trouble = ""
        except PlatformError as error:
            self._trouble = f"{error}; trying again"

    async def _apply(self, shown: Screen) -> bool:
        """Do what the keys typed want; whether one of them ends it."""
        for key in shown.typed():
            action = self._view.press(key)
            if action is Action.QUIT:
                return True
            if action is Action.REPAINT:
                shown.repaint()
            elif action is Action.INTERVAL:
                self._source.set_interval(self._view.interval)
            elif action is Action.FILTER:
                if self._round is not None:
                    self._round = replace(self._round, flows=None)
                await self._source.set_flows(self._wanted_flows())
        return False

    def _draw(self, shown: Screen) -> None:
        height, width = shown.size()
        found = None if self._round is None else self._noted(self._round)
        # A character in the last column of the last line would scroll some terminals.
        size = Size(width=max(1, width - 1), height=height)
        shown.draw(screen(found, self._view, size, self._trouble))
