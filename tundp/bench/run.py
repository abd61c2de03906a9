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

import asyncio
import contextlib
import dataclasses
import datetime as dt
import fcntl
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from pyroute2 import netns

from tundp.bench import crosscheck, validity
from tundp.bench.paths import (
    BASELINE,
    LIMIT,
    NULL,
    PROBE_PREFIX,
    BenchPath,
    FlanneldPath,
    Ground,
    TundpPath,
    all_paths,
    build_ground,
    host_names,
    ladder,
)
from tundp.bench.results import Results, Row, Sample
from tundp.bench.workloads import WORKLOADS, Workload, read_snmp
from tundp.errors import ConfigError, LabError, TundpError
from tundp.finding import Finding, Verdict
from tundp.lab import generators
from tundp.lab.lab import Lab, leftovers, processes_in, remove_namespace
from tundp.linux import uapi
from tundp.linux.tun import require_device

PREFIX: Final = "tundp-bench"
LABS: Final = ("virtual", "wire")
FRAME_LOOK_S: Final = 0.25
TAP_BUFFER_LEN: Final = 256 << 20
SEED: Final = 8285
PROBED: Final = ("fou", "wireguard")
LOCK: Final = Path("/run/tundp-bench.lock")
TEMPORARY: Final = "tundp-bench-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """How much is measured."""

    workloads: tuple[str, ...]
    rounds: int
    rounds_max: int
    """Rounds are added up to so many where the interval leaves the verdict open,"""
    limit_s: float
    """and until the bench has taken so long."""
    seconds: float
    warmup_s: float
    rows: tuple[str, ...] = ()
    """If not all are measured unless they are asked for."""


PROFILES: Final = {
    "quick": Profile(
        workloads=("tcp1", "tcp4", "udp64", "udp1400", "tcp_rr"),
        rounds=5,
        rounds_max=9,
        limit_s=160,
        seconds=0.3,
        warmup_s=0.1,
        # Two minutes and a half: what they leave out is slower, or a variant.
        rows=(BASELINE, NULL, "veth", LIMIT, "simple", "tundp-gso"),
    ),
    "default": Profile(
        workloads=tuple(w.name for w in WORKLOADS if not w.name.endswith(("-loss", "-rev"))),
        rounds=7,
        rounds_max=21,
        limit_s=2400,
        seconds=1.0,
        warmup_s=0.3,
    ),
    "full": Profile(
        workloads=tuple(w.name for w in WORKLOADS),
        rounds=10,
        rounds_max=30,
        limit_s=4 * 3600,
        seconds=2.0,
        warmup_s=0.5,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """What the command line asked for."""

    profile: str
    only: tuple[str, ...]
    """Names of rows, workloads and labs to restrict to; of each kind none means all."""
    rounds: int | None
    seconds: float | None
    topology: str
    """`host` or `pods`."""
    flanneld: str | None
    rows: tuple[str, ...] = ()
    """More rows, NAME=FLAGS of tundp run."""
    has_ladder: bool = False
    patience_s: float = 10.0
    """What is waited before the start for an idle machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What will run."""

    labs: tuple[str, ...]
    paths: tuple[BenchPath, ...]
    workloads: tuple[Workload, ...]
    rounds: int
    rounds_max: int
    limit_s: float
    seconds: float
    warmup_s: float
    has_pods: bool

    @property
    def run_count(self) -> int:
        """Measurements in all, if every row can be built."""
        return len(self.labs) * len(self.paths) * len(self.workloads) * self.rounds


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


def make_plan(settings: BenchSettings) -> Plan:
    """Check the settings; ConfigError names what is unknown and what there is."""
    profile = PROFILES[settings.profile]
    extra: list[BenchPath] = [TundpPath.of_text(text) for text in settings.rows]
    if settings.has_ladder:
        extra += ladder()
    paths = [*all_paths(settings.flanneld), *extra]
    names = [path.name for path in paths]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"--row {twice[0]}: there is a row of this name already")
    kinds: dict[str, list[str]] = {
        "lab": list(LABS),
        "row": [path.name for path in paths],
        "workload": [workload.name for workload in WORKLOADS],
    }
    chosen: dict[str, list[str]] = {kind: [] for kind in kinds}
    for name in settings.only:
        kind = next((kind for kind, names in kinds.items() if name in names), None)
        if kind is None:
            raise ConfigError(
                f"--only {name}: no such row, workload or lab; rows: {', '.join(kinds['row'])};"
                f" workloads: {', '.join(kinds['workload'])}; labs: {', '.join(LABS)}"
            )
        chosen[kind].append(name)
    # The baseline and its double are what everything is compared with.
    own = [path.name for path in extra]
    rows = [BASELINE, NULL, *chosen["row"], *own]
    if not chosen["row"]:
        rows = [*(profile.rows or kinds["row"]), *own]
        rows += [path.name for path in paths if isinstance(path, FlanneldPath)]
    workloads = chosen["workload"] or list(profile.workloads)
    return Plan(
        labs=tuple(lab for lab in LABS if lab in (chosen["lab"] or LABS)),
        paths=tuple(path for path in paths if path.name in rows),
        workloads=tuple(w for w in WORKLOADS if w.name in workloads),
        rounds=settings.rounds or profile.rounds,
        # Who asks for a number of rounds gets that.
        rounds_max=settings.rounds or profile.rounds_max,
        limit_s=profile.limit_s,
        seconds=settings.seconds or profile.seconds,
        warmup_s=profile.warmup_s,
        has_pods=settings.topology == "pods",
    )


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
                results.checks.append(await _look_at_frames(lab_kind, path, ground))
                syscalls = await crosscheck.count_syscalls(lab_kind, path, ground)
                results.checks += [syscalls] if syscalls else []
            except _ROW_FAILURES as error:
                grounds.remove((path, ground))
                _fail_row(lab_kind, path, f"carries nothing: {error}", results, progress)
        before = await _losses(grounds)
        rng = random.Random(SEED)
        for workload in plan.workloads:
            fitting = []
            for path, ground in grounds:
                why_not = workload.why_not(ground)
                if why_not is None:
                    fitting.append((path, ground))
                else:
                    progress.say(f"{lab_kind}: no {workload.name} over {path.name}: {why_not}")
            for number in range(plan.rounds_max):
                if number >= plan.rounds:
                    if results.is_decided(lab_kind, workload.name) or time.monotonic() > ends_at:
                        break
                    progress.add(len(fitting))
                # Another order each round, the same in every bench: no row always follows
                # the same one, and the null test has all kinds of neighbours.
                rng.shuffle(fitting)
                for path, ground in fitting:
                    progress.step(f"{lab_kind} · {workload.name} · {path.name}")
                    await _measure(lab_kind, path, ground, workload, number, plan, results)
            keep(results)
        after = await _losses(grounds)
        results.checks += validity.check_losses(lab_kind, before, after)
        if grounds:
            by_name = {path.name: ground for path, ground in grounds}
            results.checks += await crosscheck.compare_with_iperf3(lab_kind, by_name, results)


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


async def _look_at_frames(lab_kind: str, path: BenchPath, ground: Ground) -> Finding:
    """Run TCP for a moment and see how large the frames are that leave either node."""
    sizes: Counter[int] = Counter()
    missed = 0
    taps: list[socket.socket] = []
    tcp = next(w for w in WORKLOADS if w.name == "tcp1")
    running = asyncio.create_task(tcp.measure(ground, warmup_s=0.05, seconds=FRAME_LOOK_S))
    try:
        taps += [await node.call(_open_tap) for node in ground.nodes]
        while not running.done():
            for tap in taps:
                _drain(tap, sizes)
            await asyncio.sleep(0.002)
        await running
        for tap in taps:
            _drain(tap, sizes)
            seen, dropped = struct.unpack(
                "=II", tap.getsockopt(uapi.SOL_PACKET, uapi.PACKET_STATISTICS, 8)
            )
            missed += dropped if seen else 0
    finally:
        for tap in taps:
            tap.close()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    check = validity.check_frames(sizes, missed, f"{lab_kind} {path.name}")
    if lab_kind != "wire" and check.verdict is Verdict.FAIL and sizes:
        return dataclasses.replace(check, verdict=Verdict.NOTE, meaning="super-packets pass whole")
    return check


def _open_tap() -> socket.socket:
    tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(uapi.ETH_P_ALL))
    tap.setsockopt(socket.SOL_SOCKET, uapi.SO_RCVBUFFORCE, TAP_BUFFER_LEN)
    tap.bind(("eth0", uapi.ETH_P_ALL))
    tap.setblocking(False)
    return tap


def _drain(tap: socket.socket, sizes: Counter[int]) -> None:
    buffer = bytearray(1)
    for _ in range(20_000):
        try:
            # MSG_TRUNC: the length of the whole frame, of which nothing else is wanted.
            length, source = tap.recvfrom_into(buffer, 1, socket.MSG_TRUNC)
        except BlockingIOError:
            return
        if source[2] == socket.PACKET_OUTGOING:
            sizes[length] += 1


def now() -> str:
    """For results: when something began or ended."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
