"""The findings and the status of a node: what operators read when something is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from types import SimpleNamespace
from typing import Any

import pytest

from tundp.backend.udp.config import udp_config
from tundp.daemon import report
from tundp.daemon.supervise import Supervisor
from tundp.finding import Finding, Verdict, failures, must_hold, worries
from tundp.lease.claim import LeaseState
from tundp.lease.codec import parse_key
from tundp.lease.identity import NODE, Identity
from tundp.lease.model import Lease, LeaseAttributes, Snapshot
from tundp.lease.routing import Routing
from tundp.linux.iface import Interface
from tundp.linux.netlink import Link
from tundp.store.base import StoreWarning
from tundp.subnet.base import LeaseStatus

OWN = parse_key("10.5.1.0-24")
OURS = IPv4Address("192.0.2.1")
HELD = LeaseStatus(
    key=OWN,
    state=LeaseState.HELD,
    conflict="",
    expires_in_s=600.0,
    description="a store",
    is_answering=True,
    is_synced=True,
    synced_at=1.0,
    age_s=0,
)
UP = Interface(
    link=Link(index=2, name="eth0", mtu=1500, is_up=True),
    address=OURS,
    public_ip=OURS,
    why="--iface eth0",
    others=(),
    warnings=(),
)


def node_with(
    *,
    lease: LeaseStatus = HELD,
    interface: Interface = UP,
    underlay_error: str = "",
    missing: str = "",
    file_error: str = "",
    file_unseen: str = "",
    peer_ip: str = "192.0.2.2",
    peer_node: str = "",
    device: bool = True,
    rules_contest: str = "",
    kernel_contest: str = "",
    admin_error: str = "",
    warnings: tuple[StoreWarning, ...] = (),
    obstacles: Sequence[Finding] = (),
) -> Any:
    """What `report.findings` reads of a node; the ledger is a real one, with one other lease."""
    routing = Routing(
        network=IPv4Network("10.5.0.0/16"),
        backend=udp_config(),
        own_key=OWN,
        own_addresses=[OURS],
        public_ip=OURS,
        identity=Identity("us"),
    )
    other = Lease(
        key=parse_key("10.5.2.0-24"),
        attributes=LeaseAttributes(
            public_ip=IPv4Address(peer_ip), extra={NODE: peer_node} if peer_node else {}
        ),
        revision=1,
        lease_ttl_s=None,
    )
    routing.apply(Snapshot((other,), 1))
    return SimpleNamespace(
        manager=SimpleNamespace(state=lambda: lease, warnings=warnings),
        underlay=SimpleNamespace(interface=interface, error=underlay_error),
        routing=routing,
        backend=SimpleNamespace(checks=lambda: [must_hold("device", device, "flannel0")]),
        firewall=SimpleNamespace(
            missing=missing,
            contest=rules_contest,
            evidence=missing or "our rules are there",
        ),
        contest=SimpleNamespace(words=lambda now: kernel_contest),
        worries=lambda: worries("admin-socket", admin_error),
        subnet_file=SimpleNamespace(error=file_error, unseen=file_unseen),
        supervisor=Supervisor(),
        obstacles=SimpleNamespace(findings=lambda: list(obstacles)),
    )


def test_nothing_fails_of_a_node_that_works() -> None:
    found: list[Finding] = report.findings(node_with())
    assert failures(found) == []
    assert [each.id for each in found] == [
        *("lease", "device", "underlay", "leases-synced", "firewall", "subnet-file", "tasks")
    ]


def test_warning_of_the_store_is_a_finding_and_leaves_the_node_ready() -> None:
    warning = StoreWarning(id="certificates", evidence="node.key is empty", next_step="mend it")
    found = report.findings(node_with(warnings=(warning,)))
    assert failures(found) == []
    assert (found[-1].id, found[-1].verdict) == ("store.certificates", Verdict.WARN)
    assert (found[-1].evidence, found[-1].next_step) == ("node.key is empty", "mend it")


@pytest.mark.parametrize(
    ("node", "failing", "evidence"),
    [
        (node_with(lease=replace(HELD, state=LeaseState.LOST)), "lease", "lost"),
        (
            node_with(
                lease=replace(HELD, state=LeaseState.CONFLICT, conflict="node b at 192.0.2.9")
            ),
            "lease",
            "node b at 192.0.2.9",
        ),
        (
            node_with(peer_ip="192.0.2.1", peer_node="them"),
            "lease",
            "node them has our PublicIP, too: lease 10.5.2.0-24",
        ),
        (node_with(device=False), "device", "flannel0"),
        (
            node_with(interface=replace(UP, link=replace(UP.link, is_up=False))),
            "underlay",
            "eth0 192.0.2.1 is down",
        ),
        (node_with(underlay_error="no interface is called eth0"), "underlay", "no interface"),
        (
            node_with(lease=replace(HELD, is_synced=False, age_s=70)),
            "leases-synced",
            "only from the lease cache, age 70 s",
        ),
        (node_with(missing="iptables is not installed"), "firewall", "iptables is not installed"),
        (node_with(file_error="Read-only file system"), "subnet-file", "Read-only file system"),
    ],
)
def test_one_thing_wrong_is_one_finding_that_says_what(
    node: Any, failing: str, evidence: str
) -> None:
    (found,) = failures(report.findings(node))
    assert found.id == failing
    assert evidence in found.evidence


@pytest.mark.parametrize(
    ("ip", "breaks"),
    [("192.0.2.1", "a leftover of a flanneld"), ("172.17.0.1", "docker0's, everywhere")],
)
def test_a_lease_nobody_lives_in_is_no_failure(ip: str, breaks: str) -> None:
    node = node_with(peer_ip=ip)
    node.routing.set_own_addresses([OURS, IPv4Address("172.17.0.1")], OURS)
    assert len(node.routing.refused) == 1
    assert failures(report.findings(node)) == [], breaks


@pytest.mark.parametrize(
    ("node", "worry"),
    [
        (node_with(rules_contest="undone 9 times"), "firewall-contest"),
        (node_with(file_unseen="undone 9 times"), "subnet-file-unseen"),
        (node_with(kernel_contest="undone 9 times"), "kernel-contest"),
        (node_with(admin_error="undone 9 times"), "admin-socket"),
        (node_with(lease=replace(HELD, cache_error="undone 9 times")), "state-dir"),
    ],
)
def test_what_works_for_now_is_a_warning_that_says_what(node: Any, worry: str) -> None:
    found = report.findings(node)
    assert failures(found) == []
    (warning,) = [each for each in found if each.verdict is Verdict.WARN]
    assert (warning.id, warning.evidence) == (worry, "undone 9 times")


def test_a_store_away_after_the_start_is_no_failure_and_its_age_is_shown() -> None:
    """Known peers stay reachable: a pod needs nothing of the store."""
    found = report.findings(node_with(lease=replace(HELD, is_answering=False, age_s=70)))
    assert failures(found) == []
    assert next(each.evidence for each in found if each.id == "leases-synced") == "age 70 s"


def test_a_rule_in_the_way_is_told_and_does_not_make_the_node_unready() -> None:
    """An operator's odd rule must not take nodes out of service, one after the other."""
    rule = Finding(id="obstacle.firewall", verdict=Verdict.WARN, evidence="drops packets")
    found = report.findings(node_with(obstacles=[rule]))
    assert failures(found) == []
    assert rule in found
