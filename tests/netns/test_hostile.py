"""`make hostile` for twenty seconds: hostile packets, store, clients, files and kernel at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = "20"


def test_daemons_hold_while_everything_is_hostile() -> None:
    environment = {key: value for key, value in os.environ.items() if "HOSTILE" not in key}
    done = subprocess.run(
        [sys.executable, "-m", "bench.hostile"],
        env=environment | {"HOSTILE_SECONDS": SECONDS, "HOSTILE_SEED": "20", "HOSTILE_SLACK": "6"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    # All of the attackers were at work, and honest traffic was.
    for who in ("port", "underlay", "tun", "store", "clients", "files", "kernel"):
        assert f"\n{who}: " in done.stdout
    assert "\nhealed after " in done.stdout
