"""One `tundp capture` while it runs: it opens what it needs in order, and reports its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tundp.admin import fetch_status, open_events
from tundp.cli.command import named_query_errors, or_stopped
from tundp.cli.output import EXIT_OK
from tundp.errors import PlatformError
from tundp.observe import capture_text
from tundp.observe.capture import SNAPLEN_MAX, CaptureAbout, CaptureChoice, Recorder
from tundp.observe.capture_output import (
    CaptureOutput,
    Ring,
    open_fifo,
    open_output,
    open_standard_output,
)
from tundp.observe.capture_pcapng import PcapngFile
from tundp.observe.capture_run import CaptureRun
from tundp.observe.events import EventStream, Hello
from tundp.printable import LINE_MAX, printable

if TYPE_CHECKING:
    from tundp.cli.capture import CaptureOptions

_MB: Final = 1_000_000
_TEXT_SNAP: Final = 256
"""Bytes of a packet that a line of text is made of."""
_DROP_WORDS: Final = frozenset({"drop", "reason"})


@dataclass(slots=True)
class Session:
    """A capture with its signals, its outputs and its stream of events."""

    options: CaptureOptions
    admin_socket: Path
    filter: str
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _hurry: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> int:
        """Capture until something ends it; the exit code.

        A file is opened, and what it held is gone, only once a daemon has answered.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._end)
        target = self.options.fifo or self.options.write
        choice = self._choice()
        with contextlib.ExitStack() as outputs:
            to_file = None
            if target and target != "-" and Path(target).is_fifo():
                to_file = await open_fifo(Path(target), self._stop)
                outputs.callback(to_file.close)
            query = {
                "filter": self.filter,
                "stages": ",".join(choice.stages),
                "snap": str(choice.asked_len),
                "size": str(self.options.buffer_size << 10),
            }
            async with contextlib.AsyncExitStack() as stack:
                await stack.enter_async_context(named_query_errors(self.filter))
                opening = stack.enter_async_context(open_events(self.admin_socket, query))
                stream = await or_stopped(self._stop, opening)
                if stream is None:
                    return EXIT_OK
                if target and to_file is None:
                    to_file = self._open(target)
                    outputs.callback(to_file.close)
                to_lines = None
                if not target or self.options.text or self.options.output is not None:
                    to_lines = open_standard_output()
                    outputs.callback(to_lines.close)
                await self._follow(stream, self._made(stream, choice, to_file, to_lines))
        return EXIT_OK

    def _end(self) -> None:
        """The first signal ends the capture, the second one at once."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def _follow(self, stream: EventStream, run: CaptureRun) -> None:
        about = run.recorder.about
        run.os_dropped = await _losses_since_now(self.admin_socket, about)
        is_quiet = bool(self.options.fifo)
        if not is_quiet and run.to_lines is None:
            _say(f"capturing on {about.tun} and udp:{about.port}, Ctrl-C ends it")
        warned = "" if run.to_file is None else run.to_file.exposed
        if warned:
            _say(warned)
        try:
            await run.run(stream, self._stop, self.options.for_)
        finally:
            if run.to_file is not None and run.to_file.exposed != warned:  # a later file of a ring
                _say(run.to_file.exposed)
            if not is_quiet:
                where = f" to {run.to_file.name}" if run.to_file is not None else ""
                hint = ": a narrower filter, -s 96 or a larger -B loses fewer" if run.lost else ""
                _say(f"{run.count} packets captured{where}, {run.lost} events lost{hint}")
        if run.has_source_ended:
            raise PlatformError(
                f"the daemon behind {self.admin_socket} ended, and the capture with it"
            )

    def _open(self, target: str) -> CaptureOutput:
        if target == "-":
            return open_standard_output()
        ring = Ring(file_len=self.options.file_size * _MB, files=self.options.files)
        return open_output(Path(target), ring)

    def _choice(self) -> CaptureChoice:
        options = self.options
        is_one_side = options.inner != options.outer
        return CaptureChoice(
            has_inner=options.inner or not is_one_side,
            has_outer=options.outer or not is_one_side,
            # A filter that names drops wants to see them.
            has_drops=options.drops or bool(_DROP_WORDS & set(re.split("[^a-z]+", self.filter))),
            is_wire_size=options.wire,
            snaplen=self._snaplen,
        )

    @property
    def _snaplen(self) -> int:
        options = self.options
        if options.snaplen is not None:
            return options.snaplen
        is_json = options.output is not None and options.output.value == "json"
        return SNAPLEN_MAX if options.write or options.fifo or is_json else _TEXT_SNAP

    def _made(
        self,
        stream: EventStream,
        choice: CaptureChoice,
        to_file: CaptureOutput | None,
        to_lines: CaptureOutput | None,
    ) -> CaptureRun:
        recorder = Recorder(_about(stream.hello, self.filter), choice)
        unix_ns = stream.hello.unix_ns

        def clock() -> int:
            return time.monotonic_ns() + unix_ns

        is_json = self.options.output is not None and self.options.output.value == "json"
        return CaptureRun(
            recorder=recorder,
            file=PcapngFile(recorder, clock()),
            to_file=to_file,
            to_lines=to_lines,
            line=capture_text.json_line if is_json else capture_text.text_line,
            lost_line=capture_text.json_lost if is_json else capture_text.text_lost,
            count_max=self.options.count,
            clock=clock,
            hurry=self._hurry,
        )


def _about(hello: Hello, text: str) -> CaptureAbout:
    system = os.uname()
    return CaptureAbout(
        version=hello.version,
        node=IPv4Address(hello.node),
        network=IPv4Network(hello.network),
        subnet=IPv4Network(hello.subnet),
        tun=hello.tun,
        mtu=hello.mtu,
        port=hello.port,
        engine=hello.engine,
        host=system.nodename,
        machine=system.machine,
        kernel=f"{system.sysname} {system.release}",
        filter=text,
    )


async def _losses_since_now(
    admin_socket: Path, about: CaptureAbout
) -> Callable[[], Awaitable[dict[str, int]]]:
    """A function that gives what the kernel lost from now on, by interface of the capture."""

    async def losses() -> dict[str, int]:
        try:
            status = await fetch_status(admin_socket)
        except PlatformError:
            return {}  # the daemon is gone: nothing is known of what it counted
        found = {}
        if status.kernel is not None and status.kernel.tun_queue_drops is not None:
            found[f"{about.tun}/in"] = status.kernel.tun_queue_drops
        if status.counters is not None:
            found[f"udp:{about.port}/in"] = status.counters.totals.get("socket_overflows", 0)
        return found

    before = await losses()

    async def since() -> dict[str, int]:
        now = await losses()
        return {name: max(0, count - before[name]) for name, count in now.items() if name in before}

    return since


def _say(text: str) -> None:
    """A line about the capture, on stderr: standard output may be the capture itself."""
    print(f"tundp: {printable(text, LINE_MAX)}", file=sys.stderr, flush=True)
