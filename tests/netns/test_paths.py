"""What was learnt of a path's MTU lasts no longer than the routes and links it was learnt of."""

from __future__ import annotations

import pytest

from tests.nodes import MakeOverlay, counters, must_run
from tests.wait import until
from tundp.lab.overlay import LabNode
from tundp.lab.traffic import ping


async def inner_mtu(node: LabNode) -> int | None:
    paths = [peer["path"] for peer in (await node.status_document())["peers"] if peer["path"]]
    return paths[0]["inner_mtu"] if paths else None


async def fragments_of_a_ping(one: LabNode, two: LabNode) -> int:
    before = (await counters(one))["fragments_out"]
    assert await ping(one.host, two.tunnel_address, size=1400) is not None
    return int((await counters(one))["fragments_out"] - before)


@pytest.mark.parametrize("engine", ["reference", "gso"])
async def test_a_route_that_is_gone_narrows_nothing(make_overlay: MakeOverlay, engine: str) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        route = f"{two.public_ip}/32 dev eth0 mtu"
        await must_run(one.host, *f"ip route add {route} 1400".split())
        assert await fragments_of_a_ping(one, two) == 2
        assert await inner_mtu(one) == 1372
        # Another figure is news as well: what is learnt next is that one.
        await must_run(one.host, *f"ip route replace {route} 1300".split())

        async def is_forgotten() -> bool:
            return await inner_mtu(one) is None

        await until(is_forgotten, "the path is asked again")
        assert await fragments_of_a_ping(one, two) == 2
        assert await inner_mtu(one) == 1272
        await must_run(one.host, *f"ip route del {route} 1300".split())
        await until(is_forgotten, "the path is as wide as the device")
        assert await fragments_of_a_ping(one, two) == 0


@pytest.mark.parametrize("engine", ["reference", "gso"])
async def test_a_link_that_widens_again_does(make_overlay: MakeOverlay, engine: str) -> None:
    # One peer's way leads over another link than the one that is advertised, not all of them.
    async with make_overlay(nodes=3) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        for command in (
            "ip link add over0 link eth0 type macvlan mode bridge",
            "ip link set over0 mtu 1400 up",
            f"ip route add {two.public_ip}/32 dev over0 src {one.public_ip}",
        ):
            await must_run(one.host, *command.split())
        assert await fragments_of_a_ping(one, two) == 2
        assert await inner_mtu(one) == 1372
        await must_run(one.host, "ip", "link", "set", "over0", "mtu", "1500")

        async def is_forgotten() -> bool:
            return await inner_mtu(one) is None

        await until(is_forgotten, "the path is as wide as the device")
        assert await fragments_of_a_ping(one, two) == 0
