"""One bench: build every row, run every workload over all of them in turn, verify, tear down.

    for each lab            virtual: veth passes super-packets whole
                            wire:    MTU-size frames with finished checksums
      build all its rows    each on its own pair of namespaces; idle ones cost nothing
      look at the frames    AF_PACKET histogram of what leaves eth0
      for each workload
        for each round      rows in turn, starting at another one each round

So whatever the machine does meanwhile hits all rows alike, and ratios are taken within a
round. What was measured is kept after any end; an interrupted bench says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import fcntl
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from pyroute2 import netns

from tundp.bench import crosscheck, validity
from tundp.bench.frames import look_at_frames
from tundp.bench.paths import (
    PROBE_PREFIX,
    BenchPath,
    Ground,
    build_ground,
    host_names,
)
from tundp.bench.plan import BenchSettings, Plan, make_plan
from tundp.bench.results import Results, Row, Sample
from tundp.bench.workloads import Workload, read_snmp
from tundp.errors import ConfigError, LabError, TundpError
from tundp.finding import Finding, Verdict
from tundp.lab import generators
from tundp.lab.lab import Lab, leftovers, processes_in, remove_namespace
from tundp.linux.tun import require_device

PREFIX: Final = "tundp-bench"
SEED: Final = 8285
PROBED: Final = ("fou", "wireguard")
LOCK: Final = Path("/run/tundp-bench.lock")
TEMPORARY: Final = "tundp-bench-"


class Progress:
    """What the bench tells whoever watches; does nothing by itself."""

    def start(self, total: int) -> None:
        """There will be `total` measurements, if every row can be built."""

    def add(self, count: int) -> None:
        """There will be so many more."""

    def say(self, text: str) -> None:
        """One line that stays."""

    def step(self, text: str) -> None:
        """One measurement begins."""


async def run_bench(
    settings: BenchSettings, progress: Progress, keep: Callable[[Results], None]
) -> Results:
    """Run it. `keep` is called with all there is after each workload, and at any end.

    LabError before anything is built if namespaces of an earlier bench are there.
    Cancelling tears everything down; what was measured has been given to `keep`.
    """
    generators.require()
    plan = make_plan(settings)
    require_device()
    for path in plan.paths:
        if (why := await path.why_wrong()) is not None:
            raise ConfigError(f"row {path.name}: {why}")
    with only_one():
        return await _run_plan(plan, settings, progress, keep)


async def _run_plan(
    plan: Plan, settings: BenchSettings, progress: Progress, keep: Callable[[Results], None]
) -> Results:
    names = [name for lab in plan.labs for path in plan.paths for name in host_names(lab, path)]
    left = leftovers(PREFIX, names)
    if left:
        raise LabError(
            f"namespaces of another bench are there ({', '.join(left[:3])}, ...): let it end,"
            " or remove them with tundp bench --clean"
        )
    results = Results(
        profile=settings.profile,
        settings=asdict(settings) | {"rounds": plan.rounds, "seconds": plan.seconds},
        started=now(),
        environment=validity.environment(),
    )
    try:
        results.checks += await validity.checks_before(settings.patience_s)
        results.checks.append(validity.check_rounds(plan.rounds))
        for check in results.checks:
            progress.say(f"{check.title}: {check.evidence} ({check.verdict.value})")
        began = time.monotonic()
        for number, lab_kind in enumerate(plan.labs, 1):
            ends_at = began + plan.limit_s * number / len(plan.labs)
            await _run_lab(lab_kind, plan, results, progress, keep, ends_at)
        results.is_partial = False
    finally:
        results.finished = now()
        results.checks += validity.checks_after(results)
        keep(results)
    return results


async def clean_bench() -> list[str]:
    """Remove what a killed bench left; the names of what was removed.

    LabError while a bench runs: it cleans up by itself.
    """
    with only_one():
        removed = [
            name
            for name in netns.listnetns()
            if name.startswith(f"{PREFIX}-") or name in {f"{PROBE_PREFIX}-{p}" for p in PROBED}
        ]
        for name in removed:
            for pid in processes_in(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            remove_namespace(name)
        for directory in Path(tempfile.gettempdir()).glob(f"{TEMPORARY}*"):
            shutil.rmtree(directory, ignore_errors=True)
    return removed


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """Hold the machine's one bench: two at once would measure each other."""
    if os.geteuid() != 0:
        raise LabError("the bench makes network namespaces and TUN devices: run it as root")
    with LOCK.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LabError("another tundp bench is running on this machine: let it end") from None
        yield


async def _run_lab(
    lab_kind: str,
    plan: Plan,
    results: Results,
    progress: Progress,
    keep: Callable[[Results], None],
    ends_at: float,
) -> None:
    """All of one lab. ends_at: monotonic time from which on no rounds are added."""
    async with _lab(lab_kind, plan, results, progress) as grounds:
        for path, ground in list(grounds):
            try:
                results.checks.append(await look_at_frames(lab_kind, path, ground))
                syscalls = await crosscheck.count_syscalls(lab_kind, path, ground)
                results.checks += [syscalls] if syscalls else []
            except _ROW_FAILURES as error:
                grounds.remove((path, ground))
                _fail_row(lab_kind, path, f"carries nothing: {error}", results, progress)
        before = await _losses(grounds)
        chosen = _fitting(lab_kind, plan, grounds, progress)
        for workload, fitting in chosen.items():
            await _rounds(lab_kind, workload, fitting, range(plan.rounds), plan, results, progress)
            keep(results)
        # More of what is still open, all of it in turn: the time that is left is everybody's.
        for first in range(plan.rounds, plan.rounds_max, plan.step):
            for workload, fitting in chosen.items():
                if results.is_decided(lab_kind, workload.name) or time.monotonic() > ends_at:
                    continue
                numbers = range(first, min(first + plan.step, plan.rounds_max))
                progress.add(len(numbers) * len(fitting))
                await _rounds(lab_kind, workload, fitting, numbers, plan, results, progress)
                keep(results)
        after = await _losses(grounds)
        results.checks += validity.check_losses(lab_kind, before, after)
        if grounds:
            by_name = {path.name: ground for path, ground in grounds}
            results.checks += await crosscheck.compare_with_iperf3(
                lab_kind, by_name, results, plan.iperf3_runs
            )


def _fitting(
    lab_kind: str, plan: Plan, grounds: list[tuple[BenchPath, Ground]], progress: Progress
) -> dict[Workload, list[tuple[BenchPath, Ground]]]:
    """The rows each workload can be measured over."""
    chosen: dict[Workload, list[tuple[BenchPath, Ground]]] = {}
    for workload in plan.workloads:
        chosen[workload] = []
        for path, ground in grounds:
            if (why_not := workload.why_not(ground)) is None:
                chosen[workload].append((path, ground))
            else:
                progress.say(f"{lab_kind}: no {workload.name} over {path.name}: {why_not}")
    return chosen


async def _rounds(
    lab_kind: str,
    workload: Workload,
    fitting: Sequence[tuple[BenchPath, Ground]],
    numbers: range,
    plan: Plan,
    results: Results,
    progress: Progress,
) -> None:
    """Measure rounds of one workload over its rows."""
    for number in numbers:
        # Another order each round, the same in every bench: no row always follows the same one,
        # and the null test has all kinds of neighbours.
        order = list(fitting)
        random.Random(f"{SEED} {workload.name} {number}").shuffle(order)
        for path, ground in order:
            progress.step(f"{lab_kind} · {workload.name} · {path.name}")
            await _measure(lab_kind, path, ground, workload, number, plan, results)


async def _losses(grounds: list[tuple[BenchPath, Ground]]) -> dict[str, int]:
    """IP fragments made on any host, and frames softirqs dropped on the machine."""
    found = {"fragments": 0, "softirq drops": validity.softirq_drops()}
    for _, ground in grounds:
        for host in {*ground.nodes, *ground.ends}:
            found["fragments"] += (await host.call(read_snmp))["Ip"]["FragCreates"]
    return found


async def _measure(
    lab_kind: str,
    path: BenchPath,
    ground: Ground,
    workload: Workload,
    number: int,
    plan: Plan,
    results: Results,
) -> None:
    try:
        values = await workload.measure(ground, warmup_s=plan.warmup_s, seconds=plan.seconds)
    except _ROW_FAILURES as error:
        results.checks.append(
            Finding(
                id="run",
                title=f"run {number + 1} of {lab_kind} {workload.name} {path.name}",
                evidence=f"failed: {error}",
                verdict=Verdict.FAIL,
                meaning="a row without all its rounds is compared with luck",
            )
        )
        return
    results.samples.append(
        Sample(lab=lab_kind, row=path.name, workload=workload.name, round=number, values=values)
    )


@contextlib.asynccontextmanager
async def _lab(
    lab_kind: str, plan: Plan, results: Results, progress: Progress
) -> AsyncIterator[list[tuple[BenchPath, Ground]]]:
    """All rows of a lab that can be built here; the others are noted with the reason."""
    directory = Path(tempfile.mkdtemp(prefix=TEMPORARY))
    try:
        async with Lab(PREFIX) as lab:
            grounds = []
            for path in plan.paths:
                why_not = await path.why_not()
                if why_not is None:
                    try:
                        ground = await build_ground(
                            lab, lab_kind, path, directory / path.name, has_pods=plan.has_pods
                        )
                        grounds.append((path, ground))
                    except _ROW_FAILURES as error:
                        why_not = f"cannot be built: {error}"
                is_news = all(
                    (row.name, row.why_not) != (path.name, why_not) for row in results.rows
                )
                if why_not is not None and is_news:
                    progress.say(f"{lab_kind}: no {path.name}: {why_not}")
                results.rows.append(
                    Row(
                        lab=lab_kind,
                        name=path.name,
                        label=path.label,
                        is_encrypted=path.is_encrypted,
                        why_not=why_not,
                    )
                )
            yield grounds
    finally:
        shutil.rmtree(directory, ignore_errors=True)


_ROW_FAILURES: Final = (TundpError, OSError, TimeoutError, subprocess.SubprocessError)
"""What one row may do without taking the others along."""


def _fail_row(
    lab_kind: str, path: BenchPath, why_not: str, results: Results, progress: Progress
) -> None:
    progress.say(f"{lab_kind}: no {path.name}: {why_not}")
    results.rows = [
        dataclasses.replace(row, why_not=why_not)
        if (row.lab, row.name) == (lab_kind, path.name)
        else row
        for row in results.rows
    ]


def now() -> str:
    """For results: when something began or ended."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
