"""What ends a daemon and what does not: failures that reach the event loop's handler."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tundp.choices import Loop
from tundp.daemon.process import loop_factory, run_until_signal
from tundp.daemon.supervise import Supervisor

LOOPS = (Loop.ASYNCIO, Loop.UVLOOP)


class FailsOnData(asyncio.Protocol):
    """As an HTTP/2 library whose state and the peer's have parted."""

    def data_received(self, data: bytes) -> None:
        raise AttributeError("no such stream")


class FailsWhenLost(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        raise AttributeError("no connection")


async def future_nobody_awaits() -> None:
    future = asyncio.get_running_loop().create_future()
    future.set_exception(socket.gaierror(socket.EAI_AGAIN, "Temporary failure"))


async def task_nobody_awaits() -> None:
    async def fail() -> None:
        raise OSError("too late")

    task = asyncio.ensure_future(fail())
    await asyncio.sleep(0)
    del task


async def library_fails_on_data() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        transport, _ = await asyncio.get_running_loop().create_connection(FailsOnData, sock=ours)
        theirs.send(b"x")
        await asyncio.sleep(0.02)
        transport.close()


async def library_fails_when_its_connection_is_lost() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        await asyncio.get_running_loop().create_connection(FailsWhenLost, sock=ours)
        await asyncio.sleep(0.02)
    ours.detach()  # uvloop has closed the descriptor, but forgets to tell the object


async def library_timer_fails() -> None:
    def fail() -> None:
        raise KeyError("ping")

    asyncio.get_running_loop().call_later(0, fail)


LATE = (
    future_nobody_awaits,
    task_nobody_awaits,
    library_fails_on_data,
    library_fails_when_its_connection_is_lost,
    library_timer_fails,
)


def run(loop: Loop, failure: Callable[[], Awaitable[None]]) -> list[str]:
    """What a daemon still did after `failure`: nothing if it was ended."""
    done: list[str] = []

    async def daemon() -> None:
        await failure()
        for _ in range(10):
            gc.collect()
            await asyncio.sleep(0.005)
        done.append("alive")

    with asyncio.Runner(loop_factory=loop_factory(loop)) as runner:
        runner.run(run_until_signal(daemon(), Supervisor()))
    return done


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("failure", LATE, ids=lambda failure: failure.__name__)
def test_late_failure_is_logged_and_ends_nothing(
    loop: Loop, failure: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert run(loop, failure) == ["alive"]
    logged = [record for record in caplog.records if record.name == "tundp"]
    assert [record.levelno for record in logged] == [logging.WARNING]
