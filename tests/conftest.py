"""What all tests share: async tests run on a fresh event loop each, and missing tools fail."""

from __future__ import annotations

import asyncio
import inspect
import os

import pytest

from tests.loops import run_on
from tests.thorough import IS_ALL, IS_EVERY, is_left_out, is_of_labs


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run `async def` tests on a fresh asyncio loop each; see tests/loops.py."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    run_on(asyncio.new_event_loop, pyfuncitem.obj(**arguments))
    return True


FIRST = ("tests/systemd/", "tests/netns/", "tests/bench/", "tests/native/", "tests/store/")
"""Folders of long tests, the longest first: what is short comes last and fills every worker."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long tests come first; without root, those that need it fail at once and aloud.

    Those of thorough.LEFT_OUT are run by `make labs`, and if they are named.
    """
    items.sort(key=_turn)
    if not IS_EVERY and not any("::" in each for each in config.args):
        is_run = {
            item: is_of_labs(item.nodeid) if IS_ALL else not is_left_out(item.nodeid)
            for item in items
        }
        if left_out := [item for item in items if not is_run[item]]:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if is_run[item]]
    rooted = ("tests/netns/", "tests/bench/", "tests/facts/", "tests/systemd/")
    needs_root = [item for item in items if item.nodeid.startswith(rooted)]
    if needs_root and os.geteuid() != 0:
        pytest.exit(
            "these tests make network namespaces and TUN devices: run as root", returncode=1
        )


def _turn(item: pytest.Item) -> int:
    """The place of a test's folder in the order of a run."""
    found = (number for number, folder in enumerate(FIRST) if item.nodeid.startswith(folder))
    return next(found, len(FIRST))
