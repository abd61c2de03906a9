"""MTU arithmetic, with literal sums."""

from __future__ import annotations

import pytest

from tundp.wire import overhead


@pytest.mark.parametrize(
    ("outer", "inner", "breaks"),
    [
        (1500, 1472, "flannel's own number for Ethernet: both ends of a mixed cluster must agree"),
        (9001, 8973, "jumbo frames"),
        (96, 68, "the least IPv4 allows"),
        (65535, 65507, "the most one UDP datagram carries"),
        (65536, 65507, "loopback's MTU is larger than an IPv4 packet can be"),
        (0, -28, "the caller sees how far below zero it is"),
    ],
)
def test_inner_mtu(outer: int, inner: int, breaks: str) -> None:
    assert overhead.inner_mtu(outer) == inner, breaks


def test_constants_spelled_out() -> None:
    assert overhead.OVERHEAD == 20 + 8
    assert overhead.MAX_DATAGRAM_LEN == 65507


@pytest.mark.parametrize(("link", "tun"), [(1500, 1472), (96, 68), (65536, 65507)])
def test_tun_mtu(link: int, tun: int) -> None:
    assert overhead.tun_mtu(link) == tun


@pytest.mark.parametrize("link", [95, 68, 28, 1])
def test_tun_mtu_too_small_for_ipv4(link: int) -> None:
    assert overhead.tun_mtu(link) is None
