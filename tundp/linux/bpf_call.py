"""bpf(2), which libc has no function for."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from typing import Final

from tundp.errors import PlatformError

_SYSCALLS: Final = {
    "x86_64": 321,
    "ppc64le": 361,
    "s390x": 351,
    **dict.fromkeys(("aarch64", "riscv64", "loongarch64"), 280),
}
"""bpf(2)'s number by architecture (asm/unistd.h)."""


def bpf(command: int, attributes: ctypes.Array[ctypes.c_char]) -> int:
    """Make the system call bpf with a union bpf_attr; a descriptor or a number.

    command: BPF_ of enum bpf_cmd (linux/bpf.h). attributes: the kernel may write to them.
    PlatformError with the errno if the call is refused.
    """
    number = _SYSCALLS.get(platform.machine())
    if number is None or struct.calcsize("P") != 8:
        raise PlatformError(f"bpf(2) has an unknown number on {platform.machine()}", errno.ENOSYS)
    libc = ctypes.CDLL(None, use_errno=True)
    answer = int(libc.syscall(number, command, attributes, len(attributes)))
    if answer < 0:
        code = ctypes.get_errno()
        raise PlatformError(os.strerror(code), code)
    return answer
