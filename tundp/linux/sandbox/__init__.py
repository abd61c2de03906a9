"""Least privilege of a running process: Landlock for files, seccomp for system calls.

landlock.py   what may be read, written and executed, by folder
seccomp.py    system calls and socket families that are refused
programs.py   what a program that may be run needs to be executed

Both hold for child processes, too, and cannot be left again. Descriptors that are open already
are not concerned.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass

from tundp.errors import PlatformError
from tundp.linux.sandbox import landlock, seccomp
from tundp.linux.sandbox.landlock import Rule

__all__ = ["Holds", "Plan", "Rule", "enter", "foresee", "held", "hint"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a process will need."""

    rules: tuple[Rule, ...]
    is_signal_scoped: bool = True
    """No signal to other processes than those it starts."""
    is_abstract_scoped: bool = True
    """No connection to an abstract unix socket of another process."""
    gaps: tuple[str, ...] = ()
    """What the plan leaves open on purpose, and why."""

    @property
    def scoped(self) -> int:
        """LANDLOCK_SCOPE_ bits."""
        return (
            landlock.SCOPE_SIGNAL * self.is_signal_scoped
            | landlock.SCOPE_ABSTRACT_UNIX_SOCKET * self.is_abstract_scoped
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Holds:
    """What the sandbox of this process holds."""

    landlock_abi: int = 0
    """0: files and programs are not restricted."""
    has_seccomp: bool = False
    missing: tuple[str, ...] = ()
    """What does not hold although it was wanted, and why."""
    gaps: tuple[str, ...] = ()
    """See Plan."""

    @property
    def words(self) -> tuple[str, ...]:
        """What is refused, a phrase each."""
        found: list[str] = []
        if self.landlock_abi:
            found.append(f"files and programs (Landlock ABI {self.landlock_abi})")
        if self.has_seccomp:
            found.append("system calls and socket families (seccomp)")
        return tuple(found)

    @property
    def evidence(self) -> str:
        """Everything in one line."""
        parts = [f"holds {', '.join(self.words) or 'nothing'}"]
        parts += [f"does not hold: {each}" for each in self.missing]
        parts += [f"left open: {each}" for each in self.gaps]
        return "; ".join(parts)


_held: list[Holds] = []


def held() -> Holds | None:
    """What `enter` achieved in this process; None before."""
    return _held[-1] if _held else None


def hint(error_code: int | None) -> str:
    """A clause for the error of a refused file or program; empty if no sandbox explains it."""
    current = held()
    if current is None or not current.landlock_abi or error_code != errno.EACCES:
        return ""
    return (
        "; perhaps --sandbox refuses it: a file or folder that was made or replaced since the"
        " start (as by a package upgrade) is another one for it: restart tundp"
    )


def foresee() -> Holds:
    """What `enter` would achieve on this machine, as far as the kernel tells beforehand."""
    missing: list[str] = []
    version = 0
    try:
        version = landlock.abi()
    except PlatformError as error:
        missing.append(f"files and programs: {error}")
    has_seccomp = False
    try:
        seccomp.program(os.uname().machine)
    except ValueError:
        missing.append(f"system calls: there is no filter for {os.uname().machine}")
    else:
        has_seccomp = seccomp.is_there()
        if not has_seccomp:
            missing.append("system calls: the kernel takes no seccomp filter")
    return Holds(
        landlock_abi=version,
        has_seccomp=has_seccomp,
        missing=(*missing, *_lacking(version)),
    )


def _others(leaving: Collection[int]) -> int | None:
    """Threads of this process beside the calling one and `leaving`; None where nobody can tell."""
    try:
        return len(set(os.listdir("/proc/self/task")) - set(map(str, leaving))) - 1
    except OSError:
        return None


def enter(plan: Plan, leaving: Collection[int] = ()) -> Holds:
    """Confine this process and all it starts, for good. What the kernel lacks is in `missing`.

    Call it before threads start: Landlock is the calling thread's and of those it starts. leaving:
    ids of threads that the caller ends right after this.
    """
    missing: list[str] = []
    threads = _others(leaving)
    if threads is None:
        missing.append("files and programs of threads started before: there is no /proc to see any")
    elif threads:
        missing.append(f"files and programs, for {threads} threads that were started before")
    version = 0
    try:
        found = landlock.abi()
        landlock.restrict(plan.rules, version=found, scoped=plan.scoped)
        version = found
    except PlatformError as error:
        missing.append(f"files and programs: {error}")
    machine = os.uname().machine
    has_seccomp = _try(lambda: seccomp.install(machine), missing, "system calls")
    now = Holds(
        landlock_abi=version,
        has_seccomp=has_seccomp,
        missing=(*missing, *_lacking(version)),
        gaps=plan.gaps,
    )
    _held.append(now)
    return now


def _try(step: Callable[[], None], missing: list[str], what: str) -> bool:
    try:
        step()
    except PlatformError as error:
        missing.append(f"{what}: {error}")
        return False
    return True


def _lacking(version: int) -> tuple[str, ...]:
    """What an older Landlock cannot refuse."""
    if not version:
        return ()
    since = (
        (3, "cutting off files that may be read (Landlock ABI 3, Linux 6.2)"),
        (5, "ioctl on devices (Landlock ABI 5, Linux 6.10)"),
        (6, "signals, abstract unix sockets (Landlock ABI 6, Linux 6.12)"),
    )
    return tuple(words for needed, words in since if version < needed)
