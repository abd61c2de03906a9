"""A path is as narrow as its route or link says, and for no longer than they say so."""

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
async def test_a_routes_mtu_is_believed_while_it_is_there(
    make_overlay: MakeOverlay, engine: str
) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        route = f"{two.public_ip}/32 dev eth0 mtu"
        assert await fragments_of_a_ping(one, two) == 0
        for word, outer, inner in (
            ("add", 1400, 1372),
            ("replace", 1300, 1272),
            ("del", 1300, None),
        ):
            await must_run(one.host, *f"ip route {word} {route} {outer}".split())

            async def is_known(wanted: int | None = inner) -> bool:
                # A path that carries no large packet is not looked at.
                await ping(one.host, two.tunnel_address, size=1400)
                return await inner_mtu(one) == wanted

            await until(is_known, f"inner packets up to {inner}")
            assert await fragments_of_a_ping(one, two) == (0 if inner is None else 2)
        # What no router carries either is not for pods to know: Linux hosts clear DF below 552.
        await must_run(one.host, *f"ip route add {route} 500".split())

        async def is_at_the_floor() -> bool:
            await ping(one.host, two.tunnel_address, size=1400)
            return await inner_mtu(one) == 552

        await until(is_at_the_floor, "inner packets up to 552")


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
