"""What every store promises (store/base.py), asked of each, on each event loop."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.store.support import (
    Etcd3World,
    EtcdWorld,
    Follower,
    Runner,
    World,
    attributes,
    background,
    by_key,
    everywhere,
    following,
    lease_key,
    outcome,
)
from tests.wait import steadily, until
from tundp.errors import ConfigNotFound, Conflict
from tundp.lease.model import Events, Lease, Put, Snapshot

A, B, C = (lease_key(f"10.5.{third}.0-24") for third in (1, 2, 3))
ONE, TWO, THREE = (attributes(f"192.0.2.{last}") for last in (1, 2, 3))


def told(news: Any) -> dict[str, str]:
    """The leases that a wait tells of: events, or a snapshot of a store without history."""
    if isinstance(news, Snapshot):
        return by_key(news.leases)
    assert isinstance(news, Events), repr(news)
    return by_key(event.lease for event in news.events if isinstance(event, Put))


def ttl_told(world: World, seen: Lease) -> float:
    """The seconds left that a snapshot tells of; etcd v3 would have to be asked once a lease,
    so its store says that it does not know, and then etcd itself must."""
    found = world.read(str(seen.key))
    assert found is not None
    assert found[1] is not None
    assert not seen.is_reservation
    assert seen.is_ttl_known == (not isinstance(world, Etcd3World))
    if not seen.is_ttl_known:
        return found[1]
    assert seen.lease_ttl_s is not None
    return seen.lease_ttl_s


def test_absent_config_is_told_apart_and_says_how_to_write_one(world: World, run: Runner) -> None:
    async def main() -> None:
        with pytest.raises(ConfigNotFound) as caught:
            await world.open().network_config()
        message = str(caught.value)
        assert '"Network": "10.5.0.0/16"' in message
        assert ("etcdctl" in message) or (".json" in message)

    run(main())


def test_api_is_told_and_an_earlier_one_changes_nothing_once_it_is_known(
    world: World, run: Runner
) -> None:
    expected = {EtcdWorld: "v2", Etcd3World: "v3"}.get(type(world), "")

    async def main() -> None:
        store = world.open()
        world.set_config('{"Network": "10.5.0.0/16"}')
        for earlier in ("", "v2", "v3", "rubbish"):
            await store.choose_api(earlier)
            assert store.api == expected
            assert '"10.5.0.0/16"' in await store.network_config()
        assert store.warnings == ()

    run(main())


def test_config_is_read_as_written(world: World, run: Runner) -> None:
    async def main() -> None:
        store = world.open()
        world.set_config('{"Network": "10.5.0.0/16", "Backend": {"Type": "udp"}}')
        assert '"10.5.0.0/16"' in await store.network_config()
        world.set_config('{"Network": "10.6.0.0/16"}')
        assert '"10.6.0.0/16"' in await store.network_config()

    run(main())


def test_snapshot_of_no_leases_has_a_revision_to_wait_from(world: World, run: Runner) -> None:
    async def main() -> None:
        store = world.open()
        snapshot = await store.snapshot()
        assert (snapshot.leases, snapshot.bad) == ((), ())
        await world.open().create(A, ONE, 60)
        news = await outcome(store.wait(snapshot.revision))
        assert told(news) == {str(A): "192.0.2.1"}
        assert by_key((await store.snapshot()).leases) == {str(A): "192.0.2.1"}

    run(main())


def test_created_lease_is_what_a_snapshot_shows(world: World, run: Runner) -> None:
    async def main() -> None:
        store = world.open()
        created = await store.create(A, ONE, 600)
        snapshot = await store.snapshot()
        (seen,) = snapshot.leases
        assert (seen.key, seen.attributes, seen.revision) == (A, ONE, created.revision)
        assert 590 < ttl_told(world, seen) <= 600
        assert created.lease_ttl_s == 600
        assert snapshot.revision >= created.revision

    run(main())


def test_dual_stack_and_unaligned_keys_come_back_as_they_are(world: World, run: Runner) -> None:
    keys = [lease_key("10.5.1.0-24&fd00:5:1::-64"), lease_key("10.5.9.7-24")]

    async def main() -> None:
        store = world.open()
        for key in keys:
            await store.create(key, ONE, 60)
        assert {lease.key for lease in (await store.snapshot()).leases} == set(keys)
        for lease in (await store.snapshot()).leases:
            await store.delete(lease.key, revision=lease.revision)
        assert (await store.snapshot()).leases == ()

    run(main())


def test_second_create_loses_and_changes_nothing(world: World, run: Runner) -> None:
    async def main() -> None:
        first, second = world.open(), world.open()
        created = await first.create(A, ONE, 600)
        for store in (second, first):
            with pytest.raises(Conflict, match=str(A)):
                await store.create(A, TWO, 600)
        (lease,) = (await second.snapshot()).leases
        assert (lease.attributes, lease.revision) == (ONE, created.revision)

    run(main())


def test_update_of_the_revision_seen_wins(world: World, run: Runner) -> None:
    async def main() -> None:
        store = world.open()
        created = await store.create(A, ONE, 600)
        updated = await store.update(A, TWO, 700, revision=created.revision)
        assert updated.revision > created.revision
        (lease,) = (await store.snapshot()).leases
        assert (lease.attributes, lease.revision) == (TWO, updated.revision)
        assert 690 < ttl_told(world, lease) <= 700

    run(main())


def test_update_of_a_stale_revision_loses(world: World, run: Runner) -> None:
    async def main() -> None:
        ours, theirs = world.open(), world.open()
        created = await ours.create(A, ONE, 600)
        await theirs.update(A, TWO, 600, revision=created.revision)
        with pytest.raises(Conflict):
            await ours.update(A, ONE, 600, revision=created.revision)
        assert by_key((await ours.snapshot()).leases) == {str(A): "192.0.2.2"}

    run(main())


def test_update_of_a_deleted_lease_loses_and_does_not_recreate_it(
    world: World, run: Runner
) -> None:
    async def main() -> None:
        store = world.open()
        created = await store.create(A, ONE, 600)
        await store.delete(A, revision=created.revision)
        with pytest.raises(Conflict):
            await store.update(A, ONE, 600, revision=created.revision)
        assert (await store.snapshot()).leases == ()

    run(main())


def test_update_of_a_lease_deleted_and_created_again_loses(world: World, run: Runner) -> None:
    async def main() -> None:
        ours, theirs = world.open(), world.open()
        created = await ours.create(A, ONE, 600)
        await theirs.delete(A, revision=created.revision)
        await theirs.create(A, TWO, 600)
        with pytest.raises(Conflict):
            await ours.update(A, ONE, 600, revision=created.revision)
        with pytest.raises(Conflict):
            await ours.delete(A, revision=created.revision)
        assert by_key((await ours.snapshot()).leases) == {str(A): "192.0.2.2"}

    run(main())


def test_delete_is_guarded(world: World, run: Runner) -> None:
    async def main() -> None:
        ours, theirs = world.open(), world.open()
        created = await ours.create(A, ONE, 600)
        updated = await theirs.update(A, TWO, 600, revision=created.revision)
        with pytest.raises(Conflict):
            await ours.delete(A, revision=created.revision)
        assert world.read(str(A)) is not None
        await ours.delete(A, revision=updated.revision)
        assert world.read(str(A)) is None
        with pytest.raises(Conflict):
            await ours.delete(A, revision=updated.revision)

    run(main())


def test_expiry_is_seen_by_a_follower(worlds: dict[str, World], run: Runner) -> None:
    async def main(world: World) -> None:
        store = world.open()
        created = await world.open().create(A, ONE, 600)
        await world.open().create(B, TWO, None)
        async with following(store) as follower:
            assert str(A) in follower.known()
            # Not before: on a busy machine a second is soon over.
            await world.open().update(A, ONE, 1, revision=created.revision)
            await until(lambda: str(A) not in follower.known())
            assert follower.known() == {str(B): "192.0.2.2"}
        # What expired is as good as absent: to create, to update, to delete.
        lease = await store.create(A, THREE, 600)
        assert by_key((await store.snapshot()).leases)[str(A)] == "192.0.2.3"
        assert lease.lease_ttl_s == 600

    run(everywhere(worlds, main))


def test_reservation_has_no_expiry_and_keeps_none(world: World, run: Runner) -> None:
    world.put(str(A), '{"PublicIP":"192.0.2.1"}')

    async def main() -> None:
        store = world.open()
        (lease,) = (await store.snapshot()).leases
        assert lease.is_reservation
        updated = await store.update(A, TWO, None, revision=lease.revision)
        assert updated.is_reservation
        (lease,) = (await store.snapshot()).leases
        assert lease.is_reservation
        assert (lease.attributes, lease.revision) == (TWO, updated.revision)
        assert world.read(str(A)) == ({"PublicIP": "192.0.2.2", "PublicIPv6": None}, None)

    run(main())


def test_update_with_none_takes_an_expiry_away(world: World, run: Runner) -> None:
    async def main() -> None:
        store = world.open()
        created = await store.create(A, ONE, 600)
        await store.update(A, ONE, None, revision=created.revision)
        found = world.read(str(A))
        assert found is not None
        assert found[1] is None

    run(main())


def test_created_without_ttl_never_expires(world: World, run: Runner) -> None:
    async def main() -> None:
        await world.open().create(A, ONE, None)
        found = world.read(str(A))
        assert found is not None
        assert found[1] is None

    run(main())


def test_value_has_flannels_form_and_nothing_else(world: World, run: Runner) -> None:
    async def main() -> None:
        await world.open().create(A, attributes("192.0.2.1", extra={"Port": 9}), 60)
        found = world.read(str(A))
        assert found is not None
        assert found[0] == {"PublicIP": "192.0.2.1", "PublicIPv6": None, "Port": 9}

    run(main())


POISON = {
    "not-a-subnet": '{"PublicIP":"192.0.2.9"}',
    "10.5.300.0-24": '{"PublicIP":"192.0.2.9"}',
    "10.5.77.0-24hi": '{"PublicIP":"192.0.2.9"}',
    "10.5.70.0-24": '"a string"',
    "10.5.71.0-24": '{"PublicIP":"not an address"}',
    "10.5.72.0-24": "[]",
    "10.5.73.0-24": "null",
    "10.5.74.0-24": '{"PublicIP":{"deep":' + "[" * 150 + "]" * 150 + "}}",
}


def test_poison_in_a_snapshot_hurts_only_itself(world: World, run: Runner) -> None:
    for name, value in POISON.items():
        world.put(name, value)

    async def main() -> None:
        store = world.open()
        await store.create(A, ONE, 600)
        snapshot = await store.snapshot()
        assert by_key(snapshot.leases) == {str(A): "192.0.2.1"}
        bad = {entry.name: entry.why for entry in snapshot.bad}
        assert bad.keys() == POISON.keys()
        assert all(bad.values())

    run(main())


def test_poison_while_following_hurts_only_itself(world: World, run: Runner) -> None:
    async def main() -> None:
        async with following(world.open()) as follower:
            world.put(str(A), '{"PublicIP":"192.0.2.1"}')
            await until(lambda: str(A) in follower.known())
            for name, value in POISON.items():
                world.put(name, value)
            world.put(str(B), '{"PublicIP":"192.0.2.2"}')
            await until(lambda: str(B) in follower.known())
            for name in POISON:
                world.remove(name)
            world.put(str(C), '{"PublicIP":"192.0.2.3"}')
            await until(lambda: str(C) in follower.known())
            expected = {str(A): "192.0.2.1", str(B): "192.0.2.2", str(C): "192.0.2.3"}
            assert follower.known() == expected
            assert not follower.outage.is_on

    run(main())


def test_a_known_lease_that_turns_to_poison_stays_known(world: World, run: Runner) -> None:
    async def main() -> None:
        world.put(str(A), '{"PublicIP":"192.0.2.1"}')
        async with following(world.open()) as follower:
            world.put(str(A), '"garbage"')
            world.put(str(B), '{"PublicIP":"192.0.2.2"}')
            await until(lambda: str(B) in follower.known())
            assert follower.known()[str(A)] == "192.0.2.1"

    run(main())


def test_follow_yields_a_snapshot_and_then_what_changes(world: World, run: Runner) -> None:
    async def main() -> None:
        store, other = world.open(), world.open()
        first = await other.create(A, ONE, 600)
        async with following(store) as follower:
            assert isinstance(follower.updates[0], Snapshot)
            assert follower.known() == {str(A): "192.0.2.1"}
            second = await other.create(B, TWO, 600)
            await until(lambda: follower.known().get(str(B)) == "192.0.2.2")
            await other.update(A, THREE, 600, revision=first.revision)
            await until(lambda: follower.known()[str(A)] == "192.0.2.3")
            await other.delete(B, revision=second.revision)
            await until(lambda: str(B) not in follower.known())
            assert follower.known() == {str(A): "192.0.2.3"}
            revisions = [update.revision for update in follower.updates]
            assert revisions == sorted(revisions)
            assert follower.table.leases[A].revision > first.revision

    run(main())


def test_follow_keeps_up_with_a_busy_store(world: World, run: Runner) -> None:
    async def main() -> None:
        other = world.open()
        async with following(world.open()) as follower:
            expected = {}
            for number in range(60):
                key = lease_key(f"10.5.{number}.0-24")
                lease = await other.create(key, attributes(f"192.0.2.{number}"), 600)
                expected[str(key)] = f"192.0.2.{number}"
                if number % 3 == 0:
                    await other.delete(key, revision=lease.revision)
                    del expected[str(key)]
            await until(lambda: follower.known() == expected)

    run(main())


def test_a_follower_sees_the_writes_of_its_own_store(world: World, run: Runner) -> None:
    async def main() -> None:
        store = world.open()
        async with following(store) as follower:
            await store.create(A, ONE, 600)
            await until(lambda: str(A) in follower.known())

    run(main())


def test_a_resync_sees_a_changed_public_ip(world: World, run: Runner) -> None:
    """flannel compares a snapshot by keys only, and routes to the old address for ever."""

    async def main() -> None:
        store, other = world.open(), world.open()
        lease = await other.create(A, ONE, 600)
        follower = Follower(store)
        follower.table.apply(await store.snapshot())
        await other.update(A, TWO, 600, revision=lease.revision)
        (change,) = follower.table.apply(await store.snapshot())
        assert change.moves_packets
        assert follower.known() == {str(A): "192.0.2.2"}

    run(main())


def test_wait_does_not_end_while_nothing_happens(worlds: dict[str, World], run: Runner) -> None:
    async def main(world: World) -> None:
        store = world.open()
        await store.create(A, ONE, 600)
        snapshot = await store.snapshot()
        async with background(outcome(store.wait(snapshot.revision))) as waiting:
            await steadily(lambda: not waiting.done(), for_s=1.2)
            await world.open().create(B, TWO, 600)
            await until(waiting.done)

    run(everywhere(worlds, main))


def test_wait_from_a_revision_tells_what_came_after_it_whoever_looked_meanwhile(
    world: World, run: Runner
) -> None:
    """The claim takes snapshots of the very store that is followed."""

    async def main() -> None:
        store = world.open()
        snapshot = await store.snapshot()
        world.put(str(A), '{"PublicIP":"192.0.2.1"}')
        await store.snapshot()
        async with background(outcome(store.wait(snapshot.revision))) as waiting:
            await until(waiting.done)
            result = waiting.result()
        assert told(result) == {str(A): "192.0.2.1"}

    run(main())


def test_cancelled_wait_ends_at_once_and_the_store_goes_on(
    world: World, run: Runner, endless_waits: None
) -> None:
    async def main() -> None:
        store = world.open()
        await store.create(A, ONE, 600)
        for number in range(10):
            revision = (await store.snapshot()).revision
            waiting = asyncio.ensure_future(store.wait(revision))
            if number % 2:
                # Half of the waits are cancelled before, half after they have got going.
                await asyncio.sleep(0.05)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        revision = (await store.snapshot()).revision
        await world.open().create(B, TWO, 600)
        assert str(B) in told(await outcome(store.wait(revision)))
        assert len((await store.snapshot()).leases) == 2

    run(main())


def test_cancelled_wait_does_not_hold_up_the_end_of_the_loop(
    world: World, run: Runner, endless_waits: None
) -> None:
    async def main() -> None:
        store = world.open()
        waiting = asyncio.ensure_future(store.wait((await store.snapshot()).revision))
        await asyncio.sleep(0.05)
        waiting.cancel()

    run(main())


def test_close_does_not_wait_for_a_wait(world: World, run: Runner, endless_waits: None) -> None:
    async def main() -> None:
        store = world.open()
        revision = (await store.snapshot()).revision
        async with background(outcome(store.wait(revision))) as waiting:
            await asyncio.sleep(0.05)
            await store.close()
            waiting.cancel()
            await asyncio.wait([waiting])

    run(main())


def test_cancelling_one_call_does_not_fail_another(world: World, run: Runner) -> None:
    """follow and keep use one store at the same time; a timeout of one is its own affair."""

    async def main() -> None:
        store = world.open()
        await store.create(A, ONE, 600)
        for _ in range(5):
            first = asyncio.ensure_future(store.snapshot())
            second = asyncio.ensure_future(store.snapshot())
            await asyncio.sleep(0)
            first.cancel()
            assert by_key((await second).leases) == {str(A): "192.0.2.1"}

    run(main())


def test_of_many_creators_exactly_one_wins(world: World, run: Runner) -> None:
    async def main() -> None:
        stores = [world.open() for _ in range(4)]
        for number in range(25):
            key = lease_key(f"10.5.{number}.0-24")
            results = await asyncio.gather(
                *(
                    outcome(store.create(key, attributes(f"192.0.2.{who}"), 600))
                    for who, store in enumerate(stores)
                )
            )
            (winner,) = (result for result in results if isinstance(result, Lease))
            losers = [result for result in results if result is not winner]
            assert all(isinstance(result, Conflict) for result in losers), losers
            found = world.read(str(key))
            assert found is not None
            assert found[0]["PublicIP"] == str(winner.attributes.public_ip)

    run(main())


def test_of_many_updaters_exactly_one_wins(world: World, run: Runner) -> None:
    async def main() -> None:
        stores = [world.open() for _ in range(4)]
        lease = await stores[0].create(A, ONE, 600)
        for _ in range(10):
            results = await asyncio.gather(
                *(
                    outcome(
                        store.update(A, attributes(f"192.0.2.{who}"), 60, revision=lease.revision)
                    )
                    for who, store in enumerate(stores)
                )
            )
            (lease,) = (result for result in results if isinstance(result, Lease))
            assert sum(isinstance(result, Conflict) for result in results) == 3
            assert by_key((await stores[0].snapshot()).leases) == by_key([lease])

    run(main())


def test_description_names_the_place(world: World) -> None:
    store = world.open()
    place = getattr(world, "url", None) or str(getattr(world, "path", ""))
    assert place in store.description
