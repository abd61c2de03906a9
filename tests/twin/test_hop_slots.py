"""Which hop has a send socket of its own: C against the pure function, over random histories."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tundp.engine import hop_slots
from tundp.engine.hop_slots import HopSlot
from tundp.engine.native.library import require

MS = 1_000_000


def to_c(sockets: object, at: int, slot: HopSlot) -> None:
    target = sockets[at].slot  # type: ignore[index]
    for name in ("since_ns", "used_ns", "drained_ns", "floor"):
        setattr(target, name, getattr(slot, name))


def picked(slots: list[HopSlot], now_ns: int) -> tuple[hop_slots.Pick | None, int]:
    native = require()
    sockets = native.ffi.new("struct tundp_hop_socket[]", max(len(slots), 1))
    for at, slot in enumerate(slots):
        to_c(sockets, at, slot)
    return hop_slots.pick(slots, now_ns), native.lib.tundp_slot_pick(sockets, len(slots), now_ns)


def same(pick: hop_slots.Pick | None, number: int) -> bool:
    stuck = require().lib.TUNDP_SLOT_STUCK
    if pick is None:
        return number == -1
    return (number & ~stuck, bool(number & stuck)) == pick


NOW = 500_000 * MS
FRESH = hop_slots.new_slot(NOW)
IDLE = replace(FRESH, used_ns=NOW - 300 * MS)
IDLER = replace(FRESH, used_ns=NOW - 400 * MS)
MOVING = replace(FRESH, floor=1, drained_ns=NOW - 99 * MS)
STUCK = replace(FRESH, floor=1, drained_ns=NOW - 100 * MS)
STUCK_LONGER = replace(FRESH, floor=1, drained_ns=NOW - 101 * MS)


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        ([], None),
        ([MOVING, MOVING], None),
        ([MOVING, IDLE, IDLER], (2, False)),
        ([IDLER, STUCK, STUCK_LONGER, IDLE], (2, True)),  # never a live peer's before a stuck one
        ([STUCK, STUCK], (0, True)),
        ([IDLE, IDLE], (0, False)),
    ],
)
def test_who_gives_its_socket(slots: list[HopSlot], expected: tuple[int, bool] | None) -> None:
    pick, number = picked(slots, NOW)
    assert pick == expected
    assert same(pick, number)


@pytest.mark.parametrize(
    ("queued", "age_ms", "expected"),
    [(0, 10_000, True), (0, 9_999, False), (1, 10_000, False), (0, 60_000, True)],
)
def test_when_a_socket_goes_back(queued: int, age_ms: int, *, expected: bool) -> None:
    native = require()
    slot = hop_slots.new_slot(NOW - age_ms * MS)
    sockets = native.ffi.new("struct tundp_hop_socket[1]")
    to_c(sockets, 0, slot)
    assert hop_slots.may_return(slot, queued, NOW) is expected
    told = native.lib.tundp_slot_may_return(native.ffi.addressof(sockets[0], "slot"), queued, NOW)
    assert bool(told) is expected


def test_histories_end_alike() -> None:
    native = require()
    rng = random.Random(21)
    for _ in range(200):
        now = NOW
        slots = [hop_slots.new_slot(now) for _ in range(rng.randrange(1, 9))]
        sockets = native.ffi.new("struct tundp_hop_socket[]", len(slots))
        for at, slot in enumerate(slots):
            to_c(sockets, at, slot)
        for _ in range(40):
            now += rng.choice((0, 1, 20, 60, 200)) * MS
            at, queued = rng.randrange(len(slots)), rng.choice((0, 0, 1, 768, 1536, 196_608))
            its = native.ffi.addressof(sockets[at], "slot")
            hop_slots.look(slots[at], queued, now)
            native.lib.tundp_slot_look(its, queued, now)
            if rng.random() < 0.5:
                is_taken = rng.random() < 0.5
                hop_slots.use(slots[at], now, is_taken=is_taken)
                native.lib.tundp_slot_use(its, now, is_taken)
            for slot, mine in zip(slots, sockets, strict=True):
                assert slot == HopSlot(
                    mine.slot.since_ns, mine.slot.used_ns, mine.slot.drained_ns, mine.slot.floor
                )
            found = native.lib.tundp_slot_pick(sockets, len(slots), now)
            assert same(hop_slots.pick(slots, now), found)
