"""Where stories of packets are found: indexes that stay fast where many packets look the same.

Pure.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class Index(Generic[T]):
    """Objects by name, oldest first; each step takes constant time."""

    def __init__(self) -> None:
        self._found: dict[Hashable, OrderedDict[int, T]] = {}

    def __len__(self) -> int:
        """How many names lead to something."""
        return len(self._found)

    def add(self, name: Hashable, each: T) -> None:
        """Put an object behind those of the same name, if it is not there."""
        self._found.setdefault(name, OrderedDict())[id(each)] = each

    def first(self, name: Hashable) -> T | None:
        """The oldest of a name."""
        return next(iter(self.all(name)), None)

    def all(self, name: Hashable) -> Iterable[T]:
        """All of a name, oldest first."""
        found = self._found.get(name)
        return () if found is None else found.values()

    def remove(self, name: Hashable, each: T) -> None:
        """Forget an object under a name, if it is there."""
        if (found := self._found.get(name)) is not None:
            found.pop(id(each), None)
            if not found:
                del self._found[name]


class Twins(Generic[T]):
    """Objects that look the same, oldest first, and which of them lack which kind of part.

    Each step takes time by the number of kinds, which are few.
    """

    def __init__(self, kinds_of: Callable[[T], Collection[Hashable]]) -> None:
        """kinds_of: the kinds of part that an object has."""
        self._kinds_of = kinds_of
        self._all: OrderedDict[int, T] = OrderedDict()
        self._lacking: dict[Hashable, OrderedDict[int, T]] = {}

    def __len__(self) -> int:
        """How many there are."""
        return len(self._all)

    def add(self, each: T) -> None:
        """One more."""
        self._all[id(each)] = each
        has = self._kinds_of(each)
        for kind, lacking in self._lacking.items():
            if kind not in has:
                lacking[id(each)] = each

    def remove(self, each: T) -> None:
        """One less, if it is there."""
        self._all.pop(id(each), None)
        for lacking in self._lacking.values():
            lacking.pop(id(each), None)

    def take(self, kind: Hashable) -> T | None:
        """The oldest that lacks a kind of part, and has it from now on.

        One packet is dropped once in a place: a second drop is of the second packet.
        """
        lacking = self._lacking.get(kind)
        if lacking is None:
            lacking = self._lacking[kind] = OrderedDict(
                (number, each)
                for number, each in self._all.items()
                if kind not in self._kinds_of(each)
            )
        return lacking.popitem(last=False)[1] if lacking else None
