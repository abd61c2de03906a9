"""CPU that others took while something was measured: processes that are none of the bench's.

/proc/stat has the whole machine's, which is what a path costs as long as nobody else works. The
bench's own are this process and what it started, by whoever they are children of; kernel threads
work for whom they work and are nobody's. What others took is taken off what the path is charged.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_KTHREADD: Final = 2
_PROC: Final = Path("/proc")
NAMED: Final = 3


@dataclass(frozen=True, slots=True)
class Process:
    """One process; times in seconds, with those of children it has waited for."""

    pid: int
    parent: int
    name: str
    user: float
    system: float
    started: int
    """Clock ticks since boot: with the pid, who it is."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """What others took between two looks, in seconds."""

    user: float = 0.0
    system: float = 0.0
    names: tuple[str, ...] = ()
    """Who took the most, at most NAMED."""

    @property
    def busy(self) -> float:
        """Both."""
        return self.user + self.system


def processes(proc: Path = _PROC) -> dict[int, Process]:
    """Every process, by pid; those that end meanwhile are left out."""
    return {each.pid: each for each in _read_all(proc)}


def _read_all(proc: Path) -> Iterator[Process]:
    for name in os.listdir(proc):
        if not name.isdigit():
            continue
        try:
            text = (proc / name / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        yield parse(text)


def parse(text: str) -> Process:
    """/proc/PID/stat (proc_pid_stat(5)): the name may hold blanks and brackets."""
    head, _, rest = text.rpartition(")")
    pid, _, name = head.partition(" (")
    fields = rest.split()
    user, system, children_user, children_system = (int(each) for each in fields[11:15])
    return Process(
        pid=int(pid),
        parent=int(fields[1]),
        name=name,
        user=(user + children_user) / _TICKS_PER_S,
        system=(system + children_system) / _TICKS_PER_S,
        started=int(fields[19]),
    )


def foreign(
    before: Mapping[int, Process], after: Mapping[int, Process], own: int | None = None
) -> Foreign:
    """What processes other than `own` (this one) and its descendants took between two looks.

    A process that began in between is charged whole; what one that ended in between took is its
    parent's, if that waited for it, else nobody's. In a container with process numbers of its own
    only what is in it is seen.
    """
    ours = _descendants(after, os.getpid() if own is None else own)
    then = {pid: each for pid, each in before.items() if _lives_on(each, after)}
    inherited = _inherited(before, then)
    user = system = 0.0
    shares: dict[str, float] = {}
    for pid, now in after.items():
        if pid in ours or is_kernel(now, after):
            continue
        had_user, had_system = inherited.get(pid, (0.0, 0.0))
        if pid in then:
            had_user, had_system = had_user + then[pid].user, had_system + then[pid].system
        took_user, took_system = max(0.0, now.user - had_user), max(0.0, now.system - had_system)
        if took_user + took_system > 0:
            user, system = user + took_user, system + took_system
            shares[now.name] = shares.get(now.name, 0.0) + took_user + took_system
    names = sorted(shares, key=lambda name: -shares[name])[:NAMED]
    return Foreign(user, system, tuple(names))


def cpu_time(pid: int) -> float:
    """Seconds a process has taken; 0 when it is gone."""
    try:
        found = parse((_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return 0.0
    return found.user + found.system


def is_kernel(process: Process, all_: Mapping[int, Process]) -> bool:
    """Whether it is a thread of the kernel: kthreadd or its child."""
    root = all_.get(_KTHREADD)
    is_there = root is not None and root.parent == 0 and root.name == "kthreadd"
    return is_there and _KTHREADD in (process.pid, process.parent)


def _lives_on(process: Process, after: Mapping[int, Process]) -> bool:
    return process.pid in after and after[process.pid].started == process.started


def _inherited(
    before: Mapping[int, Process], left: Mapping[int, Process]
) -> dict[int, tuple[float, float]]:
    """What processes that ended had used before, by the ancestor whose times have it now.

    Who waits for a child gets all that it ever used, not only what it used in between.
    """
    found: dict[int, tuple[float, float]] = {}
    for pid in before.keys() - left.keys():
        heir = before[pid].parent
        while heir not in left and heir in before:
            heir = before[heir].parent
        user, system = found.get(heir, (0.0, 0.0))
        found[heir] = (user + before[pid].user, system + before[pid].system)
    return found


def _descendants(all_: Mapping[int, Process], root: int) -> set[int]:
    children: dict[int, list[int]] = {}
    for each in all_.values():
        children.setdefault(each.parent, []).append(each.pid)
    found, left = set[int](), [root]
    while left:
        pid = left.pop()
        if pid not in found:
            found.add(pid)
            left += children.get(pid, ())
    return found
