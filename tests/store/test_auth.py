"""etcd's users, roles and tokens change while a daemon runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from tests.store.locked import PASSWORD, Locked
from tests.store.support import Raw3, attributes, by_key, following, lease_key, outcome, run
from tests.wait import until
from tundp.daemon.stores import open_store
from tundp.errors import AccessDenied
from tundp.lab.etcd import PrivateEtcd
from tundp.lease.model import Lease
from tundp.settings.sources import load_settings
from tundp.store.etcd3 import login
from tundp.store.etcd3.words import AuthAnswer, auth_answer

A, B, C = (lease_key(f"10.5.{third}.0-24") for third in (1, 2, 3))
ONE, TWO = attributes("192.0.2.1"), attributes("192.0.2.2")


@pytest.fixture(scope="module")
def jwt(tmp_path_factory: pytest.TempPathFactory) -> str:
    """etcd's flag for JWTs, which outlive a restart and not a change of any user or role."""
    folder: Path = tmp_path_factory.mktemp("jwt")
    for command in ("genrsa -out priv.pem 2048", "rsa -in priv.pem -pubout -out pub.pem"):
        argv = ["openssl", *command.split()]
        subprocess.run(argv, cwd=folder, check=True, capture_output=True)
    keys = f"pub-key={folder}/pub.pem,priv-key={folder}/priv.pem"
    return f"--auth-token=jwt,{keys},sign-method=RS256,ttl=2h"


@pytest.fixture(params=["simple", "jwt"])
def locked(
    request: pytest.FixtureRequest, start_etcd: Callable[..., PrivateEtcd]
) -> Iterator[Locked]:
    """Authentication is on, with either kind of token."""
    extra = ["--bcrypt-cost=4"]
    if request.param == "jwt":
        extra.append(request.getfixturevalue("jwt"))
    with contextlib.closing(Locked(start_etcd(extra=extra))) as locked:
        yield locked


def logins(locked: Locked) -> int:
    return locked.world.raw.counts().get("Authenticate", 0)


def test_role_added_while_a_daemon_runs(locked: Locked, caplog: pytest.LogCaptureFixture) -> None:
    """A JWT is older than the change then, and no request with it succeeds before its end."""
    caplog.set_level(logging.INFO)

    async def main() -> None:
        store = locked.open()
        lease = await store.create(A, ONE, 600)
        async with following(store) as follower:
            for number in range(2):
                locked.world.raw.call("auth/role/add", name=f"anything-{number}")
                locked.login()
                locked.world.put(str(B), f'{{"PublicIP":"192.0.2.{number}"}}')
                before = logins(locked)
                lease = await store.update(A, TWO, 600, revision=lease.revision)
                await store.snapshot()
                assert logins(locked) - before <= 1
                await until(
                    lambda number=number: follower.known().get(str(B)) == f"192.0.2.{number}"
                )
            # A watch begun with such a token, too.
            locked.world.raw.call("auth/role/add", name="anything-else")
            locked.login()
            store.reconnect()
            locked.world.put(str(C), '{"PublicIP":"192.0.2.3"}')
            await until(lambda: str(C) in follower.known())
        assert [entry.message for entry in caplog.records if "denies" in entry.message] == []

    run(main())


def test_role_revoked_and_granted_again_while_a_daemon_runs(locked: Locked) -> None:
    async def main() -> None:
        store = locked.open()
        lease = await store.create(A, ONE, 600)
        async with following(store) as follower:
            locked.world.raw.call("auth/user/revoke", name="tundp", role="tundp")
            locked.login()
            before = logins(locked)
            for _ in range(5):
                result = await outcome(store.update(A, TWO, 600, revision=lease.revision))
                assert isinstance(result, AccessDenied), repr(result)
            # A JWT is too old now; what comes in its place is refused for what it is.
            assert logins(locked) - before <= 1
            locked.world.raw.call("auth/user/grant", user="tundp", role="tundp")
            locked.login()
            await store.update(A, TWO, 600, revision=lease.revision)
            await until(lambda: follower.known() == {str(A): "192.0.2.2"})

    run(main())


def test_password_changed_while_a_daemon_runs(
    locked: Locked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused with a reason, and not asked about again and again; mended in etcd, it goes on."""
    monkeypatch.setattr(login, "REFUSED_FIRST_S", 2.0)

    async def main() -> None:
        store = locked.open()
        lease = await store.create(A, ONE, 600)
        locked.world.raw.call("auth/user/changepw", name="tundp", password="another")
        await locked.etcd.stop()
        await locked.etcd.start()
        locked.login()

        async def is_denied() -> bool:
            return isinstance(await outcome(store.snapshot()), AccessDenied)

        await until(is_denied)
        before = logins(locked)
        for _ in range(50):
            error = await outcome(store.update(A, TWO, 600, revision=lease.revision))
            assert isinstance(error, AccessDenied)
            assert "--etcd-password; they were accepted before" in str(error)
            assert PASSWORD not in str(error)
        assert logins(locked) - before <= 2
        locked.world.raw.call("auth/user/changepw", name="tundp", password=PASSWORD)

        async def is_written() -> bool:
            return isinstance(
                await outcome(store.update(A, TWO, 600, revision=lease.revision)), Lease
            )

        await until(is_written, "the lease to be written again", poll_s=0.5)

    run(main())


def settings_file(path: Path, url: str, password: str) -> None:
    """Written as an operator or an agent does: replaced, or edited in place."""
    path.write_text(
        f'etcd-endpoints = ["{url}"]\netcd-api = "v3"\n'
        f'etcd-username = "tundp"\netcd-password = "{password}"\n'
    )


def test_a_password_changed_in_the_settings_file_too(
    locked: Locked, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """First in etcd, then in the file of --config: no restart is needed."""
    caplog.set_level(logging.INFO)
    path = tmp_path / "tundp.toml"
    settings_file(path, locked.etcd.url, PASSWORD)

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            store = open_store(load_settings([f"--config={path}"], {}))
            stack.push_async_callback(store.close)
            lease = await store.create(A, ONE, 600)
            locked.world.raw.call("auth/user/changepw", name="tundp", password="second secret")
            locked.login()

            async def is_denied() -> bool:
                return isinstance(await outcome(store.snapshot()), AccessDenied)

            await until(is_denied)
            error = await outcome(store.snapshot())
            assert f"write the new ones to {path}, which is read at each login" in str(error)
            settings_file(path, locked.etcd.url, "second secret")

            async def is_written() -> bool:
                found = await outcome(store.update(A, TWO, 600, revision=lease.revision))
                return isinstance(found, Lease)

            await until(is_written, "the new password to be used", poll_s=0.2)

    run(main())
    text = "\n".join(caplog.messages)
    assert f"user or password has changed in {path}" in text
    assert "second secret" not in text


def test_authentication_disabled_and_enabled_again_while_a_daemon_runs(locked: Locked) -> None:
    async def main() -> None:
        store = locked.open()
        await store.create(A, ONE, 600)
        async with following(store) as follower:
            for number, key in enumerate((B, C)):
                locked.world.raw.call("auth/disable")
                locked.world.raw.close()
                locked.world.raw = Raw3(locked.etcd.url)
                await store.snapshot()
                locked.world.raw.call("auth/enable")
                locked.login()
                before = logins(locked)
                await asyncio.gather(*(store.snapshot() for _ in range(8)))
                await store.create(key, TWO, 600)
                assert logins(locked) - before <= 1
                await until(lambda number=number: len(follower.known()) == 2 + number)
            assert not follower.outage.is_on
        assert by_key((await store.snapshot()).leases)[str(A)] == "192.0.2.1"

    run(main())


def test_writes_denied_again_and_again_cost_no_logins(locked: Locked) -> None:
    async def main() -> None:
        reader = locked.open("reader")
        await reader.snapshot()
        before = logins(locked)
        for _ in range(20):
            assert isinstance(await outcome(reader.create(A, ONE, 600)), AccessDenied)
        assert logins(locked) == before

    run(main())


@pytest.mark.parametrize(
    ("status", "message", "answer"),
    [
        (Status.UNAUTHENTICATED, "etcdserver: invalid auth token", AuthAnswer.LOG_IN),
        (Status.UNAUTHENTICATED, None, AuthAnswer.LOG_IN),
        (Status.INVALID_ARGUMENT, "etcdserver: revision of auth store is old", AuthAnswer.LOG_IN),
        (Status.UNKNOWN, "auth: revision in header is old", AuthAnswer.LOG_IN),
        (Status.UNKNOWN, "auth: invalid auth token", AuthAnswer.LOG_IN),
        (Status.INVALID_ARGUMENT, "etcdserver: user name is empty", AuthAnswer.LOG_IN),
        (Status.FAILED_PRECONDITION, "etcdserver: user name not found", AuthAnswer.LOG_IN),
        (Status.PERMISSION_DENIED, "etcdserver: permission denied", AuthAnswer.DENIED),
        (
            Status.UNKNOWN,
            "rpc error: code = PermissionDenied desc = etcdserver: permission denied",
            AuthAnswer.DENIED,
        ),
        (
            Status.UNKNOWN,
            "rpc error: code = Unauthenticated desc = etcdserver: invalid auth token",
            AuthAnswer.LOG_IN,
        ),
        (Status.UNAVAILABLE, "etcdserver: no leader", None),
        (Status.NOT_FOUND, "etcdserver: requested lease not found", None),
        (Status.RESOURCE_EXHAUSTED, "etcdserver: too many requests", None),
    ],
)
def test_answer_of_etcd(status: Status, message: str | None, answer: AuthAnswer | None) -> None:
    """Words and status codes of etcd 3.4 to 3.6, of calls and of the reasons of a watch."""
    assert auth_answer(GRPCError(status, message)) is answer
