"""A seccomp filter (seccomp(2)): system calls and socket families nothing here needs are refused.

A list of what is refused, and no list of what is allowed: a new glibc or Python must not end a
daemon. Refused is EPERM; clone3 is ENOSYS, since its flags cannot be read by a filter and libc then
uses clone. Calls that are always allowed cost no run of the filter since Linux 5.11, which keeps a
bitmap of them. Numbers: asm/unistd_64.h (x86_64), asm-generic/unistd.h (aarch64).
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tundp.errors import PlatformError
from tundp.linux import uapi

PR_SET_NO_NEW_PRIVS: Final = 38
_SET_MODE_FILTER: Final = 1
_GET_ACTION_AVAIL: Final = 2
_FLAG_TSYNC: Final = 1 << 0
"""The filter is every thread's of the process, not the calling one's only."""
_FLAG_SPEC_ALLOW: Final = 1 << 2
"""4.17: no slower memory for a filter's sake (before 5.16 the kernel's default)."""
_ALLOW: Final = 0x7FFF0000
_ERRNO: Final = 0x00050000
_X32: Final = 0x40000000
"""Set in the number of a call of x86_64's other ABI."""

_LD, _JEQ, _JGE, _JSET, _RET, _AND = 0x20, 0x15, 0x35, 0x45, 0x06, 0x54
_NR, _ARCH, _ARGS = 0, 4, 16
"""Offsets in struct seccomp_data; arguments have 8 bytes, the low half first."""

FAMILIES: Final = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)
"""Families a socket may have."""
_CLONE_NEW: Final = 0x7E020000
"""The CLONE_NEW flags clone takes (linux/sched.h): CGROUP, UTS, IPC, USER, PID, NET, NS."""
_TYPE: Final = 0xF
"""Of a socket's type, without SOCK_CLOEXEC and SOCK_NONBLOCK (SOCK_TYPE_MASK, linux/net.h)."""
_TERMINAL: Final = (0x5412, 0x541C)
"""TIOCSTI, TIOCLINUX: typing into the terminal a daemon was started from."""

_REFUSED: Final[dict[str, tuple[int | None, int | None]]] = {
    # Other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    # Mounts and namespaces
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "open_tree_attr": (467, 467),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    # The kernel itself
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "lookup_dcookie": (212, 18),
    # Keys
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    # The host
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "syslog": (103, 116),
    "vhangup": (153, 58),
    # Files by another way than open(2), and what Landlock does not ask for
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "execveat": (322, 281),
    "chmod": (90, None),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "lchown": (94, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "removexattrat": (466, 466),
    "file_setattr": (469, 469),
    "mknod": (133, None),
    "mknodat": (259, 33),
}
REFUSED: Final = tuple(_REFUSED)
"""The system calls that are refused whatever their arguments."""


@dataclass(frozen=True, slots=True)
class _Machine:
    arch: int
    """AUDIT_ARCH_ of linux/audit.h."""
    column: int
    """Of _REFUSED."""
    seccomp: int
    socket: int
    socketpair: int
    ioctl: int
    fchmod: int
    clone: int
    bpf: int
    clone3: int = 435


_MACHINES: Final = {
    "x86_64": _Machine(0xC000003E, 0, 317, 41, 53, 16, 91, 56, 321),
    "aarch64": _Machine(0xC00000B7, 1, 277, 198, 199, 29, 52, 220, 280),
}


def program(machine: str) -> bytes:
    """The filter for a machine (`uname -m`), struct sock_filter each; ValueError for others."""
    if machine not in _MACHINES:
        raise ValueError(machine)
    has = _MACHINES[machine]
    refuse = _ret(_ERRNO | errno.EPERM)
    # Another architecture's numbers mean other calls: none of them passes.
    code = [_load(_ARCH), *_unless(_JEQ, has.arch, [refuse]), _load(_NR)]
    if machine == "x86_64":
        code += _if(_JGE, _X32, [refuse])
    for numbers in _REFUSED.values():
        number = numbers[has.column]
        if number is not None:
            code += _if(_JEQ, number, [refuse])
    code += _if(_JEQ, has.clone3, [_ret(_ERRNO | errno.ENOSYS)])
    allow = _ret(_ALLOW)
    families: list[bytes] = [_load(_ARGS)]
    for family in FAMILIES:
        families += _if(_JEQ, family, [allow])
    families.append(refuse)
    # Landlock does not ask before a connection to a unix socket with a path, behind which root is
    # served (Docker, D-Bus): no new one that connects. Datagrams: systemd is told by one. Pairs of
    # sockets are connected already.
    types = [_load(_ARGS + 8), struct.pack("=HBBI", _AND, 0, 0, _TYPE)]
    types += [*_if(_JEQ, socket.SOCK_DGRAM, [allow]), refuse]
    unix = [_load(_ARGS), *_if(_JEQ, socket.AF_UNIX, types)]
    code += _if(_JEQ, has.socket, [*unix, *families])
    code += _if(_JEQ, has.socketpair, families)
    namespaces = [_load(_ARGS), *_if(_JSET, _CLONE_NEW, [refuse]), allow]
    code += _if(_JEQ, has.clone, namespaces)
    # Which programs of others are attached is asked; to load one, or see into it, is refused.
    queries = [_load(_ARGS), *_if(_JEQ, uapi.BPF_PROG_QUERY, [allow]), refuse]
    code += _if(_JEQ, has.bpf, queries)
    # S_ISUID, S_ISGID: a file that makes others root.
    code += _if(_JEQ, has.fchmod, [_load(_ARGS + 8), *_if(_JSET, 0o6000, [refuse]), allow])
    terminal: list[bytes] = [_load(_ARGS + 8)]
    for request in _TERMINAL:
        terminal += _if(_JEQ, request, [refuse])
    code += _if(_JEQ, has.ioctl, [*terminal, allow])
    return b"".join([*code, allow])


def install(machine: str) -> None:
    """Give every thread of this process the filter, for good. Sets no_new_privs.

    PlatformError: no filter for this machine, or the kernel refuses.
    """
    try:
        code = program(machine)
    except ValueError:
        raise PlatformError(
            f"there is no seccomp filter for {machine}, only for {', '.join(_MACHINES)}"
        ) from None
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise _refusal()
    buffer = ctypes.create_string_buffer(code, len(code))
    fprog = _Fprog(len(code) // 8, ctypes.addressof(buffer))
    for flags in (_FLAG_TSYNC | _FLAG_SPEC_ALLOW, _FLAG_TSYNC):
        answer = libc.syscall(
            _MACHINES[machine].seccomp, _SET_MODE_FILTER, flags, ctypes.byref(fprog)
        )
        if answer == 0:
            return
        if answer > 0:
            raise PlatformError(f"thread {answer} has a seccomp filter of its own", errno.ESRCH)
        if ctypes.get_errno() != errno.EINVAL:
            break
    raise _refusal()


def is_there() -> bool:
    """Whether the kernel takes filters (SECCOMP_GET_ACTION_AVAIL, 4.14); installs none."""
    has = _MACHINES.get(os.uname().machine)
    if has is None:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    action = ctypes.c_uint32(_ERRNO)
    return not libc.syscall(has.seccomp, _GET_ACTION_AVAIL, 0, ctypes.byref(action))


class _Fprog(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _load(offset: int) -> bytes:
    return struct.pack("=HBBI", _LD, 0, 0, offset)


def _ret(value: int) -> bytes:
    return struct.pack("=HBBI", _RET, 0, 0, value)


def _if(jump: int, value: int, then: Sequence[bytes]) -> list[bytes]:
    return [struct.pack("=HBBI", jump, 0, len(then), value), *then]


def _unless(jump: int, value: int, then: Sequence[bytes]) -> list[bytes]:
    return [struct.pack("=HBBI", jump, len(then), 0, value), *then]


def _refusal() -> PlatformError:
    code = ctypes.get_errno()
    why = {
        errno.ENOSYS: "the kernel has no seccomp (CONFIG_SECCOMP_FILTER, Linux 3.17)",
        errno.EINVAL: "the kernel takes no seccomp filter (CONFIG_SECCOMP_FILTER)",
    }.get(code, f"seccomp: {os.strerror(code)}")
    return PlatformError(why, code)
