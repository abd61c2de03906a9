"""Counters and the header that carries every table into C."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tundp.engine.counters import (
    COUNTERS,
    DIRECTION_COUNTERS,
    Counters,
    CounterSpec,
    DirectionCounters,
)

NATIVE = Path(__file__).parents[2] / "native"


@pytest.fixture
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", NATIVE / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_generated_header_is_current(tables: ModuleType) -> None:
    assert tables.is_current(), "run: python native/tables.py"


def test_an_edited_table_makes_the_header_stale(
    tables: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = dataclasses.replace(COUNTERS[0], name="one_more")
    monkeypatch.setattr(tables, "COUNTERS", (*COUNTERS, more))
    assert not tables.is_current()
    assert "\tuint64_t one_more;\n" in tables.text()


@pytest.mark.parametrize("spec", [*COUNTERS, *DIRECTION_COUNTERS], ids=lambda spec: spec.name)
def test_each_counter_says_what_it_counts(spec: CounterSpec) -> None:
    assert len(spec.means.split()) >= 4
    assert not spec.means.endswith(".")
    assert spec.metric is None or spec.metric.startswith("tundp_")
    assert not spec.is_loss or spec.is_notable


def test_metrics_keep_their_names() -> None:
    exported = {spec.name: spec.metric for spec in (*COUNTERS, *DIRECTION_COUNTERS) if spec.metric}
    assert exported == {
        "packets_in": "tundp_packets",
        "packets_out": "tundp_forwarded_packets",
        "bytes_out": "tundp_bytes",
        "fragments_out": "tundp_fragments_out",
        "icmp_to_tun": "tundp_icmp_to_tun",
        "icmp_to_peers": "tundp_icmp_to_peers",
        "icmp_rate_limited": "tundp_icmp_rate_limited",
        "icmp_undeliverable": "tundp_icmp_undeliverable",
        "source_mismatches": "tundp_source_mismatches",
        "destination_mismatches": "tundp_destination_mismatches",
        "socket_overflows": "tundp_socket_overflows",
        "hop_sockets_opened": "tundp_hop_sockets_opened",
        "offload_fallbacks": "tundp_offload_fallbacks",
    }


@pytest.mark.parametrize(
    ("counters", "specs"), [(Counters, COUNTERS), (DirectionCounters, DIRECTION_COUNTERS)]
)
def test_each_field_is_in_the_table_and_in_json(
    counters: type[Counters] | type[DirectionCounters], specs: tuple[CounterSpec, ...]
) -> None:
    others = {"encap", "decap", "drops", "latency", "coalesce_misses", "errnos"}
    names = {field.name for field in dataclasses.fields(counters)}
    assert {spec.name for spec in specs} == names - others
    assert names <= set(counters().as_dict())
