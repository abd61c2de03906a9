"""A packet filter as C runs it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from tundp.engine.native.library import require
from tundp.errors import PlatformError
from tundp.wire.filter_program import OPS_MAX, Op


def native_filter(ops: Sequence[Op]) -> Any:
    """A `struct tundp_filter *` of a program, owned by whom it is returned to.

    PlatformError if C would not run it, which no result of wire.filter.parse ever is.
    """
    native = require()
    if len(ops) > OPS_MAX:
        raise PlatformError(f"a filter of {len(ops)} instructions: at most {OPS_MAX}")
    made = native.ffi.new("struct tundp_filter *")
    made.count = len(ops)
    for at, op in enumerate(ops):
        made.ops[at] = (op.kind, op.field, op.low, op.high, op.mask)
    if code := native.lib.tundp_filter_check(made):
        raise PlatformError(f"a filter that is no program: {os.strerror(-code)}", -code)
    return made


def matching(made: Any, packets: bytes, length: int) -> int:
    """How many of the packets of `length` bytes each, back to back, a native filter lets through.

    made: what native_filter returned, or None: facts are made, and nothing is matched.
    """
    native = require()
    return int(
        native.lib.tundp_filter_count(
            native.ffi.NULL if made is None else made,
            native.ffi.from_buffer("uint8_t[]", packets),
            length,
            len(packets) // length,
        )
    )
