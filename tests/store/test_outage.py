"""etcd stopped, killed, stuck, wiped or out of reach, and answers that get lost: both APIs."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import warnings
from collections.abc import Callable, Iterator

import pytest
from urllib3 import Timeout

from tests.stopped import stop
from tests.store.support import (
    Etcd3World,
    EtcdWorld,
    Runner,
    attributes,
    background,
    by_key,
    following,
    forwarder,
    lease_key,
    make_claim,
    outcome,
    run,
)
from tests.wait import until
from tundp.errors import Compacted, StoreUnavailable
from tundp.lab.etcd import PrivateEtcd, free_port
from tundp.lease.claim import LeaseState
from tundp.lease.model import Lease
from tundp.store.access import EtcdAccess
from tundp.store.etcd2 import connection as etcd2

A, B = lease_key("10.5.1.0-24"), lease_key("10.5.2.0-24")
ONE, TWO = attributes("192.0.2.1"), attributes("192.0.2.2")
AnyWorld = EtcdWorld | Etcd3World


@pytest.fixture(params=[EtcdWorld, Etcd3World], ids=["v2", "v3"])
def api(request: pytest.FixtureRequest) -> Callable[..., AnyWorld]:
    """Which API is spoken."""
    found: Callable[..., AnyWorld] = request.param
    return found


@pytest.fixture
def etcd(start_etcd: Callable[..., PrivateEtcd]) -> PrivateEtcd:
    """An etcd that the test may stop."""
    return start_etcd()


@pytest.fixture
def own_world(etcd: PrivateEtcd, api: Callable[..., AnyWorld]) -> Iterator[AnyWorld]:
    with contextlib.closing(api(etcd.url, "/coreos.com/network")) as world:
        yield world


@pytest.fixture
def shared_world(etcd_url: str, api: Callable[..., AnyWorld]) -> Iterator[AnyWorld]:
    with contextlib.closing(api(etcd_url)) as world:
        yield world


@pytest.fixture
def dead_url() -> Iterator[str]:
    """Nobody listens there: the port is taken, and refuses connections."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"


def test_stopped_etcd_is_named_and_works_again(
    etcd: PrivateEtcd, own_world: AnyWorld, run: Runner
) -> None:
    async def main() -> None:
        store = own_world.open()
        created = await store.create(A, ONE, 600)
        async with following(store) as follower:
            await etcd.stop()
            for call in (
                store.snapshot(),
                store.network_config(),
                store.create(B, TWO, 600),
                store.update(A, TWO, 600, revision=created.revision),
                store.delete(A, revision=created.revision),
            ):
                with pytest.raises(StoreUnavailable) as caught:
                    await call
                assert etcd.url in str(caught.value)
                assert "connection refused" in str(caught.value)
            await until(lambda: follower.outage.is_on)
            assert follower.known() == {str(A): "192.0.2.1"}
            await etcd.start()
            assert by_key((await store.snapshot()).leases) == {str(A): "192.0.2.1"}
            await store.create(B, TWO, 600)
            await until(lambda: str(B) in follower.known())
            assert not follower.outage.is_on

    run(main())


def test_changes_during_an_outage_are_seen_after_it(etcd: PrivateEtcd, own_world: AnyWorld) -> None:
    """Our watch is cut off, etcd and the others go on."""

    async def main() -> None:
        own_world.put(str(A), '{"PublicIP":"192.0.2.1"}')
        async with (
            forwarder(etcd.url) as proxy,
            following(own_world.open_at(proxy.url)) as follower,
        ):
            await proxy.cut()
            await until(lambda: follower.outage.is_on)
            own_world.put(str(A), '{"PublicIP":"192.0.2.3"}')
            own_world.put(str(B), '{"PublicIP":"192.0.2.2"}')
            await proxy.mend()
            expected = {str(A): "192.0.2.3", str(B): "192.0.2.2"}
            await until(lambda: follower.known() == expected)

    run(main())


def test_wiped_etcd_is_noticed_and_not_slept_through(
    etcd: PrivateEtcd, own_world: AnyWorld
) -> None:
    """An index from before the wipe is one that the new etcd reaches in a week, or never."""

    async def main() -> None:
        for number in range(30):
            own_world.put(f"10.5.{number}.0-24", '{"PublicIP":"192.0.2.1"}')
        store = own_world.open()
        revision = (await store.snapshot()).revision
        async with following(own_world.open()) as follower:
            assert len(follower.known()) == 30
            await etcd.stop()
            etcd.wipe()
            await etcd.start()
            with pytest.raises(Compacted):
                await store.wait(revision)
            own_world.put(str(B), '{"PublicIP":"192.0.2.2"}')
            await until(lambda: follower.known() == {str(B): "192.0.2.2"})

    run(main())


def test_wiped_and_refilled_etcd_is_read_anew(
    etcd: PrivateEtcd, own_world: AnyWorld, api: Callable[..., AnyWorld]
) -> None:
    """The new etcd has passed the old index before we are back: nothing in it tells."""

    async def main() -> None:
        own_world.put(str(A), '{"PublicIP":"192.0.2.1"}')
        async with following(own_world.open()) as follower:
            assert follower.known() == {str(A): "192.0.2.1"}
            await etcd.stop()
            await until(lambda: follower.outage.is_on)
            etcd.wipe()
            # Refilled before any of us can reach it, by way of another port.
            port, etcd._port = etcd._port, free_port()
            await etcd.start()
            other = api(etcd.url, own_world.prefix)
            with contextlib.closing(other.raw):
                for number in range(30):
                    other.put(str(B), f'{{"PublicIP":"192.0.2.{number}"}}')
            await etcd.stop()
            etcd._port = port
            await etcd.start()
            await until(lambda: not follower.outage.is_on)
            own_world.put("10.5.3.0-24", '{"PublicIP":"192.0.2.3"}')
            expected = {str(B): "192.0.2.29", "10.5.3.0-24": "192.0.2.3"}
            await until(lambda: "10.5.3.0-24" in follower.known())
            assert follower.known() == expected

    run(main())


def test_etcd_restored_from_a_backup_is_read_anew(etcd: PrivateEtcd, own_world: AnyWorld) -> None:
    """Same cluster, older revision: a watch from the newer one would sleep until it is back."""

    async def main() -> None:
        own_world.put(str(A), '{"PublicIP":"192.0.2.1"}')
        own_world.put(str(B), '{"PublicIP":"192.0.2.2"}')
        await etcd.stop()
        etcd.save()
        await etcd.start()
        own_world.remove(str(A))
        for number in range(30):
            own_world.put(str(B), f'{{"PublicIP":"192.0.2.{number}"}}')
        store = own_world.open()
        revision = (await store.snapshot()).revision
        async with following(own_world.open()) as follower:
            assert follower.known() == {str(B): "192.0.2.29"}
            await etcd.stop()
            etcd.restore()
            await etcd.start()
            with pytest.raises(Compacted):
                await store.wait(revision)
            restored = {str(A): "192.0.2.1", str(B): "192.0.2.2"}
            await until(lambda: follower.known() == restored)
            own_world.put(str(A), '{"PublicIP":"192.0.2.3"}')
            await until(lambda: follower.known()[str(A)] == "192.0.2.3")

    run(main())


def test_killed_etcd_fails_calls_at_once(
    etcd: PrivateEtcd, own_world: AnyWorld, endless_waits: None
) -> None:
    async def main() -> None:
        store = own_world.open()
        revision = (await store.snapshot()).revision
        async with background(outcome(store.wait(revision))) as waiting:
            await asyncio.sleep(0.1)
            await etcd.stop(signal.SIGKILL)
            for result in (await waiting, await outcome(store.snapshot())):
                assert isinstance(result, StoreUnavailable), repr(result)
                assert "timed out" not in str(result)
        await etcd.start()
        assert (await store.snapshot()).leases == ()

    run(main())


def test_stuck_etcd_fails_calls_in_time(
    etcd: PrivateEtcd, own_world: AnyWorld, short_timeouts: None
) -> None:
    """It accepts connections and answers nothing, as does a host that swaps itself to death."""

    async def main() -> None:
        reader, writer, watcher = (own_world.open() for _ in range(3))
        revision = (await reader.snapshot()).revision
        stop(etcd.pid)
        async with background(outcome(watcher.wait(revision))) as waiting:
            results = await asyncio.gather(
                outcome(reader.snapshot()), outcome(writer.create(A, ONE, 600))
            )
            for result in results:
                assert isinstance(result, StoreUnavailable), repr(result)
                assert f"{etcd.url}: timed out" in str(result)
            waiting.cancel()
            await asyncio.wait([waiting])
        os.kill(etcd.pid, signal.SIGCONT)
        # The create may have been done late: acquiring looks, and finds or makes it.
        lease, _ = await make_claim(writer, "192.0.2.1", previous=A).acquire()
        assert by_key((await reader.snapshot()).leases) == {str(lease.key): "192.0.2.1"}
        assert lease.key == A

    run(main())


def test_stuck_etcd_does_not_hold_up_the_end_of_the_loop(
    etcd: PrivateEtcd, own_world: AnyWorld, endless_waits: None
) -> None:
    async def main() -> None:
        store = own_world.open()
        await store.snapshot()
        stop(etcd.pid)
        call = asyncio.ensure_future(store.snapshot())
        await asyncio.sleep(0.1)
        call.cancel()

    run(main())


def test_hung_endpoint_is_left_for_the_next(shared_world: AnyWorld, short_timeouts: None) -> None:
    """A read goes on to the next one by itself; a write may have been done, and says so."""

    async def main() -> None:
        async with forwarder(shared_world.url) as proxy:
            store = shared_world.open_at(proxy.url, shared_world.url)
            lease = await store.create(A, ONE, 600)
            proxy.hang()
            assert by_key((await store.snapshot()).leases) == {str(A): "192.0.2.1"}
            writer = shared_world.open_at(proxy.url, shared_world.url)
            result = await outcome(writer.update(A, TWO, 600, revision=lease.revision))
            if not isinstance(result, Lease):
                assert isinstance(result, StoreUnavailable)
                result = await writer.update(A, TWO, 600, revision=lease.revision)
            assert by_key((await store.snapshot()).leases) == {str(A): "192.0.2.2"}

    run(main())


def test_watch_on_an_etcd_that_hangs_is_noticed(
    etcd: PrivateEtcd, own_world: AnyWorld, short_timeouts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing comes from it, as on any quiet day: only asking tells the two apart."""
    monkeypatch.setattr(etcd2, "WATCH_TIMEOUT", Timeout(connect=1.0, read=1.0))

    async def main() -> None:
        own_world.put(str(A), '{"PublicIP":"192.0.2.1"}')
        async with following(own_world.open()) as follower:
            stop(etcd.pid)
            await until(lambda: follower.outage.is_on)
            assert follower.known() == {str(A): "192.0.2.1"}
            os.kill(etcd.pid, signal.SIGCONT)
            own_world.put(str(B), '{"PublicIP":"192.0.2.2"}')
            await until(lambda: str(B) in follower.known())
            await until(lambda: not follower.outage.is_on)

    run(main())


def test_watch_through_an_endpoint_that_hangs_moves_to_the_next(
    shared_world: AnyWorld, short_timeouts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd2, "WATCH_TIMEOUT", Timeout(connect=1.0, read=1.0))

    async def main() -> None:
        async with (
            forwarder(shared_world.url) as proxy,
            following(shared_world.open_at(proxy.url, shared_world.url)) as follower,
        ):
            proxy.hang()
            shared_world.put(str(A), '{"PublicIP":"192.0.2.1"}')
            await until(lambda: str(A) in follower.known())
            shared_world.put(str(B), '{"PublicIP":"192.0.2.2"}')
            await until(lambda: str(B) in follower.known())

    run(main())


# Several endpoints


def test_dead_first_endpoint_is_passed_over(
    shared_world: AnyWorld, dead_url: str, run: Runner
) -> None:
    async def main() -> None:
        store = shared_world.open_at(dead_url, shared_world.url)
        await store.create(A, ONE, 600)
        assert by_key((await store.snapshot()).leases) == {str(A): "192.0.2.1"}
        async with following(shared_world.open_at(dead_url, shared_world.url)) as follower:
            shared_world.put(str(B), '{"PublicIP":"192.0.2.2"}')
            await until(lambda: str(B) in follower.known())

    run(main())


@pytest.mark.parametrize("dead_first", [True, False])
def test_endpoints_that_were_all_dead_are_all_tried_again(
    etcd: PrivateEtcd, own_world: AnyWorld, dead_url: str, dead_first: bool
) -> None:
    """python-etcd takes each dead one off its list, and then has none."""

    async def main() -> None:
        urls = (dead_url, etcd.url) if dead_first else (etcd.url, dead_url)
        store = own_world.open_at(*urls)
        await store.create(A, ONE, 600)
        await etcd.stop()
        for _ in range(5):
            with pytest.raises(StoreUnavailable) as caught:
                await store.snapshot()
            assert etcd.url in str(caught.value)
            assert dead_url in str(caught.value)
        await etcd.start()
        assert by_key((await store.snapshot()).leases) == {str(A): "192.0.2.1"}
        assert isinstance(await store.create(B, TWO, 60), Lease)

    run(main())


def test_ipv6_endpoint(
    start_etcd: Callable[..., PrivateEtcd], api: Callable[..., AnyWorld]
) -> None:
    ipv6_world = api(start_etcd("[::1]").url)
    assert ipv6_world.url.startswith("http://[::1]:")

    async def main() -> None:
        store = ipv6_world.open()
        await store.create(A, ONE, 600)
        async with following(store) as follower:
            ipv6_world.put(str(B), '{"PublicIP":"192.0.2.2"}')
            await until(lambda: str(B) in follower.known())
        assert ipv6_world.url in store.description

    with contextlib.closing(ipv6_world):
        run(main())


def test_unreachable_endpoints_are_named_with_the_reason(
    shared_world: AnyWorld, dead_url: str
) -> None:
    async def main() -> None:
        store = shared_world.open_at(dead_url)
        with pytest.raises(StoreUnavailable) as caught:
            await store.snapshot()
        assert str(caught.value) == f"etcd does not answer: {dead_url}: connection refused"
        with pytest.raises(StoreUnavailable):
            await store.wait(5)

    run(main())


def test_https_to_a_plain_etcd_is_unavailable(shared_world: AnyWorld) -> None:
    async def main() -> None:
        url = shared_world.url.replace("http://", "https://")
        with pytest.raises(StoreUnavailable) as caught:
            await shared_world.open_at(url).snapshot()
        assert url in str(caught.value)
        assert "timed out" not in str(caught.value)

    run(main())


# An answer that never arrives


def test_create_whose_answer_is_lost_is_not_repeated(shared_world: AnyWorld) -> None:
    """Repeated, it would say that somebody else has the subnet: ourselves."""

    async def main() -> None:
        async with forwarder(shared_world.url) as proxy:
            store = shared_world.open_at(proxy.url, shared_world.url)
            proxy.answers_to_lose = 1
            with pytest.raises(StoreUnavailable, match=proxy.url):
                await store.create(A, ONE, 600)
            assert proxy.lost == 1
            found = shared_world.read(str(A))
            assert found is not None
            assert found[0]["PublicIP"] == "192.0.2.1"

    run(main())


def test_claim_finds_the_lease_whose_answer_was_lost(shared_world: AnyWorld) -> None:
    async def main() -> None:
        async with forwarder(shared_world.url) as proxy:
            proxy.answers_to_lose = 1
            claim = make_claim(shared_world.open_at(proxy.url), "192.0.2.1")
            lease, _ = await claim.acquire()
            assert proxy.lost == 1
            assert claim.state is LeaseState.HELD
            snapshot = await shared_world.open().snapshot()
            assert by_key(snapshot.leases) == {str(lease.key): "192.0.2.1"}
            assert snapshot.leases[0].revision == lease.revision

    run(main())


def test_renewal_whose_answer_is_lost_keeps_the_lease(
    shared_world: AnyWorld, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with forwarder(shared_world.url) as proxy:
            claim = make_claim(shared_world.open_at(proxy.url), "192.0.2.1", lease_ttl_s=2)
            lease, _ = await claim.acquire()
            proxy.answers_to_lose = 1
            async with background(claim.keep()):
                await until(lambda: proxy.lost and claim.lease.revision > lease.revision)
            assert claim.state is LeaseState.HELD
            assert claim.lease.key == lease.key
            assert " lost: " not in caplog.text

    run(main())


def test_password_shows_nowhere(shared_world: AnyWorld, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    access = EtcdAccess(endpoints=(shared_world.url,), prefix="/x", username="u", password="s3cret")
    assert "s3cret" not in repr(access)

    async def main() -> None:
        store = shared_world.open_at(shared_world.url, username="u", password="s3cret")
        await outcome(store.snapshot())
        assert "s3cret" not in store.description

    run(main())
    assert "s3cret" not in caplog.text


def test_cancelled_and_failed_calls_leave_no_socket_open(
    shared_world: AnyWorld, dead_url: str
) -> None:
    async def main() -> None:
        store = shared_world.open()
        for _ in range(3):
            revision = (await store.snapshot()).revision
            waiting = asyncio.ensure_future(store.wait(revision))
            await asyncio.sleep(0.05)
            waiting.cancel()
            await asyncio.wait([waiting])
        await outcome(store.wait(10**9))
        await store.close()
        dead = shared_world.open_at(dead_url)
        await outcome(dead.snapshot())
        await outcome(dead.wait(1))
        await dead.close()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        run(main())
        gc.collect()
    assert [str(warning.message) for warning in caught] == []
