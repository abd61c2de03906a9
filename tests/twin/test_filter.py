"""C and Python know the same facts of any bytes, and run any program to the same end."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import packets
from tundp.engine.native import library
from tundp.engine.native.filter import matching, native_filter
from tundp.errors import PlatformError
from tundp.wire.drop import DropReason
from tundp.wire.facts import Direction, Facts, Field, facts_of
from tundp.wire.filter import parse
from tundp.wire.filter_program import OPS_MAX, WORD, Op, OpKind, is_sound, run

_native = library.require()
ffi, lib = _native.ffi, _native.lib

NUMBERS = st.one_of(
    st.integers(0, WORD), st.sampled_from([0, 1, 2, 6, 17, 80, 0x0A050102, WORD - 1, WORD])
)


def native_facts(
    packet: bytes,
    direction: Direction,
    outer: int = 0,
    reason: DropReason | None = None,
    length: int | None = None,
) -> Any:
    facts = ffi.new("struct tundp_facts *")
    # What was there before must not stay.
    ffi.memmove(facts, b"\xa5" * ffi.sizeof("struct tundp_facts"), ffi.sizeof("struct tundp_facts"))
    lib.tundp_facts_of(
        ffi.from_buffer("uint8_t[]", packet),
        len(packet),
        len(packet) if length is None else length,
        facts,
    )
    # An event before this one, of the same packet, leaves nothing behind.
    lib.tundp_facts_event(facts, 3, 0x01020304, 1, 5)
    lib.tundp_facts_event(facts, direction, outer, reason is not None, reason or 0)
    return facts


def read(facts: Any) -> dict[Field, int]:
    assert all(facts.present >> field & 1 or facts.values[field] == 0 for field in Field)
    return {field: facts.values[field] for field in Field if facts.present >> field & 1}


def assert_same_facts(
    packet: bytes,
    direction: Direction = Direction.ENCAP,
    outer: int = 0,
    reason: DropReason | None = None,
    length: int | None = None,
) -> None:
    expected = facts_of(packet, direction=direction, outer=outer, reason=reason, length=length)
    assert read(native_facts(packet, direction, outer, reason, length)) == expected.values


def test_tables_are_one() -> None:
    for field in Field:
        assert getattr(lib, f"TUNDP_FIELD_{field.name}") == field
    assert len(Field) == lib.TUNDP_FIELD_COUNT
    for kind in OpKind:
        assert getattr(lib, f"TUNDP_OP_{kind.name}") == kind
    assert lib.TUNDP_FILTER_OPS_MAX == OPS_MAX
    assert (lib.TUNDP_ENCAP, lib.TUNDP_DECAP) == (Direction.ENCAP, Direction.DECAP)


def made(rng: random.Random) -> bytes:
    """A packet of any protocol, or an ICMP error about one."""
    fields: Any = {
        "frag": rng.choice((0, 0x4000, 0x2000, 0x2001, 5, 0x8000, 0xFFFF)),
        "ip_options": bytes([1] * rng.choice((0, 0, 4, 40))),
        "source": rng.getrandbits(32),
        "destination": rng.getrandbits(32),
    }
    payload = rng.randbytes(rng.choice((0, 1, 4, 8, 13, 14, 40, 500)))
    kind = rng.randrange(4)
    if kind == 0:
        return packets.tcp(payload, 1, rng.randrange(256), b"", **fields)
    if kind == 1:
        return packets.udp(payload, sport=rng.getrandbits(16), dport=53, **fields)
    if kind == 2:
        return packets.ipv4(payload, rng.choice((1, 6, 17, 47, 132, 255)), **fields)
    quoted = made(rng)
    head = bytes([rng.randrange(20), 0, 0, 0, 0, 0, 0, 0])
    return packets.ipv4(head + quoted[: rng.choice((0, 19, 20, 23, 28, 600))], 1, **fields)


@pytest.mark.parametrize("seed", range(20))
def test_facts_of_packets_cut_and_mutated(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        packet = bytearray(made(rng))
        if rng.random() < 0.5:
            # The fields that say where something begins or ends.
            at = rng.choice((0, 2, 3, 6, 7, 9, 20, 28, 30, 31, rng.randrange(len(packet))))
            if at < len(packet):
                packet[at] = rng.choice((0, 0x14, 0x44, 0x45, 0x4F, 0xFF, rng.randrange(256)))
        if rng.random() < 0.4:
            del packet[rng.randrange(len(packet) + 1) :]
        assert_same_facts(
            bytes(packet),
            rng.choice(tuple(Direction)),
            rng.choice((0, rng.getrandbits(32))),
            rng.choice((None, *DropReason)),
            rng.choice((None, 65535)),
        )


@given(st.binary(max_size=120))
@settings(max_examples=500, deadline=None)
def test_facts_of_any_bytes(data: bytes) -> None:
    assert_same_facts(data)
    assert_same_facts(b"\x45\x00" + data)


OPS = st.builds(
    Op, st.sampled_from(OpKind), st.sampled_from(Field), NUMBERS, NUMBERS, NUMBERS
) | st.builds(
    lambda field, value: Op(OpKind.TEST, field, value, value, WORD), st.sampled_from(Field), NUMBERS
)


@st.composite
def sound(draw: st.DrawFn) -> list[Op]:
    """A program that can be run, of up to OPS_MAX instructions."""
    ops: list[Op] = []
    depth = 0
    for _ in range(draw(st.integers(1, 40))):
        kind = draw(st.sampled_from(OpKind))
        if kind is OpKind.TEST or depth < 2:
            low, high = sorted((draw(NUMBERS), draw(NUMBERS)))
            mask = draw(st.sampled_from([WORD, WORD, 0, 2, 0xFFFFFF00]))
            ops.append(Op(OpKind.TEST, draw(st.sampled_from(Field)), low, high, mask))
            depth += 1
        else:
            ops.append(Op(kind))
            depth -= kind is not OpKind.NOT
    if len(ops) + depth - 1 > OPS_MAX:
        ops, depth = ops[:1], 1
    return [*ops, *(Op(draw(st.sampled_from([OpKind.AND, OpKind.OR]))) for _ in range(depth - 1))]


@given(st.lists(OPS, max_size=12))
@settings(max_examples=500, deadline=None)
def test_c_runs_what_python_calls_sound(ops: list[Op]) -> None:
    try:
        native_filter(ops)
    except PlatformError:
        assert not is_sound(ops)
    else:
        assert is_sound(ops)


@given(sound(), st.dictionaries(st.sampled_from(Field), NUMBERS))
@settings(max_examples=1000, deadline=None)
def test_any_program_comes_to_the_same_end(ops: list[Op], values: dict[Field, int]) -> None:
    assert is_sound(ops)
    facts = ffi.new("struct tundp_facts *")
    for field, value in values.items():
        facts.present |= 1 << field
        facts.values[field] = value
    result = lib.tundp_filter_matches(native_filter(ops), facts)
    assert result == int(run(ops, Facts(values)))


def test_the_deepest_and_the_longest_program() -> None:
    true, false = Op(OpKind.TEST, high=WORD, mask=0), Op(OpKind.TEST, Field.OUTER, high=WORD)
    facts = Facts({Field.SOURCE: 1})
    native = ffi.new("struct tundp_facts *", {"present": 1, "values": [1]})
    for first, joint in ((true, OpKind.AND), (false, OpKind.OR), (false, OpKind.AND)):
        ops = [first, *(true,) * 31, *(Op(joint),) * 31, Op(OpKind.NOT)]
        assert len(ops) == OPS_MAX
        assert lib.tundp_filter_matches(native_filter(ops), native) == int(run(ops, facts))


@pytest.mark.parametrize("broken", [{"kind": 4}, {"field": 16}, {"kind": 0xFFFF}, {"low": 1}])
def test_an_instruction_nobody_knows_is_refused(broken: dict[str, int]) -> None:
    program = native_filter(parse("not tcp").ops)
    assert lib.tundp_filter_check(program) == 0
    op = program.ops[0]
    op.low = op.high = 0
    for name, value in broken.items():
        setattr(op, name, value)
    assert lib.tundp_filter_check(program) < 0


def test_packets_are_counted_as_they_are_matched() -> None:
    web, name = (packets.tcp(b"", dport=port) for port in (443, 53))
    both = parse("port 443")
    assert matching(native_filter(both.ops), web + name + web, len(web)) == 2
    assert matching(None, web + name + web, len(web)) == 0


def test_a_count_beyond_the_array_is_refused() -> None:
    program = native_filter(parse("tcp").ops)
    for count in (OPS_MAX + 1, 0xFFFFFFFF):
        program.count = count
        assert lib.tundp_filter_check(program) < 0
    with pytest.raises(PlatformError, match="at most 64"):
        native_filter(parse("tcp").ops * 65)
