"""Nodes whose addresses lie in the overlay's network, in class E, or lead into the overlay.

[node1] eth0 -- [switch] -- eth0 [node2]      the kernel's routes decide who is a peer
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from tests.nodes import (
    MakeOverlay,
    answers,
    has_peer,
    has_peer_count,
    must_run,
)
from tests.wait import until
from tundp.lab.overlay import LabNode, OverlayLab

PORT = 8285


async def renumber(overlay: OverlayLab, prefix: str, *, length: int = 24) -> None:
    """Give node n the address `prefix`.n instead of 192.0.2.n; the switch has `prefix`.254."""
    await must_run(overlay.switch, "ip", "addr", "add", f"{prefix}.254/{length}", "dev", "br0")
    for node in overlay.nodes.values():
        await must_run(node.host, "ip", "addr", "flush", "dev", "eth0")
        await must_run(
            node.host, "ip", "addr", "add", f"{prefix}.{node.number}/{length}", "dev", "eth0"
        )
        await must_run(node.host, "ip", "route", "add", "default", "via", f"{prefix}.254")


async def start(overlay: OverlayLab, *flags: str, nodes: Sequence[LabNode] = ()) -> None:
    for node in nodes or overlay.nodes.values():
        await overlay.start_daemon(node, "--iptables-forward-rules=false", *flags)


def write_leases(overlay: OverlayLab, network: dict[str, Any], leases: dict[str, str]) -> None:
    """Reservations beside those the nodes take."""
    document = {
        "config": network,
        "leases": {key: {"PublicIP": address} for key, address in leases.items()},
    }
    overlay.lease_file.write_text(json.dumps(document), encoding="utf-8")


async def refused_of(node: LabNode) -> dict[str, str]:
    """Reason by key of the leases a node refuses."""
    document = await node.status_document()
    return {each["key"]: each["reason"] for each in document["refused"]}


async def is_refused(node: LabNode, key: str, reason: str) -> bool:
    return (await refused_of(node)).get(key) == reason


WIDE = {
    "Network": "10.0.0.0/8",
    "SubnetLen": 20,
    "SubnetMin": "10.10.0.0",
    "SubnetMax": "10.99.0.0",
}


@pytest.mark.parametrize(
    ("prefix", "network"),
    [
        ("10.0.0", WIDE),
        ("172.16.5", {"Network": "172.16.0.0/12", "SubnetMin": "172.20.0.0"}),
        ("240.10.0", {"Network": "10.5.0.0/16"}),
        ("100.64.0", {"Network": "100.64.0.0/10", "SubnetMin": "100.96.0.0"}),
    ],
)
async def test_nodes_of_any_unicast_address_are_peers(
    make_overlay: MakeOverlay, prefix: str, network: dict[str, Any]
) -> None:
    async with make_overlay(start=False, network=network) as overlay:
        await renumber(overlay, prefix)
        await start(overlay)
        await overlay.wait_ready()
        one, two = overlay.nodes[1], overlay.nodes[2]
        for node in (one, two):
            assert await refused_of(node) == {}

            async def is_all_well(node: Any = node) -> bool:
                findings = (await node.status_document())["findings"]
                return all(each["verdict"] == "ok" for each in findings)

            # The first look for obstacles takes a moment.
            await until(is_all_well)
            status = await node.status_document()
            assert status["backend"]["interface"]["warnings"] == []
        await until(lambda: answers(one.host, two.tunnel_address))
        await until(lambda: answers(two.host, one.tunnel_address))


async def test_pods_of_class_e_reach_each_other(make_overlay: MakeOverlay) -> None:
    async with make_overlay(network={"Network": "240.5.0.0/16"}, pods=True) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await until(lambda: answers(one.pod, two.pod_address))
        await until(lambda: answers(two.pod, one.pod_address))
        for node in (one, two):
            assert (await node.status_document())["counters"]["decap"]["drops"] == {}


async def test_a_peer_whose_only_way_is_the_overlay_is_refused_until_there_is_another(
    make_overlay: MakeOverlay,
) -> None:
    key, inside = "10.5.200.0-24", "10.5.209.1"
    async with make_overlay(start=False, nodes=1) as overlay:
        one = overlay.nodes[1]
        reservations = {key: inside, "10.5.201.0-24": "192.0.2.77"}
        write_leases(overlay, {"Network": "10.5.0.0/16"}, reservations)
        await must_run(one.host, "ip", "route", "add", "default", "via", "192.0.2.254")
        await start(overlay)
        await one.wait_for_peers(1)
        assert await refused_of(one) == {key: "routed_into_overlay"}
        # It was never a peer, not even for a moment.
        assert f"peer {key}" not in one.log_path.read_text()

        route = (f"{inside}/32", "via", "192.0.2.254")
        for more in ((), ("table", "100")):
            # A longer route, then one of another table and the rule that leads there.
            if more:
                await must_run(one.host, "ip", "rule", "add", "to", inside, "lookup", "100")
            await must_run(one.host, "ip", "route", "add", *route, *more)
            await until(lambda: has_peer(one, "10.5.200.0/24", inside))
            assert await refused_of(one) == {}
            await must_run(one.host, "ip", "route", "del", *route, *more)
            await until(partial(is_refused, one, key, "routed_into_overlay"))
        assert await has_peer_count(one, 1)


async def test_routes_over_our_device_for_other_addresses_refuse_those(
    make_overlay: MakeOverlay,
) -> None:
    # Whatever leads into the device loops, not only what lies in the network; and a link that
    # goes down takes its routes along without a word of the kernel.
    async with make_overlay(start=False, nodes=1) as overlay:
        one = overlay.nodes[1]
        key, far = "10.5.200.0-24", "198.51.100.9"
        inside_key, inside = "10.5.201.0-24", "10.5.209.1"
        write_leases(overlay, {"Network": "10.5.0.0/16"}, {key: far, inside_key: inside})
        await must_run(one.host, "ip", "route", "add", "default", "via", "192.0.2.254")
        await must_run(one.host, "ip", "link", "add", "eth1", "type", "veth", "peer", "name", "b")
        await must_run(one.host, "ip", "link", "set", "eth1", "up")
        await must_run(one.host, "ip", "route", "add", f"{inside}/32", "dev", "eth1")
        await start(overlay)
        await one.wait_for_peers(2)
        await must_run(one.host, "ip", "route", "add", far, "dev", "flannel0")
        await until(partial(is_refused, one, key, "routed_into_overlay"))
        await must_run(one.host, "ip", "route", "del", far, "dev", "flannel0")
        await until(lambda: has_peer_count(one, 2))
        await must_run(one.host, "ip", "link", "set", "eth1", "down")
        await until(partial(is_refused, one, inside_key, "routed_into_overlay"))
        # The device anew has another index.
        await must_run(one.host, "ip", "link", "del", "flannel0")
        await until(partial(has_route_over, one, "flannel0"))
        await must_run(one.host, "ip", "link", "set", "eth1", "up")
        await must_run(one.host, "ip", "route", "add", f"{inside}/32", "dev", "eth1")
        await until(lambda: has_peer_count(one, 2))
        await must_run(one.host, "ip", "route", "add", far, "dev", "flannel0")
        await until(partial(is_refused, one, key, "routed_into_overlay"))


async def has_route_over(node: LabNode, device: str) -> bool:
    listed = await must_run(node.host, "ip", "route", "show", "10.5.0.0/16")
    return f"dev {device}" in listed


async def test_addresses_that_are_no_single_hosts(make_overlay: MakeOverlay) -> None:
    leases = {
        "10.5.200.0-24": "192.0.2.255",
        "10.5.201.0-24": "0.0.0.9",
        "10.5.202.0-24": "127.0.0.9",
        "10.5.203.0-24": "255.255.255.255",
        "10.5.204.0-24": "239.1.1.1",
    }
    fine = {"10.5.210.0-24": "192.0.2.254", "10.5.211.0-24": "255.255.255.254"}
    async with make_overlay(start=False, nodes=1) as overlay:
        one = overlay.nodes[1]
        write_leases(overlay, {"Network": "10.5.0.0/16"}, leases | fine)
        await start(overlay)
        await one.wait_for_peers(2)  # the gateway is a host like any other
        assert await refused_of(one) == dict.fromkeys(leases, "not_unicast")


async def test_an_uplink_bridge_in_the_network_is_taken(make_overlay: MakeOverlay) -> None:
    async with make_overlay(start=False, network=WIDE) as overlay:
        await renumber(overlay, "10.0.0")
        for node in overlay.nodes.values():
            run = partial(must_run, node.host, "ip")
            await run("addr", "flush", "dev", "eth0")
            await run("link", "add", "br0", "type", "bridge")
            await run("link", "set", "eth0", "master", "br0")
            await run("link", "set", "br0", "up")
            await run("addr", "add", f"10.0.0.{node.number}/24", "dev", "br0")
            await run("route", "add", "default", "via", "10.0.0.254")
            node.interface_flags = ("--iface-regex=^10[.]0[.]0[.]",)
        await start(overlay)
        await overlay.wait_ready()
        one, two = overlay.nodes[1], overlay.nodes[2]
        status = await one.status_document()
        assert status["backend"]["interface"]["name"] == "br0"
        await until(lambda: answers(one.host, two.tunnel_address))


async def test_config_check_fails_when_no_lease_would_be_a_peer(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay(start=False, nodes=1) as overlay:
        one = overlay.nodes[1]
        inside = {"10.5.200.0-24": "10.5.209.1", "10.5.201.0-24": "10.5.209.2"}
        write_leases(overlay, {"Network": "10.5.0.0/16"}, inside)
        await must_run(one.host, "ip", "route", "add", "default", "via", "192.0.2.254")
        code, found = await check(one)
        assert (code, found["peers"]["verdict"]) == (1, "fail")
        assert "2 of 2" in found["peers"]["evidence"]
        assert "10.5.209.1" in found["peers"]["evidence"]
        # One that is reached is enough for a warning that names the other.
        await must_run(one.host, "ip", "route", "add", "10.5.209.2", "via", "192.0.2.254")
        code, found = await check(one)
        assert (code, found["peers"]["verdict"]) == (0, "warn")
        assert "1 of 2" in found["peers"]["evidence"]
        await must_run(one.host, "ip", "route", "add", "10.5.209.1", "via", "192.0.2.254")
        code, found = await check(one)
        assert (code, found["peers"]["verdict"]) == (0, "ok")


async def check(node: LabNode) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code of `tundp config check --json`, and its findings by id."""
    done = await node.host.run(
        *(sys.executable, "-m", "tundp", "config", "check", "--json", "--iface=eth0"),
        f"--store=file:{node.directory / 'leases.json'}",
        f"--subnet-file={node.subnet_file}",
        f"--admin-socket={node.admin_socket}",
        f"--state-dir={node.state_dir}",
    )
    return done.returncode, {each["id"]: each for each in json.loads(done.stdout)}
