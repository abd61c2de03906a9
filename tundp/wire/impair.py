"""Impairment of packets on purpose: what is wanted, and what becomes of one packet.

No socket and no clock. A generator with a seed decides, and always draws the same number of times
for a packet, so that one seed has one fate for the packet of each number, however it is timed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, NamedTuple

from tundp.wire import ip

LONGEST_S: Final = 3600.0
"""Nothing is impaired for longer."""
DELAY_MAX_S: Final = 10.0
MTU_MIN: Final = 68
"""What any IPv4 link takes (RFC 791)."""
MTU_MAX: Final = 65_507
SEED_MAX: Final = 0xFFFF_FFFF
HOLD_S: Final = 0.005
"""So much after its turn leaves a packet that is to be overtaken."""
_SHARES: Final = ("loss", "reorder", "duplicate", "corrupt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Impairment:
    """What is done to the packets for one peer. Shares are of 1; ValueError if one is not."""

    loss: float = 0.0
    delay_s: float = 0.0
    jitter_s: float = 0.0
    """The delay is uniform between delay_s - jitter_s and delay_s + jitter_s."""
    reorder: float = 0.0
    """Share of packets that leave HOLD_S after their turn, so that those behind overtake them."""
    duplicate: float = 0.0
    corrupt: float = 0.0
    """Share of packets one bit of which, behind the IPv4 header, is flipped; sums stay."""
    mtu: int | None = None
    """Bytes of an inner packet: larger ones are lost, and nobody is told."""

    def __post_init__(self) -> None:
        """Refuse what is out of range, not a number included."""
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share of the packets: 0% to 100%")
        if not 0 <= self.delay_s <= DELAY_MAX_S:
            raise ValueError(f"delay is out of range: at most {DELAY_MAX_S:.0f}s")
        if not 0 <= self.jitter_s <= self.delay_s:
            raise ValueError("the delay's +- is more than the delay itself")
        if self.mtu is not None and not MTU_MIN <= self.mtu <= MTU_MAX:
            raise ValueError(f"mtu is out of range: {MTU_MIN} to {MTU_MAX} bytes")

    @property
    def is_none(self) -> bool:
        """Whether nothing would be impaired."""
        return self == Impairment()

    @property
    def slowest_s(self) -> float:
        """Seconds by which a packet leaves later, at most."""
        return self.delay_s + self.jitter_s + (HOLD_S if self.reorder else 0)

    @property
    def words(self) -> str:
        """In one line: loss 1%, delay 20ms+-5ms."""
        found = []
        for name in _SHARES:
            if share := getattr(self, name):
                found.append(f"{name} {share * 100:g}%")
            if name == "loss" and self.delay_s:
                jitter = f"+-{self.jitter_s * 1000:g}ms" if self.jitter_s else ""
                found.append(f"delay {self.delay_s * 1000:g}ms{jitter}")
        if self.mtu is not None:
            found.append(f"mtu {self.mtu}")
        return ", ".join(found)

    def to_json(self) -> dict[str, Any]:
        """The members of a request."""
        return asdict(self)


def read_impairment(document: Mapping[str, Any]) -> Impairment:
    """An impairment by its members, absent ones as by default. ValueError names what is wrong."""
    known = {each.name for each in fields(Impairment)}
    if unknown := document.keys() - known:
        raise ValueError(f"unknown: {', '.join(sorted(map(str, unknown)))[:80]}")
    for name, value in document.items():
        if name == "mtu" and value is None:
            continue
        wanted = int if name == "mtu" else (int, float)
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise ValueError(f"{name} is no number")  # noqa: TRY004  (as every wrong member)
    return Impairment(**document)


class Fate(NamedTuple):
    """What becomes of one packet."""

    is_too_big: bool = False
    is_lost: bool = False
    delay_s: float = 0.0
    is_held: bool = False
    """It leaves HOLD_S after its turn."""
    is_doubled: bool = False
    flips_at: int | None = None
    """Bit of the packet to flip, counted from its first byte's highest."""


class Fates:
    """Decides what becomes of each packet, by a seed."""

    def __init__(self, impairment: Impairment, seed: str) -> None:
        self._wanted = impairment
        self._draw = random.Random(seed).random

    def decide(self, packet: bytes) -> Fate:
        """The fate of the next packet, a whole datagram's payload."""
        wanted, draw = self._wanted, self._draw
        lost, late, held, doubled, corrupt, place = (draw() for _ in range(6))
        if wanted.mtu is not None and len(packet) > wanted.mtu:
            return Fate(is_too_big=True)
        if lost < wanted.loss:
            return Fate(is_lost=True)
        return Fate(
            delay_s=wanted.delay_s + (2 * late - 1) * wanted.jitter_s,
            is_held=held < wanted.reorder,
            is_doubled=doubled < wanted.duplicate,
            flips_at=_bit(packet, place) if corrupt < wanted.corrupt else None,
        )


def _bit(packet: bytes, place: float) -> int | None:
    """A bit behind the IPv4 header; None if nothing is there. place: 0 <= place < 1."""
    header_len = header_len_of(packet)
    bits = (len(packet) - header_len) * 8
    return header_len * 8 + int(place * bits) if bits > 0 else None


def header_len_of(packet: bytes) -> int:
    """Bytes of the IPv4 header (RFC 791: IHL), at least 20 whatever the packet says."""
    return max(ip.MIN_HEADER_LEN, (packet[0] & 0x0F) * 4) if packet else ip.MIN_HEADER_LEN


def flipped(packet: bytes, bit: int) -> bytes:
    """The packet with one bit inverted."""
    changed = bytearray(packet)
    changed[bit >> 3] ^= 0x80 >> (bit & 7)
    return bytes(changed)


def flow_of(packet: bytes) -> bytes:
    """What packets whose order is kept have in common: protocol, source and destination.

    No ports: later fragments have none, and belong to their first.
    """
    return packet[9:10] + packet[12:20]
