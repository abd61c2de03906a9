"""`tundp bench restart`: what packets lose while a daemon is ended and another takes its place.

    for each lab            virtual, wire: as the bench's
      for each way          an overlay of two nodes with pods, its daemons plain or below tundp hold
        for each round      every event in turn, nothing among them, under every load

Node 1's daemon is restarted, traffic goes both ways between the pods, a decoy is the default
gateway of both nodes. A run whose sender did not hold its rate, or a null run that loses, makes the
figures worthless, and says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

from tundp.bench import validity
from tundp.bench.restart_results import FULL_TCP, RestartResults, RestartSettings, Run
from tundp.bench.run import PREFIX, TEMPORARY, Progress, now, only_one
from tundp.errors import LabError, TundpError
from tundp.lab import generators
from tundp.lab.decoy import Decoy, add_decoy
from tundp.lab.etcd import find_etcd
from tundp.lab.lab import Lab, interruptible, leftovers
from tundp.lab.offload import make_wire_like
from tundp.lab.overlay import OverlayLab
from tundp.lab.restarts import NULL, Restart, end_daemons, start_daemon, why_not
from tundp.lab.streams import Streams

OVERLAY: Final = "10.5.0.0/16"
NETWORK: Final = {"Network": OVERLAY, "Backend": {"Type": "udp", "Port": 8285}}
HOSTS: Final = ("switch", "node1", "node2", "pod1", "pod2", "decoy")
TCP_PACE: Final = 1_000_000
"""Bytes a second of the stream beside datagrams: enough to see a reset or a stall."""
QUIET_S: Final = 0.3
"""Of traffic before and after the event."""
NULL_S: Final = 2.0
PATIENCE_S: Final = 5.0
"""What is waited for an idle machine."""
_FAILURES: Final = (TundpError, OSError, TimeoutError, subprocess.SubprocessError)


async def run_restarts(
    settings: RestartSettings, progress: Progress, keep: Callable[[RestartResults], None]
) -> RestartResults:
    """Run it. `keep` is called with all there is after each round, and at any end.

    SIGINT and SIGTERM cancel it. LabError before anything is built if namespaces of an earlier
    bench are there.
    """
    generators.require()
    async with interruptible():
        with only_one():
            return await _run_alone(settings, progress, keep)


async def _run_alone(
    settings: RestartSettings, progress: Progress, keep: Callable[[RestartResults], None]
) -> RestartResults:
    left = leftovers(PREFIX, HOSTS)
    if left:
        raise LabError(
            f"namespaces of another bench are there ({', '.join(left[:3])}, ...): let it end,"
            " or remove them with tundp bench --clean"
        )
    reasons = {each.name: await asyncio.to_thread(why_not, each) for each in settings.restarts}
    results = RestartResults(
        settings=settings,
        environment=validity.environment(),
        started=now(),
        why_not={name: reason for name, reason in reasons.items() if reason is not None},
    )
    plans = [_plan(results, is_held=is_held) for is_held in (False, True)]
    progress.start(sum(map(len, plans)) * len(settings.labs))
    for name, reason in results.why_not.items():
        progress.say(f"no {name}: {reason}")
    try:
        results.checks += await validity.checks_before(PATIENCE_S)
        results.checks.append(validity.check_rounds(settings.runs))
        for lab_kind in settings.labs:
            for is_held in (False, True):
                await _run_group(lab_kind, results, progress, keep, is_held=is_held)
        results.is_partial = False
    finally:
        results.finished = now()
        keep(results)

    return results


def _plan(results: RestartResults, *, is_held: bool) -> list[tuple[int, str, Restart]]:
    """Round, load and event of each run in one overlay: null tests in every one."""
    settings = results.settings
    known = [each for each in settings.restarts if each.name not in results.why_not]
    events = [each for each in known if each.name != NULL]
    # If there is nothing but null tests to run, they are run without a holder.
    if is_held not in ({each.is_held for each in events} or {False}):
        return []
    return [
        (number, load, restart)
        for number in range(settings.runs)
        for load in settings.loads
        for restart in known
        if restart.is_held is is_held or restart.name == NULL
    ]


async def _run_group(
    lab_kind: str,
    results: RestartResults,
    progress: Progress,
    keep: Callable[[RestartResults], None],
    *,
    is_held: bool,
) -> None:
    """All runs in one overlay; after a failed one the next begins with a new overlay."""
    left = _plan(results, is_held=is_held)
    while left:
        async with _overlay(lab_kind, is_held=is_held) as (overlay, decoy):
            while left:
                number, load, restart = left.pop(0)
                progress.step(f"{lab_kind} · {load} · {restart.name}")
                run = await _measure(lab_kind, overlay, decoy, restart, load, number)
                results.runs.append(run)
                keep(results)
                if run.error:
                    progress.say(f"{lab_kind} {load} {restart.name} failed: {run.error}")
                    break


async def _measure(
    lab_kind: str, overlay: OverlayLab, decoy: Decoy, restart: Restart, load: str, number: int
) -> Run:
    is_full = load == FULL_TCP
    streams = Streams(
        *(overlay.nodes[1], overlay.nodes[2]),
        rate=0 if is_full else int(load),
        tcp=True,
        tcp_pace=None if is_full else TCP_PACE,
    )
    error, took_s, result = "", 0.0, None
    decoy.clear()
    try:
        async with streams:
            await streams.flow()
            await asyncio.sleep(QUIET_S)
            streams.mark(restart.label)
            began = time.monotonic()
            if restart.name == NULL:
                await asyncio.sleep(NULL_S)
            else:
                await restart.run(overlay, overlay.nodes[1])
            took_s = time.monotonic() - began
            streams.mark("ready")
            await streams.flow()
            await asyncio.sleep(QUIET_S)
        result = streams.result
    except _FAILURES as failure:
        error = str(failure) or type(failure).__name__
    return Run(
        lab=lab_kind,
        event=restart.name,
        load=load,
        round=number,
        took_s=took_s,
        leaked=decoy.leaked,
        leaks=decoy.seen,
        error=error,
        result=result,
    )


@contextlib.asynccontextmanager
async def _overlay(lab_kind: str, *, is_held: bool) -> AsyncIterator[tuple[OverlayLab, Decoy]]:
    """Two nodes with daemons and pods, and the decoy; leases in an etcd if there is one."""
    directory = Path(tempfile.mkdtemp(prefix=TEMPORARY))
    try:
        async with Lab(PREFIX) as lab:
            overlay = OverlayLab(lab, directory)
            await overlay.build()
            nodes = list(overlay.nodes.values())
            try:
                if find_etcd() is None:
                    overlay.write_lease_file(NETWORK)
                else:
                    await overlay.start_etcd(NETWORK)
                if lab_kind == "wire":
                    for node in nodes:
                        await make_wire_like(node.host, "eth0")
                async with await add_decoy(lab, nodes, OVERLAY) as decoy:
                    for node in nodes:
                        await start_daemon(overlay, node, is_held=is_held)
                    await overlay.wait_ready()
                    for node in nodes:
                        await overlay.add_pod(node)
                    yield overlay, decoy
            finally:
                await end_daemons(nodes)
                if find_etcd() is not None:
                    await overlay.close_etcd()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
