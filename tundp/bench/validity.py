"""Whether the numbers can be trusted: asked of the machine before, during and after."""

from __future__ import annotations

import asyncio
import os
import platform
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import tundp
from tundp.bench import stats
from tundp.bench.machine import busy_share, check_accounting
from tundp.bench.paths import BASELINE, NULL
from tundp.bench.results import Results, workload_named
from tundp.finding import Finding, Verdict

IDLE_S: Final = 2.0
BUSY_MAX: Final = 0.1
"""Of all CPUs, before anything is measured."""
FOREIGN_MAX: Final = 0.03
"""Of all CPUs, taken by others while one cell was measured."""
STEAL_MAX: Final = 0.01
ACCOUNTING_MAX: Final = 0.15
FOREIGN_NAMED: Final = 3
NOISE_MAX: Final = 0.15
FRAME_MAX: Final = 1514
"""Ethernet header and an MTU of 1500."""
RETRANSMIT_MAX: Final = 0.01
ROUNDS_MIN: Final = stats.ROUNDS_MIN


def environment() -> dict[str, str]:
    """What the numbers were measured on and with."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    model = re.search(r"^(?:model name|Model)\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    return {
        "kernel": platform.release(),
        "cpu": model.group(1) if model else platform.machine(),
        "cores": str(os.cpu_count()),
        "virtualised": "yes"
        if re.search(r"^flags.*\bhypervisor\b", cpuinfo, re.MULTILINE)
        else "no sign",
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "n/a",
        "mitigations": _mitigations(),
        "python": platform.python_version(),
        "tundp": tundp.__version__,
        "commit": _commit(),
        "MTU": "underlay 1500, VXLAN 1450, tundp and flanneld 1472, WireGuard 1420",
        "offloads": "virtual lab: as veth has them; wire lab: sending segmentation and"
        " checksums off, receiving GRO on",
        "rmem_max": _read("/proc/sys/net/core/rmem_max"),
        "wmem_max": _read("/proc/sys/net/core/wmem_max"),
        "iperf3": shutil.which("iperf3") or "not installed: no cross-check",
        "strace": shutil.which("strace") or "not installed: no cross-check",
    }


async def checks_before(patience_s: float) -> list[Finding]:
    """Whether the machine is idle, and whether CPU accounting finds a known burner.

    patience_s: for the machine to become idle: what ran before may still be ending.
    """
    deadline = asyncio.get_running_loop().time() + patience_s
    busy, others = await busy_share(IDLE_S)
    while busy > BUSY_MAX and asyncio.get_running_loop().time() < deadline:
        busy, others = await busy_share(IDLE_S)
    burnt, used = await check_accounting()
    error = abs(used - burnt) / burnt
    return [
        Finding(
            id="load-before",
            title="busy before",
            evidence=f"{busy:.0%}" + (f", by {', '.join(others.names)}" if others.names else ""),
            verdict=Verdict.OK if busy <= BUSY_MAX else Verdict.FAIL,
            meaning=f"other work takes CPU from what is measured; at most {BUSY_MAX:.0%} of it over"
            f" {IDLE_S:g} s, waited for {patience_s:g} s",
        ),
        Finding(
            id="cpu-accounting",
            title="CPU accounting",
            evidence=f"{used:.2f} s seen of {burnt:.2f} s burnt",
            verdict=Verdict.OK if error <= ACCOUNTING_MAX else Verdict.FAIL,
            meaning=f"/proc/stat must find a known burner within {ACCOUNTING_MAX:.0%}",
        ),
    ]


def check_rounds(rounds: int) -> Finding:
    """An interval needs samples to be one."""
    return Finding(
        id="rounds",
        title="rounds",
        evidence=str(rounds),
        verdict=Verdict.OK if rounds >= ROUNDS_MIN else Verdict.FAIL,
        meaning=f"below {ROUNDS_MIN} an interval is luck, and no verdict is given",
    )


def check_frames(sizes: Counter[int], missed: int, where: str) -> Finding:
    """Wire lab: no frame larger than a wire carries, among those the tap did not miss."""
    largest = max(sizes, default=0)
    count = sum(sizes.values())
    mean = sum(size * n for size, n in sizes.items()) / count if count else 0
    return Finding(
        id="frames",
        title=f"frames {where}",
        evidence=f"largest {largest}, mean {mean:.0f} of {count}, {missed} not seen",
        verdict=Verdict.OK if count and largest <= FRAME_MAX else Verdict.FAIL,
        meaning=f"histogram of what left eth0 (AF_PACKET): at most {FRAME_MAX} bytes on a wire",
    )


def softirq_drops() -> int:
    """Packets the machine's softirqs had no room for: column 2 of softnet_stat, hex."""
    lines = Path("/proc/net/softnet_stat").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1], 16) for line in lines)


def check_losses(lab: str, before: dict[str, int], after: dict[str, int]) -> list[Finding]:
    """No fragments may have been made: half a path's packets would be twice as many."""
    fragments = after["fragments"] - before["fragments"]
    drops = after["softirq drops"] - before["softirq drops"]
    return [
        Finding(
            id="ip-fragments",
            title=f"IP fragments {lab}",
            evidence=str(fragments),
            verdict=Verdict.FAIL if fragments else Verdict.OK,
            meaning="a path that fragments does other work than the rest",
        ),
        Finding(
            id="softirq-drops",
            title=f"softirq drops {lab}",
            evidence=str(drops),
            verdict=Verdict.NOTE if drops else Verdict.OK,
            meaning="netdev_max_backlog was full: the flood rows may show it as loss",
        ),
    ]


def checks_after(results: Results) -> list[Finding]:
    """Steal, noise, corruption, retransmits, over all samples."""
    values = [sample.values for sample in results.samples]
    window = sum(v["window_s"] for v in values) * (os.cpu_count() or 1)
    steal = sum(v["steal_s"] for v in values) / window if window else 0.0
    corrupt = sum(v.get("corrupt", 0) + v.get("duplicates", 0) for v in values)
    missing = [
        f"{lab} {row}"
        for lab in results.labs() or ["any lab"]
        for row in (BASELINE, NULL)
        if row not in results.row_names(lab)
    ]
    found = [
        Finding(
            id="baseline",
            title="baseline",
            evidence=f"missing: {', '.join(missing)}" if missing else "measured, twice",
            verdict=Verdict.FAIL if missing else Verdict.OK,
            meaning="without VXLAN and its double nothing can be compared",
        ),
        Finding(
            id="steal",
            title="steal",
            evidence=f"{steal:.2%}",
            verdict=Verdict.OK if steal <= STEAL_MAX else Verdict.FAIL,
            meaning=f"CPU the hypervisor gave to others while we measured; at most {STEAL_MAX:.0%}",
        ),
        Finding(
            id="payloads",
            title="payloads",
            evidence="all as sent" if not corrupt else f"{corrupt:.0f} corrupt or duplicated",
            verdict=Verdict.OK if not corrupt else Verdict.FAIL,
            meaning="every byte is compared where it arrives",
        ),
        _check_retransmits(values),
        _check_foreign(results),
    ]
    found += [
        check
        for lab in results.labs()
        for workload in results.workloads(lab)
        if (check := _check_noise(results, lab, workload))
    ]
    return found


def _check_retransmits(values: list[dict[str, float]]) -> Finding:
    tcp = [v for v in values if "retransmits" in v and v.get("packets") and "loss" not in v]
    packets = sum(v["packets"] for v in tcp)
    share = sum(v["retransmits"] for v in tcp) / packets if packets else 0.0
    return Finding(
        id="tcp-retransmits",
        title="TCP retransmits",
        evidence=f"{share:.3%} of segments",
        verdict=Verdict.OK if share <= RETRANSMIT_MAX else Verdict.NOTE,
        meaning="a path that loses packets shows here; it costs that path, nobody else",
    )


def _check_foreign(results: Results) -> Finding:
    """Red if others took more than their share of a cell's time, whatever they were.

    Of all its rounds together: /proc counts in ticks of 10 ms, of which one round has few.
    """
    cells: dict[tuple[str, str, str], list[Mapping[str, float]]] = {}
    for sample in results.samples:
        cells.setdefault((sample.lab, sample.workload, sample.row), []).append(sample.values)
    worst = {cell: foreign_share(values) for cell, values in cells.items()}
    red = sorted((cell for cell in worst if worst[cell] > FOREIGN_MAX), key=lambda c: -worst[c])
    most = max(worst.values(), default=0.0)
    evidence = f"at most {most:.1%} of the CPUs"
    if red:
        named = ", ".join(f"{' '.join(cell)} {worst[cell]:.0%}" for cell in red[:FOREIGN_NAMED])
        more = f" and {len(red) - FOREIGN_NAMED} more" if len(red) > FOREIGN_NAMED else ""
        evidence = f"{len(red)} of {len(worst)} cells: {named}{more}"
    return Finding(
        id="foreign-cpu",
        title="foreign CPU",
        evidence=evidence,
        verdict=Verdict.FAIL if red else Verdict.OK,
        meaning="what processes that are not the bench's took while it measured: charged to no row,"
        f" but what they took nobody else had; at most {FOREIGN_MAX:.0%}",
    )


def foreign_share(rounds: Sequence[Mapping[str, float]]) -> float:
    """Of all CPUs in the windows of these samples; 0 where that was not looked at."""
    window = sum(values["window_s"] for values in rounds) * (os.cpu_count() or 1)
    return sum(values.get("foreign_s", 0.0) for values in rounds) / window if window else 0.0


def _check_noise(results: Results, lab: str, workload: str) -> Finding | None:
    noise = results.noise(lab, workload, workload_named(workload).headline)
    if noise is None:
        return None
    verdict, meaning = Verdict.OK, "VXLAN over itself: differences below this are none"
    if noise > stats.NOISE_LIMIT:
        verdict = Verdict.NOTE
        meaning = f"above {stats.NOISE_LIMIT:.0%} nothing is compared there"
    elif noise > NOISE_MAX:
        verdict = Verdict.NOTE
    return Finding(
        id="null-test",
        title=f"null test {lab} {workload}",
        evidence=f"±{noise:.1%}",
        verdict=verdict,
        meaning=meaning,
    )


def _mitigations() -> str:
    directory = Path("/sys/devices/system/cpu/vulnerabilities")
    if not directory.is_dir():
        return "n/a"
    states = [_read(str(path)) for path in sorted(directory.iterdir())]
    return f"{sum('Mitigation' in state for state in states)} of {len(states)} active"


def _commit() -> str:
    source = Path(tundp.__file__).parent.parent
    if not (source / ".git").exists():
        return "n/a (installed)"
    try:
        answer = subprocess.run(
            ["git", "-C", str(source), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        return f"n/a ({error})"
    return answer.stdout.strip()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return ""
