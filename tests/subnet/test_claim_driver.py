"""The claim's driver: what acquiring returns and says, and that keeping obeys the machine.

The store is real, a file. How claims fare against etcd, its outages and each other is in
tests/store and tests/property.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from tests.wait import until
from tundp.backend.choose import parse_network_config
from tundp.errors import CloneAlive, DuplicateNode, LeaseError, LeaseLost
from tundp.lease.claim import LeaseState
from tundp.lease.codec import parse_key
from tundp.lease.identity import HOST, NODE, RUN, Identity
from tundp.lease.model import Lease, LeaseAttributes, LeaseKey, Snapshot
from tundp.store.file import FileStore
from tundp.subnet.claim_driver import Claim, ClaimSettings

OUR_IP, NEW_IP, THEIR_IP = (IPv4Address(f"192.0.2.{n}") for n in (1, 2, 9))
KEY = parse_key("10.5.1.0-24")
US = Identity("us", "host1")
OURS = {NODE: "us", HOST: "host1"}
THEM = {NODE: "them", HOST: "host9"}


async def no_pause(seconds: float) -> None:
    await asyncio.sleep(0)


def claim_on(store: Any, *, sleep: Any = no_pause, **options: Any) -> Claim:
    given: dict[str, Any] = {
        "network_config": parse_network_config('{"Network": "10.5.0.0/16"}', "test"),
        "attributes": LeaseAttributes(public_ip=OUR_IP),
        "lease_ttl_s": 600,
        "margin_s": 60,
        "previous": KEY,
        "identity": US,
    }
    return Claim(store, ClaimSettings(**(given | options)), rng=random.Random(1), sleep=sleep)


@asynccontextmanager
async def file_store(directory: Path) -> AsyncIterator[FileStore]:
    path = directory / "leases.json"
    if not path.exists():
        path.write_text("{}\n")
    store = FileStore(path)
    try:
        yield store
    finally:
        await store.close()


async def put(
    store: FileStore,
    extra: dict[str, str],
    *,
    key: str = str(KEY),
    ip: IPv4Address = OUR_IP,
) -> Lease:
    attributes = LeaseAttributes(public_ip=ip, extra=extra)
    return await store.create(parse_key(key), attributes, 600)


async def lease_in(store: FileStore, key: LeaseKey = KEY) -> Lease | None:
    snapshot = await store.snapshot()
    return next((lease for lease in snapshot.leases if lease.key == key), None)


@asynccontextmanager
async def kept(claim: Claim) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.ensure_future(claim.keep())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# Acquiring


@pytest.mark.parametrize("has_lease", [False, True], ids=["created", "kept"])
async def test_acquiring_returns_the_leases_as_they_are_now(
    tmp_path: Path, has_lease: bool
) -> None:
    """Ours as written; without those that were deleted on the way."""
    async with file_store(tmp_path) as store:
        if has_lease:
            await put(store, OURS)
        await put(store, THEM, key="10.5.2.0-24", ip=THEIR_IP)
        dead = await put(store, THEM, key="10.9.3.0-24")  # a duplicate, outside of the network
        await put(store, {}, key="10.5.9.0-24", ip=NEW_IP)
        lease, snapshot = await claim_on(store).acquire()
        assert lease in snapshot.leases
        assert {each.key: each.revision for each in snapshot.leases} == {
            each.key: each.revision for each in (await store.snapshot()).leases
        }
        assert dead.key not in {each.key for each in snapshot.leases}


async def test_acquiring_leaves_out_what_no_longer_fits_and_was_deleted(tmp_path: Path) -> None:
    async with file_store(tmp_path) as store:
        await put(store, OURS, key="10.9.1.0-24")
        lease, snapshot = await claim_on(store).acquire()
        assert snapshot.leases == (lease,)
        assert [each.key for each in (await store.snapshot()).leases] == [lease.key]


async def test_acquiring_says_what_it_waits_for(tmp_path: Path) -> None:
    async with file_store(tmp_path) as store:
        path = tmp_path / "leases.json"
        path.write_text("garbage")
        said: list[str] = []

        async def sleep(seconds: float) -> None:
            said.append(claim.waiting_for)
            path.write_text("{}\n")

        claim = claim_on(store, sleep=sleep)
        assert claim.waiting_for == ""
        await claim.acquire()
        assert len(said) == 1
        assert str(path) in said[0]
        assert claim.waiting_for == ""


async def test_acquiring_says_whose_answer_it_waits_for(tmp_path: Path) -> None:
    async with file_store(tmp_path) as store:
        await put(store, THEM)
        said: set[str] = set()

        async def sleep(seconds: float) -> None:
            said.add(claim.waiting_for)

        claim = claim_on(store, sleep=sleep)
        lease, _ = await claim.acquire()
        assert lease.key == KEY
        assert claim.origin == "taken over from node them (host host9)"
        assert said == {"an answer of node them (host host9) to the challenge in lease 10.5.1.0-24"}


async def test_acquiring_that_fails_waits_for_nothing_any_more(tmp_path: Path) -> None:
    async with file_store(tmp_path) as store:
        lease = await put(store, THEM)

        async def sleep(seconds: float) -> None:
            now = await lease_in(store)
            assert now is not None
            await store.update(KEY, lease.attributes, 600, revision=now.revision)

        claim = claim_on(store, sleep=sleep)
        with pytest.raises(DuplicateNode):
            await claim.acquire()
        assert claim.waiting_for == ""
        assert claim.state is LeaseState.LOST
        with pytest.raises(LeaseError, match="acquire"):
            claim.observe(None)


async def test_an_address_that_changes_while_acquiring_is_written_by_keeping(
    tmp_path: Path,
) -> None:
    async with file_store(tmp_path) as store:
        await put(store, THEM)

        async def sleep(seconds: float) -> None:
            claim.offer(LeaseAttributes(public_ip=NEW_IP))

        claim = claim_on(store, sleep=sleep)
        lease, _ = await claim.acquire()
        assert lease.attributes.public_ip == OUR_IP
        async with kept(claim):
            await until(
                lambda: claim.lease.attributes.public_ip == NEW_IP, "the new address written"
            )
        found = await lease_in(store)
        assert found is not None
        assert found.attributes.public_ip == NEW_IP


# Keeping


async def test_an_offer_is_written_and_keeps_what_others_wrote(tmp_path: Path) -> None:
    async with file_store(tmp_path) as store:
        await put(store, {**OURS, "Rack": "b7"})
        claim = claim_on(store)
        await claim.acquire()
        async with kept(claim):
            claim.offer(LeaseAttributes(public_ip=OUR_IP, backend_data={"VNI": 1}))
            await until(
                lambda: claim.lease.attributes.backend_data == {"VNI": 1}, "the offer written"
            )
            assert claim.lease.attributes.public_ip == OUR_IP
            assert claim.lease.attributes.extra == {**OURS, "Rack": "b7"}


async def test_a_resumed_claim_is_lost_until_the_store_has_it(tmp_path: Path) -> None:
    async with file_store(tmp_path) as store:
        claim = claim_on(store)
        claim.resume(KEY, NEW_IP)
        assert (claim.state, claim.lease.key) == (LeaseState.LOST, KEY)
        assert claim.expires_in_s is None
        assert claim.why == "the store has not been asked yet"
        async with kept(claim):
            await until(lambda: claim.state is LeaseState.HELD, "held")
        found = await lease_in(store)
        assert found is not None
        assert found.revision == claim.lease.revision


def resumed(store: FileStore, **options: Any) -> Claim:
    """The claim of a machine at NEW_IP, started from a lease cache that says OUR_IP."""
    options = {
        "identity": Identity("us", "host1", run="r2"),
        "attributes": LeaseAttributes(public_ip=NEW_IP),
    } | options
    claim = claim_on(store, **options)
    claim.resume(KEY, OUR_IP)
    return claim


@pytest.mark.parametrize("first", ["snapshot", "watch"])
@pytest.mark.parametrize("exits", [False, True], ids=["regains", "exits"])
async def test_a_clone_started_from_the_cache_writes_nothing_over_its_live_original(
    tmp_path: Path, first: str, exits: bool
) -> None:
    """The lease cache came with the image, and the clone has an address of its own."""
    async with file_store(tmp_path) as store, file_store(tmp_path) as second:
        original = claim_on(store, identity=Identity("us", "host1", run="r1"))
        await original.acquire()
        seen: set[IPv4Address] = set()
        async with kept(original):
            clone = resumed(second, exits_when_lost=exits, sleep=lambda _: asyncio.sleep(0.05))
            if first == "watch":
                clone.observe(await lease_in(store))
            async with kept(clone) as task:
                for _ in range(200):  # what each one's watch would show
                    found = await lease_in(store)
                    assert found is not None
                    seen.add(found.attributes.public_ip)
                    original.observe(found)
                    if task.done():
                        break
                    clone.observe(found)
                    assert clone.state is LeaseState.LOST
                    await asyncio.sleep(0.01)
                with pytest.raises(CloneAlive, match="is this machine a clone of it"):
                    await asyncio.wait_for(asyncio.shield(task), 20)
        found = await lease_in(store)
        assert found is not None
        assert seen | {found.attributes.public_ip} == {OUR_IP}
        assert original.state is LeaseState.HELD


async def test_a_node_that_moved_and_started_from_the_cache_gets_its_lease(tmp_path: Path) -> None:
    """Nobody answers: the process that wrote the lease was this machine's, and is gone."""
    async with file_store(tmp_path) as store:
        before = claim_on(store, identity=Identity("us", "host1", run="r1"))
        await before.acquire()
        said: set[str] = set()

        async def sleep(seconds: float) -> None:
            said.add(moved.why)
            said.add(moved.waiting_for)
            await asyncio.sleep(0)

        moved = resumed(store, sleep=sleep)
        async with kept(moved):
            await until(lambda: moved.state is LeaseState.HELD, "held")
        found = await lease_in(store)
        assert found is not None
        assert found.attributes.public_ip == NEW_IP
        assert found.attributes.extra == {**OURS, RUN: "r2"}
        assert any("asking whether another node has our node id" in each for each in said)
        assert moved.waiting_for == ""


async def test_a_challenge_of_the_cached_lease_survives_the_store(tmp_path: Path) -> None:
    """It fails in the middle of the challenge, and the lease is asked after again."""
    async with file_store(tmp_path) as store:
        await claim_on(store, identity=Identity("us", "host1", run="r1")).acquire()
        path = tmp_path / "leases.json"
        whole: list[str] = []

        async def sleep(seconds: float) -> None:
            if not whole:
                whole.append(path.read_text())
                path.write_text("garbage")
            elif path.read_text() == "garbage":
                path.write_text(whole[0])
            await asyncio.sleep(0)

        moved = resumed(store, sleep=sleep, retry_s=0.05)
        async with kept(moved):
            await until(lambda: whole != [], "the challenge")
            await until(lambda: "garbage" not in moved.why, "the failure")
            path.write_text(whole[0])
            await until(lambda: moved.state is LeaseState.HELD, "held")
        found = await lease_in(store)
        assert found is not None
        assert found.attributes.public_ip == NEW_IP


async def test_after_its_own_write_a_former_address_of_the_cache_is_a_clones(
    tmp_path: Path,
) -> None:
    """The original was cut off while it was asked, and writes its lease when it is back."""
    async with file_store(tmp_path) as store:
        await claim_on(store, identity=Identity("us", "host1", run="r1")).acquire()
        moved = resumed(store)
        async with kept(moved):
            await until(lambda: moved.state is LeaseState.HELD, "held")
            found = await lease_in(store)
            assert found is not None
            extra = {**OURS, RUN: "r1"}
            back = LeaseAttributes(public_ip=OUR_IP, extra=extra)
            written = await store.update(KEY, back, 600, revision=found.revision)
            moved.observe(written)
            await until(lambda: moved.state is LeaseState.CONFLICT, "conflict")
            await asyncio.sleep(0.05)
        assert await lease_in(store) == replace(written, lease_ttl_s=ANY)


async def test_keeping_may_be_interrupted_during_a_write_and_goes_on(tmp_path: Path) -> None:
    class Hanging:
        """A store whose updates happen, and are never answered."""

        hangs = asyncio.Event()

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        async def update(self, *arguments: Any, **options: Any) -> Lease:
            lease = await store.update(*arguments, **options)
            self.hangs.set()
            await asyncio.Event().wait()
            return lease

    async with file_store(tmp_path) as store:
        hanging = Hanging()
        claim = claim_on(hanging)
        await claim.acquire()
        async with kept(claim):
            claim.offer(LeaseAttributes(public_ip=NEW_IP))
            await hanging.hangs.wait()
        claim._store = store
        async with kept(claim):
            await until(lambda: claim.lease.attributes.public_ip == NEW_IP, "written after all")
        assert claim.state is LeaseState.HELD


async def test_a_claim_that_exits_raises_once_the_store_says_the_lease_is_gone(
    tmp_path: Path,
) -> None:
    async with file_store(tmp_path) as store:
        claim = claim_on(store, exits_when_lost=True)
        lease, _ = await claim.acquire()
        async with kept(claim) as task:
            claim.observe(None)  # old news: the store still has it
            await until(lambda: claim.state is LeaseState.HELD, "held again")
            await store.delete(KEY, revision=lease.revision)
            claim.observe(None)
            with pytest.raises(LeaseLost, match=r"10\.5\.1\.0-24 is lost$"):
                await asyncio.wait_for(asyncio.shield(task), 20)


@pytest.mark.parametrize("host", ["host1", "host2"])
async def test_clones_with_one_address_do_not_write_against_each_other(
    tmp_path: Path, host: str
) -> None:
    """One node id, one PublicIP, and perhaps another host name: each sees its own lease."""
    async with file_store(tmp_path) as store, file_store(tmp_path) as second:
        one = claim_on(store)
        other = claim_on(second, identity=Identity("us", host))
        await one.acquire()
        await other.acquire()
        async with kept(one), kept(other):
            for _ in range(20):  # what each one's watch would show
                found = await lease_in(store)
                assert found is not None
                one.observe(found)
                other.observe(found)
                await asyncio.sleep(0.02)
        found = await lease_in(store)
        assert found is not None
        assert found.revision <= 4, "they write against each other"


@pytest.mark.parametrize("first", ["one", "other"])
async def test_of_two_processes_with_one_id_and_address_the_later_gives_way(
    tmp_path: Path, first: str
) -> None:
    """A clone behind the same NAT: only a live holder tells it from a restart."""
    async with file_store(tmp_path) as store, file_store(tmp_path) as second:
        one = claim_on(store, identity=Identity("us", "host1", run="r1"))
        other = claim_on(second, identity=Identity("us", "host1", run="r2"))
        before, after = (one, other) if first == "one" else (other, one)
        await before.acquire()
        async with kept(before):
            await after.acquire()
            async with kept(after) as task:
                for _ in range(100):  # what each one's watch would show
                    found = await lease_in(store)
                    assert found is not None
                    before.observe(found)
                    after.observe(found)
                    if task.done():
                        break
                    await asyncio.sleep(0.02)
                with pytest.raises(DuplicateNode, match="our node id and our PublicIP"):
                    await asyncio.wait_for(asyncio.shield(task), 20)
            found = await lease_in(store)
            assert found is not None
            before.observe(found)
            assert before.state is LeaseState.HELD
            assert found.revision <= 4, "a restart, its answer, and no more"


async def test_a_restart_is_answered_by_nobody(tmp_path: Path) -> None:
    async with file_store(tmp_path) as store:
        await claim_on(store, identity=Identity("us", "host1", run="r1")).acquire()
        again = claim_on(store, identity=Identity("us", "host1", run="r2"))
        await again.acquire()
        async with kept(again):
            found = await lease_in(store)
            assert found is not None
            again.observe(found)
            await asyncio.sleep(0.1)
            assert again.state is LeaseState.HELD
        found = await lease_in(store)
        assert found is not None
        assert found.revision == 2


class Slow(FileStore):
    """A store with so many leases that reading them all takes a tenth of a second."""

    looks = 0

    async def snapshot(self) -> Snapshot:
        self.looks += 1
        await asyncio.sleep(0.1)
        return await super().snapshot()


async def test_whoever_rewrites_leases_all_the_time_does_not_make_us_read_all_of_them(
    tmp_path: Path,
) -> None:
    """In CONFLICT each event of our own subnet calls for a look; looks have a pace."""
    (tmp_path / "leases.json").write_text("{}\n")
    store = Slow(tmp_path / "leases.json")
    try:
        claim = claim_on(store)
        lease, _ = await claim.acquire()
        theirs = LeaseAttributes(public_ip=THEIR_IP, extra=THEM)
        async with kept(claim):
            taken = await store.update(KEY, theirs, 600, revision=lease.revision)
            claim.observe(taken)
            await until(lambda: claim.state is LeaseState.CONFLICT)
            looked, began = store.looks, time.monotonic()
            for _ in range(100):
                claim.observe_gone_elsewhere()
                await asyncio.sleep(0.01)
            # One after the other they would be ten a second.
            assert store.looks - looked <= 2 + (time.monotonic() - began) / 0.4
            # The last event is looked at all the same, in time.
            await store.delete(KEY, revision=taken.revision)
            claim.observe(None)
            await until(lambda: claim.state is LeaseState.HELD)
    finally:
        await store.close()
