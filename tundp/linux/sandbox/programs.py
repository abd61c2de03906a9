"""What must be executable for a program to run: the file itself, its interpreter, its loader."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tundp.linux.command import environment, find

_HEAD: Final = 4096
_PT_INTERP: Final = 3
_DEPTH: Final = 4
"""linux/binfmts.h: an interpreter may be a script again, so often."""


@dataclass(frozen=True, slots=True)
class Programs:
    """Files to execute. scripts: those among them that may run any other program."""

    files: tuple[Path, ...]
    scripts: tuple[Path, ...]


def resolve(names: Iterable[str]) -> Programs:
    """Follow each program that is installed to all it is executed by."""
    files: dict[Path, None] = {}
    scripts: dict[Path, None] = {}
    for name in names:
        path = find(name)
        for _ in range(_DEPTH):
            if path is None:
                break
            files[Path(os.path.realpath(path))] = None
            head = _head(path)
            if head.startswith(b"#!"):
                scripts[Path(path)] = None
                words = head[2:].split(b"\n", 1)[0].split()
                path = os.fsdecode(words[0]) if words else None
            else:
                path = _loader(head)
    return Programs(tuple(files), tuple(scripts))


def folders() -> tuple[Path, ...]:
    """The folders programs are searched in."""
    found = (Path(each) for each in environment()["PATH"].split(":"))
    return tuple(dict.fromkeys(each for each in found if each.is_absolute() and each.is_dir()))


def _head(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_HEAD)
    except OSError:
        return b""


def _loader(head: bytes) -> str | None:
    """PT_INTERP of an ELF file of this byte order (elf.h); None for a static one."""
    try:
        if head[:4] != b"\x7fELF":
            return None
        is_64 = head[4] == 2
        (table,) = struct.unpack_from("=Q" if is_64 else "=I", head, 32 if is_64 else 28)
        size, count = struct.unpack_from("=HH", head, 54 if is_64 else 42)
        for at in range(table, table + size * count, size):
            (kind,) = struct.unpack_from("=I", head, at)
            if kind == _PT_INTERP:
                layout, offset = ("=Q16xQ", 8) if is_64 else ("=I8xI", 4)
                where, length = struct.unpack_from(layout, head, at + offset)
                return os.fsdecode(head[where : where + length].rstrip(b"\0")) or None
    except (IndexError, struct.error):
        pass
    return None
