"""Fixtures of the store tests: etcds, worlds and loops. Every process ends with its fixture."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop

from tests.store.support import EtcdWorld, FileWorld, Runner, World, run_on
from tundp.lab.etcd import PrivateEtcd

_LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(params=sorted(_LOOPS))
def run(request: pytest.FixtureRequest) -> Runner:
    """Runs a coroutine, once on each loop the daemon may use."""
    return functools.partial(run_on, _LOOPS[request.param])


@pytest.fixture(scope="session")
def etcd_url() -> Iterator[str]:
    """One etcd for all tests that do not stop it. Each uses a prefix of its own."""
    with _etcds() as start:
        yield start().url


@pytest.fixture
def start_etcd() -> Iterator[Callable[..., PrivateEtcd]]:
    """Starts etcds that belong to this test alone."""
    with _etcds() as start:
        yield start


@pytest.fixture
def etcd_world(etcd_url: str) -> Iterator[EtcdWorld]:
    with contextlib.closing(EtcdWorld(etcd_url)) as world:
        yield world


@pytest.fixture
def file_world(tmp_path: Path) -> Iterator[FileWorld]:
    with contextlib.closing(FileWorld(tmp_path / "leases.json")) as world:
        yield world


@pytest.fixture(params=["etcd", "file"])
def world(request: pytest.FixtureRequest) -> World:
    """The same test against every store."""
    found: World = request.getfixturevalue(f"{request.param}_world")
    return found


@contextlib.contextmanager
def _etcds() -> Iterator[Callable[..., PrivateEtcd]]:
    etcds: list[PrivateEtcd] = []

    def start(address: str = "127.0.0.1") -> PrivateEtcd:
        etcd = PrivateEtcd(address)
        etcds.append(etcd)
        asyncio.run(etcd.start())
        return etcd

    try:
        yield start
    finally:
        for etcd in etcds:
            asyncio.run(_end(etcd))


async def _end(etcd: PrivateEtcd) -> None:
    # A test may have stopped it with SIGSTOP; SIGTERM would have to wait for SIGCONT.
    with contextlib.suppress(Exception):
        os.kill(etcd.pid, signal.SIGCONT)
    await etcd.close()
