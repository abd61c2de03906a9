"""The etcd store where etcd, the network or an operator misbehaves. Real etcds throughout."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from urllib3 import Timeout

from tests.store.support import (
    EtcdWorld,
    Follower,
    Raw,
    Runner,
    attributes,
    background,
    by_key,
    following,
    lease_key,
    make_claim,
    outcome,
    run,
)
from tests.wait import until
from tundp.daemon.stores import open_store
from tundp.errors import AccessDenied, Compacted, ConfigError, ConfigNotFound, StoreUnavailable
from tundp.lab.etcd import PrivateEtcd, free_port
from tundp.lease.model import Events
from tundp.settings.sources import load_settings
from tundp.store.access import REQUEST_TIMEOUT_S, EtcdAccess, parse_endpoints
from tundp.store.etcd2 import Etcd2Store
from tundp.store.etcd2 import connection as etcd2

A, B = lease_key("10.5.1.0-24"), lease_key("10.5.2.0-24")
ONE, TWO = attributes("192.0.2.1"), attributes("192.0.2.2")
HISTORY = 1000
"""Events that etcd's v2 API remembers, of all keys together."""
TIMEOUT_S = REQUEST_TIMEOUT_S + 2


@pytest.fixture
def etcd(start_etcd: Callable[..., PrivateEtcd]) -> PrivateEtcd:
    """An etcd that the test may stop."""
    return start_etcd()


@pytest.fixture
def own_world(etcd: PrivateEtcd) -> Iterator[EtcdWorld]:
    with contextlib.closing(EtcdWorld(etcd.url, "/coreos.com/network")) as world:
        yield world


# What goes over the wire


def test_lease_on_the_wire_is_flannels(etcd_world: EtcdWorld) -> None:
    async def main() -> None:
        store = etcd_world.open()
        created = await store.create(A, ONE, 86400)
        answer = etcd_world.raw.get(f"{etcd_world.prefix}/subnets/10.5.1.0-24")
        node = answer["node"]
        assert node["value"] == '{"PublicIP":"192.0.2.1","PublicIPv6":null}'
        assert 86390 < node["ttl"] <= 86400
        assert "expiration" in node
        assert node["modifiedIndex"] == created.revision
        updated = await store.update(A, TWO, 86400, revision=created.revision)
        node = etcd_world.raw.get(f"{etcd_world.prefix}/subnets/10.5.1.0-24")["node"]
        assert node["value"] == '{"PublicIP":"192.0.2.2","PublicIPv6":null}'
        assert 86390 < node["ttl"] <= 86400
        assert node["modifiedIndex"] == updated.revision

    run(main())


def test_dual_stack_key_on_the_wire_is_flannels(etcd_world: EtcdWorld) -> None:
    async def main() -> None:
        await etcd_world.open().create(lease_key("10.5.1.0-24&fd00:5:1::-64"), ONE, 60)
        (node,) = etcd_world.raw.get(f"{etcd_world.prefix}/subnets")["node"]["nodes"]
        assert node["key"] == f"{etcd_world.prefix}/subnets/10.5.1.0-24&fd00:5:1::-64"

    run(main())


def test_claims_lease_lasts_a_day_on_the_wire(etcd_world: EtcdWorld) -> None:
    async def main() -> None:
        lease, _ = await make_claim(etcd_world.open(), "192.0.2.1").acquire()
        node = etcd_world.raw.get(etcd_world.path(str(lease.key)))["node"]
        assert node["value"] == '{"PublicIP":"192.0.2.1","PublicIPv6":null}'
        assert 86390 < node["ttl"] <= 86400

    run(main())


def test_events_we_cause_are_such_as_flannel_can_read(etcd_world: EtcdWorld) -> None:
    """flannel takes compareAndDelete for a written lease, chokes on its empty value, and its
    watch then repeats that one event until a thousand others have followed."""

    async def main() -> None:
        store = etcd_world.open()
        created = await store.create(A, ONE, 600)
        subnets = f"{etcd_world.prefix}/subnets"
        assert etcd_world.raw.action_after(subnets, created.revision - 1) == "create"
        updated = await store.update(A, TWO, 600, revision=created.revision)
        assert etcd_world.raw.action_after(subnets, created.revision) == "compareAndSwap"
        await store.delete(A, revision=updated.revision)
        index = updated.revision
        await until(lambda: etcd_world.read(str(A)) is None)
        while (action := etcd_world.raw.action_after(subnets, index)) == "compareAndSwap":
            index += 1
        assert action in ("delete", "expire")

    run(main())


@pytest.mark.parametrize(
    "spelling", ["//{0}//network/", "{0}/network", "/{0}/network", "/{0}/network///"]
)
def test_prefix_is_cleaned_as_flannel_cleans_it(etcd_world: EtcdWorld, spelling: str) -> None:
    first = etcd_world.prefix.split("/")[1]

    async def main() -> None:
        store = etcd_world.open_at(etcd_world.url, prefix=spelling.format(first))
        etcd_world.set_config('{"Network": "10.5.0.0/16"}')
        assert await store.network_config() == '{"Network": "10.5.0.0/16"}'
        await store.create(A, ONE, 60)
        assert etcd_world.read(str(A)) is not None
        assert by_key((await store.snapshot()).leases) == {str(A): "192.0.2.1"}
        assert store.description == f"etcd v2 at {etcd_world.url}/{first}/network"

    run(main())


@pytest.mark.parametrize("prefix", ["/a/../b", "/./a", "/a?b=c", "/a#b", "/a%2fb"])
def test_prefix_that_would_end_the_url_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigError, match="--etcd-prefix"):
        Etcd2Store(EtcdAccess(endpoints=("http://127.0.0.1:1",), prefix=prefix))


def test_config_that_is_a_directory_is_not_found(etcd_world: EtcdWorld) -> None:
    etcd_world.raw.make_directory(f"{etcd_world.prefix}/config")

    async def main() -> None:
        with pytest.raises(ConfigNotFound, match="directory"):
            await etcd_world.open().network_config()

    run(main())


# Rubbish under the prefix that only etcd can have


@pytest.mark.parametrize("content", [None, "rubbish", "10.5.99.0-24"])
def test_directory_where_a_lease_should_be_is_one_bad_entry(
    etcd_world: EtcdWorld, run: Runner, content: str | None
) -> None:
    directory = etcd_world.path("10.5.9.0-24")
    etcd_world.raw.make_directory(directory)
    if content is not None:
        etcd_world.raw.put(f"{directory}/{content}", '{"PublicIP":"192.0.2.9"}')

    async def main() -> None:
        store = etcd_world.open()
        await store.create(A, ONE, 600)
        snapshot = await store.snapshot()
        assert by_key(snapshot.leases) == {str(A): "192.0.2.1"}
        # The directory, or what lies in it: some sign of it, and no lease.
        assert {entry.name.split("/")[0] for entry in snapshot.bad} == {"10.5.9.0-24"}

    run(main())


def test_directories_while_following_hurt_nothing(etcd_world: EtcdWorld, run: Runner) -> None:
    async def main() -> None:
        async with following(etcd_world.open()) as follower:
            directory = etcd_world.path("10.5.9.0-24")
            etcd_world.raw.make_directory(directory)
            etcd_world.raw.put(f"{directory}/10.5.99.0-24", '{"PublicIP":"192.0.2.9"}')
            etcd_world.put(str(A), '{"PublicIP":"192.0.2.1"}')
            await until(lambda: str(A) in follower.known())
            assert follower.known() == {str(A): "192.0.2.1"}
            etcd_world.raw.delete(directory)
            etcd_world.put(str(B), '{"PublicIP":"192.0.2.2"}')
            await until(lambda: str(B) in follower.known())
            assert follower.known() == {str(A): "192.0.2.1", str(B): "192.0.2.2"}
            assert not follower.outage.is_on

    run(main())


def test_a_directory_keeps_no_node_from_claiming(etcd_world: EtcdWorld) -> None:
    etcd_world.raw.make_directory(etcd_world.path("10.5.42.0-24"))

    async def main() -> None:
        previous = lease_key("10.5.42.0-24")
        lease, _ = await make_claim(etcd_world.open(), "192.0.2.1", previous=previous).acquire()
        assert lease.key != previous

    run(main())


def test_all_leases_removed_at_once_are_all_gone(etcd_world: EtcdWorld, run: Runner) -> None:
    async def main() -> None:
        for number in range(5):
            etcd_world.put(f"10.5.{number}.0-24", f'{{"PublicIP":"192.0.2.{number}"}}')
        async with following(etcd_world.open()) as follower:
            assert len(follower.known()) == 5
            etcd_world.raw.delete(f"{etcd_world.prefix}/subnets")
            await until(lambda: not follower.known())

    run(main())


# Lost history


def flood(world: EtcdWorld, count: int = HISTORY + 100) -> None:
    for number in range(count):
        world.raw.put(f"{world.prefix}-elsewhere/key", str(number))


def test_more_events_than_etcd_keeps_end_in_a_snapshot(etcd_world: EtcdWorld, run: Runner) -> None:
    async def main() -> None:
        store = etcd_world.open()
        lease = await store.create(A, ONE, 600)
        gone = await store.create(B, TWO, 600)
        follower = Follower(store)
        snapshot = await store.snapshot()
        follower.table.apply(snapshot)
        await store.update(A, TWO, 600, revision=lease.revision)
        await store.delete(B, revision=gone.revision)
        flood(etcd_world)
        with pytest.raises(Compacted):
            await store.wait(snapshot.revision)
        follower.table.apply(await store.snapshot())
        assert follower.known() == {str(A): "192.0.2.2"}
        # From here the watch goes on.
        async with background(outcome(store.wait(follower.table.revision))) as waiting:
            etcd_world.put(str(B), '{"PublicIP":"192.0.2.3"}')
            await until(waiting.done)
            assert isinstance(waiting.result(), Events)

    run(main())


def test_quiet_leases_in_a_busy_etcd_are_still_followed(
    etcd_world: EtcdWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The history is of all keys: others' writes push ours out, though nothing changed."""
    monkeypatch.setattr(etcd2, "WATCH_TIMEOUT", Timeout(connect=5.0, read=0.3))

    async def main() -> None:
        etcd_world.put(str(A), '{"PublicIP":"192.0.2.1"}')
        async with following(etcd_world.open()) as follower:
            await asyncio.to_thread(flood, etcd_world)
            first = len(follower.updates)
            await until(lambda: len(follower.updates) > first + 1)
            etcd_world.put(str(B), '{"PublicIP":"192.0.2.2"}')
            await until(lambda: str(B) in follower.known())
            assert follower.known() == {str(A): "192.0.2.1", str(B): "192.0.2.2"}
            assert not follower.outage.is_on

    run(main())


def test_a_watch_that_times_out_without_events_goes_on_from_its_revision(
    etcd_world: EtcdWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd2, "WATCH_TIMEOUT", Timeout(connect=5.0, read=0.2))

    async def main() -> None:
        store = etcd_world.open()
        revision = (await store.snapshot()).revision
        for _ in range(3):
            assert await store.wait(revision) == Events((), revision)
        lease = await store.create(A, ONE, 60)
        assert (await store.wait(revision)).revision == lease.revision

    run(main())


def test_watches_of_a_replaced_store_leave_no_socket_open(etcd_world: EtcdWorld) -> None:
    """Closed at once: the garbage collector may not come by for an hour."""

    async def main() -> None:
        store = etcd_world.open()
        counts = []
        gc.disable()
        try:
            for _ in range(5):
                with pytest.raises(Compacted):
                    await store.wait(10**9)
                counts.append(len(os.listdir("/proc/self/fd")))
        finally:
            gc.enable()
        assert counts[-1] <= counts[0]

    run(main())


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://192.0.2.9:2379", "http://192.0.2.9:2379"),
        (" http://192.0.2.9 ", "http://192.0.2.9:2379"),
        ("192.0.2.9:2379", "http://192.0.2.9:2379"),  # as flannel's client takes it
        ("192.0.2.9", "http://192.0.2.9:2379"),
        ("https://etcd.example:4001/", "https://etcd.example:4001"),
        ("http://[2001:db8::9]:2379", "http://[2001:db8::9]:2379"),
        ("http://[2001:db8::9]", "http://[2001:db8::9]:2379"),
    ],
)
def test_endpoints_are_normalised(text: str, url: str) -> None:
    assert [endpoint.url for endpoint in parse_endpoints([text])] == [url]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ftp://192.0.2.9:2379",
        "http://",
        "http://:2379",
        "http://192.0.2.9:port",
        "http://192.0.2.9:65536",
        "http://192.0.2.9:0",
        "http://[2001:db8::9:2379",
        "http://2001:db8::9:2379",
        "unix:///run/etcd.sock",
    ],
)
def test_endpoint_that_is_no_url_is_a_config_error_naming_it(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_endpoints(["http://192.0.2.1:2379", text])
    assert repr(text) in str(caught.value)
    assert "--etcd-endpoints" in str(caught.value)


def test_endpoint_with_a_password_in_it_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="--etcd-endpoints") as caught:
        parse_endpoints(["http://root:s3cret@192.0.2.9:2379"])
    assert "s3cret" not in str(caught.value)


# Credentials, and an etcd that cannot serve us


PASSWORD = "p:ss w?rd"


@pytest.fixture
def locked_world(own_world: EtcdWorld) -> EtcdWorld:
    """Authentication is on: root may do everything, nobody else anything."""
    raw = own_world.raw
    raw.put(f"{own_world.prefix}/config", '{"Network": "10.5.0.0/16"}')
    raw.put_json("/v2/auth/users/root", {"user": "root", "password": PASSWORD})
    raw.put_json("/v2/auth/enable", None)
    own_world.raw = Raw(own_world.url, "root", PASSWORD)
    raw.close()
    own_world.raw.put_json(
        "/v2/auth/roles/guest",
        {"role": "guest", "revoke": {"kv": {"read": ["/*"], "write": ["/*"]}}},
    )
    return own_world


def test_credentials(locked_world: EtcdWorld) -> None:
    url = locked_world.url

    async def main() -> None:
        store = locked_world.open_at(url, username="root", password=PASSWORD)
        assert await store.network_config() == '{"Network": "10.5.0.0/16"}'
        created = await store.create(A, ONE, 600)
        async with following(store) as follower:
            locked_world.put(str(B), '{"PublicIP":"192.0.2.2"}')
            await until(lambda: str(B) in follower.known())

        for access in (
            {"username": "root", "password": "wrong"},
            {"username": "nobody", "password": "wrong"},
            {},
            {"username": "root", "password": "pässwörd"},
        ):
            denied = locked_world.open_at(url, **access)
            for call in (
                denied.network_config(),
                denied.snapshot(),
                denied.create(lease_key("10.5.3.0-24"), TWO, 60),
                denied.update(A, TWO, 60, revision=created.revision),
                denied.delete(A, revision=created.revision),
                denied.wait(0),
            ):
                with pytest.raises(AccessDenied) as caught:
                    await call
                assert "--etcd-password" in str(caught.value)
                assert access.get("password", "?!") not in str(caught.value)
        assert by_key((await store.snapshot()).leases)[str(A)] == "192.0.2.1"

    run(main())


def test_a_password_changed_in_the_settings_file_too(
    locked_world: EtcdWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Read again when etcd refuses it: by requests and by the watch, without a restart."""
    caplog.set_level(logging.INFO)
    path = tmp_path / "tundp.toml"

    def write(password: str) -> None:
        path.write_text(
            f'etcd-endpoints = ["{locked_world.url}"]\netcd-api = "v2"\n'
            f'etcd-username = "root"\netcd-password = "{password}"\n'
        )

    write(PASSWORD)

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            store = open_store(load_settings([f"--config={path}"], {}))
            stack.push_async_callback(store.close)
            await store.create(A, ONE, 600)
            async with following(store) as follower:
                second = {"user": "root", "password": "second secret"}
                locked_world.raw.put_json("/v2/auth/users/root", second)
                locked_world.raw.close()
                locked_world.raw = Raw(locked_world.url, "root", "second secret")
                error = await outcome(store.create(B, TWO, 600))
                assert isinstance(error, AccessDenied), error
                assert f"write the new ones to {path}, which is read at each login" in str(error)
                path.write_text("etcd-password = ")  # somebody is writing it
                assert isinstance(await outcome(store.create(B, TWO, 600)), AccessDenied)
                write("second secret")
                await store.create(B, TWO, 600)
                await until(lambda: str(B) in follower.known())

    run(main())
    text = "\n".join(caplog.messages)
    assert f"user or password has changed in {path}" in text
    assert "is not TOML" in text
    assert "second secret" not in text


def test_watch_that_is_denied_says_so(locked_world: EtcdWorld) -> None:
    """etcd's refusal names index 0: no sign that its data was replaced."""

    async def main() -> None:
        store = locked_world.open_at(locked_world.url, username="root", password="wrong")
        result = await outcome(store.wait(5))
        assert isinstance(result, AccessDenied), repr(result)

    run(main())


@pytest.mark.parametrize("access", [{"password": "пароль"}, {"username": "имя", "password": "x"}])
def test_credentials_that_basic_auth_cannot_carry_are_refused(access: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="latin-1") as caught:
        Etcd2Store(EtcdAccess(endpoints=("http://127.0.0.1:1",), prefix="/x", **access))
    assert "--etcd-" in str(caught.value)
    assert access["password"] not in str(caught.value)


@pytest.fixture
def v3_only_url(tmp_path: Path) -> Iterator[str]:
    """An etcd as it comes: since 3.4 without the v2 API."""
    binary = shutil.which("etcd")
    assert binary is not None
    url, peer = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    argv = [
        binary,
        f"--data-dir={tmp_path}/data",
        f"--listen-client-urls={url}",
        f"--advertise-client-urls={url}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
        "--enable-v2=false",
        "--log-level=error",
    ]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        run(until(lambda: _is_healthy(url)))
        yield url
    finally:
        process.kill()
        process.wait()


def test_etcd_without_v2_says_what_to_do(v3_only_url: str) -> None:
    async def main() -> None:
        store = Etcd2Store(EtcdAccess(endpoints=(v3_only_url,), prefix="/coreos.com/network"))
        for call in (store.network_config(), store.snapshot(), store.create(A, ONE, 60)):
            with pytest.raises(StoreUnavailable) as caught:
                await call
            assert v3_only_url in str(caught.value)
            assert "--enable-v2" in str(caught.value)
        with pytest.raises(StoreUnavailable, match="--enable-v2"):
            await store.wait(1)
        await store.close()

    run(main())


def test_index_of_an_empty_store_is_where_its_watch_begins(etcd_world: EtcdWorld) -> None:
    """An event between the empty list and the watch is not missed."""

    async def main() -> None:
        store = etcd_world.open()
        snapshot = await store.snapshot()
        created = await etcd_world.open().create(A, ONE, 60)
        events = await store.wait(snapshot.revision)
        assert events.revision == created.revision

    run(main())


def _is_healthy(url: str) -> bool:
    with contextlib.closing(Raw(url)) as raw, contextlib.suppress(OSError):
        return json.dumps(raw.request("GET", "/health")[1]).find("true") > 0
    return False
