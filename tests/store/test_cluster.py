"""Three etcd members, and what the loss of one or two of them does to claims and followers.

Where a test mostly waits for elections, both APIs go through it at the same time.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import signal
import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from tests.lease_plane import LeasePlane
from tests.stopped import stop
from tests.store.support import (
    FREQUENT_PINGS,
    ONE_SUBNET,
    Etcd3World,
    EtcdWorld,
    Follower,
    InStep,
    acquired,
    attributes,
    by_key,
    everywhere,
    following,
    lease_key,
    make_claim,
    make_node,
    outcome,
    run,
)
from tests.wait import until
from tundp.errors import Conflict, OutOfSubnets, StoreUnavailable
from tundp.lab.etcd import PrivateCluster, PrivateEtcd
from tundp.lease.claim import LeaseState
from tundp.lease.model import Lease
from tundp.store.base import Store

A, B = lease_key("10.5.1.0-24"), lease_key("10.5.2.0-24")
ONE, TWO = attributes("192.0.2.1"), attributes("192.0.2.2")


class ClusterWorld:
    """A prefix in the cluster, by way of whichever members run."""

    def __init__(self, cluster: PrivateCluster, api: type[EtcdWorld | Etcd3World]) -> None:
        prefix = f"/test-{uuid.uuid4().hex[:12]}/network"
        self._cluster = cluster
        self._at = {member: api(member.url, prefix) for member in cluster.members}

    def close(self) -> None:
        for world in self._at.values():
            world.close()

    def at(self, member: PrivateEtcd) -> EtcdWorld | Etcd3World:
        return self._at[member]

    def another_at(self, member: PrivateEtcd) -> EtcdWorld | Etcd3World:
        """The same place once more, with a connection of its own."""
        world = self._at[member]
        return type(world)(world.url, world.prefix)

    def open(self, first: int = 0) -> Store:
        """A store that knows all members, and starts with the one of this number."""
        urls = self._cluster.urls
        first %= len(urls)
        return self._at[self._cluster.members[0]].open_at(*urls[first:], *urls[:first])

    async def put(self, name: str, text: str, **options: Any) -> None:
        """Write through a member that runs, again and again while there is no leader."""
        await self._insist("put", name, text, **options)

    async def remove(self, name: str) -> None:
        await self._insist("remove", name)

    async def read(self, name: str) -> Any:
        return await self._insist("read", name)

    async def _insist(self, method: str, *arguments: Any, **options: Any) -> Any:
        async def answer() -> tuple[Any, ...]:
            """In a tuple, which is true whatever is in it."""
            for member, world in self._at.items():
                if not member.is_running:
                    continue
                # On a thread: the stores under test must not wait for us.
                with contextlib.suppress(OSError, AssertionError, KeyError, ValueError):
                    return (await asyncio.to_thread(getattr(world, method), *arguments, **options),)
                world.raw.close()
            return ()

        (found,) = await until(answer, f"a member of the cluster that can {method} {arguments}")
        return found


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[PrivateCluster]:
    # What is not on disk yet survives the kill of a process, and no test pulls the plug.
    cluster = PrivateCluster(extra=("--unsafe-no-fsync", FREQUENT_PINGS))
    try:
        asyncio.run(cluster.start())
        yield cluster
    finally:
        _wake(cluster)
        asyncio.run(cluster.close())


@pytest.fixture
def cluster(running_cluster: PrivateCluster) -> Iterator[PrivateCluster]:
    """Three members that run, before the test and after it."""
    try:
        yield running_cluster
    finally:
        _wake(running_cluster)
        asyncio.run(running_cluster.start())


def _wake(cluster: PrivateCluster) -> None:
    for member in cluster.members:
        if member.is_running:
            os.kill(member.pid, signal.SIGCONT)


@pytest.fixture
def worlds(cluster: PrivateCluster) -> Iterator[dict[str, ClusterWorld]]:
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(contextlib.closing(ClusterWorld(cluster, api)))
            for name, api in (("v2", EtcdWorld), ("v3", Etcd3World))
        }


def value(public_ip: str) -> str:
    return f'{{"PublicIP":"{public_ip}"}}'


def test_killed_members_cost_no_lease_and_no_event(
    cluster: PrivateCluster, worlds: dict[str, ClusterWorld], caplog: pytest.LogCaptureFixture
) -> None:
    """The leader, then another one: claims renew and watches run all the while."""

    async def write_and_renew(world: ClusterWorld, nodes: list[LeasePlane], number: int) -> None:
        revisions = [node.claim.lease.revision for node in nodes]
        # Beyond the first hundred free subnets: no node has drawn them.
        changed, added = f"10.5.{200 + number}.0-24", f"10.5.{210 + number}.0-24"
        for step in range(5):
            await world.put(changed, value(f"198.51.100.{step}"))
        await world.put(added, value("198.51.100.9"))
        for node, revision in zip(nodes, revisions, strict=True):
            await until(
                lambda node=node: (
                    node.known().get(changed) == "198.51.100.4" and added in node.known()
                )
            )
            await until(lambda node=node, revision=revision: node.claim.lease.revision > revision)

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            nodes: dict[str, list[LeasePlane]] = {}
            owners: dict[str, dict[str, str]] = {}
            for name, world in worlds.items():
                nodes[name] = [
                    make_node(
                        world.open(number), f"192.0.2.{number + 1}", lease_ttl_s=4, retry_s=0.3
                    )
                    for number in range(3)
                ]
                for node in nodes[name]:
                    await stack.enter_async_context(node.up())
                owners[name] = {
                    node.key: f"192.0.2.{number + 1}" for number, node in enumerate(nodes[name])
                }
                assert len(owners[name]) == 3
            leader = await cluster.leader()
            other = next(member for member in cluster.members if member is not leader)
            for number, victim in enumerate((leader, other), 1):
                await victim.stop(signal.SIGKILL)
                await cluster.leader()
                await asyncio.gather(
                    *(write_and_renew(world, nodes[name], number) for name, world in worlds.items())
                )
                await cluster.start()
            for name, world in worlds.items():
                for node in nodes[name]:
                    assert node.claim.state is LeaseState.HELD
                    assert owners[name].items() <= node.known().items()
                    seen = [update.revision for update in node.updates]
                    assert seen == sorted(seen)
                snapshot = by_key((await world.open().snapshot()).leases)
                assert owners[name].items() <= snapshot.items()
                assert len(snapshot) == 3 + 4
        assert "CONFLICT" not in caplog.text
        assert " lost: " not in caplog.text

    run(main())


def test_without_a_majority_nothing_old_is_told(
    cluster: PrivateCluster, worlds: dict[str, ClusterWorld], short_timeouts: None
) -> None:
    """One member of three has a copy, and would answer; known peers stay, and nothing else."""

    async def main() -> None:
        survivor = cluster.members[0]

        async def without_majority(world: ClusterWorld) -> None:
            local = world.at(survivor)
            # It does have a copy, for those who ask for no more.
            assert await asyncio.to_thread(answers_from_its_copy, local)
            reads_and_writes: list[Callable[[Store], Awaitable[object]]] = [
                lambda store: store.snapshot(),
                lambda store: store.network_config(),
                lambda store: store.create(B, TWO, 600),
            ]
            calls = [
                call(opened()) for opened in (world.open, local.open) for call in reads_and_writes
            ]
            for result in await asyncio.gather(*map(outcome, calls)):
                assert isinstance(result, StoreUnavailable), repr(result)
                assert survivor.url in str(result)

        async with contextlib.AsyncExitStack() as stack:
            followers = {}
            for name, world in worlds.items():
                await asyncio.to_thread(world.at(survivor).set_config, '{"Network": "10.5.0.0/16"}')
                await world.put(str(A), value("192.0.2.1"))
                followers[name] = await stack.enter_async_context(following(world.open()))
                assert followers[name].known() == {str(A): "192.0.2.1"}
            # Its watch is cut off from the leader, not from us: it must say so.
            pinned = await stack.enter_async_context(following(worlds["v3"].at(survivor).open()))
            for member in cluster.members[1:]:
                await member.stop(signal.SIGKILL)
            await everywhere(worlds, without_majority)
            await until(lambda: pinned.outage.is_on)
            for follower in (*followers.values(), pinned):
                assert follower.known() == {str(A): "192.0.2.1"}
            await cluster.start()
            for name, world in worlds.items():
                # One of the creates may have been done late.
                await world.put(str(B), value("192.0.2.3"))
                await until(lambda name=name: followers[name].known().get(str(B)) == "192.0.2.3")
                assert followers[name].known()[str(A)] == "192.0.2.1"
                # On a busy machine the leader may go once more, just after it came.
                store = world.open()
                await until(lambda store=store: is_answering(store))
                assert str(A) in by_key((await store.snapshot()).leases)
            await until(lambda: pinned.known().get(str(B)) == "192.0.2.3")
            assert not pinned.outage.is_on

    run(main())


def answers_from_its_copy(world: EtcdWorld | Etcd3World) -> bool:
    """Whether a read that asks for no quorum is answered."""
    if isinstance(world, EtcdWorld):
        return "node" in world.raw.get(world.path(str(A)))
    key = base64.b64encode(world.path(str(A)).encode()).decode()
    return bool(world.raw.call("kv/range", key=key, serializable=True).get("kvs"))


def test_leader_back_from_suspend_tells_nothing_old(
    cluster: PrivateCluster, worlds: dict[str, ClusterWorld], short_timeouts: None
) -> None:
    """It still believes that it leads; a read from its own copy would miss what came since."""

    async def main() -> None:
        leader = await cluster.leader()
        stores = {name: world.at(leader).open() for name, world in worlds.items()}
        for name, world in worlds.items():
            await world.put(str(A), value("192.0.2.1"))
            assert by_key((await stores[name].snapshot()).leases) == {str(A): "192.0.2.1"}
        others = [member for member in cluster.members if member is not leader]
        stop(leader.pid)
        await cluster.leader(others)
        for world in worlds.values():
            await asyncio.to_thread(world.at(others[0]).put, str(A), value("192.0.2.2"))
        os.kill(leader.pid, signal.SIGCONT)

        async def look(name: str) -> None:
            for _ in range(10):
                result = await outcome(stores[name].snapshot())
                if isinstance(result, StoreUnavailable):
                    continue
                assert by_key(result.leases) == {str(A): "192.0.2.2"}

        await asyncio.gather(*map(look, stores))
        for store in stores.values():
            await until(lambda store=store: is_answering(store))

    run(main())


def test_hung_leader_is_left_by_claims_and_watches(
    cluster: PrivateCluster, worlds: dict[str, ClusterWorld], short_timeouts: None
) -> None:
    async def main() -> None:
        leader = await cluster.leader()
        first = cluster.members.index(leader)
        other = cluster.members[first - 1]

        async def in_world(world: ClusterWorld, nodes: list[LeasePlane]) -> None:
            (node,) = nodes
            revision = node.claim.lease.revision
            await until(lambda: node.claim.lease.revision > revision)
            # The v2 API tells a hung watch from a quiet one only after a minute.
            if world is worlds["v3"]:
                await asyncio.to_thread(world.at(other).put, str(B), value("192.0.2.9"))
                await until(lambda: str(B) in node.known())
            assert node.claim.state is LeaseState.HELD

        async with contextlib.AsyncExitStack() as stack:
            nodes = {}
            for name, world in worlds.items():
                nodes[name] = make_node(world.open(first), "192.0.2.1", lease_ttl_s=6, retry_s=0.3)
                await stack.enter_async_context(nodes[name].up())
            stop(leader.pid)
            await cluster.leader([member for member in cluster.members if member is not leader])
            await asyncio.gather(
                *(in_world(world, [nodes[name]]) for name, world in worlds.items())
            )

    run(main())


def test_race_for_the_last_subnet_through_different_members(
    worlds: dict[str, ClusterWorld],
) -> None:
    async def main(world: ClusterWorld) -> None:
        stores = [world.open(0), world.open(1), world.open(2)]
        for _ in range(25):
            barrier = asyncio.Barrier(3)
            results = await asyncio.gather(
                *(
                    outcome(
                        acquired(
                            make_claim(
                                InStep(store, barrier),
                                f"192.0.2.{who}",
                                network_config=ONE_SUBNET,
                            )
                        )
                    )
                    for who, store in enumerate(stores)
                )
            )
            (winner,) = (result for result in results if isinstance(result, Lease))
            assert sum(isinstance(result, OutOfSubnets) for result in results) == 2, results
            for store in stores:
                # Every member tells of the winner, at once.
                (lease,) = (await store.snapshot()).leases
                assert (lease.attributes, lease.revision) == (winner.attributes, winner.revision)
            await stores[0].delete(winner.key, revision=winner.revision)
            await until(lambda: is_empty(stores[1]))

    run(everywhere(worlds, main))


async def is_empty(store: Store) -> bool:
    return not (await store.snapshot()).leases


async def is_answering(store: Store) -> bool:
    return not isinstance(await outcome(store.snapshot()), StoreUnavailable)


def test_writers_through_different_members_never_both_win(
    worlds: dict[str, ClusterWorld],
) -> None:
    async def main(world: ClusterWorld) -> None:
        stores = [world.open(0), world.open(1), world.open(2)]
        lease = await stores[0].create(A, ONE, 600)
        for _ in range(20):
            results = await asyncio.gather(
                *(
                    outcome(
                        store.update(A, attributes(f"192.0.2.{who}"), 600, revision=lease.revision)
                    )
                    for who, store in enumerate(stores)
                )
            )
            (lease,) = (result for result in results if isinstance(result, Lease))
            assert sum(isinstance(result, Conflict) for result in results) == 2, results

    run(everywhere(worlds, main))


STORM = 1500
"""Writes, in each API."""


def blow(world: EtcdWorld | Etcd3World, number: int, writer: int) -> None:
    """One write of a storm, to a key that only this writer writes."""
    name = f"10.5.{number * 7 % 40}.{writer * 64}-26"
    with contextlib.suppress(AssertionError):  # of a key that is gone already
        if number % 11 == 10:
            world.remove(name)
        else:
            world.put(name, value(f"198.51.100.{number % 250}"))


def test_storm_of_events_through_a_killed_member(
    cluster: PrivateCluster, worlds: dict[str, ClusterWorld]
) -> None:
    """Three writers, followers on every member; one member dies and comes back, and the past is
    compacted meanwhile. In the end all know the same, and no key ever went back in time."""

    def write(world: EtcdWorld | Etcd3World, writer: int) -> None:
        for number in range(STORM // 3):
            blow(world, number, writer)

    async def main() -> None:
        leader = await cluster.leader()
        others = [member for member in cluster.members if member is not leader]
        victim, witness = others
        backwards: list[str] = []

        def note(_: Any, changes: Any) -> None:
            backwards.extend(
                str(change.key)
                for change in changes
                if change.old and change.new and change.new.revision < change.old.revision
            )

        async with contextlib.AsyncExitStack() as stack:
            followers: dict[str, list[Follower]] = {}
            for name, world in worlds.items():
                followers[name] = [
                    await stack.enter_async_context(following(world.open(number)))
                    for number in range(3)
                ]
                for follower in followers[name]:
                    follower.on_update = note
            async with asyncio.TaskGroup() as group:
                for world in worlds.values():
                    for writer, member in enumerate((leader, witness, witness)):
                        # A connection each: one world is used by one thread.
                        own = world.another_at(member)
                        stack.enter_context(contextlib.closing(own.raw))
                        group.create_task(asyncio.to_thread(write, own, writer))
                await until(lambda: len(followers["v3"][0].updates) > 50)
                await victim.stop(signal.SIGKILL)
                local = worlds["v3"].at(witness)
                assert isinstance(local, Etcd3World)
                await asyncio.to_thread(local.raw.compact)
                await victim.start()
            for name, world in worlds.items():
                expected = by_key((await world.open().snapshot()).leases)
                assert len(expected) > 80
                for follower in followers[name]:
                    await until(
                        lambda follower=follower, expected=expected: follower.known() == expected
                    )
        assert not backwards

    run(main())
