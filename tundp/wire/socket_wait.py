"""The time a datagram waited in the UDP socket, from the kernel's receive timestamp.

The kernel stamps a packet with CLOCK_REALTIME where it enters the IP stack (SO_TIMESTAMPING_NEW,
asm-generic/socket.h). That clock may be set, so it is read together with CLOCK_MONOTONIC after each
receive: where the two have drifted apart since the receive before, the wait is not known.

A packet that came before the kernel began to stamp, which it does some time after it was asked
(net_enable_timestamp, net/core/dev.c, defers it), has no stamp, or, should anybody have asked for
SO_TIMESTAMP as well, the time of the receive for one (__sock_recv_timestamp, net/socket.c). So
stamps count from the first one on that is older than the receive that brought it: a socket is a
queue, and all behind were stamped when they came. C twin: native/src/socket_wait.h.
"""

from __future__ import annotations

from typing import Final, NamedTuple

WAIT_MAX: Final = 0xFFFFFFFF
"""Nanoseconds: the longest wait a record can hold; it stands for longer ones, too."""
STEP_NS: Final = 1_000_000
"""A change of CLOCK_REALTIME against CLOCK_MONOTONIC that is a step, not the reading's error."""
SLEW_SHIFT: Final = 10
"""The clock may be slewed by 1 / 2^SLEW_SHIFT: adjtimex(2) allows the kernel's NTP 500 ppm."""


class Clocks(NamedTuple):
    """Two clocks read together, in nanoseconds."""

    real_ns: int
    """CLOCK_REALTIME."""
    monotonic_ns: int
    """CLOCK_MONOTONIC."""


def wait_ns(stamp_ns: int, now: Clocks, before: Clocks) -> int:
    """The time since a receive timestamp, in nanoseconds: 1 to WAIT_MAX, or 0 for not known.

    now: read after the receive. before: after the one before it, or when timestamps were asked for.
    """
    elapsed = now.monotonic_ns - before.monotonic_ns
    drift = (now.real_ns - before.real_ns) - elapsed
    if abs(drift) > STEP_NS + (elapsed >> SLEW_SHIFT):
        return 0
    return min(max(now.real_ns - stamp_ns, 1), WAIT_MAX)


class SocketWaits:
    """The waits of one socket's datagrams."""

    def __init__(self) -> None:
        self.begin(Clocks(0, 0))

    def begin(self, now: Clocks) -> None:
        """Timestamps were asked for."""
        self._before = self._now = now
        self._called_ns = now.real_ns
        self._is_stamping = False

    def call(self, real_ns: int) -> None:
        """A receive begins. real_ns: CLOCK_REALTIME."""
        self._called_ns = real_ns

    def returned(self, now: Clocks) -> None:
        """It has brought something."""
        self._before, self._now = self._now, now

    def wait_ns(self, stamp_ns: int) -> int:
        """The wait of a datagram it brought: 1 to WAIT_MAX, or 0 for not known."""
        self._is_stamping = self._is_stamping or stamp_ns < self._called_ns
        return wait_ns(stamp_ns, self._now, self._before) if self._is_stamping else 0
