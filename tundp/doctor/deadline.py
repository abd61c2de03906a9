"""A deadline for a coroutine that holds whatever hangs in it.

The coroutine runs on an event loop in a thread of its own. A deadline of asyncio ends what awaits;
it ends no worker thread that parses or judges a large ruleset, and nothing at all while the loop is
held. Whoever waits here goes on at the deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

from tundp.blocking import start_thread

TURN_S: Final = 0.2
"""At most so long until a signal is taken notice of."""
GRACE_S: Final = 0.5
"""For what was cancelled at the deadline: to kill programs it started, and close sockets."""


class _Run:
    """A coroutine in a thread: how far it is, and what came of it."""

    def __init__(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._main = main
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self.ended = threading.Event()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="deadline", daemon=True)

    def _run(self) -> None:
        try:
            asyncio.run(self._watched())
        except BaseException as error:  # noqa: BLE001  (raised again by whoever waits)
            self.error = self.error or error
        finally:
            self.ended.set()

    async def _watched(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        try:
            await self._main()
        except BaseException as error:  # noqa: BLE001  (raised again by whoever waits)
            self.error = error
        finally:
            # Not only after asyncio.run, which waits for worker threads, however long they take.
            self.ended.set()

    def ask_to_end(self) -> None:
        """Cancel the coroutine, if it still runs."""
        if self._loop is not None and self._task is not None:
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                self._loop.call_soon_threadsafe(self._task.cancel)

    def cancel(self) -> None:
        """Cancel the coroutine, and wait a little for what it cleans up."""
        self.ask_to_end()
        self.ended.wait(GRACE_S)


_runs: list[_Run] = []


def run_within(limit_s: float, main: Callable[[], Coroutine[Any, Any, None]]) -> bool:
    """Run a coroutine for `limit_s` seconds at most; return whether it ended by itself.

    Its exception is raised here. One that did not end is cancelled, and not waited for any longer
    than GRACE_S: see `is_busy`.
    """
    run = _Run(main)
    start_thread(run.thread)
    _runs.append(run)
    try:
        is_ended = _is_ended(run, time.monotonic() + limit_s)
    except BaseException:  # Ctrl-C
        run.cancel()
        raise
    if not is_ended:
        run.cancel()
        return False
    if run.error is not None:
        raise run.error
    return True


def _is_ended(run: _Run, give_up_at: float) -> bool:
    """Wait for the end of a run, or until `give_up_at`, time.monotonic(); whether it has ended.

    In short turns: a signal that another thread's C handler has taken wakes no lock, and Python's
    handler runs in this thread, between two turns at the latest (Python's signal module).
    """
    while not run.ended.wait(max(0.0, min(TURN_S, give_up_at - time.monotonic()))):
        if time.monotonic() >= give_up_at:
            return run.ended.is_set()
    return True


def is_busy() -> bool:
    """Whether a thread of a run has not ended by GRACE_S: the interpreter would wait for it.

    Runs inside a run that was cancelled are cancelled first, with the programs they started.
    """
    for run in _runs:
        if not run.ended.is_set():
            run.ask_to_end()
    give_up_at = time.monotonic() + GRACE_S
    for run in _runs:
        run.thread.join(max(0.0, give_up_at - time.monotonic()))
    return any(run.thread.is_alive() for run in _runs)
