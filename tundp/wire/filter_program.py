"""What a packet filter is made into: a postfix program over a packet's facts, without jumps.

A program of no instructions lets every packet through. Native twin: native/src/filter.c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, unique
from typing import Final

from tundp.wire.facts import Facts, Field

OPS_MAX: Final = 64
"""Instructions in one program. So no more values wait on the stack than a word has bits."""
WORD: Final = 0xFFFFFFFF


@unique
class OpKind(IntEnum):
    """What an instruction does with the stack of truth values."""

    TEST = 0
    """Push whether the field is there, and low <= field & mask <= high."""
    AND = 1
    """Pop two, push whether both are true."""
    OR = 2
    """Pop two, push whether one is true."""
    NOT = 3
    """Turn the top one round."""


@dataclass(frozen=True, slots=True)
class Op:
    """One instruction; all but `kind` is of a TEST, unsigned numbers of 32 bits."""

    kind: OpKind
    field: Field = Field.SOURCE
    low: int = 0
    high: int = 0
    mask: int = 0


def is_sound(ops: Sequence[Op]) -> bool:
    """Whether a program can be run: bounded, its stack never empty too early, one value left."""
    if len(ops) > OPS_MAX:
        return False
    depth = 0
    for op in ops:
        if op.kind is OpKind.TEST:
            if op.low > op.high:
                return False
            depth += 1
        elif depth < (1 if op.kind is OpKind.NOT else 2):
            return False
        elif op.kind is not OpKind.NOT:
            depth -= 1
    return depth == (1 if ops else 0)


def run(ops: Sequence[Op], facts: Facts) -> bool:
    """What a sound program says of a packet. A test of a field that is absent is false."""
    stack: list[bool] = []
    for op in ops:
        if op.kind is OpKind.TEST:
            value = facts.values.get(op.field)
            stack.append(value is not None and op.low <= value & op.mask <= op.high)
        elif op.kind is OpKind.NOT:
            stack[-1] = not stack[-1]
        else:
            top = stack.pop()
            stack[-1] = (stack[-1] and top) if op.kind is OpKind.AND else (stack[-1] or top)
    return stack[0] if stack else True
