"""What Prometheus gets: readable by its own parser, named by its rules, never one per peer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import tundp
from tundp.backend.choose import parse_network_config
from tundp.daemon.report import routing_status
from tundp.engine.counters import COUNTERS, DIRECTION_COUNTERS, Counters
from tundp.finding import Finding, Verdict, must_hold
from tundp.lease.claim import LeaseState
from tundp.lease.model import BadEntry, Lease, LeaseAttributes, LeaseKey, Snapshot
from tundp.lease.routing import Routing
from tundp.observe import collect
from tundp.observe.metrics import CONTENT_TYPE, Metrics
from tundp.observe.status import (
    BackendStatus,
    DaemonState,
    DeviceStatus,
    DisabledOffload,
    EngineStatus,
    InterfaceStatus,
    LeaseStatus,
    RoutingStatus,
    Status,
    StoreStatus,
)
from tundp.wire.drop import DropReason

READY = [must_hold("event-loop", True, ""), must_hold("lease", True, "held")]
HALF = [must_hold("event-loop", True, ""), must_hold("lease", False, "lost")]

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]

LEASE = LeaseStatus(key="10.5.1.0-24", state="held", expires_at=1_790_000_000)
STORE = StoreStatus(
    description="etcd",
    is_answering=True,
    is_from_cache=False,
    revision=77,
    synced_at=1_780_000_000.5,
)
ROUTING = RoutingStatus(generation=3, peers=1, refused=0, bad_entries=0)
INTERFACE = InterfaceStatus(name="eth0", address=IPv4Address("192.0.2.1"), mtu=1500, why="")
BACKEND = BackendStatus(
    mtu=1472,
    type="udp",
    interface=INTERFACE,
    port=8285,
    device=DeviceStatus(name="flannel0", mtu=1472),
)
ENGINE = EngineStatus(
    name="gso",
    uses="",
    offloads_in_use=["tun-tso", "udp-gro"],
    offloads_disabled=[DisabledOffload(name="tcp-coalesce", reason="EINVAL", since=1.0)],
)


def status(counters: Counters | None = None, **changes: Any) -> Status:
    sample = Status(
        version="0.2.0",
        pid=4242,
        state=DaemonState.RUNNING,
        started_at=1_770_000_000.0,
        uptime_s=1.0,
        lease=LEASE,
        store=STORE,
        backend=BACKEND,
        engine=ENGINE,
        routing=ROUTING,
        counters=collect.counters_status(counters or Counters()),
    )
    return replace(sample, **changes)


def scraped(metrics: Metrics) -> Samples:
    text = metrics.render().decode()
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"{key} twice: Prometheus refuses the whole scrape"
            found[key] = sample.value
    return found


def running(sample: Status, checks: list[Finding] = READY) -> Metrics:
    metrics = Metrics(lambda: checks)
    metrics.summary = lambda: sample
    return metrics


def value(found: Samples, series: str, /, **labels: str) -> float:
    return found[series, frozenset(labels.items())]


def test_metrics_before_there_is_a_node() -> None:
    found = scraped(Metrics(lambda: [must_hold("start", False, "waiting for a lease")]))
    assert value(found, "tundp_ready") == 0
    assert value(found, "tundp_check_ok", check="start") == 0
    assert value(found, "tundp_build_info", version=tundp.__version__) == 1
    assert value(found, "tundp_route_apply_seconds_count") == 0
    assert value(found, "tundp_event_loop_lag_seconds_count") == 0
    assert value(found, "process_resident_memory_bytes") > 0
    assert not any(name.startswith("tundp_packets") for name, _ in found)


def test_every_series_is_there_from_the_start() -> None:
    found = scraped(running(status()))
    for direction in ("encap", "decap"):
        for name in ("packets", "forwarded_packets", "bytes"):
            assert value(found, f"tundp_{name}_total", direction=direction) == 0
        for reason in DropReason:
            labels = {"direction": direction, "reason": reason.label}
            assert value(found, "tundp_drops_total", **labels) == 0
    for state in LeaseState:
        expected = state is LeaseState.HELD
        assert value(found, "tundp_lease_state", state=state.value) == expected
    for name in (
        "socket_overflows",
        "source_mismatches",
        "destination_mismatches",
        "hop_sockets_opened",
    ):
        assert value(found, f"tundp_{name}_total") == 0


def test_time_in_the_engine_is_a_histogram() -> None:
    counters = Counters()
    counters.encap.add_latency(3, 900)
    counters.encap.add_latency(64, 30_500)
    counters.encap.add_latency(2, 3_000_000_000)
    found = scraped(running(status(counters)))
    below = {
        float(dict(labels)["le"]): count
        for (name, labels), count in found.items()
        if name == "tundp_engine_seconds_bucket" and ("direction", "encap") in labels
    }
    assert list(below) == [*(2**number / 1e6 for number in range(21)), float("inf")]
    assert (below[1e-6], below[16e-6], below[32e-6]) == (3, 3, 67)
    assert (below[1.048576], below[float("inf")]) == (67, 69)
    assert value(found, "tundp_engine_seconds_count", direction="encap") == 69
    total = value(found, "tundp_engine_seconds_sum", direction="encap")
    assert total == pytest.approx(3 * 900e-9 + 64 * 30.5e-6 + 2 * 3.0)
    assert value(found, "tundp_engine_seconds_count", direction="decap") == 0


def test_values() -> None:
    counters = Counters(source_mismatches=3, socket_overflows=5, errnos={"ENOBUFS": 7})
    counters.encap.packets_in, counters.encap.packets_out = 11, 10
    counters.encap.bytes_out = 12_345
    counters.encap.drops[DropReason.NO_ROUTE] = 1
    counters.decap.packets_in = counters.decap.packets_out = 2
    sample = status(
        counters,
        lease=replace(LEASE, state="conflict", expires_at=None),
        store=replace(STORE, is_answering=False, synced_at=None),
        routing=replace(
            ROUTING,
            refused=2,
            bad_entries=1,
            narrow_paths=4,
            no_gso_paths=5,
            narrow_by_origin={"device": 1, "route": 0, "measured": 3},
        ),
        backend=replace(BACKEND, paths_in_use={"measured": 6, "pending": 0, "no-answer": 2}),
    )
    found = scraped(running(sample, HALF))
    assert value(found, "tundp_packets_total", direction="encap") == 11
    assert value(found, "tundp_forwarded_packets_total", direction="encap") == 10
    assert value(found, "tundp_bytes_total", direction="encap") == 12_345
    assert value(found, "tundp_drops_total", direction="encap", reason="no_route") == 1
    assert value(found, "tundp_drops_total", direction="decap", reason="no_route") == 0
    assert value(found, "tundp_packets_total", direction="decap") == 2
    assert value(found, "tundp_source_mismatches_total") == 3
    assert value(found, "tundp_socket_overflows_total") == 5
    assert value(found, "tundp_kernel_refusals_total", errno="ENOBUFS") == 7
    assert value(found, "tundp_lease_state", state="conflict") == 1
    assert value(found, "tundp_lease_state", state="held") == 0
    assert value(found, "tundp_lease_expiry_timestamp_seconds") == 0
    assert value(found, "tundp_store_up") == 0
    assert value(found, "tundp_etcd_last_sync_timestamp_seconds") == 0
    assert value(found, "tundp_store_revision") == 77
    assert value(found, "tundp_peers") == 1
    assert value(found, "tundp_refused_leases") == 2
    assert value(found, "tundp_bad_entries") == 1
    assert value(found, "tundp_fib_generation") == 3
    assert value(found, "tundp_narrow_paths") == 4
    assert value(found, "tundp_narrow_paths_by_origin", origin="measured") == 3
    for state, count in (("measured", 6), ("pending", 0), ("no-answer", 2)):
        assert value(found, "tundp_paths_in_use", measuring=state) == count
    assert value(found, "tundp_no_gso_paths") == 5
    assert value(found, "tundp_backend_info", type="udp") == 1
    for name, state in (("udp-gro", "in_use"), ("tcp-coalesce", "disabled")):
        for each in ("in_use", "disabled"):
            assert value(found, "tundp_offload", name=name, state=each) == (each == state)
    assert value(found, "tundp_mtu_bytes") == 1472
    assert value(found, "tundp_start_timestamp_seconds") == 1_770_000_000
    assert value(found, "tundp_ready") == 0
    assert value(found, "tundp_check_ok", check="lease") == 0
    assert value(found, "tundp_check_ok", check="event-loop") == 1


def test_a_scrape_is_as_new_as_the_node() -> None:
    counters = Counters()
    metrics = Metrics(lambda: READY)
    metrics.summary = lambda: status(counters)
    assert value(scraped(metrics), "tundp_packets_total", direction="encap") == 0
    counters.encap.packets_in = 4
    assert value(scraped(metrics), "tundp_packets_total", direction="encap") == 4


LABELS = {
    *("direction", "reason", "errno", "state", "check", "version", "le", "name", "type"),
    *("implementation", "major", "minor", "patchlevel"),
}


def test_names_follow_the_rules() -> None:
    text = running(status(Counters(errnos={"EPERM": 1}))).render().decode()
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    units = ("_milliseconds", "_ms", "_us", "_kb", "_mb", "_kilobytes", "_minutes", "_percent")
    for family in families:
        assert family.name.startswith(("tundp_", "process_", "python_")), family.name
        assert family.documentation.strip(), family.name
        assert not family.name.endswith(units), family.name
        for sample in family.samples:
            if family.type == "counter":
                assert sample.name.endswith("_total"), sample.name
                assert sample.value >= 0
            elif family.type == "gauge":
                assert not sample.name.endswith(("_total", "_count", "_sum")), sample.name
            for label in sample.labels:
                assert label in LABELS, label
    timestamps = [f.name for f in families if "timestamp" in f.name]
    assert len(timestamps) == 3
    assert all(name.endswith("_timestamp_seconds") for name in timestamps)


class Engine:
    """An engine that moves nothing, and learnt something of three paths."""

    name = "gso"

    def __init__(self) -> None:
        self.peers_asked = 0

    def describe(self) -> str:
        return ""

    def offloads(self) -> Any:
        raise AssertionError("not part of the routes")

    def path_states(self) -> dict[int, Any]:
        learnt = type("PathState", (), {"inner_mtu": 1372, "mtu_origin": None, "no_gso": False})()
        return dict.fromkeys(range(3), learnt)

    def hop_counters(self) -> dict[int, Any]:
        self.peers_asked += 1
        return {}


def routing_of(count: int) -> Routing:
    """So many peers, as many leases that are none, and as many unreadable entries."""
    network = parse_network_config('{"Network": "10.0.0.0/8", "SubnetLen": 28}', "test")
    own = LeaseKey(IPv4Interface("10.255.0.0/28"))
    routing = Routing(
        network=network.network,
        backend=network.backend,
        own_key=own,
        own_addresses=[IPv4Address("192.0.2.1")],
        public_ip=IPv4Address("192.0.2.1"),
    )
    subnets = IPv4Network("10.0.0.0/9").subnets(new_prefix=28)
    leases = []
    for number in range(2 * count):
        public_ip = IPv4Address(0) if number % 2 else IPv4Address("198.18.0.0") + number
        leases.append(
            Lease(
                key=LeaseKey(IPv4Interface(next(subnets))),
                attributes=LeaseAttributes(public_ip=public_ip),
                revision=1,
                lease_ttl_s=60,
            )
        )
    bad = tuple(BadEntry(f"x{number}", "y") for number in range(count))
    routing.apply(Snapshot(tuple(leases), 1, bad))
    return routing


def calls_of(function: Callable[[], object]) -> int:
    """How many calls, of Python and of C functions, it takes."""
    count = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


async def test_a_scrape_costs_the_same_whatever_the_number_of_peers() -> None:
    costs = {}
    for count in (10, 3000):
        engine = Engine()
        routing = routing_of(count)
        metrics = Metrics(lambda: READY)
        metrics.summary = lambda routing=routing, engine=engine: status(
            routing=routing_status(routing, engine)
        )
        metrics.render()  # what is made once is made now
        costs[count] = calls_of(metrics.render)
        found = scraped(metrics)
        assert value(found, "tundp_peers") == count
        assert value(found, "tundp_refused_leases") == count
        assert value(found, "tundp_bad_entries") == count
        assert value(found, "tundp_narrow_paths") == 3
        assert engine.peers_asked == 0
    # The process's own metrics (open files and such) make for some calls more or less.
    assert abs(costs[3000] - costs[10]) < 1000, costs


def test_no_series_of_a_peer() -> None:
    crowd = replace(ROUTING, peers=65_000, refused=200, bad_entries=200, narrow_paths=300)
    found = scraped(running(status(routing=crowd)))
    assert found.keys() == scraped(running(status())).keys()
    assert value(found, "tundp_peers") == 65_000


def test_a_backend_that_leaves_packets_to_the_kernel_has_no_counters() -> None:
    backend = BackendStatus(type="host-gw", interface=INTERFACE)
    found = scraped(running(replace(status(), backend=backend, engine=None, counters=None)))
    assert value(found, "tundp_backend_info", type="host-gw") == 1
    assert value(found, "tundp_peers") == 1
    for name, _ in found:
        assert not name.startswith(("tundp_packets", "tundp_drops", "tundp_offload", "tundp_mtu"))


def test_obstacles_are_counted_by_kind_once_looked_for() -> None:
    rule = Finding(id="obstacle.firewall", verdict=Verdict.WARN, evidence="a rule")
    note = Finding(id="obstacle.rp_filter", verdict=Verdict.NOTE, evidence="strict")
    before = Finding(id="obstacles", verdict=Verdict.UNKNOWN, evidence="not looked for")
    found = scraped(Metrics(lambda: [before]))
    assert not [name for name, _ in found if name.startswith("tundp_obstacle")]
    looked = Finding(id="obstacles", verdict=Verdict.WARN, evidence="2", facts={"unread": "0"})
    found = scraped(Metrics(lambda: [rule, rule, note, looked]))
    assert value(found, "tundp_obstacle", id="firewall") == 2
    assert value(found, "tundp_obstacle", id="rp_filter") == 0
    assert value(found, "tundp_obstacle", id="route") == 0
    assert not [name for name, _ in found if name == "tundp_check_ok"]


def test_what_checks_are_called_is_only_text() -> None:
    metrics = Metrics(lambda: [must_hold('a"b\\c\nd', True, "")])
    assert value(scraped(metrics), "tundp_check_ok", check='a"b\\c\nd') == 1


def test_checks_with_one_id_are_one_series() -> None:
    """Prometheus refuses an answer with the same series twice."""
    checks = [must_hold("store", True, ""), must_hold("store", False, ""), *READY]
    text = Metrics(lambda: checks).render().decode()
    assert text.count('tundp_check_ok{check="store"}') == 1
    assert 'tundp_check_ok{check="store"} 0.0' in text


def test_route_changes_are_timed() -> None:
    metrics = running(status())
    for seconds in (0.0005, 0.004, 60.0):
        metrics.route_apply.observe(seconds)
    found = scraped(metrics)
    assert value(found, "tundp_route_apply_seconds_count") == 3
    assert value(found, "tundp_route_apply_seconds_bucket", le="0.001") == 1
    assert value(found, "tundp_route_apply_seconds_bucket", le="0.005") == 2
    assert value(found, "tundp_route_apply_seconds_bucket", le="5.0") == 2
    assert value(found, "tundp_route_apply_seconds_bucket", le="+Inf") == 3


def test_two_daemons_in_one_process_share_nothing() -> None:
    one, other = (running(status(routing=replace(ROUTING, generation=n))) for n in (1, 2))
    one.route_apply.observe(1)
    assert value(scraped(other), "tundp_route_apply_seconds_count") == 0
    assert value(scraped(one), "tundp_fib_generation") == 1


def test_every_counter_with_a_metric_is_exported() -> None:
    names = {name for name, _ in scraped(running(status()))}
    for spec in (*COUNTERS, *DIRECTION_COUNTERS):
        assert spec.metric is None or f"{spec.metric}_total" in names, spec
        assert spec.metric is not None or not spec.is_loss, f"{spec.name} is a loss nobody sees"


def test_content_type() -> None:
    assert CONTENT_TYPE.startswith("text/plain; version=")
