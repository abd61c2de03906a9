"""Taps: rings of event records (wire/event.py), one reader each; and the flight recorder.

What the C engines do in native/src/tap.c, the reference engine does with `Events`. An engine
without taps writes no record but, now and then, one of a dropped packet into the flight recorder.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from tundp.errors import TooManyReaders
from tundp.wire.drop import DropReason
from tundp.wire.event import ALL_STAGES, DROPS_BIT, HEADER_LEN, SNAP_MAX, Record, Stage, unpack
from tundp.wire.facts import Direction, Facts, facts_of
from tundp.wire.filter import Filter

TAPS_MAX: Final = 16
"""Taps an engine may have at once."""
RING_LEN_MIN: Final = 1 << 18
"""Bytes of the smallest ring: any record fits, twice."""
RING_LEN_MAX: Final = 1 << 26

EVERYTHING: Final = Filter((), "")
_REASONS: Final = tuple(DropReason)
EXAMPLES: Final = 8
"""Dropped packets the flight recorder keeps, of each worker, direction and reason."""
EXAMPLE_LEN: Final = 128
"""Bytes it keeps of each."""
EXAMPLE_NS: Final = 1_000_000
"""Between two of them at least, so that a flood of drops costs little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TapRequest:
    """What a reader of events wants to have."""

    filter: Filter = EVERYTHING
    """Which packets; it runs before a record is made."""
    stages: int = ALL_STAGES
    """Bits: 1 << Stage for packets that passed it, DROPS_BIT for drops."""
    snap: int = 128
    """Bytes kept of a packet, at most SNAP_MAX."""
    size: int = 1 << 20
    """Bytes of each worker's ring; the next power of two is taken."""

    def __post_init__(self) -> None:
        if not 0 <= self.snap <= SNAP_MAX:
            raise ValueError(f"snap is {self.snap}: 0 to {SNAP_MAX} bytes of a packet")
        if not RING_LEN_MIN <= self.size <= RING_LEN_MAX:
            raise ValueError(f"size is {self.size}: {RING_LEN_MIN} to {RING_LEN_MAX} bytes a ring")
        if not self.stages & ALL_STAGES or self.stages & ~ALL_STAGES:
            raise ValueError(f"stages is {self.stages}: bits of {ALL_STAGES}")

    @property
    def ring_len(self) -> int:
        """`size` as a power of two."""
        return 1 << (self.size - 1).bit_length()


class Tap(Protocol):
    """An open tap. Called from the event loop's thread only."""

    def read(self) -> Sequence[tuple[int, bytes]]:
        """The records since the last call: number of the worker, whole records, oldest first."""
        ...

    def lost(self) -> Sequence[int]:
        """How many records had no room so far, by worker."""
        ...

    def close(self) -> None:
        """Stop the records; twice is once."""
        ...


class Recorder(Protocol):
    """Memory for the last packets that were dropped."""

    def worker(self, number: int) -> memoryview | None:
        """`examples_len` bytes, zero at first, of worker `number`; None: no room for so many."""
        ...


class Events:
    """Events of an engine that is written in Python: its taps, its flight recorder."""

    def __init__(
        self,
        generation: Callable[[], int],
        recorder: memoryview | None,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        on_use: Callable[[bool], object] = bool,
    ) -> None:
        """generation: of the FIB in use. recorder: EXAMPLES_LEN bytes, borrowed, or None.

        on_use: called with True before the first tap opens, with False after the last closed.
        """
        self._on_use = on_use
        self._generation = generation
        self._recorder = recorder
        self._clock_ns = clock_ns
        self._taps: list[_Ring] = []

    @property
    def has_taps(self) -> bool:
        """Whether anybody looks on."""
        return bool(self._taps)

    @property
    def tap_count(self) -> int:
        """How many."""
        return len(self._taps)

    def open_tap(self, request: TapRequest) -> Tap:
        """A new tap; TooManyReaders."""
        if len(self._taps) >= TAPS_MAX:
            raise TooManyReaders(TAPS_MAX)
        ring = _Ring(request, self._remove)
        if not self._taps:
            self._on_use(True)
        self._taps.append(ring)
        return ring

    def _remove(self, ring: _Ring) -> None:
        self._taps.remove(ring)
        if not self._taps:
            self._on_use(False)

    def passed(
        self,
        stage: Stage,
        packet: bytes | memoryview,
        *,
        packet_id: int,
        hop: int = 0,
        peer: tuple[int, int] = (0, 0),
        together: int = 1,
        wait_ns: int = 0,
    ) -> None:
        """A packet has passed a stage. peer: its address and port. wait_ns: see Record."""
        if self._taps:
            self._put(
                Record(
                    stage=stage,
                    time_ns=self._clock_ns(),
                    packet_id=packet_id,
                    hop=hop,
                    outer=peer[0],
                    port=peer[1],
                    length=len(packet),
                    together=together,
                    generation=self._generation(),
                    wait_ns=wait_ns,
                    packet=bytes(packet),
                )
            )

    def dropped(
        self,
        stage: Stage,
        packet: bytes | memoryview,
        *,
        reason: int,
        packet_id: int,
        hop: int = 0,
        peer: tuple[int, int] = (0, 0),
        error: int = 0,
    ) -> None:
        """A packet was dropped instead of passing a stage."""
        if not self._taps and self._recorder is None:
            return
        record = Record(
            stage=stage,
            is_dropped=True,
            reason=reason,
            time_ns=self._clock_ns(),
            packet_id=packet_id,
            hop=hop,
            outer=peer[0],
            port=peer[1],
            error=error,
            length=len(packet),
            generation=self._generation(),
            packet=bytes(packet),
        )
        if self._recorder is not None:
            _note(self._recorder, record)
        self._put(record)

    def _put(self, record: Record) -> None:
        for ring in self._taps:
            ring.put(record)


class _Ring:
    """See Tap. A list of records for a ring: the same bytes, one worker."""

    def __init__(self, request: TapRequest, remove: Callable[[_Ring], None]) -> None:
        self._request = request
        self._remove = remove
        self._records: list[bytes] = []
        self._length = 0
        self._lost = 0
        self._is_open = True

    def put(self, record: Record) -> None:
        """Keep a record, if it is wanted and has room."""
        bit = DROPS_BIT if record.is_dropped else 1 << record.stage
        if not self._request.stages & bit:
            return
        if self._request.filter.ops and not self._request.filter.matches(facts_of_record(record)):
            return
        packed = cut(record, self._request.snap).pack()
        if self._length + len(packed) > self._request.ring_len:
            self._lost += 1
            return
        self._records.append(packed)
        self._length += len(packed)

    def read(self) -> Sequence[tuple[int, bytes]]:
        """See Tap."""
        data = b"".join(self._records)
        self._records.clear()
        self._length = 0
        return [(0, data)] if data else []

    def lost(self) -> Sequence[int]:
        """See Tap."""
        return [self._lost]

    def close(self) -> None:
        """See Tap."""
        if self._is_open:
            self._is_open = False
            self._remove(self)


def facts_of_record(record: Record) -> Facts:
    """What a filter knows of a record with its whole packet."""
    return facts_of(
        record.packet,
        direction=Direction.ENCAP if record.stage.is_encap else Direction.DECAP,
        outer=record.outer,
        reason=_REASONS[record.reason] if record.is_dropped else None,
        length=record.length,
    )


def cut(record: Record, snap: int) -> Record:
    """A record with at most `snap` bytes of its packet."""
    if len(record.packet) <= snap:
        return record
    values = {name: getattr(record, name) for name in Record.__slots__}
    return Record(**(values | {"packet": record.packet[:snap]}))


# The flight recorder: struct tundp_examples of native/include/tundp.h, one for each direction and
# reason: u64 count, u64 noted_ns, EXAMPLES slots of HEADER_LEN + EXAMPLE_LEN bytes.

_EXAMPLES_HEAD: Final = struct.Struct("=QQ")
_SIZE: Final = struct.Struct("=I")
_SLOT_LEN: Final = HEADER_LEN + EXAMPLE_LEN
_PER_REASON: Final = _EXAMPLES_HEAD.size + EXAMPLES * _SLOT_LEN


def examples_len(reason_count: int) -> int:
    """Bytes of the flight recorder of one worker, if there are so many drop reasons."""
    return 2 * reason_count * _PER_REASON


def read_examples(recorder: bytes | memoryview, reason_count: int) -> Iterator[Record]:
    """The dropped packets of one worker's flight recorder, in no order.

    A slot that is written at this moment is left out.
    """
    for number in range(2 * reason_count):
        start = number * _PER_REASON + _EXAMPLES_HEAD.size
        for slot in range(start, start + EXAMPLES * _SLOT_LEN, _SLOT_LEN):
            before = bytes(recorder[slot : slot + _SLOT_LEN])
            size = _SIZE.unpack_from(before)[0]
            if not HEADER_LEN <= size <= _SLOT_LEN or before != recorder[slot : slot + _SLOT_LEN]:
                continue
            try:
                yield from unpack(before[:size])
            except ValueError:
                continue


def _note(recorder: memoryview, record: Record) -> None:
    """Keep a dropped packet, if the last one of its reason is old enough."""
    reason_count = len(recorder) // (2 * _PER_REASON)
    direction = 0 if record.stage.is_encap else reason_count
    start = (direction + record.reason) * _PER_REASON
    count, noted_ns = _EXAMPLES_HEAD.unpack_from(recorder, start)
    if count and record.time_ns - noted_ns < EXAMPLE_NS:
        return
    packed = cut(record, EXAMPLE_LEN).pack()
    slot = start + _EXAMPLES_HEAD.size + count % EXAMPLES * _SLOT_LEN
    recorder[slot : slot + len(packed)] = packed
    _EXAMPLES_HEAD.pack_into(recorder, start, count + 1, record.time_ns)
