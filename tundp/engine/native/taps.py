"""Taps of the C engines: a ring for each worker, published as FIBs are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tundp.engine.native.filter import native_filter
from tundp.engine.native.library import require
from tundp.engine.native.worker import Worker
from tundp.engine.taps import TAPS_MAX, Tap, TapRequest
from tundp.errors import TooManyReaders


class NativeTaps:
    """The open taps of an engine's workers."""

    def __init__(self, workers: Sequence[Worker], on_use: Callable[[bool], object]) -> None:
        """on_use: called with True before the first tap opens, with False after the last closed."""
        self._ffi = require().ffi
        self._workers = workers
        self._on_use = on_use
        self._open: list[_NativeTap] = []
        self._generation = 0
        self._asked = 0
        """How often timestamps were asked for."""
        self._published: list[tuple[int, Any]] = []
        """What workers may be using: generation, and what keeps its memory alive."""

    def __len__(self) -> int:
        return len(self._open)

    def open(self, request: TapRequest) -> Tap:
        """See Dataplane.open_tap."""
        self.forget()
        if len(self._open) >= TAPS_MAX:
            raise TooManyReaders(TAPS_MAX)
        tap = _NativeTap(request, len(self._workers), self._close)
        if not self._open:
            self._asked += 1
            self._on_use(True)
        self._open.append(tap)
        self._publish()
        return tap

    def end(self) -> None:
        """The workers have ended: taps that are closed later touch nothing of theirs any more."""
        self._workers = ()
        self._on_use = lambda _: None

    def _close(self, tap: _NativeTap) -> None:
        self._open.remove(tap)
        self._publish()
        if not self._open:
            self._on_use(False)

    def _publish(self) -> None:
        self._generation += 1
        kept: list[Any] = list(self._open)
        for number, worker in enumerate(self._workers):
            taps = self._ffi.new(
                "struct tundp_taps *",
                {
                    "generation": self._generation,
                    "count": len(self._open),
                    "asked": self._asked & 0xFFFFFFFF,
                    "taps": [tap.rings[number] for tap in self._open],
                },
            )
            kept.append(taps)
            worker.tap(taps)
        self._published.append((self._generation, kept))
        self.forget()

    def forget(self) -> None:
        """Free what no worker can be using any more: all before the oldest one that is seen.

        Call it now and then: a worker sees that a tap was closed when it runs next.
        """
        running = (worker.taps_seen() for worker in self._workers if worker.is_running)
        seen = min(running, default=self._generation)
        self._published = [entry for entry in self._published if entry[0] >= seen]


class _NativeTap:
    """See Tap."""

    def __init__(
        self, request: TapRequest, worker_count: int, close: Callable[[_NativeTap], None]
    ) -> None:
        native = require()
        self._ffi, self._lib = native.ffi, native.lib
        self._close = close
        self._is_open = True
        length = request.ring_len
        self._data = [self._ffi.new("uint8_t[]", length) for _ in range(worker_count)]
        self._out = self._ffi.new("uint8_t[]", length)
        self._filter = native_filter(request.filter.ops) if request.filter.ops else self._ffi.NULL
        self.rings = [
            self._ffi.new(
                "struct tundp_tap *",
                {
                    "data": data,
                    "size": length,
                    "snap": request.snap,
                    "stages": request.stages,
                    "filter": self._filter,
                },
            )
            for data in self._data
        ]
        """The C struct of each worker."""

    def read(self) -> Sequence[tuple[int, bytes]]:
        """See Tap."""
        found = []
        for number, ring in enumerate(self.rings):
            length = self._lib.tundp_tap_read(ring, self._out, len(self._out))
            if length:
                found.append((number, bytes(self._ffi.buffer(self._out, length))))
        return found

    def lost(self) -> Sequence[int]:
        """See Tap."""
        return [int(self._lib.tundp_tap_lost(ring)) for ring in self.rings]

    def close(self) -> None:
        """See Tap."""
        if self._is_open:
            self._is_open = False
            self._close(self)
