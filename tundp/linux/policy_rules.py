"""Routing policy rules for IPv4 as rtnetlink lists them, by the marks they ask for."""

from __future__ import annotations

import socket
import struct
import sys
from dataclasses import dataclass
from typing import Final

from tundp.linux import uapi
from tundp.linux.rtnl import attributes

_HEADER: Final = struct.Struct("=BBBBBBBBI")
"""struct fib_rule_hdr: family, lengths of destination and source, TOS, table, two reserved, action,
flags (linux/fib_rules.h)."""
_ALL_BITS: Final = 0xFFFFFFFF
_NOTHING: Final = b"\xff\xff\xff\xff"
"""Of FRA_SUPPRESS_PREFIXLEN: routes of every length count."""
_FOR_ALL: Final = {uapi.FRA_PRIORITY, uapi.FRA_TABLE, uapi.FRA_PROTOCOL}
"""Attributes that narrow nothing down."""


@dataclass(frozen=True, slots=True)
class MarkRule:
    """A rule for packets whose mark, under the mask, has one value; it is not 0."""

    priority: int
    mark: int
    mask: int


def rules_request() -> tuple[int, bytes]:
    """Type and body of a request for all IPv4 rules."""
    return uapi.RTM_GETRULE, _HEADER.pack(socket.AF_INET, 0, 0, 0, 0, 0, 0, 0, 0)


def decode_mark_rule(body: memoryview) -> MarkRule | None:
    """The rule of an RTM_NEWRULE; None for one that asks for no mark, or for any but one."""
    *_, flags = _HEADER.unpack_from(body)
    values = {
        kind: int.from_bytes(value, sys.byteorder)
        for kind, value in attributes(body[_HEADER.size :])
        if len(value) == 4
    }
    mask = values.get(uapi.FRA_FWMASK, _ALL_BITS)
    mark = values.get(uapi.FRA_FWMARK, 0) & mask
    if not mark or flags & uapi.FIB_RULE_INVERT:
        return None
    return MarkRule(values.get(uapi.FRA_PRIORITY, 0), mark, mask)


def decode_table(body: memoryview) -> int | None:
    """The table an RTM_NEWRULE sends every packet to; None if it is for some packets or routes."""
    _, to_len, from_len, tos, table, _, _, action, flags = _HEADER.unpack_from(body)
    values = dict(attributes(body[_HEADER.size :]))
    suppressed = values.pop(uapi.FRA_SUPPRESS_PREFIXLEN, _NOTHING)
    if to_len or from_len or tos or flags & uapi.FIB_RULE_INVERT or suppressed != _NOTHING:
        return None
    if action != uapi.FR_ACT_TO_TBL or values.keys() - _FOR_ALL:
        return None
    number = values.get(uapi.FRA_TABLE)
    return int(table) if number is None else int.from_bytes(number, sys.byteorder)
