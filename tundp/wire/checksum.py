"""The Internet checksum (RFC 1071) and its incremental update (RFC 1624).

Everything here is in network order: a 16-bit word is what `int.from_bytes(b, "big")`
gives. Native twin: native/src/checksum.c.
"""

from __future__ import annotations

from typing import Final

ONES: Final = 0xFFFF


def ones_complement_sum(data: bytes | bytearray | memoryview) -> int:
    """The 16-bit one's-complement sum of `data`, an odd last byte padded with zero.

    The sum of 16-bit words with end-around carry is the value of the whole buffer
    modulo 0xFFFF, since 0x10000 ≡ 1; only the two representations of zero need care:
    all-zero data sums to 0, anything else congruent to zero sums to 0xFFFF.
    """
    value = int.from_bytes(data, "big")
    if len(data) & 1:
        value <<= 8
    if value == 0:
        return 0
    return value % ONES or ONES


def checksum(data: bytes | bytearray | memoryview) -> int:
    """The value to store in a zeroed checksum field so that the whole verifies (RFC 1071)."""
    return ~ones_complement_sum(data) & ONES


def is_valid(data: bytes | bytearray | memoryview) -> bool:
    """Whether `data`, its checksum field included, sums to 0xFFFF."""
    return ones_complement_sum(data) == ONES


def after_ttl_decrement(header_checksum: int) -> int:
    """The header checksum once the TTL is one less.

    TTL is the high byte of its 16-bit word, so the word falls by 0x0100 and the
    checksum rises by 0x0100 with end-around carry. 0xFFFF is stored as 0x0000, as
    Linux's ip_decrease_ttl and flannel's proxy do: RFC 1624 shows that only +0 can
    be the right answer there. A wrong checksum stays exactly as wrong as it was.
    """
    raised = header_checksum + 0x0100
    folded = (raised & ONES) + (raised >> 16)
    return 0 if folded == ONES else folded


def before_ttl_decrement(header_checksum: int) -> int:
    """The header checksum while the TTL was one more: the reverse of after_ttl_decrement.

    A checksum of 0xFFFF comes back as 0, which verifies as well.
    """
    lowered = header_checksum + (ONES - 0x0100)
    folded = (lowered & ONES) + (lowered >> 16)
    return 0 if folded == ONES else folded
