"""Broken labs: each fault is planted, `tundp doctor` names it, and its command mends it."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Iterator

import pytest

from tests.netns.broken_lab import PATH, TUNDP, Runner, fails, plant_name_mend
from tests.netns.broken_rows import ROWS, WORSE
from tests.netns.calm import CALM
from tests.nodes import MakeLab, must_run
from tests.thorough import IS_ALL
from tests.wait import until
from tundp.lab.overlay import make_directory
from tundp.linux.listeners import process_state


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    made = Runner()
    try:
        made.run(made.broken.set_up())
        yield made
    finally:
        made.close()


# Each takes seconds of traffic that fails first: a third in the suite, all by `make labs`.
CHOSEN = [name for name, row in ROWS.items() if IS_ALL or row.quick]


@pytest.mark.parametrize("name", CHOSEN)
def test_a_fault_is_named_and_its_command_mends_it(runner: Runner, name: str) -> None:
    runner.run(plant_name_mend(runner.broken, ROWS[name]))


def test_when_all_is_mended_nothing_is_wrong_on_either_node(runner: Runner) -> None:
    async def main() -> None:
        for number in (1, 2):
            await until(lambda n=number: fine(n), f"node {number} has nothing wrong", poll_s=0.5)
            assert not wrong

    wrong: list[str] = []

    async def fine(number: int) -> bool:
        found = await runner.broken.doctor(number)
        wrong[:] = [each["evidence"] for each in found["findings"] if each["verdict"] in WORSE]
        return not wrong and "peers" in found["looked_at"]

    runner.run(main())


CALM_ONES = [name for name, each in CALM.items() if IS_ALL or each.quick]


@pytest.mark.parametrize("name", CALM_ONES)
def test_what_works_is_no_finding(runner: Runner, name: str) -> None:
    broken, calm = runner.broken, CALM[name]
    last: list[str] = []

    async def is_calm() -> bool:
        found = await broken.doctor(2)
        last[:] = [
            f"{each['verdict']} {each['id']}: {each['evidence']}"
            for each in found["findings"]
            if each["verdict"] in (*WORSE, "unknown")
        ]
        return not last

    async def main() -> None:
        node = broken.two
        await until(lambda: broken.passes("pods"), "packets pass before")
        storm = None
        try:
            await broken.sh(node.host, calm.plant)
            assert await broken.passes("pods"), "this is a fault"
            assert await broken.passes("large"), "this is a fault"
            storm = await broken.pings()
            await until(is_calm, "doctor finds nothing", deadline_s=5, poll_s=0.5)
        except AssertionError as error:
            error.add_note("\n".join(last))
            raise
        finally:
            if storm is not None:
                storm.kill()
            await broken.sh(node.host, calm.undo)
            await broken.masquerade(node)

    runner.run(main())


SELF_MENDED = {
    "the TUN is deleted": "ip link del flannel0",
    "the TUN is set down": "ip link set flannel0 down",
    "the TUN loses its address": "ip addr flush dev flannel0",
    "the overlay's route is gone": "ip route del 10.5.0.0/16 dev flannel0",
    "subnet.env is overwritten": "echo FLANNEL_SUBNET=10.5.99.1/24 > $ENV2",
    "the lease is deleted": "$DEL/$KEY2",
    "the etcd lease is revoked": "$LEASE revoke $(printf %x $($GET/$KEY2 --write-out=fields |"
    " sed -n 's/.*\"Lease\" : //p'))",
    "the uplink has another address": "ip addr del 192.0.2.2/24 dev eth0; ip addr add"
    " 192.0.2.52/24 dev eth0",
}
"""What the daemon itself mends: doctor has nothing to do, and soon nothing to say."""


@pytest.mark.parametrize("name", SELF_MENDED)
def test_what_the_daemon_mends_is_soon_no_finding(runner: Runner, name: str) -> None:
    broken = runner.broken
    broken.variables["ENV2"] = str(broken.two.subnet_file)

    async def mended() -> bool:
        if not await broken.passes("pods"):
            return False
        found = await broken.doctor(2, "--only=daemon,device,underlay,subnet-env,peer,lease")
        return bool(found["exit_code"] == 0)

    async def main() -> None:
        await until(lambda: broken.passes("pods"), "packets pass before")
        await broken.sh(broken.two.host, SELF_MENDED[name])
        await until(mended, "packets pass, and doctor finds nothing", poll_s=0.5)

    try:
        runner.run(main())
    finally:
        undo = "ip addr del 192.0.2.52/24 dev eth0; ip addr add 192.0.2.2/24 dev eth0"
        if "192.0.2.52" in SELF_MENDED[name]:
            runner.run(broken.two.host.run("sh", "-c", undo))


def test_fix_runs_one_command_and_looks_again(runner: Runner) -> None:
    broken = runner.broken
    node = broken.two

    async def fix(*flags: str) -> tuple[int, str]:
        argv = [TUNDP, "doctor", f"--admin-socket={node.admin_socket}", *flags]
        done = await node.host.run(*argv, environment={"PATH": PATH})
        return done.returncode, done.stdout + done.stderr

    async def main() -> None:
        name = "obstacle.forwarding"
        await broken.sh(node.host, "sysctl -q -w net.ipv4.ip_forward=0; ip link set cni0 mtu 1480")
        code, text = await fix(f"--fix={name}")
        assert code == 2
        assert "sysctl -w net.ipv4.ip_forward=1" in text
        assert "there is nobody: --yes" in text, "it asks, and nobody is there"
        assert not await broken.passes("pods"), "nothing was done"
        code, text = await fix(f"--fix={name}", "--yes")
        assert code == 0, text
        assert "mended: looked again, and it is gone" in text
        assert await broken.passes("pods")
        found = await broken.doctor(2, "--only=pods.mtu")
        assert found["exit_code"] == 3, "never two things"
        code, text = await fix("--fix=pods.mtu", "--yes")
        assert code == 0, text
        code, text = await fix("--fix=pods.mtu", "--yes")
        assert (code, text) == (0, "pods.mtu: not found\n")

    runner.run(main())


def test_a_command_for_another_node_is_not_run_here(runner: Runner) -> None:
    broken = runner.broken

    async def main() -> None:
        await broken.sh(broken.two.host, "iptables -I INPUT -p udp --dport 8285 -j DROP")
        try:
            await until(lambda: fails(broken, "pods"), "this is a fault")
            argv = [TUNDP, "doctor", "--fix=peer.filtered", "--yes"]
            argv.append(f"--admin-socket={broken.one.admin_socket}")
            done = await broken.one.host.run(*argv, environment={"PATH": PATH})
            assert done.returncode == 1
            assert "this is for 192.0.2.2: tundp doctor" in done.stdout
        finally:
            await broken.sh(broken.two.host, "iptables -D INPUT -p udp --dport 8285 -j DROP")

    runner.run(main())


HANGS = """#!/bin/sh
echo $$ >> {pids}
exec sleep 1000
"""


def test_a_program_that_hangs_holds_up_no_answer(runner: Runner) -> None:
    """What is not finished is not called fine, is not left behind, and hides nothing else."""
    broken = runner.broken
    node, pids = broken.two, broken.overlay.directory / "pids"
    fakes = broken.overlay.directory / "fakes"
    fakes.mkdir()
    (fakes / "nft").write_text(HANGS.format(pids=pids))
    (fakes / "nft").chmod(0o755)

    async def main() -> None:
        forwarding = "sysctl -q -w net.ipv4.ip_forward"
        await broken.sh(node.host, f"ip link set cni0 mtu 1480; {forwarding}=0")
        try:
            found = await broken.doctor(2, path=f"{fakes}:{PATH}")
        finally:
            await broken.sh(node.host, f"ip link set cni0 mtu 1472; {forwarding}=1")
        blind = {each["check"]: each for each in found["findings"] if each["verdict"] == "unknown"}
        assert {"obstacles", "masquerade"} <= set(blind), found
        assert "firewall rules: not finished within" in blind["obstacles"]["evidence"]
        assert blind["masquerade"]["evidence"].startswith("not finished: it takes longer than")
        assert not {"obstacles", "masquerade"} & set(found["looked_at"])
        assert {"obstacles", "masquerade"} <= set(found["not_looked_at"])
        ids = {each["id"] for each in found["findings"]}
        assert {"pods.mtu", "obstacle.forwarding"} <= ids, "what was found by then"
        assert {"peers", "device"} <= set(found["looked_at"])
        started = [int(line) for line in pids.read_text().split()]
        assert started, "nft was run"
        await until(lambda: not any(map(is_alive, started)), "they are ended")

    runner.run(main())


def is_alive(pid: int) -> bool:
    return process_state(pid) not in ("", "Z")


def test_fix_asks_who_is_there_and_does_what_it_is_told(runner: Runner) -> None:
    broken = runner.broken
    node = broken.two
    # A terminal for it, whose keys come by a pipe.
    typed = (
        "import os, pty, sys; status = pty.spawn(sys.argv[1:]);"
        " sys.exit(os.waitstatus_to_exitcode(status))"
    )

    async def fix(keys: str, *flags: str) -> tuple[int, str]:
        words = [sys.executable, "-c", typed, TUNDP, "doctor", "--fix=pods.mtu", *flags]
        words.append(f"--admin-socket={node.admin_socket}")
        shell = f"{{ printf {shlex.quote(keys)}; sleep 3; }} | {shlex.join(words)}"
        done = await node.host.run("sh", "-c", shell, environment={"PATH": PATH})
        return done.returncode, done.stdout

    async def mtu() -> int:
        shown = await must_run(node.host, *["ip", "-j", "link", "show", "cni0"])
        return int(json.loads(shown)[0]["mtu"])

    async def main() -> None:
        await broken.sh(node.host, "ip link set cni0 mtu 1480")
        code, text = await fix("n\\n")
        assert (code, await mtu()) == (1, 1480), text
        assert "ip link set dev cni0 mtu 1472" in text
        assert "run it? [y/N]" in text
        assert "nothing was done" in text
        code, text = await fix("y\\n")
        assert (code, await mtu()) == (0, 1472), text
        assert "mended: looked again" in text

    try:
        runner.run(main())
    finally:
        runner.run(broken.sh(node.host, "ip link set cni0 mtu 1472"))


async def test_without_a_daemon_it_says_what_it_could_not_look_at(make_lab: MakeLab) -> None:
    async with make_lab() as lab:
        host = await lab.host("bare")
        directory = make_directory()
        try:
            argv = [TUNDP, "doctor", "--json", f"--subnet-file={directory}/subnet.env"]
            argv += [f"--state-dir={directory}", f"--store=file:{directory}/leases.json"]
            done = await host.run(*argv)
            found = json.loads(done.stdout)
        finally:
            shutil.rmtree(directory)
    assert done.returncode == found["exit_code"] == 1
    ids = {each["id"] for each in found["findings"]}
    assert {"daemon.dead", "not-looked.peers", "not-looked.drops"} <= ids
    assert not {"peers", "drops", "lease", "obstacles"} & set(found["looked_at"])
