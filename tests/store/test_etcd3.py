"""The etcd v3 store: what it says on the wire and what it costs, and what only v3 can do to it.

What both APIs share is in test_contract.py, test_claim.py and test_outage.py.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from tests.store.support import (
    Etcd3World,
    Follower,
    Runner,
    attributes,
    background,
    by_key,
    following,
    forwarder,
    lease_key,
    make_claim,
    make_node,
    outcome,
    run,
)
from tests.wait import until
from tundp.errors import Compacted, ConfigError, Conflict, StoreUnavailable
from tundp.lab.etcd import PrivateEtcd
from tundp.lease.claim import LeaseState
from tundp.lease.model import BadEntry, Events, Gone, Lease, Put

A, B, C = (lease_key(f"10.5.{third}.0-24") for third in (1, 2, 3))
ONE, TWO = attributes("192.0.2.1"), attributes("192.0.2.2")
BATCH = 1000
"""Revisions that etcd puts into one answer to a watch that starts in the past."""


@pytest.fixture
def etcd(start_etcd: Callable[..., PrivateEtcd]) -> PrivateEtcd:
    """An etcd for this test alone: nobody else's RPCs, watches and etcd leases are in it."""
    return start_etcd()


@pytest.fixture
def own_world(etcd: PrivateEtcd) -> Iterator[Etcd3World]:
    with contextlib.closing(Etcd3World(etcd.url, "/coreos.com/network")) as world:
        yield world


def value(public_ip: str) -> str:
    return json.dumps({"PublicIP": public_ip})


def put_many(world: Etcd3World, names: list[str], text: str = value("192.0.2.9")) -> None:
    """Many keys at once, a hundred a transaction: etcd takes no more than 128."""
    encode = base64.b64encode
    for start in range(0, len(names), 100):
        world.raw.call(
            "kv/txn",
            success=[
                {
                    "requestPut": {
                        "key": encode(world.path(name).encode()).decode(),
                        "value": encode(text.encode()).decode(),
                    }
                }
                for name in names[start : start + 100]
            ],
        )


# What goes over the wire


def test_lease_on_the_wire_is_flannels(etcd3_world: Etcd3World) -> None:
    async def main() -> None:
        store = etcd3_world.open()
        created = await store.create(A, ONE, 86400)
        found = etcd3_world.raw.get(f"{etcd3_world.prefix}/subnets/10.5.1.0-24")
        assert found is not None
        assert found["value"] == '{"PublicIP":"192.0.2.1","PublicIPv6":null}'
        assert found["revision"] == created.revision
        assert 86390 < etcd3_world.raw.ttl_of(found["etcd_lease"]) <= 86400
        updated = await store.update(A, TWO, 86400, revision=created.revision)
        found = etcd3_world.raw.get(f"{etcd3_world.prefix}/subnets/10.5.1.0-24")
        assert found is not None
        assert found["value"] == '{"PublicIP":"192.0.2.2","PublicIPv6":null}'
        assert found["revision"] == updated.revision
        assert 86390 < etcd3_world.raw.ttl_of(found["etcd_lease"]) <= 86400

    run(main())


def test_dual_stack_key_on_the_wire_is_flannels(etcd3_world: Etcd3World) -> None:
    async def main() -> None:
        await etcd3_world.open().create(lease_key("10.5.1.0-24&fd00:5:1::-64"), ONE, 60)
        (found,) = etcd3_world.raw.list(f"{etcd3_world.prefix}/subnets")
        assert found["key"] == f"{etcd3_world.prefix}/subnets/10.5.1.0-24&fd00:5:1::-64"

    run(main())


@pytest.mark.parametrize(
    ("spelling", "clean"),
    [
        ("//{0}//network/", "/{0}/network"),
        ("/{0}/network///", "/{0}/network"),
        # The v2 API would put a slash there; v3 keys are just bytes.
        ("{0}/network", "{0}/network"),
    ],
)
def test_prefix_is_cleaned_as_flannel_cleans_it(
    etcd3_world: Etcd3World, spelling: str, clean: str
) -> None:
    first = etcd3_world.prefix.split("/")[1]
    prefix = clean.format(first)

    async def main() -> None:
        store = etcd3_world.open_at(etcd3_world.url, prefix=spelling.format(first))
        etcd3_world.raw.put(f"{prefix}/config", '{"Network": "10.5.0.0/16"}')
        assert await store.network_config() == '{"Network": "10.5.0.0/16"}'
        await store.create(A, ONE, 60)
        assert etcd3_world.raw.get(f"{prefix}/subnets/{A}") is not None
        assert by_key((await store.snapshot()).leases) == {str(A): "192.0.2.1"}
        async with following(store) as follower:
            etcd3_world.raw.put(f"{prefix}/subnets/{B}", value("192.0.2.2"))
            await until(lambda: str(B) in follower.known())

    run(main())


@pytest.mark.parametrize("access", [{"certfile": "/nowhere"}, {"cafile": "/nowhere"}])
def test_tls_file_that_does_not_exist_is_named(
    etcd3_world: Etcd3World, access: dict[str, str]
) -> None:
    with pytest.raises(ConfigError, match="--etcd-") as caught:
        etcd3_world.open_at("https://127.0.0.1:1", **access)
    assert "/nowhere" in str(caught.value) or "keyfile" in str(caught.value)


# What it costs


def test_snapshot_is_one_question_however_many_leases(own_world: Etcd3World) -> None:
    """flannel asks once more for each lease."""
    put_many(own_world, [f"10.5.{third}.0-24" for third in range(200)])
    own_world.put(str(A), value("192.0.2.1"), ttl=60)

    async def main() -> None:
        store = own_world.open()
        before = Counter(own_world.raw.counts())
        assert len((await store.snapshot()).leases) == 200
        assert Counter(own_world.raw.counts()) - before == {"Range": 1}

    run(main())


def test_following_asks_nothing_for_an_event(own_world: Etcd3World) -> None:
    async def main() -> None:
        async with following(own_world.open()) as follower:
            own_world.put(str(A), value("192.0.2.1"))
            await until(lambda: str(A) in follower.known())
            before = Counter(own_world.raw.counts())
            for third in range(20):
                own_world.put(f"10.5.{third}.0-24", value("192.0.2.9"), ttl=60)
            await until(lambda: len(follower.known()) == 20)
            # All of it is the 20 writes, each with an etcd lease, through the gateway.
            asked = Counter(own_world.raw.counts()) - before
            assert asked == {"LeaseGrant": 20, "Put": 20}

    run(main())


def test_renewal_costs_four_calls(own_world: Etcd3World) -> None:
    async def main() -> None:
        store = own_world.open()
        lease = await store.create(A, ONE, 600)
        before = Counter(own_world.raw.counts())
        await store.update(A, ONE, 600, revision=lease.revision)
        # The old etcd lease is looked at before it is revoked: another key may hang on it.
        calls = {"LeaseGrant": 1, "Txn": 1, "LeaseTimeToLive": 1, "LeaseRevoke": 1}
        await until(lambda: Counter(own_world.raw.counts()) - before == calls)

    run(main())


def test_waits_that_were_cancelled_leave_no_watch_in_etcd(own_world: Etcd3World) -> None:
    async def main() -> None:
        store = own_world.open()
        revision = (await store.snapshot()).revision
        for _ in range(5):
            waiting = asyncio.ensure_future(store.wait(revision))
            await asyncio.sleep(0.05)
            waiting.cancel()
            await asyncio.wait([waiting])
        assert own_world.raw.watcher_count() <= 1
        # Another place to wait from is another watch, and the one before ends.
        for number in range(5):
            own_world.put(str(A), value(f"192.0.2.{number}"))
            await store.wait((await store.snapshot()).revision - 1)
        await until(lambda: own_world.raw.watcher_count() <= 1)
        await store.close()
        await until(lambda: own_world.raw.watcher_count() == 0)

    run(main())


def test_snapshot_of_many_megabytes(etcd3_world: Etcd3World) -> None:
    """gRPC clients usually refuse an answer above 4 MiB."""
    names = [f"10.{5 + number // 256}.{number % 256}.0-24" for number in range(3000)]
    text = json.dumps({"PublicIP": "192.0.2.9", "Note": "x" * 2000})
    put_many(etcd3_world, names, text)

    async def main() -> None:
        assert len((await etcd3_world.open().snapshot()).leases) == 3000

    run(main())


# etcd leases: every one we make is used or given back


def test_renewals_leave_one_etcd_lease(own_world: Etcd3World) -> None:
    async def main() -> None:
        store = own_world.open()
        lease = await store.create(A, ONE, 600)
        for _ in range(10):
            lease = await store.update(A, ONE, 600, revision=lease.revision)
        found = own_world.raw.get(own_world.path(str(A)))
        assert found is not None
        await until(lambda: own_world.raw.etcd_leases() == {found["etcd_lease"]})
        await store.update(A, ONE, None, revision=lease.revision)
        await until(lambda: own_world.raw.etcd_leases() == set())

    run(main())


def test_claim_that_is_kept_leaves_one_etcd_lease(own_world: Etcd3World) -> None:
    async def main() -> None:
        node = make_node(own_world.open(), "192.0.2.1", lease_ttl_s=2)
        async with node.up() as lease:
            await until(lambda: node.claim.lease.revision > lease.revision)
            own_world.remove(node.key)
            # Regained, once the watch has told.
            await until(lambda: own_world.read(node.key) is not None)
            await until(lambda: len(own_world.raw.etcd_leases()) == 1)

    run(main())


def test_lost_races_leave_no_etcd_lease(own_world: Etcd3World) -> None:
    async def main() -> None:
        ours, theirs = own_world.open(), own_world.open()
        lease = await theirs.create(A, TWO, 600)
        before = own_world.raw.etcd_leases()
        with pytest.raises(Conflict):
            await ours.create(A, ONE, 600)
        with pytest.raises(Conflict):
            await ours.update(A, ONE, 600, revision=lease.revision - 1)
        with pytest.raises(Conflict):
            await ours.update(B, ONE, 600, revision=lease.revision)
        await until(lambda: own_world.raw.etcd_leases() == before)
        assert len(before) == 1
        assert own_world.read(str(A)) is not None

    run(main())


def test_deleted_lease_leaves_no_etcd_lease(own_world: Etcd3World) -> None:
    async def main() -> None:
        store = own_world.open()
        lease = await store.create(A, ONE, 600)
        await store.delete(A, revision=lease.revision)
        await until(lambda: own_world.raw.etcd_leases() == set())

    run(main())


def test_giving_back_our_old_etcd_lease_never_takes_a_key_along(own_world: Etcd3World) -> None:
    """Deleted, and made again by somebody else: what they hang it on is not ours to revoke."""

    async def main() -> None:
        ours, theirs = own_world.open(), own_world.open()
        await ours.create(A, ONE, 600)
        own_world.remove(str(A))
        lease = await theirs.create(A, ONE, 600)
        updated = await ours.update(A, ONE, 600, revision=lease.revision)
        assert own_world.read(str(A)) is not None
        # Now theirs gives its etcd lease back, on which nothing hangs any more.
        with pytest.raises(Conflict):
            await theirs.update(A, ONE, 600, revision=lease.revision)
        await theirs.update(A, TWO, 600, revision=updated.revision)
        found = own_world.raw.get(own_world.path(str(A)))
        assert found is not None
        assert "192.0.2.2" in found["value"]
        assert found["etcd_lease"] in own_world.raw.etcd_leases()

    run(main())


def test_reservation_survives_restarts_of_its_owner(own_world: Etcd3World) -> None:
    """A stock flanneld turns it into a lease of one day at its first start."""
    own_world.put("10.5.7.0-24", value("192.0.2.1"))

    async def main() -> None:
        for _ in range(3):
            lease, _ = await make_claim(own_world.open(), "192.0.2.1").acquire()
            assert str(lease.key) == "10.5.7.0-24"
            assert lease.is_reservation
            found = own_world.raw.get(own_world.path("10.5.7.0-24"))
            assert found is not None
            assert found["etcd_lease"] == "0"
        await until(lambda: own_world.raw.etcd_leases() == set())

    run(main())


def test_ttl_below_etcds_least_is_told_as_it_is(start_etcd: Callable[..., PrivateEtcd]) -> None:
    """etcd gives no etcd lease shorter than one and a half elections."""
    etcd = start_etcd(extra=("--heartbeat-interval=100", "--election-timeout=2500"))

    async def main(world: Etcd3World) -> None:
        lease = await world.open().create(A, ONE, 2)
        assert lease.lease_ttl_s == 4
        found = world.raw.get(world.path(str(A)))
        assert found is not None
        assert 2 < world.raw.ttl_of(found["etcd_lease"]) <= 4

    with contextlib.closing(Etcd3World(etcd.url)) as world:
        run(main(world))


# Stock flanneld beside us


def test_key_written_anew_by_a_stock_flanneld(etcd3_world: Etcd3World) -> None:
    """It renews with a new etcd lease and an unconditional put; the old etcd lease then ends."""
    raw = etcd3_world.raw

    async def main() -> None:
        etcd3_world.put(str(A), value("192.0.2.9"), ttl=600)
        before = raw.get(etcd3_world.path(str(A)))
        assert before is not None
        async with following(etcd3_world.open()) as follower:
            revision = follower.table.leases[A].revision
            etcd3_world.put(str(A), value("192.0.2.9"), ttl=600)
            raw.call("lease/revoke", ID=before["etcd_lease"])
            etcd3_world.put(str(B), value("192.0.2.8"), ttl=600)
            await until(lambda: str(B) in follower.known())
            assert follower.known()[str(A)] == "192.0.2.9"
            assert follower.table.leases[A].revision > revision

    run(main())


def test_our_key_renewed_by_a_stock_flanneld_with_our_address_stays_ours(
    own_world: Etcd3World,
) -> None:
    async def main() -> None:
        node = make_node(own_world.open(), "192.0.2.1", lease_ttl_s=2)
        async with node.up():
            own_world.put(node.key, value("192.0.2.1"), ttl=86400)
            written = own_world.raw.get(own_world.path(node.key))
            assert written is not None
            await until(lambda: node.claim.lease.revision >= written["revision"])
            assert node.claim.state is LeaseState.HELD
            # What the watch told has no TTL with it; the lease must be renewed all the same.
            expires_in_s = node.claim.expires_in_s
            assert expires_in_s is not None
            await until(lambda: node.claim.lease.revision > written["revision"])
            assert node.claim.state is LeaseState.HELD

    run(main())


# Poison and neighbours that only v3 can have


def test_neighbours_of_the_prefix_are_not_ours(etcd3_world: Etcd3World, run: Runner) -> None:
    """flannel's prefix has no slash at its end, and takes them all for leases."""
    prefix, raw = etcd3_world.prefix, etcd3_world.raw
    neighbours = [
        f"{prefix}/subnets",
        f"{prefix}/subnets-foo",
        f"{prefix}/subnets-foo/10.5.9.0-24",
        f"{prefix}/subnets0/10.5.9.0-24",
        f"{prefix}/subnets.bak/10.5.9.0-24",
        f"{prefix}0/subnets/10.5.9.0-24",
    ]

    async def main() -> None:
        for key in neighbours[::2]:
            raw.put(key, value("192.0.2.9"))
        store = etcd3_world.open()
        snapshot = await store.snapshot()
        assert (snapshot.leases, snapshot.bad) == ((), ())
        async with following(store) as follower:
            for key in neighbours:
                raw.put(key, value("192.0.2.9"))
            for key in neighbours:
                raw.delete(key)
            etcd3_world.put(str(A), value("192.0.2.1"))
            await until(lambda: follower.known())
            assert follower.known() == {str(A): "192.0.2.1"}
            told = [update.events for update in follower.updates if isinstance(update, Events)]
            assert len([event for events in told for event in events]) == 1

    run(main())


POISON: dict[str, str | bytes] = {
    "": value("192.0.2.9"),
    "/": value("192.0.2.9"),
    "10.5.9.0-24/10.5.99.0-24": value("192.0.2.9"),
    "/10.5.9.0-24": value("192.0.2.9"),
    "10.5.80.0-24": b"\xff\xfe",
    "10.5.81.0-24": b"",
    "10.5.82.0-24": b'{"PublicIP":"192.0.2.\xe9"}',
    "10.5.83.0-24": '{"PublicIP":"192.0.2.9"}\x00',
    "10.5.84.0-24\n": value("192.0.2.9"),
    "10.5.8५.0-24": value("192.0.2.9"),
}


def test_poison_of_bytes_hurts_only_itself(etcd3_world: Etcd3World, run: Runner) -> None:
    raw = etcd3_world.raw

    async def main() -> None:
        etcd3_world.put(str(A), value("192.0.2.1"))
        async with following(etcd3_world.open()) as follower:
            for name, text in POISON.items():
                raw.put(etcd3_world.path(name), text)
            etcd3_world.put(str(B), value("192.0.2.2"))
            await until(lambda: str(B) in follower.known())
            snapshot = await etcd3_world.open().snapshot()
            assert by_key(snapshot.leases) == follower.known()
            assert len(snapshot.bad) == len(POISON)
            assert all(entry.why for entry in snapshot.bad)
            for name in POISON:
                raw.delete(etcd3_world.path(name))
            etcd3_world.put(str(C), value("192.0.2.3"))
            await until(lambda: str(C) in follower.known())
            assert follower.known() == {
                str(A): "192.0.2.1",
                str(B): "192.0.2.2",
                str(C): "192.0.2.3",
            }
            assert not follower.outage.is_on

    run(main())


def test_key_that_is_not_text_is_one_bad_entry(etcd3_world: Etcd3World) -> None:
    path = etcd3_world.path("").encode() + b"\xff10.5.9.0-24"
    key = base64.b64encode(path).decode()

    async def main() -> None:
        store = etcd3_world.open()
        revision = (await store.snapshot()).revision
        etcd3_world.raw.call("kv/put", key=key, value=base64.b64encode(b"{}").decode())
        news = await store.wait(revision)
        (event,) = news.events
        assert isinstance(event, BadEntry)
        (entry,) = (await store.snapshot()).bad
        assert (entry.name, (await store.snapshot()).leases) == (event.name, ())

    run(main())


def test_all_leases_removed_at_once_are_all_gone(etcd3_world: Etcd3World, run: Runner) -> None:
    """One transaction, many events at one revision."""

    async def main() -> None:
        put_many(etcd3_world, [f"10.5.{third}.0-24" for third in range(50)])
        async with following(etcd3_world.open()) as follower:
            assert len(follower.known()) == 50
            end = etcd3_world.path("")[:-1] + "0"
            etcd3_world.raw.call(
                "kv/deleterange",
                key=base64.b64encode(etcd3_world.path("").encode()).decode(),
                range_end=base64.b64encode(end.encode()).decode(),
            )
            await until(lambda: not follower.known())
            gone = [update for update in follower.updates if isinstance(update, Events)]
            assert len([e for update in gone for e in update.events if isinstance(e, Gone)]) == 50

    run(main())


# History


def test_events_of_a_compacted_past_end_in_a_snapshot(own_world: Etcd3World, run: Runner) -> None:
    async def main() -> None:
        store = own_world.open()
        follower = Follower(store)
        own_world.put(str(A), value("192.0.2.1"))
        own_world.put(str(B), value("192.0.2.2"))
        snapshot = await store.snapshot()
        follower.table.apply(snapshot)
        own_world.put(str(A), value("192.0.2.3"))
        own_world.remove(str(B))
        own_world.raw.compact()
        with pytest.raises(Compacted):
            await store.wait(snapshot.revision)
        follower.table.apply(await store.snapshot())
        assert follower.known() == {str(A): "192.0.2.3"}
        # From here the watch goes on.
        async with background(outcome(store.wait(follower.table.revision))) as waiting:
            own_world.put(str(B), value("192.0.2.2"))
            await until(waiting.done)
            assert isinstance(waiting.result(), Events)

    run(main())


def test_compaction_under_an_open_watch_loses_nothing(own_world: Etcd3World, run: Runner) -> None:
    async def main() -> None:
        async with following(own_world.open()) as follower:
            for number in range(5):
                own_world.put(str(A), value(f"192.0.2.{number}"))
                own_world.raw.compact()
                await until(
                    lambda number=number: follower.known().get(str(A)) == f"192.0.2.{number}"
                )
            assert not follower.outage.is_on
            assert sum(isinstance(update, Events) for update in follower.updates) >= 5

    run(main())


def test_peer_that_moved_while_the_watch_was_compacted_away(own_world: Etcd3World) -> None:
    """The outage and the compaction of user-needs P4: the new next hop shows after it."""

    async def main() -> None:
        own_world.put(str(A), value("192.0.2.1"))
        own_world.put(str(B), value("192.0.2.2"))
        async with (
            forwarder(own_world.url) as proxy,
            following(own_world.open_at(proxy.url)) as follower,
        ):
            await proxy.cut()
            await until(lambda: follower.outage.is_on)
            own_world.put(str(A), value("192.0.2.3"))
            own_world.remove(str(B))
            own_world.raw.compact()
            assert follower.known() == {str(A): "192.0.2.1", str(B): "192.0.2.2"}
            await proxy.mend()
            await until(lambda: follower.known() == {str(A): "192.0.2.3"})
            own_world.put(str(B), value("192.0.2.4"))
            await until(lambda: str(B) in follower.known())

    run(main())


def test_watch_far_behind_gets_every_event_in_order(own_world: Etcd3World) -> None:
    """More than etcd puts into one answer, each of which already names the newest revision."""
    count = BATCH + 200

    async def main() -> None:
        first = (await own_world.open().snapshot()).revision
        for number in range(count):
            own_world.put(f"10.5.{number % 256}.0-24", value(f"192.0.2.{number % 250}"))
        seen: list[int] = []
        revision = first
        while len(seen) < count:
            # Whoever was told a revision may go on from it, with another store too.
            batch = await own_world.open().wait(revision)
            seen += [event.lease.revision for event in batch.events if isinstance(event, Put)]
            assert batch.revision == seen[-1], (batch.revision, seen[-1], len(batch.events))
            revision = batch.revision
        assert seen == list(range(first + 1, first + 1 + count))

    run(main())


def test_many_events_in_one_batch_keep_their_order(etcd3_world: Etcd3World) -> None:
    async def main() -> None:
        store = etcd3_world.open()
        revision = (await store.snapshot()).revision
        for number in range(30):
            etcd3_world.put(str(A), value(f"192.0.2.{number}"))
        etcd3_world.remove(str(A))
        follower = Follower(store)
        while follower.table.revision < revision + 31:
            batch = await store.wait(max(revision, follower.table.revision))
            follower.table.apply(batch)
        assert follower.known() == {}

    run(main())


# Something else where etcd should be


@contextlib.asynccontextmanager
async def speaking(answer: bytes) -> AsyncIterator[str]:
    """A server that says this to whoever connects, and goes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await reader.read(1)
            writer.write(answer)
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


SETTINGS = bytes.fromhex("000000040000000000")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        bytes(range(256)) * 40,
        SETTINGS,
        # Settings, then a header block that is no HPACK.
        SETTINGS + bytes.fromhex("000004010500000001ffffffff"),
        # GOAWAY: enhance your calm.
        SETTINGS + bytes.fromhex("0000080700000000000000000b0000000b")[:17],
    ],
    ids=["nothing", "http1", "ssh", "rubbish", "settings", "hpack", "goaway"],
)
def test_what_is_no_etcd_is_unavailable_and_never_hangs(
    etcd3_world: Etcd3World, answer: bytes, run: Runner
) -> None:
    async def main() -> None:
        async with speaking(answer) as url:
            store = etcd3_world.open_at(url)
            calls: list[Any] = [store.snapshot(), store.create(A, ONE, 60), store.wait(1)]
            for call in calls:
                result = await outcome(call)
                assert isinstance(result, StoreUnavailable), repr(result)
                assert "timed out" not in str(result)
            assert url in str(await outcome(store.snapshot()))
            # The next endpoint is a good one: such a thing beside it hurts nobody.
            both = etcd3_world.open_at(url, etcd3_world.url)
            assert (await both.snapshot()).leases == ()

    run(main())


def test_name_that_does_not_resolve_is_named(etcd3_world: Etcd3World) -> None:
    async def main() -> None:
        result = await outcome(etcd3_world.open_at("http://no-such-host.invalid:1").snapshot())
        assert isinstance(result, StoreUnavailable)
        assert "no-such-host.invalid" in str(result)

    run(main())


def test_endpoint_that_takes_connections_and_is_silent(
    etcd3_world: Etcd3World, short_timeouts: None
) -> None:
    """A listen queue that nobody empties. What cannot have been done is tried on the next one."""

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as deaf:
            url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
            store = etcd3_world.open_at(url, etcd3_world.url)
            assert isinstance(await store.create(A, ONE, 60), Lease)

    run(main())
