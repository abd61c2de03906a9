"""Ways to end a daemon of a lab and have another one in its place, for traffic to be lost by.

Each returns when the new one has its lease, its device and its peers. They know of processes only
what an operator does: signals, commands, and the pid in the status. What they start has a session
of its own, as daemons have; it ends with the lab all the same, unless that is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tundp.errors import LabError, PlatformError
from tundp.lab.lab import STOP_S, processes_in
from tundp.lab.overlay import READY_S, LabNode, OverlayLab, run_command
from tundp.observe.status import DaemonState

_TUNDP: Final = (sys.executable, "-m", "tundp")
_POLL_S: Final = 0.05
_HELP_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Restart:
    """One way."""

    name: str
    label: str
    """`kill -9, start again`."""
    is_held: bool
    """Whether the daemon runs below `tundp hold`."""
    needs: tuple[str, ...]
    """The words of a command whose help must exist, and what must stand in it; empty for none."""
    run: Callable[[OverlayLab, LabNode], Awaitable[None]]


async def start_daemon(overlay: OverlayLab, node: LabNode, *, is_held: bool = False) -> None:
    """Start a node's daemon, by itself or below `tundp hold`; it is not ready yet."""
    before = (*_TUNDP, "hold", "--") if is_held else ()
    with node.log_path.open("ab") as log:
        node.daemon = await node.host.popen(
            [*before, *run_command(node, overlay.store_flags)], log=log, is_kept=True
        )


async def wait_for_another(node: LabNode, pid: int, *, peers: int = 1) -> int:
    """Until a daemon other than `pid` runs on the node and sees so many peers; its pid.

    LabError with the end of the log if none does within READY_S.
    """
    deadline = time.monotonic() + READY_S
    while True:
        with contextlib.suppress(PlatformError):
            status = await node.status()
            is_other = status.pid != pid and status.state is DaemonState.RUNNING
            if is_other and await node.sees_peers(peers):
                return status.pid
        if time.monotonic() > deadline:
            raise LabError(
                f"{node.host.namespace}: no other daemon is ready after {READY_S:g} s:"
                f"\n{node.log_tail()}"
            )
        await asyncio.sleep(_POLL_S)


async def stop_and_start(overlay: OverlayLab, node: LabNode) -> None:
    """SIGTERM, wait for the end, start again."""
    await _end_and_start(overlay, node, signal.SIGTERM)


async def kill_and_start(overlay: OverlayLab, node: LabNode) -> None:
    """SIGKILL, start again."""
    await _end_and_start(overlay, node, signal.SIGKILL)


async def replace(overlay: OverlayLab, node: LabNode) -> None:
    """`tundp run --replace`: a second daemon takes over from the first, which ends by itself."""
    pid = (await node.status()).pid
    with node.log_path.open("ab") as log:
        node.daemon = await node.host.popen(
            run_command(node, overlay.store_flags, "--replace"), log=log, is_kept=True
        )
    await wait_for_another(node, pid)
    await _must_end(node, pid)


async def upgrade(_: OverlayLab, node: LabNode) -> None:
    """`tundp upgrade`."""
    pid = (await node.status()).pid
    done = await node.host.run(*_TUNDP, "upgrade", f"--admin-socket={node.admin_socket}")
    if done.returncode:
        raise LabError(f"tundp upgrade: {(done.stderr or done.stdout).strip()}")
    await wait_for_another(node, pid)
    await _must_end(node, pid)


async def restart_held(_: OverlayLab, node: LabNode) -> None:
    """SIGHUP to `tundp hold`."""
    pid = (await node.status()).pid
    node.daemon.send_signal(signal.SIGHUP)
    await wait_for_another(node, pid)


async def kill_held(_: OverlayLab, node: LabNode) -> None:
    """SIGKILL to the daemon below `tundp hold`, which starts it again."""
    pid = (await node.status()).pid
    os.kill(pid, signal.SIGKILL)
    await wait_for_another(node, pid)


async def do_nothing(_: OverlayLab, __: LabNode) -> None:
    """For comparison."""


STOP: Final = Restart("stop", "SIGTERM, start again", False, (), stop_and_start)
REPLACE: Final = Restart("replace", "tundp run --replace", False, ("run", "--replace"), replace)
RESTARTS: Final = (
    Restart("none", "nothing is done (null test)", False, (), do_nothing),
    STOP,
    Restart("kill", "kill -9, start again", False, (), kill_and_start),
    REPLACE,
    Restart("upgrade", "tundp upgrade", False, ("upgrade", "upgrade"), upgrade),
    Restart("hold-restart", "tundp hold: SIGHUP", True, ("hold", "hold"), restart_held),
    Restart("hold-kill", "tundp hold: kill -9 below it", True, ("hold", "hold"), kill_held),
)
NULL: Final = RESTARTS[0].name


def why_not(restart: Restart) -> str | None:
    """Why this tundp cannot do it; None if it can. Asked of its help, since commands are ours."""
    if not restart.needs:
        return None
    command, word = restart.needs
    done = subprocess.run(
        [*_TUNDP, command, "--help"], capture_output=True, text=True, timeout=_HELP_S, check=False
    )
    if done.returncode or word not in done.stdout:
        return f"this tundp has no {restart.label.split(':')[0]}"
    return None


async def end_daemons(nodes: Sequence[LabNode]) -> None:
    """End every process on the nodes that was started for them, also those others started."""
    for node in nodes:
        with contextlib.suppress(LabError):
            node.daemon.terminate()  # a holder first, or it starts what it holds again
    for node in nodes:
        own = str(node.admin_socket).encode()
        for pid in processes_in(node.host.namespace):
            if _is_of(pid, own):
                await _end(pid, signal.SIGTERM)


def _is_of(pid: int, word: bytes) -> bool:
    """Whether the word is in its command line, and it is still there."""
    try:
        return word in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


async def _end_and_start(overlay: OverlayLab, node: LabNode, signum: int) -> None:
    pid = (await node.status()).pid
    await _end(pid, signum)
    await start_daemon(overlay, node)
    await wait_for_another(node, pid)


async def _must_end(node: LabNode, pid: int) -> None:
    """A predecessor ends by itself; two daemons on one node are a failure."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not await asyncio.to_thread(_is_over, fd, STOP_S):
            raise LabError(f"{node.host.namespace}: the predecessor {pid} still runs")
    finally:
        os.close(fd)


async def _end(pid: int, signum: int) -> None:
    """Send a signal and wait for the end; SIGKILL if it takes too long."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        for each in (signum, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, each)
            if await asyncio.to_thread(_is_over, fd, STOP_S):
                return
    finally:
        os.close(fd)


def _is_over(pidfd: int, timeout_s: float) -> bool:
    """Whether the process has ended, a zombie too (pidfd_open(2): readable then)."""
    return bool(select.select([pidfd], [], [], timeout_s)[0])
