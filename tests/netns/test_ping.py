"""`tundp ping`: real daemons, real breaks, and the one sentence that names each of them."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tests.json_schema import validate
from tests.netns.conftest import NETWORK
from tests.netns.test_path_measuring import SWALLOW, world
from tests.nodes import MakeLab, MakeOverlay, answers, must_run
from tests.wait import until
from tundp.lab.lab import stop_process
from tundp.lab.overlay import LabNode, OverlayLab
from tundp.observe import schema

TUNDP = (sys.executable, "-m", "tundp")
SCHEMA = json.loads(Path(schema.__file__).with_name("ping.schema.json").read_text())
PORT_RULE = ("INPUT", "-p", "udp", "--dport", "8285", "-j")


async def run(node: LabNode, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`tundp ping` on a node."""
    flags = (f"--admin-socket={node.admin_socket}", f"--subnet-file={node.subnet_file}")
    return await node.host.run(*TUNDP, "ping", *arguments, *flags)


async def ping(node: LabNode, *arguments: str, code: int) -> dict[str, Any]:
    """Its JSON; the exit code must be `code`."""
    began = time.monotonic()
    done = await run(node, *arguments, "-o", "json")
    assert done.returncode == code, f"{done.returncode}: {done.stdout}{done.stderr}"
    found: dict[str, Any] = json.loads(done.stdout)
    print(f"{time.monotonic() - began:.1f} s: {found['conclusion']}")
    validate(found, SCHEMA)
    return found


def answer(found: dict[str, Any], layer: str) -> str:
    (each,) = (each for each in found["layers"] if each["id"] == layer)
    return str(each["answer"])


def all_answers(found: dict[str, Any]) -> dict[str, str]:
    return {each["id"]: each["answer"] for each in found["layers"]}


async def test_every_layer_of_a_healthy_peer(make_overlay: MakeOverlay) -> None:
    async with make_overlay(pods=True) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        found = await ping(one, two.public_ip, code=0)
        assert set(all_answers(found).values()) == {"answered"}, found
        assert found["peer"]["subnet"] == str(two.gateway.network)
        assert re.fullmatch(r"tundp \d\S*", found["peer"]["implementation"])
        assert found["path"]["largest"] == found["path"]["device_mtu"] == 1472
        series = found["series"]
        assert (series["sent"], series["received"]) == (5, 5)
        assert 0 < series["rtt_min_ms"] <= series["rtt_avg_ms"] <= series["rtt_max_ms"]
        # One machine has one clock: its offset must be within what is said of its error.
        assert abs(found["clock"]["offset_s"]) <= found["clock"]["error_s"] + 1e-4
        for name in (str(two.gateway.network), two.pod_address, two.tunnel_address):
            again = await ping(one, name, "-c", "1", code=0)
            assert again["peer"]["public_ip"] == two.public_ip, name

        done = await run(one, two.public_ip, "-c", "2", "--size", "1472")
        assert done.returncode == 0, done.stderr
        assert re.search(
            r"(?m)^TUN \(its kernel\) +ICMP echo 10\.5\.\S+ +answers +\S+ ms", done.stdout
        )
        assert "loss  0/2 of 1472 bytes, RTT min/avg/max/mdev " in done.stdout
        assert done.stdout.splitlines()[-1] == (
            f"ok: {two.gateway.network} answers through the overlay"
        )


async def test_who_is_no_peer_is_refused_in_words(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one = overlay.nodes[1]
        for text, words in (
            (one.public_ip, "is this node"),
            (one.pod_address, "is this node"),
            ("192.0.2.99", "no lease of a peer has it; peers are 10.5."),
            ("nobody.example", "no lease names that host"),
        ):
            done = await run(one, text)
            assert (done.returncode, words in done.stderr) == (2, True), done.stderr
            assert done.stdout == ""
        done = await run(one, overlay.nodes[2].public_ip, "--size", "1473")
        assert done.returncode == 2
        assert "above the 1472 bytes that flannel0 takes" in done.stderr


# Breaks


@contextlib.asynccontextmanager
async def rule(node: LabNode, words: str) -> AsyncIterator[None]:
    """A firewall rule, for the block."""
    await must_run(node.host, "iptables", "-I", *shlex.split(words))
    try:
        yield
    finally:
        await must_run(node.host, "iptables", "-D", *shlex.split(words))


async def test_breaks_of_the_way_are_named(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        # One error a second to a host is what the kernel sends else, after a burst of six.
        await must_run(two.host, "sysctl", "-qw", "net.ipv4.icmp_ratelimit=0")
        port = " ".join(PORT_RULE)

        async def said(code: int = 1) -> dict[str, Any]:
            return await ping(one, two.public_ip, "-c", "1", code=code)

        async with rule(two, f"{port} DROP"):
            found = await said()
            assert (answer(found, "underlay"), answer(found, "port")) == ("answered", "silent")
            assert (
                "but nothing comes back from UDP 8285: a firewall drops it" in found["conclusion"]
            )
        async with rule(two, f"{port} REJECT"):
            found = await said()
            assert answer(found, "port") == "refused"
            assert (
                "no daemon listens on 192.0.2.2, or a firewall there rejects"
                in (found["conclusion"])
            )
        async with rule(two, f"{port} REJECT --reject-with icmp-admin-prohibited"):
            found = await said()
            assert answer(found, "port") == "prohibited"
            assert (
                "a firewall rejects it (prohibited by a filter, says 192.0.2.2)"
                in (found["conclusion"])
            )
        async with rule(two, "INPUT -i flannel0 -p icmp -j DROP"):
            found = await said()
            assert (answer(found, "tun"), answer(found, "control")) == ("silent", "answered")
            assert (
                "the daemon of 192.0.2.2 answers, but the kernel behind its TUN does not"
                in (found["conclusion"])
            )
        async with rule(one, "OUTPUT -p udp --dport 8285 -j DROP"):
            found = await said()
            assert (
                "this host's kernel refuses to send datagrams to 192.0.2.2:8285"
                in (found["conclusion"])
            )
        async with rule(two, "INPUT -i eth0 -p icmp --icmp-type echo-request -j DROP"):
            found = await said(code=3)
            assert all_answers(found) | {"bridge": ""} == {
                "underlay": "silent",
                "port": "answered",
                "tun": "answered",
                "control": "answered",
                "bridge": "",
            }
            assert "which the overlay does not need" in found["conclusion"]
        lossy = "-m statistic --mode nth --every 4 --packet 3"
        async with rule(two, f"INPUT -i flannel0 -p icmp {lossy} -j DROP"):
            found = await ping(one, two.public_ip, "-c", "20", "-i", "10ms", "-W", "300ms", code=3)
            assert 2 <= found["series"]["sent"] - found["series"]["received"] <= 10
            assert "of 20 echo requests were not answered" in found["conclusion"]
        await ping(one, two.public_ip, code=0)


async def test_a_host_that_is_gone_and_a_wrong_address_are_named(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay(start=False) as overlay:
        leases = {
            "10.5.177.0-24": {"PublicIP": "192.0.2.77"},
            "10.5.178.0-24": {"PublicIP": "10.99.0.2"},
        }
        overlay.lease_file.write_text(json.dumps({"config": NETWORK, "leases": leases}))
        one, two = overlay.nodes[1], overlay.nodes[2]
        await one.host.route("0.0.0.0/0", via="192.0.2.254")
        for node in (one, two):
            await overlay.start_daemon(node)
        for node in (one, two):
            await node.wait_for_peers(3)
        found = await ping(one, "192.0.2.77", code=1)
        assert "192.0.2.77 answers no ARP on eth0" in found["conclusion"], found
        assert "tundp leases" in found["next_step"]
        found = await ping(one, "10.5.178.0/24", code=1)
        assert "10.99.0.2" in found["conclusion"]
        assert re.search(
            r"it is reached by 192\.0\.2\.254|do not get there \(\w+ unreachable, says 192",
            found["conclusion"],
        )
        # The cable of the other one, then its daemon.
        await must_run(overlay.switch, "ip", "link", "set", "port2", "down")
        await must_run(one.host, "ip", "neigh", "flush", "dev", "eth0")
        found = await ping(one, two.public_ip, code=1)
        assert "192.0.2.2 answers no ARP on eth0: it is down" in found["conclusion"]
        await must_run(overlay.switch, "ip", "link", "set", "port2", "up")
        await until(lambda: answers(one.host, two.public_ip), "the cable to be back")
        assert await two.stop_daemon() == 0
        found = await ping(one, two.public_ip, code=1)
        assert answer(found, "port") == "refused"
        assert "no daemon listens on 192.0.2.2" in found["conclusion"]
        assert "systemctl status tundp" in found["next_step"]


async def test_a_tun_that_is_down_is_named_on_both_nodes(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        # The daemon sets it up again each time, so somebody has to insist.
        insisting = await two.host.popen(
            ["sh", "-c", "while :; do ip link set flannel0 down; done"], log=None
        )

        async def is_named(node: LabNode, peer: LabNode, words: str) -> bool:
            done = await run(node, peer.public_ip, "-c", "1", "-o", "json")
            return words in json.loads(done.stdout)["conclusion"]

        try:
            words = "but the kernel behind its TUN does not: the TUN is down there"
            await until(lambda: is_named(one, two, words), words)
            words = "this node's TUN flannel0 is down"
            await until(lambda: is_named(two, one, words), words)
        finally:
            await stop_process(insisting)


async def test_a_black_hole_is_measured_to_the_byte(make_lab: MakeLab) -> None:
    async with world(make_lab, "gso", mtu=1500, rules=SWALLOW) as all_:
        done = await run(all_.one, all_.two.public_ip, "-c", "1", "-o", "json")
        found = json.loads(done.stdout)
        # Datagrams of more than 1,400 bytes are swallowed: 1,372 inside.
        assert found["path"]["largest"] == 1372, found
        if found["path"]["daemon_mtu"] is None:  # it has not measured the path meanwhile
            assert done.returncode == 3
            assert (
                "packets of 1472 bytes do not arrive there, and those of 1372 do"
                in (found["conclusion"])
            )
            assert " mtu 1400 " in found["next_step"]


# What there is without a daemon, here or there


async def test_without_a_daemon_here_the_underlay_is_asked(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        pod = two.pod_address
        assert await one.stop_daemon() == 0
        found = await ping(one, two.public_ip, code=1)
        assert all_answers(found) == {"underlay": "answered", "port": "silent"}
        assert (
            "no daemon answers here, so nothing was asked through the overlay"
            in (found["conclusion"])
        )
        assert "no daemon answers on" in found["daemon"]
        done = await run(one, pod)
        assert done.returncode == 2
        assert "in the overlay 10.5.0.0/16, and no daemon answers" in done.stderr
        assert await two.stop_daemon() == 0
        found = await ping(one, two.public_ip, code=1)
        assert answer(found, "port") == "refused"


async def test_a_peer_that_answers_no_questions_is_told_from_silence(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay(start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await overlay.start_daemon(one)
        await overlay.start_daemon(two, "--peer-tools=off")
        await overlay.wait_ready()
        for _ in range(3):
            # There is no bridge: the kernel's redirects must not take its protocol unreachable.
            found = await ping(one, two.public_ip, "-c", "1", code=0)
            assert answer(found, "control") == "stock"
        assert found["peer"]["implementation"] == "stock flanneld"
        found = await ping(two, one.public_ip, code=0)
        assert answer(found, "control") == "off"


# Going on, and ending


async def following(node: LabNode, peer: LabNode, overlay: OverlayLab) -> tuple[Any, Path]:
    """`tundp ping -f` under way, and what it prints."""
    path = overlay.directory / "followed"
    flags = (f"--admin-socket={node.admin_socket}", "-i", "50ms")
    with path.open("wb") as log:
        process = await node.host.popen([*TUNDP, "ping", peer.public_ip, "-f", *flags], log=log)
    return process, path


async def test_an_interrupted_ping_prints_the_summary(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        process, path = await following(one, two, overlay)
        await until(lambda: "seq 3 " in path.read_text(), "three answers")
        # Away and back: what is lost is a line, and the peer's return too.
        assert await two.stop_daemon() == 0

        def lines(ending: str) -> list[int]:
            return [
                int(number)
                for number in re.findall(rf"(?m)^10\.\S+: seq (\d+) {ending}$", path.read_text())
            ]

        await until(lambda: lines("no answer"), "a lost one")
        await overlay.start_daemon(two)

        await until(lambda: lines(r"\S+ ms")[-1] > lines("no answer")[-1], "it to answer again")
        process.send_signal(signal.SIGINT)
        await until(lambda: process.poll() is not None, "its end")
        text = path.read_text()
        assert process.returncode == 3, text
        assert re.search(r"(?m)^loss  [1-9]\d*/\d+ of 84 bytes, RTT min/avg/max/mdev ", text)
        assert re.search(r"(?m)^partly: .* echo requests were not answered in time", text)


async def test_a_pipe_nobody_reads_ends_it_quietly(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        flags = f"--admin-socket={one.admin_socket}"
        line = f"{shlex.join(TUNDP)} ping {two.public_ip} -f -i 20ms {flags} | head -n 1"
        done = await one.host.run("bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}")
        assert (done.returncode, done.stderr) == (0, ""), done
        assert done.stdout.startswith("10.5.")
