"""The host-gw backend in this process, over the kernel of a lab host, without a daemon.

[one] eth0 192.0.2.1/24 -- eth0 [two]
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from ipaddress import IPv4Address, IPv4Network

import pytest

from tests.wait import until
from tundp.backend.base import BackendContext, Given, PacketSettings
from tundp.backend.hostgw import ERRORS_NAMED, HostGwBackend, host_gw_config
from tundp.choices import Engine, SourceCheck
from tundp.engine.native.engine import EngineSettings
from tundp.errors import PlatformError
from tundp.finding import Verdict, failures
from tundp.lab.lab import Host, Lab
from tundp.lease.codec import parse_key
from tundp.lease.fib import FIRST_HOP_ID, build_fib
from tundp.lease.model import Endpoint, LeaseKey, Peer
from tundp.lease.routing import RoutingDelta
from tundp.linux.iface import Selection, look
from tundp.linux.route_table import RouteEntry
from tundp.linux.unreachable import PROTOCOL

OVERLAY = IPv4Network("10.5.0.0/16")
MakeHost = Callable[[], contextlib.AbstractAsyncContextManager[Host]]
OWN = parse_key("10.5.1.0-24")
FAR = "198.51.100.7"
"""On no network of the host."""


def peer(number: int, gateway: str, overlay: IPv4Network = OVERLAY) -> Peer:
    base = int(overlay.network_address) + (number << 8)
    return Peer(
        subnet=IPv4Network((base, 24)),
        endpoint=Endpoint(IPv4Address(gateway), 0),
        hop_id=FIRST_HOP_ID + number,
    )


async def routes_of(host: Host) -> dict[str, str]:
    """Gateway of each route that bears our protocol number, by destination."""
    found = await host.netlink.list_routes(protocol=PROTOCOL)
    return {str(route.destination): str(route.gateway) for route in found}


async def must_do(host: Host, command: str) -> None:
    done = await host.run(*command.split())
    assert done.returncode == 0, done.stderr


def context_of(host: Host) -> BackendContext:
    return BackendContext(
        netlink=host.netlink,
        packets=PacketSettings(
            tun_name="flannel%d",
            engine=Engine.AUTO,
            workers=1,
            source_check=SourceCheck.COUNT,
            admitted=(),
            engine_settings=EngineSettings(),
        ),
        given=Given(),
    )


class Kept:
    """A host-gw backend, fed as the publisher feeds it."""

    def __init__(self, host: Host, overlay: IPv4Network, own: LeaseKey) -> None:
        self.backend = HostGwBackend(host_gw_config(), context_of(host))
        self.overlay = overlay
        self.own = own
        self.generation = 1

    async def open(self, host: Host, peers: Iterable[Peer]) -> None:
        self.backend.prepare(await look(host.netlink, Selection(iface=("eth0",)), self.overlay))
        known = {each.subnet: each for each in peers}
        await self.backend.open(
            self.overlay,
            self.own,
            fib=build_fib((), own_subnet=self.own.subnet, generation=1),
            peers=known,
        )

    def install(self, delta: RoutingDelta) -> None:
        self.generation += 1
        fib = build_fib((), own_subnet=self.own.subnet, generation=self.generation)
        self.backend.install(fib, delta)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.ensure_future(self.backend.run())
        await asyncio.sleep(0)
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def make_host(make_lab: Callable[[], Lab]) -> MakeHost:
    """`async with make_host() as host`: host one of the drawing above."""

    @contextlib.asynccontextmanager
    async def make() -> AsyncIterator[Host]:
        async with make_lab() as lab:
            one, two = await lab.host("one"), await lab.host("two")
            await lab.cable(one, "eth0", two, "eth0")
            await one.configure("eth0", "192.0.2.1/24")
            await two.configure("eth0", "192.0.2.2/24")
            yield one

    return make


async def open_on(host: Host, *peers: Peer) -> Kept:
    kept = Kept(host, OVERLAY, OWN)
    await kept.open(host, peers)
    return kept


async def test_no_route_stays_to_the_former_gateway_of_a_subnet_whose_new_one_is_refused(
    make_host: MakeHost,
) -> None:
    async with make_host() as host:
        before, after = peer(7, "192.0.2.77"), peer(7, FAR)
        kept = await open_on(host, before, peer(8, "192.0.2.78"))
        assert (await routes_of(host))["10.5.7.0/24"] == "192.0.2.77"
        async with kept.running():
            kept.install(RoutingDelta(moved=((before, after),)))
            await until(lambda: kept.backend.seen() == kept.generation)
        # Packets would go to a node that does not have the subnet any more.
        assert await routes_of(host) == {"10.5.8.0/24": "192.0.2.78"}
        (found,) = kept.backend.checks()
        assert (found.verdict, FAR in found.evidence) == (Verdict.WARN, True)


async def test_another_instance_of_the_host_keeps_its_routes(make_host: MakeHost) -> None:
    async with make_host() as host:
        blue_overlay = IPv4Network("10.6.0.0/16")
        one = await open_on(host, peer(7, "192.0.2.77"))
        blue = Kept(host, blue_overlay, parse_key("10.6.1.0-24"))
        await blue.open(host, [peer(9, "192.0.2.79", blue_overlay)])
        assert await one.backend.repair() == []
        assert await blue.backend.repair() == []
        assert await routes_of(host) == {"10.5.7.0/24": "192.0.2.77", "10.6.9.0/24": "192.0.2.79"}


async def test_our_own_change_under_way_is_no_surprise(
    make_host: MakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make_host() as host:
        kept = await open_on(host, peer(7, "192.0.2.77"))
        real = host.netlink.list_routes
        is_listing, may_go_on = asyncio.Event(), asyncio.Event()

        async def slow(**which: int) -> list[RouteEntry]:
            found: list[RouteEntry] = await real(**which)
            if not is_listing.is_set():
                is_listing.set()
                await may_go_on.wait()
            return found

        monkeypatch.setattr(host.netlink, "list_routes", slow)
        async with kept.running():
            kept.install(RoutingDelta(come=(peer(8, "192.0.2.78"),)))
            await is_listing.wait()
            # As when the kernel reports the first of many changes that we make ourselves.
            repair = asyncio.ensure_future(kept.backend.repair())
            await asyncio.sleep(0.1)
            may_go_on.set()
            assert await repair == []
        assert len(await routes_of(host)) == 2


async def test_what_was_put_back_is_named_once_and_not_by_the_thousand(make_host: MakeHost) -> None:
    async with make_host() as host:
        peers = [peer(number, f"192.0.2.{number}") for number in range(10, 60)]
        kept = await open_on(host, *peers)
        for each in peers[:3]:
            await must_do(host, f"ip route replace {each.subnet} via 192.0.2.9 dev eth0 proto 85")
        assert await kept.backend.repair() == ["route " + str(each.subnet) for each in peers[:3]]
        await must_do(host, "ip route add 10.5.200.0/24 via 192.0.2.9 dev eth0 proto 85")
        assert await kept.backend.repair() == ["no route 10.5.200.0/24"]
        await must_do(host, "ip route flush proto 85")
        put_back = await kept.backend.repair()
        assert len(put_back) == ERRORS_NAMED + 1
        assert put_back[-1] == f"{len(peers) - ERRORS_NAMED} routes more"
        assert len(await routes_of(host)) == len(peers)


async def test_routes_that_cannot_be_looked_at_are_a_finding(
    make_host: MakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make_host() as host:
        kept = await open_on(host, peer(7, "192.0.2.77"))
        assert failures(kept.backend.checks()) == []
        real = host.netlink.list_routes

        async def refuse(**_: object) -> list[object]:
            raise PlatformError("cannot list routes: no buffer space")

        monkeypatch.setattr(host.netlink, "list_routes", refuse)
        async with kept.running():
            kept.install(RoutingDelta(come=(peer(8, "192.0.2.78"),)))
            await until(lambda: failures(kept.backend.checks()))
            assert "no buffer space" in failures(kept.backend.checks())[0].evidence
            assert kept.backend.seen() < kept.generation, (
                "hop ids are not free before the routes go"
            )
            monkeypatch.setattr(host.netlink, "list_routes", real)
            await until(lambda: not failures(kept.backend.checks()))
        assert len(await routes_of(host)) == 2


async def test_a_peer_that_went_is_not_counted_as_refused(make_host: MakeHost) -> None:
    async with make_host() as host:
        far = peer(7, FAR)
        kept = await open_on(host, far)
        assert kept.backend.status().routes == 0
        kept.install(RoutingDelta(gone=(far,)))
        assert kept.backend.status().routes == 0
        assert failures(kept.backend.checks()) == []
