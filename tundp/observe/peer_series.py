"""Prometheus series of single peers: of so many, and of all others together.

Labels are PublicIPs, never an address of a pod. Which peers have series of their own: those that
exchanged the most bytes. One that gets its series later begins there at 0, since `other` has what
it exchanged before and must not go back; so sums over `peer` are those of the engine at any time,
and every series only grows. A peer gives way to one that exchanged twice as much; what it
exchanged is in `other` from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from tundp.engine.base import HopActivity, PathState
from tundp.engine.reach import Reach, Standing
from tundp.observe.status import CountersStatus

OTHER: Final = "other"
_COLUMNS: Final = ("packets_out", "packets_in", "bytes_out", "bytes_in", "drops")
_Counts = dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSource:
    """What the series are made of; each is asked on the event loop."""

    activity: Callable[[], HopActivity]
    name: Callable[[int], str | None]
    """The PublicIP of the peers at a hop; None if none is there."""
    reaches: Callable[[Collection[int]], Mapping[int, Reach]]
    """Of these hops."""
    paths: Callable[[], Mapping[int, PathState]]


@dataclass(slots=True)
class _Shown:
    """A peer with series of its own."""

    name: str
    base: _Counts
    """What is left in `other` of it."""


class PeerSeries:
    """See the module."""

    def __init__(self, most: int) -> None:
        """most: peers with series of their own; 0: no series of peers at all."""
        self._most = most
        self._shown: dict[int, _Shown] = {}
        self._before: HopActivity | None = None
        self._other: _Counts = dict.fromkeys(_COLUMNS, 0)

    def collect(
        self, source: PeerSource, activity: HopActivity, counters: CountersStatus
    ) -> Iterator[Any]:
        """The families of one scrape. counters: of the engine, read after `activity`."""
        if not self._most:
            return
        self._choose(activity, source.name)
        self._before = activity
        counts = {
            each.name: {
                name: int(getattr(activity, name)[hop_id]) - each.base[name] for name in _COLUMNS
            }
            for hop_id, each in self._shown.items()
        }
        counts[OTHER] = self._rest(counts, counters)
        yield from _counted(counts)
        yield from self._states(source)

    def _rest(self, counts: Mapping[str, _Counts], counters: CountersStatus) -> _Counts:
        """What all others exchanged; never less than it was said to be."""
        encap, decap = counters.encap, counters.decap
        totals = {
            "packets_out": encap.packets_out,
            "bytes_out": encap.bytes_out,
            "packets_in": decap.packets_in,
            "bytes_in": decap.bytes_in,
            "drops": encap.dropped + decap.dropped,
        }
        for name, total in totals.items():
            rest = total - sum(each[name] for each in counts.values())
            self._other[name] = max(self._other[name], rest)
        return dict(self._other)

    def _choose(self, activity: HopActivity, name_of: Callable[[int], str | None]) -> None:
        """Forget peers that are gone, fill what is free, and let at most one give way."""
        count = len(activity.bytes_out)
        for hop_id, each in list(self._shown.items()):
            if hop_id >= count or name_of(hop_id) != each.name:
                del self._shown[hop_id]
        used = (activity.bytes_out + activity.bytes_in).astype(np.int64)
        used[:1] = 0  # packets without a hop
        candidates = used.copy()
        candidates[list(self._shown)] = 0
        names = {each.name for each in self._shown.values()}
        for hop_id in _largest(candidates, self._most):
            name = name_of(hop_id)
            if name is None or name in names:
                continue
            if len(self._shown) >= self._most:
                least = min(self._shown, key=lambda each: int(used[each]))
                if used[hop_id] > 2 * used[least]:
                    del self._shown[least]
                    self._shown[hop_id] = _Shown(name, self._counted_before(hop_id, activity))
                return
            names.add(name)
            self._shown[hop_id] = _Shown(name, self._counted_before(hop_id, activity))

    def _counted_before(self, hop_id: int, now: HopActivity) -> _Counts:
        """What `other` has of a hop: all of it up to the last scrape."""
        before = self._before
        if before is None or hop_id >= len(before.bytes_out):
            return dict.fromkeys(_COLUMNS, 0)
        counts = {name: int(getattr(before, name)[hop_id]) for name in _COLUMNS}
        # The hop may stand for another endpoint since, and have begun anew.
        is_same = all(int(getattr(now, name)[hop_id]) >= counts[name] for name in _COLUMNS)
        return counts if is_same else dict.fromkeys(_COLUMNS, 0)

    def _states(self, source: PeerSource) -> Iterator[Any]:
        silent = GaugeMetricFamily(
            "tundp_peer_silent",
            "1 if the peer was sent packets lately and does not answer, or cannot be sent to.",
            labels=["peer"],
        )
        rtt = GaugeMetricFamily(
            "tundp_peer_rtt_seconds",
            "Round-trip time of the last echo request to the peer that was answered.",
            labels=["peer"],
        )
        mtu = GaugeMetricFamily(
            "tundp_peer_path_mtu_bytes",
            "Largest inner packet to the peer, where that is less than the device's MTU.",
            labels=["peer"],
        )
        reaches, paths = source.reaches(self._shown), source.paths()
        for hop_id, each in self._shown.items():
            reach, path = reaches.get(hop_id), paths.get(hop_id)
            standing = Standing.ANSWERS if reach is None else reach.standing
            silent.add_metric([each.name], standing.is_trouble)
            if reach is not None and reach.rtt_s is not None:
                rtt.add_metric([each.name], reach.rtt_s)
            if path is not None and path.inner_mtu is not None:
                mtu.add_metric([each.name], path.inner_mtu)
        yield from (silent, rtt, mtu)


def _largest(values: Any, count: int) -> list[int]:
    """Places of the largest values above 0, the largest first."""
    count = min(count, len(values))
    if not count:
        return []
    places = np.argpartition(values, len(values) - count)[-count:]
    ordered = places[np.argsort(values[places])[::-1]]
    return [int(each) for each in ordered if values[each] > 0]


def _counted(counts: Mapping[str, _Counts]) -> Iterator[Any]:
    packets = CounterMetricFamily(
        "tundp_peer_packets",
        "Packets sent to the peer (out) and received from it (in).",
        labels=["peer", "direction"],
    )
    octets = CounterMetricFamily(
        "tundp_peer_bytes", "Bytes of the inner packets of those.", labels=["peer", "direction"]
    )
    drops = CounterMetricFamily(
        "tundp_peer_drops",
        "Packets to the peer or from it that were dropped; of `other` those without a peer, too.",
        labels=["peer"],
    )
    for name, each in counts.items():
        for direction in ("out", "in"):
            packets.add_metric([name, direction], each[f"packets_{direction}"])
            octets.add_metric([name, direction], each[f"bytes_{direction}"])
        drops.add_metric([name], each["drops"])
    yield from (packets, octets, drops)
