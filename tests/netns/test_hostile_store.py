"""What others write into the store, and what that costs a node that has its own lease.

[node1] [node2] eth0 -- [switch, etcd 192.0.2.254]
"""

from __future__ import annotations

import json

from tests.nodes import HEALTH_PORT, MakeOverlay, answers, is_ready
from tests.wait import until
from tundp.lab.overlay import LabNode

HEALTH = f"--healthz-port={HEALTH_PORT}"
QUIET = "--iptables-forward-rules=false"


async def finding_of(node: LabNode, name: str) -> list[dict[str, str]]:
    """Every finding of this id in the node's status."""
    return [each for each in (await node.status_document())["findings"] if each["id"] == name]


async def test_leases_for_networks_of_this_host_make_no_node_unready(
    make_overlay: MakeOverlay,
) -> None:
    """The first peers of the table, which are asked about, are the store's to choose."""
    async with make_overlay(start=False) as overlay:
        await overlay.start_etcd({"Network": "10.5.0.0/16"})
        # Below SubnetMin, so that no node draws it; docker0 of each host has it.
        for number in range(8):
            value = {"PublicIP": f"192.0.2.{200 + number}", "PublicIPv6": None}
            await overlay.write_etcd(f"subnets/10.5.0.{number * 32}-27", json.dumps(value))
        one, two = overlay.nodes[1], overlay.nodes[2]
        for node in (two, one):
            await node.host.bridge("docker0")
            await node.host.configure("docker0", "10.5.0.1/24")
            await overlay.start_daemon(node, HEALTH, QUIET)
            await node.wait_for_peers(8)
        await one.wait_for_peers(9)

        async def has_looked() -> bool:
            (summary,) = await finding_of(one, "obstacles")
            return "peers" in summary["evidence"]

        await until(has_looked, "a look at what is in the way")
        found = await finding_of(one, "obstacle.route")
        assert found
        assert {each["verdict"] for each in found} == {"warn"}, found
        assert any("docker0" in each["evidence"] for each in found)
        assert await is_ready(one)
        assert await answers(one.host, two.tunnel_address)
