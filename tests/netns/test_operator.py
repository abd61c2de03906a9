"""What an operator does with a daemon: a stock command line, two networks on one node, checks,
cleaning up, and the certainty that nothing leaks.

[node1] [node2] eth0 -- [switch, etcd 192.0.2.254]          node1 eth1 -- [decoy], default route
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.netns.machine import FLANNELD, TUNDP, Machine, state_of
from tests.nodes import MakeOverlay, answers, has_received, has_sent, log_contains
from tests.wait import DEADLINE_S, until
from tundp.admin import fetch_document
from tundp.errors import PlatformError
from tundp.lab.decoy import Decoy, add_decoy
from tundp.lab.overlay import LabNode, OverlayLab
from tundp.lab.traffic import PingStream, ping

UNIT = Path(__file__).parents[2] / "systemd" / "tundp.service"
GOLDEN = Path(__file__).parent / "golden"
HEALTH = "--healthz-port=10256"


async def get(node: LabNode, path: str) -> tuple[int, str]:
    """What the health server says; status 0 if there is none yet."""
    try:
        return await node.get(10256, path)
    except OSError:
        return 0, ""


async def says(node: LabNode, path: str, status: int) -> bool:
    return (await get(node, path))[0] == status


async def fails(node: LabNode, *names: str) -> bool:
    """Whether /readyz is 503 for exactly these checks (200 for none), and /healthz 200."""
    is_alive = await get(node, "/healthz") == (200, "flanneld is running")
    status, body = await get(node, "/readyz?format=json")
    return (
        is_alive
        and status == (503 if names else 200)
        and json.loads(body)["failing"] == list(names)
    )


async def test_a_stock_command_line(make_overlay: MakeOverlay) -> None:
    network = {"Network": "10.5.0.0/16", "SubnetMin": "10.5.7.0", "SubnetMax": "10.5.7.0"}
    async with make_overlay(store="etcd", nodes=1, start=False, network=network) as overlay:
        one = overlay.nodes[1]
        stock = [f"-etcd-endpoints={overlay.etcd.url}", "-iface=eth0", "-ip-masq"]
        async with Machine(overlay, one) as machine:
            daemon = await machine.start(
                FLANNELD, *stock, "-healthz-port=10256", "stray", "-no-such-flag"
            )
            await until(lambda: says(one, "/readyz", 200))
            assert await get(one, "/healthz") == (200, "flanneld is running")
            assert await get(one, "/readyz") == (200, "flanneld is ready")
            assert await says(one, "/", 404)
            env = machine.path("/run/flannel/subnet.env")
            assert env.read_bytes() == (
                b"FLANNEL_NETWORK=10.5.0.0/16\n"
                b"FLANNEL_SUBNET=10.5.7.1/24\n"
                b"FLANNEL_MTU=1472\n"
                b"FLANNEL_IPMASQ=true\n"
            )
            assert env.stat().st_mode & 0o777 == 0o644
            for table, wanted in (("nat", "masq"), ("filter", "forward")):
                rules = await machine.run("iptables", "-t", table, "-S")
                assert rules.stdout == (GOLDEN / f"iptables-{wanted}.txt").read_text()
            assert "ignored, as flannel does: stray -no-such-flag" in one.log_path.read_text()
            daemon.terminate()
            assert await asyncio.to_thread(daemon.wait, DEADLINE_S) == 0
            assert env.exists()

            secret = await machine.start(
                FLANNELD,
                "-etcd-endpoints=http://192.0.2.254:1",
                "-iface=eth0",
                "-v=2",
                FLANNELD_ETCD_USERNAME="root",
                FLANNELD_ETCD_PASSWORD="hunter2",
            )
            await until(lambda: log_contains(one.log_path, "waiting for the network config"))
            secret.terminate()
            assert await asyncio.to_thread(secret.wait, DEADLINE_S) == 0
            assert "hunter2" not in one.log_path.read_text()
            assert "etcd-password=***" in one.log_path.read_text()


@pytest.mark.parametrize(
    ("flags", "code", "stderr"),
    [
        (["--version"], 0, "tundp "),
        (["-version", "-iface=eth0"], 0, "tundp "),
        (["-nosuch=1"], 2, "unknown flag -nosuch"),
        (["-ip-masq=maybe"], 2, "--ip-masq 'maybe' is not true or false"),
        (["-kube-subnet-mgr"], 2, "not yet in tundp"),
        (["-kubeconfig-file=/x"], 2, "not yet in tundp"),
        (["-kube-api-url=http://x"], 2, "not yet in tundp"),
        (["-etcd-password=hunter2"], 2, "--etcd-username is missing"),
        (["-etcd-endpoints=http://root:hunter2@192.0.2.1"], 2, "which are never logged"),
    ],
)
def test_flags_of_flanneld(flags: list[str], code: int, stderr: str) -> None:
    finished = subprocess.run([FLANNELD, *flags], capture_output=True, text=True, timeout=30)
    assert finished.returncode == code, finished.stderr
    assert stderr in finished.stderr
    assert finished.stdout == ""
    assert "hunter2" not in finished.stderr
    assert "Traceback" not in finished.stderr


async def test_two_networks_on_one_node(make_overlay: MakeOverlay) -> None:
    async with (
        make_overlay(store="etcd", start=False) as overlay,
        contextlib.AsyncExitStack() as stack,
    ):
        one, two = overlay.nodes[1], overlay.nodes[2]
        nets = {"blue": ("10.5.0.0/16", 8285), "green": ("10.6.0.0/16", 8286)}
        for name, (network, port) in nets.items():
            config = {"Network": network, "Backend": {"Type": "udp", "Port": port}}
            await overlay.etcd.put(f"/{name}/config", json.dumps(config), api="v3")
        machines = {}
        for node in (one, two):
            machines[node.number] = await stack.enter_async_context(Machine(overlay, node))
        daemons = {}
        for node in (one, two):
            for name in nets:
                daemons[node.number, name] = await machines[node.number].start(
                    FLANNELD,
                    f"-etcd-endpoints={overlay.etcd.url}",
                    "-iface=eth0",
                    "-ip-masq",
                    f"-etcd-prefix=/{name}",
                    f"-subnet-file=/run/flannel/{name}.env",
                    log=overlay.directory / f"{node.number}-{name}.log",
                )
                await until(partial(runs, machines[node.number], daemons[node.number, name], name))
        status = {at: await ask(machines[at[0]], at[1]) for at in daemons}
        assert {status[at]["backend"]["device"]["name"] for at in daemons} == {
            "flannel0",
            "flannel1",
        }
        for at in daemons:
            await until(partial(has_peers, machines[at[0]], at[1], 1))

        async def works(name: str) -> bool:
            address = status[2, name]["subnet"].split("/")[0]
            return await answers(one.host, address, timeout_s=5)

        for name in nets:
            await until(partial(works, name))
            await until(partial(rules_are_there, machines[1], name))
        before = await rules_about(machines[1], "10.6.")
        assert len(before) >= 6

        daemons[1, "blue"].terminate()
        assert await asyncio.to_thread(daemons[1, "blue"].wait, DEADLINE_S) == 0
        assert await works("green")
        assert await rules_about(machines[1], "10.6.") == before
        assert await rules_are_there(machines[1], "green")
        cleaned = await machines[1].run(
            TUNDP, "cleanup", "--subnet-file=/run/flannel/blue.env", "--etcd-prefix=/blue"
        )
        assert cleaned.returncode == 0, cleaned.stderr
        assert "10.6." not in cleaned.stdout
        assert await rules_about(machines[1], "10.5.") == []
        assert await rules_about(machines[1], "10.6.") == before
        assert await works("green")
        routes = (await one.host.run("ip", "route")).stdout
        assert "10.5." not in routes
        assert "unreachable 10.6.0.0/16" in routes


def admin_socket(machine: Machine, name: str) -> Path:
    return machine.path(f"/run/tundp/run-flannel-{name}.env.sock")


async def ask(machine: Machine, name: str) -> Any:
    return await fetch_document(admin_socket(machine, name))


async def runs(machine: Machine, daemon: subprocess.Popen[bytes], name: str) -> bool:
    assert daemon.poll() is None
    try:
        status = await ask(machine, name)
    except PlatformError:  # not there yet, or there and not listening yet
        return False
    return status["state"] == "running" and not failing(status)


def failing(status: dict[str, Any]) -> list[str]:
    return [each["id"] for each in status["findings"] if each["verdict"] != "ok"]


async def rules_are_there(machine: Machine, name: str) -> bool:
    status = await ask(machine, name)
    return "firewall" not in failing(status) and status["firewall"]["flavour"] != ""


async def has_peers(machine: Machine, name: str, count: int) -> bool:
    return len((await ask(machine, name))["peers"]) == count


async def rules_about(machine: Machine, text: str) -> list[str]:
    saved = await machine.run("iptables-save")
    return [line for line in saved.stdout.splitlines() if line.startswith("-A") and text in line]


async def test_readyz_names_what_is_wrong_and_nothing_else(make_overlay: MakeOverlay) -> None:
    async with make_overlay(store="etcd", start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await overlay.start_daemon(two)
        async with Machine(overlay, one) as machine:
            one.daemon = await machine.start(
                FLANNELD, f"-etcd-endpoints={overlay.etcd.url}", "-iface=eth0", HEALTH, "-ip-masq"
            )
            await until(lambda: says(one, "/readyz", 200))

            # lease: an etcd that is out of space takes deletions, but nothing new.
            leases = await overlay.read_leases()
            (key,) = [key for key, value in leases.items() if one.public_ip + '"' in value]
            await alarm(overlay, "ACTIVATE")
            await overlay.delete_etcd(f"subnets/{key}")
            await until(lambda: fails(one, "lease"))
            await alarm(overlay, "DEACTIVATE")
            await until(lambda: fails(one))
            assert key in await overlay.read_leases()

            # firewall: rules that go come back; the check fails while they cannot.
            began = time.monotonic()
            for table, chain in (("filter", "FLANNEL-FWD"), ("nat", "FLANNEL-POSTRTG")):
                await machine.run("iptables", "-t", table, "-F", chain)
            await until(
                lambda: log_contains(one.log_path, "firewall rules were gone or changed; mended")
            )
            await until(lambda: has_rules(machine, "FLANNEL-FWD", "FLANNEL-POSTRTG"))
            print(f"flushed rules are back after {time.monotonic() - began:.1f} s")
            binary = await machine.run("readlink", "-f", "/usr/sbin/iptables")
            iptables = binary.stdout.strip()
            await machine.run("mount", "--bind", "/bin/false", iptables)
            await one.host.run("iptables", "-F", "FLANNEL-FWD")
            await until(lambda: fails(one, "firewall"))
            await machine.run("umount", iptables)
            await until(lambda: fails(one))
            await until(lambda: has_rules(machine, "FLANNEL-FWD"))

            # device: back at once, unless its route is somebody else's meanwhile.
            await one.host.run("ip", "link", "del", "flannel0")
            await until(lambda: log_contains(one.log_path, "device flannel0: address", times=2))
            await until(lambda: fails(one))
            await one.host.run("ip", "route", "replace", "10.5.0.0/16", "dev", "eth0")
            await one.host.run("ip", "link", "del", "flannel0")
            await until(lambda: fails(one, "device"))
            await one.host.run("ip", "route", "del", "10.5.0.0/16", "dev", "eth0")
            await until(lambda: fails(one))

            await one.host.run("ip", "link", "set", "eth0", "down")
            await until(lambda: fails(one, "underlay"))
            await one.host.run("ip", "link", "set", "eth0", "up")
            await until(lambda: fails(one))

            one.daemon.terminate()
            assert await asyncio.to_thread(one.daemon.wait, DEADLINE_S) == 0
            one.daemon = await machine.start(
                FLANNELD,
                f"-etcd-endpoints={overlay.etcd.url}",
                "-iface=eth0",
                HEALTH,
                "-subnet-file=/dev/null/subnet.env",
            )
            await until(lambda: fails(one, "subnet-file"))
            # A thread of its own writes the log.
            await until(lambda: "cannot write /dev/null/subnet.env" in one.log_path.read_text())


async def alarm(overlay: OverlayLab, action: str) -> None:
    """Make etcd believe, or no longer believe, that its disk is full."""

    def ask() -> None:
        body = json.dumps({"action": action, "memberID": 0, "alarm": "NOSPACE"}).encode()
        urllib.request.urlopen(f"{overlay.etcd.url}/v3/maintenance/alarm", body, timeout=5).close()

    await overlay.switch.call(ask)


async def has_rules(machine: Machine, *chains: str) -> bool:
    saved = (await machine.run("iptables-save")).stdout
    return all(f"-A {chain} " in saved for chain in chains)


async def test_nothing_leaks_and_cleanup_leaves_nothing(make_overlay: MakeOverlay) -> None:
    async with make_overlay(store="etcd", start=False) as overlay:
        one = overlay.nodes[1]
        async with await add_decoy(overlay.lab, [one]) as decoy:

            async def leaks() -> bool:
                await ping(one.host, "10.5.209.9", timeout_s=0.1)
                return decoy.leaked > 0

            await until(leaks)  # so the decoy is the default gateway: as yet there is no overlay
            async with Machine(overlay, one) as machine:
                # An administrator's own rules, which are to stay as they are.
                await one.host.run("iptables", "-A", "FORWARD", "-s", "203.0.113.9", "-j", "DROP")
                nat = ("-t", "nat", "-A", "POSTROUTING", "-s", "203.0.113.0/24", "-j", "ACCEPT")
                await one.host.run("iptables", *nat)
                before = await state_of(one.host)
                await leak_scenario(overlay, machine, decoy)
                await cleanup_scenario(machine, before)


async def leak_scenario(overlay: OverlayLab, machine: Machine, decoy: Decoy) -> None:
    one, two = overlay.nodes[1], overlay.nodes[2]
    flags = [f"-etcd-endpoints={overlay.etcd.url}", "-iface=eth0", "-ip-masq", HEALTH]
    flags += ["--ip-blackhole-route"]
    await overlay.start_daemon(two)
    daemon = await machine.start(FLANNELD, *flags)
    await overlay.wait_ready([two])
    await until(lambda: says(one, "/readyz", 200))
    await until(lambda: answers(one.host, two.tunnel_address))
    decoy.clear()
    async with PingStream(one.host, two.tunnel_address, pause_s=0.002) as stream:
        await until(lambda: has_received(stream, 50))
        daemon.kill()
        await asyncio.to_thread(daemon.wait)
        sent = stream.sent
        await until(lambda: has_sent(stream, sent + 200))
        route = (await one.host.run("ip", "route")).stdout
        assert re.search(r"unreachable 10\.5\.0\.0/16 (proto \d+ )?metric 4096", route)
        assert re.search(r"blackhole 10\.5\.\d+\.0/24 (proto \d+ )?metric 4096", route)
        assert "dev flannel0" not in route
        await machine.start(FLANNELD, *flags)
        got = stream.received
        await until(lambda: has_received(stream, got + 50))
    print(f"kill -9 and a restart by hand: {stream}; {decoy.leaked} packets leaked")
    assert decoy.seen == ""


async def cleanup_scenario(machine: Machine, before: Any) -> None:
    one = machine.node
    await until(lambda: says(one, "/readyz", 200))
    refused = await machine.run(TUNDP, "cleanup")
    assert refused.returncode == 1
    assert (
        "a daemon with --subnet-file /run/flannel/subnet.env runs: stop it first" in refused.stderr
    )
    assert await says(one, "/readyz", 200)
    daemon = one.host.processes[-1]
    daemon.terminate()
    assert await asyncio.to_thread(daemon.wait, DEADLINE_S) == 0

    stopped = await state_of(one.host)
    assert stopped != before
    dry = await machine.run(TUNDP, "cleanup", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "would remove route unreachable 10.5.0.0/16" in dry.stdout
    assert await state_of(one.host) == stopped
    assert machine.path("/run/flannel/subnet.env").exists()

    done = await machine.run(TUNDP, "cleanup")
    assert done.returncode == 0, done.stderr
    assert done.stdout == dry.stdout.replace("would remove", "removed")
    assert await state_of(one.host) == before
    assert not machine.path("/run/flannel/subnet.env").exists()
    assert not machine.path("/var/lib/tundp/last-known.json").exists()
    assert re.search(
        r"left lease 10\.5\.\d+\.0-24: in etcd until [-\d]+ [:\d]+ at the latest; .*"
        r"etcdctl del /coreos\.com/network/subnets/10\.5\.\d+\.0-24\n",
        done.stdout,
    )
    again = await machine.run(TUNDP, "cleanup")
    node_id = "left file /var/lib/tundp/node-id: the next start is the same node\n"
    assert (again.returncode, again.stdout) == (0, f"nothing to remove\n{node_id}")


async def test_config_check_and_show_of_a_running_daemon(make_overlay: MakeOverlay) -> None:
    """Bare commands must not speak of settings nobody runs."""
    async with make_overlay(store="file", nodes=1) as overlay:
        one = overlay.nodes[1]
        which = f"--admin-socket={one.admin_socket}"
        checked = await one.host.run(TUNDP, "config", "check", which)
        assert checked.returncode == 0, checked.stdout
        pid = one.daemon.pid
        first, *others = checked.stdout.splitlines()
        assert first.startswith(f"OK   settings: of the running daemon, pid {pid}")
        assert f"store=file:{overlay.lease_file}" in first
        (daemon,) = [line for line in others if " daemon: " in line]
        assert daemon.startswith("OK   daemon: runs with these settings")
        assert not [line for line in others if line.startswith(("WARN", "FAIL"))]

        shown = await one.host.run(TUNDP, "config", "show", "--origin", which)
        assert shown.stdout.startswith(f"# settings of the running daemon, pid {pid}")
        assert f'store = "file:{overlay.lease_file}"' in shown.stdout

        # Flags speak for themselves, and what runs is named.
        other = await one.host.run(
            TUNDP, "config", "check", "--json", which, f"--store=file:{overlay.lease_file}"
        )
        (finding,) = [each for each in json.loads(other.stdout) if each["id"] == "daemon"]
        assert finding["verdict"] == "warn"
        assert f"pid {pid}" in finding["evidence"]
        assert f"admin-socket '{one.admin_socket}'" not in finding["evidence"]
        assert f"subnet-file '{one.subnet_file}'" in finding["evidence"]
        assert "--running" in finding["next_step"]

        nobody = await one.host.run(
            *("setpriv", "--reuid=65534", "--clear-groups", TUNDP, "status", which)
        )
        assert nobody.returncode == 1
        assert f"only root may ask the daemon on {one.admin_socket}" in nobody.stderr


async def test_config_check_names_what_the_unit_cannot_write(make_overlay: MakeOverlay) -> None:
    async with make_overlay(store="file", nodes=1, start=False) as overlay:
        one = overlay.nodes[1]
        units = overlay.directory / "units"
        units.mkdir()
        shutil.copy(UNIT, units)
        # The namespace's own view of the host's unit directory.
        done = await one.host.run(
            "unshare",
            "--mount",
            "sh",
            "-c",
            'mount --bind "$1" /etc/systemd/system && shift && exec "$@"',
            "sh",
            str(units),
            TUNDP,
            "config",
            "check",
            "--json",
            f"--store=file:{overlay.lease_file}",
        )
        findings = {each["id"]: each for each in json.loads(done.stdout)}
        assert findings["files.unit.store"]["verdict"] == "warn"
        assert (
            "tundp.service lets the daemon write below"
            in (findings["files.unit.store"]["evidence"])
        )
        assert "/var/lib/tundp" in findings["files.unit.store"]["evidence"]
        assert "files.unit.state-dir" not in findings
        assert "files.unit.subnet-file" not in findings


async def test_config_check_and_show(make_overlay: MakeOverlay) -> None:
    async with make_overlay(store="etcd", nodes=1, start=False) as overlay:
        one = overlay.nodes[1]
        store = f"--etcd-endpoints={overlay.etcd.url}"

        async def check(*flags: str) -> tuple[int, dict[str, str], str]:
            done = await one.host.run(TUNDP, "config", "check", "--json", *flags)
            found = json.loads(done.stdout)
            verdicts = {each["title"]: each["verdict"] for each in found}
            details = "\n".join(each["evidence"] for each in found if each["verdict"] != "ok")
            return done.returncode, verdicts, details

        before = await state_of(one.host)
        code, verdicts, _ = await check(store, "--iface=eth0")
        # A note where br_netfilter is not loaded.
        assert (code, {*verdicts.values()} - {"note"}) == (0, {"ok"})
        human = await one.host.run(TUNDP, "config", "check", store, "--iface=eth0")
        assert human.returncode == 0
        assert "OK   network config: 10.5.0.0/16, /24 subnets" in human.stdout

        await one.host.route("10.5.0.0/16", via="192.0.2.254")
        code, verdicts, details = await check(store, "--iface=nosuch0")
        assert code == 1
        assert {what for what, verdict in verdicts.items() if verdict == "fail"} == {
            "interface",
            "route",
        }
        assert "10.5.0.0/16 over eth0 overlaps the network 10.5.0.0/16" in details
        assert "nosuch0" in details
        await one.host.run("ip", "route", "del", "10.5.0.0/16")

        await overlay.write_etcd("config", '{"Network": "10.5.0.0/16", "SubnetLen": 31}')
        code, verdicts, details = await check(store, "--iface=eth0")
        assert (code, verdicts["network config"]) == (1, "fail")
        assert "SubnetLen is 31" in details
        code, verdicts, details = await check("--etcd-endpoints=http://192.0.2.254:1")
        assert (code, verdicts["store"], verdicts["interface"]) == (1, "fail", "fail")
        assert "connection refused" in details
        assert await state_of(one.host) == before
        assert await overlay.read_leases() == {}

        wrong = await one.host.run(TUNDP, "config", "check", "--iface")
        assert wrong.returncode == 2
        file = overlay.directory / "tundp.toml"
        file.write_text("ip-masq = true\n")
        shown = await one.host.run(
            *(TUNDP, "config", "show", "--origin", f"--config={file}", "--iface=eth0"),
            environment={
                "FLANNELD_ETCD_PREFIX": "/blue",
                "FLANNELD_ETCD_USERNAME": "root",
                "FLANNELD_ETCD_PASSWORD": "hunter2",
            },
        )
        assert shown.returncode == 0
        lines = {line.split(" = ")[0]: line.split() for line in shown.stdout.splitlines()}
        assert lines["iface"][2:] == ['["eth0"]', "#", "--iface"]
        assert lines["etcd-prefix"][2:] == ['"/blue"', "#", "FLANNELD_ETCD_PREFIX"]
        assert lines["ip-masq"][2:] == ["true", "#", str(file)]
        assert lines["lease-ttl"][2:] == ["86400", "#", "default"]
        assert lines["etcd-password"][2:] == ['"***"', "#", "FLANNELD_ETCD_PASSWORD"]
        assert "hunter2" not in shown.stdout + shown.stderr
