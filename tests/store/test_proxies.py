"""What stands between us and etcd: etcd's own grpc-proxy, proxies that cut, fewer pings wanted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.store.support import (
    Etcd3World,
    Follower,
    acquired,
    attributes,
    following,
    forwarder,
    lease_key,
    make_claim,
    outcome,
    run,
)
from tests.wait import until
from tundp.lab.etcd import PrivateEtcd, find_etcd, free_port
from tundp.lease.model import Lease, Snapshot
from tundp.store.etcd3 import connection
from tundp.store.etcd3.connection import CONFIG
from tundp.store.etcd3.watch import RESUME_AFTER_S

TTL_S = 86400
PING_S = 0.3
CALMER = "asks for fewer pings"


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pings every PING_S: gRPC servers of etcd's make end a connection with three too many."""
    hasty = replace(
        CONFIG, _keepalive_time=PING_S, _http2_min_sent_ping_interval_without_data=PING_S
    )
    monkeypatch.setattr(connection, "CONFIG", hasty)


@pytest.fixture
def world(start_etcd: Callable[..., PrivateEtcd]) -> Iterator[Etcd3World]:
    with contextlib.closing(Etcd3World(start_etcd().url)) as world:
        yield world


@contextlib.asynccontextmanager
async def grpc_proxy(url: str, port: int, log_path: Path) -> AsyncIterator[str]:
    """`etcd grpc-proxy` before the etcd at `url`; its own URL."""
    address = f"127.0.0.1:{port}"
    argv = [
        *(find_etcd() or "etcd", "grpc-proxy", "start", f"--endpoints={url}"),
        *(f"--listen-addr={address}", f"--advertise-client-url={address}"),
    ]
    with log_path.open("ab") as log:
        process = await asyncio.to_thread(subprocess.Popen, argv, stdout=log, stderr=log)
    try:

        async def listens() -> bool:
            assert process.poll() is None, log_path.read_text()
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                return False
            writer.close()
            return True

        await until(listens, "etcd grpc-proxy listens")
        yield f"http://{address}"
    finally:
        process.kill()
        await asyncio.to_thread(process.wait)


async def write(world: Etcd3World, number: int) -> None:
    value = f'{{"PublicIP":"192.0.2.{number}"}}'
    await asyncio.to_thread(world.put, f"10.5.{number}.0-24", value)


async def see(followers: tuple[Follower, ...], number: int) -> None:
    for follower in followers:
        await until(
            lambda follower=follower: f"10.5.{number}.0-24" in follower.known(),
            f"write {number} seen by the watch",
        )


def snapshots(follower: Follower) -> int:
    return sum(isinstance(update, Snapshot) for update in follower.updates)


def troubles(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


async def watched_quietly(
    world: Etcd3World, urls: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """Two watches see every write, without a new snapshot or a word of trouble.

    gRPC servers count the pings since they last sent anything: so there are pauses.
    """
    one, two = (world.open_at(url) for url in urls)
    async with following(one) as first, following(two) as second:
        for number in (1, 2, 3):
            await write(world, number)
            await see((first, second), number)
            await asyncio.sleep(8 * PING_S)
        assert [snapshots(first), snapshots(second)] == [1, 1]
    assert troubles(caplog) == []
    asked = [each for each in caplog.records if CALMER in each.getMessage()]
    assert asked, "the server has not asked for fewer pings: this test tries nothing"
    # Of each watch 0.3 s, 0.6 s, 1.2 s: three pings of the next one last longer than this test.
    assert len(asked) <= 2 * 4, [each.getMessage() for each in asked]


@pytest.mark.usefixtures("hasty")
def test_watches_through_grpc_proxy(
    world: Etcd3World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It has a cluster id of 0 in watches, and wants a ping every five minutes at most."""
    caplog.set_level(logging.INFO, "tundp")

    async def main() -> None:
        async with grpc_proxy(world.url, free_port(), tmp_path / "log") as url:
            await watched_quietly(world, (url, url), caplog)

    run(main())


@pytest.mark.usefixtures("hasty")
def test_server_that_wants_fewer_pings(
    start_etcd: Callable[..., PrivateEtcd], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tundp")
    etcd = start_etcd(extra=["--grpc-keepalive-min-time=60s"])
    with contextlib.closing(Etcd3World(etcd.url)) as world:
        run(watched_quietly(world, (etcd.url, etcd.url), caplog))


def test_leases_through_grpc_proxy(world: Etcd3World, tmp_path: Path) -> None:
    async def main() -> None:
        async with grpc_proxy(world.url, free_port(), tmp_path / "log") as url:
            store = world.open_at(url)
            lease = await acquired(make_claim(store, "192.0.2.1"))
            newer = await store.update(
                lease.key, attributes("192.0.2.9"), TTL_S, revision=lease.revision
            )
            assert [each.revision for each in (await store.snapshot()).leases] == [newer.revision]
            await store.delete(lease.key, revision=newer.revision)
            assert (await store.snapshot()).leases == ()
            await store.close()

    run(main())


def test_grpc_proxy_restarted(world: Etcd3World, tmp_path: Path) -> None:
    async def main() -> None:
        port = free_port()
        async with contextlib.AsyncExitStack() as stack:
            async with grpc_proxy(world.url, port, tmp_path / "log") as url:
                store = world.open_at(url)
                follower = await stack.enter_async_context(following(store))
                await write(world, 1)
                await see((follower,), 1)
            await write(world, 2)
            async with grpc_proxy(world.url, port, tmp_path / "log"):
                await see((follower,), 2)
                await write(world, 3)
                await see((follower,), 3)
                assert isinstance(
                    await outcome(
                        store.create(lease_key("10.5.9.0-24"), attributes("192.0.2.9"), TTL_S)
                    ),
                    Lease,
                )

    run(main())


def test_proxy_that_cuts_connections(world: Etcd3World, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever was written meanwhile is seen, without a new snapshot or a word of trouble."""

    async def main() -> None:
        async with forwarder(world.url) as proxy:
            async with following(world.open_at(proxy.url)) as follower:
                for number in (1, 2):
                    await write(world, number)
                    await see((follower,), number)
                    await asyncio.sleep(RESUME_AFTER_S + 0.2)
                    for writer in tuple(proxy._writers):
                        writer.transport.abort()
                    await write(world, 10 + number)
                    await see((follower,), 10 + number)
                assert snapshots(follower) == 1
            assert troubles(caplog) == []

    run(main())
