"""Blocking calls off the event loop, one daemon thread per instance.

asyncio's own executor will not do: its threads are joined at interpreter exit, so one
etcd request stuck on a dead server would hold up every shutdown, and its pool hands
one library's non-thread-safe client to several threads.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class BlockingThread:
    """Run calls one after another, in order, on a thread that never delays process exit.

    Cancelling a waiting `run` abandons the call: it still finishes on the thread, and
    its result is thrown away. Whoever needs a call to end sooner must interrupt it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def run(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """`function(*args, **kwargs)` on the thread; its result or its exception here."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def call() -> None:
            if future.cancelled():
                return
            try:
                result = function(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001  (it is raised again, where it is awaited)
                _post(loop, _fail, future, error)
            else:
                _post(loop, _resolve, future, result)

        if self._thread is None or not self._thread.is_alive():
            # Never begun, or ended by what no call of ours raises: calls in the queue go on.
            self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            self._thread.start()
        self._calls.put(call)
        return await future

    def close(self) -> None:
        """End the thread once the calls before this one are done. Does not wait."""
        if self._thread is not None:
            self._calls.put(None)
            self._thread = None

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            call()


def _post(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> None:
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        # The loop is closed: the one that waited is gone, and so is its interest.
        return


def _resolve(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if future.done():
        return
    if isinstance(error, StopIteration):
        # asyncio refuses to carry one: it would end whatever generator awaits it.
        wrapped = RuntimeError(f"a blocking call raised {error!r}")
        wrapped.__cause__ = error
        error = wrapped
    future.set_exception(error)
