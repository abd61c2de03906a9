"""`tundp bench restart`: what is lost while a daemon is restarted, replaced, upgraded or killed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tundp.cli.bench import parse_at_least_one, progress_bar
from tundp.cli.command import Command, Given, run_async
from tundp.cli.output import EXIT_FAILED, EXIT_OK, print_parts
from tundp.errors import Interrupted
from tundp.settings.declare import option
from tundp.settings.parsers import parse_list

if TYPE_CHECKING:
    from tundp.bench.restart_results import RestartResults, RestartSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRestartOptions:
    """What `tundp bench restart` can be told."""

    runs: int = option(
        parse=parse_at_least_one,
        default=20,
        metavar="N",
        help="repetitions of each event, interleaved",
        since="0.2.0",
    )
    loads: tuple[str, ...] = option(
        parse=parse_list,
        default=("10000", "tcp"),
        metavar="LOAD,...",
        help="datagrams a second each way, or tcp: one stream at full speed",
        default_text="10000,tcp",
        since="0.2.0",
    )
    only: tuple[tuple[str, ...], ...] = option(
        parse=parse_list,
        default=(),
        metavar="NAME,...",
        help="events (stop, kill, replace, upgrade, hold-restart, hold-kill) or labs (virtual,"
        " wire) to restrict to; the null test is always run; repeatable",
        is_repeatable=True,
        since="0.2.0",
    )
    out: Path = option(
        parse=Path,
        default=Path("tundp-bench"),
        metavar="DIR",
        takes_file=True,
        help="where restart.json and restart.md go",
        since="0.2.0",
    )


def bench_restart(given: Given[BenchRestartOptions]) -> int:
    """Measure and report; failed unless it ended by itself and is comparable."""
    from tundp.bench.restart_results import RestartSettings

    options = given.options
    settings = RestartSettings(
        runs=options.runs,
        loads=options.loads,
        only=tuple(name for names in options.only for name in names),
    )
    return run_async(_measure(settings, options.out))


async def _measure(settings: RestartSettings, directory: Path) -> int:
    import asyncio

    from tundp.bench.command import make_writable
    from tundp.bench.restart import run_restarts
    from tundp.bench.restart_report import restart_parts, write_restart_reports

    make_writable(directory)
    kept: list[RestartResults] = []

    def keep(results: RestartResults) -> None:
        kept[:] = [results]
        write_restart_reports(results, directory)

    interrupted = None
    try:
        with progress_bar() as progress:
            await run_restarts(settings, progress, keep)
    except asyncio.CancelledError:
        left = "what was measured is kept" if kept else "nothing was measured"
        interrupted = Interrupted(f"interrupted; everything torn down, {left}")
    for results in kept:
        print_parts(restart_parts(results))
        print(f"{directory}/restart.md  restart.json")
    if interrupted is not None:
        raise interrupted
    return EXIT_OK if kept and kept[0].is_comparable else EXIT_FAILED


COMMAND = Command(
    name="bench restart",
    summary="what packets lose over a daemon's restart",
    description="""\
Build a lab of two nodes with pods behind bridges and a decoy for their default gateway, send
numbered datagrams both ways and a TCP stream, and restart one node's daemon in every way there is:
SIGTERM or kill -9 and a start, tundp run --replace, tundp upgrade, and below tundp hold. Print for
each what was lost, what leaked to the gateway, and the longest silence. Needs root and a quiet
machine; removes what it made on any end.""",
    run=bench_restart,
    options=BenchRestartOptions,
    examples=(
        (
            "tundp bench restart --out=report",
            "every event, 20 times in both labs: 640 runs, over half an hour",
        ),
        ("tundp bench restart --only=replace,virtual --runs=5", "one event, one lab, a minute"),
        ("tundp bench restart --loads=1000,10000,50000", "where it begins to lose"),
    ),
    notes="""\
exit codes: 0 comparable, whatever was lost; 1 failed or not comparable: a sender did not hold its
rate, or something was lost though nothing was restarted; 2 wrong usage; 130 interrupted (what
was measured by then is written).""",
)
