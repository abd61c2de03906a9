"""The wait of a datagram by its timestamp, also when the clock is set meanwhile; Python and C."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tundp.engine.native import twins
from tundp.wire import socket_wait
from tundp.wire.socket_wait import Clocks, SocketWaits

SECOND = 1_000_000_000
UNIX = 1_700_000_000 * SECOND
UP = 5_000 * SECOND
BOTH = pytest.mark.parametrize("wait_ns", [socket_wait.wait_ns, twins.wait_ns], ids=["python", "c"])
Wait = Callable[[int, Clocks, Clocks], int]


@BOTH
@pytest.mark.parametrize(
    ("stamp", "apart", "real_moved", "expected"),
    [
        (-31_000, SECOND, SECOND, 31_000),
        (-31_000, 0, 0, 31_000),
        (-1, SECOND, SECOND, 1),
        (0, SECOND, SECOND, 1),
        (+900, SECOND, SECOND, 1),
        (-(2**32 - 2), SECOND, SECOND, 2**32 - 2),
        (-(2**32 - 1), SECOND, SECOND, 2**32 - 1),
        (-(2**32), SECOND, SECOND, 2**32 - 1),
        (-3600 * SECOND, SECOND, SECOND, 2**32 - 1),
        (-31_000, SECOND, SECOND + 1_976_562, 31_000),
        (-31_000, SECOND, SECOND + 1_976_563, 0),
        (-31_000, SECOND, SECOND - 1_976_562, 31_000),
        (-31_000, SECOND, SECOND - 1_976_563, 0),
        (-31_000, SECOND, -3600 * SECOND, 0),
        (3600 * SECOND, SECOND, -3600 * SECOND, 0),
        (-3600 * SECOND, SECOND, 3600 * SECOND, 0),
    ],
    ids=[
        "31us", "twice-at-once", "1ns", "none", "stamp-ahead", "just-fits", "longest",
        "longer", "an-hour", "slewed-forward", "stepped-forward-2ms", "slewed-back",
        "stepped-back-2ms", "set-back-an-hour", "set-back-behind-the-stamp", "set-forward-an-hour",
    ],
)  # fmt: skip
def test_wait(wait_ns: Wait, stamp: int, apart: int, real_moved: int, expected: int) -> None:
    """1 / 1024 of the second between two readings, and 1 ms, may be slew and error of reading."""
    before = Clocks(UNIX, UP)
    now = Clocks(UNIX + real_moved, UP + apart)
    assert wait_ns(now.real_ns + stamp, now, before) == expected


def test_a_stamp_of_the_receive_itself_is_no_wait() -> None:
    """What came before the kernel began to stamp has the receive's time."""
    waits = SocketWaits()
    waits.begin(Clocks(UNIX, UP))

    def wait(stamp: int, called: int, returned: int) -> int:
        waits.call(UNIX + called)
        waits.returned(Clocks(UNIX + returned, UP + returned))
        return waits.wait_ns(UNIX + stamp)

    assert wait(1_005, 1_000, 1_010) == 0
    assert wait(2_000, 2_000, 2_010) == 0
    assert wait(2_999, 3_000, 3_010) == 11
    # From now on that is one that came during the call.
    assert wait(4_005, 4_000, 4_010) == 5
    waits.begin(Clocks(UNIX + 5_000, UP + 5_000))
    assert wait(5_105, 5_100, 5_110) == 0
