"""Drop reasons: stable numbers, stable names, and a meaning for each."""

from __future__ import annotations

import errno

import pytest

from tundp.wire.drop import DropReason, send_reason, tun_reason

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
    "hop_queue_full": 21,
    "martian_destination": 22,
    "tunnel_in_tunnel": 23,
    "source_port_mismatch": 24,
}


def test_numbers_and_names_are_pinned() -> None:
    # The native engine counts by number, dashboards by name: neither may move.
    assert {reason.label: reason.value for reason in DropReason} == NUMBERS


def test_numbers_index_an_array() -> None:
    assert [reason.value for reason in DropReason] == list(range(len(DropReason)))


@pytest.mark.parametrize("reason", DropReason)
def test_every_reason_says_what_it_means_and_what_to_do(reason: DropReason) -> None:
    assert len(reason.means.split()) >= 4
    assert len(reason.next_step.split()) >= 3
    assert not reason.means.endswith(".")  # `status` puts the stop


@pytest.mark.parametrize("reason", DropReason)
def test_advice_holds_for_every_engine_and_installation(reason: DropReason) -> None:
    # Only the reference engine logs single packets; devices and flags differ between nodes.
    text = f"{reason.means} {reason.next_step}"
    for never in ("logged", "-v=", "--", "flannel0", "flannel1"):
        assert never not in text


def test_no_two_reasons_mean_the_same() -> None:
    assert len({reason.means for reason in DropReason}) == len(DropReason)


SEND = {
    "EPERM": DropReason.SEND_FORBIDDEN,
    "EACCES": DropReason.SEND_FORBIDDEN,
    "ENETUNREACH": DropReason.SEND_UNREACHABLE,
    "EHOSTUNREACH": DropReason.SEND_UNREACHABLE,
    "ENETDOWN": DropReason.SEND_UNREACHABLE,
    "EADDRNOTAVAIL": DropReason.SEND_UNREACHABLE,
    "EAGAIN": DropReason.HOP_QUEUE_FULL,
    "ENOBUFS": DropReason.SEND_NO_BUFFER,
    "ENOMEM": DropReason.SEND_NO_BUFFER,
    "EMSGSIZE": DropReason.TOO_BIG,
}
TUN = {
    "EIO": DropReason.TUN_DOWN,
    "EBADFD": DropReason.TUN_GONE,
    "EBADF": DropReason.TUN_GONE,
    "EINVAL": DropReason.TUN_REJECTED,
}


@pytest.mark.parametrize("name", errno.errorcode.values())
def test_reason_of_each_errno(name: str) -> None:
    number = getattr(errno, name)
    name = errno.errorcode[number]  # EWOULDBLOCK is EAGAIN
    assert send_reason(number) is SEND.get(name, DropReason.SEND_FAILED)
    assert tun_reason(number) is TUN.get(name, DropReason.TUN_FAILED)


def test_a_refusal_without_an_errno_has_a_reason() -> None:
    assert send_reason(None) is DropReason.SEND_FAILED
    assert tun_reason(None) is DropReason.TUN_FAILED
