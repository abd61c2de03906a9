"""What Prometheus gets: readable by its own parser, named by its rules, never one per peer."""

from __future__ import annotations

import copy
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

import tundp
from tundp.engine.counters import Counters
from tundp.observe.health import Check
from tundp.observe.metrics import CONTENT_TYPE, Metrics
from tundp.store.claim import LeaseState
from tundp.wire.drop import DropReason

READY = [Check("event-loop", True, ""), Check("lease", True, "held")]
HALF = [Check("event-loop", True, ""), Check("lease", False, "lost")]

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def status(counters: Counters | None = None, **changes: Any) -> dict[str, Any]:
    sample = {
        "counters": (counters or Counters()).as_dict(),
        "lease": {"state": "held", "expires_at": 1_790_000_000},
        "store": {"is_answering": True, "synced_at": 1_780_000_000.5, "revision": 77},
        "peers": [{"subnet": "10.5.2.0/24", "public_ip": "192.0.2.2"}],
        "refused": [],
        "bad_entries": [],
        "started_at": 1_770_000_000.0,
        "generation": 3,
        "tun": {"name": "flannel0", "mtu": 1472},
    }
    return copy.deepcopy(sample) | changes


def scraped(metrics: Metrics) -> Samples:
    text = metrics.render().decode()
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"{key} twice: Prometheus refuses the whole scrape"
            found[key] = sample.value
    return found


def running(sample: dict[str, Any], checks: list[Check] = READY) -> Metrics:
    metrics = Metrics(lambda: checks)
    metrics.status = lambda: sample
    return metrics


def value(found: Samples, name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


def test_before_there_is_a_node():
    found = scraped(Metrics(lambda: [Check("start", False, "waiting for a lease")]))
    assert value(found, "tundp_ready") == 0
    assert value(found, "tundp_check_ok", check="start") == 0
    assert value(found, "tundp_build_info", version=tundp.__version__) == 1
    assert value(found, "tundp_route_apply_seconds_count") == 0
    assert value(found, "process_resident_memory_bytes") > 0
    assert not any(name.startswith("tundp_packets") for name, _ in found)


def test_every_series_is_there_from_the_start():
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
    for name in ("socket_overflows", "source_mismatches", "destination_mismatches", "send_waits"):
        assert value(found, f"tundp_{name}_total") == 0


def test_values():
    counters = Counters(source_mismatches=3, socket_overflows=5, errnos={"ENOBUFS": 7})
    counters.encap.packets_in, counters.encap.packets_out = 11, 10
    counters.encap.bytes_out = 12_345
    counters.encap.drops[DropReason.NO_ROUTE] = 1
    counters.decap.packets_in = counters.decap.packets_out = 2
    sample = status(counters, refused=[{}, {}], bad_entries=[{}])
    sample["lease"] = {"state": "conflict", "expires_at": None}
    sample["store"] |= {"is_answering": False, "synced_at": None}
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
    assert value(found, "tundp_mtu_bytes") == 1472
    assert value(found, "tundp_start_timestamp_seconds") == 1_770_000_000
    assert value(found, "tundp_ready") == 0
    assert value(found, "tundp_check_ok", check="lease") == 0
    assert value(found, "tundp_check_ok", check="event-loop") == 1


def test_a_scrape_is_as_new_as_the_node():
    counters = Counters()
    metrics = Metrics(lambda: READY)
    metrics.status = lambda: status(counters)
    assert value(scraped(metrics), "tundp_packets_total", direction="encap") == 0
    counters.encap.packets_in = 4
    assert value(scraped(metrics), "tundp_packets_total", direction="encap") == 4


def test_names_follow_the_rules():
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
                assert label in {"direction", "reason", "errno", "state", "check", "version", "le",
                                 "implementation", "major", "minor", "patchlevel"}  # fmt: skip
    timestamps = [f.name for f in families if "timestamp" in f.name]
    assert len(timestamps) == 3
    assert all(name.endswith("_timestamp_seconds") for name in timestamps)


def test_no_series_of_a_peer():
    peers = [{"subnet": f"10.{n}.2.0/24", "public_ip": f"192.0.2.{n}"} for n in range(200)]
    alone, crowd = status(peers=[]), status(peers=peers)
    crowd["refused"] = [{"key": f"10.9.{n}.0-24", "public_ip": "0.0.0.0"} for n in range(200)]
    crowd["bad_entries"] = [{"name": f"x{n}", "why": "y"} for n in range(200)]
    found = scraped(running(crowd))
    assert found.keys() == scraped(running(alone)).keys()
    assert value(found, "tundp_peers") == 200
    text = running(crowd).render().decode()
    for part in ("192.0.2.", "10.7.2.0", "10.9.7.0", "x7"):
        assert part not in text


def test_what_checks_are_called_is_only_text():
    metrics = Metrics(lambda: [Check('a"b\\c\nd', True, "")])
    assert value(scraped(metrics), "tundp_check_ok", check='a"b\\c\nd') == 1


def test_route_changes_are_timed():
    metrics = running(status())
    for seconds in (0.0005, 0.004, 60.0):
        metrics.route_apply.observe(seconds)
    found = scraped(metrics)
    assert value(found, "tundp_route_apply_seconds_count") == 3
    assert value(found, "tundp_route_apply_seconds_bucket", le="0.001") == 1
    assert value(found, "tundp_route_apply_seconds_bucket", le="0.005") == 2
    assert value(found, "tundp_route_apply_seconds_bucket", le="5.0") == 2
    assert value(found, "tundp_route_apply_seconds_bucket", le="+Inf") == 3


def test_two_daemons_in_one_process_share_nothing():
    one, other = running(status(generation=1)), running(status(generation=2))
    one.route_apply.observe(1)
    assert value(scraped(other), "tundp_route_apply_seconds_count") == 0
    assert value(scraped(one), "tundp_fib_generation") == 1


def test_every_loss_that_is_counted_is_exported():
    """Of what engines count, all that tells of something lost or refused."""
    counters = Counters().as_dict()
    own = {"encap", "decap", "errnos", "coalesce_misses", "conserved"}
    how_it_works = {"syscalls", "wakeups", "spins", "spin_hits"}
    found = {name for name, _ in scraped(running(status()))}
    for name in counters.keys() - own - how_it_works:
        assert f"tundp_{name}_total" in found


def test_content_type():
    assert CONTENT_TYPE.startswith("text/plain; version=")
