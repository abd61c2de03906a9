"""`tundp leases`: who has which subnet, and who had it when, as a running daemon knows."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tundp.cli.command import WHICH_DAEMON, Command, Given, run_async
from tundp.cli.output import EXIT_OK, print_json, print_parts
from tundp.settings.declare import option

if TYPE_CHECKING:
    from pathlib import Path

    from tundp.observe.leases import LeaseEvent

POLL_S: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class LeasesOptions:
    """What `tundp leases` can be told."""

    follow: bool = option(
        default=False,
        help="go on with each event as it comes, until interrupted; also -f",
        since="0.2.0",
    )
    json: bool = option(
        default=False,
        help="print JSON: all of it, or with --follow an event a line",
        since="0.2.0",
    )


def leases(given: Given[LeasesOptions]) -> int:
    """Print the leases; with --follow, what happens to them from now on."""
    from tundp.admin import fetch_leases
    from tundp.show_leases import lease_parts

    path = given.settings().admin_socket
    answer = run_async(fetch_leases(path))
    if not given.options.follow:
        if given.options.json:
            print_json(answer.to_json())
        else:
            print_parts(lease_parts(answer))
        return EXIT_OK
    return run_async(_follow(path, answer.next_number, as_json=given.options.json))


def history(given: Given[LeasesOptions]) -> int:
    """Print what happened since the daemon started; with --follow, what comes after, too."""
    from tundp.admin import fetch_leases
    from tundp.show_leases import history_parts

    path = given.settings().admin_socket
    answer = run_async(fetch_leases(path, 0))
    if given.options.json and not given.options.follow:
        print_json(answer.to_json())
    elif given.options.json:
        _print_events(answer.events, as_json=True)
    else:
        print_parts(history_parts(answer))
    if given.options.follow:
        return run_async(_follow(path, answer.next_number, as_json=given.options.json))
    return EXIT_OK


async def _follow(path: Path, number: int, *, as_json: bool) -> int:
    """Print events from `number` on, until a signal or the daemon answers no more."""
    import asyncio
    import signal

    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(_print_new(path, number, as_json=as_json))
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(each, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return EXIT_OK


async def _print_new(path: Path, number: int, *, as_json: bool) -> None:
    """Print events from `number` on, for ever. PlatformError if the daemon answers no more."""
    import asyncio

    from tundp.admin import fetch_leases

    while True:
        answer = await fetch_leases(path, number)
        if answer.next_number < number:
            number = 0  # another daemon by now: its events count from 0
            continue
        _print_events(answer.events, as_json=as_json)
        number = answer.next_number
        await asyncio.sleep(POLL_S)


def _print_events(events: Sequence[LeaseEvent], *, as_json: bool) -> None:
    from tundp.observe import codec
    from tundp.show_leases import event_line

    for event in events:
        text = json.dumps(codec.to_json(event)) if as_json else event_line(event)
        print(text, flush=True)


def rewrite(arguments: Sequence[str]) -> list[str]:
    """-f is --follow."""
    return ["--follow" if word == "-f" else word for word in arguments]


COMMAND = Command(
    name="leases",
    summary="who has which subnet: PublicIP, node, time left, revision",
    description="""\
Ask a running daemon for every lease it knows: who has which subnet, and what comes of it, a peer
or a refusal with its reason. Only root may ask.""",
    run=leases,
    options=LeasesOptions,
    settings=WHICH_DAEMON,
    rewrite=rewrite,
    examples=(
        ("tundp leases", "every lease, by subnet"),
        ("tundp leases -f", "each change as it comes"),
        ("tundp leases history", "what happened since the daemon started"),
        ("tundp leases --json | jq -r '.leases[].public_ip'", "for programs"),
    ),
    notes="exit codes: 0 the daemon answered, or a signal ended --follow; 1 none did, or it ended;"
    " 2 wrong\nusage.",
)
HISTORY = Command(
    name="leases history",
    summary="who had which subnet when, since the daemon started",
    description="""\
Ask a running daemon what happened to leases since it started: which came, moved to another node,
were taken by one with the same PublicIP, went, were refused or unreadable; with the store's
revision, the time, and the milliseconds until packets went by it. The last 2,000 are kept.""",
    run=history,
    options=LeasesOptions,
    settings=WHICH_DAEMON,
    rewrite=rewrite,
    examples=(
        ("tundp leases history", ""),
        ("tundp leases history -f --json", "an event a line, for programs"),
    ),
    notes="exit codes: 0 the daemon answered, or a signal ended --follow; 1 none did, or it ended;"
    " 2 wrong\nusage.",
)
