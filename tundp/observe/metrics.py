"""Prometheus metrics: names and units as its naming rules have them, few labels.

prometheus_client writes the format and the process's own figures; the rest is read off
the node's status at each scrape, so that nothing is counted twice. Every series is there
from the start, drops of every reason included. No series per peer: there may be 65,000.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

import tundp
from tundp.lease.claim import LeaseState
from tundp.observe.health import Check
from tundp.wire.drop import DropReason

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
_APPLY_BUCKETS: Final = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
_COUNTERS: Final = (
    ("socket_overflows", "Datagrams lost because the UDP socket's buffer was full."),
    ("source_mismatches", "Datagrams whose sender does not hold the lease of their source."),
    ("destination_mismatches", "Datagrams whose inner destination is not this node's."),
    ("icmp_rate_limited", "ICMP errors held back by the rate limit."),
    ("icmp_to_tun", "ICMP errors written to the TUN."),
    ("icmp_to_peers", "ICMP errors sent to peers."),
    ("icmp_undeliverable", "ICMP errors that could not be delivered."),
    ("offload_fallbacks", "Super-packets the kernel refused, sent one by one instead."),
    ("fragments_out", "Fragments sent for packets above a path MTU."),
    ("send_waits", "Times the UDP socket was full and reading the TUN paused."),
)


class Metrics:
    """The registry of one daemon. `status` is None until there is a node."""

    def __init__(self, ready: Callable[[], list[Check]]) -> None:
        self.status: Callable[[], dict[str, Any]] | None = None
        self._ready = ready
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self.route_apply = Histogram(
            "tundp_route_apply_seconds",
            "From an event of the lease store to routes the packet threads use.",
            buckets=_APPLY_BUCKETS,
            registry=self._registry,
        )
        self._registry.register(self)

    def render(self) -> bytes:
        """The exposition text, as CONTENT_TYPE says."""
        return bytes(generate_latest(self._registry))

    def describe(self) -> list[Any]:
        """See prometheus_client: nothing needs to be collected to register."""
        return []

    def collect(self) -> Iterator[Any]:
        """See prometheus_client."""
        yield InfoMetricFamily("tundp_build", "Version.", value={"version": tundp.__version__})
        checks = self._ready()
        yield _gauge("tundp_ready", "1 if every check holds.", all(c.is_ok for c in checks))
        each = GaugeMetricFamily("tundp_check_ok", "1 if this check holds.", labels=["check"])
        for check in checks:
            each.add_metric([check.name], check.is_ok)
        yield each
        if self.status is not None:
            status = self.status()
            yield from _traffic(status["counters"])
            yield from _control(status)


def _traffic(counters: dict[str, Any]) -> Iterator[Any]:
    packets = CounterMetricFamily(
        "tundp_packets", "Packets that came in, by direction.", labels=["direction"]
    )
    forwarded = CounterMetricFamily(
        "tundp_forwarded_packets", "Packets that went out again.", labels=["direction"]
    )
    octets = CounterMetricFamily(
        "tundp_bytes", "Bytes of inner packets that went out.", labels=["direction"]
    )
    drops = CounterMetricFamily(
        "tundp_drops", "Packets dropped, by reason.", labels=["direction", "reason"]
    )
    for direction in ("encap", "decap"):
        counted = counters[direction]
        packets.add_metric([direction], counted["packets_in"])
        forwarded.add_metric([direction], counted["packets_out"])
        octets.add_metric([direction], counted["bytes_out"])
        for reason in DropReason:
            drops.add_metric([direction, reason.label], counted["drops"].get(reason.label, 0))
    yield from (packets, forwarded, octets, drops)
    for name, text in _COUNTERS:
        yield CounterMetricFamily(f"tundp_{name}", text, value=counters.get(name, 0))
    errors = CounterMetricFamily(
        "tundp_kernel_refusals", "System calls of the packet path refused.", labels=["errno"]
    )
    for name, count in counters["errnos"].items():
        errors.add_metric([name], count)
    yield errors


def _control(status: dict[str, Any]) -> Iterator[Any]:
    lease = status["lease"]
    store = status["store"]
    state = GaugeMetricFamily("tundp_lease_state", "1 for the lease's state.", labels=["state"])
    for each in LeaseState:
        state.add_metric([each.value], lease["state"] == each.value)
    yield state
    yield _gauge(
        "tundp_lease_expiry_timestamp_seconds",
        "When the lease expires; 0 for never or unknown.",
        lease["expires_at"] or 0,
    )
    yield _gauge("tundp_store_up", "1 if the lease store answers.", store["is_answering"])
    yield _gauge(
        "tundp_etcd_last_sync_timestamp_seconds",
        "When the leases were last known to be those of the store.",
        store["synced_at"] or 0,
    )
    yield _gauge("tundp_store_revision", "Revision of the leases.", store["revision"])
    yield _gauge("tundp_peers", "Leases packets are sent to.", len(status["peers"]))
    yield _gauge("tundp_refused_leases", "Leases that are no peers.", len(status["refused"]))
    yield _gauge("tundp_bad_entries", "Entries nobody can read.", len(status["bad_entries"]))
    yield _gauge("tundp_start_timestamp_seconds", "When the daemon started.", status["started_at"])
    yield _gauge("tundp_fib_generation", "Generation of the routes.", status["generation"])
    yield _gauge("tundp_mtu_bytes", "MTU of the TUN.", status["tun"]["mtu"])


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)
