"""capabilities(7) of this process: read from /proc, dropped by capset(2)."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from tundp.errors import PlatformError
from tundp.linux import uapi

_log = logging.getLogger(__name__)

CAP_NET_ADMIN: Final = uapi.CAP_NET_ADMIN
CAP_NET_RAW: Final = uapi.CAP_NET_RAW
_NAMES: Final = {CAP_NET_ADMIN: "CAP_NET_ADMIN", CAP_NET_RAW: "CAP_NET_RAW"}

_SET_LEN: Final = 64


class _Header(ctypes.Structure):
    """linux/capability.h: struct __user_cap_header_struct."""

    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Words(ctypes.Structure):
    """linux/capability.h: struct __user_cap_data_struct, one half of each set."""

    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def require(capability: int, purpose: str) -> None:
    """Raise PlatformError, naming capability and fix, if this process lacks it."""
    if capability not in held():
        raise PlatformError(
            f"{purpose} need {_NAMES[capability]}, which this process lacks:"
            " run as root, or let systemd grant it (systemd/tundp.service)",
            errno.EPERM,
        )


def lack_of(capabilities: Iterable[int]) -> str:
    """What this process lacks of these, and the fix, for the error of a program it ran."""
    needed = tuple(capabilities)
    missing = [_NAMES[each] for each in needed if each not in held()]
    if not missing:
        names = " and ".join(_NAMES[each] for each in needed)
        return f"this process has {names}, so something else refuses (a sandbox, SELinux)"
    return (
        f"this needs {' and '.join(missing)}, which this process lacks: run as root, or under"
        f" systemd with CapabilityBoundingSet={' '.join(missing)}"
    )


def held() -> frozenset[int]:
    """The numbers of the calling thread's effective capabilities."""
    return _numbers(_mask("CapEff"))


def keep_only(capabilities: Iterable[int]) -> None:
    """Drop every other capability irrevocably: from all five sets, and across exec.

    Call it before threads start: capabilities belong to a thread, and only those started
    later inherit what is left. A thread that still holds more is a warning in the log.
    Nothing is gained: a capability to keep that was not held stays away. Where the
    bounding set may not be changed (no CAP_SETPCAP) it stays as it is, which gives
    nothing back: no_new_privs is set either way. PlatformError if the kernel refuses the rest.
    """
    keep = 0
    for capability in capabilities:
        if not 0 <= capability < _SET_LEN:
            raise ValueError(f"capability {capability} does not exist: 0 to {_SET_LEN - 1}")
        keep |= 1 << capability
    libc = ctypes.CDLL(None, use_errno=True)
    # The bounding set first: dropping from it needs CAP_SETPCAP, which is dropped next.
    for capability in sorted(_numbers(_mask("CapBnd") & ~keep)):
        if libc.prctl(uapi.PR_CAPBSET_DROP, capability, 0, 0, 0):
            _log.debug("the bounding set stays as it is: %s", os.strerror(ctypes.get_errno()))
            break
    if libc.prctl(uapi.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise _refusal("set no_new_privs")
    # A capability dropped from permitted and inheritable leaves the ambient set, too.
    effective, permitted, inheritable = (
        _mask(name) & keep for name in ("CapEff", "CapPrm", "CapInh")
    )
    words = (_Words * 2)(
        *(
            _Words(*(mask >> shift & 0xFFFFFFFF for mask in (effective, permitted, inheritable)))
            for shift in (0, 32)
        )
    )
    if libc.capset(ctypes.byref(_Header(uapi.LINUX_CAPABILITY_VERSION_3, 0)), words):
        raise _refusal(f"keep only capabilities {sorted(_numbers(permitted))}")
    _warn_of_other_threads(keep)


def _warn_of_other_threads(keep: int) -> None:
    for task in Path("/proc/self/task").iterdir():
        try:
            surplus = _mask("CapPrm", task) & ~keep
        except OSError:  # it ended meanwhile
            continue
        if surplus:
            _log.warning(
                "thread %s was started before capabilities were given up, and keeps %s",
                task.name,
                sorted(_numbers(surplus)),
            )


def _mask(name: str, directory: Path = Path("/proc/thread-self")) -> int:
    """One set out of proc(5)'s status, a bit for each capability."""
    status = (directory / "status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1], 16)


def _numbers(mask: int) -> frozenset[int]:
    return frozenset(number for number in range(_SET_LEN) if mask >> number & 1)


def _refusal(what: str) -> PlatformError:
    code = ctypes.get_errno()
    return PlatformError(f"cannot {what}: {os.strerror(code)}", code)
