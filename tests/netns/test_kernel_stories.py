"""`tundp trace` and `tundp drops` beside real daemons: what the kernel drops is in the story."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from tests.netns.test_events import traced, until_ended, until_watched
from tests.netns.test_skb_drops import is_loaded, programs_of
from tests.nodes import MakeOverlay, must_run
from tests.packets import udp
from tests.wait import until
from tundp.errors import Unsupported
from tundp.lab.traffic import ping
from tundp.linux.skb_drops import SkbDrops

TUNDP = (sys.executable, "-m", "tundp")


@pytest.fixture(autouse=True)
def drops_can_be_seen() -> None:
    """Skip where the kernel has no BPF, BTF or reasons."""
    try:
        drops = SkbDrops(IPv4Network("10.5.0.0/16"), 8285)
    except Unsupported as error:
        pytest.skip(f"no drops of the kernel here: {error}")
    drops.close()
    if not drops.has_reasons:
        pytest.skip("this kernel gives no reasons (linux 5.17)")


async def test_a_drop_behind_the_daemon_is_in_the_packets_story(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    """The receiving node writes it to the TUN, and has no route to the pod."""
    async with make_overlay(pods=True) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await must_run(two.host, "ip", "route", "add", "unreachable", two.pod_address)
        log = tmp_path / "trace"
        tracing = await traced(two, log, "-c", "1", "--drops", f"icmp and dst {two.pod_address}")
        await ping(one.pod, two.pod_address, timeout_s=0.5)
        await until_ended(tracing)
        said, story = re.split(r"(?m)^(?=#)", log.read_text())
        assert "udp.receive" in story and "tun.write" in story, story
        assert re.search(
            r"kernel +DROP NOT_SPECIFIED in ip_error, flannel0: the route to it says unreachable"
            r".*\n"
            r"    next step: ip route get 10\.5\.\d+\.\d+ from 10\.5\.\d+\.\d+ iif flannel0; ",
            story,
        ), story
        assert "the kernel's drops" not in said, said


async def test_a_datagram_that_never_left_is_the_sent_packets_story(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    """The peer answers no ARP: the daemon sent, the kernel gives up a little later."""
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        for name, value in (("mcast_solicit", 1), ("retrans_time_ms", 20)):
            await one.host.sysctl(f"ipv4/neigh/eth0/{name}", value)
        await must_run(two.host, "ip", "link", "set", "eth0", "down")
        await must_run(one.host, "ip", "neigh", "flush", "all")
        log = tmp_path / "trace"
        wanted = f"icmp and dst {two.tunnel_address}"
        tracing = await traced(one, log, "-o", "json", wanted)

        def dropped() -> list[dict[str, object]]:
            stories = [json.loads(line) for line in log.read_text().splitlines() if line[0] == "{"]
            return [
                each
                for story in stories
                for each in story["kernel"]
                if each["reason"] == "NEIGH_FAILED"
            ]

        async def is_seen() -> bool:
            await ping(one.host, two.tunnel_address, timeout_s=0.2)
            return bool(dropped())

        await until(is_seen, "the kernel to give up on the peer's ARP")
        first = dropped()[0]
        assert (first["peer"], first["device"], first["direction"]) == (
            "192.0.2.2",
            "eth0",
            "encap",
        )
        tracing.terminate()
        await until_ended(tracing)
        table = (await one.host.run(*TUNDP, "drops", f"--admin-socket={one.admin_socket}")).stdout
        assert "by the kernel in these" in table or "the kernel dropped none in these" in table


async def test_a_legacy_rule_is_named_by_its_counter(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    async with make_overlay(pods=True) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        rule = ("FORWARD", "-s", f"{one.pod_address}/32", "-p", "icmp", "-j", "DROP")
        done = await one.host.run("iptables-legacy", "-I", *rule)
        if done.returncode:
            pytest.skip(f"no legacy iptables in this kernel: {done.stderr.strip()}")
        log = tmp_path / "trace"
        tracing = await traced(one, log, "-c", "1", "--drops", "icmp")
        assert await ping(one.pod, two.pod_address, timeout_s=0.5) is None
        await until_ended(tracing)
        shown = log.read_text()
        assert "rules of legacy iptables, but for their counters" in shown, shown
        assert "kernel       DROP NETFILTER_DROP in " in shown, shown
        (mend,) = re.findall(r"lets it pass: (.*)", shown)
        assert f"-D FORWARD -s {one.pod_address}/32 -p icmp -j DROP" in mend, shown
        assert (await one.host.run("sh", "-c", mend)).returncode == 0
        assert await ping(one.pod, two.pod_address)


async def test_drops_names_what_the_kernel_dropped(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    """Both forms: while the table is made, and followed; and `| head` ends it."""
    async with make_overlay(nodes=1) as overlay:
        one = overlay.nodes[1]
        await must_run(one.host, "ip", "route", "add", "unreachable", "10.5.200.0/24")
        inner = udp(b"x", source="10.5.203.3", destination="10.5.200.1")
        forger = await overlay.switch.socket(socket.SOCK_DGRAM)
        await must_run(overlay.switch, "ip", "route", "add", "10.5.200.0/24", "via", one.public_ip)
        raw = await overlay.switch.socket(socket.SOCK_RAW, socket.IPPROTO_RAW)
        await one.host.sysctl("ipv4/ip_forward", 1)
        command = [*TUNDP, "drops", f"--admin-socket={one.admin_socket}"]
        log = tmp_path / "lines"
        with forger, raw:
            with log.open("wb") as file:
                shell = " ".join(command) + " -f dst host 10.5.200.1 | head -n 1"
                following = await one.host.popen(["sh", "-c", shell], log=file)
            await until_watched(one, 1)

            def is_ended() -> bool:
                raw.sendto(inner, ("10.5.200.1", 0))
                return following.poll() is not None

            await until(is_ended, "the pipe to end")
            assert re.fullmatch(
                r"\d\d:\d\d:\d\d\.\d{6} kernel NOT_SPECIFIED 10\.5\.203\.3:\d+ > 10\.5\.200\.1:\d+"
                r" UDP, \d+ B in ip_error, eth0: the route to it says unreachable, .*\n",
                log.read_text(),
            ), log.read_text()
            with log.open("wb") as file:
                process = await one.host.popen(
                    [*command, "--json", "dst", "host", "10.5.200.1"], log=file
                )

            def is_done() -> bool:
                raw.sendto(inner, ("10.5.200.1", 0))
                return process.poll() is not None

            await until(is_done, "the answer")
        (row,) = json.loads(log.read_text())["kernel_seen"]
        assert (row["reason"], row["device"], row["is_outer"]) == ("NOT_SPECIFIED", "eth0", False)
        assert row["count"] > 0


async def test_a_flood_of_drops_does_not_stall_a_trace(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    """More drops than can be looked at: stories of other packets go on, what was lost is said."""
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await must_run(one.host, "ip", "route", "add", "unreachable", "10.5.200.0/24")
        await must_run(overlay.switch, "ip", "route", "add", "10.5.200.0/24", "via", one.public_ip)
        await one.host.sysctl("ipv4/ip_forward", 1)
        inner = udp(b"x", source="10.5.203.3", destination="10.5.200.1")
        raw = await overlay.switch.socket(socket.SOCK_RAW, socket.IPPROTO_RAW)
        log = tmp_path / "trace"
        tracing = await traced(one, log, "-c", "20", "icmp")
        stop = asyncio.Event()

        async def flood() -> int:
            sent = 0
            while not stop.is_set():
                for _ in range(200):
                    raw.sendto(inner, ("10.5.200.1", 0))
                sent += 200
                await asyncio.sleep(0.001)
            return sent

        with raw:
            flooding = asyncio.ensure_future(flood())
            try:

                async def is_ended() -> bool:
                    await ping(one.host, two.tunnel_address, timeout_s=0.2)
                    return tracing.poll() is not None

                await until(is_ended, "twenty stories of pings beside a flood")
            finally:
                stop.set()
                sent = await flooding
        shown = log.read_text()
        assert shown.count("\n#") == 20, shown
        assert all(" ICMP " in line for line in shown.splitlines() if line.startswith("#"))
        (lost,) = re.findall(r"(\d+) drops of the kernel came too fast to be looked at", shown)
        assert 0 < int(lost) <= sent


async def test_nothing_is_left_of_a_killed_trace(make_overlay: MakeOverlay, tmp_path: Path) -> None:
    async with make_overlay(nodes=1) as overlay:
        one = overlay.nodes[1]
        tracing: subprocess.Popen[bytes] = await traced(one, tmp_path / "trace")
        (program,) = programs_of(tracing.pid)
        assert is_loaded(program)
        tracing.kill()
        tracing.wait()
        await until(lambda: not is_loaded(program), f"the kernel to free program {program}")


async def test_without_bpf_the_trace_goes_on_and_says_so(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    """Root without CAP_BPF, CAP_PERFMON and CAP_SYS_ADMIN, as in a container."""
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        log = tmp_path / "trace"
        with log.open("wb") as file:
            argv = [
                *("setpriv", "--bounding-set", "-bpf,-perfmon,-sys_admin"),
                *(*TUNDP, "trace", f"--admin-socket={one.admin_socket}", "-c", "1", "icmp"),
            ]
            tracing = await one.host.popen(argv, log=file)
        await until_watched(one, 1)
        await until(lambda: "tracing on" in log.read_text(), "the trace to begin")
        assert await ping(one.host, two.tunnel_address)
        await until_ended(tracing)
        shown = log.read_text()
        assert re.search(
            r"Not looked at: .*the kernel's drops \(the kernel refuses a BPF map \(Operation not"
            r" permitted\): that needs CAP_BPF and CAP_PERFMON \(root\)",
            shown,
        ), shown
        assert "udp.send" in shown, shown
