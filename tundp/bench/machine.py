"""What the whole machine spends: CPU by kind, context switches; and whether that is trusted.

/proc/stat counts ticks of all CPUs, so nothing hides: not softirq work, not the kernel's
threads, not the generators themselves, which cost the same in every row.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from dataclasses import dataclass
from pathlib import Path

from tundp.bench.foreign import Foreign, foreign, processes
from tundp.lab.generators import burn

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuTimes:
    """CPU seconds of the whole machine since boot."""

    user: float
    system: float
    softirq: float
    steal: float
    context_switches: int
    at: float
    """Monotonic seconds when this was read."""

    @property
    def busy(self) -> float:
        """All but idle, waiting and stolen time."""
        return self.user + self.system + self.softirq

    def since(self, before: CpuTimes) -> CpuTimes:
        """What was spent between `before` and this."""
        return CpuTimes(
            user=self.user - before.user,
            system=self.system - before.system,
            softirq=self.softirq - before.softirq,
            steal=self.steal - before.steal,
            context_switches=self.context_switches - before.context_switches,
            at=self.at - before.at,
        )

    def without(self, user: float, system: float) -> CpuTimes:
        """The same but for seconds that others took, as far as they are in it."""
        return dataclasses.replace(
            self, user=max(0.0, self.user - user), system=max(0.0, self.system - system)
        )


def read_cpu() -> CpuTimes:
    """The counters now."""
    text = Path("/proc/stat").read_text(encoding="ascii")
    at = time.monotonic()
    lines = dict(line.split(" ", 1) for line in text.splitlines())
    user, nice, system, _idle, _iowait, irq, softirq, steal = (
        int(field) / _TICKS_PER_S for field in lines["cpu"].split()[:8]
    )
    return CpuTimes(
        user=user + nice,
        system=system,
        softirq=irq + softirq,
        steal=steal,
        context_switches=int(lines["ctxt"]),
        at=at,
    )


async def check_accounting(seconds: float = 0.5) -> tuple[float, float]:
    """Burn a known amount of CPU: (what was burnt, what /proc/stat says was used for it).

    What the machine does on its own in as long a time is measured first and taken off.
    """
    idle_before = read_cpu()
    await asyncio.sleep(seconds)
    background = read_cpu().since(idle_before)
    before = read_cpu()
    burnt = await asyncio.to_thread(burn, seconds)
    used = read_cpu().since(before)
    rate = background.busy / background.at
    return burnt, used.busy - rate * used.at


async def busy_share(seconds: float) -> tuple[float, Foreign]:
    """The share of all CPUs that is used while we wait so long, and who used it."""
    before, others = read_cpu(), processes()
    await asyncio.sleep(seconds)
    used = read_cpu().since(before)
    return used.busy / used.at / (os.cpu_count() or 1), foreign(others, processes())
