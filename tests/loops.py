"""Runs coroutines for the tests, on either event loop the daemon may use.

No plugin does this: pytest-asyncio and anyio bring fixtures and scopes of their own for what is
one function here, and neither fails a test for an error that its loop only logs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

import uvloop

T = TypeVar("T")
LoopFactory = Callable[[], asyncio.AbstractEventLoop]

LOOPS: Final[dict[str, LoopFactory]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


def run_on(
    loop_factory: LoopFactory, main: Coroutine[Any, Any, T], *, hang_s: float | None = None
) -> T:
    """The result of `main` on a fresh loop.

    Fails for an error nobody awaited (a callback's, a task's that was dropped), and with
    TimeoutError after `hang_s` seconds.
    """
    unhandled: list[dict[str, Any]] = []

    async def guarded() -> T:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: unhandled.append(context)
        )
        async with asyncio.timeout(hang_s):
            return await main

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        result = runner.run(guarded())
    assert not unhandled, unhandled
    return result
