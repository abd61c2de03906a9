"""`tundp trace`: what happens to single packets, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, unique
from typing import Final

from tundp.cli.command import WHICH_DAEMON, Command, Given, run_async
from tundp.settings.declare import option
from tundp.settings.parsers import parse_count, parse_duration

_LETTERS: Final = {"-c": "--count", "-o": "--output"}


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
        help="follow the packets through netfilter and see what the kernel drops, too: a table of"
        " ours marks packets of the network, and a BPF program runs at each drop, while the trace"
        " lasts; false: leave both alone",
        since="0.2.0",
    )
    peers: bool = option(
        default=True,
        help="ask the other tundp nodes that the packets go to or come from, at most 4, for their"
        " half; false: this node only",
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
    from tundp.cli.trace_session import Session
    from tundp.wire.filter import parse

    packets = parse(" ".join(given.operands))
    path = given.settings().admin_socket
    return run_async(Session(given.options, path, packets).run())


def rewrite(arguments: Sequence[str]) -> list[str]:
    """-c and -o are as in tcpdump and kubectl."""
    found = []
    for word in arguments:
        letter, equals, text = word.partition("=")
        found.append(f"{_LETTERS.get(letter, letter)}{equals}{text}")
    return found


COMMAND = Command(
    name="trace",
    summary="what happens to a packet, stage by stage, on this node and the other one",
    description="""\
Show each packet that matches FILTER with every stage it passes in a running daemon, and the time
between them: read from the TUN, looked up, sent; received, written to the TUN; or dropped, with
the reason and what to look at next. With nftables (iptables-nft included) also the rule that
drops it before or behind the daemon, and with BPF what else the kernel drops there, inner and outer
packets, with its own reason and function (linux 5.17). The other node's stages are shown, too, if
it runs tundp and answers (--peer-tools there and here), with the time on the wire as far as the
clocks are known. A packet of which it has no record was lost between the two, or is still on the
way. A super-packet is one packet here. FILTER is matched against inner packets by the packet
threads: `tcp port 443`, `icmp and host 10.5.2.3`, `peer 192.0.2.2`, `reason no_route`. Costs
nothing while it does not run; what it cannot keep up with is counted as lost, and no packet waits
for it. Only root may ask.""",
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
