"""What a running daemon lets be seen: events of packets, and the flight recorder."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from tests.nodes import MakeOverlay, log_contains
from tests.stopped import stop
from tests.wait import DEADLINE_S, until
from tundp.admin import open_events
from tundp.errors import PlatformError
from tundp.lab.lab import processes_in
from tundp.lab.overlay import LabNode
from tundp.lab.traffic import ping
from tundp.observe.events import BadQuery, Event
from tundp.wire.event import Stage

TUNDP = (sys.executable, "-m", "tundp")


either_engine = pytest.mark.parametrize("engine", ["gso", "reference"], indirect=True)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> str:
    return str(getattr(request, "param", "gso"))


async def subnet_of(node: LabNode) -> str:
    return str((await node.status_document())["subnet"])


async def readers(node: LabNode) -> int:
    return int((await node.status_document())["engine"]["readers"])


async def until_watched(node: LabNode, count: int) -> None:
    async def is_so() -> bool:
        return await readers(node) == count

    await until(is_so, f"{count} readers of events")


@either_engine
async def test_a_ping_is_seen_at_each_stage_with_its_peer(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        found: list[Event] = []
        async with open_events(one.admin_socket, {"snap": "64"}) as stream:
            await until_watched(one, 1)
            assert await ping(one.host, two.tunnel_address)
            async with asyncio.timeout(DEADLINE_S):
                async for event in stream:
                    if event.packet[9:10] == b"\x01":
                        found.append(event)
                    if len(found) == 4:
                        break
        assert [event.stage for event in sorted(found, key=lambda event: event.time_ns)] == [
            Stage.TUN_READ,
            Stage.UDP_SEND,
            Stage.UDP_RECEIVE,
            Stage.TUN_WRITE,
        ]
        sent = next(event for event in found if event.stage is Stage.UDP_SEND)
        assert sent.peer is not None
        assert (str(sent.peer.address), sent.peer.port) == (two.public_ip, 8285)
        assert sent.peer.subnet_of(IPv4Address(two.tunnel_address)) is not None
        assert stream.hello.node == one.public_ip
        assert stream.hello.subnet == await subnet_of(one)
        await until_watched(one, 0)


async def test_a_killed_reader_leaves_nothing_on(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one = overlay.nodes[1]
        code = (
            "import asyncio, sys; from pathlib import Path; from tundp.admin import open_events\n"
            "async def main():\n"
            "    async with open_events(Path(sys.argv[1]), {}) as stream:\n"
            "        async for event in stream: pass\n"
            "asyncio.run(main())\n"
        )
        reading = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, str(one.admin_socket)
        )
        await until_watched(one, 1)
        os.kill(reading.pid, signal.SIGKILL)
        await reading.wait()
        await until_watched(one, 0)
        assert await ping(one.host, overlay.nodes[2].tunnel_address)


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ({"stages": "read,nowhere"}, "no stage 'nowhere'"),
        ({"filter": "host"}, "at character 5 of the filter"),
        ({"snap": "65536"}, "snap must be a number from 0 to 65535"),
        ({"size": "1"}, "size must be a number from 262144"),
    ],
)
async def test_a_wrong_query_is_named(
    make_overlay: MakeOverlay, query: dict[str, str], text: str
) -> None:
    async with make_overlay() as overlay:
        with pytest.raises(BadQuery, match=text):
            async with open_events(overlay.nodes[1].admin_socket, query):
                pass


async def test_more_readers_than_there_can_be(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay, contextlib.AsyncExitStack() as stack:
        one = overlay.nodes[1]
        for _ in range(16):
            await stack.enter_async_context(open_events(one.admin_socket, {}))
        with pytest.raises(PlatformError, match="16 readers"):
            async with open_events(one.admin_socket, {}):
                pass


async def blackbox(node: LabNode, *arguments: str) -> str:
    done = await node.host.run(
        *TUNDP, "blackbox", f"--admin-socket={node.admin_socket}", *arguments
    )
    return str(done.stdout)


@either_engine
async def test_a_killed_daemon_leaves_its_last_drops_and_leases(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        assert await ping(one.host, two.tunnel_address)
        await ping(one.host, "10.5.177.7", timeout_s=0.2)

        async def is_dropped() -> bool:
            counted = (await one.status_document())["counters"]
            return bool(counted["encap"]["drops"].get("no_route"))

        await until(is_dropped, "the packet for a subnet nobody has dropped")
        subnet = await subnet_of(two)
        alive = json.loads(await blackbox(one, "--json"))
        await one.stop_daemon(signal.SIGKILL)
        dead = json.loads(await blackbox(one, "--json"))
        assert dead == alive
        drops = [each for each in dead["drops"] if each["reason"] == "no_route"]
        packet = bytes.fromhex(drops[-1]["packet"])
        assert packet[16:20] == bytes([10, 5, 177, 7])
        leases = [each for each in dead["control"] if each["kind"] == "lease"]
        assert subnet in [each["fields"]["subnet"] for each in leases]
        assert any("rules made" in each["text"] for each in dead["control"])
        shown = await blackbox(one)
        assert "encap drop no_route" in shown and "> 10.5.177.7 ICMP echo request" in shown
        await overlay.start_daemon(one)
        await overlay.wait_ready([one])
        assert json.loads(await blackbox(one, "--json"))["pid"] != dead["pid"]
        assert json.loads(await blackbox(one, "--json", "--previous")) == dead


async def traced(node: LabNode, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """A `tundp trace` on a node, whose stdout and stderr go to `log`, once it looks."""
    with log.open("wb") as file:
        argv = [*TUNDP, "trace", f"--admin-socket={node.admin_socket}", *arguments]
        process = await node.host.popen(argv, log=file)
    await until_watched(node, 1)
    await until(lambda: "tracing on" in log.read_text(), "the trace to begin")
    return process


async def until_ended(process: subprocess.Popen[bytes]) -> None:
    await until(lambda: process.poll() is not None, "the trace to end by itself")
    assert process.returncode == 0


@either_engine
async def test_a_trace_shows_where_a_packet_went(make_overlay: MakeOverlay, tmp_path: Path) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        log = tmp_path / "trace"
        tracing = await traced(one, log, "-c", "3", "--kernel=false", "--peers=false")
        assert await ping(one.host, two.tunnel_address)
        await ping(one.host, "10.5.177.7", timeout_s=0.2)
        await until_ended(tracing)
        said, sent, answer, lost = re.split(r"(?m)^(?=#)", log.read_text())
        assert (
            "Not looked at: netfilter and the kernel's drops (--kernel=false), pods' own network"
            " namespaces, other nodes\n"
        ) in said
        assert re.fullmatch(
            r"#1 \S+ > 10\.5\.\d+\.0 ICMP echo request .*\n"
            r"  192\.0\.2\.1 +\+0us  tun\.read\n"
            r"  192\.0\.2\.1 +lookup +10\.5\.\d+\.0/24 -> 192\.0\.2\.2:8285, FIB \d+\n"
            r"  192\.0\.2\.1 +\+[0-9.]+[um]s  udp\.send +\d+ B to 192\.0\.2\.2:8285\n",
            sent,
        ), sent
        assert "udp.receive  from 192.0.2.2:8285, which holds 10.5." in answer, answer
        assert re.search(r"tun\.write +\d+ B\n", answer), answer
        assert "DROP no_route: no lease covers the destination" in lost, lost
        assert "next step: tundp status" in lost, lost
        await until_watched(one, 0)


@either_engine
async def test_a_trace_shows_the_wait_in_the_socket_of_a_stopped_node(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        log = tmp_path / "trace"
        only = (
            "-c",
            "1",
            "--kernel=false",
            "-o",
            "json",
            f"icmp and src host {one.tunnel_address}",
        )
        tracing = await traced(two, log, *only)
        stop(two.daemon.pid)
        try:
            assert await ping(one.host, two.tunnel_address, timeout_s=0.2) is None
        finally:
            two.daemon.send_signal(signal.SIGCONT)
        await until_ended(tracing)
        story = json.loads(log.read_text().splitlines()[-1])
        waits = {each["stage"]: each["wait_ns"] for each in story["events"]}
        # The ping is given up 0.2 s after it was sent; a TUN says nothing of its queue.
        assert waits["udp.receive"] > 50_000_000 and waits["tun.write"] is None


async def tables(node: LabNode) -> str:
    return str((await node.host.run("nft", "list", "tables")).stdout)


async def test_a_trace_names_the_rule_that_drops_a_packet(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    """On both sides of the daemon: before the TUN on one node, behind it on the other."""
    async with make_overlay(pods=True) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        before = await tables(two)
        for node in (one, two):
            rules = (
                "add table inet admin; add chain inet admin guard {"
                " type filter hook forward priority 10; };"
                f" add rule inet admin guard ip saddr {one.pod_address} icmp type echo-request drop"
            )
            assert (await node.host.run("nft", rules)).returncode == 0
        for node in (one, two):
            log = tmp_path / f"trace{node.number}"
            tracing = await traced(
                node, log, "-c", "1", "--drops", f"icmp and host {one.pod_address}"
            )
            assert await ping(one.pod, two.pod_address, timeout_s=0.5) is None
            await until_ended(tracing)
            shown = log.read_text()
            assert "DROP inet admin guard, handle " in shown, shown
            assert ("udp.receive" in shown) == (node is two), shown
            (mend,) = re.findall(r"lets it pass: (.*)", shown)
            assert (await node.host.run("sh", "-c", mend)).returncode == 0
            assert "tundp_trace" not in await tables(node)
        assert await ping(one.pod, two.pod_address)
        assert (await two.host.run("nft", "delete table inet admin")).returncode == 0
        assert await tables(two) == before


def listeners(node: LabNode) -> list[str]:
    """The nft processes of a trace in a node's namespace."""
    found = []
    for pid in processes_in(node.host.namespace):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            if words[1:] in (["-i", ""], ["-a", "monitor", "trace", ""]):
                found.append(words[0])
    return found


async def test_a_killed_trace_leaves_no_rule_and_no_process(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    async with make_overlay(nodes=1) as overlay:
        one = overlay.nodes[1]
        tracing = await traced(one, tmp_path / "trace")
        assert "tundp_trace" in await tables(one)
        assert len(listeners(one)) == 2
        tracing.kill()
        tracing.wait()

        async def is_gone() -> bool:
            return "tundp_trace" not in await tables(one) and not listeners(one)

        await until(is_gone, "no table and no process of the trace")
        await until_watched(one, 0)


async def test_the_flight_recorder_is_copied_when_asked_and_on_a_burst(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay(nodes=1) as overlay:
        one = overlay.nodes[1]
        folder, name = one.admin_socket.parent, f"{one.admin_socket.stem}.blackbox-"

        def copies() -> list[Path]:
            return sorted(folder.glob(f"{name}*.json"))

        one.daemon.send_signal(signal.SIGUSR1)
        await until(copies, "a copy for SIGUSR1")
        (first,) = copies()
        assert json.loads(first.read_text())["pid"] == one.daemon.pid
        assert first.stat().st_mode & 0o777 == 0o600
        sock = await one.host.socket(socket.SOCK_DGRAM)

        def is_copied() -> bool:
            for _ in range(100):
                sock.sendto(b"for nobody", ("10.5.177.7", 9))
            return len(copies()) == 2

        with sock:
            await until(is_copied, "a copy for the burst of drops")
        found = json.loads(copies()[1].read_text())
        assert "no_route" in {drop["reason"] for drop in found["drops"]}
        await until(
            lambda: log_contains(one, "packets dropped within a second"), "a line for the burst"
        )
