"""Both APIs of one etcd at once, finding out which it is, and clones: what a reviewer broke."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from tests.store.support import (
    Etcd3World,
    EtcdWorld,
    by_key,
    following,
    make_claim,
    make_node,
    run,
)
from tests.wait import until
from tundp.backend.choose import parse_network_config
from tundp.errors import ConfigNotFound, Conflict, StoreUnavailable
from tundp.lease.claim import LeaseState
from tundp.lease.identity import Identity
from tundp.store.auto import SURE_AFTER, AutoStore
from tundp.store.base import Store
from tundp.store.both import BothStore

US, THEM = "192.0.2.1", "192.0.2.9"
CONFIG = '{"Network": "10.5.0.0/16"}'


class Cut:
    """A store whose network can be cut: every call then fails, and so does one under way."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._is_cut = asyncio.Event()

    def cut(self) -> None:
        self._is_cut.set()

    def mend(self) -> None:
        self._is_cut.clear()

    def __getattr__(self, name: str) -> Any:
        inner = getattr(self._store, name)
        if name in ("api", "close", "description", "reconnect", "warnings"):
            return inner

        async def call(*arguments: Any, **options: Any) -> Any:
            task = asyncio.ensure_future(inner(*arguments, **options))
            cut = asyncio.ensure_future(self._is_cut.wait())
            await asyncio.wait([task, cut], return_when=asyncio.FIRST_COMPLETED)
            cut.cancel()
            if self._is_cut.is_set():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                raise StoreUnavailable("cut")
            return task.result()

        return call


def value(public_ip: str) -> str:
    return f'{{"PublicIP":"{public_ip}"}}'


def test_one_api_away_neither_hides_peers_nor_costs_the_lease(
    etcd_world: EtcdWorld, etcd3_world: Etcd3World
) -> None:
    async def main() -> None:
        v2 = Cut(etcd_world.open())
        both = BothStore(v2, etcd3_world.open(), parse=parse_network_config)
        node = make_node(both, US, lease_ttl_s=4)
        async with node.up() as lease:
            key = str(lease.key)
            etcd_world.put("10.5.250.0-24", value(THEM))
            await until(lambda: "10.5.250.0-24" in node.known())
            v2.cut()
            etcd3_world.put("10.5.251.0-24", value(THEM))
            await until(lambda: "10.5.251.0-24" in node.known())
            # What v2 said last still counts.
            assert "10.5.250.0-24" in node.known()
            await until(lambda: etcd_world.read(key) is None)  # expired there
            found = etcd3_world.read(key)
            assert found is not None, "and here, too"
            v2.mend()
            await until(lambda: etcd_world.read(key) is not None)
            await until(lambda: node.claim.state is LeaseState.HELD)

    run(main())


def test_two_owners_of_one_subnet_are_a_conflict_and_neither_is_written_over(
    etcd_world: EtcdWorld, etcd3_world: Etcd3World
) -> None:
    async def main() -> None:
        both = BothStore(etcd_world.open(), etcd3_world.open(), parse=parse_network_config)
        node = make_node(both, US, lease_ttl_s=4)
        async with node.up() as lease:
            key = str(lease.key)
            etcd_world.put(key, value(THEM))
            await until(lambda: node.claim.state is LeaseState.CONFLICT)
            # Seen as it is, and not because our own half has expired meanwhile.
            assert etcd3_world.read(key) is not None
            seen = next(one for one in (await both.snapshot()).leases if one.key == lease.key)
            with pytest.raises(Conflict, match=f"{THEM} in etcd v2"):
                await both.update(seen.key, lease.attributes, 4, revision=seen.revision)
            await asyncio.sleep(3)  # a renewal would be due by now
            found = etcd_world.read(key)
            assert found is not None
            assert found[0]["PublicIP"] == THEM

    run(main())


def test_clones_do_not_write_against_each_other(
    etcd3_world: Etcd3World, caplog: pytest.LogCaptureFixture
) -> None:
    """Same node id, same PublicIP: each sees the other's writes as its own, of unknown TTL."""

    async def main() -> None:
        same = Identity("7c1f", "clone")
        async with (
            make_node(etcd3_world.open(), US, identity=same).up() as one,
            make_node(etcd3_world.open(), US, identity=same).up() as two,
        ):
            assert one.key == two.key
            before = (await etcd3_world.open().snapshot()).revision
            await asyncio.sleep(1)
            after = (await etcd3_world.open().snapshot()).revision
            assert after - before < 5
        doubles = [r for r in caplog.records if "was written by somebody else" in r.getMessage()]
        assert 1 <= len(doubles) <= 2
        assert all(record.levelno == logging.WARNING for record in doubles)

    run(main())


def test_a_live_node_with_our_address_under_another_key_is_asked(
    etcd3_world: Etcd3World,
) -> None:
    """We have a lease from before; somebody else has the address we are given now."""

    async def main() -> None:
        first = make_node(etcd3_world.open(), US, identity=Identity("aaaa", "one"))
        second = make_claim(etcd3_world.open(), THEM, identity=Identity("bbbb", "two"))
        await second.acquire()
        async with first.up():
            again = make_claim(etcd3_world.open(), US, identity=Identity("bbbb", "two"))
            with pytest.raises(Exception, match=r"belongs to node aaaa \(host one\)"):
                await again.acquire()
            async with following(etcd3_world.open()) as follower:
                assert sorted(follower.known().values()) == [US, THEM]

    run(main())


def test_subnet_of_two_nodes_is_a_warning_while_it_is_so(
    etcd_world: EtcdWorld, etcd3_world: Etcd3World, caplog: pytest.LogCaptureFixture
) -> None:
    key = "10.5.1.0-24"
    etcd_world.put(key, value(THEM))
    etcd3_world.put(key, value(US))

    async def main() -> None:
        store = BothStore(etcd_world.open(), etcd3_world.open(), parse=parse_network_config)
        for _ in range(2):
            await store.snapshot()
            (warning,) = store.warnings
            assert warning.id == "contested"
            assert warning.evidence == (
                f"subnet 10.5.1.0/24 is leased to {THEM} in etcd v2 and to {US} in v3"
            )
        assert sum("is leased to" in message for message in caplog.messages) == 1
        etcd3_world.remove(key)
        await store.snapshot()
        assert store.warnings == ()
        await store.close()

    run(main())


def test_auto_waits_for_v3_before_it_settles_for_v2(
    etcd_world: EtcdWorld, etcd3_world: Etcd3World
) -> None:
    etcd_world.set_config(CONFIG)
    etcd3_world.set_config(CONFIG)

    async def main() -> None:
        v3 = Cut(etcd3_world.open())
        v3.cut()
        auto = AutoStore(etcd_world.open(), v3)
        with pytest.raises(StoreUnavailable):
            await auto.network_config()
        v3.mend()
        assert await auto.network_config() == CONFIG
        assert auto.api == "v3"
        assert [warning.id for warning in auto.warnings] == ["two-configs"]
        await auto.close()

    run(main())


def test_auto_settles_for_v2_where_v3_never_answers(
    etcd_world: EtcdWorld, etcd3_world: Etcd3World
) -> None:
    etcd_world.set_config(CONFIG)

    async def main() -> None:
        v3 = Cut(etcd3_world.open())
        v3.cut()
        auto = AutoStore(etcd_world.open(), v3)
        for _ in range(SURE_AFTER - 1):
            with pytest.raises(StoreUnavailable):
                await auto.network_config()
        assert await auto.network_config() == CONFIG
        assert auto.api == "v2"
        await auto.close()

    run(main())


def test_auto_store_without_a_config_finds_the_api_with_the_leases(etcd3_world: Etcd3World) -> None:
    """A start from memory asks for leases without having asked for the config."""
    etcd3_world.set_config(CONFIG)
    etcd3_world.put("10.5.1.0-24", value(THEM))

    class Empty(Cut):
        async def network_config(self) -> str:
            raise ConfigNotFound("nothing")

    async def main() -> None:
        auto = AutoStore(Empty(etcd3_world.open()), etcd3_world.open())
        await auto.choose_api("rubbish")
        assert by_key((await auto.snapshot()).leases) == {"10.5.1.0-24": THEM}
        assert auto.api == "v3"
        await auto.close()

    run(main())


@pytest.mark.parametrize("first", ["v2", "v3"])
def test_our_lease_deleted_in_one_api_is_called_that(
    etcd_world: EtcdWorld,
    etcd3_world: Etcd3World,
    caplog: pytest.LogCaptureFixture,
    first: str,
) -> None:
    async def main() -> None:
        both = BothStore(etcd_world.open(), etcd3_world.open(), parse=parse_network_config)
        node = make_node(both, US, identity=Identity("7c1f", "kube1", run="5e01"))
        worlds: dict[str, EtcdWorld | Etcd3World] = {"v2": etcd_world, "v3": etcd3_world}
        async with node.up() as lease:
            key = str(lease.key)
            for api in (first, "v3" if first == "v2" else "v2"):
                worlds[api].remove(key)
                await until(lambda api=api: worlds[api].read(key) is not None)
                what = f"lease {key} was deleted in etcd {api} at"
                await until(lambda what=what: what in caplog.text)
                await until(lambda: node.claim.state is LeaseState.HELD)
        assert "written by somebody else" not in caplog.text

    run(main())


@pytest.mark.parametrize(
    ("in_v2", "in_v3", "taken", "breaks"),
    [
        (US, None, "v2", "our live lease is in v2"),
        (US, US, "v3", "in both: nothing is lost in v3"),
        (None, US, "v3", "in v3"),
        (None, None, "v3", "a new node"),
        (THEM, None, "v3", "another node's"),
    ],
)
def test_with_two_configs_auto_takes_the_api_that_has_our_lease(
    etcd_world: EtcdWorld,
    etcd3_world: Etcd3World,
    in_v2: str | None,
    in_v3: str | None,
    taken: str,
    breaks: str,
) -> None:
    for world, ip in ((etcd_world, in_v2), (etcd3_world, in_v3)):
        world.set_config(CONFIG)
        if ip is not None:
            world.put("10.5.7.0-24", value(ip))

    async def main() -> None:
        store = AutoStore(
            etcd_world.open(),
            etcd3_world.open(),
            is_ours=lambda lease: str(lease.attributes.public_ip) == US,
        )
        assert await store.network_config() == CONFIG
        assert store.api == taken, breaks
        (warning,) = store.warnings
        assert f"{taken} counts" in warning.evidence
        await store.close()

    run(main())


def test_warnings_about_subnets_of_two_nodes_are_counted_beyond_a_few(
    etcd_world: EtcdWorld, etcd3_world: Etcd3World, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever writes to the store must not decide how long readyz and status are."""
    for number in range(30):
        etcd_world.put(f"10.5.{number}.0-24", value(THEM))
        etcd3_world.put(f"10.5.{number}.0-24", value(US))

    async def main() -> None:
        store = BothStore(etcd_world.open(), etcd3_world.open(), parse=parse_network_config)
        await store.snapshot()
        assert len(store.warnings) == 11
        assert store.warnings[-1].evidence == "and 20 more subnets"
        await store.close()

    run(main())
