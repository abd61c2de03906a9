"""`tundp upgrade`: starts the installed version as the successor of the daemon that runs.

The successor gets the arguments and the environment of that daemon as they were at its start
(proc_pid_cmdline(5), proc_pid_environ(5)), so that it is the same daemon of another version. A
daemon of a systemd unit is upgraded from inside the unit, by its ExecReload=: a process that was
started by a shell would stay in the shell's cgroup. There the environment is the unit's of now.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from tundp.admin import fetch_document
from tundp.admin_handover import fetch_handover
from tundp.errors import PlatformError, TundpError
from tundp.linux.listeners import listener
from tundp.observe.codec import to_json

POLL_S: Final = 0.1
_ASK_S: Final = 5.0
_FLANNELD: Final = "import sys; from tundp.cli import flanneld; sys.exit(flanneld())"
_NOT_INHERITED: Final = ("WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
"""They are about the process that was given them."""
_OF_THE_MAIN_PROCESS: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "FDSTORE")
_COUNTED: Final = ("packets_in", "packets_out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Upgraded:
    """What became of it."""

    before_pid: int
    before_version: str
    pid: int
    version: str
    gap_ms: float | None
    """For so long nobody carried packets: they waited in the queues. None: it is not known, for
    the daemon before died on the way."""
    took_s: float
    packets_before: Mapping[str, int]
    """Counters of the daemon before, just before, and of this one now: none goes back."""
    packets: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return to_json(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """How the daemon was started."""

    pid: int
    arguments: tuple[str, ...]
    """Of `tundp run`, or of flanneld."""
    is_flanneld: bool
    environment: Mapping[str, str]
    unit: str
    """The systemd service it is in, empty for none."""

    def successor(self) -> list[str]:
        """The command line that takes over from it, by this very installation."""
        program = ["-c", _FLANNELD] if self.is_flanneld else ["-m", "tundp", "run"]
        # -P: not what lies in the daemon's folder, which others may write.
        return [sys.executable, "-P", *program, "--replace", *self.arguments]


def read_process(pid: int) -> Process:
    """The daemon with this pid. PlatformError if it cannot be seen, or is none."""
    try:
        words = [
            os.fsdecode(word) for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        ][:-1]
        environment = dict(
            os.fsdecode(each).split("=", 1)
            for each in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if b"=" in each
        )
        unit = unit_of(Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8"))
    except OSError as error:
        raise PlatformError(
            f"cannot see how process {pid} was started: {error.strerror}; run this as root, on the"
            " daemon's host or in its container",
            error.errno,
        ) from None
    arguments, is_flanneld = daemon_arguments(words)
    return Process(
        pid=pid,
        arguments=tuple(each for each in arguments if each not in ("-replace", "--replace")),
        is_flanneld=is_flanneld,
        environment={k: v for k, v in environment.items() if k not in _NOT_INHERITED},
        unit=unit,
    )


def daemon_arguments(words: Sequence[str]) -> tuple[Sequence[str], bool]:
    """A daemon's own arguments in a command line, and whether it is flanneld's.

    PlatformError if it is no daemon's.
    """
    for number, word in enumerate(words[:8]):
        if word == _FLANNELD or os.path.basename(word) == "flanneld":
            return words[number + 1 :], True
        if word == "run" and number and os.path.basename(words[number - 1]) in _PROGRAMS:
            return words[number + 1 :], False
    raise PlatformError(
        f"the daemon was started by {' '.join(words)[:200]!r}, which is neither `tundp run` nor"
        " flanneld: start its successor with that program's own tundp run --replace"
    )


_PROGRAMS: Final = ("tundp", "__main__.py")


def own_environment(before: Mapping[str, str]) -> dict[str, str]:
    """This process's variables, which systemd has read anew for ExecReload=, for a successor.

    before: the daemon's, of which it keeps what systemd told it alone (systemd.exec(5)).
    """
    kept = {name: before[name] for name in _OF_THE_MAIN_PROCESS if name in before}
    own = {k: v for k, v in os.environ.items() if k not in (*_NOT_INHERITED, "MAINPID")}
    return {**own, **kept}


def unit_of(cgroups: str) -> str:
    """The service in the text of /proc/PID/cgroup (cgroups(7)); empty for none."""
    for line in cgroups.splitlines():
        path = line.split(":", 2)[-1]
        parts = [part for part in path.split("/") if part.endswith(".service")]
        if parts and line.startswith(("0::", "1:name=systemd:")):
            return parts[-1]
    return ""


async def upgrade(path: Path, *, limit_s: float) -> Upgraded:
    """Replace the daemon behind an admin socket, and wait for the end of it.

    PlatformError if it goes on, or if nobody can tell within limit_s.
    """
    began = time.monotonic()
    before = await fetch_handover(path, limit_s=_ASK_S)
    pid, packets = int(before["pid"]), await _packets(path)
    if await asyncio.to_thread(listener, path) != pid:
        raise PlatformError(
            f"the daemon on {path} calls itself process {pid}, and is another one here: it is in a"
            " container; run tundp upgrade in that"
        )
    process = await asyncio.to_thread(read_process, pid)
    own_unit = unit_of(Path("/proc/self/cgroup").read_text(encoding="utf-8"))
    if process.unit and process.unit != own_unit:
        successor = await asyncio.to_thread(_reload, process.unit)
    else:
        if process.unit:
            process = replace(process, environment=own_environment(process.environment))
        successor = await asyncio.to_thread(_start, process)
    report = await _taken_over(path, before, successor, began + limit_s)
    taken = report["taken_over"] or {}
    return Upgraded(
        before_pid=pid,
        before_version=str(before["version"]),
        pid=int(report["pid"]),
        version=str(report["version"]),
        gap_ms=taken.get("gap_ms"),
        took_s=round(time.monotonic() - began, 3),
        packets_before=packets,
        packets=await _packets(path),
    )


async def _packets(path: Path) -> dict[str, int]:
    """Packets of both directions, in and out."""
    found = (await fetch_document(path)).get("counters") or {}
    return {
        f"{direction}_{name}": int(found[direction][name])
        for direction in ("encap", "decap")
        if direction in found
        for name in _COUNTED
    }


async def _taken_over(
    path: Path, before: Mapping[str, Any], successor: subprocess.Popen[bytes], give_up_at: float
) -> dict[str, Any]:
    """The report of the new daemon once it runs."""
    while True:
        report: dict[str, Any] = {}
        with contextlib.suppress(TundpError):
            report = await fetch_handover(path, limit_s=_ASK_S)
        if report.get("is_running") and report["pid"] != before["pid"]:
            return report
        code = successor.poll()
        if code:
            last = report.get("last") or {}
            why = last.get("why") or f"its log says why (exit code {code})"
            raise PlatformError(f"the daemon, process {before['pid']}, goes on: {why}")
        if time.monotonic() > give_up_at:
            raise PlatformError(
                f"no successor of process {before['pid']} runs yet: look at tundp status, and at"
                " the log"
            )
        await asyncio.sleep(POLL_S)


def _start(process: Process) -> subprocess.Popen[bytes]:
    """The successor, on its own: it outlives this program, and logs where the daemon did."""
    with contextlib.ExitStack() as stack:
        log: int | None = None
        try:
            log = os.open(f"/proc/{process.pid}/fd/2", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            stack.callback(os.close, log)
        except OSError:
            # A socket, as to systemd's journal: then this is its ExecReload=, and has one as well.
            log = None if stat.S_ISSOCK(os.fstat(2).st_mode) else subprocess.DEVNULL
        return subprocess.Popen(  # noqa: S603  (this very program)
            process.successor(),
            env=dict(process.environment),
            cwd=f"/proc/{process.pid}/cwd",
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _reload(unit: str) -> subprocess.Popen[bytes]:
    """Have systemd run this in the unit's cgroup."""
    program = shutil.which("systemctl")
    if program is None:
        raise PlatformError(
            f"the daemon is in {unit}, and there is no systemctl here to reload it: run this on"
            " the host"
        )
    argv = [program, "show", "--property=ExecReload", "--value", unit]
    how = subprocess.run(argv, capture_output=True, text=True, check=False)  # noqa: S603
    if "tundp upgrade" not in how.stdout:
        raise PlatformError(
            f"the daemon is in {unit}, whose ExecReload= is no tundp upgrade: add"
            " ExecReload=/usr/bin/env tundp upgrade --admin-socket=..., or restart it"
        )
    return subprocess.Popen([program, "reload", unit], stdin=subprocess.DEVNULL)  # noqa: S603
