"""The challenge: a dead holder's lease may be taken, a live one's never is.

The store is real, a file; time is the test's: each pause of the challenger is a step of a
story in which the other node answers, goes away, or does nothing.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from tundp.errors import Conflict, DuplicateNode
from tundp.lease.codec import parse_key
from tundp.lease.identity import CHALLENGE, HOST, NODE, Identity
from tundp.lease.model import Lease, LeaseAttributes
from tundp.store.file import FileStore
from tundp.subnet.challenge import CHALLENGE_S, Challenger

OUR_IP, THEIR_IP = IPv4Address("192.0.2.1"), IPv4Address("192.0.2.9")
KEY, OTHER_KEY = parse_key("10.5.1.0-24"), parse_key("10.5.2.0-24")
US = Identity("us", "host1")
THEM = {NODE: "them", HOST: "host9"}
TOKEN = "5" * 16
THE_CLONE = {NODE: "us", HOST: "host2"}


@dataclass
class Pauses:
    """The challenger's sleep: instant, counted, and with something happening in the n-th."""

    happening: dict[int, Callable[[], Awaitable[Any]]] = field(default_factory=dict)
    slept: list[float] = field(default_factory=list)

    async def __call__(self, seconds: float) -> None:
        self.slept.append(seconds)
        happening = self.happening.get(len(self.slept))
        if happening is not None:
            await happening()


@dataclass
class Story:
    store: FileStore
    path: Path
    pauses: Pauses = field(default_factory=Pauses)
    waits: list[str] = field(default_factory=list)

    def challenger(self, **options: Any) -> Challenger:
        return Challenger(
            store=self.store,
            token=TOKEN,
            lease_ttl_s=600,
            sleep=self.pauses,
            report=self.waits.append,
            **({"identity": US} | options),
        )

    async def put(
        self, extra: dict[str, str], ip: IPv4Address = OUR_IP, key: Any = KEY, ttl: int | None = 600
    ) -> Lease:
        return await self.store.create(key, LeaseAttributes(public_ip=ip, extra=extra), ttl)

    async def rewrite(self, extra: dict[str, str], ip: IPv4Address = OUR_IP) -> None:
        """The holder, or anybody, writes the lease as it is now."""
        (lease,) = (await self.store.snapshot()).leases
        attributes = LeaseAttributes(public_ip=ip, extra=extra)
        await self.store.update(lease.key, attributes, 600, revision=lease.revision)

    async def remove(self) -> None:
        (lease,) = (await self.store.snapshot()).leases
        await self.store.delete(lease.key, revision=lease.revision)

    def extra(self) -> dict[str, Any]:
        return dict(json.loads(self.path.read_text())["leases"][str(KEY)])


@asynccontextmanager
async def story(directory: Path) -> AsyncIterator[Story]:
    path = directory / "leases.json"
    path.write_text("{}\n")
    store = FileStore(path)
    try:
        yield Story(store, path)
    finally:
        await store.close()


async def test_a_holder_that_does_not_answer_in_time_is_dead(tmp_path: Path) -> None:
    async with story(tmp_path) as told:
        lease = await told.put(THEM)
        asked = await told.challenger().require_dead_or_ours(lease, OUR_IP)
        assert asked.revision > lease.revision
        assert asked.attributes.extra == {**THEM, CHALLENGE: TOKEN}
        assert sum(told.pauses.slept) == pytest.approx(CHALLENGE_S)
        # The next guarded write takes it.
        await told.store.update(KEY, asked.attributes, 600, revision=asked.revision)
        assert told.waits == [
            "an answer of node them (host host9) to the challenge in lease 10.5.1.0-24"
        ]


@pytest.mark.parametrize("pause", [1, 20, 32])
async def test_a_holder_that_renews_is_alive(tmp_path: Path, pause: int) -> None:
    async with story(tmp_path) as told:
        lease = await told.put(THEM)
        told.pauses.happening[pause] = lambda: told.rewrite(THEM)
        with pytest.raises(DuplicateNode) as caught:
            await told.challenger().require_dead_or_ours(lease, OUR_IP)
        for part in ("192.0.2.1 belongs to node them (host host9)", "this is node us", "--iface"):
            assert part in str(caught.value)
        assert len(told.pauses.slept) == pause
        assert CHALLENGE not in told.extra()


async def test_a_live_clone_is_named_as_one(tmp_path: Path) -> None:
    """Our node id at another address: ours from before we moved, or a clone's."""
    async with story(tmp_path) as told:
        lease = await told.put(THE_CLONE, ip=THEIR_IP)
        told.pauses.happening[3] = lambda: told.rewrite(THE_CLONE, ip=THEIR_IP)
        with pytest.raises(DuplicateNode, match=r"our node id us .*host host2.* a clone of it\?"):
            await told.challenger().require_dead_or_ours(lease, OUR_IP)


async def test_our_own_lease_from_before_we_moved_is_ours_in_the_end(tmp_path: Path) -> None:
    async with story(tmp_path) as told:
        lease = await told.put({NODE: "us", HOST: "host1"}, ip=THEIR_IP)
        asked = await told.challenger().require_dead_or_ours(lease, OUR_IP)
        assert asked.revision > lease.revision
        assert sum(told.pauses.slept) == pytest.approx(CHALLENGE_S)


async def test_a_lease_that_goes_away_is_no_answer(tmp_path: Path) -> None:
    async with story(tmp_path) as told:
        lease = await told.put(THEM)
        told.pauses.happening[5] = told.remove
        with pytest.raises(Conflict, match="went away"):
            await told.challenger().require_dead_or_ours(lease, OUR_IP)


@pytest.mark.parametrize(("token", "goes_first"), [("4" * 16, True), ("6" * 16, False)])
async def test_of_two_challengers_the_lower_token_goes_on(
    tmp_path: Path, token: str, goes_first: bool
) -> None:
    """The other one waits until that challenge must be over, and starts again."""
    async with story(tmp_path) as told:
        lease = await told.put(THEM)
        told.pauses.happening[2] = lambda: told.rewrite({**THEM, CHALLENGE: token})
        with pytest.raises(Conflict, match="somebody else asks"):
            await told.challenger().require_dead_or_ours(lease, OUR_IP)
        assert (told.pauses.slept[-1] == CHALLENGE_S + 1) is goes_first


async def test_a_lease_written_since_it_was_read_is_not_challenged(tmp_path: Path) -> None:
    async with story(tmp_path) as told:
        lease = await told.put(THEM)
        await told.rewrite(THEM)
        with pytest.raises(Conflict):
            await told.challenger().require_dead_or_ours(lease, OUR_IP)
        assert CHALLENGE not in told.extra()


@pytest.mark.parametrize(
    ("extra", "ip", "options", "why"),
    [
        ({NODE: "us"}, OUR_IP, {}, "ours"),
        ({}, OUR_IP, {}, "of a stock flanneld, or by hand"),
        (THEM, OUR_IP, {"identity": None}, "we have no identity to ask for"),
        (THEM, OUR_IP, {"is_forced": True}, "--force-takeover"),
        (THE_CLONE, THEIR_IP, {"is_forced": True}, "--force-takeover"),
    ],
)
async def test_who_is_not_asked(
    tmp_path: Path, extra: dict[str, str], ip: IPv4Address, options: dict[str, Any], why: str
) -> None:
    async with story(tmp_path) as told:
        lease = await told.put(extra, ip=ip)
        assert await told.challenger(**options).require_dead_or_ours(lease, OUR_IP) == lease, why
        assert told.pauses.slept == []
        assert CHALLENGE not in told.extra()


async def test_leases_of_dead_duplicates_are_deleted_and_no_others(tmp_path: Path) -> None:
    async with story(tmp_path) as told:
        await told.put(THEM, key=OTHER_KEY)
        await told.put(THEM, key=parse_key("10.5.3.0-24"), ip=THEIR_IP)
        await told.put({}, key=parse_key("10.5.4.0-24"))
        await told.put({NODE: "us"}, key=parse_key("10.5.5.0-24"))
        await told.put(THEM, key=parse_key("10.5.6.0-24"), ttl=None)
        await told.put(THEM, key=KEY)
        snapshot = await told.store.snapshot()
        deleted = await told.challenger().delete_dead_duplicates(
            snapshot, kept=KEY, public_ip=OUR_IP
        )
        assert deleted == {OTHER_KEY}
        left = {str(lease.key) for lease in (await told.store.snapshot()).leases}
        assert left == {str(KEY)} | {f"10.5.{n}.0-24" for n in (3, 4, 5, 6)}


async def test_a_live_duplicate_keeps_its_lease(tmp_path: Path) -> None:
    async with story(tmp_path) as told:
        await told.put(THEM)
        told.pauses.happening[1] = lambda: told.rewrite(THEM)
        snapshot = await told.store.snapshot()
        with pytest.raises(DuplicateNode):
            await told.challenger().delete_dead_duplicates(snapshot, kept=None, public_ip=OUR_IP)
        assert told.extra()[NODE] == "them"


async def test_many_dead_duplicates_take_as_long_as_one(tmp_path: Path) -> None:
    async with story(tmp_path) as told:
        keys = [parse_key(f"10.5.{number}.0-24") for number in range(2, 42)]
        for key in keys:
            await told.put(THEM, key=key)
        snapshot = await told.store.snapshot()
        deleted = await told.challenger().delete_dead_duplicates(
            snapshot, kept=None, public_ip=OUR_IP
        )
        assert deleted == frozenset(keys)
        assert sum(told.pauses.slept) == pytest.approx(CHALLENGE_S)
        assert told.waits == [
            "an answer of 40 nodes to the challenge in lease 10.5.2.0-24, 10.5.3.0-24, 10.5.4.0-24"
            " and 37 more"
        ]


async def test_one_live_duplicate_among_dead_ones_is_found(tmp_path: Path) -> None:
    async with story(tmp_path) as told:
        for number in range(2, 12):
            await told.put(THEM, key=parse_key(f"10.5.{number}.0-24"))

        async def renew() -> None:
            lease = (await told.store.snapshot()).leases[7]
            attributes = LeaseAttributes(public_ip=OUR_IP, extra=THEM)
            await told.store.update(lease.key, attributes, 600, revision=lease.revision)

        told.pauses.happening[9] = renew
        with pytest.raises(DuplicateNode, match=r"10\.5\.9\.0-24"):
            await told.challenger().delete_dead_duplicates(
                await told.store.snapshot(), kept=None, public_ip=OUR_IP
            )
        assert len((await told.store.snapshot()).leases) == 10
