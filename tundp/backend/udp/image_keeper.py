"""The image kept in step with the routes, and an early start ended: engine/image.py, early.py.

A consumer of FIBs like others. Each new one is written by a thread, the newest only, and no more
often than costs a twentieth of a CPU: an image may be a tenth of a second older than the routes,
with tens of thousands of leases half a second. What was counted is written when the node stops,
so that a start after a crash counts from 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

import tundp
from tundp.backoff import Outage
from tundp.blocking import BlockingThread
from tundp.engine import image as images
from tundp.engine.base import Dataplane, EarlyPlan
from tundp.engine.counter_base import HOP_BASE_DTYPE, CounterBase, from_document
from tundp.engine.counters import Counters
from tundp.engine.image import ImageWriter, Unfit
from tundp.engine.native.early import FIB, WORKERS, EarlyWorkers, sizes
from tundp.engine.native.early_base import counted_by
from tundp.engine.native.fib import fib_sections
from tundp.lease.fib import Fib
from tundp.lease.routing import RoutingDelta
from tundp.linux.tun import Tun

_log = logging.getLogger(__name__)

WRITE_S: Final = 0.1
"""Between two images, at least."""
WRITE_SHARE: Final = 20.0
"""And so many times what writing the last one took."""
_TOTALS: Final = "counters"
_HOPS: Final = "hop_counters"
_COLUMNS: Final = ",".join(HOP_BASE_DTYPE.names or ())
"""What a row of _HOPS has, for a tundp that counts something else."""


class ImageKeeper:
    """See the module. Called on the event loop's thread."""

    def __init__(
        self, fd: int | None = None, early: EarlyWorkers | None = None, *, why_not: str = ""
    ) -> None:
        """fd: a predecessor's image, None for a new one; early: who carries packets by it.

        Both are this object's from here on. why_not: why the next start is not to be early.
        """
        self._early = early
        self._why_not = why_not
        self._given: images.Image | None = None
        self._base = CounterBase()
        self._take_over(fd)
        self.fd = self._make() if fd is None else fd
        """The memfd; -1 if there is none to be had."""
        self._writer = None if self.fd < 0 else ImageWriter(self.fd)
        self._lock = threading.Lock()
        self._thread = BlockingThread("image")
        self._outage = Outage(_log, "the image for an early start")
        self._plan: EarlyPlan | None = None
        self._facts: dict[str, Any] = {}
        self._fib: Fib | None = None
        self._is_stale = False
        self._task: asyncio.Task[None] | None = None

    @property
    def is_successor(self) -> bool:
        """Whether the descriptors are those of a daemon of this node, which left its image."""
        return self._given is not None

    def end_early(self) -> None:
        """End the workers of an early start, if there are any: another reads from here on."""
        early, self._early = self._early, None
        if early is None:
            return
        early.close()
        counted = counted_by(early)
        totals = self._base.with_counted(counted.totals, has_old_socks=True)
        self._base = replace(self._base + counted, totals=totals)
        if early.error:
            _log.warning("the early start's packet threads ended: %s", early.error)
        _log.info(
            "early start ended: it carried %d packets out and %d in, dropped %d",
            counted.totals.encap.packets_out,
            counted.totals.decap.packets_out,
            counted.totals.encap.dropped + counted.totals.decap.dropped,
        )

    def begin(self, engine: Dataplane, totals: Counters | None = None) -> None:
        """End the early start and have `engine` count on. Then attach it, with no await between.

        totals: what another process counted until just now, when it wrote its last image.
        """
        self.end_early()
        if totals is not None:
            self._take_over(self.fd)
            self._base = replace(self._base, totals=totals)
            self._writer = ImageWriter(self.fd) if self.fd >= 0 else None
        engine.go_on_from(self._base)

    def pause(self, engine: Dataplane) -> None:
        """Write an image with what `engine`, detached, has counted, and no more: for a successor.

        `attached` goes on.
        """
        self._end_writing()
        self._write_last(engine.base())
        self._writer = None

    def attached(
        self, engine: Dataplane, tun: Tun, socks: Sequence[socket.socket], fib: Fib | None = None
    ) -> None:
        """The engine was attached: to these. fib: what it was made with."""
        self._fib = fib or self._fib
        if self._writer is None and self.fd >= 0:
            self._writer = ImageWriter(self.fd)
        self._plan = engine.early_plan()
        self._facts = facts_of(tun, socks)
        self._write_soon()

    def install(self, fib: Fib, delta: RoutingDelta) -> None:
        """See FibSink."""
        self._fib = fib
        self._write_soon()

    def seen(self) -> int:
        """See FibSink. An image's hop ids are its own."""
        return 0 if self._fib is None else self._fib.generation

    def finish(self, engine: Dataplane | None) -> None:
        """Write the last image, with what was counted; engine: detached, None if there was none."""
        self.end_early()
        self._end_writing()
        self._write_last(self._base if engine is None else engine.base())
        self._writer = None

    def leave(self) -> None:
        """Write nothing more: the image is another process's."""
        self._end_writing()
        self._writer = None

    def _end_writing(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def _write_last(self, base: CounterBase) -> None:
        """Write an image with counters; a thread that is writing one is waited for."""
        with contextlib.suppress(OSError, Unfit), self._lock:
            if self._writer is not None and (self._given is not None or self._fib is not None):
                about, sections = self._content(self._plan, self._fib)
                totals = json.dumps(base.totals.as_dict()).encode()
                hops = base.hops.view(np.uint8)
                self._writer.write(
                    {**about, "hop_columns": _COLUMNS},
                    {**sections, _TOTALS: totals, _HOPS: hops},
                )

    def close(self) -> None:
        """End everything; after `finish`, or without it if nothing is to be kept."""
        self.end_early()
        if self._task is not None:
            self._task.cancel()
        self._thread.close()
        with self._lock:  # a thread may be writing
            fd, self.fd, self._writer = self.fd, -1, None
            if fd >= 0:
                os.close(fd)

    def _take_over(self, fd: int | None) -> None:
        """What a predecessor left: its counters, and an image to keep while there is no newer."""
        if fd is None:
            return
        try:
            self._given = images.read(fd)
            self._base = _base_of(self._given)
        except (Unfit, OSError, ValueError) as error:
            _log.info("counters begin at 0: %s", error)

    def _make(self) -> int:
        try:
            return images.make()
        except OSError as error:
            _log.warning("no image for an early start: memfd_create: %s", error.strerror)
            return -1

    def _write_soon(self) -> None:
        self._is_stale = True
        if self._task is None and self._writer is not None:
            self._task = asyncio.ensure_future(self._write())

    async def _write(self) -> None:
        """Write images until the newest is written."""
        try:
            while self._is_stale and self._fib is not None:
                self._is_stale = False
                began = time.monotonic()
                try:
                    await self._thread.run(self._write_now, self._plan, self._fib)
                except (OSError, Unfit) as error:
                    self._outage.failed(error, now=began)
                else:
                    self._outage.ended(now=began)
                await asyncio.sleep(max(WRITE_S, WRITE_SHARE * (time.monotonic() - began)))
        finally:
            self._task = None

    def _write_now(self, plan: EarlyPlan | None, fib: Fib) -> None:
        with self._lock:
            if self._writer is not None:
                self._writer.write(*self._content(plan, fib))

    def _content(
        self, plan: EarlyPlan | None, fib: Fib | None
    ) -> tuple[dict[str, Any], Mapping[str, Any]]:
        """Description and sections of an image. No FIB: those of the predecessor's."""
        if fib is None:
            assert self._given is not None
            kept = self._given.sections.items()
            return dict(self._given.about), {
                name: data for name, data in kept if name not in (_TOTALS, _HOPS)
            }
        return content(plan, fib, {**self._facts, "why_not": self._why_not})


def facts_of(tun: Tun, socks: Sequence[socket.socket]) -> dict[str, Any]:
    """What an image says of the descriptors it is for."""
    address, port = socks[0].getsockname()[:2]
    return {
        "version": tundp.__version__,
        "queues": len(tun.fds),
        "tun": tun.name,
        "has_vnet_header": tun.has_vnet_header,
        "address": address,
        "port": port,
        "why_not": "",
    }


def content(
    plan: EarlyPlan | None, fib: Fib, facts: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Description and sections of an image; plan: Dataplane.early_plan."""
    if plan is None:
        return {**facts, "why_not": "the engine of the image is not in C"}, {}
    struct, arrays = fib_sections(fib)
    sections = {WORKERS: plan.workers, FIB: struct, **arrays}
    return {**facts, **plan.about, "sizes": sizes()}, sections


def _base_of(image: images.Image) -> CounterBase:
    """The counters in an image; none after a crash. ValueError: unreadable."""
    totals = image.sections.get(_TOTALS)
    if totals is None:
        return CounterBase()
    hops = image.sections.get(_HOPS, b"")
    if image.about.get("hop_columns") != _COLUMNS or len(hops) % HOP_BASE_DTYPE.itemsize:
        hops = b""
    return CounterBase(
        totals=from_document(json.loads(totals)), hops=np.frombuffer(hops, HOP_BASE_DTYPE)
    )
