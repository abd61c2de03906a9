"""Drop reasons: stable numbers, stable names, and a meaning for each."""

import pytest

from tundp.wire.drop import MEANINGS, DropReason

NUMBERS = {
    "too_short": 0,
    "not_ipv4": 1,
    "bad_header_length": 2,
    "bad_total_length": 3,
    "bad_header_checksum": 4,
    "no_route": 5,
    "own_subnet": 6,
    "hop_limit_exceeded": 7,
    "too_big": 8,
    "source_mismatch": 9,
    "martian_source": 10,
    "send_forbidden": 11,
    "send_unreachable": 12,
    "send_no_buffer": 13,
    "send_failed": 14,
    "tun_down": 15,
    "tun_gone": 16,
    "tun_rejected": 17,
    "tun_failed": 18,
    "bad_vnet_header": 19,
    "destination_mismatch": 20,
}


def test_numbers_and_names_are_pinned():
    # The native engine counts by number, dashboards by name: neither may move.
    assert {reason.label: reason.value for reason in DropReason} == NUMBERS


def test_numbers_index_an_array():
    assert [reason.value for reason in DropReason] == list(range(len(DropReason)))


@pytest.mark.parametrize("reason", DropReason)
def test_every_reason_says_what_it_means_and_what_to_do(reason):
    meaning = MEANINGS[reason]
    assert len(meaning.means.split()) >= 4
    assert len(meaning.next_step.split()) >= 3
    assert not meaning.means.endswith(".")  # `status` puts the stop


def test_no_two_reasons_mean_the_same():
    assert len({meaning.means for meaning in MEANINGS.values()}) == len(DropReason)
    assert set(MEANINGS) == set(DropReason)
