"""Every etcd lease that is granted ends on a key, or is revoked, whatever interrupts the write."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from tests.store.locked import Locked
from tests.store.support import (
    Etcd3World,
    EtcdWorld,
    acquired,
    attributes,
    following,
    forwarder,
    lease_key,
    make_claim,
    make_node,
    outcome,
    run,
)
from tests.wait import until
from tundp.backend.choose import parse_network_config
from tundp.errors import AccessDenied, DuplicateNode, StoreError, StoreUnavailable
from tundp.lab.etcd import PrivateEtcd
from tundp.lease.identity import Identity
from tundp.lease.model import Lease, LeaseAttributes
from tundp.store.both import BothStore
from tundp.store.etcd3 import grants

A, B = lease_key("10.5.1.0-24"), lease_key("10.5.2.0-24")
ONE, TWO = attributes("192.0.2.1"), attributes("192.0.2.2")
TTL_S = 86400


@pytest.fixture
def etcd(start_etcd: Callable[..., PrivateEtcd]) -> PrivateEtcd:
    return start_etcd()


@pytest.fixture
def world(etcd: PrivateEtcd) -> Iterator[Etcd3World]:
    """An etcd of its own: all etcd leases there are, are ours."""
    with contextlib.closing(Etcd3World(etcd.url)) as world:
        yield world


def on_keys(world: Etcd3World) -> set[str]:
    """The etcd leases that keys hang on."""
    found = {each["etcd_lease"] for each in world.raw.list(world.path(""))}
    return found - {"0"}


async def nothing_is_left(world: Etcd3World, keys: int) -> None:
    """Wait until there are `keys` etcd leases, and each has a key."""
    await until(
        lambda: world.raw.etcd_leases() == on_keys(world),
        f"{keys} etcd leases, all of them on keys",
        deadline_s=15,
    )
    assert len(on_keys(world)) == keys


# Restarts and takeovers


@pytest.mark.parametrize("ttl_s", [[TTL_S], [TTL_S, 3600]], ids=["one TTL", "TTL changed"])
def test_restarts(world: Etcd3World, ttl_s: list[int]) -> None:
    async def main() -> None:
        for number in range(10):
            store = world.open()
            claim = make_claim(store, "192.0.2.1", lease_ttl_s=ttl_s[number % len(ttl_s)])
            await acquired(claim)
            await store.close()
        await nothing_is_left(world, 1)
        assert world.raw.ttl_of(on_keys(world).pop()) <= ttl_s[-1]

    run(main())


def test_restarts_in_both_apis(world: Etcd3World, etcd: PrivateEtcd) -> None:
    async def main(v2: EtcdWorld) -> None:
        for _ in range(3):
            store = BothStore(v2.open(), world.open(), parse=parse_network_config)
            await acquired(make_claim(store, "192.0.2.1"))
            await store.close()
        await nothing_is_left(world, 1)

    with contextlib.closing(EtcdWorld(etcd.url, world.prefix)) as v2:
        run(main(v2))


def test_taking_over_from_a_stock_flanneld(world: Etcd3World) -> None:
    async def main() -> None:
        world.put(str(A), '{"PublicIP":"192.0.2.1"}', ttl=TTL_S)
        before = on_keys(world)
        lease = await acquired(make_claim(world.open(), "192.0.2.1"))
        assert lease.key == A
        await nothing_is_left(world, 1)
        assert on_keys(world) != before

    run(main())


@pytest.mark.parametrize("is_ours", [True, False], ids=["granted by us", "by a stock flanneld"])
def test_etcd_lease_that_another_key_hangs_on_is_left_alone(
    world: Etcd3World, is_ours: bool
) -> None:
    async def main() -> None:
        store = world.open()
        if is_ours:
            await store.create(A, ONE, TTL_S)
        else:
            world.put(str(A), '{"PublicIP":"192.0.2.1"}', ttl=TTL_S)
        (shared,) = on_keys(world)
        world.raw.call("kv/put", key="b3RoZXI=", value="", lease=shared)  # other
        (lease,) = (await store.snapshot()).leases
        for _ in range(3):
            lease = await store.update(A, ONE, TTL_S, revision=lease.revision)
        await store.delete(A, revision=lease.revision)
        await store.close()
        await until(lambda: world.raw.etcd_leases() == {shared}, deadline_s=15)
        assert world.raw.get("other") is not None

    run(main())


def test_challenges(world: Etcd3World) -> None:
    """Of a live holder, which answers and keeps its lease."""
    ours, theirs = Identity("1" * 32), Identity("2" * 32)

    async def main() -> None:
        node = make_node(world.open(), "192.0.2.1", identity=ours)
        async with node.up():
            for _ in range(5):
                store = world.open()
                claim = make_claim(store, "192.0.2.1", identity=theirs, challenge_s=20)
                with pytest.raises(DuplicateNode):
                    await claim.acquire()
                await store.close()
            await nothing_is_left(world, 1)

    run(main())


def test_challenge_that_nobody_answers(world: Etcd3World) -> None:
    ours, theirs = Identity("1" * 32), Identity("2" * 32)

    async def main() -> None:
        for _ in range(2):
            for identity in (ours, theirs):
                store = world.open()
                options = {"identity": identity, "challenge_s": 0.1}
                await acquired(make_claim(store, "192.0.2.1", **options))
                await store.close()
        await nothing_is_left(world, 1)

    run(main())


# Writes that are refused, lost or interrupted


def test_denied_writes(start_etcd: Callable[..., PrivateEtcd]) -> None:
    async def main(locked: Locked) -> None:
        reader, writer = locked.open("reader"), locked.open()
        lease = await writer.create(A, ONE, TTL_S)
        for _ in range(10):
            for call in (
                reader.create(B, TWO, TTL_S),
                reader.update(A, TWO, TTL_S, revision=lease.revision),
            ):
                assert isinstance(await outcome(call), AccessDenied)
        await nothing_is_left(locked.world, 1)

    with contextlib.closing(Locked(start_etcd(extra=["--bcrypt-cost=4"]))) as locked:
        run(main(locked))


@pytest.mark.parametrize("is_new", [True, False], ids=["create", "update"])
def test_answer_to_a_write_is_lost(world: Etcd3World, is_new: bool) -> None:
    async def main() -> None:
        async with forwarder(world.url) as proxy:
            store = world.open_at(proxy.url)
            lease = None if is_new else await store.create(A, ONE, TTL_S)
            proxy.answers_to_lose = 1
            result = await outcome(
                store.create(A, TWO, TTL_S)
                if lease is None
                else store.update(A, TWO, TTL_S, revision=lease.revision)
            )
            assert isinstance(result, StoreUnavailable)
            assert proxy.lost == 1
            # It did happen. The next look finds out.
            (found,) = (await store.snapshot()).leases
            assert found.attributes.public_ip == TWO.public_ip
            await nothing_is_left(world, 1)
            await store.update(A, ONE, TTL_S, revision=found.revision)
            await nothing_is_left(world, 1)

    run(main())


def test_write_cancelled_at_every_step(world: Etcd3World, monkeypatch: pytest.MonkeyPatch) -> None:
    # A grant may be carried out after we looked for it; the next process waits before it revokes.
    monkeypatch.setattr(grants, "UNSURE_S", 0.0)

    async def main() -> None:
        steps = 0
        is_over = False
        while not is_over:
            store = world.open()
            found = (await store.snapshot()).leases
            coroutine: Awaitable[Lease] = (
                store.update(A, ONE, TTL_S, revision=found[0].revision)
                if found
                else store.create(A, ONE, TTL_S)
            )
            task = asyncio.ensure_future(coroutine)
            for _ in range(steps):
                await asyncio.sleep(0)
            is_over = task.done()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await store.close()
            steps += 1
            await asyncio.sleep(0.01)
        assert steps > 5
        await nothing_is_left(world, 1)

    run(main())


_KILLED = """
import asyncio, os, signal, sys
from ipaddress import IPv4Address
from tundp.lease.codec import parse_key
from tundp.lease.model import LeaseAttributes
from tundp.store.access import EtcdAccess
from tundp.store.etcd3 import Etcd3Store

url, prefix, revision = sys.argv[1:]

async def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

async def main():
    store = Etcd3Store(EtcdAccess(endpoints=(url,), prefix=prefix))
    store._transact = die
    key, attributes = parse_key("10.5.1.0-24"), LeaseAttributes(public_ip=IPv4Address("192.0.2.1"))
    if int(revision):
        await store.update(key, attributes, 86400, revision=int(revision))
    else:
        await store.create(key, attributes, 86400)

asyncio.run(main())
"""


def test_killed_between_grant_and_write(world: Etcd3World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next process that writes the key knows what the killed one was about to do."""
    monkeypatch.setattr(grants, "UNSURE_S", 1.0)

    async def main() -> None:
        revision = 0
        for keys in (0, 1):
            before = len(world.raw.etcd_leases())
            for number in range(3):
                argv = [sys.executable, "-c", _KILLED, world.url, world.prefix, str(revision)]
                killed = await asyncio.to_thread(
                    subprocess.run, argv, capture_output=True, check=False, timeout=60
                )
                assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
                assert len(world.raw.etcd_leases()) == before + 1 + number
            store = world.open()
            lease = (
                await store.update(A, ONE, TTL_S, revision=revision)
                if keys
                else await store.create(A, ONE, TTL_S)
            )
            revision = lease.revision
            await nothing_is_left(world, 1)

    run(main())


@pytest.mark.parametrize("other", [ONE, TWO], ids=["a clone", "another node"])
def test_revokes_nothing_that_another_is_about_to_write_with(
    world: Etcd3World, other: LeaseAttributes
) -> None:
    """Two create the same lease at once; the slow one still has its etcd lease when it writes."""

    async def main() -> None:
        slow, fast = world.open(), world.open()
        transact, may_write = slow._transact, asyncio.Event()

        async def wait_first(*arguments: Any) -> Any:
            await may_write.wait()
            return await transact(*arguments)

        slow._transact = wait_first  # type: ignore[method-assign, assignment]
        task = asyncio.ensure_future(slow.create(A, ONE, TTL_S))
        await until(world.raw.etcd_leases)
        lease = await fast.create(A, other, TTL_S)
        await asyncio.sleep(1)  # for it to revoke what it would
        await fast.delete(A, revision=lease.revision)
        await asyncio.sleep(0.3)
        may_write.set()
        await task
        assert [each.key for each in (await slow.snapshot()).leases] == [A]
        await nothing_is_left(world, 1)

    run(main())


def test_etcd_restarted_between_grant_and_write(world: Etcd3World, etcd: PrivateEtcd) -> None:
    async def main() -> None:
        store = world.open()
        lease = await store.create(A, ONE, TTL_S)
        inner = store._transact
        is_first = True

        async def restart(*arguments: Any) -> Any:
            nonlocal is_first
            if is_first:
                is_first = False
                await etcd.stop()
                await etcd.start()
            return await inner(*arguments)

        store._transact = restart  # type: ignore[method-assign, assignment]

        async def is_written() -> bool:
            result = await outcome(store.update(A, TWO, TTL_S, revision=lease.revision))
            assert isinstance(result, Lease | StoreUnavailable), result
            return isinstance(result, Lease)

        await until(is_written)
        await nothing_is_left(world, 1)

    run(main())


def test_key_deleted_and_made_again(world: Etcd3World) -> None:
    async def main() -> None:
        store = world.open()
        for _ in range(3):
            await store.create(A, ONE, TTL_S)
            world.remove(str(A))
        await store.create(A, ONE, TTL_S)
        await nothing_is_left(world, 1)
        # By somebody else in our place, and seen by the watch only.
        async with following(store) as follower:
            world.put(str(A), '{"PublicIP":"192.0.2.9"}', ttl=TTL_S)
            await until(lambda: follower.known() == {str(A): "192.0.2.9"})
            await nothing_is_left(world, 1)
            world.remove(str(A))
            await until(lambda: follower.known() == {})
            assert on_keys(world) == set()

    run(main())


def test_what_could_not_be_revoked_is_revoked_later(world: Etcd3World) -> None:
    async def main() -> None:
        async with forwarder(world.url) as proxy:
            store = world.open_at(proxy.url)
            await store.create(A, ONE, TTL_S)
            world.remove(str(A))
            await proxy.cut()
            assert isinstance(await outcome(store.snapshot()), StoreUnavailable)
            store._grants.unused(int(next(iter(world.raw.etcd_leases()))))
            await asyncio.sleep(0.3)
            assert len(world.raw.etcd_leases()) == 1
            await proxy.mend()
            await until(lambda: succeeds(store.snapshot))
            await nothing_is_left(world, 0)

    run(main())


async def succeeds(call: Callable[[], Any]) -> bool:
    return not isinstance(await outcome(call()), BaseException)


def test_write_that_was_never_sent(world: Etcd3World, monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer, and the key stays as it was: revoked once the write cannot happen any more."""
    monkeypatch.setattr(grants, "UNSURE_S", 0.5)

    async def main() -> None:
        store = world.open()

        async def fail(*_: Any) -> Any:
            raise StoreUnavailable("the connection was lost")

        store._transact = fail  # type: ignore[method-assign, assignment]
        assert isinstance(await outcome(store.create(A, ONE, TTL_S)), StoreUnavailable)
        assert len(world.raw.etcd_leases()) == 1
        await nothing_is_left(world, 0)

    run(main())


@pytest.mark.parametrize("times", [1, 2, 3])
def test_an_etcd_lease_that_is_gone_before_its_write_is_no_outage(
    world: Etcd3World, times: int
) -> None:
    """Etcd answers "requested lease not found": the write is tried again with another one."""

    async def main() -> None:
        # The second endpoint serves nobody: going there would be an outage.
        store = world.open_at(world.url, "http://127.0.0.1:1")
        left = 0
        grant = store._grants.grant

        async def grant_and_revoke(*arguments: Any) -> tuple[int, int]:
            nonlocal left
            granted = await grant(*arguments)
            if left:
                left -= 1
                world.raw.call("lease/revoke", ID=str(granted[0]))
            return granted

        store._grants.grant = grant_and_revoke  # type: ignore[method-assign, assignment]
        left = times
        if times == 3:
            with pytest.raises(StoreError, match=rf"{world.url}: requested lease not found") as got:
                await store.create(A, ONE, TTL_S)
            assert not isinstance(got.value, StoreUnavailable)
            assert (await store.snapshot()).leases == ()
        lease = await store.create(A, ONE, TTL_S)
        left = times if times < 3 else 0
        await store.update(A, TWO, TTL_S, revision=lease.revision)
        assert store._connection._endpoints.current.url == world.url
        await nothing_is_left(world, 1)

    run(main())
