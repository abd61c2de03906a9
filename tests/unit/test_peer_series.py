"""Series of single peers: bounded, each only growing, their sum what the engine counted."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tundp.choices import MtuOrigin
from tundp.engine.base import HopActivity, PathState
from tundp.engine.reach import Reach, Standing
from tundp.observe.peer_series import PeerSeries, PeerSource
from tundp.observe.status import CountersStatus, DirectionStatus

COLUMNS = ("packets_out", "bytes_out", "packets_in", "bytes_in", "drops")


class World:
    """Hops that exchange packets, and scrapes of them."""

    def __init__(self, hop_count: int, most: int) -> None:
        self.counts = np.zeros((hop_count, len(COLUMNS)), np.uint64)
        self.names: dict[int, str] = {each: f"192.0.2.{each}" for each in range(1, hop_count)}
        self.reaches: dict[int, Reach] = {}
        self.paths: dict[int, PathState] = {}
        self.series = PeerSeries(most)

    def exchange(self, hop_id: int, length: int) -> None:
        self.counts[hop_id] += np.array((1, length, 2, 2 * length, 1), np.uint64)

    def counters(self) -> CountersStatus:
        out, bytes_out, into, bytes_in, drops = (int(each) for each in self.counts.sum(axis=0))
        return CountersStatus(
            encap=DirectionStatus(packets_out=out, bytes_out=bytes_out, drops={"no_route": drops}),
            decap=DirectionStatus(packets_in=into, bytes_in=bytes_in),
        )

    def scrape(self) -> dict[tuple[str, str, str], float]:
        """By metric, peer and direction."""
        columns = {name: self.counts[:, at].copy() for at, name in enumerate(COLUMNS)}
        source = PeerSource(
            activity=lambda: HopActivity(
                **columns, last_refused_ns=np.zeros(len(self.counts), np.uint64)
            ),
            name=self.names.get,
            reaches=lambda hops: {
                each: self.reaches[each] for each in hops if each in self.reaches
            },
            paths=lambda: self.paths,
        )
        return {
            (sample.name, sample.labels["peer"], sample.labels.get("direction", "")): sample.value
            for family in self.series.collect(source, source.activity(), self.counters())
            for sample in family.samples
        }


def peers(found: dict[Any, float]) -> set[str]:
    return {peer for _, peer, _ in found}


def test_the_busiest_have_series_of_their_own() -> None:
    world = World(6, most=2)
    for hop_id, length in ((1, 10), (2, 3000), (3, 20), (4, 2000)):
        world.exchange(hop_id, length)
    found = world.scrape()
    assert peers(found) == {"192.0.2.2", "192.0.2.4", "other"}
    assert found["tundp_peer_bytes_total", "192.0.2.2", "out"] == 3000
    assert found["tundp_peer_bytes_total", "192.0.2.2", "in"] == 6000
    assert found["tundp_peer_packets_total", "other", "in"] == 4
    assert found["tundp_peer_drops_total", "other", ""] == 2
    assert found["tundp_peer_silent", "192.0.2.2", ""] == 0


def test_none_are_wanted() -> None:
    world = World(3, most=0)
    world.exchange(1, 100)
    assert world.scrape() == {}


def test_what_is_known_of_a_peer_is_exported() -> None:
    world = World(3, most=5)
    for hop_id in (1, 2):
        world.exchange(hop_id, 100)
    world.reaches = {
        1: Reach(standing=Standing.ANSWERS, since=1, rtt_s=0.00025),
        2: Reach(standing=Standing.SILENT, since=1),
    }
    world.paths = {
        1: PathState(inner_mtu=1372, mtu_origin=MtuOrigin.MEASURED, since=1.0, origin="measured")
    }
    found = world.scrape()
    assert found["tundp_peer_rtt_seconds", "192.0.2.1", ""] == 0.00025
    assert found["tundp_peer_path_mtu_bytes", "192.0.2.1", ""] == 1372
    assert found["tundp_peer_silent", "192.0.2.2", ""] == 1
    assert ("tundp_peer_rtt_seconds", "192.0.2.2", "") not in found


def test_one_that_exchanges_twice_as_much_takes_a_place() -> None:
    world = World(4, most=1)
    world.exchange(1, 1000)
    assert peers(world.scrape()) == {"192.0.2.1", "other"}
    world.exchange(2, 1500)
    assert peers(world.scrape()) == {"192.0.2.1", "other"}
    world.exchange(2, 1000)
    found = world.scrape()
    assert peers(found) == {"192.0.2.2", "other"}
    # What it exchanged before the last scrape is in `other`, and stays there.
    assert found["tundp_peer_bytes_total", "192.0.2.2", "out"] == 1000
    assert found["tundp_peer_bytes_total", "other", "out"] == 2500


steps = st.lists(
    st.one_of(
        st.tuples(st.just("exchange"), st.integers(0, 7), st.integers(1, 10_000)),
        st.tuples(st.just("gone"), st.integers(1, 7), st.just(0)),
        st.tuples(st.just("come"), st.integers(1, 7), st.integers(100, 120)),
        st.tuples(st.just("scrape"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(steps, st.integers(1, 4))
def test_sums_are_the_engines_and_no_series_goes_back(steps: Any, most: int) -> None:
    world = World(8, most)
    before: dict[Any, float] = defaultdict(float)
    for what, hop_id, value in [*steps, ("scrape", 0, 0)]:
        if what == "exchange":
            world.exchange(hop_id, value)
        elif what == "gone":
            world.names.pop(hop_id, None)
        elif what == "come":
            world.names[hop_id] = f"198.51.{hop_id}.{value}"
        else:
            found = world.scrape()
            assert len(peers(found) - {"other"}) <= most
            sums: dict[tuple[str, str], float] = defaultdict(float)
            for (name, _, direction), count in found.items():
                sums[name, direction] += count
            counted = world.counters()
            assert sums["tundp_peer_bytes_total", "out"] == counted.encap.bytes_out
            assert sums["tundp_peer_packets_total", "in"] == counted.decap.packets_in
            assert sums["tundp_peer_drops_total", ""] == counted.encap.dropped
            other = {key: count for key, count in found.items() if key[1] == "other"}
            assert all(count >= before[key] for key, count in other.items())
            stayed = {key for key in found if key in before and key[0].endswith("_total")}
            assert all(found[key] >= before[key] for key in stayed)
            before = defaultdict(float, found)


@pytest.mark.parametrize("hop_count", [0, 1])
def test_without_hops_there_is_only_the_rest(hop_count: int) -> None:
    assert peers(World(hop_count, most=3).scrape()) == {"other"}
