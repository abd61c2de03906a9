"""Ways to the PublicIPs, asked of a real kernel while leases come and go."""

from __future__ import annotations

import asyncio
from ipaddress import IPv4Address, IPv4Network

from tests.nodes import MakeLab, must_run
from tundp.daemon.peer_paths import PeerPaths
from tundp.lease.routing import Refusal
from tundp.linux.netlink import Flow

NETWORK = IPv4Network("10.5.0.0/16")


async def test_leases_that_change_while_routes_are_listed(make_lab: MakeLab) -> None:
    async with make_lab() as lab:
        host = await lab.host("a")
        await must_run(
            host, *["ip", "link", "add", "flannel0", "type", "veth", "peer", "name", "far"]
        )
        await host.configure("far")
        await host.configure("flannel0", "10.5.1.0/32")
        await host.netlink.ensure_route(index := await host.index("flannel0"), NETWORK)
        paths = PeerPaths(host.netlink, network=NETWORK, has_device=True)
        leases = {n: IPv4Address(f"192.0.2.{n}") for n in range(1, 5)}
        flow = Flow(source=IPv4Address("10.5.1.0"), port=8285)

        looking = asyncio.ensure_future(
            paths.follow_device(index, lambda: (each for each in leases.values()), flow)
        )
        await asyncio.sleep(0)  # it waits for the kernel's list of routes now
        assert not looking.done()
        leases |= {8: IPv4Address("192.0.2.8"), 9: IPv4Address("10.5.9.9")}
        del leases[1]
        await looking
        # The one that came meanwhile was judged, too: its packets would go round and round.
        assert paths.misrouted == {IPv4Address("10.5.9.9"): Refusal.ROUTED_INTO_OVERLAY}
