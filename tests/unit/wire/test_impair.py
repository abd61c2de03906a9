"""What becomes of a packet that is impaired: by share, by seed, in words."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.packets import udp
from tundp.wire.impair import Fate, Fates, Impairment, flipped, flow_of, read_impairment

PACKET = udp(bytes(100), source="10.5.1.2", destination="10.5.2.2", dport=7)
ALL = Impairment(
    loss=0.2, delay_s=0.02, jitter_s=0.005, reorder=0.3, duplicate=0.1, corrupt=0.4, mtu=1300
)


def fates(impairment: Impairment, count: int, *, seed: str = "7", packet: bytes = PACKET) -> Any:
    decider = Fates(impairment, seed)
    return [decider.decide(packet) for _ in range(count)]


def test_one_seed_has_one_fate_for_each_packet() -> None:
    assert fates(ALL, 500) == fates(ALL, 500)
    assert fates(ALL, 500) != fates(ALL, 500, seed="8")


def test_what_else_is_impaired_changes_no_other_choice() -> None:
    lost = [each.is_lost for each in fates(Impairment(loss=0.2), 500)]
    assert [each.is_lost for each in fates(ALL, 500)] == lost


def test_shares_come_true() -> None:
    found = fates(ALL, 20_000)
    # 5 standard deviations of a binomial distribution.
    for share, hits in (
        (0.2, sum(each.is_lost for each in found)),
        (0.8 * 0.3, sum(each.is_held for each in found)),
        (0.8 * 0.1, sum(each.is_doubled for each in found)),
        (0.8 * 0.4, sum(each.flips_at is not None for each in found)),
    ):
        spread = 5 * math.sqrt(20_000 * share * (1 - share))
        assert abs(hits - 20_000 * share) < spread, share


def test_delays_lie_within_their_bounds_and_fill_them() -> None:
    delays = [each.delay_s for each in fates(Impairment(delay_s=0.02, jitter_s=0.005), 2000)]
    assert 0.015 <= min(delays) < 0.0155
    assert 0.0245 < max(delays) <= 0.025


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_none_is_none_and_all_is_all(share: float) -> None:
    found = fates(Impairment(loss=share), 1000) + fates(Impairment(duplicate=share), 1000)
    assert {each.is_lost or each.is_doubled for each in found} == {share == 1.0}


def test_larger_than_the_mtu() -> None:
    impairment = Impairment(mtu=len(PACKET))
    assert fates(impairment, 1) == [Fate()]
    assert fates(impairment, 1, packet=PACKET + b"x") == [Fate(is_too_big=True)]


def test_bits_are_flipped_behind_the_header_everywhere() -> None:
    bits = {each.flips_at for each in fates(Impairment(corrupt=1), 20_000)}
    assert bits == set(range(20 * 8, len(PACKET) * 8))
    with_options = b"\x46" + PACKET[1:]
    assert min(e.flips_at for e in fates(Impairment(corrupt=1), 5000, packet=with_options)) == 192


@pytest.mark.parametrize("packet", [b"", b"\x45", PACKET[:20], b"\x4f" + bytes(30), bytes(20)])
def test_what_is_no_packet_has_nothing_to_flip(packet: bytes) -> None:
    assert fates(Impairment(corrupt=1, duplicate=1), 1, packet=packet)[0].flips_at is None
    assert flow_of(packet) == flow_of(packet)


def test_a_flipped_bit_is_one_bit() -> None:
    for bit in (160, 167, len(PACKET) * 8 - 1):
        changed = int.from_bytes(flipped(PACKET, bit)) ^ int.from_bytes(PACKET)
        assert changed == 1 << (len(PACKET) * 8 - 1 - bit)


def test_fragments_are_of_the_flow_of_their_first() -> None:
    later = bytearray(PACKET)
    later[6:8] = b"\x00\x10"
    later[20:24] = b"abcd"
    assert flow_of(bytes(later)) == flow_of(PACKET)
    other = udp(b"", source="10.5.1.3", destination="10.5.2.2", dport=7)
    assert flow_of(other) != flow_of(PACKET)


def test_words() -> None:
    assert ALL.words == (
        "loss 20%, delay 20ms+-5ms, reorder 30%, duplicate 10%, corrupt 40%, mtu 1300"
    )
    assert Impairment(delay_s=1.5).words == "delay 1500ms"
    assert read_impairment(ALL.to_json()) == ALL


@pytest.mark.parametrize(
    ("document", "error"),
    [
        ({"loss": 1.01}, "loss is a share of the packets: 0% to 100%"),
        ({"corrupt": -0.1}, "corrupt is a share of the packets: 0% to 100%"),
        ({"loss": math.nan}, "loss is a share of the packets: 0% to 100%"),
        ({"loss": "1%"}, "loss is no number"),
        ({"loss": True}, "loss is no number"),
        ({"loss": None}, "loss is no number"),
        ({"delay_s": 10.1}, "delay is out of range: at most 10s"),
        ({"delay_s": math.inf}, "delay is out of range: at most 10s"),
        ({"delay_s": 10**400}, "delay is out of range: at most 10s"),
        ({"delay_s": 1, "jitter_s": 2}, "the delay's +- is more than the delay itself"),
        ({"mtu": 67}, "mtu is out of range: 68 to 65507 bytes"),
        ({"mtu": 1300.5}, "mtu is no number"),
        ({"los": 0.1}, "unknown: los"),
    ],
)
def test_what_is_refused(document: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match="^" + error.replace("+", r"\+") + "$"):
        read_impairment(document)
