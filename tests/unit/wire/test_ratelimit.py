"""The token bucket, with a clock made of integers."""

from __future__ import annotations

import pytest

from tests.packets import ipv4
from tundp.wire.ratelimit import TokenBucket, icmp_buckets, local_bucket, wire_bucket

MS = 1_000_000
S = 1000 * MS


def taken(bucket: TokenBucket, tries: int, now_ns: int) -> int:
    return sum(bucket.take(now_ns) for _ in range(tries))


@pytest.mark.parametrize("start", [0, 5 * S, 2**62])
def test_a_full_burst_at_once_and_no_more(start: int) -> None:
    bucket = TokenBucket(rate_per_s=1000, burst=50)
    assert taken(bucket, 200, start) == 50


def test_refills_at_the_rate() -> None:
    bucket = TokenBucket(rate_per_s=10, burst=3)
    assert taken(bucket, 9, 0) == 3
    assert not bucket.take(99 * MS), "a tenth of a second is not over yet"
    assert bucket.take(100 * MS)
    assert not bucket.take(100 * MS)
    assert taken(bucket, 9, 300 * MS) == 2


def test_fractions_of_a_token_are_kept() -> None:
    # Looking often must not cost the credit of the time between two looks.
    bucket = TokenBucket(rate_per_s=10, burst=1)
    assert bucket.take(0)
    answers = [bucket.take(at * 10 * MS) for at in range(1, 21)]
    assert [at for at, answer in enumerate(answers, 1) if answer] == [10, 20]


def test_never_more_than_the_burst_after_a_long_silence() -> None:
    bucket = TokenBucket(rate_per_s=1000, burst=5)
    bucket.take(0)
    assert taken(bucket, 100, 3600 * S) == 5


def test_long_run_rate() -> None:
    bucket = TokenBucket(rate_per_s=1000, burst=50)
    granted = sum(bucket.take(at * 100_000) for at in range(100_000))  # 10 s, 10 kHz
    assert 10_000 <= granted <= 10_050


def test_readings_out_of_order_cost_nothing_and_give_nothing() -> None:
    # Two threads of one node read the clock one after the other, and ask the other way round.
    bucket = TokenBucket(rate_per_s=10, burst=2)
    assert taken(bucket, 5, 10 * S) == 2
    assert not bucket.take(10 * S - MS), "no credit for time running back"
    assert not bucket.take(10 * S + 99 * MS)
    assert bucket.take(10 * S + 100 * MS)
    assert not bucket.take(10 * S + 100 * MS)


def test_a_reading_out_of_order_spends_what_is_there() -> None:
    bucket = TokenBucket(rate_per_s=10, burst=2)
    assert bucket.take(10 * S)
    assert not bucket.take(10 * S - 101 * MS), "what came back since is not spent before"
    assert bucket.take(10 * S)
    assert not bucket.take(10 * S)


def test_each_peer_has_a_bucket_and_whoever_is_none_another() -> None:
    assert wire_bucket(0) == 0
    of_peers = [wire_bucket(hop_id) for hop_id in range(2, 2 + 63)]
    assert sorted(of_peers) == list(range(1, 64))
    assert wire_bucket(2 + 63) == wire_bucket(2)
    assert len(icmp_buckets()) == 256 + 64


def test_each_pod_of_a_node_has_a_bucket() -> None:
    answers = [ipv4(b"", 1, destination=f"10.5.1.{host}") for host in range(256)]
    assert [local_bucket(answer) for answer in answers] == list(range(256))


def test_rates_of_the_buckets() -> None:
    (local, *_), (strangers, *peers) = icmp_buckets()[:256], icmp_buckets()[256:]
    assert taken(local, 200, 0) == taken(strangers, 200, 0) == taken(peers[0], 200, 0) == 50
    assert taken(local, 200, S // 10) == 50, "1000 a second: full again"
    assert taken(strangers, 200, S // 10) == 20, "200 a second"
    assert taken(peers[-1], 200, S // 10) == 50, "nobody else's"
