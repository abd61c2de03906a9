"""`tundp chaos`: packets to a peer lost, delayed, corrupted on purpose, for a while."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from tundp.cli.command import WHICH_DAEMON, Command, Given, run_async
from tundp.cli.output import EXIT_OK, print_json, print_parts
from tundp.errors import ConfigError
from tundp.settings.declare import option
from tundp.settings.parsers import parse_duration
from tundp.wire.impair import DELAY_MAX_S, LONGEST_S, MTU_MAX, MTU_MIN, SEED_MAX, Impairment

if TYPE_CHECKING:
    from tundp.observe.status import ChaosStatus

_SHARE: Final = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,9})?)%")
_JITTER: Final = re.compile(r"(.+?)(?:\+-|±)(.+)")


class Delay(NamedTuple):
    """Seconds."""

    mean_s: float = 0.0
    jitter_s: float = 0.0


def parse_share(text: str) -> float:
    """A share of the packets, from text such as 1% or 0.1%."""
    match = _SHARE.fullmatch(text)
    share = float(match[1]) / 100 if match else 2.0
    if share > 1:
        raise ValueError("is no share of the packets, such as 1% or 0.1%, up to 100%")
    return share


def parse_delay(text: str) -> Delay:
    """A delay, from text such as 20ms or 20ms+-5ms."""
    match = _JITTER.fullmatch(text)
    mean, jitter = match.groups() if match else (text, "")
    try:
        delay = Delay(parse_duration(mean), parse_duration(jitter) if jitter else 0.0)
    except ValueError:
        raise ValueError("is no delay, such as 20ms or 20ms+-5ms") from None
    if delay.mean_s > DELAY_MAX_S:
        raise ValueError(f"is out of range: at most {DELAY_MAX_S:.0f}s")
    if delay.jitter_s > delay.mean_s:
        raise ValueError("varies by more than the delay itself")
    return delay


def parse_time(text: str) -> float:
    """How long it lasts, seconds."""
    seconds = parse_duration(text)
    if seconds > LONGEST_S:
        raise ValueError("is out of range: at most 1h")
    return seconds


def _number(low: int, high: int, unit: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) < 20):
            raise ValueError("is not a whole number")
        if not low <= int(text) <= high:
            raise ValueError(f"is out of range: {low} to {high}{unit}")
        return int(text)

    return parse


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosOptions:
    """What `tundp chaos PEER` can be told."""

    loss: float = option(
        default=0.0, parse=parse_share, metavar="SHARE", help="lose so many", since="0.2.0"
    )
    delay: Delay = option(
        default=Delay(),
        parse=parse_delay,
        metavar="TIME[+-TIME]",
        default_text="none",
        help="delay each, uniformly between the bounds; packets from one address to one other"
        " keep their order",
        since="0.2.0",
    )
    reorder: float = option(
        default=0.0,
        parse=parse_share,
        metavar="SHARE",
        help="hold so many back for 5 ms, so that those behind overtake them",
        since="0.2.0",
    )
    duplicate: float = option(
        default=0.0, parse=parse_share, metavar="SHARE", help="send so many twice", since="0.2.0"
    )
    corrupt: float = option(
        default=0.0,
        parse=parse_share,
        metavar="SHARE",
        help="flip one bit of so many, behind the inner IPv4 header; sums stay, so that the"
        " receiver notices",
        since="0.2.0",
    )
    mtu: int | None = option(
        default=None,
        parse=_number(MTU_MIN, MTU_MAX, " bytes"),
        metavar="BYTES",
        help="lose every inner packet that is larger, without a word: a black hole",
        since="0.2.0",
    )
    seed: int | None = option(
        default=None,
        parse=_number(0, SEED_MAX, ""),
        metavar="N",
        default_text="a random one, which is printed",
        help="of all choices: the same one decides the same for each packet by its number",
        since="0.2.0",
    )
    for_: float | None = option(
        "for",
        default=None,
        parse=parse_time,
        metavar="TIME",
        help="required: how long, at most 1h; then the daemon ends it by itself",
        since="0.2.0",
    )
    agreed: bool = option(
        "yes-break-traffic",
        default=False,
        help="required: pods lose packets by this",
        since="0.2.0",
    )
    json: bool = option(default=False, help="print JSON", since="0.2.0")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowOptions:
    """What `tundp chaos list` and `stop` can be told."""

    json: bool = option(default=False, help="print JSON", since="0.2.0")


def begin(given: Given[ChaosOptions]) -> int:
    """Have the daemon impair packets, and print what began."""
    from tundp.admin_chaos import begin_chaos
    from tundp.observe.chaos import NOT_AGREED, Order

    options = given.options
    impairment = Impairment(
        loss=options.loss,
        delay_s=options.delay.mean_s,
        jitter_s=options.delay.jitter_s,
        reorder=options.reorder,
        duplicate=options.duplicate,
        corrupt=options.corrupt,
        mtu=options.mtu,
    )
    if impairment.is_none:
        raise ConfigError(
            "nothing to impair: --loss, --delay, --reorder, --duplicate, --corrupt or --mtu"
        )
    if options.for_ is None:
        raise ConfigError("--for is missing: how long, such as --for=60s, at most 1h")
    if not options.agreed:
        raise ConfigError(NOT_AGREED)
    order = Order(
        peer=given.operands[0], impairment=impairment, for_s=options.for_, seed=options.seed
    )
    _print(run_async(begin_chaos(given.settings().admin_socket, order)), as_json=options.json)
    return EXIT_OK


def show(given: Given[ShowOptions]) -> int:
    """Print what is impaired now, and what was."""
    from tundp.admin_chaos import fetch_chaos

    _print(run_async(fetch_chaos(given.settings().admin_socket)), as_json=given.options.json)
    return EXIT_OK


def stop(given: Given[ShowOptions]) -> int:
    """Have the daemon end chaos for a peer, or all of it, and print what ended."""
    from tundp.admin_chaos import stop_chaos

    peer = given.operands[0] if given.operands else "all"
    _print(run_async(stop_chaos(given.settings().admin_socket, peer)), as_json=given.options.json)
    return EXIT_OK


def _print(found: list[ChaosStatus], *, as_json: bool) -> None:
    from tundp.observe import codec
    from tundp.show_chaos import chaos_parts

    if as_json:
        print_json({"chaos": [codec.to_json(each) for each in found]})
    else:
        print_parts(chaos_parts(found, time.time()))


COMMAND = Command(
    name="chaos",
    summary="lose, delay, corrupt packets to a peer on purpose, for a while",
    description="""\
Have a running daemon impair the packets it sends to PEER (its subnet, its PublicIP, an address in
its subnet; or all, up to 64 peers): every subnet of that node is concerned, one direction only; for
the other one run it there. The daemon ends it when the time is over, whatever becomes of this
command, or when the peer's lease moves, or with itself. tundp status, drops, doctor, trace, readyz
and metrics say that it is on. Every packet it took is accounted for. Only root may ask.""",
    run=begin,
    options=ChaosOptions,
    settings=WHICH_DAEMON,
    operands=("PEER",),
    examples=(
        ("tundp chaos 10.5.2.0/24 --loss=1% --delay=20ms+-5ms --for=60s --yes-break-traffic", ""),
        ("tundp chaos 192.0.2.2 --mtu=1300 --for=5m --yes-break-traffic", "a black hole"),
        ("tundp chaos list", "what is impaired now, and was"),
        ("tundp chaos stop", "end all of it"),
    ),
    notes="exit codes: 0 it has begun; 1 the daemon did not answer or refused; 2 wrong usage.",
)
LIST = Command(
    name="chaos list",
    summary="what chaos impairs now, and did, packet by packet accounted for",
    description="""\
Ask a running daemon which peers' packets are impaired on purpose, how, for how long yet, and what
became of every datagram; then the last 16 that ended. Only root may ask.""",
    run=show,
    options=ShowOptions,
    settings=WHICH_DAEMON,
    examples=(("tundp chaos list --json | jq '.chaos[].counts'", "for programs"),),
    notes="exit codes: 0 the daemon answered; 1 none did; 2 wrong usage.",
)
STOP = Command(
    name="chaos stop",
    summary="end chaos for a peer, or all of it",
    description="""\
Have a running daemon send packets as they are again: to PEER, or without one to all. What is
delayed just now leaves in its time. Only root may ask.""",
    run=stop,
    options=ShowOptions,
    settings=WHICH_DAEMON,
    optional=("PEER",),
    examples=(("tundp chaos stop", "all of it"), ("tundp chaos stop 10.5.2.0/24", "")),
    notes="exit codes: 0 nothing is impaired there any more; 1 the daemon did not answer; 2 wrong"
    " usage.",
)
