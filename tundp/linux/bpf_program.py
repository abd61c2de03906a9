"""Small BPF programs made of instructions (RFC 9669), and the kernel's ring that they write to.

Everything lives as long as its descriptors: when the process that opened them is gone, however
it ended, the kernel detaches and frees program and maps. Nothing has a name, nothing is pinned.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tundp.errors import PlatformError, Unsupported
from tundp.linux import uapi
from tundp.linux.bpf_call import bpf

R0, R1, R2, R3, R6, R7, R8, R9, FP = 0, 1, 2, 3, 6, 7, 8, 9, 10
_SIZES: Final = {1: 0x10, 2: 0x08, 4: 0x00, 8: 0x18}
_LDX, _STX, _ST = 0x61, 0x63, 0x62
_INSTRUCTION: Final = struct.Struct("=BBhI")
_LICENSE: Final = b"Dual MIT/GPL\0"
"""Reading kernel memory is for programs that may be used under the GPL as well: NOTICE."""
_LOG_LEN: Final = 1 << 16
_LOCKDOWN: Final = Path("/sys/kernel/security/lockdown")


class Assembler:
    """Instructions in order; jumps go forward, to labels."""

    def __init__(self) -> None:
        """Empty."""
        self._code: list[tuple[int, int, int, int, int]] = []
        self._jumps: list[tuple[int, str]] = []
        self._labels: dict[str, int] = {}

    def label(self, name: str) -> None:
        """The place of the next instruction."""
        self._labels[name] = len(self._code)

    def move(self, target: int, source: int) -> None:
        """Copy a register of 64 bits."""
        self._add(0xBF, target, source)

    def set(self, target: int, value: int) -> None:
        """Set a register to a value of 32 bits with sign."""
        self._add(0xB7, target, 0, 0, value)

    def add(self, target: int, value: int) -> None:
        """Add a value to a register."""
        self._add(0x07, target, 0, 0, value)

    def add_register(self, target: int, source: int) -> None:
        """Add a register to another."""
        self._add(0x0F, target, source)

    def and_32(self, target: int, value: int) -> None:
        """And the lower 32 bits with a value; the upper ones are cleared."""
        self._add(0x54, target, 0, 0, value)

    def or_register(self, target: int, source: int) -> None:
        """Or a register into another."""
        self._add(0x4F, target, source)

    def load(self, target: int, base: int, offset: int, size: int) -> None:
        """Load `size` bytes at base + offset."""
        self._add(_LDX | _SIZES[size], target, base, offset)

    def store(self, base: int, offset: int, source: int, size: int) -> None:
        """Store `size` bytes of source at base + offset."""
        self._add(_STX | _SIZES[size], base, source, offset)

    def store_value(self, base: int, offset: int, value: int, size: int) -> None:
        """Store a value of 32 bits with sign, as `size` bytes, at base + offset."""
        self._add(_ST | _SIZES[size], base, 0, offset, value)

    def atomic_add(self, base: int, offset: int, source: int) -> None:
        """Add source to 8 bytes at base + offset, atomically."""
        self._add(0xDB, base, source, offset)

    def map(self, target: int, descriptor: int) -> None:
        """Set a register to a map."""
        self._add(0x18, target, uapi.BPF_PSEUDO_MAP_FD, 0, descriptor)
        self._add(0, 0, 0)

    def call(self, helper: int) -> None:
        """Call a helper, BPF_FUNC_*; R1 to R5 are its arguments, R0 its answer."""
        self._add(0x85, 0, 0, 0, helper)

    def jump(self, label: str) -> None:
        """Go on at a label."""
        self._jump(0x05, 0, 0, label)

    def if_equal(self, register: int, value: int, label: str) -> None:
        """Jump if the lower 32 bits are equal."""
        self._jump(0x16, register, value, label)

    def if_not_equal(self, register: int, value: int, label: str) -> None:
        """Jump if the lower 32 bits differ."""
        self._jump(0x56, register, value, label)

    def if_zero(self, register: int, label: str) -> None:
        """Jump if all 64 bits are 0."""
        self._jump(0x15, register, 0, label)

    def exit(self) -> None:
        """Return R0."""
        self._add(0x95, 0, 0)

    def code(self) -> bytes:
        """The instructions, for the kernel."""
        for at, label in self._jumps:
            code, target, source, _, value = self._code[at]
            self._code[at] = (code, target, source, self._labels[label] - at - 1, value)
        return b"".join(
            _INSTRUCTION.pack(code, _registers(target, source), offset, value & 0xFFFFFFFF)
            for code, target, source, offset, value in self._code
        )

    def _add(self, code: int, target: int, source: int, offset: int = 0, value: int = 0) -> None:
        self._code.append((code, target, source, offset, value))

    def _jump(self, code: int, register: int, value: int, label: str) -> None:
        self._jumps.append((len(self._code), label))
        self._add(code, register, 0, 0, value)


def _registers(target: int, source: int) -> int:
    """Two halves of a byte, in the order of the host's bits."""
    return target | source << 4 if sys.byteorder == "little" else target << 4 | source


def create_map(kind: int, *, key: int, value: int, entries: int, flags: int = 0) -> int:
    """A map's descriptor, closed on exec. Unsupported with the reason."""
    return _call(
        uapi.BPF_MAP_CREATE,
        struct.pack("=IIIII", kind, key, value, entries, flags),
        "a BPF map",
    )


def attach(code: bytes, tracepoint: str) -> tuple[int, int]:
    """Load a program and run it at a tracepoint of the kernel: two descriptors, closed on exec.

    It runs until both are closed. Unsupported with the reason.
    """
    instructions = ctypes.create_string_buffer(code, len(code))
    license_text = ctypes.create_string_buffer(_LICENSE)
    log = ctypes.create_string_buffer(_LOG_LEN)
    log_fields = (0, 0, 0)
    for attempt in ("silent", "explained"):
        if attempt == "explained":
            log_fields = (1, _LOG_LEN, ctypes.addressof(log))
        attributes = struct.pack(
            "=IIQQIIQI",
            uapi.BPF_PROG_TYPE_RAW_TRACEPOINT,
            len(code) // _INSTRUCTION.size,
            ctypes.addressof(instructions),
            ctypes.addressof(license_text),
            *log_fields,
            0,
        )
        try:
            program = _call(uapi.BPF_PROG_LOAD, attributes, "a BPF program")
            break
        except Unsupported as error:
            if error.errno not in (errno.EACCES, errno.EINVAL):
                raise
            if attempt == "explained":
                lines = log.value.decode(errors="replace").strip().splitlines()
                why = next((line for line in reversed(lines) if "processed" not in line), "")
                raise Unsupported(f"{error}: {why[:200]}" if why else str(error)) from None
    name = ctypes.create_string_buffer(tracepoint.encode())
    try:
        link = _call(
            uapi.BPF_RAW_TRACEPOINT_OPEN,
            struct.pack("=QIxxxx", ctypes.addressof(name), program),
            f"the tracepoint {tracepoint}",
        )
    except Unsupported:
        os.close(program)
        raise
    return program, link


def _call(command: int, attributes: bytes, what: str) -> int:
    try:
        return bpf(command, ctypes.create_string_buffer(attributes, len(attributes)))
    except PlatformError as error:
        raise Unsupported(
            f"the kernel refuses {what} ({error}){_hint(error.errno)}", error.errno
        ) from None


def _hint(code: int | None) -> str:
    if code == errno.EPERM:
        try:
            lockdown = "[confidentiality]" in _LOCKDOWN.read_text(encoding="ascii")
        except OSError:
            lockdown = False
        if lockdown:
            return ": it is locked down (confidentiality)"
        return (
            ": that needs CAP_BPF and CAP_PERFMON (root), no seccomp filter against bpf, and before"
            " linux 5.11 ulimit -l unlimited"
        )
    if code == errno.EINVAL:
        return ": that needs linux 5.8"
    if code == errno.ENOSYS:
        return ": it was built without CONFIG_BPF_SYSCALL"
    return ""


class Ring:
    """The reader's end of a ring buffer map (linux 5.8, Documentation/bpf/ringbuf.rst)."""

    def __init__(self, size: int) -> None:
        """size: bytes, rounded up to a power of 2 of pages. Unsupported with the reason."""
        page = mmap.PAGESIZE
        self._size = page
        while self._size < size:
            self._size *= 2
        self.descriptor = create_map(uapi.BPF_MAP_TYPE_RINGBUF, key=0, value=0, entries=self._size)
        try:
            self._own = mmap.mmap(self.descriptor, page)
            # The data twice in a row, so that a record never ends at the edge.
            self._theirs = mmap.mmap(
                self.descriptor, page + 2 * self._size, prot=mmap.PROT_READ, offset=page
            )
        except OSError as error:
            os.close(self.descriptor)
            raise Unsupported(f"the kernel's ring cannot be mapped: {error.strerror}") from None
        self._data_at = page

    def read(self, most: int) -> Iterator[bytes]:
        """Up to `most` records that are complete, oldest first."""
        # Native formats: one load and one store each, which the kernel's end relies on.
        (at,) = struct.unpack_from("@Q", self._own)
        (end,) = struct.unpack_from("@Q", self._theirs)
        while at < end and most > 0:
            place = self._data_at + at % self._size
            (head,) = struct.unpack_from("@I", self._theirs, place)
            if head & uapi.BPF_RINGBUF_BUSY_BIT:
                return
            length = head & ~uapi.BPF_RINGBUF_DISCARD_BIT
            record = self._theirs[place + 8 : place + 8 + length]
            at += (length + 8 + 7) // 8 * 8
            struct.pack_into("@Q", self._own, 0, at)
            if not head & uapi.BPF_RINGBUF_DISCARD_BIT:
                most -= 1
                yield record

    def skip(self) -> int:
        """Forget what is there now; how many records that was."""
        return sum(1 for _ in self.read(self._size))

    def close(self) -> None:
        """Give it back."""
        self._own.close()
        self._theirs.close()
        os.close(self.descriptor)
