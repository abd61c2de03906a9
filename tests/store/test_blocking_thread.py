"""BlockingThread: calls in order, errors where they are awaited, and an exit never held up."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from typing import NoReturn

import pytest

from tests.store.support import Runner
from tests.wait import DEADLINE_S, until
from tundp.blocking import BlockingThread


class CustomError(Exception):
    pass


def test_calls_run_in_order_on_one_other_thread(run: Runner) -> None:
    async def main() -> None:
        thread = BlockingThread("test")
        calls: list[tuple[int, str, int]] = []

        def note(number: int) -> int:
            time.sleep(0.001 * (number % 3))
            calls.append((number, threading.current_thread().name, threading.get_ident()))
            return number * 2

        results = await asyncio.gather(*(thread.run(note, number) for number in range(20)))
        assert results == [number * 2 for number in range(20)]
        assert [number for number, _, _ in calls] == list(range(20))
        assert {name for _, name, _ in calls} == {"test"}
        assert {ident for _, _, ident in calls} - {threading.get_ident()} == {calls[0][2]}
        thread.close()

    run(main())


def test_arguments_are_passed_on(run: Runner) -> None:
    async def main() -> None:
        thread = BlockingThread("test")
        assert await thread.run(sorted, [2, 3, 1], reverse=True) == [3, 2, 1]
        thread.close()

    run(main())


@pytest.mark.parametrize(
    "error", [CustomError("why"), KeyError("k"), SystemExit(3), StopIteration()]
)
def test_exceptions_come_out_where_the_call_is_awaited(run: Runner, error: BaseException) -> None:
    def fail() -> NoReturn:
        raise error

    async def main() -> None:
        thread = BlockingThread("test")
        with pytest.raises((type(error), RuntimeError)) as caught:
            await thread.run(fail)
        assert error in (caught.value, caught.value.__cause__)
        assert await thread.run(lambda: "still there") == "still there"
        thread.close()

    run(main())


def test_cancelled_wait_ends_at_once_and_the_call_is_finished(run: Runner) -> None:
    async def main() -> None:
        thread = BlockingThread("test")
        started, go, done = threading.Event(), threading.Event(), threading.Event()

        def stuck() -> None:
            started.set()
            go.wait(DEADLINE_S)
            done.set()

        waiting = asyncio.ensure_future(thread.run(stuck))
        await until(started.is_set)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not done.is_set()
        after = asyncio.ensure_future(thread.run(lambda: done.is_set()))
        go.set()
        assert await after is True
        thread.close()

    run(main())


def test_call_cancelled_before_its_turn_is_never_made(run: Runner) -> None:
    async def main() -> None:
        thread = BlockingThread("test")
        go = threading.Event()
        made: list[str] = []
        first = asyncio.ensure_future(thread.run(go.wait, 30))
        second = asyncio.ensure_future(thread.run(made.append, "second"))
        third = asyncio.ensure_future(thread.run(made.append, "third"))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.sleep(0)
        go.set()
        await asyncio.gather(first, third)
        assert made == ["third"]
        thread.close()

    run(main())


def test_error_of_an_abandoned_call_is_silent(
    run: Runner, capfd: pytest.CaptureFixture[str]
) -> None:
    async def main() -> None:
        thread = BlockingThread("test")
        go = threading.Event()

        def fail() -> NoReturn:
            go.wait(DEADLINE_S)
            raise CustomError

        waiting = asyncio.ensure_future(thread.run(fail))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.wait([waiting])
        go.set()
        assert await thread.run(lambda: 1) == 1
        thread.close()

    run(main())
    assert "CustomError" not in capfd.readouterr().err


def test_close_lets_calls_finish_and_ends_the_thread(run: Runner) -> None:
    async def main() -> None:
        thread = BlockingThread("test-close")
        made: list[int] = []
        calls = [asyncio.ensure_future(thread.run(made.append, n)) for n in range(3)]
        await asyncio.sleep(0)
        thread.close()
        thread.close()
        await asyncio.gather(*calls)
        assert made == [0, 1, 2]
        await until(lambda: "test-close" not in {found.name for found in threading.enumerate()})

    run(main())


def test_no_thread_before_the_first_call() -> None:
    BlockingThread("test-idle").close()
    assert "test-idle" not in {found.name for found in threading.enumerate()}


STUCK = """
import asyncio, threading, time
from tundp.blocking import BlockingThread

async def main():
    thread = BlockingThread("stuck")
    started = threading.Event()
    def call():
        started.set()
        time.sleep(600)
    waiting = asyncio.ensure_future(thread.run(call))
    while not started.is_set():
        await asyncio.sleep(0.01)
    waiting.cancel()
    thread.close()

asyncio.run(main())
print("left", flush=True)
"""


def test_exit_is_not_held_up_by_a_stuck_call() -> None:
    process = subprocess.run(
        [sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=20, check=False
    )
    assert (process.returncode, process.stdout.strip(), process.stderr) == (0, "left", "")


LATE = """
import asyncio, threading, time
from tundp.blocking import BlockingThread

go = threading.Event()
thread = BlockingThread("late")

async def main():
    asyncio.ensure_future(thread.run(go.wait, 30))
    await asyncio.sleep(0.05)

asyncio.run(main())
go.set()
thread.close()
for found in threading.enumerate():
    if found is not threading.current_thread():
        found.join(10)
print("quiet", flush=True)
"""


def test_call_that_ends_after_its_loop_is_silent() -> None:
    process = subprocess.run(
        [sys.executable, "-c", LATE], capture_output=True, text=True, timeout=20, check=False
    )
    assert (process.returncode, process.stdout.strip(), process.stderr) == (0, "quiet", "")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_died_is_replaced(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        thread = BlockingThread("test")
        dying: list[threading.Thread] = []

        def die(*_: object) -> NoReturn:
            dying.append(threading.current_thread())
            raise RuntimeError("bug")

        with monkeypatch.context() as patch:
            patch.setattr("tundp.blocking._post", die)
            lost = asyncio.ensure_future(thread.run(int))
            await until(lambda: dying and not dying[0].is_alive())
        lost.cancel()
        assert await asyncio.wait_for(thread.run(int, "7"), DEADLINE_S) == 7
        thread.close()

    run(main())
