"""`python -m bench.hostile`, or `make hostile`: HOSTILE_SECONDS (3600), HOSTILE_SEED (random).

HOSTILE_ONLY="store clients" narrows a finding down: port, underlay, tun, store, clients, files,
kernel. HOSTILE_SLACK=6 multiplies the limits of a status (2 s) and of healing (10 s), for a busy
machine.
The seed is printed first. It fixes what each attacker does and in which order, not when: other
tasks and the machine decide that. Exit code 1 if a daemon did not hold.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys

from bench.hostile.run import run
from tundp.lab.lab import interruptible


async def main() -> int:
    """Run, print, judge."""
    seconds = float(os.environ.get("HOSTILE_SECONDS") or 3600)
    seed = int(os.environ.get("HOSTILE_SEED") or random.SystemRandom().randrange(1 << 32))
    only = (os.environ.get("HOSTILE_ONLY") or "").split()
    slack = float(os.environ.get("HOSTILE_SLACK") or 1)
    print(f"hostile: {seconds:.0f} s, HOSTILE_SEED={seed}", flush=True)
    async with interruptible():
        report = await run(seconds, seed, only=only, slack=slack)
    print("\n".join(report.lines))
    for kind, detail in report.faults.items():
        print(f"FAULT {kind}: {detail}")
    print(f"hostile: seed {seed}: {len(report.faults) or 'no'} faults")
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
