"""TLS and credentials: certificates made on the spot, a user with a role, and what goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.store.locked import PASSWORD, Locked
from tests.store.pki import Pki
from tests.store.support import (
    Etcd3World,
    EtcdWorld,
    Raw3,
    Runner,
    attributes,
    by_key,
    following,
    lease_key,
    make_claim,
    outcome,
    run,
)
from tests.wait import until
from tundp.errors import AccessDenied, StoreUnavailable, TundpError
from tundp.lab.etcd import PrivateEtcd
from tundp.store.base import Store

A, B, C = (lease_key(f"10.5.{third}.0-24") for third in (1, 2, 3))
ONE, TWO = attributes("192.0.2.1"), attributes("192.0.2.2")
AnyWorld = EtcdWorld | Etcd3World


@pytest.fixture(params=[EtcdWorld, Etcd3World], ids=["v2", "v3"])
def api(request: pytest.FixtureRequest) -> type[AnyWorld]:
    """Which API is spoken."""
    found: type[AnyWorld] = request.param
    return found


# Certificates


@pytest.fixture(scope="session")
def tls_etcd(pki: Pki, start_shared_etcd: Callable[..., PrivateEtcd]) -> PrivateEtcd:
    """https, open to everybody."""
    return start_shared_etcd(client_tls=pki.server("server"))


@pytest.fixture(scope="session")
def mutual_etcd(pki: Pki, start_shared_etcd: Callable[..., PrivateEtcd]) -> PrivateEtcd:
    """https, and clients must have a certificate of our CA."""
    return start_shared_etcd(client_tls=pki.server("server", client_ca="ca"))


@pytest.fixture(scope="session")
def misnamed_etcd(pki: Pki, start_shared_etcd: Callable[..., PrivateEtcd]) -> PrivateEtcd:
    """https with the certificate of another host."""
    return start_shared_etcd(client_tls=pki.server("elsewhere"))


@contextlib.contextmanager
def world_of(etcd: PrivateEtcd, api: type[AnyWorld]) -> Iterator[AnyWorld]:
    with contextlib.closing(api(etcd.plain_url)) as world:
        yield world


async def works(world: AnyWorld, url: str, **access: str) -> None:
    """All that a daemon does with a store."""
    world.set_config('{"Network": "10.5.0.0/16"}')
    store = world.open_at(url, **access)
    assert await store.network_config() == '{"Network": "10.5.0.0/16"}'
    async with following(store) as follower:
        lease, _ = await make_claim(store, "192.0.2.1").acquire()
        await until(lambda: str(lease.key) in follower.known())
        renewed = await store.update(lease.key, ONE, 600, revision=lease.revision)
        await store.delete(lease.key, revision=renewed.revision)
        world.put("10.6.1.0-24", '{"PublicIP":"192.0.2.9"}')
        await until(lambda: "10.6.1.0-24" in follower.known())
        await until(lambda: str(lease.key) not in follower.known())
        assert not follower.outage.is_on


async def fails(store: Store) -> list[BaseException]:
    """What each call raises; none may wait for its timeout, and none may succeed."""
    errors: list[BaseException] = []
    for call in (
        store.snapshot(),
        store.network_config(),
        store.create(A, ONE, 600),
        store.update(A, ONE, 600, revision=1),
        store.delete(A, revision=1),
        store.wait(1),
    ):
        result = await outcome(call)
        assert isinstance(result, StoreUnavailable | AccessDenied), repr(result)
        assert "timed out" not in str(result)
        errors.append(result)
    return errors


def test_ca_alone_is_enough(
    tls_etcd: PrivateEtcd, pki: Pki, api: type[AnyWorld], run: Runner
) -> None:
    """flannel ignores a CA without a client certificate."""
    with world_of(tls_etcd, api) as world:
        run(works(world, tls_etcd.url, **pki.access()))


def test_host_name_is_matched_with_the_certificate(
    tls_etcd: PrivateEtcd, pki: Pki, api: type[AnyWorld]
) -> None:
    url = tls_etcd.url.replace("127.0.0.1", "localhost")
    with world_of(tls_etcd, api) as world:
        run(works(world, url, **pki.access()))


def test_client_certificate(
    mutual_etcd: PrivateEtcd, pki: Pki, api: type[AnyWorld], run: Runner
) -> None:
    with world_of(mutual_etcd, api) as world:
        run(works(world, mutual_etcd.url, **pki.access(client="client")))


@pytest.mark.parametrize("ca", ["", "foreign-ca"], ids=["system roots", "foreign CA"])
def test_server_of_an_unknown_ca_is_not_trusted(
    tls_etcd: PrivateEtcd, pki: Pki, api: type[AnyWorld], ca: str
) -> None:
    async def main(world: AnyWorld) -> None:
        for error in await fails(world.open_at(tls_etcd.url, **pki.access(ca=ca))):
            assert tls_etcd.url in str(error)
            assert "certificate" in str(error)
            assert "local issuer" in str(error) or "self-signed" in str(error), str(error)

    with world_of(tls_etcd, api) as world:
        run(main(world))


def test_certificate_of_another_host_is_not_accepted(
    misnamed_etcd: PrivateEtcd, pki: Pki, api: type[AnyWorld]
) -> None:
    async def main(world: AnyWorld) -> None:
        for error in await fails(world.open_at(misnamed_etcd.url, **pki.access())):
            assert misnamed_etcd.url in str(error)
            assert "127.0.0.1" in str(error)
            assert "mismatch" in str(error) or "not valid for" in str(error), str(error)

    with world_of(misnamed_etcd, api) as world:
        run(main(world))


@pytest.mark.parametrize("client", ["", "stranger", "expired"])
def test_client_that_etcd_does_not_accept(
    mutual_etcd: PrivateEtcd, pki: Pki, api: type[AnyWorld], client: str
) -> None:
    """With TLS 1.3 the handshake is over for us before the server looks at our certificate."""

    async def main(world: AnyWorld) -> None:
        for error in await fails(world.open_at(mutual_etcd.url, **pki.access(client=client))):
            assert mutual_etcd.url in str(error)
            assert "certificate" in str(error), str(error)
        assert world.read(str(A)) is None

    with world_of(mutual_etcd, api) as world:
        run(main(world))


def test_http_to_an_https_port(tls_etcd: PrivateEtcd, api: type[AnyWorld]) -> None:
    async def main(world: AnyWorld) -> None:
        url = tls_etcd.url.replace("https", "http")
        for error in await fails(world.open_at(url)):
            assert isinstance(error, StoreUnavailable)
            assert url in str(error)

    with world_of(tls_etcd, api) as world:
        run(main(world))


def test_bad_endpoint_before_a_good_one(
    tls_etcd: PrivateEtcd, misnamed_etcd: PrivateEtcd, pki: Pki, api: type[AnyWorld]
) -> None:
    async def main(world: AnyWorld) -> None:
        store = world.open_at(misnamed_etcd.url, tls_etcd.url, **pki.access())
        await retried(store.create, A, ONE, 600)
        assert by_key((await store.snapshot()).leases) == {str(A): "192.0.2.1"}

    with world_of(tls_etcd, api) as world:
        run(main(world))


def test_key_of_another_certificate_is_a_config_error(
    tls_etcd: PrivateEtcd, pki: Pki, api: type[AnyWorld]
) -> None:
    access = pki.access(client="client") | {"keyfile": str(pki.key("server"))}

    async def main(world: AnyWorld) -> None:
        # At once, or with the first call: either way it names the files.
        with pytest.raises(TundpError) as caught:
            await world.open_at(tls_etcd.url, **access).snapshot()
        assert "client.pem" in str(caught.value)

    with world_of(tls_etcd, api) as world:
        run(main(world))


# Users and roles of the v3 API (those of v2 are in test_etcd2.py)


@pytest.fixture
def locked(start_etcd: Callable[..., PrivateEtcd]) -> Iterator[Locked]:
    """Authentication is on, and tokens are the simple ones that a restart forgets."""
    etcd = start_etcd(extra=("--bcrypt-cost=4", "--auth-token-ttl=1"))
    with contextlib.closing(Locked(etcd)) as locked:
        yield locked


def test_user_with_a_role(locked: Locked, run: Runner) -> None:
    async def main() -> None:
        await works_as_tundp(locked)

    run(main())


async def works_as_tundp(locked: Locked) -> None:
    store = locked.open()
    assert await store.network_config() == '{"Network": "10.5.0.0/16"}'
    async with following(store) as follower:
        lease, _ = await make_claim(store, "192.0.2.1").acquire()
        await until(lambda: str(lease.key) in follower.known())
        renewed = await store.update(lease.key, ONE, 600, revision=lease.revision)
        await store.delete(lease.key, revision=renewed.revision)
        await until(lambda: str(lease.key) not in follower.known())
        assert not follower.outage.is_on


@pytest.mark.parametrize(
    ("user", "password"),
    [("tundp", "wrong"), ("nobody", PASSWORD), ("", ""), ("stranger", PASSWORD)],
    ids=["wrong password", "unknown user", "no user", "user without a role"],
)
def test_who_may_nothing_is_told_so(locked: Locked, user: str, password: str) -> None:
    async def main() -> None:
        for error in await fails(locked.open(user, password)):
            assert isinstance(error, AccessDenied), repr(error)
            assert "--etcd-" in str(error) or "role" in str(error)
            assert not password or password not in str(error)
        store = locked.open(user, password)
        for _ in range(3):
            # Asked again, it must not become anything but that.
            assert isinstance(await outcome(store.snapshot()), AccessDenied)
            assert isinstance(await outcome(store.wait(5)), AccessDenied)

    run(main())


def test_reader_may_follow_and_not_write(locked: Locked) -> None:
    async def main() -> None:
        writer, reader = locked.open(), locked.open("reader")
        lease = await writer.create(A, ONE, 600)
        async with following(reader) as follower:
            for call in (
                reader.create(B, TWO, 600),
                reader.update(A, TWO, 600, revision=lease.revision),
                reader.delete(A, revision=lease.revision),
            ):
                result = await outcome(call)
                assert isinstance(result, AccessDenied), repr(result)
                assert locked.etcd.url in str(result)
            await writer.create(B, ONE, 600)
            await until(lambda: str(B) in follower.known())
            assert not follower.outage.is_on
        assert by_key((await reader.snapshot()).leases) == {
            str(A): "192.0.2.1",
            str(B): "192.0.2.1",
        }

    run(main())


def test_restart_forgets_tokens_and_nobody_notices(locked: Locked, run: Runner) -> None:
    """etcd keeps simple tokens in memory: each one given before is invalid after it."""

    async def main() -> None:
        store, idle = locked.open(), locked.open()
        lease = await store.create(A, ONE, 600)
        await idle.snapshot()
        async with following(store) as follower:
            for number in range(2):
                await locked.etcd.stop()
                await locked.etcd.start()
                lease = await retried(store.update, A, ONE, 600, revision=lease.revision)
                other = lease_key(f"10.5.{10 + number}.0-24")
                await retried(idle.create, other, TWO, 600)
                await until(lambda other=other: str(other) in follower.known())
                await until(lambda: not follower.outage.is_on)

    run(main())


def test_a_new_login_is_logged(
    locked: Locked, run: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> None:
        store = locked.open()
        await store.snapshot()
        await store.snapshot()
        assert "logged in" not in caplog.text
        await expire_tokens(locked)
        await store.snapshot()
        (line,) = [message for message in caplog.messages if "logged in again" in message]
        assert line.startswith(f"etcd at {locked.etcd.url}: logged in again as tundp")
        assert PASSWORD not in caplog.text

    run(main())


async def retried(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The result of a call that may find its connection gone, once."""
    result = await outcome(call(*arguments, **options))
    if isinstance(result, StoreUnavailable):
        result = await outcome(call(*arguments, **options))
    assert not isinstance(result, BaseException), repr(result)
    return result


def test_many_calls_at_once_with_a_token_that_is_no_longer_valid(locked: Locked) -> None:
    """Each of them finds out, and not one may undo the login of another."""

    async def main() -> None:
        store = locked.open()
        await store.create(A, ONE, 600)
        async with following(store) as follower:
            for number in range(3):
                await expire_tokens(locked)
                results = await asyncio.gather(*(outcome(store.snapshot()) for _ in range(8)))
                for result in results:
                    # Cut off by another's reconnecting at worst; never told to go away.
                    assert not isinstance(result, AccessDenied), repr(result)
                assert len((await store.snapshot()).leases) == 1 + number
                locked.login()
                key = f"10.5.{20 + number}.0-24"
                locked.world.put(key, '{"PublicIP":"192.0.2.9"}')
                await until(lambda key=key: key in follower.known())

    run(main())


async def expire_tokens(locked: Locked) -> None:
    """Until a token given now is refused, though its connection is as good as before."""
    raw = Raw3(locked.etcd.url, "root", PASSWORD)

    def is_refused() -> bool:
        status, _, _ = raw.request("POST", "/v3/kv/range", '{"key": "Pw=="}')
        return status != 200

    with contextlib.closing(raw):
        raw.call("kv/range", key="Pw==")
        # Asking keeps it alive: so not too often.
        await until(is_refused, poll_s=2.1)


def test_watch_outlives_its_token(locked: Locked) -> None:
    async def main() -> None:
        async with following(locked.open()) as follower:
            await expire_tokens(locked)
            locked.login()
            locked.world.put(str(A), '{"PublicIP":"192.0.2.1"}')
            await until(lambda: str(A) in follower.known())

    run(main())


def test_roles_changed_meanwhile_ask_for_a_new_login(locked: Locked) -> None:
    """etcd refuses a token older than the last change of any user or role."""

    async def main() -> None:
        store = locked.open()
        lease = await store.create(A, ONE, 600)
        locked.world.raw.call("auth/role/add", name="another")
        locked.login()
        lease = await store.update(A, TWO, 600, revision=lease.revision)
        locked.world.raw.call("auth/role/delete", role="another")
        locked.login()
        assert by_key((await store.snapshot()).leases) == {str(A): "192.0.2.2"}
        await store.delete(A, revision=lease.revision)

    run(main())


_TALK = """
import asyncio, logging, sys
from tundp.daemon import logs
from tundp.store.access import EtcdAccess
from tundp.store.etcd3 import Etcd3Store

url, prefix, user, password, is_set_up = sys.argv[1:]
if is_set_up == "yes":
    modules = "tundp=1,asyncio=1,grpclib=1,h2=1,hpack=1,hpack.hpack=1,hpack.table=1,urllib3=1"
    logs.set_up(9, modules, username=user, password=password)
else:
    logging.basicConfig(level=logging.DEBUG)

async def main():
    store = Etcd3Store(
        EtcdAccess(endpoints=(url,), prefix=prefix, username=user, password=password)
    )
    await store.snapshot()
    await store.snapshot()
    print(store._connection._login.token)
    await store.close()

asyncio.run(main())
"""


@pytest.mark.parametrize("is_set_up", ["yes", "no: the control, in which it is seen"])
def test_no_token_and_no_password_in_the_log(locked: Locked, is_set_up: str) -> None:
    access = (locked.etcd.url, locked.world.prefix, "tundp", PASSWORD)
    done = subprocess.run(
        [sys.executable, "-c", _TALK, *access, is_set_up],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    token = done.stdout.strip()
    assert len(token) > 16
    assert done.stderr
    is_seen = token in done.stderr or PASSWORD in done.stderr
    assert is_seen is (is_set_up != "yes")


def test_credentials_where_nobody_asks_for_them(etcd3_world: Etcd3World) -> None:
    """Authentication is off: a user in our flags is no reason to fail."""

    async def main() -> None:
        store = etcd3_world.open_at(etcd3_world.url, username="tundp", password="x")
        await store.create(A, ONE, 600)
        assert by_key((await store.snapshot()).leases) == {str(A): "192.0.2.1"}

    run(main())


def test_authentication_switched_on_and_off_while_we_run(
    start_etcd: Callable[..., PrivateEtcd],
) -> None:
    etcd = start_etcd(extra=("--bcrypt-cost=4",))

    async def main(locked: Locked) -> None:
        plain = locked.open("")
        store = locked.open()
        await store.create(A, ONE, 600)
        assert isinstance(await outcome(plain.snapshot()), AccessDenied)
        locked.world.raw.call("auth/disable")
        assert by_key((await plain.snapshot()).leases) == {str(A): "192.0.2.1"}
        await store.create(B, TWO, 600)
        locked.world.raw.close()
        locked.world.raw = Raw3(etcd.url)
        locked.world.raw.call("auth/enable")
        await store.create(C, TWO, 600)
        assert isinstance(await outcome(plain.snapshot()), AccessDenied)
        assert len((await store.snapshot()).leases) == 3

    with contextlib.closing(Locked(etcd)) as locked:
        run(main(locked))


def test_user_and_client_certificate_together(
    start_etcd: Callable[..., PrivateEtcd], pki: Pki
) -> None:
    etcd = start_etcd(client_tls=pki.server("server", client_ca="ca"), extra=("--bcrypt-cost=4",))

    async def main(world: Etcd3World) -> None:
        access = pki.access(client="client")
        store = world.open_at(etcd.url, username="root", password=PASSWORD, **access)
        await store.create(A, ONE, 600)
        async with following(store) as follower:
            await store.create(B, TWO, 600)
            await until(lambda: str(B) in follower.known())
        wrong = world.open_at(etcd.url, username="root", password="wrong", **access)
        assert isinstance(await outcome(wrong.snapshot()), AccessDenied)

    with contextlib.closing(Etcd3World(etcd.plain_url)) as world:
        raw = world.raw
        raw.call("auth/user/add", name="root", password=PASSWORD)
        raw.call("auth/role/add", name="root")
        raw.call("auth/user/grant", user="root", role="root")
        raw.call("auth/enable")
        run(main(world))
