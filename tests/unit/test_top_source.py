"""Where the rounds of `tundp top` come from: a slow daemon, one without events, /proc."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from tests.wait import until, until_sync
from tundp.admin import serve_admin
from tundp.errors import PlatformError
from tundp.linux.threads import owner_of, threads_of
from tundp.observe.status import CountersStatus, DaemonState, DirectionStatus, Status
from tundp.top.source import ANSWER_SHARE, Source

STATUS = Status(
    version="0.2.0",
    pid=os.getpid(),
    state=DaemonState.RUNNING,
    started_at=1_770_000_000.0,
    uptime_s=9.0,
    public_ip=IPv4Address("192.0.2.1"),
    counters=CountersStatus(encap=DirectionStatus(packets_in=7, packets_out=7)),
)


async def test_a_daemon_slow_to_answer_is_asked_less_often(tmp_path: Path) -> None:
    took_s = 0.2

    def slow() -> Status:
        time.sleep(took_s)
        return STATUS

    path = tmp_path / "admin.sock"
    async with serve_admin(path, slow, lambda: b""):
        source = Source(path, interval=0.1)
        assert (source.interval, source.is_slowed) == (0.1, False)
        for _ in range(2):
            found = await source.look()
        assert source.is_slowed
        assert source.interval >= ANSWER_SHARE * took_s
        assert found.interval_s == round(source.interval, 3)
        source.set_interval(3600.0)
        assert (source.interval, source.is_slowed) == (3600.0, False)


async def test_flows_of_a_daemon_without_events_have_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    async with serve_admin(path, lambda: STATUS, lambda: b""):
        source = Source(path, interval=1.0)
        try:
            await source.set_flows("tcp")
            await source.flows_begin()
            flows = (await source.look()).flows
            assert flows is not None
            assert (flows.filter, flows.rows) == ("tcp", [])
            assert "needs tundp 0.2.0" in flows.error
            await source.set_flows(None)
            assert (await source.look()).flows is None
        finally:
            await source.close()


async def test_the_daemon_goes_and_another_one_comes(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    source = Source(path, interval=1.0)
    async with serve_admin(path, lambda: STATUS, lambda: b""):
        await source.look()
        assert (await source.look()).restarted is False
    with pytest.raises(PlatformError, match="no daemon answers"):
        await source.look()
    other = replace(STATUS, started_at=STATUS.started_at + 5)
    async with serve_admin(path, lambda: other, lambda: b""):
        found = await source.look()
        assert (found.restarted, found.seconds) == (True, 0.0)
        assert found.directions[0].packets_in == 0


async def test_the_threads_of_whoever_listens_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    async with serve_admin(path, lambda: STATUS, lambda: b""):
        assert await asyncio.to_thread(owner_of, path, os.getpid()) == os.getpid()
        assert owner_of(path, os.getpid() + 1) is None, "it is not that process that listens"
        source = Source(path, interval=1.0)
        await source.look()
        kinds = [each.name for each in (await source.look()).threads]
        assert "loop" in kinds
    assert owner_of(path, os.getpid()) is None
    assert list(threads_of(1 << 30)) == []


def test_a_thread_that_works_has_cpu_time() -> None:
    stop = threading.Event()
    tids: list[int] = []

    def work() -> None:
        tids.append(threading.get_native_id())
        Path(f"/proc/self/task/{tids[0]}/comm").write_text("odd ) name")
        while not stop.is_set():
            sum(range(10_000))

    worker = threading.Thread(target=work, daemon=True)
    worker.start()

    def user_s() -> float:
        found = [each for each in threads_of(os.getpid()) if each.tid in tids]
        return found[0].user_s if found else 0.0

    try:
        until_sync(lambda: user_s() > 0.02, "CPU time of the thread")
        (found,) = (each for each in threads_of(os.getpid()) if each.tid in tids)
        assert found.name == "odd ) name"
        assert found.user_s + found.system_s <= time.process_time() + 0.05
    finally:
        stop.set()
        worker.join()


async def test_a_broken_stream_is_named_and_tried_again(tmp_path: Path) -> None:
    """A server that speaks HTTP, and whose events are none."""
    path = tmp_path / "admin.sock"
    asked = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b"\xff" * 64)
        await writer.drain()
        writer.close()

    async with await asyncio.start_unix_server(answer, path):
        source = Source(path, interval=1.0)
        try:
            await source.set_flows("")
            await source.flows_begin()
            assert source._flows is not None
            assert "stream is broken" in source._flows.take(lambda _: "").error
            await until(lambda: asked > 1, "a second attempt")
        finally:
            await source.close()
