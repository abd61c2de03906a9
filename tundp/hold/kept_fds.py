"""The descriptors kept for the command, by name, as systemd's store has them."""

from __future__ import annotations

import os
from typing import Final

ROOM: Final = 160
"""Descriptors, as FileDescriptorStoreMax= of the unit: of 64 workers, and a few."""
_NAME_MAX: Final = 255


class KeptFds:
    """Owns what was put in it. The newest first: the reader takes the first of a name."""

    def __init__(self) -> None:
        self._kept: list[tuple[str, int]] = []

    @property
    def all(self) -> tuple[tuple[str, int], ...]:
        """Names and descriptors."""
        return tuple(self._kept)

    def put(self, name: str, fd: int) -> str:
        """Keep `fd`, which is this object's now; why it was closed instead, empty if it was not."""
        if not is_name(name):
            why = "that is no name for a descriptor"
        elif any(name == other and _is_same(fd, each) for other, each in self._kept):
            os.close(fd)
            return ""
        elif len(self._kept) >= ROOM:
            why = f"there are {ROOM} already"
        else:
            self._kept.insert(0, (name, fd))
            return ""
        os.close(fd)
        return why

    def remove(self, name: str) -> None:
        """Close all of this name."""
        for other, fd in self._kept:
            if other == name:
                os.close(fd)
        self._kept = [each for each in self._kept if each[0] != name]

    def close(self) -> None:
        """Close everything."""
        for _, fd in self._kept:
            os.close(fd)
        self._kept = []


def is_name(name: str) -> bool:
    """Whether LISTEN_FDNAMES can carry it (fdname_is_valid of systemd)."""
    return 0 < len(name) <= _NAME_MAX and name.isascii() and name.isprintable() and ":" not in name


def _is_same(one: int, other: int) -> bool:
    """Whether two descriptors are of one socket or file; never of devices, which look alike."""
    first, second = os.fstat(one), os.fstat(other)
    return not first.st_rdev and os.path.samestat(first, second)
