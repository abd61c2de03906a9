"""Thousands of routes at once, each failure with its route, against the kernel's own table."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest

from tests.nodes import MakeLab
from tundp.lab.lab import Host
from tundp.linux.route_table import RouteEntry

GATEWAY = IPv4Address("192.0.2.2")
OTHER = IPv4Address("192.0.2.3")
PROTOCOL = 85


class Table:
    """A host with eth0 at 192.0.2.1/24, and what iproute2 says of its routes."""

    def __init__(self, host: Host, index: int) -> None:
        self.host = host
        self.index = index

    def entry(self, destination: str, **fields: Any) -> RouteEntry:
        known: dict[str, Any] = {"gateway": GATEWAY, "index": self.index, "protocol": PROTOCOL}
        return RouteEntry(destination=IPv4Network(destination), **known | fields)

    async def change(self, **changes: Any) -> list[Any]:
        found: list[Any] = await self.host.netlink.change_routes(**changes)
        return found

    async def entries(self, **filters: Any) -> list[RouteEntry]:
        listed: list[RouteEntry] = await self.host.netlink.list_routes(**filters)
        return listed

    async def ip_route(self, *words: str) -> list[dict[str, Any]]:
        """What `ip -json route show` prints for routes of our protocol."""
        done = await self.host.run(
            *("ip", "-N", "-json", "-details", "route", "show", "proto", str(PROTOCOL), *words)
        )
        assert done.returncode == 0, done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout or "[]")
        return found


MakeTable = Callable[[], contextlib.AbstractAsyncContextManager[Table]]


@pytest.fixture
def make_table(make_lab: MakeLab) -> MakeTable:
    @contextlib.asynccontextmanager
    async def make() -> AsyncIterator[Table]:
        async with make_lab() as lab:
            here, there = await lab.host("here"), await lab.host("there")
            await lab.cable(here, "eth0", there, "eth0")
            await there.configure("eth0", "192.0.2.2/24")
            await here.configure("eth0", "192.0.2.1/24")
            yield Table(here, await here.index("eth0"))

    return make


async def test_ten_thousand_come_and_go(make_table: MakeTable) -> None:
    async with make_table() as table:
        subnets = list(IPv4Network("10.0.0.0/8").subnets(new_prefix=24))[:10_000]
        routes = [table.entry(str(subnet)) for subnet in subnets]
        assert await table.change(add=routes) == []
        assert {route["dst"] for route in await table.ip_route()} == set(map(str, subnets))
        assert set(await table.entries(protocol=PROTOCOL)) == set(routes)
        moved = [replace(route, gateway=OTHER) for route in routes[:5000]]
        assert await table.change(replace=moved) == []
        assert set(await table.entries(protocol=PROTOCOL)) == {*moved, *routes[5000:]}
        assert await table.change(delete=[*moved, *routes[5000:]]) == []
        assert await table.ip_route() == []
        assert await table.entries(protocol=PROTOCOL) == []


async def test_failures_are_of_their_route_only(make_table: MakeTable) -> None:
    async with make_table() as table:
        good = [table.entry(f"10.5.{number}.0/24") for number in range(256)]
        unreachable = table.entry("10.6.0.0/24", gateway=IPv4Address("203.0.113.9"))
        no_link = table.entry("10.6.1.0/24", gateway=None, index=9999)
        twice = replace(good[7], gateway=OTHER)
        absent = table.entry("10.7.0.0/24")
        failures = await table.change(
            delete=[absent], add=[*good[:200], unreachable, no_link, twice, *good[200:]]
        )
        assert [(f.action, f.route, f.errno) for f in failures] == [
            ("delete", absent, errno.ESRCH),
            ("add", unreachable, errno.ENETUNREACH),
            ("add", no_link, errno.ENODEV),
            ("add", twice, errno.EEXIST),
        ]
        texts = [str(failure) for failure in failures]
        assert texts[1].startswith("cannot add route 10.6.0.0/24 via 203.0.113.9 dev ")
        assert "Nexthop has invalid gateway (Network is unreachable)" in texts[1]
        assert set(await table.entries(protocol=PROTOCOL)) == set(good)


async def test_what_ip_route_shows_is_what_was_asked_for(make_table: MakeTable) -> None:
    async with make_table() as table:
        onlink = table.entry(
            "10.5.1.0/24", gateway=IPv4Address("203.0.113.9"), is_onlink=True, metric=7
        )
        local = table.entry("10.5.2.0/24", gateway=None, source=IPv4Address("192.0.2.1"))
        hole = table.entry("10.5.0.0/16", gateway=None, index=0, kind="blackhole")
        default = table.entry("0.0.0.0/0")
        assert await table.change(add=[onlink, local, hole, default]) == []
        found = {route["dst"]: route for route in await table.ip_route()}
        assert found["10.5.1.0/24"]["gateway"] == "203.0.113.9"
        assert found["10.5.1.0/24"]["flags"] == ["onlink"]
        assert found["10.5.1.0/24"]["metric"] == 7
        assert found["10.5.2.0/24"]["prefsrc"] == "192.0.2.1"
        assert found["10.5.2.0/24"]["scope"] == "253"
        assert found["10.5.0.0/16"]["type"] == "6"
        assert found["default"]["gateway"] == "192.0.2.2"
        assert set(await table.entries(protocol=PROTOCOL)) == {onlink, local, hole, default}
        assert await table.change(delete=[onlink, local, hole, default]) == []
        assert await table.ip_route() == []


async def test_listing_by_link_protocol_and_table(make_table: MakeTable) -> None:
    async with make_table() as table:
        ours, others = table.entry("10.5.1.0/24"), table.entry("10.5.2.0/24", protocol=3)
        elsewhere = table.entry("10.5.3.0/24", table=1000)
        multipath = "nexthop via 192.0.2.2 nexthop via 192.0.2.3"
        assert await table.change(add=[ours, others, elsewhere]) == []
        done = await table.host.run("ip", "route", "add", "10.5.4.0/24", *multipath.split())
        assert done.returncode == 0, done.stderr
        loopback = await table.host.index("lo")
        assert await table.entries(protocol=PROTOCOL) == [ours]
        assert {ours, others} <= set(await table.entries(index=table.index))
        assert await table.entries(index=loopback, protocol=PROTOCOL) == []
        assert await table.entries(table=1000) == [elsewhere]
        assert await table.entries(table=1001) == []
        destinations = {str(route.destination) for route in await table.entries()}
        assert {"10.5.1.0/24", "10.5.2.0/24", "192.0.2.0/24"} <= destinations
        assert "10.5.4.0/24" not in destinations


async def test_a_route_of_somebody_else_is_replaced_or_left(make_table: MakeTable) -> None:
    async with make_table() as table:
        others = table.entry("10.5.1.0/24", protocol=3)
        ours = replace(others, protocol=PROTOCOL, gateway=OTHER)
        assert await table.change(add=[others]) == []
        (failure,) = await table.change(add=[ours])
        assert failure.errno == errno.EEXIST
        (failure,) = await table.change(delete=[ours])
        assert failure.errno == errno.ESRCH
        assert await table.change(replace=[ours]) == []
        assert await table.entries(protocol=PROTOCOL) == [ours]
        assert await table.entries(protocol=3, index=table.index) == []


async def test_nothing_to_do_is_done_at_once(make_table: MakeTable) -> None:
    async with make_table() as table:
        assert await table.change() == []
