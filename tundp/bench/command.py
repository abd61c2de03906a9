"""One bench as a person asks for it: measured, saved while it runs, kept when interrupted."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tundp.bench.plan import BenchSettings, make_plan
from tundp.bench.results import Results
from tundp.bench.run import Progress, run_bench
from tundp.errors import ConfigError, Interrupted
from tundp.lab.lab import interruptible

RESULTS: Final = "results.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What there is after a bench."""

    results: Results | None
    """None if nothing was measured."""
    interrupted: Interrupted | None

    @property
    def is_comparable(self) -> bool:
        """Whether it ended by itself and every validity check passed."""
        results = self.results
        return results is not None and not results.is_partial and not results.reds


async def measure(settings: BenchSettings, directory: Path, progress: Progress) -> Measured:
    """Run a bench; results are in `directory` after each workload.

    ConfigError if the settings or the directory cannot be used, LabError if the lab cannot be
    built.
    """
    progress.start(make_plan(settings).run_count)
    make_writable(directory)
    kept: Results | None = None

    def keep(results: Results) -> None:
        nonlocal kept
        if results.samples:
            kept = results
            results.save(directory / RESULTS)

    interrupted = None
    try:
        async with interruptible():
            await run_bench(settings, progress, keep)
    except asyncio.CancelledError:
        left = "what was measured is kept" if kept else "nothing was measured"
        interrupted = Interrupted(f"interrupted; everything torn down, {left}")
    return Measured(results=kept, interrupted=interrupted)


def make_writable(directory: Path) -> None:
    """Make the directory of --out; ConfigError if it cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".write"
        probe.write_text("", encoding="ascii")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--out {directory}: {error.strerror}") from None
