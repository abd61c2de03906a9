"""The breaks every overlay meets, each named by `tundp status` on the node where pings fail."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shlex
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from tests.netns.conftest import NETWORK
from tests.netns.test_path_measuring import INVALID_DROPPED, SWALLOW, world
from tests.nodes import MakeLab, MakeOverlay, must_run
from tests.wait import until
from tundp.lab.lab import Host
from tundp.lab.overlay import LabNode
from tundp.lab.traffic import PingStream, ping

TUNDP = (sys.executable, "-m", "tundp")
PAUSE_S = 0.5
"""Between pings: an operator's are a second apart."""


@pytest.fixture(params=["gso", "reference"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


one_engine = pytest.mark.parametrize("engine", ["auto"])


async def shown(node: LabNode) -> str:
    """What `tundp status` prints on a node."""
    done = await node.host.run(*TUNDP, "status", f"--admin-socket={node.admin_socket}")
    assert done.returncode == 0, done.stderr
    return done.stdout


async def until_told(node: LabNode, pattern: str) -> None:
    """Until a line of `tundp status` matches; fails with what it prints."""
    last = ""

    async def is_told() -> bool:
        nonlocal last
        last = await shown(node)
        return re.search(pattern, last, re.MULTILINE) is not None

    try:
        await until(is_told, f"status to say {pattern!r}", poll_s=0.2)
    except AssertionError as error:
        error.add_note(last)
        raise


async def reach(node: LabNode, public_ip: str) -> dict[str, Any] | None:
    """What a node knows of the answers of the peer with this address."""
    peers = (await node.status_document())["peers"]
    (found,) = (each for each in peers if each["public_ip"] == public_ip)
    answer: dict[str, Any] | None = found["reach"]
    return answer


@contextlib.asynccontextmanager
async def pinging(host: Host, address: str) -> AsyncIterator[None]:
    async with PingStream(host, address, pause_s=PAUSE_S):
        yield


async def test_a_stopped_daemon_is_named_and_its_return_too(make_overlay: MakeOverlay) -> None:
    async with make_overlay("--healthz-port=10256", "--metrics-addr=127.0.0.1:9100") as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        assert await two.stop_daemon() == 0
        async with pinging(one.host, two.tunnel_address):
            await until_told(
                one,
                r"^silent: 10\.5\.\S+ at 192\.0\.2\.2:8285: \d+ packets sent in \d+ s, nothing came"
                r" back, \d+ echo requests unanswered; port unreachable, says 192\.0\.2\.2,"
                r" (once|\d+ times), the last \d+ s ago; by eth0, neighbour \w+; no daemon listens",
            )
            status, text = await one.get(10256, "/readyz?verbose")
            assert status == 200, text
            assert "[!]peers warning: " in text
            _, metrics = await one.get(9100, "/metrics")
            assert "tundp_silent_peers 1.0\n" in metrics
            await overlay.start_daemon(two)
            await until(lambda: answers_again(one))
        text = await shown(one)
        assert "silent" not in text
        assert "answers again" in one.log_path.read_text()


async def answers_again(node: LabNode) -> bool:
    known = await reach(node, "192.0.2.2")
    return known is None or known["standing"] == "answers"


@one_engine
async def test_a_firewall_before_the_port_is_named(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        rule = ["INPUT", "-p", "udp", "--dport", "8285", "-j"]
        await must_run(two.host, "iptables", "-I", *rule, "DROP")
        async with pinging(one.host, two.tunnel_address):
            await until_told(
                one,
                r"^silent: 10\.5\.\S+ at 192\.0\.2\.2:8285: .* by eth0, neighbour"
                r" (REACHABLE|STALE|DELAY|PROBE); a firewall drops UDP 8285",
            )
            await must_run(two.host, "iptables", "-I", *rule, "REJECT")
            await until_told(one, r"^silent: .*port unreachable, says 192\.0\.2\.2")
            reject = [*rule, "REJECT", "--reject-with", "icmp-admin-prohibited"]
            await must_run(two.host, "iptables", "-I", *reject)
            await until_told(one, r"^silent: .*prohibited by a filter, says 192\.0\.2\.2")


@one_engine
async def test_a_peer_with_an_address_nobody_reaches_is_named(make_overlay: MakeOverlay) -> None:
    async with make_overlay(start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await overlay.lab.cable(two.host, "mgmt0", overlay.switch, "mgmt2")
        await two.host.configure("mgmt0", "10.99.0.2/24")
        await one.host.route("0.0.0.0/0", via="192.0.2.254")
        two.interface_flags = ("--iface=mgmt0",)
        for node in (one, two):
            await overlay.start_daemon(node)
        await overlay.wait_ready()
        async with pinging(one.host, two.tunnel_address):
            await until_told(
                one,
                r"^silent: 10\.5\.\S+ at 10\.99\.0\.2:8285: .* by 192\.0\.2\.254 on eth0"
                r" \(default route\).*is 10\.99\.0\.2 an address that nodes can reach \(--iface",
            )


@pytest.mark.parametrize("rules", ["", SWALLOW], ids=["with ICMP", "in silence"])
@one_engine
async def test_a_narrow_path_is_named(make_lab: MakeLab, engine: str, rules: str) -> None:
    async with world(make_lab, engine, mtu=1500 if rules else 1400, rules=rules) as all_:

        async def is_told() -> bool:
            await ping(
                all_.one.pod, all_.two.pod_address, size=1444, dont_fragment=True, timeout_s=0.3
            )
            text = await shown(all_.one)
            return (
                re.search(r"(?m)^10\.5\.\S+ +192\.0\.2\.2:8285 .* 1372 measured$", text) is not None
            )

        await until(is_told, "the path MTU and who says so to be in the peer's line")


@one_engine
async def test_what_is_dropped_behind_a_peer_is_told_from_silence(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay("--iptables-forward-rules=false", pods=True) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await must_run(two.host, "iptables", "-P", "FORWARD", "DROP")
        async with pinging(one.pod, two.pod_address):
            await until_told(
                one,
                r"^one-way: 10\.5\.\S+ at 192\.0\.2\.2:8285: \d+ packets sent in \d+ s, none came"
                r" back, but it answers echo requests within \S+ ms; .* its rules for forwarding",
            )
        assert "silent" not in await shown(one)


@one_engine
async def test_the_lease_of_a_dead_host_is_named(make_overlay: MakeOverlay) -> None:
    async with make_overlay(start=False) as overlay:
        leases = {"10.5.177.0-24": {"PublicIP": "192.0.2.77"}}
        overlay.lease_file.write_text(json.dumps({"config": NETWORK, "leases": leases}))
        for node in overlay.nodes.values():
            await overlay.start_daemon(node)
        for node in overlay.nodes.values():
            await node.wait_for_peers(2)
        one, two = overlay.nodes[1], overlay.nodes[2]
        async with pinging(one.host, "10.5.177.9"), pinging(one.host, two.tunnel_address):
            await until_told(
                one,
                r"^silent: 10\.5\.177\.0/24 at 192\.0\.2\.77:8285: .* by eth0, neighbour"
                r" (FAILED|INCOMPLETE); no such host on eth0: is 192\.0\.2\.77 up\?",
            )
            lines = (await shown(one)).splitlines()
            rows = [line.split()[0] for line in lines if re.search(r"^10\.5\.\S+ +\S+:8285", line)]
            assert rows == ["10.5.177.0/24", str(two.gateway.network)], "the silent one first"


# Ours


async def test_sends_our_own_kernel_refuses_are_named(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        assert await ping(one.host, two.tunnel_address) is not None
        rule = ["OUTPUT", "-p", "udp", "--dport", "8285", "-j", "DROP"]
        await must_run(one.host, "iptables", "-I", *rule)
        async with pinging(one.host, two.tunnel_address):
            await until_told(
                one,
                r"^refused: 10\.5\.\S+ at 192\.0\.2\.2:8285: sends are refused for \d+ s \(EPERM\)"
                r".*a firewall of this node",
            )
            await must_run(one.host, "iptables", "-D", *rule)
            await until(lambda: answers_again(one))
            route = f"unreachable {two.public_ip}/32".split()
            await must_run(one.host, "ip", "route", "add", *route)
            await until_told(one, r"^refused: .*\(EHOSTUNREACH\).*there is no route")
            await must_run(one.host, "ip", "route", "del", *route)
            await until(lambda: answers_again(one))


# Nobody's fault


@pytest.mark.parametrize("rules", [(), INVALID_DROPPED], ids=["", "answers are invalid"])
@one_engine
async def test_traffic_in_one_direction_is_no_silence(
    make_overlay: MakeOverlay, rules: Sequence[str]
) -> None:
    # With rules as ufw's, too, which drop answers to requests conntrack has not seen.
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        for rule in rules:
            await must_run(one.host, *shlex.split(rule))
        seen = set()
        sink = await two.host.socket(socket.SOCK_DGRAM)
        source = await one.host.socket(socket.SOCK_DGRAM)
        with sink, source:
            sink.bind((two.tunnel_address, 9000))
            source.connect((two.tunnel_address, 9000))
            for _ in range(60):
                source.send(b"x")
                await asyncio.sleep(0.1)
                known = await reach(one, two.public_ip)
                seen.add(None if known is None else known["standing"])
        assert seen <= {None, "waiting", "answers", "one-way"}, seen
        assert "one-way" in seen
        assert (await one.status_document())["routing"]["silent_peers"] == 0


@one_engine
async def test_a_peer_that_is_sent_nothing_is_not_asked(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        assert await two.stop_daemon() == 0
        before = (await one.status_document())["backend"]["path_probes"]
        await asyncio.sleep(2.5)
        document = await one.status_document()
        assert document["backend"]["path_probes"] == before
        assert document["routing"]["silent_peers"] == 0
