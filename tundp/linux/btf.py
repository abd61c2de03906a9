"""BTF: where the running kernel keeps which member of its structures (linux/btf.h, bpf(4)).

/sys/kernel/btf/vmlinux is there if the kernel was built with CONFIG_DEBUG_INFO_BTF, as those of
distributions have been since 2020. One pass over it takes about 0.1 s.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from tundp.errors import Unsupported

VMLINUX: Final = Path("/sys/kernel/btf/vmlinux")
_MAGIC: Final = 0xEB9F
_HEADER: Final = struct.Struct("=HBBIIIII")
"""magic, version, flags, header's length; types: offset, length; strings: offset, length."""
_TYPE: Final = struct.Struct("=III")
"""name, info (members, kind << 24, flag << 31), size or type."""
_MEMBER: Final = struct.Struct("=III")
"""name, type, offset in bits."""
_PTR, _STRUCT, _UNION, _ENUM, _TYPEDEF, _FUNC_PROTO = 2, 4, 5, 6, 8, 13
_MODIFIERS: Final = frozenset({_TYPEDEF, 9, 10, 11, 18})
"""typedef, volatile, const, restrict, type tag: another name for a type."""
_FIXED: Final = {1: 4, 3: 12, 14: 4, 17: 4}
_EACH: Final = {_STRUCT: 12, _UNION: 12, _ENUM: 8, _FUNC_PROTO: 8, 15: 12, 19: 12}
"""Bytes behind a type, and for each of its members, by kind."""


class Btf:
    """The kernel's types, those that were asked for by name."""

    def __init__(self, data: bytes, names: Iterable[str]) -> None:
        """names: of structs, enums and typedefs. Unsupported if `data` is no BTF."""
        try:
            magic, version, _, header_len, type_off, type_len, text_off, text_len = (
                _HEADER.unpack_from(data)
            )
            if magic != _MAGIC or version != 1:
                raise Unsupported(f"{VMLINUX}: no BTF of version 1 in host order")
            self._data = data
            self._text = data[header_len + text_off : header_len + text_off + text_len]
            wanted = {at: name for name in names if (at := self._text_at(name)) is not None}
            self._places = [0]
            """Of each type in `data`, by its id."""
            self._ids: dict[tuple[str, int], int] = {}
            self._scan(header_len + type_off, type_len, wanted)
        except (struct.error, KeyError, IndexError) as error:
            raise Unsupported(f"{VMLINUX} cannot be read: {error}") from None

    @classmethod
    def of_kernel(cls, names: Iterable[str], path: Path = VMLINUX) -> Btf:
        """The running kernel's. Unsupported with the reason if it is not to be had."""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise Unsupported(
                f"{path} is not there: the kernel was built without CONFIG_DEBUG_INFO_BTF, or /sys"
                " is not mounted"
            ) from None
        except OSError as error:
            raise Unsupported(f"{path}: {error.strerror}") from None
        return cls(data, names)

    def offset(self, struct_name: str, *path: str) -> int:
        """Offset in bytes of a member, through embedded structs by name, and unnamed ones.

        Unsupported if this kernel has no such struct or member.
        """
        type_id = self._ids.get((struct_name, _STRUCT))
        total = 0
        for name in path:
            found = None if type_id is None else self._member(type_id, name)
            if found is None:
                raise Unsupported(f"this kernel has no {'.'.join((struct_name, *path))}")
            bits, type_id = found
            total += bits // 8
        return total

    def enum(self, name: str) -> dict[int, str]:
        """Names of an enum's values; empty if the kernel has none of that name."""
        type_id = self._ids.get((name, _ENUM))
        if type_id is None:
            return {}
        values = (_TYPE.unpack_from(self._data, self._places[type_id])[1]) & 0xFFFF
        start = self._places[type_id] + _TYPE.size
        pairs = (struct.unpack_from("=Ii", self._data, start + 8 * at) for at in range(values))
        return {value: self._name(at) for at, value in pairs}

    def arguments(self, typedef: str) -> int:
        """How many parameters the function has that a typedef of a pointer to it leads to."""
        type_id = self._ids.get((typedef, _TYPEDEF), 0)
        while type_id:
            _, info, target = _TYPE.unpack_from(self._data, self._places[type_id])
            kind = info >> 24 & 0x1F
            if kind == _FUNC_PROTO:
                return int(info & 0xFFFF)
            type_id = target if kind in _MODIFIERS or kind == _PTR else 0
        raise Unsupported(f"this kernel has no {typedef}")

    def _scan(self, at: int, length: int, wanted: dict[int, str]) -> None:
        end = at + length
        unpack, places = _TYPE.unpack_from, self._places
        while at < end:
            name, info, _ = unpack(self._data, at)
            kind = info >> 24 & 0x1F
            if kind > 19:
                raise Unsupported(f"{VMLINUX}: unknown kind of type {kind}")
            if name in wanted:
                self._ids.setdefault((wanted[name], kind), len(places))
            places.append(at)
            at += 12 + _FIXED.get(kind, 0) + _EACH.get(kind, 0) * (info & 0xFFFF)

    def _member(self, type_id: int, name: str) -> tuple[int, int] | None:
        """Offset in bits, and type id; unnamed structs and unions are looked into."""
        for member, member_type, bits in self._members(type_id):
            if member == name:
                return bits, member_type
            if not member and (found := self._member(member_type, name)) is not None:
                return bits + found[0], found[1]
        return None

    def _members(self, type_id: int) -> Iterator[tuple[str, int, int]]:
        place = self._places[type_id]
        _, info, target = _TYPE.unpack_from(self._data, place)
        kind = info >> 24 & 0x1F
        if kind in _MODIFIERS:
            yield from self._members(target)
        elif kind in (_STRUCT, _UNION):
            for at in range(info & 0xFFFF):
                name, member, bits = _MEMBER.unpack_from(
                    self._data, place + _TYPE.size + at * _MEMBER.size
                )
                # With the flag, the upper 8 bits are the width of a bit field.
                yield self._name(name), member, bits & 0xFFFFFF if info >> 31 else bits

    def _name(self, at: int) -> str:
        return self._text[at : self._text.index(b"\0", at)].decode(errors="replace")

    def _text_at(self, name: str) -> int | None:
        at = self._text.find(b"\0" + name.encode() + b"\0")
        return None if at < 0 else at + 1
