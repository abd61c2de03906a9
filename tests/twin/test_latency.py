"""Buckets of the latency histograms: Python and C against numbers written down."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tundp.engine import latency
from tundp.engine.native import twins

LAST = 1_048_576_000
"""2^20 us."""


@pytest.mark.parametrize("bucket", [latency.bucket, twins.latency_bucket], ids=["python", "c"])
@pytest.mark.parametrize(
    ("elapsed_ns", "number"),
    [
        (0, 0),
        (1, 0),
        (1000, 0),
        (1001, 1),
        (2000, 1),
        (2001, 2),
        (4000, 2),
        (4001, 3),
        (524_288_000, 19),
        (524_288_001, 20),
        (LAST, 20),
        (LAST + 1, 21),
        (2**64 - 1, 21),
    ],
)
def test_a_bucket_holds_its_bound(
    bucket: Callable[[int], int], elapsed_ns: int, number: int
) -> None:
    assert bucket(elapsed_ns) == number


@given(st.integers(0, 2 * LAST))
def test_both_find_the_same_bucket(elapsed_ns: int) -> None:
    assert latency.bucket(elapsed_ns) == twins.latency_bucket(elapsed_ns)


@pytest.mark.parametrize(
    ("counts", "share", "bound"),
    [
        ((), 0.5, None),
        ((0,) * 22, 0.99, None),
        ((1,) + (0,) * 21, 0.5, 1),
        ((0, 0, 0, 0, 50, 50) + (0,) * 16, 0.5, 16),
        ((0, 0, 0, 0, 50, 51) + (0,) * 16, 0.5, 32),
        ((99,) + (0,) * 20 + (1,), 0.99, 1),
        ((98,) + (0,) * 20 + (2,), 0.99, 0),
        ((0,) * 20 + (7, 0), 0.99, 1_048_576),
    ],
)
def test_a_quantile_is_a_bound(counts: Sequence[int], share: float, bound: int | None) -> None:
    assert latency.quantile_us(counts, share) == bound
