"""The alert rules and the dashboard that are shipped: what they ask for exists, and they fire."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.test_metrics import READY, scraped, status
from tundp.engine.base import HopActivity, PathState
from tundp.engine.reach import Reach, Standing
from tundp.finding import Finding, Verdict
from tundp.observe.metrics import Metrics
from tundp.observe.peer_series import PeerSource
from tundp.observe.status import KernelStatus
from tundp.wire.drop import DropReason

DATA = resources.files("tundp.observe").joinpath("data")
RULES = DATA.joinpath("alerts.yml").read_text(encoding="utf-8")
DASHBOARD = json.loads(DATA.joinpath("dashboard.json").read_text(encoding="utf-8"))
CASES = Path(__file__).with_name("alerts_cases.yml")
OTHERS = {"process_cpu_seconds_total", "process_resident_memory_bytes"}


def exported() -> set[str]:
    """The names of all series of a daemon that has every part."""
    looked = Finding(id="obstacles", verdict=Verdict.OK, evidence="", facts={"unread": "0"})
    metrics = Metrics(lambda: [*READY, looked], lambda: {"notify": 1}, peers_max=3)
    sample = status(kernel=KernelStatus(tun_queue_drops=1))
    assert sample.routing is not None
    routing = replace(sample.routing, silent_peers=1, narrow_by_origin={"measured": 1})
    metrics.summary = lambda: replace(sample, routing=routing)
    one = np.array((0, 1), np.uint64)
    metrics.peers = PeerSource(
        activity=lambda: HopActivity(one, one, one, one, one, one),
        name=lambda _: "192.0.2.2",
        reaches=lambda _: {1: Reach(standing=Standing.ANSWERS, since=1.0, rtt_s=0.1)},
        paths=lambda: {1: PathState(inner_mtu=1372, since=1.0, origin="measured")},
    )
    return {name for name, _ in scraped(metrics)}


def asked(text: str) -> set[str]:
    return set(re.findall(r"\b(?:tundp|process)_[a-z_]+\b", text))


def expressions() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel["targets"])


def test_rules_ask_for_what_is_exported() -> None:
    found = asked("\n".join(line for line in RULES.splitlines() if "_" in line and "#" not in line))
    assert len(found) > 8
    assert found <= exported() | OTHERS


def test_the_dashboard_asks_for_what_is_exported() -> None:
    found = set().union(*map(asked, expressions()))
    assert len(found) > 15
    assert found <= exported() | OTHERS


def test_reasons_that_raise_no_alarm_are_reasons() -> None:
    (left_out,) = re.findall(r'reason!~"([^"]+)"', RULES)
    assert set(left_out.split("|")) <= {reason.label for reason in DropReason}


def test_panels_have_places_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


PROMTOOL = shutil.which("promtool")
"""Prometheus' own judge of rules (Debian: prometheus)."""
with_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="promtool is missing: setup/apt.sh test"
)


def run(*argv: Any) -> str:
    done = subprocess.run([str(each) for each in argv], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@with_promtool
def test_prometheus_takes_the_rules_and_they_fire(tmp_path: Path) -> None:
    (tmp_path / "alerts.yml").write_text(RULES, encoding="utf-8")
    cases = tmp_path / "cases.yml"
    cases.write_text(CASES.read_text(encoding="utf-8"), encoding="utf-8")
    names = re.findall(r"alert: (\w+)", RULES)
    assert f"SUCCESS: {len(names)} rules found" in run(
        PROMTOOL, "check", "rules", tmp_path / "alerts.yml"
    )
    run(PROMTOOL, "test", "rules", cases)
    assert set(re.findall(r"alertname: (\w+)", cases.read_text())) == set(names), "each is tried"


@with_promtool
def test_prometheus_takes_the_dashboards_expressions(tmp_path: Path) -> None:
    rules = tmp_path / "dashboard.yml"
    groups = {"groups": [{"name": "dashboard", "rules": []}]}
    for number, each in enumerate(expressions()):
        text = each.replace("$__rate_interval", "5m").replace("$instance", ".*")
        groups["groups"][0]["rules"].append({"record": f"panel:{number}", "expr": text})  # type: ignore[attr-defined]
    rules.write_text(json.dumps(groups), encoding="utf-8")  # JSON is YAML, too
    run(PROMTOOL, "check", "rules", rules)
