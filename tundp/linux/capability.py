"""capabilities(7) of this process: read by capget(2) and prctl(2), dropped by capset(2).

The system calls are asked and not proc(5): a sandbox may have no /proc.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import threading
from collections.abc import Collection, Iterable
from typing import Final, NamedTuple

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


class _Sets(NamedTuple):
    """Three sets of one thread, a bit for each capability."""

    effective: int
    permitted: int
    inheritable: int


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
    """The numbers of the calling thread's effective capabilities.

    All there are where capget(2) is refused: what is lacking the kernel will refuse by itself.
    """
    try:
        return _numbers(_sets().effective)
    except PlatformError as error:
        _log.debug("%s", error)
        return frozenset(range(_SET_LEN))


def keep_only(capabilities: Iterable[int], leaving: Collection[int] = ()) -> None:
    """Drop every other capability irrevocably: from all five sets, and across exec.

    Call it before threads start: capabilities belong to a thread, and only those started
    later inherit what is left. A thread that still holds more is a warning in the log, unless
    it is one of `leaving`, whom the caller ends right after this.
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
    for capability in sorted(_bounding(libc) - _numbers(keep)):
        if libc.prctl(uapi.PR_CAPBSET_DROP, capability, 0, 0, 0):
            _log.debug("the bounding set stays as it is: %s", os.strerror(ctypes.get_errno()))
            break
    if libc.prctl(uapi.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise _refusal("set no_new_privs")
    # A capability dropped from permitted and inheritable leaves the ambient set, too.
    kept = [mask & keep for mask in _sets()]
    words = (_Words * 2)(
        *(_Words(*(mask >> shift & 0xFFFFFFFF for mask in kept)) for shift in (0, 32))
    )
    if libc.capset(ctypes.byref(_Header(uapi.LINUX_CAPABILITY_VERSION_3, 0)), words):
        raise _refusal(f"keep only capabilities {sorted(_numbers(kept[1]))}")
    _warn_of_other_threads(keep, leaving)


def _warn_of_other_threads(keep: int, leaving: Collection[int]) -> None:
    for thread in set(_threads()).difference(leaving):
        try:
            surplus = _sets(thread).permitted & ~keep
        except PlatformError:  # it ended meanwhile
            continue
        if surplus:
            _log.warning(
                "thread %d was started before capabilities were given up, and keeps %s",
                thread,
                sorted(_numbers(surplus)),
            )


def _threads() -> list[int]:
    """Thread ids of this process; without a /proc those of Python's own threads."""
    try:
        return [int(name) for name in os.listdir("/proc/self/task")]
    except OSError as error:
        _log.debug("threads that are not Python's are not looked at: %s", error)
        return [each.native_id for each in threading.enumerate() if each.native_id is not None]


def _sets(thread: int = 0) -> _Sets:
    """The sets of a thread, 0 for the calling one (capget(2)). PlatformError if that is refused."""
    libc = ctypes.CDLL(None, use_errno=True)
    words = (_Words * 2)()
    if libc.capget(ctypes.byref(_Header(uapi.LINUX_CAPABILITY_VERSION_3, thread)), words):
        raise _refusal("read the capabilities of this process (capget)")
    low, high = words
    return _Sets(
        low.effective | high.effective << 32,
        low.permitted | high.permitted << 32,
        low.inheritable | high.inheritable << 32,
    )


def _bounding(libc: ctypes.CDLL) -> frozenset[int]:
    """The bounding set of the calling thread; numbers the kernel does not know are in none."""
    return frozenset(
        number
        for number in range(_SET_LEN)
        if libc.prctl(uapi.PR_CAPBSET_READ, number, 0, 0, 0) == 1
    )


def _numbers(mask: int) -> frozenset[int]:
    return frozenset(number for number in range(_SET_LEN) if mask >> number & 1)


def _refusal(what: str) -> PlatformError:
    code = ctypes.get_errno()
    return PlatformError(f"cannot {what}: {os.strerror(code)}", code)
