"""What all tests share: async tests run on a fresh event loop each, and missing tools fail."""

from __future__ import annotations

import asyncio
import inspect
import os

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run `async def` tests, leaving nothing on the loop behind."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    asyncio.run(pyfuncitem.obj(**arguments))
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need root fail at once and aloud without it, rather than one by one."""
    rooted = ("tests/netns/", "tests/bench/", "tests/facts/", "tests/systemd/")
    needs_root = [item for item in items if item.nodeid.startswith(rooted)]
    if needs_root and os.geteuid() != 0:
        pytest.exit(
            "these tests make network namespaces and TUN devices: run as root", returncode=1
        )
