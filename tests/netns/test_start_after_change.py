"""What a start does about what was before it: another backend, network or subnet, other rules."""

from __future__ import annotations

import json
from datetime import datetime
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest

from tests.nodes import MakeOverlay, log_contains, must_run
from tests.wait import until
from tundp.lab.overlay import LabNode, OverlayLab
from tundp.linux.unreachable import PROTOCOL

UDP = {"Network": "10.5.0.0/16"}
HOST_GW = UDP | {"Backend": {"Type": "host-gw"}}


async def restart(overlay: OverlayLab, network: dict[str, Any], *flags: str) -> LabNode:
    """Node 1 again, under another network config."""
    node = overlay.nodes[1]
    if node.log_path.exists():  # started before
        await node.stop_daemon()
    document = json.loads(overlay.lease_file.read_text())
    document["config"] = network
    overlay.lease_file.write_text(json.dumps(document))
    await overlay.start_daemon(node, *flags)
    await overlay.wait_ready()
    return node


async def own_lease(overlay: OverlayLab) -> dict[str, Any]:
    ((_, value),) = (await overlay.read_leases()).items()
    lease: dict[str, Any] = json.loads(value)
    return lease


async def our_routes(node: LabNode) -> set[str]:
    """Kind and destination of the routes with our protocol number."""
    found = await node.host.netlink.list_routes(protocol=PROTOCOL)
    return {f"{route.kind} {route.destination}" for route in found}


@pytest.mark.parametrize(("before", "after"), [(UDP, HOST_GW), (HOST_GW, UDP)])
async def test_our_lease_names_the_backend_of_now(
    make_overlay: MakeOverlay, before: dict[str, Any], after: dict[str, Any]
) -> None:
    async with make_overlay(nodes=1, network=before) as overlay:
        key = set(await overlay.read_leases())
        assert (await own_lease(overlay)).get("BackendType") == (
            "host-gw" if before is HOST_GW else None
        )
        await restart(overlay, after)
        assert set(await overlay.read_leases()) == key
        assert (await own_lease(overlay)).get("BackendType") == (
            "host-gw" if after is HOST_GW else None
        )


@pytest.mark.parametrize("backend", [{}, {"Backend": {"Type": "host-gw"}}], ids=["udp", "host-gw"])
async def test_routes_for_the_subnet_and_network_of_last_time_go(
    make_overlay: MakeOverlay, backend: dict[str, Any]
) -> None:
    flag = "--ip-blackhole-route"
    async with make_overlay(nodes=1, start=False) as overlay:
        first = UDP | backend | {"SubnetMin": "10.5.10.0", "SubnetMax": "10.5.10.0"}
        node = await restart(overlay, first, flag)
        assert await our_routes(node) == {"unreachable 10.5.0.0/16", "blackhole 10.5.10.0/24"}
        # Another node gets the subnet; a blackhole route there would cut it off from here.
        second = UDP | backend | {"SubnetMin": "10.5.20.0", "SubnetMax": "10.5.20.0"}
        await restart(overlay, second, flag)
        assert await our_routes(node) == {"unreachable 10.5.0.0/16", "blackhole 10.5.20.0/24"}
        via = f"ip route add 10.5.30.0/24 via 192.0.2.254 dev eth0 proto {PROTOCOL}"
        await must_run(node.host, *via.split())
        await restart(overlay, {"Network": "10.6.0.0/16"} | backend)
        subnet = node.gateway.network
        assert subnet.subnet_of(IPv4Network("10.6.0.0/16"))
        assert await our_routes(node) == {"unreachable 10.6.0.0/16"}


async def test_subnet_env_is_written_when_the_rules_are_there(make_overlay: MakeOverlay) -> None:
    async with make_overlay("--ip-masq", nodes=1) as overlay:
        node = overlay.nodes[1]
        await until(lambda: log_contains(node, "rules made"))
        (line,) = [each for each in node.log_path.read_text().splitlines() if "rules made" in each]
        there_since = datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f")
        # Docker and CNI start as soon as the file is there.
        written = datetime.fromtimestamp(node.subnet_file.stat().st_mtime)
        assert written >= there_since


async def test_a_changed_address_changes_nothing_else_in_the_lease(
    make_overlay: MakeOverlay,
) -> None:
    network = UDP | {"EnableIPv6": True, "IPv6Network": "fd05::/48"}
    async with make_overlay("--public-ipv6=2001:db8::1", nodes=1, network=network) as overlay:
        node = overlay.nodes[1]
        before = await own_lease(overlay)
        assert before["PublicIPv6"] == "2001:db8::1"
        await node.host.sysctl("ipv4/conf/eth0/promote_secondaries", 1)
        await must_run(node.host, *["ip", "addr", "add", "192.0.2.51/24", "dev", "eth0"])
        await must_run(node.host, *["ip", "addr", "del", "192.0.2.1/24", "dev", "eth0"])

        async def has_moved() -> bool:
            lease = await own_lease(overlay)
            return IPv4Address(lease["PublicIP"]) == IPv4Address("192.0.2.51")

        await until(has_moved)
        after = await own_lease(overlay)
        for renewed in ("Revision", "Expires"):
            del before[renewed], after[renewed]
        assert after == before | {"PublicIP": "192.0.2.51"}
