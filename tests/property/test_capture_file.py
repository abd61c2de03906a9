"""Any bytes through the reader of capture files; files of our writer through it, whole and cut."""

from __future__ import annotations

import io
import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st

from tundp.wire import pcapng
from tundp.wire.capture_file import CapturedPacket, CaptureFormatError, read_capture

SETTINGS = settings(max_examples=300, deadline=None)
U64 = st.integers(0, 2**64 - 1)


def read(data: bytes) -> tuple[list[CapturedPacket], bool]:
    """Packets up to the end or a fault, and whether it was one."""
    found = []
    try:
        for each in read_capture(io.BytesIO(data).read):
            found.append(each)  # noqa: PERF402
    except CaptureFormatError:
        return found, True
    return found, False


@st.composite
def files(draw: st.DrawFn) -> tuple[list[bytes], list[CapturedPacket]]:
    """The blocks of a file, and what its packets are, told without the reader."""
    count = draw(st.integers(1, 3))
    blocks = [pcapng.section_header(os=draw(st.text(max_size=9)), comments=["a", ""])]
    blocks += [pcapng.interface_block(f"if{at}", snaplen=0) for at in range(count)]
    packets = []
    for number in range(1, draw(st.integers(0, 5)) + 1):
        at, data = draw(st.integers(0, count - 1)), draw(st.binary(max_size=70))
        texts = draw(
            st.lists(
                st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=9),
                max_size=2,
            )
        )
        packet = CapturedPacket(
            number=number, time_ns=draw(U64), linktype=228, data=data,
            original_len=len(data) + draw(st.integers(0, 9)), interface=f"if{at}",
            packet_id=draw(st.none() | U64), flags=draw(st.sampled_from(list(pcapng.Way))),
            drop_count=draw(st.integers(0, 3)) or None, comments=tuple(texts),
        )  # fmt: skip
        packets.append(packet)
        assert packet.time_ns is not None
        blocks.append(pcapng.packet_block(
            at, packet.time_ns, data, packet.original_len, way=pcapng.Way(packet.flags),
            packet_id=packet.packet_id, drop_count=packet.drop_count or 0, comments=texts,
        ))  # fmt: skip
    blocks.append(pcapng.names_block([(1, "x"), (2, "long" * 99)]))
    blocks.append(pcapng.statistics_block(0, start_ns=0, end_ns=9, accepted=1, delivered=1))
    return blocks, packets


@SETTINGS
@given(files())
def test_what_is_written_is_read(made: tuple[list[bytes], list[CapturedPacket]]) -> None:
    blocks, packets = made
    assert read(b"".join(blocks)) == (packets, False)


@SETTINGS
@given(files(), st.integers(0, 10**6))
def test_a_cut_file_gives_what_is_whole(
    made: tuple[list[bytes], list[CapturedPacket]], cut: int
) -> None:
    blocks, packets = made
    cut %= sum(map(len, blocks))
    edges = [sum(map(len, blocks[:at])) for at in range(len(blocks) + 1)]
    whole = sum(1 for edge in edges if edge <= cut) - 1
    kinds = [block[:4] for block in blocks[:whole]]
    expected = packets[: kinds.count(b"\x06\0\0\0")]
    assert read(b"".join(blocks)[:cut]) == (expected, cut == 0 or cut not in edges)


@SETTINGS
@given(files(), st.data())
def test_a_mutated_file_is_read_or_refused(
    made: tuple[list[bytes], list[CapturedPacket]], data: st.DataObject
) -> None:
    mutated = bytearray(b"".join(made[0]))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        mutated[at] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 6, mutated[at] ^ 1]))
    read(bytes(mutated))


MAGICS = st.sampled_from(["a1b2c3d4", "d4c3b2a1", "0a0d0d0a1c0000004d3c2b1a01000000" + "ff" * 8])


@SETTINGS
@given(MAGICS.map(bytes.fromhex), st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(magic: bytes, data: bytes) -> None:
    read(magic + data)
    read(data)


def test_a_length_that_lies_costs_no_memory() -> None:
    class Endless(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            return head.read(size) or bytes(min(size, 1 << 16))

    head = io.BytesIO(
        pcapng.section_header() + bytes.fromhex("ffffffff") + (1 << 24).to_bytes(4, "little")
    )
    tracemalloc.start()
    try:
        list(read_capture(Endless().read))
    except CaptureFormatError as error:
        assert "lengths differ" in str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 << 24, "twice the longest block there may be, and no more"
