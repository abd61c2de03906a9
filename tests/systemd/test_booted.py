"""The units under a systemd that runs them: Type=notify, sandbox, restart, template, Docker.

One boot for all of it, in a container whose files are this machine's (systemd-nspawn over
an overlay whose upper layer is memory), with a network of its own:

    192.0.2.1/24 eth0 ---- peer0   default route via 192.0.2.254

The units run as they are in systemd/. A drop-in says where tundp is (PATH), shows it to the
unit even if that is below /root or /tmp, and shortens waiting.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import pytest

from tests.systemd.machine import PYTHON, Machine
from tundp.linux.capability import CAP_NET_ADMIN

UNITS = Path(__file__).parents[2] / "systemd"
SUBNET = r"10\.\d+\.\d+\.0/24"
DROP_IN = f"""\
[Service]
Environment=PATH={sys.prefix}/bin:/usr/local/bin:/usr/bin:/usr/sbin:/sbin PYTHONDONTWRITEBYTECODE=1
ProtectHome=tmpfs
BindReadOnlyPaths={" ".join(PYTHON)}
"""
# A host whose iptables is the legacy one, by wrappers; docs/install.md has the capability.
# ProtectSystem=strict makes /run read-only, but for systemd 252 in a container.
LEGACY_DROP_IN = f"""\
[Service]
ReadOnlyPaths=/run
CapabilityBoundingSet=CAP_NET_RAW
Environment=PATH=/opt/wrapped:{sys.prefix}/bin:/usr/local/bin:/usr/bin
ExecStartPre=-+/bin/sh -c ': >> /run/xtables.lock'
"""
LEGACY_HEALTH = 10299
# dockerd tells how it was started, says READY, and stays.
DOCKERD = """\
#!/bin/sh
echo "$@" > /run/dockerd.arguments
systemd-notify --ready
exec sleep infinity
"""
DOCKER_UNIT = """\
[Service]
Type=notify
NotifyAccess=all
ExecStart=/usr/bin/dockerd -H fd://
"""
# As multi-user.target is to a unit with WantedBy=multi-user.target: ordered after it.
BOOT_TARGET = "[Unit]\nWants=tundp@waiting.service other.service\n"
PEER = "192.0.2.77"
"""Node with 10.2.200.0/24: nobody answers there."""
SEQUENCE = str(Path(__file__).with_name("sequence.py"))
WAITED_FOR = "/var/lib/tundp/waiting.json"


def boot_drop_in() -> str:
    """The drop-in of docs/install.md, with a shorter time."""
    text = (UNITS.parent / "docs" / "install.md").read_text()
    found = re.search(r"^    # \S+/boot\.conf\n((?:    .*\n)+)", text, re.MULTILINE)
    assert found, "docs/install.md shows no boot.conf"
    assert "JobRunningTimeoutSec=2min" in found[1]
    return found[1].replace("    ", "").replace("2min", "3s")


def lease_file(network: str, port: int, peers: Mapping[str, str] | None = None) -> str:
    backend = {"Type": "udp", "Port": port}
    leases = {subnet: {"PublicIP": address} for subnet, address in (peers or {}).items()}
    return json.dumps({"config": {"Network": network, "Backend": backend}, "leases": leases})


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    machine = Machine()
    try:
        units = "etc/systemd/system"
        for path in (*UNITS.glob("*.service"), *UNITS.glob("*.d/*.conf")):
            machine.write(f"{units}/{path.relative_to(UNITS)}", path.read_text())
        for name in ("tundp", "tundp@", "tundp-docker-opts"):
            machine.write(f"{units}/{name}.service.d/test.conf", DROP_IN)
        machine.write(
            f"{units}/tundp@watched.service.d/watchdog.conf", "[Service]\nWatchdogSec=2\n"
        )
        machine.write(f"{units}/docker.service", DOCKER_UNIT)
        machine.write("usr/bin/dockerd", DOCKERD, mode=0o755)
        machine.write("etc/default/tundp", "TUNDP_STORE=file:/var/lib/tundp/leases.json\n")
        machine.write("var/lib/tundp/leases.json", lease_file("10.1.0.0/16", 8285))
        for number, name in enumerate(("blue", "green", "watched"), 2):
            store = f"/var/lib/tundp/{name}.json"
            peers = {f"10.{number}.200.0-24": PEER} if name == "blue" else {}
            machine.write(store[1:], lease_file(f"10.{number}.0.0/16", 8285 + number, peers))
            text = f'store = "file:{store}"\ntun-name = "{name}0"\n'
            machine.write(f"etc/tundp/{name}.toml", text)
        machine.write("var/lib/tundp/legacy.json", lease_file("10.8.0.0/16", 8298))
        machine.write(
            "etc/tundp/legacy.toml",
            'store = "file:/var/lib/tundp/legacy.json"\ntun-name = "legacy0"\n'
            f"healthz-port = {LEGACY_HEALTH}\n",
        )
        machine.write(f"{units}/tundp@legacy.service.d/z-legacy.conf", LEGACY_DROP_IN)
        for suffix in ("", "-save", "-restore"):
            wrapper = f'#!/bin/sh\nexec /usr/sbin/iptables-legacy{suffix} "$@"\n'
            machine.write(f"opt/wrapped/iptables{suffix}", wrapper, mode=0o755)
        machine.write("etc/tundp/wrong.toml", 'iface-of-mine = "eth0"\n')
        machine.write(
            "etc/tundp/waiting.toml", f'store = "file:{WAITED_FOR}"\ntun-name = "waiting0"\n'
        )
        machine.write(f"{units}/tundp@waiting.service.d/boot.conf", boot_drop_in())
        machine.write(f"{units}/boot.target", BOOT_TARGET)
        machine.write(f"{units}/other.service", "[Service]\nExecStart=/bin/sleep infinity\n")
        machine.boot()
        for line in (
            "link add eth0 type veth peer name peer0",
            "address add 192.0.2.1/24 dev eth0",
            "link set peer0 up",
            "link set eth0 up",
            "route add default via 192.0.2.254",
        ):
            machine.run("ip", *line.split())
        machine.run("sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
        yield machine
    finally:
        machine.stop()


@pytest.fixture
def tundp(machine: Machine) -> Iterator[Machine]:
    """With tundp.service running, whatever the test before left."""
    machine.run("systemctl", "start", "tundp")
    yield machine


def main_pid(machine: Machine, unit: str = "tundp") -> str:
    return machine.show(unit)["MainPID"]


def is_another(machine: Machine, unit: str, before: str) -> bool:
    """Whether the unit runs, with another main process than before."""
    shown = machine.show(unit)
    return shown["ActiveState"] == "active" and shown["MainPID"] not in ("0", before)


def subnet_of(machine: Machine, name: str = "subnet") -> str:
    text = machine.run("cat", f"/run/flannel/{name}.env")
    found = re.search(r"^FLANNEL_SUBNET=(10\.\d+\.\d+)\.1(/24)$", text, re.MULTILINE)
    assert found, text
    return f"{found[1]}.0{found[2]}"


def test_the_booted_daemon_tells_systemd_its_subnet_and_peers(tundp: Machine) -> None:
    shown = tundp.show("tundp")
    assert (shown["ActiveState"], shown["SubState"]) == ("active", "running")
    assert shown["StatusText"].startswith(f"{subnet_of(tundp)}, 0 peers")
    assert shown["WatchdogUSec"] == "30s"
    # The main process is tundp itself, not the env that found it.
    assert "tundp" in tundp.run("cat", f"/proc/{shown['MainPID']}/comm")


def test_the_booted_daemon_holds_cap_net_admin_alone(tundp: Machine) -> None:
    status = tundp.run("cat", f"/proc/{main_pid(tundp)}/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    for name in ("CapEff", "CapPrm", "CapBnd"):
        assert int(fields[name], 16) == 1 << CAP_NET_ADMIN, name
    assert int(fields["CapAmb"], 16) == int(fields["CapInh"], 16) == 0
    assert fields["NoNewPrivs"].strip() == "1"
    assert fields["Seccomp"].strip() == "2"


def has_landlock() -> bool:
    """Whether the kernel has it at all: landlock_create_ruleset is 444 everywhere."""
    return int(ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1)) > 0


def test_the_sandbox_of_the_unit_hinders_no_part_of_the_daemon(tundp: Machine) -> None:
    before = tundp.journal("tundp.service")
    tundp.run("systemctl", "restart", "tundp")
    status = json.loads(tundp.run(f"{sys.prefix}/bin/tundp", "status", "--json"))
    assert status["engine"]["name"] != "reference"
    assert status["sandbox"]["seccomp"]
    assert status["sandbox"]["landlock_abi"] or not has_landlock()
    # Answered by the engine, out of the TUN: nobody has that subnet.
    other = "10.1.1.1" if status["subnet"] != "10.1.1.0/24" else "10.1.2.1"
    assert "Unreachable" in tundp.run("ping", "-c1", "-W5", other, is_checked=False)
    log = tundp.journal("tundp.service").removeprefix(before)
    assert not re.findall(r"^.* [WEC] tundp.*$", log, re.MULTILINE), log


def test_systemctl_stop_is_a_success_and_keeps_the_subnet(tundp: Machine) -> None:
    subnet, before = subnet_of(tundp), tundp.journal("tundp.service")
    tundp.run("systemctl", "stop", "tundp")
    assert tundp.show("tundp")["ActiveState"] == "inactive"
    # systemd has forgotten the unit by now, its journal has not.
    log = tundp.journal("tundp.service").removeprefix(before)
    assert "tundp.service: Deactivated successfully." in log
    assert "SIGTERM: stopping" in log
    assert "flannel0" not in tundp.run("ip", "link")
    # For Docker, CNI and the next start, which gets the same.
    assert subnet_of(tundp) == subnet
    tundp.run("systemctl", "start", "tundp")
    assert tundp.show("tundp")["StatusText"].startswith(subnet)


def test_a_killed_daemon_is_restarted_with_its_subnet(tundp: Machine) -> None:
    before, subnet = tundp.show("tundp"), subnet_of(tundp)
    tundp.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", "tundp")

    def is_back() -> bool:
        now = tundp.show("tundp")
        return now["ActiveState"] == "active" and now["MainPID"] not in ("0", before["MainPID"])

    tundp.until(is_back)
    after = tundp.show("tundp")
    assert int(after["NRestarts"]) == int(before["NRestarts"]) + 1
    assert after["StatusText"].startswith(subnet)


def test_restart_and_crash_lose_no_packet_and_keep_device_and_route(machine: Machine) -> None:
    unit, result = "tundp@blue", "/run/sequence.json"
    machine.run("systemctl", "start", unit)
    try:
        tunnel = subnet_of(machine, "blue").removesuffix("/24")
        mac = machine.run("cat", "/sys/class/net/peer0/address").strip()
        machine.run(
            *("ip", "neigh", "replace", PEER, "lladdr", mac, "dev", "eth0", "nud", "permanent")
        )
        device = machine.run("ip", "-o", "link", "show", "blue0")
        machine.run(
            *("systemd-run", "--unit=monitor", "-p", "StandardOutput=file:/run/routes"),
            *("ip", "-4", "-o", "monitor", "route"),
        )
        machine.run(
            *("systemd-run", "--unit=sequence", sys.executable, SEQUENCE),
            *(tunnel, "10.2.200.9", PEER, "8287", result),
        )
        for order in ("restart", "kill --kill-whom=main --signal=KILL", "reload"):
            before = main_pid(machine, unit)
            machine.run("systemctl", *order.split(), unit)
            machine.until(partial(is_another, machine, unit, before))
            assert machine.run("ip", "-o", "link", "show", "blue0") == device
        machine.run("touch", "/run/sequence.stop")
        machine.until(lambda: machine.run("sh", "-c", f"cat {result} || :").startswith("{"))
        for sent, received in json.loads(machine.run("cat", result)).values():
            assert sent == received > 20, machine.journal()
        assert "10.2.0.0/16" not in machine.run("cat", "/run/routes")
        assert int(machine.show(unit)["NFileDescriptorStore"]) == 5
        # systemd lets go of it all: nobody would read the queue.
        machine.run("systemctl", "stop", unit)
        machine.until(lambda: "blue0" not in machine.run("ip", "link"))
        assert "unreachable 10.2.0.0/16" in machine.run("ip", "route")
    finally:
        machine.run("systemctl", "stop", unit, "monitor", "sequence", is_checked=False)


def test_two_networks_side_by_side(tundp: Machine) -> None:
    names = ("blue", "green")
    tundp.run("systemctl", "start", *(f"tundp@{name}" for name in names))
    try:
        for number, name in enumerate(names, 2):
            subnet = subnet_of(tundp, name)
            assert subnet.startswith(f"10.{number}.")
            assert tundp.show(f"tundp@{name}")["StatusText"].startswith(subnet)
            assert f"10.{number}.0.0/16" in tundp.run("ip", "route", "show", "dev", f"{name}0")
        assert subnet_of(tundp).startswith("10.1.")
        tundp.run("systemctl", "stop", "tundp@blue")
        assert tundp.show("tundp@green")["ActiveState"] == "active"
        assert tundp.show("tundp")["ActiveState"] == "active"
    finally:
        tundp.run("systemctl", "stop", "tundp@*")


def test_legacy_iptables_has_its_lock_on_an_empty_run(machine: Machine) -> None:
    lock = "/run/xtables.lock"
    machine.run("rm", "-f", lock)
    machine.run("systemctl", "start", "tundp@legacy")
    try:
        url = f"http://127.0.0.1:{LEGACY_HEALTH}/readyz?verbose"
        seen = ""

        def is_told() -> bool:
            nonlocal seen
            seen = machine.run("curl", "-s", url, is_checked=False)
            return "firewall " in seen and "not set up yet" not in seen

        machine.until(is_told)
        assert "[+]firewall ok: our iptables rules are there" in seen, machine.journal(
            "tundp@legacy"
        )
        # PATH lacks /usr/sbin, as that of some units does.
        assert "FLANNEL-FWD" in machine.run("/usr/sbin/iptables-legacy", "-S", "FORWARD")
        assert "600" in machine.run("stat", "-c", "%a", lock)
    finally:
        machine.run("systemctl", "stop", "tundp@legacy")


def test_a_daemon_with_a_wrong_flag_is_not_restarted(machine: Machine) -> None:
    machine.run("systemctl", "start", "tundp@wrong", is_checked=False)
    shown = machine.show("tundp@wrong")
    assert (shown["ActiveState"], shown["ExecMainStatus"]) == ("failed", "2")
    assert shown["NRestarts"] == "0"
    assert "iface-of-mine" in machine.journal("tundp@wrong")


def test_docker_gets_the_subnet_and_outlives_tundp(machine: Machine) -> None:
    machine.run("systemctl", "start", "docker")
    try:
        arguments = machine.run("cat", "/run/dockerd.arguments").split()
        gateway = subnet_of(machine).replace(".0/24", ".1/24")
        assert arguments[:2] == ["-H", "fd://"]
        assert f"--bip={gateway}" in arguments
        assert "--mtu=1472" in arguments
        assert "--ip-masq=true" in arguments
        before = main_pid(machine, "docker")
        for verb in ("restart", "stop"):
            machine.run("systemctl", verb, "tundp")
            assert machine.show("docker")["ActiveState"] == "active"
        assert main_pid(machine, "docker") == before
    finally:
        machine.run("systemctl", "stop", "docker")


def test_docker_opts_names_a_route_that_has_the_subnet(tundp: Machine) -> None:
    route = f"{subnet_of(tundp)} via 192.0.2.254"
    tundp.run("ip", "route", "add", *route.split())
    try:
        tundp.run("systemctl", "start", "tundp-docker-opts", is_checked=False)
        shown = tundp.show("tundp-docker-opts")
        assert (shown["Result"], shown["ExecMainStatus"]) == ("exit-code", "1")
        log = tundp.journal("tundp-docker-opts")
        assert f"Your routing table already contains the subnet: {route}" in log
    finally:
        tundp.run("ip", "route", "del", *route.split())
        tundp.run("systemctl", "reset-failed", "tundp-docker-opts")


def test_a_stopped_daemon_is_replaced_by_the_watchdog(machine: Machine) -> None:
    unit = "tundp@watched"
    machine.run("systemctl", "start", unit)
    try:
        first = machine.show(unit)
        device = machine.run("ip", "-o", "link", "show", "watched0")
        seen = [first]

        def is_fed_or_dead() -> bool:
            seen.append(machine.show(unit))
            # Not merely another time: it is 0 while an unfed one is being aborted.
            name = "WatchdogTimestampMonotonic"
            is_fed = int(seen[-1][name]) > int(first[name])
            return is_fed or seen[-1]["MainPID"] != first["MainPID"]

        machine.until(is_fed_or_dead)
        assert seen[-1]["MainPID"] == first["MainPID"]
        machine.run("systemctl", "kill", "--kill-whom=main", "--signal=STOP", unit)
        machine.until(lambda: machine.show(unit)["NRestarts"] == "1")
        machine.until(lambda: machine.show(unit)["ActiveState"] == "active")
        assert machine.run("ip", "-o", "link", "show", "watched0") == device
        assert "Watchdog timeout" in machine.run("journalctl", "-o", "cat", "-u", unit)
    finally:
        machine.run("systemctl", "stop", unit)


def test_a_boot_waits_only_as_long_as_the_drop_in_lets_it(machine: Machine) -> None:
    unit = "tundp@waiting"
    try:
        machine.run("systemctl", "start", "--no-block", "boot.target")
        machine.until(lambda: machine.show(unit)["ActiveState"] == "activating")
        machine.until(lambda: machine.show("other")["ActiveState"] == "active")
        # The unit is wanted by the target, which is therefore not reached before it.
        assert "boot.target" in machine.run("systemctl", "list-jobs")
        machine.until(lambda: machine.show("boot.target")["ActiveState"] == "active")
        waiting = machine.show(unit)
        assert waiting["ActiveState"] == "activating"
        text = lease_file("10.9.0.0/16", 8299)
        machine.run("sh", "-c", f"cat > {WAITED_FOR} << 'END'\n{text}\nEND\n")
        machine.until(lambda: machine.show(unit)["ActiveState"] == "active")
        assert machine.show(unit)["MainPID"] == waiting["MainPID"]
    finally:
        machine.run("systemctl", "stop", "boot.target", unit, "other")
