"""Landlock (landlock(7)): which files a process may open, make, remove and execute, by folder.

System calls 444 to 446, the same on every architecture, by ctypes: two structures and three
calls, which no library of PyPI does better. Constants: uapi/linux/landlock.h. A rule belongs to
an inode: a file that is replaced is another one, a folder holds what is put into it later.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tundp.errors import PlatformError

_CREATE_RULESET: Final = 444
_ADD_RULE: Final = 445
_RESTRICT_SELF: Final = 446
_VERSION: Final = 1
_PATH_BENEATH: Final = 1
PR_SET_NO_NEW_PRIVS: Final = 38

EXECUTE: Final = 1 << 0
WRITE_FILE: Final = 1 << 1
READ_FILE: Final = 1 << 2
READ_DIR: Final = 1 << 3
REMOVE_DIR: Final = 1 << 4
REMOVE_FILE: Final = 1 << 5
MAKE_CHAR: Final = 1 << 6
MAKE_DIR: Final = 1 << 7
MAKE_REG: Final = 1 << 8
MAKE_SOCK: Final = 1 << 9
MAKE_FIFO: Final = 1 << 10
MAKE_BLOCK: Final = 1 << 11
MAKE_SYM: Final = 1 << 12
REFER: Final = 1 << 13
"""ABI 2. Not handled by an older one, which refuses every rename to another folder."""
TRUNCATE: Final = 1 << 14
"""ABI 3: without it a file that may only be read can be cut off."""
IOCTL_DEV: Final = 1 << 15
"""ABI 5."""
SCOPE_ABSTRACT_UNIX_SOCKET: Final = 1 << 0
"""ABI 6: no connection to abstract unix sockets of processes outside the sandbox."""
SCOPE_SIGNAL: Final = 1 << 1
"""ABI 6: no signal to processes outside the sandbox."""

READ: Final = READ_FILE | READ_DIR
RUN: Final = READ_FILE | EXECUTE
DEVICE: Final = READ_FILE | WRITE_FILE | IOCTL_DEV
KEEP: Final = (
    READ | WRITE_FILE | TRUNCATE | MAKE_REG | MAKE_SOCK | MAKE_DIR | REMOVE_FILE | REMOVE_DIR
)
"""What a folder needs in which files and sockets are made, replaced and removed."""
_OF_FILES: Final = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
"""What a rule for anything but a folder may hold; the kernel refuses the rest (EINVAL)."""

_kept_open: list[int] = []
"""O_PATH descriptors of /proc and /sys. Their inodes are made anew once they were forgotten, and a
rule would be forgotten with them."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What may be done with a path, and with all below it if it is a folder."""

    path: Path
    access: int


class _RulesetAttr(ctypes.Structure):
    """struct landlock_ruleset_attr: a shorter one is an older ABI's."""

    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class _PathBeneathAttr(ctypes.Structure):
    """struct landlock_path_beneath_attr, packed."""

    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def abi() -> int:
    """Landlock's ABI of this kernel; PlatformError with the reason if it has none."""
    version = _libc().syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION)
    if version < 1:
        code = ctypes.get_errno()
        why = {
            errno.ENOSYS: "the kernel has no Landlock (CONFIG_SECURITY_LANDLOCK, Linux 5.13)",
            errno.EPERM: "a seccomp filter around this process refuses Landlock (a container's)",
            errno.EOPNOTSUPP: "Landlock is not among the kernel's security modules (lsm=)",
        }.get(code, f"landlock_create_ruleset: {os.strerror(code)}")
        raise PlatformError(why, code)
    return int(version)


def handled_by(version: int) -> int:
    """The accesses to files that an ABI can refuse."""
    handled = REFER - 1
    for since, access in ((2, REFER), (3, TRUNCATE), (5, IOCTL_DEV)):
        if version >= since:
            handled |= access
    return handled


def restrict(rules: Iterable[Rule], *, version: int, scoped: int = 0) -> None:
    """Refuse the calling thread, and all it starts from now on, whatever no rule allows.

    Paths that do not exist are left out. Sets no_new_privs. PlatformError if the kernel refuses.
    """
    libc = _libc()
    handled = handled_by(version)
    attr = _RulesetAttr(handled, 0, scoped if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = libc.syscall(_CREATE_RULESET, ctypes.byref(attr), ctypes.c_size_t(size), 0)
    if ruleset < 0:
        raise _refusal("make a Landlock ruleset")
    try:
        for rule in rules:
            _add(libc, ruleset, rule, handled)
        if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
            raise _refusal("set no_new_privs")
        if libc.syscall(_RESTRICT_SELF, ruleset, 0):
            raise _refusal("enter a Landlock ruleset")
    finally:
        os.close(ruleset)


def _add(libc: ctypes.CDLL, ruleset: int, rule: Rule, handled: int) -> None:
    try:
        fd = os.open(rule.path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        access = rule.access & handled
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            access &= _OF_FILES
        beneath = _PathBeneathAttr(access, fd)
        if access and libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(beneath), 0):
            raise _refusal(f"allow {rule.path} in a Landlock ruleset")
    except BaseException:
        os.close(fd)
        raise
    if str(rule.path).startswith(("/proc/", "/sys/")):
        _kept_open.append(fd)
    else:
        os.close(fd)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return libc


def _refusal(what: str) -> PlatformError:
    code = ctypes.get_errno()
    return PlatformError(f"cannot {what}: {os.strerror(code)}", code)
