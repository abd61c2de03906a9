"""The subnet manager over real stores: network config, lease cache, outages, wiped data, offers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from tests.store.support import (
    NETWORK,
    Etcd3World,
    EtcdWorld,
    FileWorld,
    World,
    attributes,
    background,
    forwarder,
    make_node,
    outcome,
    run,
)
from tests.wait import steadily, until
from tundp.backend.choose import parse_network_config
from tundp.instance import Instance
from tundp.lab.etcd import PrivateEtcd
from tundp.lease.claim import LeaseState
from tundp.lease.identity import Identity
from tundp.lease.network import NetworkConfig
from tundp.lease.routing import Routing
from tundp.store.auto import AutoStore
from tundp.store.base import Store
from tundp.subnet import manager as manager_module
from tundp.subnet.base import Acquired
from tundp.subnet.lease_cache import LeaseCache
from tundp.subnet.manager import CacheSettings, LeaseSettings, StoreSubnetManager

CONFIG = '{"Network": "10.5.0.0/16"}'
OURS = IPv4Address("192.0.2.1")
IDENTITY = Identity("7c1f000000000001", "one")
OTHER = '{"PublicIP":"192.0.2.2","PublicIPv6":null}'
STORE_NAME = "the store of this test"
HOUR_S = 3600.0


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the manager waits for of its own accord, in fractions of a second."""
    monkeypatch.setattr(manager_module, "STALE_AFTER_S", 0.3)
    monkeypatch.setattr(manager_module, "SAVE_PAUSE_S", 0.05)


class Told:
    """Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.failures: list[str] = []
        self._why: Callable[[], str] = str

    @property
    def why(self) -> str:
        return self._why()

    def waits_for(self, what: str, why: Callable[[], str] | None = None) -> None:
        self.waits.append(what)
        self._why = why or str

    def waiting_failed(self, why: str) -> None:
        self.failures.append(why)


SPOILT = "half a docu"


class Way:
    """A way to a world's store that can be closed, so that the store does not answer."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.open: Callable[[], Store] = world.open
        self.close: Callable[[], Any] = self._spoil
        self.reopen: Callable[[], Any] = self._mend
        self.text = ""

    async def _spoil(self) -> None:
        assert isinstance(self.world, FileWorld)
        # Again and again: a write that a store began before may come after this.
        while (text := self.world.path.read_text()) != SPOILT:
            self.text = text
            self.world.path.write_text(SPOILT)
            await asyncio.sleep(0.3)

    async def _mend(self) -> None:
        assert isinstance(self.world, FileWorld)
        mended = self.world.path.with_suffix(".mended")
        mended.write_text(self.text)
        mended.replace(self.world.path)


@contextlib.asynccontextmanager
async def way_to(world: World) -> AsyncIterator[Way]:
    way = Way(world)
    if isinstance(world, FileWorld):
        yield way
        return
    assert isinstance(world, EtcdWorld | Etcd3World)
    async with forwarder(world.url) as proxy:
        way.open = lambda: world.open_at(proxy.url)
        way.close, way.reopen = proxy.cut, proxy.mend
        yield way


@pytest.fixture
def cache(tmp_path: Path) -> LeaseCache:
    return LeaseCache(tmp_path / "state", Instance())


def manager_of(
    store: Store,
    cache: LeaseCache | None,
    *,
    identity: Identity = IDENTITY,
    store_name: str = STORE_NAME,
    is_start_allowed: bool = True,
) -> StoreSubnetManager:
    return StoreSubnetManager(
        store,
        parse=parse_network_config,
        identity=identity,
        lease=LeaseSettings(lease_ttl_s=600, margin_s=60, retry_s=0.5),
        rng=random.Random(),
        cache=None
        if cache is None
        else CacheSettings(cache=cache, store_name=store_name, is_start_allowed=is_start_allowed),
    )


class Kept:
    """A manager that has acquired a lease, and the ledger it feeds, as daemon/node.py runs them."""

    def __init__(self, manager: StoreSubnetManager, acquired: Acquired) -> None:
        self.manager = manager
        self.acquired = acquired
        self.key = str(acquired.lease.key)
        self.routing = Routing(
            network=NETWORK.network,
            backend=NETWORK.backend,
            own_key=acquired.lease.key,
            own_addresses=[OURS],
            public_ip=OURS,
        )
        self.manager.observe(self.routing.apply(acquired.snapshot), self.routing)
        self.seen: list[set[str]] = []
        """The keys in the ledger after each update."""

    @classmethod
    async def acquire(
        cls,
        manager: StoreSubnetManager,
        network_config: NetworkConfig = NETWORK,
    ) -> Kept:
        acquired = await manager.acquire(
            network_config, attributes(str(OURS)), previous=None, progress=Told()
        )
        return cls(manager, acquired)

    @property
    def keys(self) -> set[str]:
        return {str(key) for key in self.routing.leases}

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.manager.keep())
            group.create_task(self.manager.keep_cache())
            group.create_task(self._follow())

    async def _follow(self) -> None:
        async for update in self.manager.updates():
            self.manager.observe(self.routing.apply(update), self.routing)
            self.seen.append(self.keys)


def cached_leases(cache: LeaseCache) -> set[str]:
    """The keys on disk; empty if there is no cache yet."""
    assert cache.lease_file is not None
    if not cache.lease_file.exists():
        return set()
    return set(json.loads(cache.lease_file.read_text())["leases"])


async def cached_run(way: Way, cache: LeaseCache) -> Kept:
    """A whole life of a node: its lease and the others' are in the cache after it."""
    manager = manager_of(way.open(), cache)
    kept = await Kept.acquire(manager, await manager.network_config(Told()))
    async with background(kept.run()):
        await until(lambda: cached_leases(cache) == kept.keys)
    await manager.close()
    return kept


# The network config


def test_the_network_config_is_waited_for_and_what_is_wrong_is_told(world: World) -> None:
    async def main() -> None:
        told = Told()
        manager = manager_of(world.open(), None)
        async with background(manager.network_config(told)) as task:
            await until(lambda: told.failures)
            assert told.waits == ["the network config"]
            world.set_config('{"Network": "10.5.0.0"}')
            await until(lambda: any("not a CIDR" in why for why in told.failures))
            assert not task.done()
            world.set_config(CONFIG)
            assert (await task).network == NETWORK.network

    run(main())


def test_the_network_config_of_a_store_that_is_away_comes_with_the_store(
    world: World, cache: LeaseCache
) -> None:
    """Without a usable cache there is nothing else to go on with."""

    async def main() -> None:
        world.set_config(CONFIG)
        async with way_to(world) as way:
            await cached_run(way, cache)
            await way.close()
            managers = [
                manager_of(way.open(), None),
                # Whoever is to exit when its lease is lost does not start with a lost one.
                manager_of(way.open(), cache, is_start_allowed=False),
                manager_of(way.open(), cache, store_name="another store"),
                manager_of(way.open(), cache, identity=Identity("7c1f000000000002", "clone")),
            ]
            tasks = [asyncio.ensure_future(each.network_config(Told())) for each in managers]
            await steadily(lambda: not any(task.done() for task in tasks), for_s=1.5)
            await way.reopen()
            for config in await asyncio.gather(*tasks):
                assert config.network == NETWORK.network

    run(main())


# The lease cache


def test_a_start_without_the_store_serves_the_cached_leases(
    world: World, cache: LeaseCache
) -> None:
    async def main() -> None:
        world.set_config(CONFIG)
        world.put("10.5.77.0-24", OTHER)
        async with way_to(world) as way:
            first = await cached_run(way, cache)
            await way.close()
            told = Told()
            manager = manager_of(way.open(), cache)
            kept = await Kept.acquire(manager, await manager.network_config(told))
            assert told.failures
            assert kept.key == first.key
            assert kept.keys == {first.key, "10.5.77.0-24"}
            assert kept.acquired.cache_age_s is not None
            assert "10.5.77.0/24" in {str(subnet) for subnet in kept.routing.peers}
            state = manager.state()
            assert (state.state, state.is_answering, state.is_synced) == (
                LeaseState.LOST,
                False,
                False,
            )
            assert state.age_s is not None
            assert state.synced_at is not None
            assert state.synced_at <= time.time()
            async with background(kept.run()):
                await steadily(lambda: manager.state().state is LeaseState.LOST, for_s=0.5)
                assert kept.keys == {first.key, "10.5.77.0-24"}
                await way.reopen()
                await until(lambda: manager.state().state is LeaseState.HELD)
                await until(lambda: manager.state().is_answering)
                # etcd v3 does not tell it with the leases: the renewal due at once does.
                await until(lambda: manager.state().expires_in_s is not None)
            state = manager.state()
            assert (state.is_synced, state.age_s) == (True, 0)

    run(main())


def test_cached_leases_are_no_news_of_our_own(file_world: FileWorld, cache: LeaseCache) -> None:
    """Whose our subnet was when it was cached: only the store can tell whose it is now."""

    async def main() -> None:
        file_world.set_config(CONFIG)
        async with way_to(file_world) as way:
            first = await cached_run(way, cache)
            assert cache.lease_file is not None
            document = json.loads(cache.lease_file.read_text())
            document["leases"][first.key] = OTHER[:-1] + ',"TundpNode":"7c1f0000000000ff"}'
            cache.lease_file.write_text(json.dumps(document))
            await way.close()
            manager = manager_of(way.open(), cache)
            kept = await Kept.acquire(manager, await manager.network_config(Told()))
            assert manager.state().state is LeaseState.LOST
            assert manager.state().conflict == ""
            async with background(kept.run()):
                await way.reopen()
                await until(lambda: manager.state().state is LeaseState.HELD)

    run(main())


def test_a_changed_network_config_is_named_when_the_store_is_back(
    file_world: FileWorld, cache: LeaseCache, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        file_world.set_config(CONFIG)
        async with way_to(file_world) as way:
            await cached_run(way, cache)
            await way.close()
            manager = manager_of(way.open(), cache)
            kept = await Kept.acquire(manager, await manager.network_config(Told()))
            async with background(kept.run()):
                await way.reopen()
                await until(lambda: manager.state().is_answering)
                assert "restart it" not in caplog.text
            await way.close()
            manager = manager_of(way.open(), cache)
            kept = await Kept.acquire(manager, await manager.network_config(Told()))
            async with background(kept.run()):
                way.text = way.text.replace("10.5.0.0/16", "10.6.0.0/16")
                await way.reopen()
                await until(lambda: "is not the one this node started with" in caplog.text)

    run(main())


@pytest.mark.parametrize("api", ["v2", "v3"])
def test_a_start_without_the_store_uses_the_api_of_before(
    etcd_url: str, cache: LeaseCache, api: str
) -> None:
    """Asking which API has the network config takes a store that answers."""

    async def main() -> None:
        async with forwarder(etcd_url) as proxy:
            v2 = EtcdWorld(etcd_url)
            v3 = Etcd3World(etcd_url, v2.prefix)
            with contextlib.closing(v2.raw), contextlib.closing(v3.raw):
                (v2 if api == "v2" else v3).set_config(CONFIG)

                def auto() -> AutoStore:
                    return AutoStore(v2.open_at(proxy.url), v3.open_at(proxy.url))

                way = Way(v3)
                way.open = auto
                await cached_run(way, cache)
                await proxy.cut()
                store = auto()
                manager = manager_of(store, cache)
                kept = await Kept.acquire(manager, await manager.network_config(Told()))
                assert store.api == api
                async with background(kept.run()):
                    await proxy.mend()
                    await until(lambda: manager.state().state is LeaseState.HELD)

    run(main())


def test_the_cache_follows_the_leases_and_is_saved_on_close(
    world: World, cache: LeaseCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        world.set_config(CONFIG)
        manager = manager_of(world.open(), cache)
        kept = await Kept.acquire(manager, await manager.network_config(Told()))
        async with background(kept.run()):
            await until(lambda: cached_leases(cache) == {kept.key})
            world.put("10.5.77.0-24", OTHER)
            await until(lambda: cached_leases(cache) == {kept.key, "10.5.77.0-24"})
        await manager.close()
        monkeypatch.setattr(manager_module, "SAVE_PAUSE_S", HOUR_S)
        manager = manager_of(world.open(), cache)
        kept = await Kept.acquire(manager, await manager.network_config(Told()))
        age_cache(cache)
        async with background(kept.run()):
            await until(lambda: not is_aged(cache))
            # From here on nothing is written for an hour.
            world.put("10.5.79.0-24", OTHER.replace("2.2", "2.4"))
            await until(lambda: "10.5.79.0-24" in kept.keys)
        assert "10.5.79.0-24" not in cached_leases(cache)
        await manager.close()
        assert "10.5.79.0-24" in cached_leases(cache)

    run(main())


def age_cache(cache: LeaseCache) -> None:
    assert cache.lease_file is not None
    os.utime(cache.lease_file, (1e9, 1e9))


def is_aged(cache: LeaseCache) -> bool:
    assert cache.lease_file is not None
    return cache.lease_file.stat().st_mtime == 1e9


def test_the_cache_is_confirmed_while_the_store_answers_and_only_then(
    world: World, cache: LeaseCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        world.set_config(CONFIG)
        monkeypatch.setattr(manager_module, "CONFIRM_S", 0.05)
        async with way_to(world) as way:
            manager = manager_of(way.open(), cache)
            kept = await Kept.acquire(manager, await manager.network_config(Told()))
            async with background(kept.run()):
                await until(lambda: cached_leases(cache) == kept.keys)
                age_cache(cache)
                await until(lambda: not is_aged(cache))
                await way.close()
                await until(lambda: not manager.state().is_answering)
                await asyncio.sleep(0.2)  # one confirmation may be under way
                age_cache(cache)
                await steadily(lambda: is_aged(cache), for_s=0.5)

    run(main())


@pytest.mark.usefixtures("endless_waits")
def test_cached_leases_are_not_confirmed_by_a_store_that_hangs(
    etcd3_world: Etcd3World, cache: LeaseCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing has failed yet, and nothing was heard either."""

    async def main() -> None:
        etcd3_world.set_config(CONFIG)
        monkeypatch.setattr(manager_module, "CONFIRM_S", 0.05)
        async with forwarder(etcd3_world.url) as proxy:
            way = Way(etcd3_world)
            way.open = lambda: etcd3_world.open_at(proxy.url)
            await cached_run(way, cache)
            proxy.hang()
            manager = manager_of(way.open(), cache)
            kept = await Kept.acquire(manager, await manager.network_config(Told()))
            async with background(kept.run()):
                await asyncio.sleep(0.2)
                age_cache(cache)
                await steadily(lambda: is_aged(cache), for_s=1)
                assert not manager.state().is_answering

    run(main())


# A store that lost its data, or does not answer for a while


def test_a_wiped_store_gets_our_lease_at_once_and_peers_time_to_come_back(
    file_world: FileWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager_module, "WIPED_S", 2.0)
    back, gone = "10.5.77.0-24", "10.5.78.0-24"

    async def main() -> None:
        file_world.set_config(CONFIG)
        for key in (back, gone):
            file_world.put(key, OTHER)
        manager = manager_of(file_world.open(), None)
        kept = await Kept.acquire(manager)
        async with background(kept.run()):
            await until(lambda: kept.seen)
            assert kept.keys == {kept.key, back, gone}
            file_world.path.write_text(json.dumps({"config": json.loads(CONFIG)}))
            await until(lambda: file_world.read(kept.key))
            assert kept.keys == {kept.key, back, gone}, "known peers stay meanwhile"
            file_world.put(back, OTHER)
            await until(lambda: kept.keys == {kept.key, back})
            assert all(back in keys for keys in kept.seen)
            assert manager.state().state is LeaseState.HELD

    run(main())


def test_a_wiped_etcd_gets_our_lease_at_once(
    start_etcd: Callable[..., PrivateEtcd], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager_module, "WIPED_S", 5.0)
    other = "10.5.77.0-24"
    etcd = start_etcd()

    async def main() -> None:
        world = Etcd3World(etcd.url, "/coreos.com/network")
        with contextlib.closing(world.raw):
            world.set_config(CONFIG)
            world.put(other, OTHER)
            manager = manager_of(world.open(), None)
            kept = await Kept.acquire(manager)
            async with background(kept.run()):
                await until(lambda: kept.seen)
                await etcd.stop()
                etcd.wipe()
                await etcd.start()
                await until(lambda: world.read(kept.key))
                assert other in kept.keys
                world.put(other, OTHER)
                count = len(kept.seen)
                await until(lambda: len(kept.seen) > count)
                assert all(other in keys for keys in kept.seen)

    run(main())


def test_updates_go_on_after_every_error(world: World) -> None:
    async def main() -> None:
        world.set_config(CONFIG)
        async with way_to(world) as way:
            manager = manager_of(way.open(), None)
            kept = await Kept.acquire(manager)
            async with background(kept.run()) as task:
                for number in (77, 78):
                    await until(lambda: manager.state().is_answering)
                    await way.close()
                    await until(lambda: not manager.state().is_answering)
                    state = manager.state()
                    assert state.is_synced
                    assert state.age_s is not None
                    await way.reopen()
                    world.put(f"10.5.{number}.0-24", OTHER)
                    await until(lambda number=number: f"10.5.{number}.0-24" in kept.keys)
                    assert not task.done()

    run(main())


# Our lease


def test_an_offer_changes_what_our_lease_says(world: World) -> None:
    async def main() -> None:
        node = make_node(world.open(), str(OURS), identity=IDENTITY)
        async with node.up() as lease:
            offer = replace(node.offer, public_ip=IPv4Address("192.0.2.9"), backend_type="host-gw")
            node.manager.offer(offer)

            def said() -> tuple[str, str]:
                found = world.read(str(lease.key))
                assert found is not None
                return found[0]["PublicIP"], found[0].get("BackendType", "")

            await until(lambda: said() == ("192.0.2.9", "host-gw"))
            await until(lambda: node.manager.state().state is LeaseState.HELD)
            assert node.manager.state().key == lease.key

    run(main())


def test_what_acquire_waits_for_is_told(world: World) -> None:
    """A node that is no more has our PublicIP, and is asked whether it is alive."""
    dead = OTHER.replace("192.0.2.2", str(OURS))[:-1] + ',"TundpNode":"7c1f0000000000ff"}'

    async def main() -> None:
        world.put("10.5.77.0-24", dead)
        told = Told()
        manager = manager_of(world.open(), None)
        offer = attributes(str(OURS))
        acquiring = manager.acquire(NETWORK, offer, previous=None, progress=told)
        async with background(outcome(acquiring)):
            await until(lambda: "an answer of node" in told.why)
            assert told.waits == ["a lease"]
            assert "7c1f0000000000ff" in told.why

    run(main())


def test_acquire_tells_that_the_store_does_not_answer_and_then_goes_on(world: World) -> None:
    async def main() -> None:
        world.set_config(CONFIG)
        async with way_to(world) as way:
            told = Told()
            manager = manager_of(way.open(), None)
            await manager.network_config(told)
            await way.close()
            offer = attributes(str(OURS))
            acquiring = manager.acquire(NETWORK, offer, previous=None, progress=told)
            async with background(acquiring) as task:
                await until(lambda: told.why)
                assert not task.done()
                await way.reopen()
                acquired = await task
                assert acquired.cache_age_s is None
                assert acquired.lease in acquired.snapshot.leases
                assert told.why == ""

    run(main())
