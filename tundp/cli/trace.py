"""`tundp trace`: what happens to single packets, stage by stage."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from enum import Enum, unique
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tundp.cli.command import WHICH_DAEMON, Command, Given, run_async
from tundp.cli.output import EXIT_OK, print_line
from tundp.settings.declare import option
from tundp.settings.parsers import parse_count, parse_duration

if TYPE_CHECKING:
    from tundp.observe.events import EventStream
    from tundp.observe.trace import Trace

_LETTERS: Final = {"-c": "--count", "-o": "--output"}
_LOOK_S: Final = 0.1
_SNAP: Final = 128


@unique
class TraceFormat(Enum):
    """What a trace prints."""

    TEXT = "text"
    JSON = "json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    """What `tundp trace` can be told."""

    count: int | None = option(
        default=None,
        parse=parse_count,
        metavar="N",
        help="end after N packets; also -c",
        since="0.2.0",
    )
    for_: float | None = option(
        "for",
        default=None,
        parse=parse_duration,
        metavar="TIME",
        help="end after 30s, 5m, 2h",
        since="0.2.0",
    )
    drops: bool = option(
        default=False, help="only packets of which something was dropped", since="0.2.0"
    )
    output: TraceFormat = option(
        default=TraceFormat.TEXT,
        choice=TraceFormat,
        help="lines for people, or a JSON object a packet; also -o",
        since="0.2.0",
    )


def trace(given: Given[TraceOptions]) -> int:
    """Show traces until something ends it."""
    path = given.settings().admin_socket
    return run_async(_Session(given.options, path, " ".join(given.operands)).run())


class _Session:
    """One `tundp trace` while it runs."""

    def __init__(self, options: TraceOptions, path: Path, text: str) -> None:
        self._options = options
        self._path = path
        self._filter = text
        self._stop = asyncio.Event()
        self._shown = 0

    async def run(self) -> int:
        """Print each trace when it is complete."""
        from tundp.admin import open_events

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._stop.set)
        query = {"filter": self._filter, "snap": str(_SNAP)}
        async with open_events(self._path, query) as stream:
            print(
                f"tracing on {stream.hello.node} ({stream.hello.tun}, engine"
                f" {stream.hello.engine}); Ctrl-C ends it. Not looked at: the kernel before and"
                " behind the TUN and the socket, and other nodes",
                file=sys.stderr,
                flush=True,
            )
            try:
                async with asyncio.timeout(self._options.for_):
                    await self._show_all(stream)
            except TimeoutError:
                pass
            self._say_end(stream)
        return EXIT_OK

    async def _show_all(self, stream: EventStream) -> None:
        async with contextlib.aclosing(self._traces(stream)) as traces:
            async for found in traces:
                if self._options.drops and not found.is_dropped:
                    continue
                self._show(stream, found)
                if self._shown == self._options.count:
                    return

    async def _traces(self, stream: EventStream) -> AsyncGenerator[Trace, None]:
        """Complete traces, and those to which nothing comes any more."""
        import time

        from tundp.observe.trace import Tracer

        tracer = Tracer()
        events = aiter(stream)
        stopped = asyncio.ensure_future(self._stop.wait())
        coming = asyncio.ensure_future(anext(events, None))
        try:
            while True:
                await asyncio.wait(
                    (coming, stopped), timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED
                )
                if stopped.done():
                    break
                if coming.done():
                    event = coming.result()
                    if event is None:
                        break
                    coming = asyncio.ensure_future(anext(events, None))
                    for found in tracer.add(event):
                        yield found
                else:
                    for found in tracer.stale(now_ns=time.time_ns()):
                        yield found
            for found in tracer.stale(0):
                yield found
        finally:
            for task in (coming, stopped):
                task.cancel()
            await asyncio.gather(coming, stopped, return_exceptions=True)

    def _show(self, stream: EventStream, found: Trace) -> None:
        from tundp.observe.trace import document, lines

        self._shown += 1
        if self._options.output is TraceFormat.JSON:
            print(json.dumps(document(found, self._shown)), flush=True)
            return
        for line in lines(found, self._shown, stream.hello.node):
            print_line(line)
        sys.stdout.flush()

    def _say_end(self, stream: EventStream) -> None:
        if stream.lost:
            print(
                f"{stream.lost} records were lost: more packets match than can be shown; a"
                " narrower filter misses none",
                file=sys.stderr,
            )


def rewrite(arguments: Sequence[str]) -> list[str]:
    """-c and -o are as in tcpdump and kubectl."""
    found = []
    for word in arguments:
        letter, equals, text = word.partition("=")
        found.append(f"{_LETTERS.get(letter, letter)}{equals}{text}")
    return found


COMMAND = Command(
    name="trace",
    summary="what happens to a packet, stage by stage, on this node",
    description="""\
Show each packet that matches FILTER with every stage it passes in a running daemon, and the time
between them: read from the TUN, looked up, sent; received, written to the TUN; or dropped, with
the reason and what to look at next. A super-packet is one packet here. FILTER is matched against
inner packets by the packet threads: `icmp and host 10.5.2.3`, `tcp port 443`, `peer 192.0.2.2`,
`reason no_route`. Costs nothing while it does not run; what it cannot keep up with is counted as
lost, and no packet waits for it. Only root may ask.""",
    run=trace,
    options=TraceOptions,
    settings=WHICH_DAEMON,
    more_operands="FILTER",
    rewrite=rewrite,
    examples=(
        ("tundp trace -c 1 icmp and host 10.5.2.3", "the next ping, and what becomes of it"),
        ("tundp trace --drops", "whatever is dropped from now on, with the next step"),
        ("tundp trace --for 10s -o json tcp port 443 | jq .", "for programs"),
    ),
    notes="""\
exit codes: 0 ended by a limit, a signal, or because nobody reads any more; 1 no daemon; 2 wrong
usage, or a wrong filter.""",
)
