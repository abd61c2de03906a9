"""`tundp ping`: whether a peer answers, layer by layer, and what that means."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, unique
from typing import TYPE_CHECKING, Final

from tundp.cli.command import WHICH_DAEMON, Command, Given, run_async
from tundp.cli.output import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    print_json,
    print_parts,
)
from tundp.errors import ConfigError
from tundp.settings.declare import option
from tundp.settings.parsers import parse_duration, parse_int

if TYPE_CHECKING:
    from tundp.doctor.home import Home
    from tundp.doctor.probes import Echo
    from tundp.doctor.whom import Whom
    from tundp.linux.netlink import Netlink
    from tundp.observe.ping import Layer, Ping

EXIT_PARTLY: Final = 3
"""The overlay answers, and something else that was asked does not."""
INTERVAL_MIN_S: Final = 0.01
SIZE_MIN: Final = 44
"""Headers of IPv4 and ICMP, and the cookie that tells requests apart."""
SIZE_MAX: Final = 65_535
COUNT_MAX: Final = 1_000_000
_LETTERS: Final = {
    "-c": "--count",
    "-i": "--interval",
    "-W": "--wait",
    "-s": "--size",
    "-o": "--output",
    "-f": "--follow",
}


@unique
class PingFormat(Enum):
    """What is printed."""

    TEXT = "text"
    JSON = "json"


def parse_number(text: str) -> int:
    """How many echo requests; 0: without end."""
    value = parse_int(text)
    if not 0 <= value <= COUNT_MAX:
        raise ValueError(f"is out of range: 0 to {COUNT_MAX:,}")
    return value


def parse_pause(text: str) -> float:
    """Seconds between two requests."""
    value = parse_duration(text)
    if value < INTERVAL_MIN_S:
        raise ValueError("is below 10ms, which would be a flood")
    return value


def parse_size(text: str) -> int:
    """Bytes of an echo request, its IPv4 header included."""
    value = parse_int(text)
    if not SIZE_MIN <= value <= SIZE_MAX:
        raise ValueError(f"is out of range: {SIZE_MIN} to {SIZE_MAX} bytes")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class PingOptions:
    """What `tundp ping` can be told."""

    count: int = option(
        default=5,
        parse=parse_number,
        metavar="N",
        help="echo requests through the overlay after the layers; 0: until Ctrl-C; also -c",
        since="0.2.0",
    )
    follow: bool = option(
        default=False, help="go on until Ctrl-C, a line each; as --count=0; also -f", since="0.2.0"
    )
    interval: float = option(
        default=0.2,
        parse=parse_pause,
        default_text="200ms",
        metavar="TIME",
        help="between two of them, at least 10ms; also -i",
        since="0.2.0",
    )
    size: int = option(
        default=84,
        parse=parse_size,
        metavar="BYTES",
        help="length of them, the IPv4 header included; 84 is what ping sends; also -s",
        since="0.2.0",
    )
    wait: float = option(
        default=1.0,
        parse=parse_duration,
        default_text="1s",
        metavar="TIME",
        help="for each answer; what comes later counts as lost; also -W",
        since="0.2.0",
    )
    output: PingFormat = option(
        default=PingFormat.TEXT,
        choice=PingFormat,
        help="lines for people, or one JSON object at the end; also -o",
        since="0.2.0",
    )
    json: bool = option(default=False, help="the same as --output=json", since="0.2.0")


def ping(given: Given[PingOptions]) -> int:
    """Ask the peer, print what is found; the exit code tells what it comes to."""
    is_json = given.options.json or given.options.output is PingFormat.JSON
    found = run_async(_ping(given, is_json=is_json))
    if is_json:
        print_json(found.to_json())
    else:
        from tundp.show_ping import summary_parts

        print_parts(summary_parts(found))
    return {
        "ok": EXIT_OK,
        "partly": EXIT_PARTLY,
        "overlay": EXIT_FAILED,
        "interrupted": EXIT_INTERRUPTED,
    }[found.outcome.value]


async def _ping(given: Given[PingOptions], *, is_json: bool) -> Ping:
    import asyncio

    from tundp.doctor.ping import Wish
    from tundp.doctor.ping import ping as ask
    from tundp.linux.netlink import Netlink

    options = given.options
    stop = asyncio.Event()
    wish = Wish(
        count=0 if options.follow else options.count,
        interval_s=options.interval,
        packet_len=options.size,
        wait_s=options.wait,
    )
    async with Netlink() as netlink:
        home, whom = await _whom(given, netlink)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        teller = _Teller(whom, is_quiet=is_json, shows_each=not wish.count)
        return await ask(netlink, home, whom, wish, stop=stop, told=teller)


async def _whom(given: Given[PingOptions], netlink: Netlink) -> tuple[Home, Whom]:
    """This node, and the peer that is meant. ConfigError, PlatformError."""
    from tundp.doctor.home import find

    settings = given.settings()
    home, whom = await find(
        given.operands[0],
        netlink,
        path=settings.admin_socket,
        subnet_file=settings.subnet_file,
    )
    backend = None if home.status is None else home.status.backend
    device = None if backend is None else backend.device
    if device is not None and given.options.size > device.mtu:
        raise ConfigError(
            f"--size {given.options.size} is above the {device.mtu} bytes that {device.name} takes"
        )
    return home, whom


class _Teller:
    """Prints what is found while it goes on. See doctor.ping.Told."""

    def __init__(self, whom: Whom, *, is_quiet: bool, shows_each: bool) -> None:
        self._whom = whom
        self._is_quiet = is_quiet
        self._shows_each = shows_each and not is_quiet

    def layers(self, layers: Sequence[Layer]) -> None:
        """Every layer was asked."""
        if self._is_quiet:
            return
        from rich.text import Text

        from tundp.show_ping import head_line, layers_grid

        print_parts((head_line(self._whom.pinged()), Text(), layers_grid(layers), Text()))

    def echo(self, each: Echo) -> None:
        """One echo request of the series is decided."""
        if not self._shows_each:
            return
        from tundp.show_ping import echo_line

        rtt_ms = None if each.rtt_s is None else each.rtt_s * 1e3
        refusal = os.strerror(each.refusal) if each.refusal else ""
        to = str(self._whom.peer.subnet.network_address)
        print_parts((echo_line(each.number, to, rtt_ms, refusal),))


def rewrite(arguments: Sequence[str]) -> list[str]:
    """Letters as ping has them."""
    found = []
    for word in arguments:
        letter, equals, text = word.partition("=")
        found.append(f"{_LETTERS.get(letter, letter)}{equals}{text}")
    return found


COMMAND = Command(
    name="ping",
    summary="whether a peer answers, layer by layer: host, port, TUN, daemon, pods",
    description="""\
Ask one peer layer by layer: its host by ICMP on the underlay; its UDP port, which refuses where
nobody listens; the kernel behind its TUN by ICMP through the overlay; its daemon, which says its
version and its clock; and the bridge of its pods. Then the largest packet that arrives with DF
set, loss, round-trip times and their deviation, and one sentence that says what all of it comes
to and what to do. PEER is a PublicIP, a lease's subnet, any address in one, or a host name that
`tundp leases` shows. Without a running daemon, a PublicIP: host and port are asked then. Sends
echo requests and empty datagrams of its own only. Needs root.""",
    run=ping,
    options=PingOptions,
    settings=WHICH_DAEMON,
    operands=("PEER",),
    rewrite=rewrite,
    examples=(
        ("tundp ping 192.0.2.2", "the node with this PublicIP"),
        ("tundp ping 10.5.2.17", "the node whose pod this is"),
        ("tundp ping node2 -c 100 -i 20ms --size 1472", "loss and times of large packets"),
        ("tundp ping 10.5.2.0/24 -f", "a line each, until Ctrl-C; the summary then"),
        ("tundp ping 192.0.2.2 -o json | jq -r .conclusion", "for programs"),
    ),
    notes="""\
exit codes: 0 the overlay answers, and so does all that has to; 1 nothing came back through the
overlay, or no daemon is here to ask by; 2 wrong usage: no such peer, or this node itself; 3 the
overlay answers, but packets or large packets are lost, or another layer does not answer; 130
interrupted before the overlay could answer. A bridge that is not there yet, and a stock flanneld,
are no failures.""",
)
