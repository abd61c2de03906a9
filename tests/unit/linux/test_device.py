"""Lengths of the queues that bridge a gap."""

from __future__ import annotations

import pytest

from tundp.linux.device import queue_len_for


@pytest.mark.parametrize(
    ("memory_gib", "queue_len"),
    [(0.25, 1_000), (1, 1_024), (4, 4_096), (9.5, 9_728), (10, 10_000), (1024, 10_000)],
)
def test_super_packets_take_a_sixteenth_of_memory_at_most(
    memory_gib: float, queue_len: int
) -> None:
    # But for tiny hosts: what was the length before, whatever the host.
    assert queue_len_for(int(memory_gib * (1 << 30))) == queue_len
