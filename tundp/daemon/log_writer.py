"""A logging handler that never waits: a thread of its own writes the lines to stderr.

Whoever reads stderr may stop reading: a container's log driver, a journal on a disk that hangs,
a pipe into a stopped pager. A write to a full pipe waits, and an event loop that logs waits with
it: no renewal, no peer, no SIGTERM. Here lines queue up to a limit; what comes beyond it is
counted and told as soon as somebody reads again.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections import deque
from typing import Final, TextIO

MOST_QUEUED_LEN: Final = 1 << 20
"""Bytes of lines that may wait for the reader."""
FLUSH_S: Final = 1.0
"""How long `flush`, and with it the end of the process, waits for the reader."""
_POLL_MS: Final = 1000


class LogWriter(logging.StreamHandler[TextIO]):
    """Writes formatted records to the descriptor of stderr, in order, once `start`ed from a thread.

    Without such a descriptor (stderr closed, or replaced by an object that has none) it is a
    plain StreamHandler. Errors of a write lose its line.
    """

    def __init__(self) -> None:
        super().__init__()
        # Taken now: a descriptor 2 that is closed may soon be another file's.
        self._fd = self._descriptor()
        self._changed = threading.Condition()
        self._lines: deque[bytes] = deque()
        self._queued_len = 0
        self._lost = 0
        self._is_started = False

    def start(self) -> None:
        """Write from a thread from now on; before, and where there is none, `emit` writes.

        Not before rights are dropped: a thread keeps those it was started with.
        """
        if self._fd is None or self._is_started:
            return
        self._is_started = True
        try:
            threading.Thread(target=self._run, name="log", daemon=True).start()
        except RuntimeError:  # no thread to be had
            self._is_started = False

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        if self._fd is None:
            super().emit(record)
            return
        try:
            text = self.format(record) + self.terminator
        except Exception:  # noqa: BLE001  (logging's own rule: a bad record harms nobody)
            self.handleError(record)
            return
        line = text.encode(errors="backslashreplace")
        if self._is_started:
            self._queue(line)
        else:
            self._write(line)

    def flush(self) -> None:
        """Wait until all lines are written, for at most `FLUSH_S`."""
        if self._fd is None:
            super().flush()
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._queued_len, FLUSH_S)

    def _queue(self, line: bytes) -> None:
        with self._changed:
            if self._queued_len > MOST_QUEUED_LEN:
                self._lost += 1
                return
            self._lines.append(line)
            self._queued_len += len(line)
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines)
                line = self._lines.popleft()
            self._write(line)
            with self._changed:
                self._queued_len -= len(line)
                lost = 0 if self._lines else self._lost
                self._lost -= lost
                if lost:
                    text = f"{lost} lines of the log lost: who reads stderr did not\n".encode()
                    self._lines.append(text)
                    self._queued_len += len(text)
                self._changed.notify_all()

    def _write(self, line: bytes) -> None:
        assert self._fd is not None
        while line:
            try:
                line = line[os.write(self._fd, line) :]
            except BlockingIOError:
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll(_POLL_MS)
            except OSError:
                return

    def _descriptor(self) -> int | None:
        try:
            return self.stream.fileno()
        except (AttributeError, OSError, ValueError):
            return None
