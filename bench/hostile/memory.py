"""Where a process has its memory, from smaps of proc(5): what grows, when something does."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

KB: Final = 1 << 10
_MAPPING: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+)\s*(.*)")
_ARENA_LEN: Final = 64 << 20
"""glibc's heap of a thread begins at a multiple of this (malloc/arena.c, HEAP_MAX_SIZE)."""
_ARENA_FIRST: Final = 132 << 10
"""And has at least so much of it mapped and writable at first."""


def places(pid: int) -> Counter[str]:
    """Resident bytes of a process by place.

    heap      the main thread's malloc(3), grown by brk(2)
    arenas    the heaps of other threads' malloc(3)
    blocks    other anonymous mappings: Python's own arenas, big blocks of malloc, stacks
    files     files, libraries most of all
    """
    return parse(Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8", errors="replace"))


def parse(smaps: str) -> Counter[str]:
    """The same of the text of a smaps file."""
    found: Counter[str] = Counter()
    place = ""
    for line in smaps.splitlines():
        if match := _MAPPING.fullmatch(line):
            begin, end, inode, name = match.groups()
            place = _place(int(begin, 16), int(end, 16), int(inode), name)
        elif line.startswith("Rss:"):
            found[place] += int(line.split()[1]) * KB
    return found


def _place(begin: int, end: int, inode: int, name: str) -> str:
    if name == "[heap]":
        return "heap"
    if inode:
        return "files"
    if not name and begin % _ARENA_LEN == 0 and end - begin >= _ARENA_FIRST:
        return "arenas"
    return "blocks"


def change(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    """For people: `heap 31 -> 35, blocks 20 -> 20`, in MB."""
    return ", ".join(
        f"{name} {before.get(name, 0) >> 20} -> {after.get(name, 0) >> 20}"
        for name in sorted({*before, *after})
    )
