"""Fixtures of the store tests: etcds, worlds and loops. Every process ends with its fixture."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from urllib3 import Timeout

from tests.loops import LOOPS
from tests.store.pki import Pki
from tests.store.support import (
    FREQUENT_PINGS,
    Etcd3World,
    EtcdWorld,
    FileWorld,
    Runner,
    World,
    run_closing,
)
from tundp.lab.etcd import PrivateEtcd
from tundp.store import file
from tundp.store.etcd2 import connection as etcd2
from tundp.store.etcd3 import connection, watch


@pytest.fixture(params=sorted(LOOPS))
def run(request: pytest.FixtureRequest) -> Runner:
    """Runs a coroutine, once on each loop the daemon may use."""
    return functools.partial(run_closing, LOOPS[request.param])


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """Two CAs, and certificates of them."""
    pki = Pki(tmp_path_factory.mktemp("pki"))
    for name in ("ca", "foreign-ca"):
        pki.make_ca(name)
    # As most are made: the server's is for servers only, so the JSON gateway could not use it.
    pki.make("server", usage="serverAuth", alt_name="IP:127.0.0.1,DNS:localhost")
    pki.make("elsewhere", usage="serverAuth", alt_name="IP:192.0.2.9,DNS:etcd.example")
    pki.make("client", usage="clientAuth")
    pki.make("stranger", ca="foreign-ca", usage="clientAuth")
    pki.make_expired("expired")
    return pki


@pytest.fixture(scope="session")
def start_shared_etcd() -> Iterator[Callable[..., PrivateEtcd]]:
    """Starts etcds that stay until the last test is over."""
    with _etcds() as start:
        yield start


@pytest.fixture(scope="session")
def etcd_url(start_shared_etcd: Callable[..., PrivateEtcd]) -> str:
    """One etcd for all tests that do not stop it. Each uses a prefix of its own."""
    return start_shared_etcd().url


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
def etcd3_world(etcd_url: str) -> Iterator[Etcd3World]:
    with contextlib.closing(Etcd3World(etcd_url)) as world:
        yield world


@pytest.fixture
def file_world(tmp_path: Path) -> Iterator[FileWorld]:
    with contextlib.closing(FileWorld(tmp_path / "leases.json")) as world:
        yield world


@pytest.fixture(params=["etcd", "etcd3", "file"])
def world(request: pytest.FixtureRequest) -> World:
    """The same test against every store."""
    found: World = request.getfixturevalue(f"{request.param}_world")
    return found


@pytest.fixture
def worlds(
    etcd_world: EtcdWorld, etcd3_world: Etcd3World, file_world: FileWorld
) -> dict[str, World]:
    """One of each, for a test that is in all of them at once (`everywhere`)."""
    return {"etcd": etcd_world, "etcd3": etcd3_world, "file": file_world}


@pytest.fixture
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second each, not five and twelve; pings of a watch every second."""
    monkeypatch.setattr(etcd2, "REQUEST_TIMEOUT_S", 1.0)
    for module in (connection, watch):
        monkeypatch.setattr(module, "REQUEST_TIMEOUT_S", 1.0)
    monkeypatch.setattr(
        connection,
        "CONFIG",
        replace(
            connection.CONFIG,
            _keepalive_time=1.0,
            _keepalive_timeout=1.0,
            _http2_min_sent_ping_interval_without_data=1.0,
        ),
    )


@pytest.fixture
def endless_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing ends by its own timeout: whoever waits for that waits until the test has hung."""
    hour_s = 3600.0
    monkeypatch.setattr(etcd2, "REQUEST_TIMEOUT_S", hour_s)
    monkeypatch.setattr(etcd2, "WATCH_TIMEOUT", Timeout(connect=hour_s, read=hour_s))
    for module in (connection, watch):
        monkeypatch.setattr(module, "REQUEST_TIMEOUT_S", hour_s)
    monkeypatch.setattr(file, "_POLL_S", hour_s)


@contextlib.contextmanager
def _etcds() -> Iterator[Callable[..., PrivateEtcd]]:
    etcds: list[PrivateEtcd] = []

    def start(
        address: str = "127.0.0.1", *, extra: Sequence[str] = (), **options: Any
    ) -> PrivateEtcd:
        etcd = PrivateEtcd(address, extra=(FREQUENT_PINGS, *extra), **options)
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
