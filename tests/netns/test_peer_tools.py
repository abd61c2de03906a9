"""Nodes ask and answer each other over the overlay: real daemons, real packets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest

from tests.nodes import MakeOverlay, must_run
from tests.packets import icmp_echo
from tests.wait import DEADLINE_S, until
from tundp.admin import ask_peer, open_peer_trace
from tundp.errors import PlatformError
from tundp.lab.overlay import LabNode
from tundp.lab.traffic import PingStream, ping
from tundp.linux.udp import open_sender, source_control
from tundp.observe.events import BadQuery

either_engine = pytest.mark.parametrize("engine", ["gso", "reference"], indirect=True)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> str:
    return str(getattr(request, "param", "gso"))


def subnet_of(node: LabNode) -> IPv4Network:
    return node.gateway.network


async def asked(node: LabNode, of: LabNode, what: str = "hello", start: int = 0) -> dict[str, Any]:
    """What became of a question, asked again while the node asked is still too busy to answer."""
    found: dict[str, Any] = {}

    async def has_answer() -> bool:
        nonlocal found
        found = await ask_peer(node.admin_socket, subnet_of(of), what, start)
        return bool(found["result"] == "answer")

    try:
        await until(has_answer, f"an answer to {what}")
    except AssertionError as error:
        error.add_note(str(found))
        raise
    return found


@either_engine
async def test_a_node_says_who_it_is(make_overlay: MakeOverlay, engine: str) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        found = await asked(one, two)
        answer = found.pop("answer")
        rtt_s = found.pop("rtt_s")
        assert found == {
            "subnet": str(subnet_of(two)),
            "address": "192.0.2.2",
            "port": 8285,
            "result": "answer",
            "detail": "tundp answers",
        }
        version = (await two.status_document())["version"]
        known = {name: answer[name] for name in ("implementation", "version", "engine")}
        assert known == {"implementation": "tundp", "version": version, "engine": engine}
        assert (answer["mtu"], answer["port"]) == (1472, 8285)
        assert 0 <= answer["uptime_s"] < 600
        # One clock: what is estimated is wrong by no more than is said.
        assert 0 < rtt_s < 2
        assert 0 <= answer["clock_error_s"] <= rtt_s
        assert abs(answer["clock_offset_s"]) <= answer["clock_error_s"] + 1e-3


@either_engine
async def test_a_node_says_how_it_reaches_its_peers(make_overlay: MakeOverlay) -> None:
    """And of a third node that it is silent, before this one has sent it anything."""
    async with make_overlay(nodes=3) as overlay:
        one, two, three = (overlay.nodes[number] for number in (1, 2, 3))
        assert await ping(two.host, one.tunnel_address)
        await three.stop_daemon()
        async with PingStream(two.host, three.tunnel_address, pause_s=0.5):

            async def state_is(name: str) -> bool:
                found = (await asked(one, two, "reach"))["answer"]
                assert (found["total"], found["start"]) == (2, 0)
                entries = {each["subnet"]: each for each in found["peers"]}
                assert list(entries) == sorted(
                    (str(subnet_of(node)) for node in (one, three)),
                    key=IPv4Network,
                )
                return bool(entries[str(subnet_of(three))]["state"] == name)

            await until(lambda: state_is("silent"), "node 2 to say that node 3 is silent")
        rest = (await asked(one, two, "reach", start=1))["answer"]
        assert (rest["total"], rest["start"], len(rest["peers"])) == (2, 1, 1)
        assert (await asked(one, two, "reach", start=9))["answer"]["peers"] == []


async def test_what_cannot_be_asked_is_said(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        socket_path = one.admin_socket
        with pytest.raises(PlatformError, match=r"no lease covers 192\.0\.2\.0/24"):
            await ask_peer(socket_path, IPv4Network("192.0.2.0/24"))
        with pytest.raises(PlatformError, match="this node's own subnet"):
            await ask_peer(socket_path, subnet_of(one))
        with pytest.raises(BadQuery, match="what must be hello or reach"):
            await ask_peer(socket_path, subnet_of(two), "everything")
        # An address of a pod finds its node.
        found = await ask_peer(socket_path, IPv4Network(two.pod_address))
        assert found["subnet"] == str(subnet_of(two))


async def test_off_here_and_off_there(make_overlay: MakeOverlay) -> None:
    """A node without peer tools is, to others, one whose kernel knows no such protocol."""
    async with make_overlay(start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await overlay.start_daemon(one)
        await overlay.start_daemon(two, "--peer-tools=off", "--engine=simple")
        await overlay.wait_ready()
        found = await ask_peer(one.admin_socket, subnet_of(two))
        assert (found["result"], found["answer"]) == ("protocol-unreachable", None)
        assert "a stock flanneld runs there, or tundp with --peer-tools=off" in found["detail"]
        assert 0 < found["rtt_s"] < 2
        found = await ask_peer(two.admin_socket, subnet_of(one))
        assert (found["result"], found["answer"], found["rtt_s"]) == ("off", None, None)
        assert "peer tools are off on this node" in found["detail"]
        assert (await two.status_document())["backend"]["peer_messages"] == 0
        for node, other, result in (
            (one, two, "protocol-unreachable"),
            (two, one, "off"),
        ):
            async with open_peer_trace(node.admin_socket, subnet_of(other), "icmp") as parts:
                (ended,) = [each async for each in parts]
            assert ended["result"] == result


async def test_silence_is_no_refusal(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        rule = ("INPUT", "-p", "udp", "--dport", "8285", "-j", "DROP")
        await must_run(two.host, "iptables", "-I", *rule)
        found = await ask_peer(one.admin_socket, subnet_of(two))
        assert (found["result"], found["rtt_s"], found["answer"]) == ("silence", None, None)
        # INPUT rules on the TUN are no obstacle: the engine hands a copy over before them.
        await must_run(two.host, "iptables", "-D", *rule)
        await must_run(two.host, "iptables", "-I", "INPUT", "-i", "flannel0", "-j", "DROP")
        assert (await asked(one, two))["answer"]["implementation"] == "tundp"


async def readers(node: LabNode) -> int:
    return int((await node.status_document())["engine"]["readers"])


async def until_readers(node: LabNode, count: int) -> None:
    async def is_so() -> bool:
        return await readers(node) == count

    await until(is_so, f"{count} readers of events on {node.public_ip}")


@contextlib.asynccontextmanager
async def traced(
    node: LabNode, of: LabNode, packets: str
) -> AsyncIterator[tuple[dict[str, Any], AsyncIterator[dict[str, Any]]]]:
    """A trace on another node that has begun: its hello, and what follows."""
    async with open_peer_trace(node.admin_socket, subnet_of(of), packets) as parts:
        first = await anext(parts)
        assert "hello" in first, first
        await until_readers(of, 1)
        yield first["hello"], parts


async def records(
    parts: AsyncIterator[dict[str, Any]],
    count: int = 0,
    ends: Callable[[dict[str, Any]], bool] = lambda _: False,
) -> list[dict[str, Any]]:
    """So many records, or up to one that is what it is waited for."""
    found: list[dict[str, Any]] = []
    async with asyncio.timeout(DEADLINE_S):
        async for part in parts:
            assert "error" not in part, part
            if "record" in part:
                found.append(part["record"])
                if len(found) == count or ends(part["record"]):
                    break
    return found


@either_engine
async def test_the_other_nodes_stages_are_seen(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        # The daemons ask each other by shorter ones.
        async with traced(one, two, "icmp and greater 60") as (hello, parts):
            assert (hello["node"], hello["subnet"]) == ("192.0.2.2", str(subnet_of(two)))
            assert await ping(one.host, two.tunnel_address)
            found = await records(parts, 4)
            stages = ["udp.receive", "tun.write", "tun.read", "udp.send"]
            assert [each["stage"] for each in found] == stages
            assert [each["sequence"] for each in found] == [1, 2, 3, 4]
            ends = [bytes.fromhex(each["packet"])[12:20] for each in found]
            there = IPv4Address(one.tunnel_address).packed + IPv4Address(two.tunnel_address).packed
            assert ends == [there, there, there[4:] + there[:4], there[4:] + there[:4]]
            # A drop over there, with its name.
            request = icmp_echo(
                bytes(56), source=one.tunnel_address, destination=two.tunnel_address, ttl=1, frag=0
            )
            with await one.host.call(open_sender, 8285, 1 << 16) as sender:
                control = source_control(IPv4Address(one.public_ip))
                sender.sendmsg([request], control, 0, (two.public_ip, 8285))
            seen = await records(parts, ends=lambda each: each["verdict"] == "drop")
            dropped = seen[-1]
            assert (dropped["stage"], dropped["reason"]) == ("tun.write", "hop_limit_exceeded")
            stages = [each["stage"] for each in seen if each["packet_id"] == dropped["packet_id"]]
            assert stages == ["udp.receive", "tun.write"]
        await until_readers(two, 0)


async def test_only_packets_between_the_two_nodes_are_shown(make_overlay: MakeOverlay) -> None:
    async with make_overlay(nodes=3) as overlay:
        one, two, three = (overlay.nodes[number] for number in (1, 2, 3))
        async with traced(one, two, "") as (_, parts):
            assert await ping(three.host, two.tunnel_address)
            assert await ping(two.host, three.tunnel_address)
            assert await ping(one.host, two.tunnel_address)
            found = await records(parts, 4)
        mine = IPv4Address(one.tunnel_address).packed
        assert all(mine in bytes.fromhex(each["packet"])[12:20] for each in found)


async def test_a_wrong_filter_and_too_many_traces_are_named(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        with pytest.raises(BadQuery, match="at character 5"):
            async with open_peer_trace(one.admin_socket, subnet_of(two), "host"):
                pass
        long = " or ".join(f"src host 10.5.0.{number}" for number in range(30))
        async with open_peer_trace(one.admin_socket, subnet_of(two), long) as parts:
            (ended,) = [each async for each in parts]
        assert ended["result"] == "answer"
        assert "too long, with the addresses of both nodes" in ended["error"]
        async with traced(one, two, "icmp"):
            with pytest.raises(PlatformError, match=r"traces on 192\.0\.2\.2 already"):
                async with open_peer_trace(one.admin_socket, subnet_of(two), "icmp"):
                    pass


async def test_a_killed_reader_leaves_no_tap_on_either_node(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        code = (
            "import asyncio, sys; from ipaddress import IPv4Network; from pathlib import Path\n"
            "from tundp.admin import open_peer_trace\n"
            "async def main():\n"
            "    subnet = IPv4Network(sys.argv[2])\n"
            "    async with open_peer_trace(Path(sys.argv[1]), subnet, '') as parts:\n"
            "        async for part in parts: pass\n"
            "asyncio.run(main())\n"
        )
        reading = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, str(one.admin_socket), str(subnet_of(two))
        )
        await until_readers(two, 1)
        os.kill(reading.pid, signal.SIGKILL)
        await reading.wait()
        await until_readers(two, 0)
        # The asking daemon itself killed: the session ends by itself.
        async with traced(one, two, "icmp"):
            await one.stop_daemon(signal.SIGKILL)
            await until_readers(two, 0)


async def test_a_backend_without_an_overlay_says_so(make_overlay: MakeOverlay) -> None:
    network = {"Network": "10.5.0.0/16", "Backend": {"Type": "host-gw"}}
    async with make_overlay(network=network) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        with pytest.raises(PlatformError, match="nodes talk over the overlay of the udp backend"):
            await ask_peer(one.admin_socket, subnet_of(two))
