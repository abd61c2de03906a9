"""What is known of a packet: whole, broken, cut off, quoted."""

from __future__ import annotations

import pytest

from tests import packets
from tests.packets import DF, MF, SYN
from tundp.wire.drop import DropReason
from tundp.wire.facts import Direction, Field, facts_of

SOURCE, DESTINATION = 0x0A050102, 0x0A050203
ADDRESSES = {Field.SOURCE: SOURCE, Field.DESTINATION: DESTINATION}
TCP = packets.tcp(
    b"data", 1, SYN, b"", sport=40000, dport=443, source=SOURCE, destination=DESTINATION, frag=DF
)
OPTIONS = packets.udp(
    b"data", sport=7, dport=9, source=SOURCE, destination=DESTINATION, ip_options=bytes([1] * 40)
)
PORTS = {Field.SOURCE_PORT: 40000, Field.DESTINATION_PORT: 443}
WHOLE = ADDRESSES | PORTS | {Field.PROTOCOL: 6, Field.FRAGMENT: 0, Field.TCP_FLAGS: SYN}


def facts(packet: bytes) -> dict[Field, int]:
    """All but what every packet has."""
    values = dict(facts_of(packet, direction=Direction.ENCAP).values)
    assert values.pop(Field.LENGTH) == len(packet)
    assert values.pop(Field.DIRECTION) == 1
    return values


def changed(packet: bytes, at: int, *values: int) -> bytes:
    copy = bytearray(packet)
    copy[at : at + len(values)] = values
    return bytes(copy)


def without(values: dict[Field, int], *fields: Field) -> dict[Field, int]:
    return {field: value for field, value in values.items() if field not in fields}


NO_TRANSPORT = without(WHOLE, *PORTS, Field.TCP_FLAGS)


@pytest.mark.parametrize(
    ("packet", "expected"),
    [
        (b"", {}),
        (TCP[:19], {}),
        (TCP[:20], NO_TRANSPORT),
        (TCP[:23], NO_TRANSPORT),
        (TCP[:24], without(WHOLE, Field.TCP_FLAGS)),
        (TCP[:33], without(WHOLE, Field.TCP_FLAGS)),
        (TCP[:34], WHOLE),
        (TCP, WHOLE),
        (TCP + bytes(9), WHOLE),
        # A wrong checksum is no reason not to read.
        (changed(TCP, 10, 0xFF), WHOLE),
        (changed(TCP, 0, 0x65), {}),
        (changed(TCP, 0, 0x05), {}),
        (changed(TCP, 0, 0x44), NO_TRANSPORT),  # IHL of 16 bytes
        (changed(TCP, 0, 0x4F), NO_TRANSPORT),  # IHL of 60 bytes: behind the packet
        (changed(TCP, 2, 0, 0), NO_TRANSPORT),  # total length of 0
        (changed(TCP, 2, 0, 24), without(WHOLE, Field.TCP_FLAGS)),
        (changed(TCP, 2, 0xFF, 0xFF), WHOLE),  # more than there is
        (changed(TCP, 6, 0x20, 0), WHOLE | {Field.FRAGMENT: 1}),
        (changed(TCP, 6, 0x20, 1), NO_TRANSPORT | {Field.FRAGMENT: 1}),
        (changed(TCP, 6, 0, 1), NO_TRANSPORT | {Field.FRAGMENT: 1}),
        (changed(TCP, 6, 0x80, 0), WHOLE),  # the reserved bit is no fragment
        (changed(TCP, 9, 132), without(WHOLE, Field.TCP_FLAGS) | {Field.PROTOCOL: 132}),
        (changed(TCP, 9, 47), NO_TRANSPORT | {Field.PROTOCOL: 47}),
        (
            OPTIONS,
            ADDRESSES
            | {
                Field.PROTOCOL: 17,
                Field.FRAGMENT: 0,
                Field.SOURCE_PORT: 7,
                Field.DESTINATION_PORT: 9,
            },
        ),
    ],
)
def test_what_is_there(packet: bytes, expected: dict[Field, int]) -> None:
    assert facts(packet) == expected
    assert facts_of(memoryview(packet), direction=Direction.ENCAP) == facts_of(
        packet, direction=Direction.ENCAP
    )


QUOTED_ADDRESSES = {Field.QUOTED_SOURCE: SOURCE, Field.QUOTED_DESTINATION: DESTINATION}
QUOTED_PORTS = {Field.QUOTED_SOURCE_PORT: 40000, Field.QUOTED_DESTINATION_PORT: 443}


@pytest.mark.parametrize(
    ("kind", "quote", "expected"),
    [
        (3, TCP, QUOTED_ADDRESSES | QUOTED_PORTS | {Field.QUOTED_PROTOCOL: 6}),
        (11, TCP[:28], QUOTED_ADDRESSES | QUOTED_PORTS | {Field.QUOTED_PROTOCOL: 6}),
        (12, TCP[:20], QUOTED_ADDRESSES | {Field.QUOTED_PROTOCOL: 6}),
        (5, TCP[:19], {}),
        (4, changed(TCP, 0, 0x65), {}),
        (3, changed(TCP, 6, 0, 9), QUOTED_ADDRESSES | {Field.QUOTED_PROTOCOL: 6}),
        (8, TCP, {}),
        (0, TCP, {}),
        (3, b"", {}),
    ],
)
def test_the_packet_an_icmp_error_quotes(
    kind: int, quote: bytes, expected: dict[Field, int]
) -> None:
    body = bytes([kind, 0, 0, 0, 0, 0, 0, 0]) + quote
    packet = packets.ipv4(body, 1, source=SOURCE, destination=DESTINATION)
    of_packet = ADDRESSES | {Field.PROTOCOL: 1, Field.FRAGMENT: 0}
    assert facts(packet) == of_packet | expected
    # A fragment that is not the first begins with no ICMP header.
    later = packets.ipv4(body, 1, source=SOURCE, destination=DESTINATION, frag=MF | 3)
    assert facts(later) == of_packet | {Field.FRAGMENT: 1}


def test_what_became_of_it() -> None:
    values = facts_of(
        TCP[:10], direction=Direction.DECAP, outer=7, reason=DropReason.TOO_SHORT, length=1500
    ).values
    assert values == {
        Field.LENGTH: 1500,
        Field.DIRECTION: 2,
        Field.OUTER: 7,
        Field.REASON: 0,
    }
    assert Field.OUTER not in facts_of(TCP, direction=Direction.ENCAP, outer=0).values
