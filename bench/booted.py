"""What packets lose below systemd: `python -m bench.booted [ROUNDS] [RATE] [EVENT ...]`, root.

A lab of two nodes with pods behind bridges and a decoy for their default gateway. Node 1's network
is that of a container with a systemd of its own, in which the unit runs as it is in systemd/; node
2's daemon is a process of the lab. Numbered datagrams go both ways at RATE each (10,000), beside a
TCP stream of 1 MB/s, and the unit is restarted, killed, reloaded, stopped until its watchdog ends
it, or left alone (null test): ROUNDS times (20) each, in turn, in both labs. The watchdog's event
is at 1,000 a second, the time of its gap being that of WatchdogSec= (2 s here).
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest

from tests.systemd.machine import PYTHON, Machine
from tundp.bench import validity
from tundp.bench.plan import LABS
from tundp.bench.restart import NETWORK, OVERLAY, PATIENCE_S, QUIET_S, TCP_PACE
from tundp.bench.restart_results import Row, Run, checks_of, spread
from tundp.errors import TundpError
from tundp.files import write_atomically
from tundp.finding import failures
from tundp.lab.decoy import Decoy, add_decoy
from tundp.lab.lab import NETNS_DIR, Lab, interruptible
from tundp.lab.offload import make_wire_like
from tundp.lab.overlay import LabNode, OverlayLab
from tundp.lab.restarts import NULL, end_daemons, start_daemon, wait_for_another
from tundp.lab.streams import Streams

UNIT: Final = Path(__file__).parents[1] / "systemd" / "tundp.service"
PREFIX: Final = "tundpbooted"
THERE: Final = "/lab"
NULL_S: Final = 2.0
WATCHED: Final = "watchdog"
WATCHED_RATE: Final = 1000
EVENTS: Final = {
    NULL: (),
    "restart": ("systemctl", "restart", "tundp"),
    "kill": ("systemctl", "kill", "--kill-whom=main", "--signal=KILL", "tundp"),
    "reload": ("systemctl", "reload", "tundp"),
    WATCHED: ("systemctl", "kill", "--kill-whom=main", "--signal=STOP", "tundp"),
}
DROP_IN: Final = f"""\
[Service]
Environment=PATH={sys.prefix}/bin:/usr/local/bin:/usr/bin:/usr/sbin:/sbin
ProtectHome=tmpfs
BindReadOnlyPaths={" ".join(PYTHON)}
ReadWritePaths={THERE}
WatchdogSec=2
"""


def machine_of(node: LabNode, directory: Path, store_flags: Sequence[str]) -> Machine:
    """A container in the node's network whose unit has the files that the lab's nodes have."""
    machine = Machine(namespace=NETNS_DIR / node.host.namespace, shared={directory: THERE})
    machine.write("etc/systemd/system/tundp.service", UNIT.read_text())
    machine.write("etc/systemd/system/tundp.service.d/lab.conf", DROP_IN)
    files = {
        "FLANNELD_SUBNET_FILE": node.subnet_file,
        "TUNDP_ADMIN_SOCKET": node.admin_socket,
        "TUNDP_STATE_DIR": node.state_dir,
    }
    lines = [f"{name}={THERE}/{path.name}" for name, path in files.items()]
    (store,) = (flag.removeprefix("--store=file:") for flag in store_flags)
    lines += ["FLANNELD_IFACE=eth0", f"TUNDP_STORE=file:{THERE}/{Path(store).name}"]
    machine.write("etc/default/tundp", "\n".join(lines) + "\n")
    return machine


@asynccontextmanager
async def overlay_of(lab_kind: str) -> AsyncIterator[tuple[OverlayLab, Decoy, Machine]]:
    """Both nodes with their daemons, ready."""
    directory = Path(tempfile.mkdtemp(prefix=f"{PREFIX}-"))
    machine: Machine | None = None
    try:
        async with Lab(PREFIX) as lab:
            overlay = OverlayLab(lab, directory)
            await overlay.build()
            nodes = list(overlay.nodes.values())
            overlay.write_lease_file(NETWORK)
            if lab_kind == "wire":
                for node in nodes:
                    await make_wire_like(node.host, "eth0")
            machine = machine_of(nodes[0], directory, overlay.store_flags)
            try:
                async with await add_decoy(lab, nodes, OVERLAY) as decoy:
                    await asyncio.to_thread(machine.boot)
                    assert machine.nspawn is not None
                    nodes[0].daemon = machine.nspawn
                    await asyncio.to_thread(machine.run, "systemctl", "start", "tundp")
                    await start_daemon(overlay, nodes[1])
                    await overlay.wait_ready()
                    for node in nodes:
                        await overlay.add_pod(node)
                    yield overlay, decoy, machine
            finally:
                await asyncio.to_thread(machine.stop)
                await end_daemons(nodes[1:])
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def measure(
    lab_kind: str, overlay: OverlayLab, decoy: Decoy, machine: Machine, plan: tuple[int, str, int]
) -> Run:
    """One event, once. plan: round, event, datagrams a second."""
    number, event, rate = plan
    node = overlay.nodes[1]
    streams = Streams(node, overlay.nodes[2], rate=rate, tcp=True, tcp_pace=TCP_PACE)
    error, took_s, result = "", 0.0, None
    decoy.clear()
    try:
        async with streams:
            await streams.flow()
            await asyncio.sleep(QUIET_S)
            began = time.monotonic()
            if event == NULL:
                await asyncio.sleep(NULL_S)
            else:
                pid = (await node.status()).pid
                await asyncio.to_thread(machine.run, *EVENTS[event])
                await wait_for_another(node, pid)
            took_s = time.monotonic() - began
            await streams.flow()
            await asyncio.sleep(QUIET_S)
        result = streams.result
    except (TundpError, OSError, AssertionError, pytest.fail.Exception) as failure:
        error = str(failure) or type(failure).__name__
    return Run(
        lab=lab_kind,
        event=event,
        load=str(rate),
        round=number,
        took_s=took_s,
        leaked=decoy.leaked,
        leaks=decoy.seen,
        error=error,
        result=result,
    )


def shown(row: Row) -> str:
    """A row in words."""

    def text(values: list[int] | list[float], form: str) -> str:
        found = spread(values)
        return "-" if found is None else f"{form.format(found['median'])} ({found['max']:.0f})"

    silences = text([each * 1e3 for each in row.silences_s], "{:.0f}")
    sent = sum(each.sent for each in row.sound)
    return (
        f"{row.lab:8} {row.event:9} {int(row.load):6,}/s {row.verdict:8} {len(row.sound)} of"
        f" {len(row.runs)} runs, lost {text(row.lost, '{:.0f}')} of {sent:,}, leaked {row.leaked},"
        f" silence {silences} ms, twice {sum(each.duplicates for each in row.sound)}, out of order"
        f" {sum(each.reordered for each in row.sound)}, resets {row.resets}"
    )


async def run_all(rounds: int, rate: int, events: Sequence[str]) -> int:
    """Every event in both labs, in turn; the exit code, 1 if the figures are not comparable."""
    runs: list[Run] = []
    checks = await validity.checks_before(PATIENCE_S)
    for lab_kind in LABS:
        async with overlay_of(lab_kind) as (overlay, decoy, machine):
            for number in range(rounds):
                for event in events:
                    plan = (number, event, WATCHED_RATE if event == WATCHED else rate)
                    runs.append(await measure(lab_kind, overlay, decoy, machine, plan))
                    if runs[-1].error:
                        print(f"{lab_kind} {event} {number}: {runs[-1].error}", file=sys.stderr)
                    save(runs)
        for row in rows_of([run for run in runs if run.lab == lab_kind]):
            print(shown(row), flush=True)
    checks += checks_of(runs)
    for check in checks:
        print(f"{check.verdict.name.lower():5} {check.title or check.id}: {check.evidence}")
    return 1 if failures(checks) else 0


def save(runs: Sequence[Run]) -> None:
    """booted.json, after each run."""
    text = json.dumps([row.as_dict() for row in rows_of(runs)], indent=1)
    write_atomically(Path("booted.json"), f"{text}\n")


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """Runs of one event in one lab, together."""
    kinds = list(dict.fromkeys((run.lab, run.event, run.load) for run in runs))
    return [
        Row(
            lab=lab,
            event=event,
            label=event,
            load=load,
            why_not=None,
            runs=tuple(run for run in runs if (run.lab, run.event, run.load) == (lab, event, load)),
        )
        for lab, event, load in kinds
    ]


async def main() -> int:
    """Read the arguments, run; the exit code."""
    rounds, rate, *events = (*sys.argv[1:], *("20", "10000")[len(sys.argv) - 1 :])
    events = events or list(EVENTS)
    if unknown := [each for each in events if each not in EVENTS]:
        sys.exit(f"no such event: {', '.join(unknown)}; there are {', '.join(EVENTS)}")
    async with interruptible():
        return await run_all(int(rounds), int(rate), [NULL, *(e for e in events if e != NULL)])


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
