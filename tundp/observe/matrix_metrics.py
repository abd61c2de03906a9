"""The answer of `tundp matrix` as Prometheus text, for a textfile collector.

Series of single peers are bounded as those of the daemon are (observe/peer_series.py): the worst
first; all peers are in the counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily

from tundp.observe.matrix import Cell, Matrix, MatrixNode

PEERS: Final = 50
"""Peers with series of their own, unless --metrics-peers says otherwise."""


def text(found: Matrix, most: int) -> str:
    """The exposition text. most: peers with series of their own."""
    registry = CollectorRegistry()
    registry.register(_Once(list(_families(found, most))))
    return bytes(generate_latest(registry)).decode()


class _Once:
    """A collector of what is known already. See prometheus_client."""

    def __init__(self, families: Sequence[Any]) -> None:
        self._families = families

    def collect(self) -> Sequence[Any]:
        """The families."""
        return self._families


def _families(found: Matrix, most: int) -> Iterator[Any]:
    states = {"answers": 0, "silent": 0, "not_asked": 0}
    for peer in found.peers:
        states[_state(peer)] += 1
    peers = GaugeMetricFamily(
        "tundp_matrix_peers",
        "Peers by whether they answer echo requests through the overlay.",
        labels=["state"],
    )
    for state, count in states.items():
        peers.add_metric([state], count)
    yield peers
    cells = Counter(each.cell for row in found.rows for each in row.reached.values())
    pairs = GaugeMetricFamily(
        "tundp_matrix_pairs",
        "Ordered pairs of nodes by what the first says of the second's packets; pairs of which"
        " nothing is known are in neither.",
        labels=["state"],
    )
    for cell in (Cell.HEARD, Cell.SILENT):
        pairs.add_metric([cell.value], cells[cell])
    yield pairs
    yield GaugeMetricFamily(
        "tundp_matrix_seconds", "How long it took to ask all.", value=found.took_s
    )
    if most:
        yield from _of_peers(found.peers[:most])


def _of_peers(peers: Sequence[MatrixNode]) -> Iterator[Any]:
    reached = _family("tundp_matrix_peer_reached", "1 if it answers through the overlay.")
    underlay = _family(
        "tundp_matrix_peer_underlay_rtt_seconds", "Round-trip time of an ICMP echo to its PublicIP."
    )
    overlay = _family(
        "tundp_matrix_peer_rtt_seconds",
        "Mean round-trip time of ICMP echoes to its TUN address, through the overlay.",
    )
    loss = _family(
        "tundp_matrix_peer_loss_ratio", "Part of those echo requests that was not answered."
    )
    mtu = _family(
        "tundp_matrix_peer_path_mtu_bytes", "Largest inner packet that pods are told to send to it."
    )
    for peer in peers:
        if not peer.is_asked:
            continue
        name = [str(peer.public_ip)]
        reached.add_metric(name, peer.is_reached)
        if peer.underlay_rtt_ms is not None:
            underlay.add_metric(name, peer.underlay_rtt_ms / 1e3)
        if peer.overlay_rtt_ms is not None:
            overlay.add_metric(name, peer.overlay_rtt_ms / 1e3)
        if peer.sent:
            loss.add_metric(name, peer.lost / peer.sent)
        if peer.path_mtu is not None:
            mtu.add_metric(name, peer.path_mtu)
    yield from (reached, underlay, overlay, loss, mtu)


def _family(name: str, about: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, about, labels=["peer"])


def _state(peer: MatrixNode) -> str:
    if not peer.is_asked:
        return "not_asked"
    return "answers" if peer.is_reached else "silent"
