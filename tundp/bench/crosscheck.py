"""Second opinions: strace counts the system calls our counters claim, iperf3 the bits.

Both only when installed, and neither while anything is measured: strace slows a daemon
down many times over, so only the ratio to packets is compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, Final

from tundp.bench.paths import BASELINE, LIMIT, READY_S, BenchPath, Ground
from tundp.bench.results import Results
from tundp.bench.workloads import PORT
from tundp.errors import LabError
from tundp.finding import Finding, Verdict
from tundp.lab import generators
from tundp.lab.lab import finish, stop_process

PACKET_CALLS: Final = frozenset(
    {"read", "readv", "write", "sendto", "recvmsg", "sendmmsg", "recvmmsg", "poll", "ppoll"}
    | {"epoll_wait", "epoll_pwait", "epoll_pwait2"}
)
TRACE_S: Final = 0.6
PER_MS: Final = 2
SIZE: Final = 200
SYSCALLS_MAX: Final = 0.15
RATE_MAX: Final = 0.3
IPERF3_S: Final = 1
IPERF3_PATIENCE_S: Final = 15
COMPARED: Final = (BASELINE, LIMIT, "tundp-gso")
"""Rows whose TCP figure iperf3 measures, too."""


async def count_syscalls(lab_kind: str, path: BenchPath, ground: Ground) -> Finding | None:
    """Compare a daemon's own count with strace's; None without strace or daemon."""
    if shutil.which("strace") is None or not ground.daemons:
        return None
    node = ground.daemons[0]
    assert node.daemon is not None
    summary = ground.directory / "strace"
    data = generators.pattern()
    source, sink = ground.ends
    run_id = generators.next_run()
    receiver = generators.datagram_receiver(
        sink, ground.addresses[1], PORT, data, run_id=run_id, size=SIZE
    )
    sender = generators.datagram_sender(
        source, ground.addresses[1], PORT, data, run_id=run_id, size=SIZE, per_ms=PER_MS
    )
    strace = await asyncio.create_subprocess_exec(
        *("strace", "-f", "-c", "-o", str(summary), "-p", str(node.daemon.pid)),
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert strace.stderr is not None
        async with asyncio.timeout(READY_S):
            said = (await strace.stderr.readline()).decode()
        if "attached" not in said:
            return Finding(
                id="syscalls",
                title=f"syscalls {lab_kind} {path.name}",
                evidence=f"strace cannot attach: {said.strip()}",
                verdict=Verdict.NOTE,
                meaning="ptrace is not allowed here: our own counters stand alone",
            )
        before = await ground.counters()
        for generator in (receiver, sender):
            await finish(asyncio.to_thread(generator.start))
        await asyncio.sleep(TRACE_S)
        # Counted is all of the traffic, as traced is: a busy machine may run this late.
        for generator in (sender, receiver):
            await asyncio.to_thread(generator.stop)
        await ground.settle()
        after = await ground.counters()
    finally:
        for generator in (sender, receiver):
            if generator.sock is not None and generator.sock.fileno() >= 0:
                await asyncio.to_thread(generator.stop)
        if strace.returncode is None:
            strace.send_signal(signal.SIGINT)
        await strace.wait()
    counted = after[0].totals["syscalls"] - before[0].totals["syscalls"]
    traced = _packet_calls(summary)
    is_close = counted > 0 and abs(traced - counted) <= SYSCALLS_MAX * counted
    return Finding(
        id="syscalls",
        title=f"syscalls {lab_kind} {path.name}",
        evidence=f"{counted} counted, {traced} traced",
        verdict=Verdict.OK if is_close else Verdict.FAIL,
        meaning=f"strace must agree with the engine's own counter within {SYSCALLS_MAX:.0%}",
    )


async def compare_with_iperf3(
    lab_kind: str, grounds: Mapping[str, Ground], results: Results, runs: int
) -> list[Finding]:
    """Our TCP figures beside iperf3's: of VXLAN, and what others are of it. None without iperf3.

    The two generators differ by design: iperf3 sends blocks of 128 KiB out of one buffer and
    compares nothing at the other end; ours sends and compares a pattern, which takes processor
    time from the path where there are few cores. So ratios differ too, and both are shown.
    """
    rows = [name for name in COMPARED if name in grounds and _ours(results, lab_kind, name)]
    if shutil.which("iperf3") is None or BASELINE not in rows:
        return []
    theirs: dict[str, list[float]] = {name: [] for name in rows}
    failed: dict[str, str] = {}
    for _ in range(runs):
        for name in rows:
            try:
                theirs[name].append(await _iperf3(grounds[name]))
            except LabError as error:
                failed[name] = str(error)
    return [
        _beside(lab_kind, name, theirs, results)
        if name not in failed and BASELINE not in failed
        else Finding(
            id="iperf3",
            title=f"iperf3 {lab_kind} {name}",
            evidence=failed.get(name, f"{BASELINE} {failed.get(BASELINE)}"),
            verdict=Verdict.NOTE,
            meaning="",
        )
        for name in rows
    ]


def _beside(
    lab_kind: str, name: str, theirs: Mapping[str, list[float]], results: Results
) -> Finding:
    ours, middle = _ours(results, lab_kind, name), median(theirs[name])
    evidence = f"{middle:.1f} Gbit/s, ours {ours:.1f}"
    ratio = results.ratio(lab_kind, name, "tcp1", "gbps")
    if name != BASELINE and ratio is not None:
        of = median(a / b for a, b in zip(theirs[name], theirs[BASELINE], strict=True))
        evidence += f"; {of:.2f}x of VXLAN, ours {ratio.median:.2f}x"
    return Finding(
        id="iperf3",
        title=f"iperf3 {lab_kind} {name}",
        evidence=evidence,
        verdict=Verdict.OK if abs(middle / ours - 1) <= RATE_MAX else Verdict.NOTE,
        meaning="TCP by another generator, which compares nothing where it arrives: the same"
        " order, not the same number",
    )


def _ours(results: Results, lab_kind: str, row: str) -> float:
    """0 if it was not measured."""
    cell = results.cell(lab_kind, row, "tcp1", "gbps")
    return 0.0 if cell is None else cell.median


async def _iperf3(ground: Ground) -> float:
    """Gbit/s of one stream; LabError with what iperf3 says."""
    source, sink = ground.ends
    server = await sink.popen(["iperf3", "-s", "-1", "-B", ground.addresses[1]])
    report = ground.directory / "iperf3.json"
    client = server
    try:
        await asyncio.sleep(0.3)
        with report.open("wb") as log:
            argv = ["iperf3", "-c", ground.addresses[1], "-t", str(IPERF3_S), "-O", "1", "-J"]
            client = await source.popen(argv, log=log)
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(client.wait, IPERF3_PATIENCE_S)
    finally:
        await stop_process(client)
        await stop_process(server)
    try:
        document: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return float(document["end"]["sum_received"]["bits_per_second"]) / 1e9
    except (ValueError, KeyError) as error:
        raise LabError(f"gave no figure: {error}") from None


def _packet_calls(summary: Path) -> int:
    """The calls column of `strace -c`, packet calls only."""
    total = 0
    for line in summary.read_text(encoding="utf-8").splitlines():
        words = line.split()
        if words and words[-1] in PACKET_CALLS and words[3].isdigit():
            total += int(words[3])
    return total
