"""The image: all that C workers need to carry packets, in memory that outlives its process.

A memfd (memfd_create(2)), in the descriptor store. One process writes it, the next one reads it
before it has imported anything else: standard library only, and little of it.

    0     two heads, 64 bytes each: magic, schema, checksum, generation, offset and length
    4096  two payloads, wherever they do not overlap

    payload  length of the description (uint32), the description (JSON), then sections

The writer never touches the newest payload: it takes away the other head, writes a payload and
then its head. A process killed at any moment leaves one that is whole; the checksum (CRC-32, over
head and payload) tells. Integers are in host order: both processes run on one machine.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

SCHEMA: Final = 1
"""Of heads and description. Another one is not read."""
_MAGIC: Final = b"tundpimg"
_HEAD: Final = struct.Struct("=8sIIQQQ")
_HEAD_LEN: Final = 64
_MFD_NOEXEC_SEAL: Final = 0x8
"""linux/memfd.h."""
_DATA: Final = 4096
_ALIGN: Final = 64
_PAGE: Final = 4096
_LENGTH: Final = struct.Struct("=I")
LEN_MAX: Final = 1 << 30
OFFSET_MAX: Final = 4 * LEN_MAX
"""Longer payloads, or those further away, are not read. 65,000 leases take 1.3 MB."""


class Unfit(Exception):  # noqa: N818  (not an error: a start without it is a normal one)
    """An image that cannot be used; the text says why."""


class _Head(NamedTuple):
    schema: int
    checksum: int
    generation: int
    offset: int
    length: int


class Image(NamedTuple):
    """One whole image, copied out of the memfd."""

    generation: int
    about: Mapping[str, Any]
    """The description."""
    sections: Mapping[str, bytes]
    """By name, each aligned for any C type of the image."""


def read(fd: int) -> Image:
    """The newest image that is whole. Unfit says why there is none."""
    reason = "the image is empty"
    heads = [head for head in map(_head_at(fd), (0, 1)) if head is not None]
    for head in sorted(heads, key=lambda each: -each.generation):
        if head.schema != SCHEMA:
            reason = f"the image has schema {head.schema}, this tundp {SCHEMA}"
            continue
        payload = _payload(fd, head)
        if payload is None or _checksum(head, [payload]) != head.checksum:
            reason = f"the image's checksum is wrong (generation {head.generation})"
            continue
        return _parsed(head.generation, payload)
    raise Unfit(reason)


def make() -> int:
    """An empty memfd for an image, close-on-exec. OSError if the kernel refuses."""
    try:
        # Where vm.memfd_noexec is 2 none can be had without it.
        return os.memfd_create("tundp-image", os.MFD_CLOEXEC | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a kernel before 6.3
            raise
    return os.memfd_create("tundp-image", os.MFD_CLOEXEC)


class ImageWriter:
    """Writes images into a memfd, one at a time, on any thread. The descriptor is borrowed."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._found: tuple[_Head | None, ...] = ()
        self._look()

    def _look(self) -> None:
        """Find the newest image that is whole."""
        fd = self._fd
        self._found = tuple(map(_head_at(fd), (0, 1)))
        heads = [head if _is_whole(fd, head) else None for head in self._found]
        ranks = [0 if head is None else head.generation for head in heads]
        # The newest one that is whole stays as it is, whatever the other slot has.
        self._slot = ranks.index(max(ranks))
        self._live = heads[self._slot]
        self._generation = ranks[self._slot]

    def write(self, about: Mapping[str, Any], sections: Mapping[str, Any]) -> int:
        """Write an image, the newest from then on; its length in bytes.

        about: what JSON can hold. sections: contiguous bytes, one after the other. OSError if
        memory is short: the image before stays. Lets other threads run while it copies.
        """
        parts = _parts(about, sections)
        length = sum(len(part) for part in parts)
        if tuple(map(_head_at(self._fd), (0, 1))) != self._found:
            self._look()  # another process has written since: a handover that was withdrawn
        self._generation += 1
        head = _Head(SCHEMA, 0, self._generation, _place(self._live, length), length)
        head = head._replace(checksum=_checksum(head, parts))
        slot = 1 - self._slot
        for void in (slot, self._slot) if self._live is None else (slot,):
            os.pwrite(self._fd, bytes(_HEAD_LEN), void * _HEAD_LEN)
        at = head.offset
        for part in parts:
            _write_all(self._fd, part, at)
            at += len(part)
        os.pwrite(self._fd, _HEAD.pack(_MAGIC, *head), slot * _HEAD_LEN)
        self._slot, self._live = slot, head
        self._found = tuple(map(_head_at(self._fd), (0, 1)))
        return length


def _head_at(fd: int) -> Callable[[int], _Head | None]:
    def head(slot: int) -> _Head | None:
        data = os.pread(fd, _HEAD.size, slot * _HEAD_LEN)
        if len(data) < _HEAD.size or data[: len(_MAGIC)] != _MAGIC:
            return None
        return _Head(*_HEAD.unpack(data)[1:])

    return head


def _is_whole(fd: int, head: _Head | None) -> bool:
    if head is None or head.schema != SCHEMA:
        return False
    payload = _payload(fd, head)
    return payload is not None and _checksum(head, [payload]) == head.checksum


def _payload(fd: int, head: _Head) -> bytes | None:
    if not (_LENGTH.size <= head.length <= LEN_MAX and head.offset <= OFFSET_MAX):
        return None
    payload = os.pread(fd, head.length, head.offset)
    return payload if len(payload) == head.length else None


def _checksum(head: _Head, parts: Sequence[Any]) -> int:
    code = zlib.crc32(_HEAD.pack(_MAGIC, *head._replace(checksum=0)))
    for part in parts:
        code = zlib.crc32(part, code)
    return code


def _place(live: _Head | None, length: int) -> int:
    """Where a payload has room without touching the newest one."""
    if live is None or live.offset >= _DATA + length:
        return _DATA
    return -(-(live.offset + live.length) // _PAGE) * _PAGE


def _parts(about: Mapping[str, Any], sections: Mapping[str, Any]) -> list[memoryview]:
    """A payload, in pieces that are written one behind the other."""
    blocks = {name: memoryview(data).cast("B") for name, data in sections.items() if len(data)}
    table: dict[str, tuple[int, int]] = {}
    at = 0
    for name, block in blocks.items():
        table[name] = (at, len(block))
        at += -(-len(block) // _ALIGN) * _ALIGN
    text = json.dumps({**about, "sections": table}).encode()
    text += b" " * (-(len(text) + _LENGTH.size) % _ALIGN)
    parts = [memoryview(_LENGTH.pack(len(text)) + text)]
    for block in blocks.values():
        parts.append(block)
        if fill := -len(block) % _ALIGN:
            parts.append(memoryview(bytes(fill)))
    return parts


def _parsed(generation: int, payload: bytes) -> Image:
    (length,) = _LENGTH.unpack_from(payload)
    start = _LENGTH.size + length
    try:
        about = json.loads(payload[_LENGTH.size : start])
        table = about.pop("sections")
        # Copies: cffi must not be lent a memoryview, which the collector may clear before it.
        sections = {
            name: payload[start + at : start + at + size] for name, (at, size) in table.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Unfit(f"the image cannot be read: {error!r}") from None
    return Image(generation, about, sections)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count
