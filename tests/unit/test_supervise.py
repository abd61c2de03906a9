"""Tasks and callbacks that fail: what starts again, what ends the daemon, what is said of it."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

import pytest

from tests.wait import until
from tundp.backoff import Backoff
from tundp.choices import Loop
from tundp.daemon import supervise
from tundp.daemon.process import loop_factory, run_until_signal
from tundp.daemon.supervise import Supervisor
from tundp.errors import DuplicateNode, LeaseLost, PlatformError, StoreError, TundpError
from tundp.finding import Verdict
from tundp.linux.firewall import watch


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(supervise, "LONGEST_PAUSE_S", 0.002)


class Failing:
    """A task that fails so often before it works."""

    def __init__(self, times: int, error: Callable[[], BaseException]) -> None:
        self.left = times
        self.error = error
        self.runs = 0

    async def __call__(self) -> None:
        self.runs += 1
        await asyncio.sleep(0)
        if self.left:
            self.left -= 1
            raise self.error()
        await asyncio.sleep(3600)


@pytest.mark.parametrize(
    "error",
    [
        lambda: RuntimeError("bug"),
        lambda: StoreError("nobody awaited it"),
        lambda: PlatformError("nobody awaited it"),
        lambda: ExceptionGroup("several", [KeyError("bug")]),
        lambda: asyncio.CancelledError(),
    ],
)
async def test_a_task_that_fails_starts_again(error: Callable[[], BaseException]) -> None:
    supervisor = Supervisor()
    main = Failing(2, error)
    task = asyncio.ensure_future(supervisor.keep("it", main))
    await until(lambda: main.runs == 3)
    assert supervisor.failures() == {"it": 2}
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("end", [LeaseLost("gone"), DuplicateNode("another")])
async def test_what_is_meant_to_end_the_daemon_ends_it(end: TundpError) -> None:
    for error in (end, ExceptionGroup("", [KeyError(), ExceptionGroup("", [end])])):
        main = Failing(1, lambda error=error: error)  # type: ignore[misc]
        with pytest.raises(type(end)):
            await Supervisor().keep("it", main)


async def test_a_task_that_returns_is_not_started_again() -> None:
    async def main() -> None:
        return

    supervisor = Supervisor()
    await supervisor.keep("it", main)
    assert supervisor.findings()[0].verdict is Verdict.OK


async def test_a_task_that_fails_while_it_is_cancelled_stays_ended() -> None:
    started = 0

    async def main() -> None:
        nonlocal started
        started += 1
        try:
            await asyncio.sleep(3600)
        finally:
            raise RuntimeError("bug on the way out")

    task = asyncio.ensure_future(Supervisor().keep("it", main))
    await until(lambda: started == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert started == 1


async def test_findings_say_which_how_often_and_why(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = Supervisor()
    main = Failing(supervise.FAILING_AFTER, lambda: RuntimeError("the error"))
    task = asyncio.ensure_future(supervisor.keep("follow leases", main))
    await until(lambda: main.runs == supervise.FAILING_AFTER + 1)
    (finding,) = supervisor.findings()
    assert (finding.id, finding.verdict) == ("tasks", Verdict.FAIL)
    assert "follow leases: failed 3 times, last at 20" in finding.evidence
    assert "keeps failing: RuntimeError: the error" in finding.evidence
    assert [r.levelno for r in caplog.records if r.exc_info] == [logging.ERROR]
    monkeypatch.setattr(supervise, "STEADY_S", 0.0)  # it has run for so long since
    assert supervisor.findings()[0].verdict is Verdict.WARN
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def fail() -> None:
    Backoff.next_s(None)  # type: ignore[arg-type]  # a bug in code of ours


def run(loop: Loop, failure: Callable[[], None], supervisor: Supervisor) -> str:
    """What a daemon with a `failure` in it comes to."""

    async def daemon() -> None:
        failure()
        await asyncio.sleep(30)

    with asyncio.Runner(loop_factory=loop_factory(loop)) as runner:
        try:
            runner.run(run_until_signal(daemon(), supervisor))
        except TundpError as error:
            return str(error)
        return "stopped"


@pytest.mark.parametrize("loop", [Loop.ASYNCIO, Loop.UVLOOP])
def test_a_callback_that_fails_now_and_then_is_counted(loop: Loop) -> None:
    supervisor = Supervisor()

    def failure() -> None:
        running = asyncio.get_running_loop()
        for number in range(5):
            running.call_later(0.01 * number, fail)
        task = asyncio.current_task()
        assert task is not None
        running.call_later(0.1, task.cancel)

    assert run(loop, failure, supervisor) == "stopped"
    assert supervisor.failures() == {supervise.CALLBACKS: 5}


@pytest.mark.parametrize("loop", [Loop.ASYNCIO, Loop.UVLOOP])
def test_a_reader_that_spins_ends_the_daemon(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = socket.socketpair()
    supervisor = Supervisor()

    def failure() -> None:
        theirs.send(b"x")  # nobody reads it: the descriptor stays readable
        asyncio.get_running_loop().add_reader(ours.fileno(), fail)

    with ours, theirs:
        assert run(loop, failure, supervisor).startswith("ended by a bug")
    tracebacks = [record for record in caplog.records if record.exc_info]
    assert len(tracebacks) == 1
    assert len(caplog.records) < 10


async def test_a_reader_that_spins_goes_with_the_task_that_owns_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The firewall's notifications: the task that reads them starts again, once."""
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(watch, "_open_watcher", lambda: ours.dup())
    supervisor = Supervisor()
    supervisor.own({"linux/firewall/watch.py": "keep firewall"})
    runs = 0
    can_go_on: list[bool] = []

    async def main() -> None:
        nonlocal runs
        runs += 1
        async with watch.watch_ruleset():
            await asyncio.sleep(3600)

    loop = asyncio.get_running_loop()
    loop.set_exception_handler(
        lambda _, context: can_go_on.append(supervisor.callback_failed(context["exception"]))
    )
    with ours, theirs:
        task = asyncio.ensure_future(supervisor.keep("keep firewall", main))
        await until(lambda: runs == 1)
        monkeypatch.setattr(socket.socket, "recv", lambda *_: 1 // 0)
        theirs.send(b"x")
        await until(lambda: runs == 2)
        await until(lambda: False in can_go_on)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert can_go_on[: supervise.SPIN_COUNT] == [True] * supervise.SPIN_COUNT
