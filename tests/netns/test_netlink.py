"""The netlink door under concurrent callers: the daemon's repair and re-creation meet there."""

from __future__ import annotations

import asyncio
import json
import os

import pytest

from tests.nodes import MakeLab, must_run
from tests.wait import DEADLINE_S, until
from tundp.errors import PlatformError
from tundp.linux.netlink import Netlink, Route


async def test_many_askers_at_once_all_get_their_answer(make_lab: MakeLab) -> None:
    # The kernel refuses a second dump on a socket with EBUSY.
    async with make_lab() as lab:
        host = await lab.host("h")
        answers = await asyncio.gather(
            *(ask() for ask in (host.netlink.links, host.netlink.addresses) * 10)
        )
        assert all(answers)


async def test_routes_are_those_that_iproute2_lists(make_lab: MakeLab) -> None:
    async with make_lab() as lab:
        host, other = await lab.host("one"), await lab.host("two")
        for device in ("eth0", "eth1"):
            await lab.cable(host, device, other, device)
        await host.configure("eth0", "192.0.2.1/24")
        await host.configure("eth1", "198.51.100.1/24")
        for route in (
            "default nexthop via 192.0.2.2 nexthop via 198.51.100.2",
            "10.5.0.0/16 via 192.0.2.2 metric 7",
            "10.6.0.1/32 dev eth1",
            "blackhole 10.7.0.0/16 metric 4096",
            "unreachable 10.8.0.0/16",
            "10.9.0.0/16 via 192.0.2.3 table 300",
        ):
            await must_run(host, "ip", "route", "add", *route.split())
        listed = json.loads(await must_run(host, "ip", "-j", "-d", "route", "show"))
        names = {link.index: link.name for link in await host.netlink.links()}
        found = await host.netlink.routes()
        assert [_spelt(route, names) for route in found] == [
            (
                each["dst"].removesuffix("/32"),
                each["type"],
                each.get("gateway"),
                [hop["dev"] for hop in each.get("nexthops", [each]) if "dev" in hop],
                each.get("metric", 0),
            )
            for each in listed
        ]
        assert len(found) == 7


async def test_a_netlink_thread_that_died_is_replaced() -> None:
    async with Netlink() as netlink:
        dead = netlink._thread
        async with netlink.watch() as changes:
            waiting = asyncio.ensure_future(changes())

            def die() -> None:
                raise SystemExit

            netlink._loop.call_soon_threadsafe(die)
            with pytest.raises(PlatformError, match="changes were lost"):
                await asyncio.wait_for(waiting, DEADLINE_S)
        await until(lambda: not dead.is_alive())
        links = await asyncio.wait_for(netlink.links(), DEADLINE_S)
        assert "lo" in [link.name for link in links]
        async with netlink.watch():
            pass


def _spelt(route: Route, names: dict[int, str]) -> tuple[object, ...]:
    destination = "default" if route.destination.prefixlen == 0 else str(route.destination)
    return (
        destination.removesuffix("/32"),
        route.kind,
        None if route.gateway is None else str(route.gateway),
        [names[index] for index in route.indexes],
        route.priority,
    )


async def test_watching_again_and_again_leaves_no_descriptor_open() -> None:
    async with Netlink() as netlink:
        await netlink.links()

        async def watch() -> int:
            async with netlink.watch() as changes:
                waiting = asyncio.ensure_future(changes())
                await asyncio.sleep(0)
                waiting.cancel()
            return len(os.listdir("/proc/self/fd"))

        counts = [await watch() for _ in range(20)]
        assert counts[-1] <= counts[0] + 1
