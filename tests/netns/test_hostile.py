"""`make hostile` for twenty seconds: hostile packets, store, clients, files and kernel at once."""

from __future__ import annotations

from bench.hostile.run import run

SECONDS = 20.0


async def test_daemons_hold_while_everything_is_hostile() -> None:
    report = await run(SECONDS, seed=20)
    print("\n".join(report.lines))
    assert report.faults == {}
