"""One `tundp trace` while it runs: its sources of records, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from ipaddress import IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tundp.admin import open_events
from tundp.cli.command import named_query_errors, or_stopped
from tundp.cli.output import EXIT_OK, print_line
from tundp.cli.peer_views import PeerViews, without_own_messages
from tundp.errors import PlatformError, Unsupported
from tundp.linux import legacy_rules
from tundp.linux.nft_trace import PATHS_MAX, RATE, NftTrace, nft_trace
from tundp.linux.nft_trace import Path as NftPath
from tundp.linux.skb_drops import SkbDrop, SkbDrops, batches, skb_drops
from tundp.observe.events import EventStream
from tundp.observe.peer_trace import Joined, Joiner
from tundp.observe.peer_trace_show import joined_lines, peer_document
from tundp.observe.skb_steps import Place, is_wanted, step_of
from tundp.observe.stories import LATE_MAX_NS, Stories, document
from tundp.observe.trace import Tracer
from tundp.printable import LINE_MAX, printable
from tundp.wire.facts import Direction, facts_of
from tundp.wire.filter import Filter

if TYPE_CHECKING:
    from tundp.cli.trace import TraceOptions

_LOOK_S: Final = 0.05
_LATER_NS: Final = 1_000_000_000
_SNAP: Final = 128
_LEGACY_S: Final = 0.2
"""Between two looks at the counts of legacy iptables; less than a story waits."""


class Session:
    """One `tundp trace` while it runs."""

    def __init__(self, options: TraceOptions, path: Path, packets: Filter) -> None:
        self._options = options
        self._path = path
        self._asked = packets
        """The operator's."""
        self._filter = without_own_messages(packets) if options.peers else packets
        self._stop = asyncio.Event()
        self._shown = 0
        self._netfilter: NftTrace | None = None
        self._gone: list[str] = []
        """Sources that ended before the trace."""
        self._drops: SkbDrops | None = None
        self._undecided: Counter[str] = Counter()
        """Drops of datagrams whose inner packet is not known, by reason."""
        self._legacy: legacy_rules.Counts | None = None
        """Counts of legacy iptables as of the last look; None if there is nothing to look at."""
        self._looked_s = 0.0
        self._is_netfilter = False
        """Whether netfilter dropped a packet since the last look."""
        self._peers: PeerViews | None = None
        self._joiner = Joiner()

    async def run(self) -> int:
        """Print each story when it is complete."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._stop.set)
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(named_query_errors(self._asked.text))
            if self._options.peers:
                self._peers = PeerViews(self._path, self._asked)
                stack.push_async_callback(self._peers.close)
                await or_stopped(self._stop, self._peers.open())
            query = {"filter": self._filter.text, "snap": str(_SNAP)}
            opening = stack.enter_async_context(open_events(self._path, query))
            stream = await or_stopped(self._stop, opening)
            if stream is None:
                return EXIT_OK
            sources = await or_stopped(self._stop, self._open_kernel(stack, stream))
            if sources is None:
                return EXIT_OK
            if self._options.for_ is not None:
                ending = loop.call_later(self._options.for_, self._stop.set)
                stack.callback(ending.cancel)
            try:
                await self._show_all(stream, sources)
            finally:
                await self._say_end(stream)
        return EXIT_OK

    async def _open_kernel(
        self, stack: contextlib.AsyncExitStack, stream: EventStream
    ) -> dict[str, AsyncIterator[Any]]:
        """What netfilter and kernel tell; a word about what they do not."""
        found: dict[str, AsyncIterator[Any]] = {}
        has_pods = False
        unseen = ["netfilter and the kernel's drops (--kernel=false)"]
        if self._options.kernel:
            network = IPv4Network(stream.hello.network)
            unseen = []
            try:
                self._netfilter = await stack.enter_async_context(nft_trace(network))
                found["paths"] = self._netfilter.paths()
            except (Unsupported, PlatformError) as error:
                unseen.append(f"netfilter's rules ({error})")
            try:
                self._drops = await stack.enter_async_context(skb_drops(network, stream.hello.port))
                found["drops"] = batches(self._drops)
                has_pods = self._drops.has_pods
                if not self._drops.has_reasons:
                    unseen.append("reasons of the kernel's drops (linux 5.17)")
            except (Unsupported, PlatformError) as error:
                unseen.append(f"the kernel's drops ({error})")
            unseen += await self._begin_legacy()
        if not has_pods:
            unseen.append("pods' own network namespaces")
        unseen.append("other nodes" if self._peers is None else "the kernels of other nodes")
        if stream.hello.chaos:
            say(f"tundp chaos: {printable(stream.hello.chaos)}; tundp chaos stop ends it")
        say(
            f"tracing on {stream.hello.node} ({stream.hello.tun}, engine {stream.hello.engine});"
            f" Ctrl-C ends it. Not looked at: {', '.join(unseen)}"
        )
        self._say_news()
        return found

    async def _begin_legacy(self) -> list[str]:
        """Read the counts of legacy iptables; what is to be said of it."""
        try:
            counts, total = await legacy_rules.counts()
        except (Unsupported, PlatformError) as error:
            return [f"rules of legacy iptables ({error})"]
        if self._drops is not None:
            self._legacy = counts
        if not total:
            return []
        but = "" if self._drops is None else ", but for their counters"
        return [f"the {total} rules of legacy iptables{but}"]

    async def _look_at_legacy(self, stories: Stories) -> None:
        """Name the legacy rules that dropped something since the last look, if one is due."""
        if self._legacy is None or not self._is_netfilter:
            return
        if time.monotonic() - self._looked_s < _LEGACY_S:
            return
        self._looked_s = time.monotonic()
        self._is_netfilter = False
        with contextlib.suppress(PlatformError):
            counts, _ = await legacy_rules.counts()
            stories.suspect(list(legacy_rules.moved(self._legacy, counts)))
            self._legacy = counts

    async def _show_all(
        self, stream: EventStream, kernel: Mapping[str, AsyncIterator[Any]]
    ) -> None:
        tracer, stories = Tracer(), Stories(has_paths=bool(kernel))
        began_ns = time.time_ns()
        sources: dict[str, AsyncIterator[Any]] = {"events": aiter(stream.batches()), **kernel}
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
                    if value is None:
                        has_ended |= name == "events"
                        self._say_gone(name, now_ns - began_ns)
                        continue
                    coming[asyncio.ensure_future(anext(sources[name], None))] = name
                    self._add(name, value, stream, tracer, stories, now_ns)
                heard_ns = now_ns if stream.heard_ns is None else min(now_ns, stream.heard_ns)
                for found in tracer.stale(now_ns=max(heard_ns, now_ns - LATE_MAX_NS)):
                    stories.add_trace(found, now_ns)
                await self._look_at_legacy(stories)
                if self._peers is not None:
                    self._peers.look(now_ns)
                    self._say_news()
                if self._show_due(stories, stream, now_ns):
                    return
                if has_ended:
                    break
            now_ns = time.time_ns()
            for found in tracer.stale(0):
                stories.add_trace(found, 0)
            self._show_due(stories, stream, now_ns, is_last=True)
            if has_ended:
                raise PlatformError(f"the daemon on {self._path} ended")
        finally:
            for task in (*coming, stopped):
                task.cancel()
            await asyncio.gather(*coming, stopped, return_exceptions=True)

    def _add(
        self,
        name: str,
        value: Any,
        stream: EventStream,
        tracer: Tracer,
        stories: Stories,
        now_ns: int,
    ) -> None:
        """Put what a source told to the stories."""
        if name == "paths":
            if self._is_wanted(value, stream):
                stories.add_path(value, now_ns)
        elif name == "drops":
            self._add_drops(value, stream, stories, now_ns)
        else:
            for event in value:
                for found in tracer.add(event):
                    stories.add_trace(found, now_ns)

    def _add_drops(
        self, drops: Sequence[SkbDrop], stream: EventStream, stories: Stories, now_ns: int
    ) -> None:
        place = Place.of(stream.hello)
        for drop in drops:
            step = step_of(drop, place)
            if step is None:
                continue
            # That nodes' own messages are left out asks for the inside, which may be out of sight.
            match is_wanted(step, self._filter if step.inner else self._asked):
                case True:
                    stories.add_drop(step, now_ns)
                    self._is_netfilter |= step.is_netfilter
                case None:
                    self._undecided[drop.reason] += 1

    def _is_wanted(self, path: NftPath, stream: EventStream) -> bool:
        """Whether the filter lets a packet through that netfilter speaks of: it knows no peers."""
        came_from_peer = path.fields.get("iif") == stream.hello.tun
        facts = facts_of(
            path.header(), direction=Direction.DECAP if came_from_peer else Direction.ENCAP
        )
        return self._filter.matches(facts)

    def _show_due(
        self, stories: Stories, stream: EventStream, now_ns: int, *, is_last: bool = False
    ) -> bool:
        """Print what is due; whether that was all that was asked for. is_last: print all."""
        drops_ns = None if self._drops is None else self._drops.heard_ns
        heard_ns = (None, None) if is_last else (stream.heard_ns, drops_ns)
        for story in stories.due(now_ns + _LATER_NS if is_last else now_ns, *heard_ns):
            self._joiner.add(story, None if self._peers is None else self._peers.view_of(story))
        for joined in self._joiner.due(now_ns, is_last=is_last):
            if self._options.drops and not joined.is_dropped:
                continue
            stories.recall(joined.story)
            self._show(stream, joined)
            stories.remember(joined.story, self._shown)
            if self._shown == self._options.count:
                return True
        return False

    def _show(self, stream: EventStream, joined: Joined) -> None:
        self._shown += 1
        if self._options.output.value == "json":
            half = peer_document(joined.half)
            print(json.dumps({**document(joined.story, self._shown), "peer": half}), flush=True)
            return
        for line in joined_lines(joined, self._shown, stream.hello.node):
            print_line(line)
        sys.stdout.flush()

    def _say_news(self) -> None:
        for line in () if self._peers is None else self._peers.news():
            say(line)

    def _say_gone(self, name: str, after_ns: int) -> None:
        """Say at once that a source ended, and again at the end, where it may be read."""
        if name == "paths":
            self._gone.append(
                f"nft monitor ended after {after_ns / 1e9:.1f} s of the trace: netfilter's rules"
                " were not looked at from then on"
            )
            say(self._gone[-1])

    async def _say_netfilter(self, netfilter: NftTrace) -> None:
        """Say which packets were not followed through netfilter."""
        unmarked = await netfilter.unmarked()
        if unmarked is None:
            say("how many packets were not followed through netfilter is not known")
        if unmarked or netfilter.lost:
            say(
                f"{(unmarked or 0) + netfilter.lost} packets were not followed through netfilter"
                f" ({RATE:,} a second are, in small bursts, and {PATHS_MAX:,} at a time), whatever"
                " the filter"
            )
        if netfilter.unread:
            say(f"{netfilter.unread} rules of netfilter were too long to be read")

    async def _say_end(self, stream: EventStream) -> None:
        for gone in self._gone:
            say(gone)
        if self._netfilter is not None:
            await self._say_netfilter(self._netfilter)
        if stream.lost:
            say(
                f"{stream.lost} records were lost: more packets match than can be shown; a"
                " narrower filter misses none"
            )
        if self._drops is not None and self._drops.lost:
            say(
                f"{self._drops.lost} drops of the kernel came too fast to be looked at (2,000 a"
                " second are), whatever the filter"
            )
        if self._undecided:
            reasons = ", ".join(f"{name} {count}" for name, count in self._undecided.items())
            say(
                "the kernel dropped datagrams of the overlay whose inner packet lies out of sight"
                f" (trains of UDP_SEGMENT), so that the filter could not choose: {reasons}"
            )


def say(text: str) -> None:
    """A word to the operator, beside what programs read; other nodes' texts may be in it."""
    print(printable(text, LINE_MAX), file=sys.stderr, flush=True)
