"""Classic BPF on a socket: which packets it gets (linux/filter.h, socket(7): SO_ATTACH_FILTER)."""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Iterable
from typing import Final

from tundp.linux import uapi

_INSTRUCTION: Final = struct.Struct("=HBBI")
"""struct sock_filter: code, jump if true, jump if false, operand."""


def attach_filter(sock: socket.socket, program: Iterable[tuple[int, int, int, int]]) -> None:
    """Give the kernel a program of (code, jt, jf, k); it keeps a copy. OSError if it is refused."""
    text = b"".join(_INSTRUCTION.pack(*each) for each in program)
    code = ctypes.create_string_buffer(text, len(text))
    # struct sock_fprog: a length, and a pointer the kernel reads from at once.
    sock.setsockopt(
        socket.SOL_SOCKET,
        uapi.SO_ATTACH_FILTER,
        struct.pack("@HP", len(text) // _INSTRUCTION.size, ctypes.addressof(code)),
    )
