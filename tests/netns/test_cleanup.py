"""`tundp cleanup` beside others who use what it would remove: a stock flannel above all."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.netns.machine import TUNDP, Machine, state_of
from tests.nodes import MakeLab, MakeOverlay
from tests.wait import until
from tundp.lab.lab import processes_in, stop_process

SUBNET_FILE = "/run/flannel/subnet.env"
NAMES = ("FLANNEL-POSTRTG", "FLANNEL-FWD")


@contextlib.asynccontextmanager
async def stopped_node(make_overlay: Any, tmp_path: Path, *flags: str) -> AsyncIterator[Machine]:
    """A machine whose tundp has run, with masquerading, and was stopped."""
    async with (
        make_overlay(nodes=1, start=False) as overlay,
        Machine(overlay, overlay.nodes[1]) as machine,
    ):
        await run_tundp(overlay, machine, *flags)
        yield machine


async def run_tundp(overlay: Any, machine: Machine, *flags: str) -> None:
    store = f"--store=file:{overlay.lease_file}"
    daemon = await machine.start(TUNDP, "run", store, "--iface=eth0", "--ip-masq", *flags)
    subnet_file = next(
        (flag.partition("=")[2] for flag in flags if flag.startswith("--subnet-file=")), SUBNET_FILE
    )

    async def is_set_up() -> bool:
        assert daemon.poll() is None, machine.node.log_tail()
        rules = (await machine.node.host.run("nft", "list", "ruleset")).stdout
        return machine.path(subnet_file).exists() and all(name in rules for name in NAMES)

    await until(is_set_up)
    assert await stop_process(daemon) == 0


async def cleanup(machine: Machine, *arguments: str) -> tuple[list[str], list[str]]:
    """What was removed (with --dry-run: would be), and what was left."""
    done = await machine.run(TUNDP, "cleanup", *arguments)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    removed = [line for line in lines if line.startswith(("removed ", "would remove "))]
    return removed, [line for line in lines if line.startswith("left ")]


class FlannelProcess:
    """A program called flanneld, as the one of another process namespace or container is."""

    says = "flanneld (pid "

    def __init__(self, machine: Machine, tmp_path: Path) -> None:
        self._machine = machine
        self._program = tmp_path / "flanneld"

    async def start(self) -> None:
        await asyncio.to_thread(shutil.copy, "/bin/sleep", self._program)
        self._process = await self._machine.start(str(self._program), "1000")
        name = Path(f"/proc/{self._process.pid}/comm")
        await until(lambda: name.read_text() == "flanneld\n")

    async def stop(self) -> None:
        await stop_process(self._process)


class OtherProgram(FlannelProcess):
    """A flannel under another name, or one that cannot be told from others by its files."""

    def __init__(self, machine: Machine, tmp_path: Path, name: str, script: str, says: str) -> None:
        super().__init__(machine, tmp_path)
        self._program = tmp_path / name
        self._script = script
        self.says = says

    async def start(self) -> None:
        # A shell: it takes any argument, and stays the process while it waits.
        await asyncio.to_thread(shutil.copy, "/bin/dash", self._program)
        self._process = await self._machine.start(
            "sh", "-c", self._script.format(program=self._program)
        )
        host = self._machine.node.host

        async def runs() -> bool:
            listed = (await host.run("ps", "-eo", "comm")).stdout.splitlines()
            return self._program.name[:15] in listed

        await until(runs)

    async def stop(self) -> None:
        await stop_process(self._process)
        for pid in processes_in(self._machine.node.host.namespace):
            # One that ends by itself meanwhile needs no signal.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if Path(f"/proc/{pid}/exe").readlink() == self._program:
                    os.kill(pid, signal.SIGKILL)


class PortHolder(FlannelProcess):
    """flannel's proxy by another name: it is bound to the port of the lease cache's config."""

    says = "runs on udp port 8285"

    async def start(self) -> None:
        program = "import socket; s = socket.socket(2, 2); s.bind(('', 8285)); print(1, flush=True)"
        self._process = await self._machine.start(
            sys.executable, "-c", f"{program}; import time; time.sleep(1000)"
        )
        host = self._machine.node.host

        async def is_bound() -> bool:
            return ":8285 " in (await host.run("ss", "-Hlun")).stdout

        await until(is_bound)


class Device(FlannelProcess):
    """A device of flannel's whose process cannot be seen from here, or is needed no more."""

    def __init__(self, machine: Machine, tmp_path: Path, name: str, *make: str) -> None:
        super().__init__(machine, tmp_path)
        self.says = f"device {name} is "
        self._name, self._make = name, make

    async def start(self) -> None:
        for command in (self._make, ("ip", "link", "set", self._name, "up")):
            done = await self._machine.node.host.run(*command)
            assert done.returncode == 0, done.stderr

    async def stop(self) -> None:
        await self._machine.node.host.run("ip", "link", "delete", self._name)


def owners(machine: Machine, tmp_path: Path) -> list[FlannelProcess]:
    vxlan = "ip link add flannel.1 type vxlan id 1 dstport 8472 local 192.0.2.1 dev eth0"
    waits = "-c 'while :; do sleep 1; done'"
    return [
        FlannelProcess(machine, tmp_path),
        OtherProgram(
            machine, tmp_path, "kube-flannel", f"exec {{program}} {waits}", "kube-flannel (pid "
        ),
        OtherProgram(
            machine,
            tmp_path,
            "flanneld.box",
            f"exec unshare --mount --pid --fork {{program}} {waits}",
            "flanneld.box (pid ",
        ),
        # Only a tundp holds such a file, but not everybody who does is one.
        OtherProgram(
            machine,
            tmp_path,
            "flanneld.lock",
            f"exec 9>{tmp_path}/.leader.lock; exec {{program}} {waits}",
            "flanneld.lock (pid ",
        ),
        OtherProgram(
            machine, tmp_path, "k3s", f"exec {{program}} {waits} agent", "with a flannel inside"
        ),
        PortHolder(machine, tmp_path),
        Device(machine, tmp_path, "flannel0", *["ip", "tuntap", "add", "flannel0", "mode", "tun"]),
        Device(machine, tmp_path, "flannel.1", *vxlan.split()),
    ]


async def test_what_a_running_flannel_uses_stays(make_overlay: MakeOverlay, tmp_path: Path) -> None:
    async with stopped_node(make_overlay, tmp_path) as machine:
        host = machine.node.host
        await cleanup(machine, "--dry-run")
        text = machine.path(SUBNET_FILE).read_text()
        for owner in owners(machine, tmp_path):
            await owner.start()
            rules = (await host.run("nft", "list", "ruleset")).stdout
            assert all(name in rules for name in NAMES)
            _, announced = await cleanup(machine, "--dry-run")
            removed, left = await cleanup(machine)
            assert left == announced
            assert (await host.run("nft", "list", "ruleset")).stdout == rules
            assert machine.path(SUBNET_FILE).read_text() == text
            assert not any("FLANNEL" in line or SUBNET_FILE in line for line in removed)
            for thing in (*NAMES, f"file {SUBNET_FILE}"):
                (line,) = [line for line in left if thing in line]
                assert owner.says in line
            await owner.stop()
        removed, left = await cleanup(machine)
        for thing in (*NAMES, SUBNET_FILE):
            assert any(thing in line for line in removed), (thing, removed, left)
        assert not machine.path(SUBNET_FILE).exists()
        assert "FLANNEL" not in (await host.run("nft", "list", "ruleset")).stdout
        assert "proto 85" not in (await host.run("ip", "route")).stdout


OLD_RULES = """
iptables -t nat -A POSTROUTING -s 10.5.0.0/16 -d 10.5.0.0/16{c} -j RETURN
iptables -t nat -A POSTROUTING -s 10.5.0.0/16 ! -d 224.0.0.0/4{c} -j MASQUERADE
iptables -t nat -A POSTROUTING ! -s 10.5.0.0/16 -d {subnet}{c} -j RETURN
iptables -t nat -A POSTROUTING ! -s 10.5.0.0/16 -d 10.5.0.0/16{c} -j MASQUERADE
iptables -A FORWARD -s 10.5.0.0/16{f} -j ACCEPT
iptables -A FORWARD -d 10.5.0.0/16{f} -j ACCEPT
"""
"""What flannel before v0.20 writes; c and f are the comments of v0.16.2 to v0.19.2."""


@pytest.mark.parametrize("comment", ["", ' -m comment --comment "flanneld {}"'])
async def test_beside_a_flannel_that_has_no_chains_ours_go(
    make_overlay: MakeOverlay, tmp_path: Path, comment: str
) -> None:
    """Rolled back to a version before v0.20, and started before anybody cleaned up."""
    async with stopped_node(make_overlay, tmp_path) as machine:
        host = machine.node.host
        text = machine.path(SUBNET_FILE).read_text()
        subnet = text.split("FLANNEL_SUBNET=")[1].split("\n")[0].replace(".1/24", ".0/24")
        program = tmp_path / "flanneld"
        # What a flanneld of that age has in its program, and what it has not.
        program.write_bytes(Path("/bin/sleep").read_bytes() + b"\0POSTROUTING\0")
        program.chmod(0o755)
        owner = await machine.start(str(program), "1000")
        copy = machine.path(SUBNET_FILE).with_name("new")
        copy.write_text(text)
        copy.rename(machine.path(SUBNET_FILE))
        rules = OLD_RULES.format(
            subnet=subnet, c=comment.format("masq"), f=comment.format("forward")
        )
        assert (await host.run("sh", "-ec", rules)).returncode == 0
        removed, left = await cleanup(machine)
        saved = (await host.run("iptables-save")).stdout
        assert [line for line in saved.splitlines() if line.startswith("-A")] == sorted(
            [
                line.removeprefix("iptables ").removeprefix("-t nat ")
                for line in rules.strip().splitlines()
            ],
            key=lambda line: "POSTROUTING" in line,
        )
        assert "FLANNEL" not in saved
        for name in NAMES:
            assert any(f"chain {name}" in line for line in removed)
        (line,) = [line for line in left if f"file {SUBNET_FILE}" in line]
        assert "flanneld (pid " in line
        assert machine.path(SUBNET_FILE).read_text() == text
        await stop_process(owner)


async def test_another_networks_rules_in_our_chains_stay_without_a_process(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    """A k3s of another process namespace, with kernel routes: no device and no port shows it."""
    async with stopped_node(make_overlay, tmp_path) as machine:
        host = machine.node.host
        theirs = '-s 10.42.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT'
        assert (await host.run("sh", "-ec", f"iptables -A FLANNEL-FWD {theirs}")).returncode == 0
        removed, left = await cleanup(machine)
        rules = (await host.run("iptables", "-S")).stdout
        assert f"-A FLANNEL-FWD {theirs}" in rules
        assert "-j FLANNEL-FWD" in rules
        assert "10.5.0.0/16" not in rules
        assert "FLANNEL" not in (await host.run("iptables", "-t", "nat", "-S")).stdout
        assert any("2 rules of chain FLANNEL-FWD" in line for line in removed)
        (line,) = [line for line in left if "FLANNEL-FWD" in line]
        assert "for 10.42.0.0/16: not a network this tundp is known to have had" in line


async def test_a_k3s_without_flannel_owns_nothing(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    async with stopped_node(make_overlay, tmp_path) as machine:
        owner = OtherProgram(
            machine,
            tmp_path,
            "k3s",
            "exec {program} -c 'while :; do sleep 1; done' server --flannel-backend=none",
            "",
        )
        await owner.start()
        await cleanup(machine)
        assert "FLANNEL" not in (await machine.node.host.run("nft", "list", "ruleset")).stdout
        await owner.stop()


async def test_turning_rules_off_removes_them_at_the_next_start(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    """And so for the rules of a flannel whose settings were other ones."""
    async with (
        make_overlay(nodes=1, start=False) as overlay,
        Machine(overlay, overlay.nodes[1]) as machine,
    ):
        host = machine.node.host
        await run_tundp(overlay, machine)
        store = f"--store=file:{overlay.lease_file}"
        for flags, expected in (
            ((), ["FLANNEL-FWD"]),
            (("--iptables-forward-rules=false",), []),
        ):
            machine.path(SUBNET_FILE).unlink()  # as after a reboot; its return shows the start
            daemon = await machine.start(TUNDP, "run", store, "--iface=eth0", *flags)

            async def is_set_up(daemon: Any = daemon) -> bool:
                assert daemon.poll() is None, machine.node.log_tail()
                return machine.path(SUBNET_FILE).exists()

            await until(is_set_up)
            rules = (await host.run("iptables-save")).stdout
            assert [name for name in NAMES if name in rules] == expected
            assert await stop_process(daemon) == 0
        log = machine.node.log_path.read_text()
        assert "removed what was there before: iptables nat: chain FLANNEL-POSTRTG" in log
        assert "removed what was there before: iptables filter: chain FLANNEL-FWD" in log


async def test_a_daemon_with_few_rights_removes_rules_of_the_old_back_end(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    """iptables-legacy needs CAP_NET_RAW, which a daemon with the other back end gives up."""
    async with (
        make_overlay(nodes=1, start=False) as overlay,
        Machine(overlay, overlay.nodes[1]) as machine,
    ):
        host = machine.node.host
        rules = OLD_RULES.format(
            subnet="10.5.7.0/24",
            c=' -m comment --comment "flanneld masq"',
            f=' -m comment --comment "flanneld forward"',
        ).replace("iptables", "iptables-legacy")
        assert (await host.run("sh", "-ec", rules)).returncode == 0
        await run_tundp(overlay, machine)
        assert "10.5." not in (await host.run("iptables-legacy-save")).stdout
        assert "older rules may be left" not in machine.node.log_path.read_text()


async def test_rules_of_another_network_saved_over_a_reboot_go(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    """The network config changed, /run is empty, and netfilter-persistent restored the rules."""
    async with (
        make_overlay(nodes=1, start=False) as overlay,
        Machine(overlay, overlay.nodes[1]) as machine,
    ):
        await run_tundp(overlay, machine)
        machine.path(SUBNET_FILE).unlink()
        overlay.write_lease_file({"Network": "10.9.0.0/16"})
        await run_tundp(overlay, machine)
        rules = (await machine.node.host.run("iptables-save")).stdout
        assert "10.9.0.0/16" in rules
        assert "10.5." not in rules


async def test_subnet_env_that_a_flannel_wrote_since_stays_and_so_do_its_chains(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    """The same text, byte for byte: flannel, restarting just now, would write it so."""
    async with stopped_node(make_overlay, tmp_path) as machine:
        env = machine.path(SUBNET_FILE)
        copy = env.with_name("subnet.env.new")
        copy.write_text(env.read_text())
        copy.rename(env)
        before = (await machine.node.host.run("nft", "list", "ruleset")).stdout
        removed, left = await cleanup(machine)
        assert env.exists()
        assert (await machine.node.host.run("nft", "list", "ruleset")).stdout == before
        assert any("route unreachable 10.5.0.0/16" in line for line in removed)
        for thing in (*NAMES, f"file {SUBNET_FILE}"):
            (line,) = [line for line in left if thing in line and "lease" not in line]
            assert "somebody else wrote /run/flannel/subnet.env after tundp" in line
        env.unlink()
        await cleanup(machine)
        assert "FLANNEL" not in (await machine.node.host.run("nft", "list", "ruleset")).stdout


async def test_stock_flannel_alone_loses_nothing(make_overlay: MakeOverlay, tmp_path: Path) -> None:
    """No tundp ever ran here with these files: cleanup has nothing to go by, and leaves all."""
    async with stopped_node(make_overlay, tmp_path) as machine:
        for name in (f"{SUBNET_FILE.replace('subnet', '.subnet')}.lock", "/var/lib/tundp"):
            path = machine.path(name)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        await machine.node.host.run(*["ip", "route", "delete", "unreachable", "10.5.0.0/16"])
        before = await state_of(machine.node.host)
        removed, left = await cleanup(machine)
        assert removed == []
        assert any("subnet.env is not known to be tundp's" in line for line in left)
        assert machine.path(SUBNET_FILE).exists()
        assert await state_of(machine.node.host) == before


async def test_another_network_beside_a_running_flannel_is_cleaned_up(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    """Its chains and files have names of their own, which no flannel has."""
    blue = "/run/flannel/blue.env"
    async with stopped_node(make_overlay, tmp_path, f"--subnet-file={blue}") as machine:
        owner = FlannelProcess(machine, tmp_path)
        await owner.start()
        machine.path(SUBNET_FILE).write_text("FLANNEL_NETWORK=10.5.0.0/16\n")
        removed, _ = await cleanup(machine, f"--subnet-file={blue}")
        assert any(f"file {blue}" in line for line in removed)
        assert "FLANNEL" not in (await machine.node.host.run("nft", "list", "ruleset")).stdout
        assert machine.path(SUBNET_FILE).exists()
        await owner.stop()


async def test_a_flannel_with_the_same_other_file_keeps_it(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    blue = "/run/flannel/blue.env"
    async with stopped_node(make_overlay, tmp_path, f"--subnet-file={blue}") as machine:
        program = tmp_path / "flanneld"
        await asyncio.to_thread(shutil.copy, "/bin/sleep", program)
        owner = await machine.start(str(program), "1000", FLANNELD_SUBNET_FILE=blue)
        name = Path(f"/proc/{owner.pid}/comm")
        await until(lambda: name.read_text() == "flanneld\n")
        removed, left = await cleanup(machine, f"--subnet-file={blue}")
        assert not any(f"file {blue}" in line for line in removed)
        assert any(line.startswith(f"left file {blue}: flanneld (pid ") for line in left)
        assert machine.path(blue).exists()
        await stop_process(owner)


async def test_sockets_of_killed_daemons_go_and_live_ones_stay(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    async with stopped_node(make_overlay, tmp_path) as machine:
        store = f"--store=file:{tmp_path}/other.json"
        Path(tmp_path / "other.json").write_text(
            '{"config": {"Network": "10.9.0.0/16", "Backend": {"Type": "udp", "Port": 8299}},'
            ' "leases": {}}'
        )
        flags = ("--iface=eth0", "--tun-name=blue0")

        async def start(name: str) -> Any:
            daemon = await machine.start(
                TUNDP, "run", store, *flags, f"--subnet-file=/run/flannel/{name}.env"
            )
            path = machine.path(f"/run/tundp/run-flannel-{name}.env.sock")

            async def is_there() -> bool:
                assert daemon.poll() is None, machine.node.log_tail()
                return path.exists() and machine.path(f"/run/flannel/{name}.env").exists()

            await until(is_there)
            return daemon, path

        killed, stale = await start("dead")
        killed.send_signal(signal.SIGKILL)
        await asyncio.to_thread(killed.wait)
        daemon, live = await start("live")
        removed, _ = await cleanup(machine)
        assert "removed socket /run/tundp/run-flannel-dead.env.sock" in removed
        assert not stale.exists()
        assert live.exists()
        assert await stop_process(daemon) == 0


async def test_a_running_daemon_without_its_lock_is_noticed(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    async with (
        make_overlay(nodes=1, start=False) as overlay,
        Machine(overlay, overlay.nodes[1]) as machine,
    ):
        daemon = await machine.start(
            TUNDP, "run", f"--store=file:{overlay.lease_file}", "--iface=eth0"
        )

        async def is_there() -> bool:
            assert daemon.poll() is None, machine.node.log_tail()
            return machine.path(SUBNET_FILE).exists()

        await until(is_there)
        machine.path("/run/flannel/.subnet.env.lock").unlink()
        done = await machine.run(TUNDP, "cleanup")
        assert done.returncode == 1
        assert "runs: stop it first" in done.stderr
        assert machine.path(SUBNET_FILE).exists()
        assert await stop_process(daemon) == 0


@pytest.mark.parametrize("arguments", [(), ("--dry-run",)], ids=" ".join)
async def test_without_rights_it_says_so_in_one_sentence(
    make_lab: MakeLab, arguments: tuple[Any, ...]
) -> None:
    async with make_lab() as lab:
        host = await lab.host("here")
        command = ["setpriv", "--bounding-set=-all", "--reuid=65534", "--clear-groups"]
        done = await host.run(*command, sys.executable, "-m", "tundp", "cleanup", *arguments)
        assert done.returncode == 1
        assert done.stderr.startswith(
            "tundp: firewall rules and routes to remove need CAP_NET_ADMIN, which this process"
            " lacks: run as root"
        )
        assert done.stderr.count("\n") == 1
