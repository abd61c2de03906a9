"""A capture's outputs: files in a ring, pipes with slow readers and none, a disk that is full."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import resource
from collections.abc import AsyncIterator, Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest
from scapy.utils import RawPcapNgReader

from tests.packets import udp
from tests.wait import until
from tundp.errors import Interrupted, PlatformError
from tundp.observe import capture_run
from tundp.observe.capture import CaptureAbout, CaptureChoice, Recorder
from tundp.observe.capture_output import (
    CaptureOutput,
    Ring,
    open_fifo,
    open_output,
    open_standard_output,
)
from tundp.observe.capture_pcapng import PcapngFile
from tundp.observe.capture_run import CaptureRun
from tundp.observe.capture_text import text_line, text_lost
from tundp.observe.events import Event
from tundp.wire.event import Record, Stage

ABOUT = CaptureAbout(
    version="1", node=IPv4Address("192.0.2.1"), network=IPv4Network("10.5.0.0/16"),
    subnet=IPv4Network("10.5.1.0/24"), tun="flannel0", mtu=1472, port=8285, engine="gso",
)  # fmt: skip


def event(number: int, payload_len: int = 100) -> Event:
    packet = udp(number.to_bytes(4, "big") + bytes(payload_len - 4))
    record = Record(stage=Stage.TUN_READ, packet_id=number, length=len(packet), packet=packet)
    return Event(worker=0, record=record, time_ns=10**18 + number, reason=None, peer=None)


class Source:
    """Events, a batch at a time; then, if it stays open, none for ever."""

    def __init__(self, *batches: list[Event], stays: bool = False) -> None:
        self.batches = batches
        self.stays = stays
        self.lost = 0
        self.given = 0

    async def __aiter__(self) -> AsyncIterator[Event]:
        for batch in self.batches:
            for each in batch:
                yield each
            self.given += 1
            await asyncio.sleep(0.001)
        if self.stays:
            await asyncio.Event().wait()


def make_run(
    to_file: CaptureOutput | None, to_lines: CaptureOutput | None = None, **changes: Any
) -> CaptureRun:
    recorder = Recorder(ABOUT, CaptureChoice())
    return CaptureRun(
        recorder=recorder, file=PcapngFile(recorder, 0), to_file=to_file, to_lines=to_lines,
        line=text_line, lost_line=text_lost, **changes,
    )  # fmt: skip


async def run(
    source: Source, to_file: CaptureOutput | None, *, for_s: float | None = None, **changes: Any
) -> CaptureRun:
    made = make_run(to_file, **changes)
    await made.run(source, asyncio.Event(), for_s)
    return made


def numbers(data: bytes) -> list[int]:
    reader: Any = RawPcapNgReader
    return [int.from_bytes(each[28:32], "big") for each, _ in reader(io.BytesIO(data))]


def ends_with_a_block(data: bytes) -> bool:
    """Whether a file is made of whole blocks, by their lengths."""
    at = 0
    while at + 12 <= len(data):
        at += int.from_bytes(data[at + 4 : at + 8], "little")
    return at == len(data)


def numbers_in(path: Path) -> list[int]:
    return numbers(path.read_bytes())


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Both ends; what is still open is closed."""
    ends = os.pipe()
    yield ends
    for end in ends:
        with contextlib.suppress(OSError):
            os.close(end)


@pytest.mark.parametrize(
    ("ring", "expected"),
    [
        (Ring(), ["f", "f", "f"]),
        (Ring(file_len=1), ["f", "f1", "f2"]),
        (Ring(file_len=1, files=2), ["f0", "f1", "f0"]),
        (Ring(file_len=1, files=11), ["f00", "f01", "f02"]),
        (Ring(file_len=1, files=10), ["f0", "f1", "f2"]),
    ],
)
def test_names_of_files_are_tcpdumps(ring: Ring, expected: list[str]) -> None:
    assert [ring.path(Path("/x/f"), at).name for at in range(3)] == expected


async def test_a_file_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "out"
    before = os.umask(0)
    try:
        output = open_output(path, Ring())
    finally:
        os.umask(before)
    await run(Source([event(1)], [event(2)]), output)
    output.close()
    assert numbers_in(path) == [1, 2]
    assert path.stat().st_mode & 0o777 == 0o600
    again = open_output(path, Ring())
    again.close()
    assert path.stat().st_size == 0, "what was there before is gone"


async def test_a_ring_keeps_the_newest_and_every_file_is_whole(tmp_path: Path) -> None:
    output = open_output(tmp_path / "out", Ring(file_len=20_000, files=3))
    await run(Source([event(each) for each in range(1000)]), output)
    output.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out0", "out1", "out2"]
    found = sorted(numbers_in(path) for path in tmp_path.iterdir())
    kept = [each for part in found for each in part]
    assert kept == list(range(kept[0], 1000))
    assert kept[0] > 0
    assert all(path.stat().st_size < 22_000 for path in tmp_path.iterdir())


async def test_the_count_is_exact(tmp_path: Path) -> None:
    output = open_output(tmp_path / "out", Ring())
    made = await run(Source([event(each) for each in range(9)], stays=True), output, count_max=4)
    output.close()
    assert (made.count, numbers_in(tmp_path / "out")) == (4, [0, 1, 2, 3])


async def test_it_ends_in_time_without_a_packet(tmp_path: Path) -> None:
    output = open_output(tmp_path / "out", Ring())
    await run(Source(stays=True), output, for_s=0.05)
    output.close()
    data = (tmp_path / "out").read_bytes()
    assert numbers(data) == []
    assert data.count(b"\x05\0\0\0") >= 4, "statistics of all four interfaces"


async def test_what_passed_before_the_end_is_read(tmp_path: Path) -> None:
    """A reader that lags behind: packets of before Ctrl-C are in the file, later ones are not."""
    output = open_output(tmp_path / "out", Ring())
    now = 10**18 + 5000
    source = Source(*[[event(each)] for each in range(10_000)])
    stop = asyncio.Event()
    made = make_run(output, clock=lambda: now)
    task = asyncio.create_task(made.run(source, stop, None))
    await until(lambda: made.count > 100, "the first packets")
    stop.set()
    await asyncio.wait_for(task, 60)
    output.close()
    assert numbers_in(tmp_path / "out") == list(range(5001))


async def test_a_second_signal_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture_run, "CATCH_UP_S", 1e9)
    output = open_output(tmp_path / "out", Ring())
    source = Source(*[[event(each)] for each in range(100_000)])
    stop = asyncio.Event()
    made = make_run(output)
    task = asyncio.create_task(made.run(source, stop, None))
    await until(lambda: made.count > 10, "the first packets")
    stop.set()
    made.hurry.set()
    await asyncio.wait_for(task, 60)
    output.close()
    found = numbers_in(tmp_path / "out")
    assert found == list(range(len(found)))
    assert len(found) < 90_000


async def test_every_batch_is_written_before_the_next_comes(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.set_blocking(reading, False)
    output = open_standard_output(writing)
    source = Source([event(1)], stays=True)
    stop = asyncio.Event()
    task = asyncio.create_task(make_run(output).run(source, stop, None))
    data = b""

    def has_packet() -> bool:
        nonlocal data
        with contextlib.suppress(BlockingIOError):
            data += os.read(reading, 1 << 20)
        return b"\x06\0\0\0" in data and numbers(data) == [1]

    await until(has_packet, "the packet in the pipe while the capture runs")
    stop.set()
    await task
    output.close()


async def test_a_reader_that_does_not_read_holds_nothing_up(pipe: tuple[int, int]) -> None:
    writing = pipe[1]
    output = open_standard_output(writing)
    source = Source(*[[event(each, 1400) for each in range(100)] for _ in range(5)], stays=True)
    stop = asyncio.Event()
    made = make_run(output)
    task = asyncio.create_task(made.run(source, stop, None))
    await until(lambda: made.count >= 180, "more packets than a pipe holds are taken")
    assert not os.get_blocking(output._fd)
    assert os.get_blocking(writing), "the descriptor others have is left as it was"
    stop.set()
    await asyncio.wait_for(task, 30)  # gives up what nobody reads
    output.close()


async def test_a_slow_reader_gets_everything(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    output = open_standard_output(writing)
    os.close(writing)
    expected = list(range(500))
    source = Source([event(each, 1400) for each in expected])

    async def read_all() -> bytes:
        data = b""
        while part := await asyncio.to_thread(os.read, reading, 8192):
            data += part
        return data

    reader = asyncio.create_task(read_all())
    await run(source, output)
    output.close()
    assert numbers(await reader) == expected


async def test_a_reader_that_left_is_noticed_without_a_packet(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    output = open_standard_output(writing)
    task = asyncio.create_task(make_run(output).run(Source(stays=True), asyncio.Event(), None))
    await asyncio.sleep(0.05)
    assert not task.done()
    os.close(reading)
    with pytest.raises(BrokenPipeError):
        await asyncio.wait_for(task, 30)
    output.close()


async def test_a_full_disk_leaves_whole_packets_and_says_so(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "out"
    output = open_output(path, Ring())
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(PlatformError) as caught:
            await run(Source([event(each) for each in range(1000)]), output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        output.close()
    assert str(caught.value).startswith(f"cannot write {path}: File too large; it ends with the")
    found = numbers_in(path)
    assert found == list(range(len(found)))
    assert len(found) > 50
    assert 29_000 < path.stat().st_size <= 30_000
    assert ends_with_a_block(path.read_bytes())


async def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match=r"cannot write .*missing/out: No such file"):
        open_output(tmp_path / "missing" / "out", Ring())


async def test_a_fifo_is_written_like_a_pipe(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = asyncio.create_task(asyncio.to_thread(path.read_bytes))
    output = await open_fifo(path, asyncio.Event())
    await run(Source([event(1), event(2)]), output)
    output.close()
    assert numbers(await reader) == [1, 2]


async def test_a_fifo_nobody_reads_can_be_given_up(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(0.1, stop.set)
    with pytest.raises(Interrupted, match=r"nobody opened .*/fifo to read"):
        await asyncio.wait_for(open_fifo(path, stop), 30)


async def test_losses_are_a_line_and_a_number(pipe: tuple[int, int], tmp_path: Path) -> None:
    reading, writing = pipe
    lines = open_standard_output(writing)
    os.close(writing)
    output = open_output(tmp_path / "out", Ring())
    source = Source([event(1)], [event(2)], [])
    source.lost = 7
    made = await run(source, output, to_lines=lines)
    lines.close()
    output.close()
    printed = os.read(reading, 1 << 16).decode().splitlines()
    assert printed[0] == "-- 7 events lost: they were not read in time"
    assert (len(printed), made.lost) == (3, 7)
    assert b"7 events of all interfaces were lost" in (tmp_path / "out").read_bytes()


async def test_files_that_were_there_become_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("c.pcapng", "c.pcapng1"):
        (tmp_path / name).write_bytes(b"old")
        (tmp_path / name).chmod(0o644)
    output = open_output(tmp_path / "c.pcapng", Ring(file_len=1))
    output.next_file()
    output.close()
    for name in ("c.pcapng", "c.pcapng1"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    assert output.exposed == ""

    def refuse(fd: int, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    (tmp_path / "c.pcapng").chmod(0o640)
    # As FAT does, which cannot be mounted everywhere.
    monkeypatch.setattr(os, "fchmod", refuse)
    output = open_output(tmp_path / "c.pcapng", Ring())
    output.close()
    assert "c.pcapng has mode 640, which cannot be changed (Operation not" in output.exposed
    output = open_output(Path("/dev/null"), Ring())
    output.close()
    assert output.exposed == ""
