"""Token buckets for ICMP errors (RFC 1812 4.3.2.8). Time is an argument.

A node has a bucket for answers to each of its own pods, and apart from them one for the answers
that packets of each peer cause: a flood uses up nobody else's answers. Peers share wire buckets
only where there are more peers than buckets, pods where their addresses end in the same octet;
whoever is no peer has one for all.
"""

from __future__ import annotations

from typing import Final

NS_PER_S: Final = 1_000_000_000
ICMP_RATE_PER_S: Final = 1000
"""ICMP errors to one of the node's own pods in the long run, as Linux's icmp_msgs_per_sec."""
ICMP_WIRE_RATE_PER_S: Final = 200
"""ICMP errors about packets of one peer in the long run."""
ICMP_BURST: Final = 50
"""ICMP errors of one bucket at once, as Linux's icmp_msgs_burst."""
ICMP_LOCAL_BUCKETS: Final = 256
"""Buckets for answers to the node's own pods: one for each address of a /24."""
ICMP_WIRE_BUCKETS: Final = 64
"""Buckets for answers to the wire; the first is for packets of whoever is no peer."""


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


def wire_bucket(hop_id: int) -> int:
    """Which wire bucket an answer about a packet of this hop takes from; hop 0 is no peer."""
    return 1 + hop_id % (ICMP_WIRE_BUCKETS - 1) if hop_id else 0


def local_bucket(answer: bytes | memoryview) -> int:
    """Which local bucket an answer to one of the node's own pods takes from: by its address."""
    return answer[19]


def icmp_buckets() -> list[TokenBucket]:
    """The buckets of one node: ICMP_LOCAL_BUCKETS for its own pods, then those for the wire."""
    rates = [ICMP_RATE_PER_S] * ICMP_LOCAL_BUCKETS + [ICMP_WIRE_RATE_PER_S] * ICMP_WIRE_BUCKETS
    return [TokenBucket(rate_per_s=rate, burst=ICMP_BURST) for rate in rates]
