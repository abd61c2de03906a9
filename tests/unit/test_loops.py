"""The tests' own runner: results, and the errors that a loop would only log."""

from __future__ import annotations

import asyncio

import pytest

from tests.loops import LOOPS, LoopFactory, run_on


@pytest.fixture(params=LOOPS)
def loop_factory(request: pytest.FixtureRequest) -> LoopFactory:
    return LOOPS[request.param]


def test_the_result_comes_out(loop_factory: LoopFactory) -> None:
    async def main() -> str:
        await asyncio.sleep(0)
        return type(asyncio.get_running_loop()).__module__.split(".")[0]

    assert run_on(loop_factory, main()) == (
        "asyncio" if loop_factory is LOOPS["asyncio"] else "uvloop"
    )


def test_an_error_in_a_callback_fails_the_test(loop_factory: LoopFactory) -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_soon(lambda: 1 // 0)
        await asyncio.sleep(0.01)

    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_on(loop_factory, main())


def test_a_hang_ends(loop_factory: LoopFactory) -> None:
    with pytest.raises(TimeoutError):
        run_on(loop_factory, asyncio.sleep(3600), hang_s=0.01)
