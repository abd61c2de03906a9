"""The supervisor of a daemon's tasks: what a bug ends is logged, counted and started again.

Packets and the control plane are separate lives. An exception nobody expected, in a task or
in a callback of the event loop, never takes the device away: the task starts again after a
pause that grows, the callback is left to its next call, and the finding `tasks` says so.
What ends a daemon on purpose is an exception of ENDS, and a callback that fails so often that
it would only keep the event loop busy.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

import tundp
from tundp.backoff import Backoff
from tundp.errors import DuplicateNode, LeaseLost
from tundp.finding import Finding, Verdict

_log = logging.getLogger(__name__)

ENDS: Final = (LeaseLost, DuplicateNode)
"""What a task raises to end the daemon."""
CALLBACKS: Final = "event loop callbacks"
"""The name under which failed callbacks are counted, beside the tasks."""
FIRST_PAUSE_S: Final = 0.2
LONGEST_PAUSE_S: Final = 30.0
STEADY_S: Final = 60.0
"""A task that ran so long before it failed starts again as after its first failure."""
FAILING_AFTER: Final = 3
"""Failures in a row, each within STEADY_S of the start before, that make the finding FAIL."""
SPIN_COUNT: Final = 200
SPIN_S: Final = 1.0
"""A callback that fails SPIN_COUNT times in SPIN_S is called again at once each time."""
REMIND_S: Final = 60.0
"""Between two lines about one error that keeps coming."""
_ERROR_LEN: Final = 200
"""Longest text of an error in a finding, in characters."""
_PACKAGE: Final = os.path.join(os.path.dirname(tundp.__file__), "")


@dataclass(slots=True)
class _Record:
    """What is known of one task's failures, or of all callbacks'."""

    failures: int = 0
    in_a_row: int = 0
    error: str = ""
    at: float = 0.0
    """Of the last failure, Unix time."""
    started: float = 0.0
    """Of the last start, monotonic."""
    said: dict[str, float] = field(default_factory=dict)
    """When each error was logged last, by the place it was raised at; monotonic."""

    def failed(self, error: BaseException) -> None:
        self.failures += 1
        self.error = f"{type(error).__name__}: {error}"[:_ERROR_LEN]
        self.at = time.time()

    def is_news(self, place: str) -> bool | None:
        """True: log the traceback; False: a line is due; None: nothing is."""
        now = time.monotonic()
        before = self.said.get(place)
        if before is not None and now - before < REMIND_S:
            return None
        self.said[place] = now
        return before is None


class Supervisor:
    """Runs tasks for ever, and counts the bugs they and the loop's callbacks meet."""

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._owners: dict[str, str] = {}
        self._spins: dict[str, deque[float]] = {}
        self._restarted: set[str] = set()

    async def keep(self, name: str, main: Callable[[], Awaitable[None]]) -> None:
        """Await `main()`, and again whenever it raises, until it returns or this is cancelled.

        Raises the exceptions of ENDS, whatever group they come in.
        """
        record = self._records.setdefault(name, _Record())
        backoff = Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        while True:
            record.started = time.monotonic()
            run = self._running[name] = asyncio.ensure_future(_await(main))
            try:
                return await run
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  (logged)
                if _is_being_cancelled():
                    raise asyncio.CancelledError from None
                if (end := _end_in(error)) is not None:
                    raise end from None
                if time.monotonic() - record.started > STEADY_S:
                    record.in_a_row = 0
                    backoff.reset()
                record.in_a_row += 1
                pause_s = backoff.next_s()
                self._note(name, record, error, f"starts again in {pause_s:.1f} s")
                await asyncio.sleep(pause_s)

    def own(self, owners: Mapping[str, str]) -> None:
        """Set which task owns the callbacks of each module of the package.

        owners: the module's path inside the package (`linux/firewall/watch.py`) to the name of
        a task that takes its callbacks back when it is cancelled.
        """
        self._owners = dict(owners)

    def callback_failed(self, error: BaseException) -> bool:
        """Count a failed callback of the event loop; whether the daemon can go on.

        A callback that spins goes with the task that owns it, once. False if there is no such
        task, or if it spins again.
        """
        record = self._records.setdefault(CALLBACKS, _Record())
        module, place = _place_of(error)
        self._note(CALLBACKS, record, error, "nothing else is stopped by it")
        spin = self._spins.setdefault(place, deque(maxlen=SPIN_COUNT))
        now = time.monotonic()
        spin.append(now)
        if len(spin) < SPIN_COUNT or now - spin[0] > SPIN_S:
            return True
        spin.clear()
        owner = self._running.get(self._owners.get(module, ""))
        if owner is None or owner.done() or place in self._restarted:
            _log.critical("%s fails again and again at once: %s", place, record.error)
            return False
        self._restarted.add(place)
        owner.cancel()
        return True

    def failures(self) -> Mapping[str, int]:
        """How often each task, and any callback, has failed since the start; by name."""
        return {name: record.failures for name, record in self._records.items()}

    def findings(self) -> list[Finding]:
        """The finding `tasks`: FAIL while a task keeps failing, WARN after any failure."""
        failed = {name: record for name, record in self._records.items() if record.failures}
        if not failed:
            return [Finding(id="tasks", verdict=Verdict.OK, evidence="all running")]
        is_failing = any(self._is_failing(record) for record in failed.values())
        texts = {name: self._text(record) for name, record in failed.items()}
        return [
            Finding(
                id="tasks",
                verdict=Verdict.FAIL if is_failing else Verdict.WARN,
                evidence="; ".join(f"{name}: {text}" for name, text in texts.items()),
                meaning="a bug of tundp; packets flow all the same",
                next_step="please report the traceback in the log",
                facts=texts,
            )
        ]

    def _is_failing(self, record: _Record) -> bool:
        return record.in_a_row >= FAILING_AFTER and (
            time.monotonic() - record.started < STEADY_S or time.time() - record.at < STEADY_S
        )

    def _text(self, record: _Record) -> str:
        at = datetime.fromtimestamp(record.at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        times = "once" if record.failures == 1 else f"{record.failures} times"
        still = ", and keeps failing" if self._is_failing(record) else ""
        return f"failed {times}, last at {at}{still}: {record.error}"

    def _note(self, name: str, record: _Record, error: BaseException, then: str) -> None:
        """Count a failure; log a traceback once for each place, then a line a minute."""
        record.failed(error)
        match record.is_news(_place_of(error)[1]):
            case True:
                _log.error("bug in %s, %s; please report this:", name, then, exc_info=error)
            case False:
                _log.error("%s: failed %d times: %s; %s", name, record.failures, record.error, then)


async def _await(main: Callable[[], Awaitable[None]]) -> None:
    await main()


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0  # else what is awaited was cancelled alone


def _end_in(error: BaseException) -> BaseException | None:
    """The exception that is meant to end the daemon, if `error` is or holds one."""
    if isinstance(error, ENDS):
        return error
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(_end_in, error.exceptions)), None)
    return None


def _place_of(error: BaseException) -> tuple[str, str]:
    """Module (as a path inside the package) and line of ours in which `error` was raised."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    module, place = "", type(error).__name__
    for frame, line in traceback.walk_tb(error.__traceback__):
        name = frame.f_code.co_filename
        if name.startswith(_PACKAGE):
            module = name.removeprefix(_PACKAGE)
            place = f"{module}:{line} {type(error).__name__}"
    return module, place
