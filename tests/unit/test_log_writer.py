"""The log's writer: in order, never waiting, and honest about what it lost."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator

import pytest

from tests.wait import until_sync
from tundp.daemon import log_writer
from tundp.daemon.log_writer import LogWriter


class Pipe:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read_fd, self.write_fd = os.pipe()
        self.stderr = os.fdopen(self.write_fd, "w")
        monkeypatch.setattr("sys.stderr", self.stderr)
        self.handler = LogWriter()
        self.handler.start()
        monkeypatch.undo()
        self.text = b""

    def log(self, text: str) -> None:
        self.handler.handle(logging.LogRecord("x", logging.INFO, "", 0, text, (), None))

    def read(self) -> bytes:
        os.set_blocking(self.read_fd, False)
        try:
            while data := os.read(self.read_fd, 1 << 16):
                self.text += data
        except BlockingIOError:
            pass
        return self.text


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipe]:
    pipe = Pipe(monkeypatch)
    yield pipe
    os.close(pipe.read_fd)  # ends a thread that waits for its reader
    pipe.handler.flush()
    pipe.stderr.close()


def test_lines_come_in_order_and_flush_waits_for_them(pipe: Pipe) -> None:
    for number in range(500):
        pipe.log(f"line {number} ü\udcff")
    pipe.handler.flush()
    lines = pipe.read().decode().splitlines()
    assert lines == [f"line {number} ü\\udcff" for number in range(500)]


def test_no_thread_is_there_before_it_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would keep the rights the process gives up."""
    before = threading.active_count()
    read_fd, write_fd = os.pipe()
    with os.fdopen(write_fd, "w") as stderr, os.fdopen(read_fd, "rb") as reader:
        monkeypatch.setattr("sys.stderr", stderr)
        handler = LogWriter()
        monkeypatch.undo()
        handler.handle(logging.LogRecord("x", logging.INFO, "", 0, "early", (), None))
        assert os.read(reader.fileno(), 100) == b"early\n"
        assert threading.active_count() == before


def test_nobody_waits_for_a_reader_and_what_is_lost_is_told(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_writer, "MOST_QUEUED_LEN", 100_000)
    monkeypatch.setattr(log_writer, "FLUSH_S", 0.1)
    for _ in range(3000):  # 3 MB: the pipe holds 64 KB
        pipe.log("x" * 1000)
    pipe.handler.flush()
    until_sync(lambda: b"lines of the log lost" in pipe.read())
    lines = pipe.text.decode().splitlines()
    told = int(lines[-1].split()[0])
    assert told > 2000
    assert lines.count("x" * 1000) + told == 3000
    pipe.log("again")
    until_sync(lambda: pipe.read().endswith(b"again\n"))


def test_a_descriptor_somebody_made_nonblocking_loses_nothing(pipe: Pipe) -> None:
    os.set_blocking(pipe.write_fd, False)
    for _ in range(300):
        pipe.log("y" * 1000)
    until_sync(lambda: pipe.read().count(b"\n") == 300)
    assert pipe.text == (b"y" * 1000 + b"\n") * 300


def test_a_reader_that_is_gone_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipe(monkeypatch)
    os.close(pipe.read_fd)
    pipe.log("nobody")
    pipe.handler.flush()
    pipe.stderr.close()


def test_without_a_stderr_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    handler = LogWriter()
    handler.start()
    handler.handle(logging.LogRecord("x", logging.INFO, "", 0, "unseen", (), None))
    handler.flush()
