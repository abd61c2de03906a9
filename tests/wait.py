"""Waits for something to become true, with a deadline that says what was awaited.

The deadline only ends a hang: it is far above what any of this takes, on a busy machine too, so
that no test is about how fast something is.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, TypeVar, overload

DEADLINE_S: Final = 60.0
POLL_S: Final = 0.02

T = TypeVar("T")


@overload
async def until(
    condition: Callable[..., Coroutine[Any, Any, T]],
    what: str = "",
    *,
    deadline_s: float = DEADLINE_S,
    poll_s: float = POLL_S,
) -> T: ...
@overload
async def until(
    condition: Callable[..., T],
    what: str = "",
    *,
    deadline_s: float = DEADLINE_S,
    poll_s: float = POLL_S,
) -> T: ...
async def until(
    condition: Callable[..., Any],
    what: str = "",
    *,
    deadline_s: float = DEADLINE_S,
    poll_s: float = POLL_S,
) -> Any:
    """The first true value of `condition`, a function or a coroutine function.

    Fails after `deadline_s` with `what` was awaited, or else the condition's source, and the
    value that was seen last.
    """
    deadline = time.monotonic() + deadline_s
    while True:
        found = condition()
        value = await found if inspect.isawaitable(found) else found
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(_message(condition, what, deadline_s, value))
        await asyncio.sleep(poll_s)


def until_sync(
    condition: Callable[..., T],
    what: str = "",
    *,
    deadline_s: float = DEADLINE_S,
    poll_s: float = POLL_S,
) -> T:
    """As `until`, for a test without an event loop."""
    deadline = time.monotonic() + deadline_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(_message(condition, what, deadline_s, value))
        time.sleep(poll_s)
    return value


async def together(cases: Mapping[str, Coroutine[Any, Any, object]]) -> None:
    """Run the cases of a test at the same time; each by its name.

    For cases that wait for timers, each in a lab of its own. The first that fails ends the
    others; its name is a note of its exception.
    """

    async def run(name: str, case: Coroutine[Any, Any, object]) -> None:
        try:
            await case
        except Exception as error:
            error.add_note(f"case: {name}")
            raise

    try:
        async with asyncio.TaskGroup() as group:
            for name, case in cases.items():
                group.create_task(run(name, case))
    except BaseExceptionGroup as failed:
        if len(failed.exceptions) == 1:
            raise failed.exceptions[0] from None
        raise


async def steadily(condition: Callable[[], object], *, for_s: float) -> None:
    """Fails at once if `condition` is false at any moment of the next `for_s` seconds."""
    deadline = time.monotonic() + for_s
    while time.monotonic() < deadline:
        assert condition(), f"no longer true: {_source_of(condition)}"
        await asyncio.sleep(POLL_S)


def _message(condition: Callable[[], object], what: str, deadline_s: float, value: object) -> str:
    awaited = what or _source_of(condition)
    return f"not within {deadline_s:g} s: {awaited}\nlast seen: {value!r}"


def _source_of(condition: Callable[[], object]) -> str:
    """The source of a condition: of a lambda the whole statement it stands in."""
    try:
        return inspect.getsource(condition).strip()
    except (OSError, TypeError):
        return repr(condition)
