"""States of an etcd, and answers of what is none: see docs/tried-cases.md."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tests.store.support import (
    Etcd3World,
    EtcdWorld,
    Raw3,
    World,
    attributes,
    by_key,
    lease_key,
    make_claim,
    run,
)
from tundp.errors import Compacted, ConfigNotFound, Conflict, TundpError
from tundp.lab.etcd import PrivateEtcd
from tundp.lease import codec
from tundp.lease.model import LeaseAttributes, Put
from tundp.store.base import Store

A, B = lease_key("10.5.1.0-24"), lease_key("10.5.2.0-24")
ONE, TWO = attributes("192.0.2.1"), attributes("192.0.2.2")


async def failure(call: Any) -> str:
    """What a call of a store fails with; it must be an error of ours."""
    try:
        result = await call
    except TundpError as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"it succeeded: {result!r}")


def alarm(raw: Raw3, action: str, kind: str) -> None:
    member = raw.call("maintenance/status")["header"]["member_id"]
    raw.call("maintenance/alarm", action=action, memberID=member, alarm=kind)


def test_an_etcd_out_of_space_is_named_and_read(start_etcd: Callable[..., PrivateEtcd]) -> None:
    """NOSPACE: nothing is granted or put, all the rest goes on, until the alarm is disarmed."""
    with contextlib.closing(Etcd3World(start_etcd().url)) as world:

        async def main() -> None:
            store = world.open()
            lease = await store.create(A, ONE, 600)
            alarm(world.raw, "ACTIVATE", "NOSPACE")
            try:
                assert by_key((await store.snapshot()).leases) == {"10.5.1.0-24": "192.0.2.1"}
                for call in (
                    store.create(B, TWO, 600),
                    store.update(A, ONE, 600, revision=lease.revision),
                ):
                    said = await failure(call)
                    assert "space" in said
                assert world.read(str(A)) is not None
            finally:
                alarm(world.raw, "DEACTIVATE", "NOSPACE")
            assert (await store.update(A, ONE, 600, revision=lease.revision)).key == A
            assert len(world.raw.etcd_leases()) <= 2

        run(main())


def test_an_etcd_that_found_its_data_corrupt_is_named(
    start_etcd: Callable[..., PrivateEtcd],
) -> None:
    with contextlib.closing(Etcd3World(start_etcd().url)) as world:

        async def main() -> None:
            store = world.open()
            lease = await store.create(A, ONE, 600)
            alarm(world.raw, "ACTIVATE", "CORRUPT")
            try:
                for call in (
                    store.create(B, TWO, 600),
                    store.update(A, ONE, 600, revision=lease.revision),
                ):
                    said = await failure(call)
                    assert "orrupt" in said
            finally:
                alarm(world.raw, "DEACTIVATE", "CORRUPT")

        run(main())


def test_proxies_of_the_environment_are_not_used(
    worlds: dict[str, World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """etcd clients that took http_proxy lost the cluster: nobody proxies what is beside them."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://192.0.2.77:3128")
        monkeypatch.setenv(name.upper(), "http://192.0.2.77:3128")
    monkeypatch.delenv("no_proxy", raising=False)

    async def main() -> None:
        for name in ("etcd", "etcd3"):
            store: Store = worlds[name].open()
            assert (await store.snapshot()).leases == ()
            await store.create(A, ONE, 600)

    run(main())


@contextlib.asynccontextmanager
async def web_server(answer: Callable[[str], bytes]) -> AsyncIterator[tuple[str, list[str]]]:
    """An HTTP server that answers one request a connection; its URL, and the lines it saw."""
    seen: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            seen.append(head.split(b"\r\n", 1)[0].decode("latin-1"))
            writer.write(answer(seen[-1]))
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", seen


def page(status: str, body: bytes = b"", *headers: str) -> bytes:
    length = f"Content-Length: {len(body)}"
    lines = [f"HTTP/1.1 {status}", length, "Connection: close", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


HTML = b"<html><body><h1>It works!</h1></body></html>"
JSON = "Content-Type: application/json"


@pytest.mark.parametrize(
    "answer",
    [
        page("200 OK", HTML, "Content-Type: text/html"),
        page("404 Not Found", HTML),
        page("401 Unauthorized", HTML, 'WWW-Authenticate: Basic realm="etcd"'),
        page("403 Forbidden", HTML),
        page("502 Bad Gateway", HTML),
        page("503 Service Unavailable", b"", "Retry-After: 3600"),
        page("429 Too Many Requests", b"", "Retry-After: 3600"),
        page("200 OK", b"", JSON),
        page("200 OK", b"[]", JSON),
        page("200 OK", b"null", JSON),
        page("200 OK", b"{}", JSON),
        page("200 OK", b'{"action":"get","node":null}', JSON),
        page("200 OK", b'{"errorCode":"x","message":7}', JSON),
        page("400 Bad Request", b'{"errorCode":"x","message":7}', JSON),
        page("400 Bad Request", b'{"errorCode":100000}', JSON),
        page("200 OK", b'{"node":{}}', JSON, "X-Etcd-Index: many"),
        page("200 OK", b"\xff\xfe{}", JSON),
        page("200 OK", b"[" * 100000, JSON),
        page("200 OK", HTML, "Content-Encoding: gzip"),
        page("204 No Content"),
        page("301 Moved Permanently", b"", "Location: /v2/keys/elsewhere"),
        page("307 Temporary Redirect", b"", "Location: ftp://192.0.2.1/"),
        page("307 Temporary Redirect", b"", "Location: http://"),
        page("307 Temporary Redirect"),
    ],
    ids=lambda answer: answer[9:60].decode("latin-1").replace("\r\n", " "),
)
def test_what_is_no_v2_api_is_unavailable_or_denied(
    etcd_world: EtcdWorld, answer: bytes, short_timeouts: None
) -> None:
    async def main() -> None:
        async with web_server(lambda _: answer) as (url, seen):
            store = etcd_world.open_at(url)
            for call in (store.snapshot(), store.network_config(), store.create(A, ONE, 60)):
                said = await failure(call)
                assert url.removeprefix("http://") in said
            assert len(seen) < 100, "it asks and asks"
            # The next endpoint is a good one.
            both = etcd_world.open_at(url, etcd_world.url)
            assert (await both.snapshot()).leases == ()

    run(main())


CONFIG = json.dumps({"Network": "10.5.0.0/16"})
OK = "X-Etcd-Index: 7"
NODE = {"key": "/k", "value": CONFIG, "modifiedIndex": 7, "createdIndex": 7}
FOUND = {"action": "get", "node": NODE}
LISTED = {"action": "get", "node": {"key": "/k", "dir": True, "nodes": []}}
MISSING = {"errorCode": 100, "message": "Key not found", "cause": "/k", "index": 7}


@pytest.mark.parametrize(
    ("status", "body", "calls"),
    [
        ("200 OK", FOUND, "network_config"),
        ("200 OK", LISTED, "snapshot"),
        ("404 Not Found", MISSING, "network_config snapshot"),
        ("404 Not Found", {"detail": "Not Found"}, "network_config snapshot"),
        ("201 Created", {"action": "create", "node": NODE}, "create"),
        ("412 Precondition Failed", MISSING | {"errorCode": 105}, "create"),
        ("200 OK", {"action": "set", "node": NODE}, "wait"),
        ("400 Bad Request", MISSING | {"errorCode": 401}, "wait"),
    ],
)
def test_v2_answers_without_the_stores_index_are_none(
    etcd_world: EtcdWorld, status: str, body: dict[str, Any], calls: str, short_timeouts: None
) -> None:
    """A proxy took the header out, or a web server answers in JSON: no empty store, no success."""

    async def main() -> None:
        for header in ("X-Other: 7", "X-Etcd-Index: many"):
            answer = page(status, json.dumps(body).encode(), JSON, header)
            async with web_server(lambda _, answer=answer: answer) as (url, _):  # type: ignore[misc]
                store = etcd_world.open_at(url)
                for call in calls.split():
                    arguments = {"create": (A, ONE, 60), "wait": (3,)}.get(call, ())
                    said = await failure(getattr(store, call)(*arguments))
                    assert said.startswith("StoreUnavailable: "), said
                    assert url.removeprefix("http://") in said
                    assert "X-Etcd-Index" in said
                    assert "--etcd-endpoints" in said
        # The very same with the header is an answer.
        answer = page(status, json.dumps(body).encode(), JSON, OK)
        async with web_server(lambda _, answer=answer: answer) as (url, _):  # type: ignore[misc]
            for call in calls.split() if "detail" not in body else ():
                arguments = {"create": (A, ONE, 60), "wait": (3,)}.get(call, ())
                with contextlib.suppress(ConfigNotFound, Conflict, Compacted):
                    await getattr(etcd_world.open_at(url), call)(*arguments)

    run(main())


def test_v2_answers_without_a_cluster_id_are_explained_once(
    etcd_world: EtcdWorld, caplog: pytest.LogCaptureFixture
) -> None:
    """python-etcd warned of each answer, in words that help nobody."""
    value = json.dumps(FOUND).encode()

    async def main() -> None:
        async with web_server(lambda _: page("200 OK", value, JSON, OK)) as (url, _):
            store = etcd_world.open_at(url)
            for _ in range(3):
                await store.network_config()
            (line,) = caplog.messages
            assert url in line
            assert "X-Etcd-Cluster-Id" in line
            assert "--etcd-endpoints" in line
        async with web_server(lambda _: page("500 Oops", HTML)) as (url, _):
            assert "StoreUnavailable" in await failure(etcd_world.open_at(url).network_config())
            assert not [each for each in caplog.messages if "cluster ID" in each]

    run(main())


def test_a_value_where_the_leases_belong_is_no_empty_table(etcd_world: EtcdWorld) -> None:
    answer = page("200 OK", json.dumps(FOUND).encode(), JSON, OK)

    async def main() -> None:
        async with web_server(lambda _: answer) as (url, _):
            said = await failure(etcd_world.open_at(url).snapshot())
            assert "subnets is a value" in said
            assert url in said

    run(main())


@pytest.mark.parametrize("status", ["301 Moved Permanently", "307 Temporary Redirect"])
def test_a_redirection_is_named_with_its_server(
    etcd_world: EtcdWorld, status: str, short_timeouts: None
) -> None:
    async def main() -> None:
        target = etcd_world.url.removeprefix("http://")

        def elsewhere(line: str) -> bytes:
            return page(status, b"", f"Location: http://user:secret@{target}{line.split()[1]}")

        async with web_server(elsewhere) as (url, _):
            store = etcd_world.open_at(url)
            for call in (store.snapshot(), store.network_config(), store.create(A, ONE, 60)):
                said = await failure(call)
                assert f"redirects requests to 'http://{target}'" in said
                assert "--etcd-endpoints" in said
                assert "secret" not in said

    run(main())


def test_an_endless_redirection_ends(etcd_world: EtcdWorld, short_timeouts: None) -> None:
    async def main() -> None:
        def again(line: str) -> bytes:
            return page("307 Temporary Redirect", b"", f"Location: {line.split()[1]}")

        async with web_server(again) as (url, seen):
            said = await failure(etcd_world.open_at(url).snapshot())
            assert url.removeprefix("http://") in said
            assert len(seen) < 100

    run(main())


@pytest.mark.parametrize("prefix", ["/my network", "/netz/ü", "/a+b&c=d/net"])
@pytest.mark.parametrize("name", ["etcd", "etcd3"])
def test_prefixes_that_an_url_would_change(etcd_url: str, prefix: str, name: str) -> None:
    kind: Any = {"etcd": EtcdWorld, "etcd3": Etcd3World}[name]
    with contextlib.closing(kind(etcd_url, f"/test-prefix-{name}{prefix}")) as world:

        async def main() -> None:
            store = world.open()
            await store.create(A, ONE, 600)
            assert by_key((await store.snapshot()).leases) == {"10.5.1.0-24": "192.0.2.1"}
            assert world.read(str(A))[0]["PublicIP"] == "192.0.2.1"

        run(main())


def test_compaction_and_defragmentation_all_the_time(
    start_etcd: Callable[..., PrivateEtcd],
) -> None:
    """A cron job that compacts and defragments: every change is followed all the same."""
    with contextlib.closing(Etcd3World(start_etcd().url)) as world:

        async def main() -> None:
            store = world.open()
            revision = (await store.snapshot()).revision
            seen: dict[str, str] = {}
            for number in range(20):
                key = lease_key(f"10.5.{number}.0-24")
                await asyncio.to_thread(world.put, str(key), json.dumps({"PublicIP": "192.0.2.9"}))
                await asyncio.to_thread(world.raw.compact)
                await asyncio.to_thread(world.raw.call, "maintenance/defragment")
                while str(key) not in seen:
                    try:
                        events = await store.wait(revision)
                    except TundpError:
                        snapshot = await store.snapshot()
                        revision = snapshot.revision
                        seen |= by_key(snapshot.leases)
                        continue
                    revision = events.revision
                    seen |= {
                        str(event.lease.key): ""
                        for event in events.events
                        if isinstance(event, Put)
                    }
            assert len(seen) == 20

        run(main())


def test_a_value_of_a_megabyte_is_not_decoded_by_the_event_loop(
    worlds: dict[str, World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An array of half a million numbers took 0.1 s, each time somebody wrote it."""
    threads: dict[int, int] = {}
    decode = codec.parse_value

    def parse_value(text: str) -> LeaseAttributes:
        threads[len(text)] = threading.get_ident()
        return decode(text)

    monkeypatch.setattr(codec, "parse_value", parse_value)
    big = json.dumps({"PublicIP": "192.0.2.9", "Note": [1] * 300_000})
    small = json.dumps({"PublicIP": "192.0.2.8"})

    async def main() -> None:
        for name, world in worlds.items():
            store = world.open()
            revision = (await store.snapshot()).revision
            threads.clear()
            world.put("10.5.9.0-24", big)
            world.put("10.5.8.0-24", small)
            while len(threads) < 2:
                update = await store.wait(revision)
                revision = update.revision
            assert threads[len(big)] != threading.get_ident(), name
            await store.close()

    run(main())


def test_a_lease_value_of_a_megabyte_and_of_ten_thousand_members(
    worlds: dict[str, World],
) -> None:
    big = json.dumps({"PublicIP": "192.0.2.9", "Note": "x" * 1_000_000})
    many = json.dumps({"PublicIP": "192.0.2.8"} | {f"Key{n}": n for n in range(10_000)})

    async def main() -> None:
        for name, world in worlds.items():
            world.put("10.5.9.0-24", big)
            world.put("10.5.8.0-24", many)
            snapshot = await world.open().snapshot()
            assert by_key(snapshot.leases) == {
                "10.5.8.0-24": "192.0.2.8",
                "10.5.9.0-24": "192.0.2.9",
            }, name
            # The node whose lease it is renews it, and what others keep there stays.
            lease, _ = await make_claim(world.open(), "192.0.2.8").acquire()
            assert str(lease.key) == "10.5.8.0-24"
            found = world.read("10.5.8.0-24")
            assert found is not None
            assert found[0]["Key9999"] == 9999

    run(main())
