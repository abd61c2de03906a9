"""`tundp bench` as a person meets it: progress while it runs, tables and files at the end."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from tundp.bench.report import difference_parts, report_parts, write_reports
from tundp.bench.results import Results, diff, load
from tundp.bench.run import BenchSettings, Progress, clean_bench, make_plan, run_bench
from tundp.errors import ConfigError
from tundp.lab.lab import interruptible


class BarProgress(Progress):
    """A bar on a terminal, one line a lab elsewhere."""

    def __init__(self, bar: Bar, total: int) -> None:
        self._bar = bar
        self._task = bar.add_task("starting", total=total)

    def say(self, text: str) -> None:
        """See Progress."""
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, text: str) -> None:
        """See Progress."""
        self._bar.update(self._task, advance=1, description=text)


async def bench(settings: BenchSettings, directory: Path) -> bool:
    """Run a bench and write its reports. Whether it ended by itself and is comparable."""
    plan = make_plan(settings)
    _make_writable(directory)
    console = Console(highlight=False)
    kept: list[Results] = []

    def keep(results: Results) -> None:
        kept[:] = [results]
        results.save(directory / "results.json")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    try:
        with Bar(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
            async with interruptible():
                await run_bench(settings, BarProgress(bar, plan.run_count), keep)
    except asyncio.CancelledError:
        console.print("\n[yellow]interrupted; everything torn down, what was measured is kept[/]")
    finally:
        if kept and kept[0].samples:
            results = kept[0]
            for part in report_parts(results):
                console.print(part, crop=False)
            for text in write_reports(results, directory):
                console.print(text, markup=False)
            console.print(f"{directory}/report.html  report.md  results.json", soft_wrap=True)
    return bool(kept) and not kept[0].is_partial and not kept[0].reds


def compare(before: Path, after: Path) -> bool:
    """Print what changed beyond noise; whether both are comparable and nothing got worse."""
    results = [load(before), load(after)]
    differences = diff(*results)
    console = Console(highlight=False)
    for path, each in zip((before, after), results, strict=True):
        console.print(f"{path}: {each.headline}", markup=False, soft_wrap=True)
    for part in difference_parts(differences):
        console.print(part, crop=False)
    is_sound = not any(each.reds or each.is_partial for each in results)
    is_worse = any(each.verdict in ("worse", "gone") for each in differences)
    return bool(differences) and is_sound and not is_worse


async def clean() -> None:
    """Remove what a killed bench left."""
    removed = await clean_bench()
    Console(highlight=False).print(
        f"removed {len(removed)} namespaces" if removed else "nothing to remove"
    )


def _make_writable(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".write"
        probe.write_text("", encoding="ascii")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--out {directory}: {error.strerror}") from None
