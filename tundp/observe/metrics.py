"""Prometheus metrics: names and units as its naming rules have them, few labels.

prometheus_client writes the format and the process's own figures; the rest is read off the
daemon's summary at each scrape, so that nothing is counted twice. Every series is there from
the start, drops of every reason included. Of single peers there are series of the busiest few
(peer_series.py), because there may be 65,000: how many paths are narrow is counted, which ones they
are tells `tundp status`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)

import tundp
from tundp.engine import latency
from tundp.finding import Finding, Verdict, failures
from tundp.lease.claim import LeaseState
from tundp.linux.obstacles.look import IDS as OBSTACLES
from tundp.linux.obstacles.look import SUMMARY as LOOKED
from tundp.observe.counters import BREAKDOWNS, sentence, spec_of
from tundp.observe.peer_series import PeerSeries, PeerSource
from tundp.observe.status import (
    BackendStatus,
    CountersStatus,
    EngineStatus,
    KernelStatus,
    RoutingStatus,
    Status,
)
from tundp.wire.drop import DropReason

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
_APPLY_BUCKETS: Final = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
_LAG_BUCKETS: Final = tuple(bound / 1e6 for bound in latency.BOUNDS_US)
_OFFLOAD_STATES: Final = ("in_use", "disabled")


class Metrics:
    """The registry of one daemon. `summary` is None until there is a node."""

    def __init__(
        self,
        ready: Callable[[], list[Finding]],
        task_failures: Callable[[], Mapping[str, int]] = dict,
        *,
        peers_max: int = 0,
    ) -> None:
        """task_failures: how often each task of the daemon has been ended by a bug, by name.

        peers_max: peers with series of their own.
        """
        self.summary: Callable[[], Status] | None = None
        self.netlink: Callable[[], tuple[int, int]] | None = None
        """Requests and dumps asked of the kernel's netlink so far."""
        self.peers: PeerSource | None = None
        """What series of single peers are made of; None until there is a node with an engine."""
        self._peer_series = PeerSeries(peers_max)
        self._ready = ready
        self._task_failures = task_failures
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self.route_apply = Histogram(
            "tundp_route_apply_seconds",
            "From an event of the lease store to routes the packet threads use.",
            buckets=_APPLY_BUCKETS,
            registry=self._registry,
        )
        self.loop_lag = Histogram(
            "tundp_event_loop_lag_seconds",
            "How late the event loop came back from a pause of 1 s or less: leases, netlink and the"
            " admin socket wait so long, packets only with the reference engine.",
            buckets=_LAG_BUCKETS,
            registry=self._registry,
        )
        self._registry.register(self)

    def render(self) -> bytes:
        """The exposition text, as CONTENT_TYPE says."""
        return bytes(generate_latest(self._registry))

    def describe(self) -> list[Any]:
        """The names are not known before they are collected. See prometheus_client."""
        return []

    def collect(self) -> Iterator[Any]:
        """See prometheus_client."""
        yield InfoMetricFamily("tundp_build", "Version.", value={"version": tundp.__version__})
        findings = self._ready()
        yield _gauge("tundp_ready", "1 if every check holds.", not failures(findings))
        each = GaugeMetricFamily("tundp_check_ok", "1 if this check holds.", labels=["check"])
        # Findings may share an id, samples must not share labels.
        failing = {finding.id for finding in failures(findings)}
        for finding_id in dict.fromkeys(finding.id for finding in findings):
            if finding_id not in (*OBSTACLES, LOOKED):
                each.add_metric([finding_id], finding_id not in failing)
        yield each
        yield from _obstacles(findings)
        if self.netlink is not None:
            asked = CounterMetricFamily(
                "tundp_netlink_requests",
                "Questions to the kernel about links, addresses and routes: single ones, lists.",
                labels=["kind"],
            )
            for kind, count in zip(("single", "dump"), self.netlink(), strict=True):
                asked.add_metric([kind], count)
            yield asked
        failed = CounterMetricFamily(
            "tundp_task_failures", "Times a bug ended a task, by task.", labels=["task"]
        )
        for task, count in self._task_failures().items():
            failed.add_metric([task], count)
        yield failed
        if self.summary is not None:
            # Before the counters: what the rest of the peers exchanged is never less than nothing.
            activity = None if self.peers is None else self.peers.activity()
            status = self.summary()
            if status.counters is not None:
                yield from _traffic(status.counters)
                if self.peers is not None and activity is not None:
                    series = self._peer_series
                    yield from series.collect(self.peers, activity, status.counters)
            if status.kernel is not None:
                yield from _kernel(status.kernel)
            yield from _control(status)


def _obstacles(findings: Sequence[Finding]) -> Iterator[Any]:
    """What is in the way, by kind. There is no series before the first look."""
    looked = next((each for each in findings if each.id == LOOKED), None)
    family = GaugeMetricFamily(
        "tundp_obstacle",
        "How many things of this kind drop or divert packets, or may. tundp status names them.",
        labels=["id"],
    )
    if looked is not None and looked.facts:
        for name in OBSTACLES:
            count = sum(each.id == name and each.verdict is not Verdict.NOTE for each in findings)
            family.add_metric([name.removeprefix("obstacle.")], count)
    yield family


def _traffic(counters: CountersStatus) -> Iterator[Any]:
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
    for direction, counted in counters.directions:
        packets.add_metric([direction], counted.packets_in)
        forwarded.add_metric([direction], counted.packets_out)
        octets.add_metric([direction], counted.bytes_out)
        for reason in DropReason:
            drops.add_metric([direction, reason.label], counted.drops.get(reason.label, 0))
    yield from (packets, forwarded, octets, drops)
    yield _latency(counters)
    for name, value in counters.totals.items():
        spec = spec_of(name)
        if spec is not None and spec.metric is not None:
            yield CounterMetricFamily(spec.metric, sentence(spec.means), value=value)
    for name, counts in counters.by_reason.items():
        about = BREAKDOWNS[name]
        family = CounterMetricFamily(about.metric, sentence(about.means), labels=[about.label])
        for reason_name, count in counts.items():
            family.add_metric([reason_name], count)
        yield family


def _latency(counters: CountersStatus) -> HistogramMetricFamily:
    family = HistogramMetricFamily(
        "tundp_engine_seconds",
        "Time packets were in the engine, of one batch in 8: from its first read or receive to its"
        " last send or write; each packet is counted with the time of its batch.",
        labels=["direction"],
    )
    for direction, counted in counters.directions:
        below, buckets = 0, []
        for bound, count in zip(latency.BOUNDS_US, counted.latency, strict=False):
            below += count
            buckets.append((str(bound / 1e6), below))
        buckets.append(("+Inf", sum(counted.latency)))
        family.add_metric([direction], buckets, counted.latency_ns / 1e9)
    return family


def _kernel(kernel: KernelStatus) -> Iterator[Any]:
    if kernel.tun_queue_drops is not None:
        yield CounterMetricFamily(
            "tundp_tun_queue_drops",
            "Packets the kernel dropped at the full queue of the TUN, before the engine.",
            value=kernel.tun_queue_drops,
        )
    yield CounterMetricFamily(
        "tundp_namespace_udp_errors",
        "UDP datagrams the network namespace lost on receipt, ours and others'.",
        value=kernel.udp_errors,
    )
    yield CounterMetricFamily(
        "tundp_namespace_udp_checksum_errors",
        "Those of them whose checksum was wrong.",
        value=kernel.udp_checksum_errors,
    )


def _control(status: Status) -> Iterator[Any]:
    yield _gauge("tundp_start_timestamp_seconds", "When the daemon started.", status.started_at)
    if (lease := status.lease) is not None:
        state = GaugeMetricFamily("tundp_lease_state", "1 for the lease's state.", labels=["state"])
        for each in LeaseState:
            state.add_metric([each.value], lease.state == each.value)
        yield state
        yield _gauge(
            "tundp_lease_expiry_timestamp_seconds",
            "When the lease expires; 0 for never or unknown.",
            lease.expires_at or 0,
        )
    if (store := status.store) is not None:
        yield _gauge("tundp_store_up", "1 if the lease store answers.", store.is_answering)
        yield _gauge(
            "tundp_etcd_last_sync_timestamp_seconds",
            "When the leases were last known to be those of the store.",
            store.synced_at or 0,
        )
        yield _gauge("tundp_store_revision", "Revision of the leases.", store.revision)
    if (routing := status.routing) is not None:
        yield from _routing(routing)
    if (backend := status.backend) is not None:
        yield InfoMetricFamily(
            "tundp_backend", "What carries packets.", value={"type": backend.type}
        )
        if backend.mtu is not None:
            yield _gauge("tundp_mtu_bytes", "Largest inner packet.", backend.mtu)
        yield from _measuring(backend)
    yield from _chaos(status)
    if (engine := status.engine) is not None:
        yield _offloads(engine)
        yield _gauge(
            "tundp_hop_sockets",
            "Send sockets that single peers have now, because the shared one was full.",
            engine.hop_sockets,
        )


def _routing(routing: RoutingStatus) -> Iterator[Any]:
    yield _gauge("tundp_peers", "Leases packets are sent to.", routing.peers)
    yield _gauge("tundp_refused_leases", "Leases that are no peers.", routing.refused)
    yield _gauge("tundp_bad_entries", "Entries nobody can read.", routing.bad_entries)
    yield _gauge("tundp_fib_generation", "Generation of the routes.", routing.generation)
    yield _gauge(
        "tundp_narrow_paths",
        "Peers whose path carries less than the MTU of the device.",
        routing.narrow_paths,
    )
    if routing.silent_peers is not None:
        yield _gauge(
            "tundp_silent_peers",
            "Peers that were sent packets lately and do not answer, or cannot be sent to.",
            routing.silent_peers,
        )
    by_origin = GaugeMetricFamily(
        "tundp_narrow_paths_by_origin",
        "The narrow paths, by who says so: the device, the route, or what was measured.",
        labels=["origin"],
    )
    for origin, count in routing.narrow_by_origin.items():
        by_origin.add_metric([origin], count)
    yield by_origin
    yield _gauge(
        "tundp_no_gso_paths", "Peers whose path takes no UDP_SEGMENT.", routing.no_gso_paths
    )


def _measuring(backend: BackendStatus) -> Iterator[Any]:
    if backend.path_probes is not None:
        yield CounterMetricFamily(
            "tundp_path_probes",
            "Datagrams sent to peers to measure paths, beside forwarded packets.",
            value=backend.path_probes,
        )
    if backend.peer_messages is not None:
        yield CounterMetricFamily(
            "tundp_peer_messages",
            "Questions and answers sent to other nodes, beside forwarded packets.",
            value=backend.peer_messages,
        )
    if backend.paths_in_use is not None:
        family = GaugeMetricFamily(
            "tundp_paths_in_use",
            "Paths that carried large packets lately, by what measuring has come to.",
            labels=["measuring"],
        )
        for state, count in backend.paths_in_use.items():
            family.add_metric([state], count)
        yield family


def _chaos(status: Status) -> Iterator[Any]:
    yield _gauge(
        "tundp_chaos_active",
        "Peers whose packets tundp chaos impairs on purpose.",
        len(status.chaos_now),
    )
    if status.chaos_totals:
        family = CounterMetricFamily(
            "tundp_chaos_datagrams",
            "Datagrams tundp chaos was given, by what became of them.",
            labels=["fate"],
        )
        for name, count in status.chaos_totals.items():
            if name != "waiting":
                family.add_metric([name], count)
        yield family


def _offloads(engine: EngineStatus) -> GaugeMetricFamily:
    family = GaugeMetricFamily(
        "tundp_offload", "1 for the state each offload is in now.", labels=["name", "state"]
    )
    in_use = dict.fromkeys(engine.offloads_in_use, True)
    disabled = dict.fromkeys((each.name for each in engine.offloads_disabled), False)
    for name, is_used in (in_use | disabled).items():
        for state in _OFFLOAD_STATES:
            family.add_metric([name, state], is_used is (state == "in_use"))
    return family


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)
