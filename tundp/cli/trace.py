"""`tundp trace`: what happens to single packets, stage by stage."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from enum import Enum, unique
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tundp.cli.command import WHICH_DAEMON, Command, Given, run_async
from tundp.cli.output import EXIT_OK, print_line
from tundp.errors import PlatformError, Unsupported
from tundp.settings.declare import option
from tundp.settings.parsers import parse_count, parse_duration

if TYPE_CHECKING:
    from tundp.linux.nft_trace import Path as NftPath
    from tundp.observe.events import EventStream
    from tundp.observe.trace import Stories, Story

_LETTERS: Final = {"-c": "--count", "-o": "--output"}
_LOOK_S: Final = 0.05
_LATER_NS: Final = 1_000_000_000
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
    kernel: bool = option(
        default=True,
        help="follow the packets through netfilter, too: a table of ours marks packets of the"
        " network while the trace lasts; false: leave netfilter alone",
        since="0.2.0",
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
        """Print each story when it is complete."""
        from tundp.admin import open_events

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._stop.set)
        query = {"filter": self._filter, "snap": str(_SNAP)}
        async with contextlib.AsyncExitStack() as stack:
            stream = await stack.enter_async_context(open_events(self._path, query))
            paths = await self._open_paths(stack, stream)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._options.for_):
                    await self._show_all(stream, paths)
            self._say_end(stream)
        return EXIT_OK

    async def _open_paths(
        self, stack: contextlib.AsyncExitStack, stream: EventStream
    ) -> AsyncIterator[NftPath] | None:
        """Netfilter's account; None, and a word about it, where there is none."""
        from ipaddress import IPv4Network

        from tundp.linux.nft_trace import nft_trace

        found, why_not = None, "--kernel=false"
        if self._options.kernel:
            try:
                network = IPv4Network(stream.hello.network)
                found = await stack.enter_async_context(nft_trace(network))
            except (Unsupported, PlatformError) as error:
                why_not = str(error)
        unseen = "legacy iptables, the kernel's routing" if found else f"netfilter ({why_not})"
        _say(
            f"tracing on {stream.hello.node} ({stream.hello.tun}, engine {stream.hello.engine});"
            f" Ctrl-C ends it. Not looked at: {unseen}, and other nodes"
        )
        return found

    async def _show_all(self, stream: EventStream, paths: AsyncIterator[NftPath] | None) -> None:
        from tundp.observe.trace import Stories, Tracer

        tracer, stories = Tracer(), Stories(has_paths=paths is not None)
        sources: dict[str, AsyncIterator[Any]] = {"events": aiter(stream.batches())}
        if paths is not None:
            sources["paths"] = paths
        coming = {
            asyncio.ensure_future(anext(source, None)): name for name, source in sources.items()
        }
        stopped = asyncio.ensure_future(self._stop.wait())
        try:
            while not stopped.done():
                await asyncio.wait(
                    (*coming, stopped), timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED
                )
                now_ns = time.time_ns()
                for done in [each for each in coming if each.done()]:
                    name = coming.pop(done)
                    value: Any = done.result()
                    if value is None and name == "events":
                        return
                    if value is not None:
                        coming[asyncio.ensure_future(anext(sources[name], None))] = name
                    if name == "paths" and value is not None and self._is_wanted(value):
                        stories.add_path(value, now_ns)
                    elif name == "events":
                        for event in value:
                            for found in tracer.add(event):
                                stories.add_trace(found, now_ns)
                for found in tracer.stale(now_ns=now_ns):
                    stories.add_trace(found, now_ns)
                if self._show_due(stories, stream, now_ns):
                    return
            for found in tracer.stale(0):
                stories.add_trace(found, 0)
            self._show_due(stories, stream, time.time_ns() + _LATER_NS)
        finally:
            for task in (*coming, stopped):
                task.cancel()
            await asyncio.gather(*coming, stopped, return_exceptions=True)

    def _is_wanted(self, path: NftPath) -> bool:
        """Whether the filter lets a packet through that netfilter speaks of."""
        return not self._filter or bool(path.fields)

    def _show_due(self, stories: Stories, stream: EventStream, now_ns: int) -> bool:
        """Print what is due; whether that was all that was asked for."""
        for story in stories.due(now_ns):
            if self._options.drops and not story.is_dropped:
                continue
            self._show(stream, story)
            if self._shown == self._options.count:
                return True
        return False

    def _show(self, stream: EventStream, story: Story) -> None:
        from tundp.observe.trace import document, story_lines

        self._shown += 1
        if self._options.output is TraceFormat.JSON:
            print(json.dumps(document(story, self._shown)), flush=True)
            return
        for line in story_lines(story, self._shown, stream.hello.node):
            print_line(line)
        sys.stdout.flush()

    def _say_end(self, stream: EventStream) -> None:
        if stream.lost:
            _say(
                f"{stream.lost} records were lost: more packets match than can be shown; a"
                " narrower filter misses none"
            )


def _say(text: str) -> None:
    """A word to the operator, beside what programs read."""
    print(text, file=sys.stderr, flush=True)


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
the reason and what to look at next. With nftables (iptables-nft included) also the rule that
drops it before or behind the daemon. A super-packet is one packet here. FILTER is matched against
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
