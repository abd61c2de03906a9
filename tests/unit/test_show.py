"""Status as people read it."""

import copy
import io

import pytest
from rich.console import Console

from tundp.engine.counters import Counters
from tundp.show import drop_lines, print_findings, print_status
from tundp.wire.drop import DropReason


def status(**changes: object) -> dict:
    counters = Counters()
    counters.encap.packets_in = 1_234_567
    counters.encap.packets_out = 1_234_560
    counters.encap.bytes_out = 2_500_000
    counters.encap.drops[DropReason.NO_ROUTE] = 7
    counters.decap.packets_in = 5
    counters.decap.packets_out = 4
    counters.decap.drops[DropReason.SOURCE_MISMATCH] = 1
    sample = {
        "pid": 4242,
        "network": "10.5.0.0/16",
        "subnet": "10.5.1.0/24",
        "public_ip": "192.0.2.1",
        "interface": {
            "name": "eth0",
            "address": "192.0.2.1",
            "mtu": 1500,
            "why": "has the default route",
            "others": [],
            "warnings": [],
        },
        "port": 8285,
        "tun": {"name": "flannel0", "mtu": 1472},
        "engine": "reference",
        "engine_uses": "one packet at a time, in Python",
        "loop": "uvloop",
        "lease": {"key": "10.5.1.0-24", "state": "held", "expires_in_s": 82_800},
        "store": {
            "description": "etcd v2 at http://192.0.2.9:2379",
            "is_answering": True,
            "is_from_memory": False,
            "revision": 77,
            "age_s": 0,
        },
        "checks": [
            {"name": "lease", "ok": True, "detail": "held"},
            {"name": "firewall", "ok": True, "detail": "in place"},
        ],
        "generation": 3,
        "peers": [
            {"subnet": "10.5.2.0/24", "public_ip": "192.0.2.2"},
            {"subnet": "10.5.3.0/24", "public_ip": "192.0.2.3"},
        ],
        "refused": [
            {
                "key": "10.5.9.0-24",
                "public_ip": "0.0.0.0",
                "reason": "no_public_ip",
                "means": "has no PublicIP",
            }
        ],
        "bad_entries": [{"name": "rubbish", "why": "'rubbish' is not a subnet key"}],
        "counters": counters.as_dict(),
    }
    return copy.deepcopy(sample) | changes


def shown(sample: dict) -> str:
    file = io.StringIO()
    print_status(sample, Console(file=file, highlight=False, width=300))
    return file.getvalue()


@pytest.mark.parametrize(
    "text",
    [
        "10.5.1.0/24 of 10.5.0.0/16 on flannel0 (MTU 1472), udp 192.0.2.1:8285 via eth0",
        "lease 10.5.1.0-24 held, 23h00m left",
        "etcd v2 at http://192.0.2.9:2379 answering, revision 77",
        "engine reference on uvloop, pid 4242",
        "one packet at a time, in Python",
        "no peer: 10.5.9.0-24 has no PublicIP",
        "ignored: rubbish: 'rubbish' is not a subnet key",
        "192.0.2.2:8285",
        "192.0.2.3:8285",
        "1,234,567",
        "2.5",
        "encap no_route 7: no lease covers the destination.",
        "decap source_mismatch 1: the outer source does not hold the lease",
    ],
)
def test_what_is_shown(text):
    assert text in shown(status())


def test_each_peer_is_a_line():
    lines = shown(status()).splitlines()
    for subnet, at in (("10.5.2.0/24", "192.0.2.2:8285"), ("10.5.3.0/24", "192.0.2.3:8285")):
        assert [line.split() for line in lines if subnet in line] == [[subnet, at]]


def test_no_peers():
    assert "none yet" in shown(status(peers=[]))


@pytest.mark.parametrize("reason", DropReason)
def test_every_drop_reason_is_explained(reason):
    counters = Counters()
    counters.decap.drops[reason] = 1_000
    (line,) = drop_lines(counters.as_dict())
    assert f"decap {reason.label}" in line
    assert "1,000" in line
    assert reason.means in line
    assert reason.next_step in line


def test_counters_that_are_not_drops():
    counters = Counters(source_mismatches=3, icmp_rate_limited=4, socket_overflows=5)
    text = "\n".join(drop_lines(counters.as_dict()))
    for name, count in (
        ("source_mismatches", 3),
        ("icmp_rate_limited", 4),
        ("socket_overflows", 5),
    ):
        assert f"{name}[/] {count}:" in text


def test_nothing_dropped_nothing_said():
    assert drop_lines(Counters().as_dict()) == []


def test_conservation_is_shown_and_its_violation_too():
    sample = status()
    assert shown(sample).count("holds") == 2
    sample["counters"]["encap"]["packets_in"] += 1
    text = shown(sample)
    assert text.count("holds") == 1
    assert text.count("VIOLATED") == 1


@pytest.mark.parametrize(
    ("lease", "text"),
    [
        ({"state": "held", "expires_in_s": None}, "held, never expires"),
        ({"state": "held", "expires_in_s": 59}, "held, 0h00m left"),
        ({"state": "held", "expires_in_s": 3660}, "held, 1h01m left"),
        ({"state": "lost", "expires_in_s": -12}, "lost, expired 12 s ago"),
        ({"state": "conflict", "expires_in_s": 0}, "conflict, 0h00m left"),
    ],
)
def test_lease(lease, text):
    assert text in shown(status(lease={"key": "10.5.1.0-24"} | lease))


def test_a_silent_store():
    sample = status()
    sample["store"]["is_answering"] = False
    assert "not answering, peers kept" in shown(sample)


@pytest.mark.parametrize(
    ("name", "breaks"),
    [
        ("[/]", "a closing tag would raise"),
        ("[/red]x", "a closing tag would raise"),
        ("[red]x", "an opening tag would vanish"),
        (":a:", "a smiley name would turn into a smiley"),
        ("\\[x]", "a backslash would vanish"),
    ],
)
def test_names_from_the_store_are_only_text(name, breaks):
    # Anybody who may write to the store chooses these.
    text = shown(status(bad_entries=[{"name": name, "why": f"{name!r} is not a subnet key"}]))
    assert f"ignored: {name}: {name!r} is not a subnet key" in text, breaks


def test_an_ipv6_endpoint_is_shown_whole():
    sample = status()
    sample["store"]["description"] = "etcd v2 at http://[fd00::9]:2379"
    assert "http://[fd00::9]:2379" in shown(sample)


def test_an_ipv6_lease_key_is_shown_whole():
    # rich knows :a:, :b: and :ab: as emoji.
    key = "10.5.1.0-24&fd00:b:a::-64"
    sample = status(
        lease={"key": key, "state": "held", "expires_in_s": 60},
        refused=[{"key": key, "means": "x"}],
    )
    assert shown(sample).count(key) == 2


def test_what_holds_is_not_mentioned():
    text = shown(status())
    for word in ("not ready", "interface:", " s old", "from disk", "firewall"):
        assert word not in text


def test_every_check_that_fails_is_shown():
    checks = [
        {"name": "lease", "ok": False, "detail": "192.0.2.9 holds it now"},
        {"name": "firewall", "ok": True, "detail": "in place"},
        {"name": "subnet-file", "ok": False, "detail": "Read-only file system"},
    ]
    text = shown(status(checks=checks))
    assert "not ready: lease: 192.0.2.9 holds it now" in text
    assert "not ready: subnet-file: Read-only file system" in text
    assert "firewall" not in text


def test_warnings_about_the_interface_are_shown():
    sample = status()
    sample["interface"]["warnings"] = ["--public-ip is on no interface [NAT]"]
    assert "interface: --public-ip is on no interface [NAT]" in shown(sample)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"age_s": 90}, "answering, revision 77, leases 90 s old"),
        ({"age_s": 0}, "answering, revision 77\n"),
        ({"age_s": None}, "answering, revision 77\n"),
        (
            {"age_s": 90, "is_answering": False, "is_from_memory": True},
            "not answering, peers kept, revision 77, leases 90 s old (from disk)",
        ),
    ],
)
def test_how_old_the_leases_are(changes, text):
    sample = status()
    sample["store"] |= changes
    assert text in shown(sample)


def test_packets_a_system_call():
    sample = status()
    sample["counters"]["encap"] |= {"packets_in": 1280, "packets_out": 1280, "drops": {}}
    sample["counters"]["encap"] |= {"reads": 10, "writes": 20}
    sample["counters"]["decap"] |= {"reads": 0, "writes": 0}
    (encap,) = (
        line
        for line in shown(sample).splitlines()
        if line.strip().startswith("encap ") and "_" not in line
    )
    assert encap.split()[-3:] == ["128.0", "64.0", "holds"]
    (decap,) = (
        line
        for line in shown(sample).splitlines()
        if line.strip().startswith("decap ") and "_" not in line
    )
    assert decap.split()[-3:] == ["-", "-", "holds"]


def test_findings_are_lines_of_plain_text():
    file = io.StringIO()
    print_findings(
        [
            {"verdict": "ok", "what": "settings", "detail": "all defaults"},
            {"verdict": "warn", "what": "unreadable entry", "detail": "[red]x[/]: " + "y" * 300},
            {"verdict": "fail", "what": "store", "detail": "etcd at http://[fd00::9]:2379"},
        ],
        Console(file=file, highlight=False, width=80),
    )
    assert file.getvalue().splitlines() == [
        "OK   settings: all defaults",
        f"WARN unreadable entry: [red]x[/]: {'y' * 300}",
        "FAIL store: etcd at http://[fd00::9]:2379",
    ]
