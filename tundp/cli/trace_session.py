"""One `tundp trace` while it runs: its sources of records, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import AsyncIterator
from ipaddress import IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tundp.admin import open_events
from tundp.cli.output import EXIT_OK, print_line
from tundp.errors import PlatformError, Unsupported
from tundp.linux.nft_trace import Path as NftPath
from tundp.linux.nft_trace import nft_trace
from tundp.observe.events import EventStream
from tundp.observe.trace import Stories, Story, Tracer, document, story_lines
from tundp.printable import printable
from tundp.wire.facts import Direction, facts_of
from tundp.wire.filter import Filter

if TYPE_CHECKING:
    from tundp.cli.trace import TraceOptions

_LOOK_S: Final = 0.05
_LATER_NS: Final = 1_000_000_000
_SNAP: Final = 128


class Session:
    """One `tundp trace` while it runs."""

    def __init__(self, options: TraceOptions, path: Path, packets: Filter) -> None:
        self._options = options
        self._path = path
        self._filter = packets
        self._stop = asyncio.Event()
        self._shown = 0

    async def run(self) -> int:
        """Print each story when it is complete."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._stop.set)
        query = {"filter": self._filter.text, "snap": str(_SNAP)}
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
        found, why_not = None, "--kernel=false"
        if self._options.kernel:
            try:
                network = IPv4Network(stream.hello.network)
                found = await stack.enter_async_context(nft_trace(network))
            except (Unsupported, PlatformError) as error:
                why_not = str(error)
        if stream.hello.chaos:
            _say(f"tundp chaos: {printable(stream.hello.chaos)}; tundp chaos stop ends it")
        unseen = "legacy iptables, the kernel's routing" if found else f"netfilter ({why_not})"
        _say(
            f"tracing on {stream.hello.node} ({stream.hello.tun}, engine {stream.hello.engine});"
            f" Ctrl-C ends it. Not looked at: {unseen}, and other nodes"
        )
        return found

    async def _show_all(self, stream: EventStream, paths: AsyncIterator[NftPath] | None) -> None:
        tracer, stories = Tracer(), Stories(has_paths=paths is not None)
        sources: dict[str, AsyncIterator[Any]] = {"events": aiter(stream.batches())}
        if paths is not None:
            sources["paths"] = paths
        coming = {
            asyncio.ensure_future(anext(source, None)): name for name, source in sources.items()
        }
        stopped = asyncio.ensure_future(self._stop.wait())
        try:
            has_ended = False
            while not stopped.done():
                await asyncio.wait(
                    (*coming, stopped), timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED
                )
                now_ns = time.time_ns()
                for done in [each for each in coming if each.done()]:
                    name = coming.pop(done)
                    value: Any = done.result()
                    if value is None and name == "events":
                        has_ended = True
                        continue
                    if value is not None:
                        coming[asyncio.ensure_future(anext(sources[name], None))] = name
                    if name == "paths" and value is not None and self._is_wanted(value, stream):
                        stories.add_path(value, now_ns)
                    elif name == "events":
                        for event in value:
                            for found in tracer.add(event):
                                stories.add_trace(found, now_ns)
                for found in tracer.stale(now_ns=now_ns):
                    stories.add_trace(found, now_ns)
                if self._show_due(stories, stream, now_ns):
                    return
                if has_ended:
                    break
            for found in tracer.stale(0):
                stories.add_trace(found, 0)
            self._show_due(stories, stream, time.time_ns() + _LATER_NS)
            if has_ended:
                raise PlatformError(f"the daemon on {self._path} ended")
        finally:
            for task in (*coming, stopped):
                task.cancel()
            await asyncio.gather(*coming, stopped, return_exceptions=True)

    def _is_wanted(self, path: NftPath, stream: EventStream) -> bool:
        """Whether the filter lets a packet through that netfilter speaks of: it knows no peers."""
        came_from_peer = path.fields.get("iif") == stream.hello.tun
        facts = facts_of(
            path.header(), direction=Direction.DECAP if came_from_peer else Direction.ENCAP
        )
        return self._filter.matches(facts)

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
        self._shown += 1
        if self._options.output.value == "json":
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
