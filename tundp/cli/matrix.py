"""`tundp matrix`: every peer at once, and how the peers reach each other."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, unique
from typing import TYPE_CHECKING, Final

from tundp.cli.command import WHICH_DAEMON, Command, Given, run_async
from tundp.cli.output import EXIT_FAILED, EXIT_OK, print_json, print_parts
from tundp.cli.ping import EXIT_PARTLY, parse_pause
from tundp.errors import PlatformError
from tundp.settings.declare import option
from tundp.settings.parsers import parse_duration, parse_int

if TYPE_CHECKING:
    from tundp.observe.matrix import Matrix
    from tundp.observe.status import Status

COUNT_MAX: Final = 1000
_LETTERS: Final = {"-c": "--count", "-i": "--interval", "-W": "--wait", "-o": "--output"}


@unique
class MatrixFormat(Enum):
    """What is printed."""

    TEXT = "text"
    JSON = "json"
    METRICS = "metrics"


def parse_requests(text: str) -> int:
    """Echo requests to each peer."""
    value = parse_int(text)
    if not 1 <= value <= COUNT_MAX:
        raise ValueError(f"is out of range: 1 to {COUNT_MAX:,}")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixOptions:
    """What `tundp matrix` can be told."""

    count: int = option(
        default=5,
        parse=parse_requests,
        metavar="N",
        help="echo requests through the overlay to each peer; also -c",
        since="0.2.0",
    )
    interval: float = option(
        default=0.1,
        parse=parse_pause,
        default_text="100ms",
        metavar="TIME",
        help="between two of them, at least 10ms; also -i",
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
    timeout: float = option(
        default=30.0,
        parse=parse_duration,
        default_text="30s",
        metavar="TIME",
        help="for all peers together; those left then are named as not asked",
        since="0.2.0",
    )
    output: MatrixFormat = option(
        default=MatrixFormat.TEXT,
        choice=MatrixFormat,
        help="tables for people, one JSON object, or Prometheus text; also -o",
        since="0.2.0",
    )
    json: bool = option(default=False, help="the same as --output=json", since="0.2.0")


def matrix(given: Given[MatrixOptions]) -> int:
    """Ask all peers, print what is found; the exit code tells the worst."""
    found, most = run_async(_matrix(given))
    if given.options.json or given.options.output is MatrixFormat.JSON:
        print_json(found.to_json())
    elif given.options.output is MatrixFormat.METRICS:
        from tundp.observe.matrix_metrics import text

        print(text(found, most), end="")
    else:
        from tundp.show_matrix import matrix_parts

        print_parts(matrix_parts(found))
    return {"ok": EXIT_OK, "partly": EXIT_PARTLY, "silent": EXIT_FAILED}[found.outcome.value]


async def _matrix(given: Given[MatrixOptions]) -> tuple[Matrix, int]:
    import asyncio

    from tundp.doctor.home import daemon_status, home_of, leases_of
    from tundp.doctor.matrix import MatrixWish
    from tundp.doctor.matrix import matrix as ask

    options, path = given.options, given.settings().admin_socket
    status = await daemon_status(path)
    if isinstance(status, PlatformError):
        raise status
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    wish = MatrixWish(
        count=options.count,
        interval_s=options.interval,
        wait_s=options.wait,
        limit_s=options.timeout,
    )
    found = await ask(home_of(status, path), await leases_of(path), wish, stop=stop)
    return found, _most(status)


def _most(status: Status) -> int:
    """Peers with series of their own, as the daemon's --metrics-peers says."""
    from tundp.observe.matrix_metrics import PEERS

    setting = status.settings.get("metrics-peers")
    return int(setting.value) if setting is not None and setting.value.isdecimal() else PEERS


def rewrite(arguments: Sequence[str]) -> list[str]:
    """Letters as ping has them."""
    found = []
    for word in arguments:
        letter, equals, text = word.partition("=")
        found.append(f"{_LETTERS.get(letter, letter)}{equals}{text}")
    return found


COMMAND = Command(
    name="matrix",
    summary="every peer at once, and the grid of how all nodes reach each other",
    description="""\
Ask every peer from this node, 32 at a time: its host by ICMP on the underlay, its kernel by ICMP
through the overlay, whether a packet of full size arrives, and its daemon who it is. The worst is
first. Then each peer that is a tundp tells how it reaches the others, as its daemon knows at the
moment (it asks nobody for this): rows are who tells, columns of whom. A stock flanneld does not
tell. Above 40 nodes the grid has those with trouble only; above 256 peers there is none. Needs
root and a running daemon.""",
    run=matrix,
    options=MatrixOptions,
    settings=WHICH_DAEMON,
    rewrite=rewrite,
    examples=(
        ("tundp matrix", "the table and the grid"),
        ("tundp matrix --timeout 5s -c 1", "a quick look"),
        ("tundp matrix -o json | jq -r '.sentences[]'", "for programs"),
        (
            "tundp matrix -o metrics > /var/lib/node_exporter/tundp.prom",
            "for the textfile collector of Prometheus' node exporter",
        ),
    ),
    notes="""\
exit codes: 0 every peer answers through the overlay; 1 one does not, or no daemon is here to ask;
2 wrong usage; 3 all answer, but packets are lost, peers do not hear each other, or not all were
asked in time.""",
)
