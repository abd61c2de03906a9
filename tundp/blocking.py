"""Threads: blocking calls off the event loop, one daemon thread per instance.

asyncio's own executor will not do: its threads are joined at interpreter exit, so one
etcd request stuck on a dead server would hold up every shutdown, and its pool hands
one library's non-thread-safe client to several threads.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import queue
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

from tundp.errors import PlatformError

T = TypeVar("T")

_CLONE3: Final = 435
"""asm-generic/unistd.h, and the same number on every architecture (5.3)."""


OFF_LOOP: Final = 1000
"""Entries to be looked at, from which a thread does it."""


ENTRY_LEN: Final = 32
"""Bytes of JSON that take as long to decode as an entry to be looked at."""


async def off_loop(function: Callable[[], T], entries: int) -> T:
    """Call `function`, on a thread if it looks at many entries: the event loop has others too."""
    return await asyncio.to_thread(function) if entries > OFF_LOOP else function()


def entries_in(text_len: int) -> int:
    """How many entries so many bytes of JSON may hold: a number and a comma each, or less."""
    return text_len // ENTRY_LEN


def start_thread(thread: threading.Thread) -> None:
    """Start a thread. PlatformError names what keeps it from starting, and the fix."""
    try:
        thread.start()
    except RuntimeError as error:
        if thread.ident is not None:
            raise  # it was started before: a bug of the caller's
        raise PlatformError(
            f"cannot start the thread {thread.name!r} ({error}): {_why_no_thread()}", errno.EAGAIN
        ) from None


def _why_no_thread() -> str:
    """The reason, as far as clone3(2) tells it, and the fix.

    Called without arguments it starts nothing: EINVAL where it may be called. glibc takes ENOSYS
    for a kernel that has it not, and uses clone(2); any other error is final.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(ctypes.c_long(_CLONE3), None, ctypes.c_size_t(0))
    if ctypes.get_errno() in (errno.EPERM, errno.EACCES):
        return (
            "a seccomp filter refuses clone3(2), which the C library takes for final where ENOSYS"
            " would do; use a newer container runtime (Docker 20.10.10 or later), or a seccomp"
            " profile that answers ENOSYS to clone3"
        )
    return (
        "too many processes and threads, or too little memory; raise pids.max of the cgroup"
        " (TasksMax= of the unit, --pids-limit of the container) or the limit of processes"
        " (ulimit -u)"
    )


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
        """`function(*args, **kwargs)` on the thread; its result or its exception here.

        PlatformError if the thread cannot be started.
        """
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
            start_thread(self._thread)
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
