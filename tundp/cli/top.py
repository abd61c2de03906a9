"""`tundp top`: what moves right now, by peer, by flow and by drop reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, unique
from typing import Final

from tundp.cli.command import WHICH_DAEMON, Command, Given, run_async
from tundp.errors import ConfigError
from tundp.settings.declare import option
from tundp.settings.parsers import parse_count, parse_duration

_LETTERS: Final = {"-n": "--count", "-d": "--delay", "-o": "--output"}
ROWS: Final = 20
"""Rows of a table that is no screen, if nothing else is asked for."""
_DELAY_MIN: Final = 0.1


@unique
class TopView(Enum):
    """Which table is shown at first."""

    PEERS = "peers"
    FLOWS = "flows"
    DROPS = "drops"


@unique
class TopFormat(Enum):
    """What is printed."""

    TEXT = "text"
    JSON = "json"


def parse_delay(text: str) -> float:
    """Seconds: 0.5, 2s, 1m; not so short that asking is all that is done."""
    seconds = parse_duration(text)
    if seconds < _DELAY_MIN:
        raise ValueError(f"is out of range: at least {_DELAY_MIN:g} s")
    return seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class TopOptions:
    """What `tundp top` can be told."""

    view: TopView | None = option(
        default=None,
        choice=TopView,
        help="the table to begin with; flows if a filter is given, else peers",
        since="0.2.0",
    )
    sort: str = option(
        default="",
        metavar="COLUMN",
        help="sort by this column; of peers: traffic, subnet, peer, answers, out-pps, in-pps,"
        " out-bps, in-bps, drops, rtt, heard, mtu; of flows: traffic, local, remote, protocol,"
        " peer, out-pps, in-pps, out-bps, in-bps; of drops: drops, total, reason, direction",
        since="0.2.0",
    )
    reverse: bool = option(default=False, help="sort the other way around", since="0.2.0")
    count: int | None = option(
        default=None,
        parse=parse_count,
        metavar="N",
        help="end after N rounds; also -n",
        since="0.2.0",
    )
    delay: float = option(
        default=2.0,
        parse=parse_delay,
        metavar="SECONDS",
        help="time between two rounds; longer by itself while the daemon needs more than a fifth"
        " of it to answer; also -d",
        since="0.2.0",
    )
    rows: int | None = option(
        default=None,
        parse=parse_count,
        metavar="N",
        help="print at most N rows of the table; all with -o json, else 20, and what fits on a"
        " screen",
        since="0.2.0",
    )
    plain: bool = option(
        default=False,
        help="print each round below the one before, as without a terminal",
        since="0.2.0",
    )
    output: TopFormat = option(
        default=TopFormat.TEXT,
        choice=TopFormat,
        help="tables for people, or a JSON object a round; also -o",
        since="0.2.0",
    )


def top(given: Given[TopOptions]) -> int:
    """Show rounds until something ends it."""
    from tundp.cli.top_session import Session
    from tundp.top.columns import Shown, sort_names
    from tundp.top.view import View
    from tundp.wire.filter import parse

    options = given.options
    text = parse(" ".join(given.operands)).text
    if text and options.view not in (None, TopView.FLOWS):
        raise ConfigError("a filter is one of flows: leave --view out, or give --view=flows")
    default = TopView.FLOWS if given.operands else TopView.PEERS
    view = View(shown=Shown((options.view or default).value), filter=text, interval=options.delay)
    if options.sort:
        names = sort_names(view.shown)
        if options.sort not in names:
            raise ConfigError(
                f"--sort={options.sort}: {view.shown.value} can be sorted by {', '.join(names)}"
            )
        view.sorts[view.shown] = options.sort
    view.turned[view.shown] = options.reverse
    return run_async(Session(options, given.settings().admin_socket, view).run())


def rewrite(arguments: Sequence[str]) -> list[str]:
    """-n and -d are as in top(1), -o as in kubectl."""
    found = []
    for word in arguments:
        letter, equals, text = word.partition("=")
        found.append(f"{_LETTERS.get(letter, letter)}{equals}{text}")
    return found


COMMAND = Command(
    name="top",
    summary="packets and bits a second, live: by peer, by flow, by drop reason",
    description="""\
Show what a running daemon moves right now, again every two seconds: packets and bits a second each
way, drops, RTT and path MTU of each peer; the busiest flows; drops by reason; batch sizes and CPU
time of the packet threads. Keys sort, filter, pause and switch between the tables: ? lists them.
Without a terminal, or with --plain, each round is printed below the one before. FILTER is a packet
filter as tcpdump takes them, of inner packets, and shows flows. Only root may ask.""",
    run=top,
    options=TopOptions,
    settings=WHICH_DAEMON,
    more_operands="FILTER",
    rewrite=rewrite,
    examples=(
        ("tundp top", "peers, the busiest first"),
        ("tundp top tcp port 443", "flows of these packets"),
        ("tundp top --view=drops -d 1", "what is dropped, every second"),
        ("tundp top -n 1 --sort=drops --rows=5", "one round, for a terminal or a log"),
        ("tundp top -n 1 -o json | jq '.peers[0]'", "for programs"),
    ),
    notes="""\
Figures of peers and drops are differences of the daemon's counters, and exact. Flows are added up
from event records: what cannot be read in time is lost, counted, and rates become estimates.
exit codes: 0 ended by a key, by -n or by a signal, or because nobody reads any more; 1 no daemon
answers; 2 wrong usage, or a wrong filter.""",
)
