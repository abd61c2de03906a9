"""What the store tests share. Nothing here reads or writes leases through tundp's stores.

World     one place where leases live (an etcd prefix, or a file), with a raw way in that
          is not our code, so that what is asserted is what other programs see
Follower  follow() and a LeaseTable: what a daemon knows
make_node a node's lease plane: subnet manager and routing ledger, as in the daemon
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import http.client
import json
import logging
import os
import random
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from ipaddress import IPv4Address, IPv4Interface, IPv6Interface
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import quote, urlencode, urlsplit

from tests.lease_plane import LeasePlane
from tests.loops import LoopFactory, run_on
from tests.wait import DEADLINE_S, together, until
from tundp.backend.choose import parse_network_config
from tundp.backoff import Backoff, Outage
from tundp.lease.model import Events, Lease, LeaseAttributes, LeaseKey, Snapshot
from tundp.lease.network import NetworkConfig
from tundp.lease.table import LeaseTable
from tundp.store.access import EtcdAccess
from tundp.store.base import Store
from tundp.store.etcd2 import Etcd2Store
from tundp.store.etcd3 import Etcd3Store
from tundp.store.file import FileStore
from tundp.store.follow import follow
from tundp.subnet.claim_driver import Claim, ClaimSettings

HANG_S = 2 * DEADLINE_S
"""No test body takes this long; it ends one that hangs."""

_opened: list[Store] = []
"""The stores that worlds have opened and nobody has closed yet."""

FREQUENT_PINGS = "--grpc-keepalive-min-time=500ms"
"""For an etcd under `short_timeouts`, which would send a client that pings so often away."""

T = TypeVar("T")
W = TypeVar("W")
Runner = Callable[[Coroutine[Any, Any, Any]], Any]


def run_closing(loop_factory: LoopFactory, main: Coroutine[Any, Any, T]) -> T:
    """`main` on a fresh loop, and the stores it opened closed on it; a hang fails."""

    async def closing() -> T:
        try:
            async with asyncio.timeout(HANG_S):
                return await main
        finally:
            # Where it was used: a connection belongs to its loop.
            await close_opened()

    return run_on(loop_factory, closing())


def run(main: Coroutine[Any, Any, T]) -> T:
    """`main` on asyncio's own loop."""
    return run_closing(asyncio.new_event_loop, main)


async def everywhere(
    worlds: Mapping[str, W], main: Callable[[W], Coroutine[Any, Any, None]]
) -> None:
    """`main` in every world at the same time: for tests that mostly wait for time to pass."""
    await together({name: main(world) for name, world in worlds.items()})


def lease_key(text: str) -> LeaseKey:
    """`10.5.1.0-24` or `10.5.1.0-24&fd00::-64`, taken apart without our parser."""
    v4, _, v6 = text.partition("&")
    return LeaseKey(
        IPv4Interface(v4.replace("-", "/")), IPv6Interface(v6.replace("-", "/")) if v6 else None
    )


def attributes(public_ip: str, **more: Any) -> LeaseAttributes:
    return LeaseAttributes(public_ip=IPv4Address(public_ip), **more)


def by_key(leases: Any) -> dict[str, str]:
    """What a set of leases says: key text to PublicIP text."""
    return {str(lease.key): str(lease.attributes.public_ip) for lease in leases}


class Http:
    """JSON over plain HTTP on one connection, with no client library."""

    def __init__(self, url: str) -> None:
        self.url = url
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._address = (parts.hostname, parts.port)
        self._headers: dict[str, str] = {}
        self._connection: http.client.HTTPConnection | None = None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def request(
        self, method: str, path: str, body: str | None = None, content_type: str = ""
    ) -> tuple[int, dict[str, Any], dict[str, str]]:
        """Status, JSON and headers of the answer; once more if the connection had gone stale."""
        is_fresh = self._connection is None
        try:
            status, data, headers = self._request(method, path, body, content_type)
        except (OSError, http.client.HTTPException):
            self.close()
            if is_fresh:
                raise
            status, data, headers = self._request(method, path, body, content_type)
        return status, json.loads(data) if data else {}, headers

    def text(self, path: str) -> str:
        """What a GET answers, as it is."""
        return self._request("GET", path, None, "")[1].decode()

    def _request(
        self, method: str, path: str, body: str | None, content_type: str
    ) -> tuple[int, bytes, dict[str, str]]:
        if self._connection is None:
            host, port = self._address
            self._connection = http.client.HTTPConnection(host, port, timeout=10)
        headers = self._headers | ({"Content-Type": content_type} if content_type else {})
        self._connection.request(method, path, body, headers)
        answer = self._connection.getresponse()
        return answer.status, answer.read(), dict(answer.headers)


class Raw(Http):
    """etcd's v2 API."""

    def __init__(self, url: str, user: str = "", password: str = "") -> None:
        super().__init__(url)
        token = base64.b64encode(f"{user}:{password}".encode()).decode()
        if user:
            self._headers["Authorization"] = f"Basic {token}"

    def get(self, key: str, query: str = "") -> dict[str, Any]:
        """The whole answer; `errorCode` 100 in it when there is no such key."""
        return self.request("GET", f"/v2/keys{quote(key)}{query}")[1]

    def put(self, key: str, value: str, *, ttl: int | None = None) -> int:
        """Write without looking; the new modifiedIndex."""
        form = {"value": value} | ({} if ttl is None else {"ttl": str(ttl)})
        return self._write(key, form)

    def make_directory(self, key: str) -> int:
        return self._write(key, {"dir": "true"})

    def delete(self, key: str) -> None:
        status, answer, _ = self.request("DELETE", f"/v2/keys{quote(key)}?recursive=true")
        assert status == 200, answer

    def put_json(self, path: str, value: Any) -> None:
        status, answer, _ = self.request(
            "PUT", path, None if value is None else json.dumps(value), "application/json"
        )
        assert status in (200, 201), answer

    def action_after(self, key: str, index: int) -> str:
        """What the first event after `index` under `key` calls itself."""
        return str(self.get(key, f"?wait=true&recursive=true&waitIndex={index + 1}")["action"])

    def _write(self, key: str, form: dict[str, str]) -> int:
        status, answer, _ = self.request(
            "PUT", f"/v2/keys{quote(key)}", urlencode(form), "application/x-www-form-urlencoded"
        )
        assert status in (200, 201), answer
        return int(answer["node"]["modifiedIndex"])


class Raw3(Http):
    """etcd's v3 API, through the JSON gateway. Integers are strings there, bytes base64."""

    def __init__(self, url: str, user: str = "", password: str = "") -> None:
        super().__init__(url)
        self._credentials = {"name": user, "password": password} if user else None

    def call(self, path: str, **body: Any) -> dict[str, Any]:
        """POST /v3/<path>; a login first, if there is a user and no token yet."""
        if self._credentials is not None and "Authorization" not in self._headers:
            _, login, _ = self.request("POST", "/v3/auth/authenticate", _dumps(self._credentials))
            self._headers["Authorization"] = login["token"]
        status, answer, _ = self.request("POST", f"/v3/{path}", _dumps(body))
        assert status == 200, (path, answer)
        return answer

    def get(self, key: str) -> dict[str, Any] | None:
        """Key and value as text, and the etcd lease if it has one; None: no such key."""
        kvs = self.call("kv/range", key=_b64(key)).get("kvs", [])
        return _plain(kvs[0]) if kvs else None

    def list(self, prefix: str) -> list[dict[str, Any]]:
        """All keys that start with `prefix`."""
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        answer = self.call("kv/range", key=_b64(prefix), range_end=_b64(end))
        return [_plain(kv) for kv in answer.get("kvs", [])]

    def put(self, key: str, value: str | bytes, *, ttl: int | None = None) -> int:
        """Write without looking, as flannel does: with an etcd lease of its own. The revision."""
        body: dict[str, Any] = {"key": _b64(key), "value": _b64(value)}
        if ttl is not None:
            body["lease"] = self.call("lease/grant", TTL=ttl)["ID"]
        return int(self.call("kv/put", **body)["header"]["revision"])

    def delete(self, key: str) -> int:
        answer = self.call("kv/deleterange", key=_b64(key))
        assert answer.get("deleted") == "1", (key, answer)
        return int(answer["header"]["revision"])

    def compact(self) -> int:
        """Forget every revision before the current one; its number."""
        revision = self.call("kv/range", key=_b64("?"))["header"]["revision"]
        self.call("kv/compaction", revision=revision, physical=True)
        return int(revision)

    def etcd_leases(self) -> set[str]:
        """The ids of all etcd leases there are."""
        return {lease["ID"] for lease in self.call("lease/leases").get("leases", [])}

    def ttl_of(self, etcd_lease_id: str) -> int:
        """Seconds the etcd lease has left; the gateway leaves a zero out."""
        return int(self.call("lease/timetolive", ID=etcd_lease_id).get("TTL", 0))

    def counts(self) -> dict[str, int]:
        """How often each RPC was begun since etcd started, ours through the gateway included."""
        return {
            name: int(float(count))
            for name, count in re.findall(
                r'^grpc_server_started_total{grpc_method="(\w+)".*} (\S+)$',
                self.text("/metrics"),
                re.MULTILINE,
            )
        }

    def watcher_count(self) -> int:
        """How many watches etcd serves at the moment."""
        pattern = r"^etcd_debugging_mvcc_watcher_total (\d+)$"
        (count,) = re.findall(pattern, self.text("/metrics"), re.MULTILINE)
        return int(count)


def _b64(text: str | bytes) -> str:
    return base64.b64encode(text.encode() if isinstance(text, str) else text).decode()


def _dumps(body: Any) -> str:
    return json.dumps(body)


def _plain(kv: dict[str, Any]) -> dict[str, Any]:
    """A key-value pair of the gateway with text and numbers in it."""
    return {
        "key": base64.b64decode(kv["key"]).decode(errors="replace"),
        "value": base64.b64decode(kv.get("value", "")).decode(errors="replace"),
        "revision": int(kv["mod_revision"]),
        "etcd_lease": kv.get("lease", "0"),
    }


class World(Protocol):
    """One place where leases live."""

    def open(self) -> Store:
        """Another store on the same leases, as another daemon would have."""
        ...

    def set_config(self, text: str) -> None: ...

    def put(self, name: str, value: str, *, ttl: int | None = None) -> None:
        """Write a lease (or rubbish) behind the stores' backs."""
        ...

    def remove(self, name: str) -> None: ...

    def read(self, name: str) -> tuple[Any, float | None] | None:
        """Value and seconds left (None: for ever) as another program reads them."""
        ...

    def close(self) -> None: ...


S = TypeVar("S", Etcd2Store, Etcd3Store)
R = TypeVar("R", Raw, Raw3)


class _EtcdWorld(Generic[S, R]):
    """A prefix of its own in an etcd, through one of its APIs."""

    _store: Callable[[EtcdAccess], S]
    raw: R

    def __init__(self, url: str, raw: R, prefix: str | None) -> None:
        self.url = url
        self.prefix = prefix or f"/test-{uuid.uuid4().hex[:12]}/network"
        self.raw = raw

    def open(self) -> S:
        return self.open_at(self.url)

    def open_at(self, *endpoints: str, **access: Any) -> S:
        given = {"prefix": self.prefix, "endpoints": endpoints} | access
        store = type(self)._store(EtcdAccess(**given))
        _opened.append(store)
        return store

    def path(self, name: str) -> str:
        return f"{self.prefix}/subnets/{name}"

    def set_config(self, text: str) -> None:
        self.raw.put(f"{self.prefix}/config", text)

    def put(self, name: str, value: str, *, ttl: int | None = None) -> None:
        self.raw.put(self.path(name), value, ttl=ttl)

    def remove(self, name: str) -> None:
        self.raw.delete(self.path(name))

    def close(self) -> None:
        asyncio.run(close_opened())
        self.raw.close()


class EtcdWorld(_EtcdWorld[Etcd2Store, Raw]):
    """A prefix of its own in an etcd, v2 API."""

    _store = Etcd2Store

    def __init__(self, url: str, prefix: str | None = None) -> None:
        super().__init__(url, Raw(url), prefix)

    def read(self, name: str) -> tuple[Any, float | None] | None:
        node = self.raw.get(self.path(name)).get("node")
        return None if node is None else (json.loads(node["value"]), node.get("ttl"))


class Etcd3World(_EtcdWorld[Etcd3Store, Raw3]):
    """A prefix of its own in an etcd, v3 API."""

    _store = Etcd3Store

    def __init__(self, url: str, prefix: str | None = None) -> None:
        super().__init__(url, Raw3(url), prefix)

    def read(self, name: str) -> tuple[Any, float | None] | None:
        found = self.raw.get(self.path(name))
        if found is None:
            return None
        # A key without an etcd lease is a reservation; etcd itself would call its TTL -1.
        ttl = None if found["etcd_lease"] == "0" else self.raw.ttl_of(found["etcd_lease"])
        return json.loads(found["value"]), ttl


class FileWorld:
    """A lease file of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text("{}\n")

    def open(self) -> FileStore:
        store = FileStore(self.path)
        _opened.append(store)
        return store

    def document(self) -> dict[str, Any]:
        document = json.loads(self.path.read_text())
        assert isinstance(document, dict)
        return document

    def set_config(self, text: str) -> None:
        with self._edited() as document:
            document["config"] = json.loads(text)

    def put(self, name: str, value: str, *, ttl: int | None = None) -> None:
        with self._edited() as document:
            entry = json.loads(value)
            if ttl is not None:
                entry["Expires"] = time.time() + ttl
            document.setdefault("leases", {})[name] = entry

    def remove(self, name: str) -> None:
        with self._edited() as document:
            del document["leases"][name]

    def read(self, name: str) -> tuple[Any, float | None] | None:
        entry = self.document().get("leases", {}).get(name)
        if entry is None:
            return None
        if not isinstance(entry, dict):
            return entry, None
        value = {field: entry[field] for field in entry if field not in ("Expires", "Revision")}
        return value, entry["Expires"] - time.time() if "Expires" in entry else None

    def close(self) -> None:
        asyncio.run(close_opened())

    @contextlib.contextmanager
    def _edited(self) -> Iterator[dict[str, Any]]:
        """An edit that loses nothing a daemon writes at the same moment."""
        with open(f"{self.path}.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            document = self.document()
            yield document
            beside = self.path.with_name("edited")
            beside.write_text(json.dumps(document))
            os.replace(beside, self.path)


async def close_opened() -> None:
    """Close the stores that worlds have opened."""
    while _opened:
        await _opened.pop().close()


class Follower:
    """follow() applied to a table, in the background."""

    def __init__(self, store: Store) -> None:
        self.table = LeaseTable()
        self.updates: list[Snapshot | Events] = []
        self.outage = Outage(logging.getLogger("test"), "store")
        self.on_update: Callable[[Snapshot | Events, Any], None] = lambda update, changes: None
        self._store = store

    def known(self) -> dict[str, str]:
        return by_key(self.table.leases.values())

    async def run(self) -> None:
        async for update in follow(self._store, self.outage, Backoff(0.02, 0.2)):
            changes = self.table.apply(update)
            self.updates.append(update)
            self.on_update(update, changes)


@contextlib.asynccontextmanager
async def following(store: Store) -> AsyncIterator[Follower]:
    """A follower that has seen its first snapshot."""
    follower = Follower(store)
    async with background(follower.run()):
        await until(lambda: follower.updates or follower.outage.is_on)
        yield follower


@contextlib.asynccontextmanager
async def background(coroutine: Coroutine[Any, Any, Any]) -> AsyncIterator[asyncio.Task[Any]]:
    """A task beside the body, cancelled after it; an error of its own is raised there."""
    task = asyncio.ensure_future(coroutine)
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


NETWORK = parse_network_config('{"Network": "10.5.0.0/16"}', "test")
ONE_SUBNET = parse_network_config(
    '{"Network": "10.5.0.0/22", "SubnetLen": 24, "SubnetMin": "10.5.3.0", "SubnetMax": "10.5.3.0"}',
    "test",
)


def make_claim(store: Store, public_ip: str, **options: Any) -> Claim:
    """A claim on the overlay 10.5.0.0/16; `options` are fields of ClaimSettings."""
    given: dict[str, Any] = {
        "network_config": NETWORK,
        "attributes": attributes(public_ip),
        "lease_ttl_s": 86400,
        "margin_s": 3600,
        "race_pause_s": 0.01,
    }
    return Claim(store, ClaimSettings(**(given | options)), rng=random.Random())


async def acquired(claim: Claim) -> Lease:
    """The lease alone."""
    lease, _ = await claim.acquire()
    return lease


def make_node(store: Store, public_ip: str, **options: Any) -> LeasePlane:
    """The lease plane of a node of 10.5.0.0/16; `options` are LeasePlane's."""
    return LeasePlane(store, public_ip, **({"network_config": NETWORK} | options))


class Forwarder:
    """A TCP proxy before etcd that can lose the answer to a write, hang, or be cut."""

    def __init__(self, target: str) -> None:
        self._target = target.rpartition("/")[2].split(":")
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._port = 0
        self._flows = asyncio.Event()
        self._flows.set()
        self.answers_to_lose = 0
        self.lost = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def mend(self) -> None:
        self._flows.set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        await until(self._is_cut)

    def hang(self) -> None:
        """From now on take connections and bytes, and pass nothing on."""
        self._flows.clear()

    def _is_cut(self) -> bool:
        # Again and again: a connection taken just before the server closed comes up after it.
        for writer in self._writers:
            writer.transport.abort()
        self._flows.set()
        return not self._writers

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            back_reader, back_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.close()
            return
        both = {writer, back_writer}
        self._writers |= both
        writes = _Writes()

        async def upward() -> None:
            while data := await reader.read(65536):
                await self._flows.wait()
                writes.sent(data)
                back_writer.write(data)

        async def downward() -> None:
            while data := await back_reader.read(65536):
                await self._flows.wait()
                if writes.is_answered_by(data) and self.answers_to_lose:
                    self.answers_to_lose -= 1
                    self.lost += 1
                    return
                writer.write(data)

        tasks = [asyncio.ensure_future(upward()), asyncio.ensure_future(downward())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for end in both:
                end.close()
            self._writers -= both


class _Writes:
    """Which answers on one connection are those to writes of a lease, in either API."""

    _PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

    def __init__(self) -> None:
        self._is_http2 = False
        self._is_put = False
        self._up = b""
        self._down = b""
        self._streams: set[int] = set()

    def sent(self, data: bytes) -> None:
        if data.startswith(self._PREFACE):
            self._is_http2, data = True, data.removeprefix(self._PREFACE)
        if self._is_http2:
            frames, self._up = _frames(self._up + data)
            self._streams |= {stream for _, stream, payload in frames if b'"PublicIP"' in payload}
        elif data.startswith((b"GET ", b"PUT ", b"DELETE ")):
            self._is_put = data.startswith(b"PUT ")

    def is_answered_by(self, data: bytes) -> bool:
        if not self._is_http2:
            return self._is_put
        frames, self._down = _frames(self._down + data)
        return any(kind == 1 and stream in self._streams for kind, stream, _ in frames)


def _frames(data: bytes) -> tuple[list[tuple[int, int, bytes]], bytes]:
    """The whole HTTP/2 frames (type, stream, payload) in `data`, and what is left over."""
    frames = []
    while len(data) >= 9 and len(data) >= (end := 9 + int.from_bytes(data[:3])):
        frames.append((data[3], int.from_bytes(data[5:9]) & 0x7FFFFFFF, data[9:end]))
        data = data[end:]
    return frames, data


@contextlib.asynccontextmanager
async def forwarder(target: str) -> AsyncIterator[Forwarder]:
    proxy = Forwarder(target)
    await proxy.mend()
    try:
        yield proxy
    finally:
        await proxy.cut()


class InStep:
    """A store whose first snapshot waits for the others': all plan from the same leases."""

    def __init__(self, store: Store, barrier: asyncio.Barrier) -> None:
        self._store = store
        self._barrier: asyncio.Barrier | None = barrier

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def snapshot(self) -> Snapshot:
        snapshot = await self._store.snapshot()
        barrier, self._barrier = self._barrier, None
        if barrier is not None:
            await barrier.wait()
        return snapshot


async def outcome(awaitable: Awaitable[Any]) -> Any:
    """The result, or the exception as a value."""
    try:
        return await awaitable
    except Exception as error:  # noqa: BLE001  (the caller asserts which)
        return error


def network(text: str) -> NetworkConfig:
    return parse_network_config(text, "test")
