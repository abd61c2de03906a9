"""A node's claim on a subnet, over both stores: had, kept, lost, regained, and never stolen."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from tests.store.support import (
    ONE_SUBNET,
    FileWorld,
    InStep,
    Runner,
    World,
    acquired,
    attributes,
    by_key,
    everywhere,
    lease_key,
    make_claim,
    make_node,
    network,
    outcome,
    run,
)
from tests.wait import steadily, until
from tundp.errors import LeaseError, OutOfSubnets
from tundp.lease.claim import LeaseState
from tundp.lease.model import Lease
from tundp.store.base import Store

OURS = "192.0.2.1"
THEIRS = "192.0.2.2"


def value(public_ip: str, **more: Any) -> str:
    return json.dumps({"PublicIP": public_ip, **more})


def owner(world: World, key: str) -> str | None:
    found = world.read(key)
    return None if found is None else str(found[0].get("PublicIP"))


def test_fresh_claim_takes_a_free_subnet_of_the_pool(world: World, run: Runner) -> None:
    async def main() -> None:
        world.put("10.5.1.0-24", value(THEIRS))
        node = make_claim(world.open(), OURS)
        lease, _ = await node.acquire()
        assert str(lease.key) != "10.5.1.0-24"
        assert lease.key.is_aligned
        assert lease.key.subnet.prefixlen == 24
        assert owner(world, str(lease.key)) == OURS
        assert node.state is LeaseState.HELD
        assert node.expires_in_s == pytest.approx(86400, abs=10)
        found = world.read(str(lease.key))
        assert found is not None
        assert found[1] == pytest.approx(86400, abs=10)

    run(main())


def test_lease_of_our_public_ip_is_used_again(world: World, run: Runner) -> None:
    async def main() -> None:
        world.put("10.5.1.0-24", value(THEIRS))
        world.put("10.5.7.0-24", value(OURS, Note="kept"), ttl=100)
        lease, _ = await make_claim(world.open(), OURS, previous=lease_key("10.5.9.0-24")).acquire()
        assert str(lease.key) == "10.5.7.0-24"
        found = world.read("10.5.7.0-24")
        assert found is not None
        assert found[0] == {"PublicIP": OURS, "PublicIPv6": None, "Note": "kept"}
        assert found[1] == pytest.approx(86400, abs=10)
        assert len((await world.open().snapshot()).leases) == 2

    run(main())


def test_lease_that_no_longer_fits_is_replaced(world: World, run: Runner) -> None:
    async def main() -> None:
        world.put("10.9.7.0-24", value(OURS), ttl=1000)
        world.put("10.5.16.0-20", value(OURS), ttl=1000)
        world.put("10.9.8.0-24", value(THEIRS), ttl=1000)
        lease, _ = await make_claim(world.open(), OURS).acquire()
        assert str(lease.key).startswith("10.5.")
        assert owner(world, str(lease.key)) == OURS
        # Given back: absent, or about to be.
        for stale in ("10.9.7.0-24", "10.5.16.0-20"):
            await until(lambda stale=stale: world.read(stale) is None)
        assert owner(world, "10.9.8.0-24") == THEIRS

    run(main())


def test_free_previous_subnet_is_taken(world: World, run: Runner) -> None:
    async def main() -> None:
        lease, _ = await make_claim(
            world.open(), OURS, previous=lease_key("10.5.42.0-24")
        ).acquire()
        assert str(lease.key) == "10.5.42.0-24"

    run(main())


@pytest.mark.parametrize("held", ["10.5.42.0-24", "10.5.42.7-24", "10.5.32.0-20", "10.5.42.128-25"])
def test_held_previous_subnet_is_never_taken(world: World, held: str) -> None:
    """flannel's v2 form overwrote the other node's lease."""

    async def main() -> None:
        world.put(held, value(THEIRS), ttl=1000)
        before = world.read(held)
        assert before is not None
        lease, _ = await make_claim(
            world.open(), OURS, previous=lease_key("10.5.42.0-24")
        ).acquire()
        assert not lease.key.subnet.overlaps(lease_key(held).subnet)
        after = world.read(held)
        assert after is not None
        assert after[0] == before[0]

    run(main())


def test_previous_subnet_outside_the_network_is_ignored(world: World) -> None:
    async def main() -> None:
        lease, _ = await make_claim(
            world.open(), OURS, previous=lease_key("10.9.42.0-24")
        ).acquire()
        assert str(lease.key).startswith("10.5.")

    run(main())


def test_poison_under_the_prefix_does_not_keep_a_node_out(world: World) -> None:
    async def main() -> None:
        world.put("rubbish", '"rubbish"')
        world.put("10.5.200.0-24", '"rubbish"')
        assert str((await acquired(make_claim(world.open(), OURS))).key).startswith("10.5.")
        assert world.read("rubbish") == ("rubbish", None)

    run(main())


def test_previous_subnet_whose_lease_cannot_be_read_is_held(world: World) -> None:
    """Tried again and again, it would keep this node out for ever, and the network is free."""

    async def main() -> None:
        world.put("10.5.42.0-24", '"rubbish"')
        lease, _ = await make_claim(
            world.open(), OURS, previous=lease_key("10.5.42.0-24")
        ).acquire()
        assert str(lease.key) != "10.5.42.0-24"
        assert world.read("10.5.42.0-24") == ("rubbish", None)

    run(main())


def test_a_key_that_cannot_be_read_is_still_not_ours_to_take(world: World) -> None:
    """Its value is rubbish to us; whoever wrote it may well be routing to it."""

    async def main() -> None:
        world.put("10.5.3.0-24", '"rubbish"')
        result = await outcome(make_claim(world.open(), OURS, network_config=ONE_SUBNET).acquire())
        assert isinstance(result, LeaseError), repr(result)

    run(main())


def test_out_of_subnets_is_said(world: World, run: Runner) -> None:
    async def main() -> None:
        world.put("10.5.3.0-24", value(THEIRS))
        with pytest.raises(OutOfSubnets, match=r"10\.5\.3\.0"):
            await make_claim(world.open(), OURS, network_config=ONE_SUBNET).acquire()

    run(main())


def test_race_for_the_last_subnet_has_one_winner(world: World, run: Runner) -> None:
    async def main() -> None:
        stores = [world.open(), world.open()]
        for _ in range(50):  # on each loop
            barrier = asyncio.Barrier(2)
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
            assert sum(isinstance(result, OutOfSubnets) for result in results) == 1, results
            (lease,) = (await stores[0].snapshot()).leases
            assert lease.attributes == winner.attributes
            world.remove(str(lease.key))

    run(main())


def test_nodes_starting_together_all_get_different_subnets(world: World, run: Runner) -> None:
    config = network('{"Network": "10.5.0.0/20", "SubnetLen": 23}')  # seven subnets

    async def main() -> None:
        stores = [world.open() for _ in range(7)]
        barrier = asyncio.Barrier(len(stores))
        leases = await asyncio.gather(
            *(
                acquired(
                    make_claim(InStep(store, barrier), f"192.0.2.{who}", network_config=config)
                )
                for who, store in enumerate(stores)
            )
        )
        assert len({lease.key for lease in leases}) == 7
        assert by_key((await stores[0].snapshot()).leases) == by_key(leases)
        with pytest.raises(OutOfSubnets):
            await make_claim(world.open(), "192.0.2.99", network_config=config).acquire()

    run(main())


def test_race_for_the_last_ipv4_subnet_of_a_dual_stack_network_has_one_winner(
    world: World,
) -> None:
    """The two families are drawn apart, so equal IPv4 halves hide under different keys."""
    config = network(
        '{"Network": "10.5.0.0/22", "SubnetLen": 24, "SubnetMin": "10.5.3.0",'
        ' "SubnetMax": "10.5.3.0", "EnableIPv6": true, "IPv6Network": "fd00:5::/48"}'
    )

    async def main() -> None:
        stores = [world.open(), world.open()]
        for _ in range(3):
            barrier = asyncio.Barrier(2)
            await asyncio.gather(
                *(
                    outcome(
                        make_claim(
                            InStep(store, barrier), f"192.0.2.{who}", network_config=config
                        ).acquire()
                    )
                    for who, store in enumerate(stores)
                )
            )
            leases = (await stores[0].snapshot()).leases
            assert len(leases) == 1, by_key(leases)
            world.remove(str(leases[0].key))

    run(main())


def test_lost_for_ever_gives_up_after_ten_races(world: World) -> None:
    class AlwaysLate:
        """Somebody creates the very key between our look and our create."""

        def __init__(self) -> None:
            self._store = world.open()
            self.creates = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self._store, name)

        async def create(self, key: Any, *rest: Any) -> Lease:
            self.creates += 1
            world.put(str(key), value(THEIRS))
            return await self._store.create(key, *rest)

    async def main() -> None:
        store = AlwaysLate()
        with pytest.raises(LeaseError, match="10"):
            await make_claim(store, OURS).acquire()
        assert store.creates == 10
        assert OURS not in by_key((await world.open().snapshot()).leases).values()

    run(main())


def test_lease_is_renewed_well_before_it_expires(
    worlds: dict[str, World], run: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    async def main(world: World) -> None:
        node = make_node(world.open(), OURS, lease_ttl_s=2)
        async with node.up() as lease:
            key = lease.key
            observer = world.open()
            revisions = [lease.revision]

            async def has_renewed_twice() -> bool:
                (seen,) = (await observer.snapshot()).leases
                assert seen.key == key
                assert seen.lease_ttl_s is not None
                if seen.revision != revisions[-1]:
                    revisions.append(seen.revision)
                return len(revisions) >= 3

            await until(has_renewed_twice, "two renewals")
            assert all(before < after for before, after in pairwise(revisions))
            # What the watch tells of our own renewals agrees with what we hold.
            await until(lambda: node.routing.leases[key].revision == node.claim.lease.revision)
            assert node.claim.state is LeaseState.HELD
            assert "lost" not in caplog.text
            assert "CONFLICT" not in caplog.text

    run(everywhere(worlds, main))


def test_renewal_keeps_what_others_keep_in_the_value(worlds: dict[str, World]) -> None:
    async def main(world: World) -> None:
        world.put("10.5.7.0-24", value(OURS, Rack="b7"), ttl=100)
        node = make_node(world.open(), OURS, lease_ttl_s=2)
        async with node.up() as lease:
            revision = lease.revision
            await until(lambda: node.claim.lease.revision > revision)
            found = world.read("10.5.7.0-24")
            assert found is not None
            assert found[0] == {"PublicIP": OURS, "PublicIPv6": None, "Rack": "b7"}

    run(everywhere(worlds, main))


@pytest.mark.parametrize("watching", [True, False], ids=["watching", "renewing"])
def test_foreign_owner_is_never_overwritten(worlds: dict[str, World], watching: bool) -> None:
    """flannel renews over whoever holds its key now, and never notices."""

    async def main(world: World) -> None:
        node = make_node(world.open(), OURS, lease_ttl_s=2, retry_s=0.2)
        async with node.up(is_watching=watching):
            key = node.key
            world.put(key, value(THEIRS, Theirs=True))
            await until(lambda: node.claim.state is LeaseState.CONFLICT)
            await steadily(
                lambda: world.read(key) == ({"PublicIP": THEIRS, "Theirs": True}, None), for_s=0.9
            )
            assert node.claim.state is LeaseState.CONFLICT
            assert node.key == key
            # The other one goes; the subnet is ours again.
            world.remove(key)

            def is_held() -> bool:
                return node.claim.state is LeaseState.HELD

            await until(is_held)
            await until(lambda: owner(world, key) == OURS)

    run(everywhere(worlds, main))


def test_conflict_is_resolved_as_soon_as_the_other_lease_goes(world: World, run: Runner) -> None:
    """The watch wakes the claim: nobody waits for the minute to be over."""

    async def main() -> None:
        node = make_node(world.open(), OURS)
        async with node.up():
            key = node.key
            world.put(key, value(THEIRS))
            await until(lambda: node.claim.state is LeaseState.CONFLICT)
            world.remove(key)
            await until(lambda: owner(world, key) == OURS)
            await until(lambda: node.claim.state is LeaseState.HELD)
            # A watch event of the conflict that arrives late must not bring it back.
            assert node.key == key

    run(main())


def test_conflict_ends_when_the_other_lease_expires(worlds: dict[str, World]) -> None:
    async def main(world: World) -> None:
        node = make_node(world.open(), OURS)
        async with node.up():
            key = node.key
            world.put(key, value(THEIRS), ttl=1)
            await until(lambda: node.claim.state is LeaseState.CONFLICT)
            await until(lambda: owner(world, key) == OURS)
            await until(lambda: node.claim.state is LeaseState.HELD)

    run(everywhere(worlds, main))


def test_deleted_lease_is_regained_with_the_same_subnet(world: World, run: Runner) -> None:
    """flannel exits with code 0, and a supervisor leaves it down."""

    async def main() -> None:
        node = make_node(world.open(), OURS)
        async with node.up():
            key = node.key
            for _ in range(3):
                world.remove(key)
                await until(lambda: owner(world, key) == OURS)
                await until(lambda: node.claim.state is LeaseState.HELD)
            assert node.key == key
            assert len((await world.open().snapshot()).leases) == 1
            found = world.read(key)
            assert found is not None
            assert found[1] == pytest.approx(86400, abs=10)

    run(main())


class LateAnswers:
    """A store whose answers to creates come only when `is_due` says so."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.is_due: Callable[[Lease], bool] = lambda lease: True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def create(self, *arguments: Any) -> Lease:
        lease = await self._store.create(*arguments)
        await until(lambda: self.is_due(lease))
        return lease


def test_own_write_that_the_watch_tells_of_first_is_nobody_elses(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """etcd tells watchers and the writer at the same time, and the watcher may be quicker."""

    async def main() -> None:
        store = LateAnswers(world.open())
        node = make_node(store, OURS)
        async with node.up() as first:

            def is_seen(lease: Lease) -> bool:
                known = node.routing.leases.get(lease.key)
                return known is not None and known.revision > first.revision

            store.is_due = is_seen
            world.remove(node.key)
            await until(lambda: node.claim.lease.revision > first.revision)
            await until(lambda: node.claim.state is LeaseState.HELD)
            assert "by somebody else" not in caplog.text

    run(main())


def test_deletion_that_overtakes_the_answer_to_our_create_is_not_forgotten(world: World) -> None:
    """Else we hold, for a day, what is no longer there."""

    async def main() -> None:
        store = LateAnswers(world.open())
        node = make_node(store, OURS)
        async with node.up():
            key = node.key
            stage = "created"

            def is_deleted_again(lease: Lease) -> bool:
                nonlocal stage
                known = node.routing.leases.get(lease.key)
                if stage == "created" and known is not None:
                    world.remove(key)
                    stage = "deleted"
                elif stage == "deleted" and known is None:
                    stage = "answered"
                return stage == "answered"

            store.is_due = is_deleted_again
            world.remove(key)
            await until(lambda: stage == "answered")
            await until(lambda: owner(world, key) == OURS)

    run(main())


def test_deleted_lease_is_regained_at_renewal_without_a_watch(worlds: dict[str, World]) -> None:
    async def main(world: World) -> None:
        node = make_node(world.open(), OURS, lease_ttl_s=2)
        async with node.up(is_watching=False):
            key = node.key
            world.remove(key)
            await until(lambda: owner(world, key) == OURS)

    run(everywhere(worlds, main))


def test_lease_renewed_by_hand_is_still_ours(
    worlds: dict[str, World], caplog: pytest.LogCaptureFixture
) -> None:
    async def main(world: World) -> None:
        node = make_node(world.open(), OURS, lease_ttl_s=2)
        async with node.up(is_watching=False):
            key = node.key
            world.put(key, value(OURS, By="hand"), ttl=60)
            revision = node.claim.lease.revision
            await until(lambda: node.claim.lease.revision > revision)
            found = world.read(key)
            assert found is not None
            assert found[0]["By"] == "hand"
            assert node.claim.state is LeaseState.HELD
            assert "CONFLICT" not in caplog.text

    run(everywhere(worlds, main))


def test_reservation_is_kept_without_expiry(worlds: dict[str, World]) -> None:
    """flannel's v3 form turned it into a lease of one day."""

    async def main(world: World) -> None:
        world.put("10.5.7.0-24", value(OURS))
        node = make_node(world.open(), OURS, lease_ttl_s=2)
        async with node.up() as lease:
            assert (str(lease.key), lease.lease_ttl_s) == ("10.5.7.0-24", None)
            assert node.claim.expires_in_s is None
            await steadily(lambda: (world.read("10.5.7.0-24") or (None, 0))[1] is None, for_s=1.2)
            assert node.claim.state is LeaseState.HELD

    run(everywhere(worlds, main))


def test_lease_made_a_reservation_while_we_run_stays_one(worlds: dict[str, World]) -> None:
    async def main(world: World) -> None:
        node = make_node(world.open(), OURS, lease_ttl_s=2)
        async with node.up():
            key = node.key
            world.put(key, value(OURS))
            await until(lambda: node.claim.expires_in_s is None)
            await steadily(lambda: (world.read(key) or (None, 0))[1] is None, for_s=1.2)
            assert node.claim.state is LeaseState.HELD

    run(everywhere(worlds, main))


def test_an_outage_while_acquiring_is_said_to_be_over(
    file_world: FileWorld, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise the first renewal, a day later, reports an outage of one day."""
    caplog.set_level(logging.INFO, "tundp")
    good = file_world.path.read_text()
    file_world.path.write_text("garbage")

    async def main() -> None:
        acquiring = asyncio.ensure_future(make_claim(file_world.open(), OURS).acquire())
        await until(lambda: "retrying" in caplog.text)
        file_world.path.write_text(good)
        await acquiring
        assert "working again" in caplog.text

    run(main())


def test_conflict_is_logged_with_both_sides(world: World, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        node = make_node(world.open(), OURS)
        async with node.up():
            world.put(node.key, value(THEIRS))
            await until(lambda: node.claim.state is LeaseState.CONFLICT)
            message = next(
                record.getMessage()
                for record in caplog.records
                # python-etcd reports what earlier tests' servers did when they ended.
                if record.levelname == "ERROR" and record.name.startswith("tundp")
            )
            assert node.key in message
            assert THEIRS in message

    run(main())


def test_stale_news_of_our_own_lease_changes_nothing(world: World) -> None:
    async def main() -> None:
        store = world.open()
        node = make_claim(store, OURS)
        first, _ = await node.acquire()
        renewed = await store.update(first.key, attributes(OURS), 600, revision=first.revision)
        node.observe(renewed)
        node.observe(first)
        assert node.lease == renewed
        assert node.state is LeaseState.HELD

    run(main())


def test_a_subnet_that_overlaps_another_key_is_not_regained(worlds: dict[str, World]) -> None:
    """Two keys can name one IPv4 subnet: creating ours would make two owners."""

    async def main(world: World) -> None:
        node = make_node(world.open(), OURS)
        async with node.up():
            key = node.key
            other = f"{key}&fd00:5::-64"
            world.put(other, value(THEIRS))
            world.remove(key)
            await until(lambda: node.claim.state is LeaseState.CONFLICT)
            assert other in node.claim.conflict
            assert world.read(key) is None
            world.remove(other)
            await until(lambda: other not in node.known())
            await until(lambda: owner(world, key) == OURS)

    run(everywhere(worlds, main))
