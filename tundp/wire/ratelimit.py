"""A token bucket for ICMP errors (RFC 1812 4.3.2.8). Time is an argument."""

from __future__ import annotations

from typing import Final

NS_PER_S: Final = 1_000_000_000
ICMP_RATE_PER_S: Final = 1000
"""ICMP errors of one node in the long run, as Linux's icmp_msgs_per_sec."""
ICMP_BURST: Final = 50
"""ICMP errors of one node at once, as Linux's icmp_msgs_burst."""


class TokenBucket:
    """At most `burst` at once and `rate_per_s` in the long run. Not thread-safe.

    Kept as the time the bucket will be full again (the generic cell rate algorithm): that is
    one number, so that the C engines can share theirs between threads. Native twin:
    tundp_may_reply.
    """

    __slots__ = ("_burst_ns", "_cost_ns", "_full_at_ns")

    def __init__(self, *, rate_per_s: int, burst: int) -> None:
        self._cost_ns = NS_PER_S // rate_per_s
        self._burst_ns = burst * self._cost_ns
        self._full_at_ns = 0

    def take(self, now_ns: int) -> bool:
        """Spend one token at `now_ns` (any monotonic clock). False means: stay silent."""
        full_at_ns = max(self._full_at_ns, now_ns) + self._cost_ns
        if full_at_ns - now_ns > self._burst_ns:
            return False
        self._full_at_ns = full_at_ns
        return True
