"""`tundp drops`: what was dropped and why, or each drop as it happens."""

from __future__ import annotations

import contextlib
import difflib
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, unique
from ipaddress import IPv4Network
from typing import TYPE_CHECKING, Final

from tundp.cli.command import (
    WHICH_DAEMON,
    Command,
    Given,
    named_query_errors,
    run_async,
)
from tundp.cli.output import EXIT_FAILED, EXIT_OK, print_error, print_json, print_parts, terminal
from tundp.errors import ConfigError, PlatformError
from tundp.settings.declare import option
from tundp.settings.parsers import parse_duration

if TYPE_CHECKING:
    from pathlib import Path

    from tundp.cli.skb_look import SkbLook
    from tundp.observe.drops import DropExample, DropsReport, Look, Selection
    from tundp.observe.events import EventStream
    from tundp.wire.filter import Filter

_TELL_S: Final = 0.5
"""Between two looks at how many events were lost."""


def parse_interval(text: str) -> float:
    """Seconds, or 0."""
    return 0.0 if text == "0" else parse_duration(text)


def parse_network(text: str) -> IPv4Network:
    """An address or a network."""
    try:
        return IPv4Network(text)
    except ValueError:
        raise ValueError("is no IPv4 address, nor a network like 10.5.0.0/16") from None


def parse_reason(text: str) -> str:
    """The name of a drop reason."""
    from tundp.observe.drops import REASON_NAMES

    name = text.lower().replace("-", "_")
    if name in REASON_NAMES:
        return name
    close = difflib.get_close_matches(name[:80], REASON_NAMES, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else ", ".join(REASON_NAMES)
    raise ValueError(f"is no drop reason: {hint}")


@unique
class DropsFormat(Enum):
    """What is printed."""

    TEXT = "text"
    JSON = "json"


@dataclass(frozen=True, slots=True, kw_only=True)
class DropsOptions:
    """What `tundp drops` can be told."""

    follow: bool = option(
        default=False, help="print each drop from now on as it happens; also -f", since="0.2.0"
    )
    since: float | None = option(
        default=None,
        parse=parse_duration,
        metavar="TIME",
        help="only reasons that occurred in the last TIME: 90s, 10m, 2h",
        since="0.2.0",
    )
    reason: tuple[str, ...] = option(
        default=(),
        parse=parse_reason,
        metavar="NAME",
        is_repeatable=True,
        help="only these reasons: no_route",
        since="0.2.0",
    )
    peer: tuple[IPv4Network, ...] = option(
        default=(),
        parse=parse_network,
        metavar="ADDRESS",
        is_repeatable=True,
        help="only packets to or from the node with this underlay address, or these nodes",
        since="0.2.0",
    )
    source: tuple[IPv4Network, ...] = option(
        "from",
        default=(),
        parse=parse_network,
        metavar="ADDRESS",
        is_repeatable=True,
        help="only packets from this inner address or network",
        since="0.2.0",
    )
    destination: tuple[IPv4Network, ...] = option(
        "to",
        default=(),
        parse=parse_network,
        metavar="ADDRESS",
        is_repeatable=True,
        help="only packets to this inner address or network",
        since="0.2.0",
    )
    negated: bool = option(
        "not", default=False, help="everything but what is selected", since="0.2.0"
    )
    interval: float = option(
        default=1.0,
        parse=parse_interval,
        default_text="1s",
        metavar="TIME",
        help="between the two looks that rates are made of; 0: one look, no rates",
        since="0.2.0",
    )
    kernel: bool = option(
        default=True,
        help="look at what the kernel drops of the overlay's packets meanwhile, too: a BPF program"
        " that runs at each drop; false: leave it alone",
        since="0.2.0",
    )
    output: DropsFormat = option(
        default=DropsFormat.TEXT,
        choice=DropsFormat,
        help="the form of the answer; with --follow json is an object a line; also -o",
        since="0.2.0",
    )
    json: bool = option(default=False, help="the same as --output=json", since="0.2.0")


def drops(given: Given[DropsOptions]) -> int:
    """Print the table, or follow."""
    from tundp.observe.drops import selected_text

    options = given.options
    text = selected_text(
        " ".join(given.operands),
        reasons=options.reason,
        peers=options.peer,
        sources=options.source,
        destinations=options.destination,
        is_negated=options.negated,
    )
    if options.negated and not text:
        raise ConfigError("--not needs something that is selected: --reason, --peer, a filter ...")
    path = given.settings().admin_socket
    is_json = options.json or options.output is DropsFormat.JSON
    if options.follow:
        if options.since is not None:
            raise ConfigError("--since is about the past, --follow about what comes: give one")
        return run_async(_follow(path, text, is_json=is_json, has_kernel=options.kernel))
    report = run_async(_report(path, options, text))
    if is_json:
        print_json(report.to_json())
    else:
        from tundp.show_drops import drops_parts

        print_parts(drops_parts(report))
    return EXIT_OK


async def _report(path: Path, options: DropsOptions, text: str) -> DropsReport:
    import asyncio

    from tundp.admin import fetch_status
    from tundp.cli.skb_look import counted, skb_look
    from tundp.observe.drops import Look, selection_of
    from tundp.observe.skb_rows import SkbTally
    from tundp.observe.skb_steps import Place

    wanted = selection_of(text)
    notes: list[str] = []
    looks = [Look(await fetch_status(path), time.monotonic())]
    tally = SkbTally(wanted.filter)
    async with contextlib.AsyncExitStack() as stack:
        look = None
        if options.interval > 0:
            place = Place.of_status(looks[0].status)
            if options.kernel and place is not None:
                look = await stack.enter_async_context(skb_look(place, notes))
            async with counted(look, tally):
                await asyncio.sleep(options.interval)
            looks.append(Look(await fetch_status(path), time.monotonic()))
        report = await _made(path, options, looks, wanted, notes)
        return report if look is None else look.added(report, tally)


async def _made(
    path: Path,
    options: DropsOptions,
    looks: Sequence[Look],
    wanted: Selection,
    notes: list[str],
) -> DropsReport:
    from tundp.admin import fetch_blackbox
    from tundp.linux.kernel_counts import namespace_counts
    from tundp.observe.drops import drops_report, read_examples

    if looks[-1].status.counters is None:
        raise PlatformError(
            f"the daemon on {path} counts no packets: it is starting, or its backend leaves them"
            " to the kernel; see tundp status"
        )
    examples: list[DropExample] | None = None
    try:
        examples, unread = read_examples(await fetch_blackbox(path))
        if unread:
            notes.append(f"{unread} recorded packets cannot be read by this version")
    except (PlatformError, ValueError) as error:
        notes.append(f"no examples, no times: {error}")
    status = looks[-1].status
    since = None if options.since is None else status.started_at + status.uptime_s - options.since
    return drops_report(
        looks,
        examples=examples,
        namespace=namespace_counts(),
        selection=replace(wanted, since=since),
        notes=notes,
    )


async def _follow(path: Path, text: str, *, is_json: bool, has_kernel: bool) -> int:
    """Print drops until a signal, until the daemon ends, or nobody reads."""
    import asyncio

    loop, task = (
        asyncio.get_running_loop(),
        asyncio.ensure_future(_print_drops(path, text, is_json=is_json, has_kernel=has_kernel)),
    )
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        return EXIT_OK
    print_error(f"the daemon on {path} ended", "tundp drops")
    return EXIT_FAILED


async def _print_drops(path: Path, text: str, *, is_json: bool, has_kernel: bool) -> None:
    """Print drops until the daemon ends."""
    import asyncio

    from tundp.admin import open_events
    from tundp.cli.skb_look import skb_look
    from tundp.observe.drops import selection_of
    from tundp.observe.skb_steps import Place

    wanted = selection_of(f"drop and ({text})" if text else "drop").filter.text
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(named_query_errors(wanted))
        stream = await stack.enter_async_context(
            open_events(path, {"filter": wanted, "stages": "drop"})
        )
        notes: list[str] = []
        look = None
        if has_kernel:
            look = await stack.enter_async_context(skb_look(Place.of(stream.hello), notes))
        for note in notes:
            print_error(note, "tundp drops")
        parts = [_print_events(stream, is_json=is_json), _tell_lost(stream, look)]
        if look is not None:
            packets = selection_of(text).filter
            parts.append(_print_kernels(look, packets, is_json=is_json))
        tasks = [asyncio.ensure_future(part) for part in parts]
        try:
            # The first ends with the daemon; any of them if nobody reads any more.
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _print_events(stream: EventStream, *, is_json: bool) -> None:
    """Print the daemon's drops until it ends."""
    import json

    from tundp.observe.codec import to_json
    from tundp.observe.drops import example_of_event
    from tundp.show_drops import event_line

    console = terminal()
    async for event in stream:
        example = example_of_event(event)
        if is_json:
            print(json.dumps(to_json(example)), flush=True)
        else:
            console.print(event_line(example), crop=False)


async def _print_kernels(look: SkbLook, packets: Filter, *, is_json: bool) -> None:
    """Print the kernel's drops until cancelled."""
    import json

    from tundp.observe.skb_steps import is_wanted, step_document
    from tundp.show_drops import skb_line

    console = terminal()
    async for step in look.follow():
        if step.is_copy or is_wanted(step, packets) is False:
            continue
        if is_json:
            print(json.dumps({"kernel": step_document(step)}), flush=True)
        else:
            console.print(skb_line(step), crop=False)


async def _tell_lost(stream: EventStream, look: SkbLook | None) -> None:
    """Say how many events were lost, also when none follow."""
    import asyncio

    told = told_kernels = 0
    while True:
        await asyncio.sleep(_TELL_S)
        if stream.lost > told:
            print_error(f"{stream.lost - told} drops came too fast to be shown", "tundp drops")
            told = stream.lost
        if look is not None and look.lost > told_kernels:
            lost = look.lost - told_kernels
            print_error(f"{lost} drops of the kernel came too fast to be shown", "tundp drops")
            told_kernels = look.lost


def rewrite(arguments: Sequence[str]) -> list[str]:
    """-f is --follow, -o is --output here."""
    short = {"-f": "--follow", "-o": "--output"}
    words = []
    for word in arguments:
        name, equals, value = word.partition("=")
        words.append(f"{short.get(name, name)}{equals}{value}")
    return words


COMMAND = Command(
    name="drops",
    summary="what a running daemon dropped, why, and the last packet of each reason",
    description="""\
A line for each reason and direction: how many packets since the daemon's start, how many a second
now, the last one recorded, what that means and what to look at next. Below it what the kernel drops
of the overlay's packets while the command looks, by the kernel's own reason, whether every packet
is accounted for, and what the kernel counted around the daemon. FILTER is a packet filter as
tcpdump takes them, of inner packets: docs/debugging.md. Only root may ask.""",
    run=drops,
    options=DropsOptions,
    settings=WHICH_DAEMON,
    more_operands="FILTER",
    rewrite=rewrite,
    examples=(
        ("tundp drops", "every reason since the daemon's start"),
        ("tundp drops -f", "each drop as it happens"),
        ("tundp drops --since 10m --to 10.5.2.0/24", "recent, and for one subnet"),
        ("tundp drops -f tcp port 443 and not reason too_big", ""),
        ("tundp drops --json | jq '.drops[] | [.reason, .count]'", "for programs"),
    ),
    notes="""\
Counts are of all packets of a reason. A selection by more than reason and direction is decided by
the packets recorded last (eight of each reason and direction), and says so.
exit codes: 0 answered, or ended by a signal; 1 no daemon answered, or with --follow it ended;
2 wrong usage, or a wrong filter.""",
)
