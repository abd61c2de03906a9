"""`tundp trace` joined with the other node's half: real daemons, real packets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.json_schema import validate
from tests.netns.test_peer_tools import readers
from tests.nodes import MakeOverlay, must_run
from tests.wait import until
from tundp.lab.overlay import LabNode
from tundp.lab.traffic import ping

TUNDP = (sys.executable, "-m", "tundp")
SCHEMA = json.loads(
    (Path(__file__).parents[2] / "tundp" / "observe" / "trace.schema.json").read_text()
)
WIRE = r"wire -?\d+us \(clock ±\d+us\)"
TIME = r"[+-][0-9.]+[um]s"

either_engine = pytest.mark.parametrize("engine", ["gso", "reference"], indirect=True)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> str:
    return str(getattr(request, "param", "gso"))


@contextlib.asynccontextmanager
async def tracing(
    node: LabNode, log: Path, *arguments: str
) -> AsyncIterator[subprocess.Popen[bytes]]:
    """A `tundp trace` whose stdout and stderr go to `log`, once all look who will."""
    with log.open("wb") as file:
        argv = [*TUNDP, "trace", f"--admin-socket={node.admin_socket}", "--kernel=false"]
        process = await node.host.popen([*argv, *arguments], log=file)
    try:
        await until(lambda: "tracing on" in log.read_text(), "the trace to begin")
        yield process
    except BaseException as error:
        error.add_note(log.read_text())
        raise
    finally:
        process.kill()
        await asyncio.to_thread(process.wait)


async def until_ended(process: subprocess.Popen[bytes]) -> None:
    await until(lambda: process.poll() is not None, "the trace to end by itself")
    assert process.returncode == 0


def stories(log: Path) -> list[str]:
    """What was printed of each packet."""
    return re.split(r"(?m)^(?=#)", log.read_text())[1:]


async def send(node: LabNode, to: str, length: int, *, ttl: int = 64, source: str = "") -> None:
    """One UDP datagram through the overlay: `length` bytes of inner packet."""
    with await node.host.socket(socket.SOCK_DGRAM) as sock:
        sock.bind((source, 0))
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
        sock.sendto(bytes(length - 28), (to, 40007))


@either_engine
async def test_both_halves_of_both_ways_are_shown(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        log = tmp_path / "trace"
        packets = f"icmp and greater 60 and host {two.tunnel_address}"
        async with tracing(one, log, "-c", "2", packets) as process:
            assert re.search(r"on 192\.0\.2\.2, too: tundp \S+, engine \w+, clock", log.read_text())
            assert await ping(one.host, two.tunnel_address)
            await until_ended(process)
        request, reply = stories(log)
        assert re.fullmatch(
            r"#1 .* ICMP echo request .*\n"
            rf"  192\.0\.2\.1 +\+0us  tun\.read\n"
            rf"  192\.0\.2\.1 +lookup .*\n"
            rf"  192\.0\.2\.1 +{TIME}  udp\.send +\d+ B to 192\.0\.2\.2:8285\n"
            rf"  192\.0\.2\.2 +{TIME}  udp\.receive  {WIRE}\n"
            rf"  192\.0\.2\.2 +{TIME}  tun\.write +\d+ B\n",
            request,
        ), request
        assert re.fullmatch(
            r"#2 .* ICMP echo reply .*\n"
            rf"  192\.0\.2\.2 +\+0us  tun\.read\n"
            rf"  192\.0\.2\.2 +{TIME}  udp\.send +\d+ B to 192\.0\.2\.1:8285, {WIRE}\n"
            rf"  192\.0\.2\.1 +{TIME}  udp\.receive  from 192\.0\.2\.2:8285, which holds .*\n"
            rf"  192\.0\.2\.1 +{TIME}  tun\.write +\d+ B\n",
            reply,
        ), reply

        async def is_over() -> bool:
            return await readers(one) == await readers(two) == 0

        await until(is_over, "no tap on either node")


async def test_a_drop_on_the_other_node_is_named_here(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        log = tmp_path / "trace"
        packets = f"udp and dst host {two.tunnel_address}"
        async with tracing(one, log, "--drops", "-c", "1", "-o", "json", packets) as process:
            await send(one, two.tunnel_address, 100)
            await send(one, two.tunnel_address, 101, ttl=2)
            await until_ended(process)
        (line,) = [line for line in log.read_text().splitlines() if line.startswith("{")]
        document: dict[str, Any] = json.loads(line)
        validate(document, SCHEMA)
        assert document["is_dropped"] is False
        assert [each["verdict"] for each in document["events"]] == ["pass", "pass"]
        there = document["peer"]
        assert (there["node"], there["state"], there["missing"]) == ("192.0.2.2", "tracing", 0)
        assert [(each["stage"], each["reason"]) for each in there["events"]] == [
            ("udp.receive", None),
            ("tun.write", "hop_limit_exceeded"),
        ]


async def test_what_is_lost_between_the_nodes_is_said(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        log = tmp_path / "trace"
        swallow = "INPUT -p udp --dport 8285 -m length --length 300:400 -j DROP"
        await must_run(two.host, "iptables", "-I", *swallow.split())
        packets = f"udp and host {two.tunnel_address}"
        async with tracing(one, log, "-c", "2", packets) as process:
            await send(one, two.tunnel_address, 310)
            await send(one, two.tunnel_address, 100)
            await until_ended(process)
        lost, arrived = stories(log)
        assert re.search(
            r"192\.0\.2\.2 +no record of it within 0\.5 s: lost between the nodes, still on the"
            r" way, or dropped there before tundp",
            lost,
        ), lost
        assert "udp.receive" not in lost
        assert "no record" not in arrived
        assert re.search(rf"192\.0\.2\.2 +{TIME}  udp\.receive  {WIRE}", arrived), arrived


async def test_what_comes_late_or_is_not_looked_at_is_not_called_lost(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        log = tmp_path / "trace"
        chaos = ("chaos", two.public_ip, "--delay=900ms", "--for=5m", "--yes-break-traffic")
        await must_run(one.host, *TUNDP, *chaos, f"--admin-socket={one.admin_socket}")
        words = ("-c", "2", "-o", "json", f"udp and dst host {two.tunnel_address}")
        async with tracing(one, log, *words) as process:
            await send(one, two.tunnel_address, 100)
            await send(one, two.tunnel_address, 101, source=one.public_ip)
            await until_ended(process)
        lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
        late, other = (json.loads(line)["peer"] for line in lines)
        assert [each["stage"] for each in late["events"]] == ["udp.receive", "tun.write"], late
        assert not late["is_lost"]
        assert other["detail"].startswith("not looked at there: "), other
        assert not other["is_lost"]


async def test_a_node_without_peer_tools_is_named(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    async with make_overlay(start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await overlay.start_daemon(one)
        await overlay.start_daemon(two, "--peer-tools=off")
        await overlay.wait_ready()
        log = tmp_path / "trace"
        async with tracing(one, log, "-c", "1", f"udp and host {two.tunnel_address}") as process:
            assert "on 192.0.2.2: its kernel answers that it knows no such" in log.read_text()
            await send(one, two.tunnel_address, 100)
            await until_ended(process)
        (story,) = stories(log)
        assert re.search(r"192\.0\.2\.2 +not looked at: its kernel answers", story), story
        # From the node whose own are off: it asks nobody.
        async with tracing(two, log, "-c", "1", f"udp and host {one.tunnel_address}") as process:
            await send(two, one.tunnel_address, 100)
            await until_ended(process)
        (story,) = stories(log)
        assert "not looked at: peer tools are off on this node" in story, story


async def test_a_killed_trace_leaves_no_tap_on_either_node(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        async with tracing(one, tmp_path / "trace") as process:
            assert await readers(two) == 1
            process.send_signal(signal.SIGKILL)

            async def is_over() -> bool:
                return await readers(one) == await readers(two) == 0

            await until(is_over, "no tap on either node")
