"""The netlink door under concurrent callers: the daemon's repair and re-creation meet there."""

from __future__ import annotations

import asyncio
import json
import os
from ipaddress import IPv4Network

import pytest

from tests.nodes import MakeLab, must_run
from tests.wait import DEADLINE_S, until
from tundp.errors import PlatformError
from tundp.linux.changes import ChangeSocket
from tundp.linux.netlink import (
    AddressChange,
    Change,
    LinkChange,
    Netlink,
    Route,
    RouteChange,
    RuleChange,
)
from tundp.linux.route_table import RouteEntry


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


async def test_what_is_asked_narrowly_is_what_the_lists_say(make_lab: MakeLab) -> None:
    async with make_lab() as lab:
        host, other = await lab.host("one"), await lab.host("two")
        for device in ("eth0", "eth1"):
            await lab.cable(host, device, other, device)
        await host.configure("eth0", "192.0.2.1/24", "198.51.100.1/32")
        await host.configure("eth1", "203.0.113.1/24")
        netlink = host.netlink
        before = netlink.dumps
        links = await netlink.links()
        assert [await netlink.link(link.index) for link in links] == links
        assert await netlink.link(9999) is None
        assert await netlink.link(0) is None
        assert netlink.dumps == before + 1
        addresses = await netlink.addresses()
        for link in links:
            here = [each for each in addresses if each.index == link.index]
            assert await netlink.addresses(link.index) == here
        index = await host.index("eth0")
        await must_run(host, "ip", "route", "add", "10.7.0.0/16", "dev", "eth0", "table", "77")
        await must_run(host, "ip", "route", "add", "10.8.0.0/16", "via", "203.0.113.2")
        found = {str(prefix) for prefix in await netlink.prefixes(index)}
        assert found == {"192.0.2.0/24", "10.7.0.0/16"}
        assert await netlink.addresses(9999) == []


async def test_each_change_is_reported_with_what_it_is(make_lab: MakeLab) -> None:
    async with make_lab() as lab:
        host, other = await lab.host("one"), await lab.host("two")
        await lab.cable(host, "eth0", other, "eth0")
        index = await host.index("eth0")
        seen: list[Change] = []
        async with host.netlink.watch() as changes:

            async def until_seen(wanted: Change) -> None:
                while wanted not in seen:
                    seen.extend(await asyncio.wait_for(changes(), DEADLINE_S))

            await must_run(host, "ip", "link", "set", "eth0", "mtu", "1400", "up")
            link = await host.netlink.link(index)
            assert link is not None
            assert (link.mtu, link.is_up, link.name) == (1400, True, "eth0")
            await until_seen(LinkChange(link, is_gone=False))
            await must_run(host, "ip", "addr", "add", "192.0.2.1/24", "dev", "eth0")
            (address,) = await host.netlink.addresses(index)
            await until_seen(AddressChange(address, is_gone=False))
            for table in ("main", "300"):
                route = ("10.9.0.0/16", "dev", "eth0", "table", table)
                number = 254 if table == "main" else 300
                for command, is_gone in (("add", False), ("del", True)):
                    await must_run(host, "ip", "route", command, *route)
                    wanted = RouteChange(
                        IPv4Network("10.9.0.0/16"), (index,), number, is_gone=is_gone
                    )
                    await until_seen(wanted)
            await must_run(host, "ip", "rule", "add", "to", "10.9.0.1", "lookup", "300")
            await until_seen(RuleChange())
            # A bridge that lets a port go reports it as a deletion, of the bridge's family.
            await must_run(host, "ip", "link", "add", "br0", "type", "bridge")
            await must_run(host, "ip", "link", "set", "eth0", "master", "br0")
            await must_run(host, "ip", "link", "set", "eth0", "nomaster")
            await must_run(host, "ip", "addr", "del", "192.0.2.1/24", "dev", "eth0")
            await until_seen(AddressChange(address, is_gone=True))
            assert not any(isinstance(each, LinkChange) and each.is_gone for each in seen)
            await must_run(host, "ip", "link", "del", "br0")
            while not any(isinstance(each, LinkChange) and each.is_gone for each in seen):
                seen.extend(await asyncio.wait_for(changes(), DEADLINE_S))


async def test_lost_changes_are_an_error_and_later_ones_come(make_lab: MakeLab) -> None:
    async with make_lab() as lab:
        host = await lab.host("one")
        sock = await host.call(ChangeSocket, 4096)
        try:
            routes = [
                RouteEntry(destination=IPv4Network((f"10.{n // 256}.{n % 256}.0", 24)), index=1)
                for n in range(2000)
            ]
            assert await host.netlink.change_routes(add=routes) == []
            with pytest.raises(PlatformError, match="netlink changes were lost"):
                sock.receive()
            sock.receive()
            assert await host.netlink.change_routes(delete=routes[:1]) == []
            (change,) = sock.receive()
            assert change == RouteChange(routes[0].destination, (1,), 254, is_gone=True)
        finally:
            sock.close()


async def test_broadcast_addresses_are_those_of_the_kernels_local_table(make_lab: MakeLab) -> None:
    async with make_lab() as lab:
        host, other = await lab.host("one"), await lab.host("two")
        await lab.cable(host, "eth0", other, "eth0")
        await host.configure("eth0", "192.0.2.1/24")
        for address in (
            "198.51.100.9/25 brd 198.51.100.77",
            "203.0.113.5/30",
            "203.0.113.8/31",
            "10.5.1.0/32",
            "10.9.0.1/8 brd +",
        ):
            await must_run(host, "ip", "addr", "add", *address.split(), "dev", "eth0")
        listed = json.loads(
            await must_run(
                host, *["ip", "-j", "route", "show", "table", "local", "type", "broadcast"]
            )
        )
        found = {
            str(broadcast)
            for address in await host.netlink.addresses()
            for broadcast in address.broadcasts
        }
        # 127/8 is never delivered anyway.
        assert found - {"127.255.255.255"} == {each["dst"] for each in listed} - {"127.255.255.255"}
        assert {"192.0.2.255", "198.51.100.77", "198.51.100.127", "203.0.113.7"} <= found
