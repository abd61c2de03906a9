"""`tundp bench` and `tundp bench diff`: progress while it runs, tables and files at the end."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tundp.choices import BenchProfile, Topology
from tundp.cli.command import Command, Given, NoOptions, run_async
from tundp.cli.output import EXIT_FAILED, EXIT_OK, print_parts, terminal
from tundp.settings.declare import option
from tundp.settings.parsers import parse_int, parse_list

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tundp.bench.plan import BenchSettings
    from tundp.bench.run import Progress

RESULTS = "results.json"


def parse_at_least_one(text: str) -> int:
    """A count."""
    value = parse_int(text)
    if value < 1:
        raise ValueError("is out of range: at least 1")
    return value


def _positive_s(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("is not a number") from None
    if not 0 < value <= 3600:
        raise ValueError("is out of range: seconds above 0, at most an hour")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What `tundp bench` can be told."""

    profile: BenchProfile = option(
        choice=BenchProfile,
        default=BenchProfile.QUICK,
        help="how much to measure: quick takes 3 minutes, default half an hour, full hours",
    )
    only: tuple[tuple[str, ...], ...] = option(
        parse=parse_list,
        default=(),
        metavar="NAME,...",
        help="rows, workloads or labs to restrict to; VXLAN is always measured; repeatable",
        is_repeatable=True,
    )
    rounds: int | None = option(
        parse=parse_at_least_one,
        default=None,
        metavar="N",
        help="interleaved rounds",
        default_text="the profile's",
    )
    seconds: float | None = option(
        parse=_positive_s,
        default=None,
        metavar="SECONDS",
        help="length of each measurement",
        default_text="the profile's",
    )
    topology: Topology = option(
        choice=Topology,
        default=Topology.HOST,
        help="traffic between the nodes, or between pods behind bridges",
    )
    row: tuple[str, ...] = option(
        default=(),
        metavar="NAME=FLAGS",
        help="also measure tundp with these flags of `tundp run`; repeatable",
        is_repeatable=True,
    )
    ladder: bool = option(
        default=False, help="also measure engine gso with one offload more on each rung"
    )
    flanneld: str | None = option(
        parse=lambda text: text or None,
        default=None,
        metavar="FILE",
        takes_file=True,
        help="a stock flanneld binary to measure, too",
    )
    out: Path = option(
        parse=Path,
        default=Path("tundp-bench"),
        metavar="DIR",
        takes_file=True,
        help="where the reports go",
    )
    clean: bool = option(default=False, help="remove what a killed bench left, and exit")


def bench(given: Given[BenchOptions]) -> int:
    """Measure and report; failed unless it ended by itself and is comparable."""
    from tundp.bench.plan import BenchSettings

    options = given.options
    if options.clean:
        return run_async(_clean())
    settings = BenchSettings(
        profile=options.profile.value,
        only=tuple(name for names in options.only for name in names),
        rounds=options.rounds,
        seconds=options.seconds,
        topology=options.topology.value,
        flanneld=options.flanneld,
        rows=options.row,
        has_ladder=options.ladder,
    )
    return run_async(_bench(settings, options.out))


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on a terminal, only what is to stay elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from tundp.bench.run import Progress

    class BarProgress(Progress):
        """Shows it as it comes."""

        def start(self, total: int) -> None:
            bar.update(task, total=total)

        def add(self, count: int) -> None:
            bar.update(task, total=(bar.tasks[task].total or 0) + count)

        def say(self, text: str) -> None:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

        def step(self, text: str) -> None:
            bar.update(task, advance=1, description=text)

    console = terminal()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Bar(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield BarProgress()


async def _bench(settings: BenchSettings, directory: Path) -> int:
    from tundp.bench.command import measure
    from tundp.bench.report import report_parts, write_reports

    with progress_bar() as progress:
        measured = await measure(settings, directory, progress)
    if measured.results is not None:
        print_parts(report_parts(measured.results))
        for text in write_reports(measured.results, directory):
            print(text)
        print(f"{directory}/report.html  report.md  {RESULTS}")
    if measured.interrupted is not None:
        raise measured.interrupted
    return EXIT_OK if measured.is_comparable else EXIT_FAILED


async def _clean() -> int:
    from tundp.bench.run import clean_bench

    removed = await clean_bench()
    print(f"removed {len(removed)} namespaces" if removed else "nothing to remove")
    return EXIT_OK


def diff(given: Given[NoOptions]) -> int:
    """Print what changed beyond noise; failed unless both are comparable and nothing got worse."""
    from tundp.bench.report import difference_parts
    from tundp.bench.results import diff as compare
    from tundp.bench.results import load

    paths = [_results(Path(text)) for text in given.operands]
    before, after = (load(path) for path in paths)
    differences = compare(before, after)
    for path, each in zip(paths, (before, after), strict=True):
        print(f"{path}: {each.headline}")
    print_parts(difference_parts(differences))
    is_sound = not any(each.reds or each.is_partial for each in (before, after))
    is_worse = any(each.verdict in ("worse", "gone") for each in differences)
    return EXIT_OK if differences and is_sound and not is_worse else EXIT_FAILED


def _results(path: Path) -> Path:
    """The results of a bench: the file, or its directory."""
    return path / RESULTS if path.is_dir() else path


COMMAND = Command(
    name="bench",
    summary="measure what the overlay costs, against kernel VXLAN",
    description="""\
Build a lab of namespaces, run every path it can on the same work, interleaved, verify the
traffic, tear down, and write results.json, report.md and report.html. Needs root and a
quiet machine. `tundp bench diff A B` compares two results; `tundp bench restart` measures what
a restart loses.""",
    run=bench,
    options=BenchOptions,
    examples=(
        ("tundp bench --out=report", "the rows that matter most, 3 minutes"),
        ("tundp bench --only=tundp-gso,tcp1,virtual --rounds=20", "one row, one workload, one lab"),
        ("tundp bench --row='spinless=--spin=0'", "a row of one's own"),
        ("tundp bench diff before after", "what changed beyond noise"),
    ),
    notes="""\
exit codes: 0 comparable; 1 failed or not comparable; 2 wrong usage; 130 interrupted (what
was measured by then is written).""",
)

DIFF = Command(
    name="bench diff",
    summary="compare two results of tundp bench",
    description="""\
Print what changed beyond noise between two results, each the directory of --out or its
results.json.""",
    run=diff,
    options=NoOptions,
    operands=("A", "B"),
    examples=(("tundp bench diff before after", ""),),
    notes="exit codes: 0 nothing got worse; 1 something did, or they are not comparable.",
)
