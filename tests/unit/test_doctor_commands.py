"""Commands of `tundp doctor`: none that breaks what works, deletes what is another's or never ends.

Each is what an operator pastes, and `--fix` runs: where it is not surely right there is none.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from typing import Any

import pytest

from tests.wait import until_sync
from tundp.cli import doctor
from tundp.doctor import daemon, peers, pods, remedy
from tundp.doctor.context import Context
from tundp.errors import PlatformError
from tundp.finding import Verdict
from tundp.linux.netlink import Address, Link, NoRoute, Route, RouteLookup
from tundp.observe.status import (
    BackendStatus,
    BadEntryStatus,
    DaemonState,
    DeviceStatus,
    InterfaceStatus,
    PeerStatus,
    RefusedStatus,
    Status,
    StoreStatus,
)
from tundp.printable import printable
from tundp.settings.settings import Settings

PEER = IPv4Address("192.0.2.9")
LINKS = {1: "lo", 2: "eth0", 3: "flannel0", 4: "eth1"}


def status(**changes: Any) -> Status:
    values: dict[str, Any] = {
        "version": "",
        "pid": 1,
        "state": DaemonState.RUNNING,
        "started_at": 0,
        "uptime_s": 0,
        "network": IPv4Network("10.5.0.0/16"),
        "subnet": IPv4Network("10.5.1.0/24"),
        "backend": BackendStatus(
            type="udp",
            interface=InterfaceStatus(
                name="eth0", address=IPv4Address("192.0.2.1"), mtu=1500, why=""
            ),
            port=8285,
            device=DeviceStatus(name="flannel0", mtu=1472),
        ),
        "store": StoreStatus(
            description="etcd v3 at http://a:2379",
            is_answering=True,
            is_from_cache=False,
            revision=1,
        ),
    }
    return Status(**values | changes)


# A peer that is routed into the overlay


def route(to: str, index: int, *, kind: str = "unicast") -> Route:
    return Route(destination=IPv4Network(to), indexes=(index,), gateway=None, priority=0, kind=kind)


DEFAULT, OURS = route("0.0.0.0/0", 2), route("10.5.0.0/16", 3)


@pytest.mark.parametrize(
    ("routes", "command"),
    [
        ([DEFAULT, OURS, route("192.0.2.9/32", 3)], "ip route del 192.0.2.9/32 dev flannel0"),
        # The loop is in the table of a policy rule, or was mended after the daemon looked.
        ([DEFAULT, OURS], ""),
        ([DEFAULT, OURS, route("192.0.2.0/24", 2)], ""),
        ([DEFAULT, OURS, route("192.0.2.9/32", 4)], ""),
        # A default route over the TUN carries more than this peer.
        ([route("0.0.0.0/0", 3), OURS], ""),
        ([DEFAULT, OURS, route("192.0.2.9/32", 3, kind="blackhole")], ""),
    ],
)
def test_only_the_route_that_loops_is_deleted(routes: Sequence[Route], command: str) -> None:
    refused = RefusedStatus(
        key="10.5.9.0-24", public_ip=PEER, reason="routed_into_overlay", means=""
    )
    (found,) = daemon._looped(status(refused=[refused]), routes, LINKS)
    assert found.id == "peer.loop"
    assert found.facts.get("command", "") == command
    assert f"ip route get {PEER}" in found.next_step


# An entry of the store that is no lease


@pytest.mark.parametrize(
    ("name", "has_command"),
    [
        ("10.5.253.0-24", True),
        ("old; reboot", True),
        ("old/10.5.2.0-24", False),
        (printable("a\nb"), False),
        (printable("x" * 500), False),
        ("a\\xffb", False),
        ("10.5.2.0-24/", False),
        ("", False),
    ],
)
def test_only_the_entry_itself_is_deleted(tmp_path: Path, name: str, *, has_command: bool) -> None:
    class Settled:
        settings = Settings(etcd_endpoints=("http://a:2379",))

    inspection: Any = Settled()
    given = Context(
        inspection=inspection,
        status=None,
        asked=PlatformError("none"),
        pid=None,
        cni_dir=tmp_path,
    )
    bad = BadEntryStatus(name=name, why="it is no subnet")
    (found,) = daemon._refused(given, status(bad_entries=[bad]))
    command = found.facts.get("command", "")
    assert bool(command) is has_command
    if command:
        end = subprocess.run(
            ["sh", "-c", f"etcdctl() {{ eval echo '\"${{'$#'}}\"'; }}; {command}"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert end.stdout == f"/coreos.com/network/subnets/{name}\n"


# A path that swallows large packets


def look(found: RouteLookup | NoRoute, device: str, source: str = "") -> peers.Look:
    peer = PeerStatus(subnet=IPv4Network("10.5.9.0/24"), public_ip=PEER, port=8285)
    return peers.Look(
        peer=peer, route=found, device=device, source=IPv4Address(source) if source else None
    )


VIA = RouteLookup(index=2, source=None, gateway=IPv4Address("192.0.2.254"))
ON_LINK = RouteLookup(index=4, source=IPv4Address("198.51.100.1"))


@pytest.mark.parametrize(
    ("looked", "command"),
    [
        (
            look(VIA, "eth0", "192.0.2.1"),
            "ip route replace 192.0.2.9 via 192.0.2.254 dev eth0 src 192.0.2.1 mtu 1350",
        ),
        (look(VIA, "eth0"), "ip route replace 192.0.2.9 via 192.0.2.254 dev eth0 mtu 1350"),
        (look(ON_LINK, "eth1", "198.51.100.1"), ""),
        (look(RouteLookup(index=2, source=None, table=100), "eth0"), ""),
        (look(RouteLookup(index=1, source=None, kind="local"), "eth0"), ""),
        (look(RouteLookup(index=9, source=None), ""), ""),
        (look(NoRoute(errno=101), ""), ""),
    ],
)
def test_a_narrow_path_gets_an_mtu_and_no_other_way(looked: peers.Look, command: str) -> None:
    assert peers.narrow(looked, "eth0", 1350) == command


# Devices with addresses of the overlay


class Kernel:
    """A host's links, addresses and routes."""

    def __init__(self, **devices: str) -> None:
        self._devices = {"lo": "127.0.0.1/8", "eth0": "192.0.2.1/24", "flannel0": "10.5.1.0/32"}
        self._devices |= devices

    async def links(self) -> list[Link]:
        return [
            Link(index=index, name=name, mtu=1472, is_up=True, is_loopback=name == "lo")
            for index, name in enumerate(self._devices, 1)
        ]

    async def addresses(self) -> list[Address]:
        return [
            Address(
                index=index, interface=IPv4Interface(each), is_permanent=True, is_deprecated=False
            )
            for index, text in enumerate(self._devices.values(), 1)
            for each in text.split()
        ]

    async def routes(self) -> list[Route]:
        return []


MOVE = "ip addr add 10.5.1.1/24 dev {0} && ip addr del 10.5.99.1/24 dev {0}"


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        ({"cni0": "10.5.99.1/24"}, [("pods.subnet", "fail", MOVE.format("cni0"))]),
        (
            {"cni0": "10.5.1.1/24 10.5.99.1/24"},
            [("pods.subnet", "fail", "ip addr del 10.5.99.1/24 dev cni0")],
        ),
        ({"cni0": "10.5.1.1/24", "wg0": "10.5.99.1/24"}, [("pods.subnet", "warn", "")]),
        ({"cni0": "10.5.1.1/24", "docker0": "10.5.99.1/24"}, [("pods.subnet", "warn", "")]),
        ({"virbr0": "10.5.99.1/24"}, [("pods.subnet", "fail", "")]),
        (
            {"cni0": "10.5.99.1/24", "docker0": "10.5.98.1/24"},
            [("pods.subnet", "fail", ""), ("pods.subnet", "fail", "")],
        ),
        (
            {"wg0": "10.5.99.1/24", "cni0": ""},
            [
                ("pods.subnet", "warn", ""),
                ("pods.address", "fail", "ip addr add 10.5.1.1/24 dev cni0"),
            ],
        ),
        # Docker's own, while no pod has made cni0 yet.
        ({"docker0": "172.17.0.1/16"}, [("pods.none", "note", "")]),
        ({"docker0": ""}, [("pods.address", "fail", "ip addr add 10.5.1.1/24 dev docker0")]),
    ],
)
async def test_only_the_pods_own_bridge_gets_their_address(
    tmp_path: Path, devices: dict[str, str], said: list[tuple[str, str, str]]
) -> None:
    class Host:
        netlink = Kernel(**devices)

    host: Any = Host()
    given = Context(
        inspection=host, status=status(), asked=PlatformError("none"), pid=None, cni_dir=tmp_path
    )
    found = [
        (each.id, each.verdict.value, each.facts.get("command", ""))
        async for each in pods.check_bridge(given)
        if each.verdict is not Verdict.OK
    ]
    assert found == said


# A daemon that hangs


def test_a_daemon_that_does_not_end_at_sigterm_is_killed_and_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose event loop hangs: it handles SIGTERM there."""
    monkeypatch.setattr(remedy, "TERM_S", 0.3)
    program = (
        "import pathlib, signal, sys, time\n"
        "if sys.argv[1:]:\n"
        f"    pathlib.Path({str(tmp_path / 'again')!r}).touch()\n"
        "    sys.exit()\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\n"
        "time.sleep(120)\n"
    )
    file = tmp_path / "daemon.py"
    file.write_text(program)
    with subprocess.Popen([sys.executable, str(file)], cwd=tmp_path) as process:
        shell = None
        try:
            until_sync((tmp_path / "ready").exists, "it ignores SIGTERM")
            command = remedy.restart(process.pid, "--again")
            shell = subprocess.Popen(["sh", "-c", command])
            assert process.wait(30) == -9
            assert shell.wait(30) == 0
        finally:
            process.kill()
            if shell is not None:
                shell.kill()
                shell.wait()
    until_sync((tmp_path / "again").exists, "it was started again")


def test_a_mend_that_never_ends_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "RUN_S", 0.2)
    assert doctor._run("exec sleep 60") == 124
    assert "did not end within 0 s" in capsys.readouterr().err
    assert doctor._run("exit 3") == 3
