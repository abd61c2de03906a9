"""Endpoints and addresses that are dead, drop, hang or are given up: the one that answers is found.

Sockets with a full backlog drop SYNs, as a firewall does. Ones that listen and never accept
complete the connection and say nothing, as a server that hangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.store.support import Runner, outcome
from tundp.errors import StoreUnavailable
from tundp.lab.etcd import PrivateEtcd
from tundp.store import dial
from tundp.store.access import EtcdAccess
from tundp.store.auto import AutoStore
from tundp.store.base import Store
from tundp.store.etcd2 import Etcd2Store
from tundp.store.etcd3 import Etcd3Store
from tundp.store.names import Names

APIS = ("v2", "v3", "auto")
getaddrinfo = socket.getaddrinfo


@pytest.fixture
def name_server(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Addresses by name."""
    names: dict[str, list[str]] = {}

    def answer(host: str, *arguments: Any, **keywords: Any) -> list[Any]:
        if host not in names:
            return getaddrinfo(host, *arguments, **keywords)
        return [(0, socket.SOCK_STREAM, 6, "", (address, 0)) for address in names[host]]

    monkeypatch.setattr("tundp.store.names.socket.getaddrinfo", answer)
    return names


@pytest.fixture(scope="module")
def etcd() -> Iterator[PrivateEtcd]:
    etcd = PrivateEtcd()
    asyncio.run(etcd.start())
    for api in ("v2", "v3"):
        asyncio.run(etcd.put("/reach/config", "{}", api=api))
    yield etcd
    asyncio.run(etcd.close())


@contextlib.contextmanager
def dropping(*addresses: str, port: int = 0) -> Iterator[int]:
    """A port at which nobody at these addresses takes a connection, or refuses one."""
    with contextlib.ExitStack() as stack:
        for address in addresses:
            full = stack.enter_context(socket.socket())
            full.bind((address, port))
            full.listen(0)
            first = stack.enter_context(socket.socket())
            first.connect(full.getsockname())
            port = full.getsockname()[1]
        yield port


@contextlib.contextmanager
def hanging() -> Iterator[int]:
    """A port where connections are made, and nothing is ever said."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(16)
        yield sock.getsockname()[1]


def open_store(api: str, *endpoints: str) -> Store:
    access = EtcdAccess(endpoints=endpoints, prefix="/reach")
    match api:
        case "v2":
            return Etcd2Store(access)
        case "v3":
            return Etcd3Store(access)
    return AutoStore(Etcd2Store(access), Etcd3Store(access))


async def finds(store: Store, limit_s: float) -> None:
    """The store answers within the limit."""
    try:
        async with asyncio.timeout(limit_s):
            assert await store.network_config() == "{}"
    finally:
        await store.close()


@pytest.mark.parametrize("api", APIS)
def test_name_with_six_addresses_of_which_five_drop(
    etcd: PrivateEtcd, run: Runner, name_server: dict[str, list[str]], api: str
) -> None:
    port = int(etcd.url.rpartition(":")[2])
    addresses = [f"127.0.0.{number}" for number in range(2, 7)]
    name_server["etcd.test"] = [*addresses, "127.0.0.1"]
    with dropping(*addresses, port=port):
        run(finds(open_store(api, f"http://etcd.test:{port}"), dial.CONNECT_S))


@pytest.mark.parametrize("api", APIS)
def test_ipv6_address_first_where_no_route_leads_to_it(
    etcd: PrivateEtcd, run: Runner, name_server: dict[str, list[str]], api: str
) -> None:
    name_server["etcd.test"] = ["2001:db8::1", "127.0.0.1"]
    port = etcd.url.rpartition(":")[2]
    run(finds(open_store(api, f"http://etcd.test:{port}"), dial.CONNECT_S))


@pytest.mark.parametrize("api", APIS)
def test_three_endpoints_of_which_two_drop(etcd: PrivateEtcd, run: Runner, api: str) -> None:
    with dropping("127.0.0.2") as one, dropping("127.0.0.2") as two:
        urls = (f"http://127.0.0.2:{one}", f"http://127.0.0.2:{two}", etcd.url)
        run(finds(open_store(api, *urls), dial.CONNECT_S))


def test_endpoint_that_takes_connections_and_says_nothing(etcd: PrivateEtcd, run: Runner) -> None:
    """HTTP/2 that never begins, a TLS handshake that never ends; all APIs at once."""

    async def main() -> None:
        with hanging() as port:
            async with asyncio.TaskGroup() as group:
                for api, scheme in itertools.product(APIS, ("http", "https")):
                    store = open_store(api, f"{scheme}://127.0.0.1:{port}", etcd.url)
                    group.create_task(finds(store, store.round_s), name=f"{api} {scheme}")

    run(main())


@pytest.mark.parametrize("api", ["v2", "v3"])
def test_first_address_of_a_name_hangs(
    etcd: PrivateEtcd, run: Runner, name_server: dict[str, list[str]], api: str
) -> None:
    """v3 waits for no address alone; v2 asks another one after the first request failed."""
    port = int(etcd.url.rpartition(":")[2])
    name_server["etcd.test"] = ["127.0.0.2", "127.0.0.1"]

    async def main() -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.2", port))
            sock.listen(16)
            store = open_store(api, f"http://etcd.test:{port}")
            if api == "v2":
                assert isinstance(await outcome(store.network_config()), StoreUnavailable)
            await finds(store, store.round_s)

    run(main())


@pytest.mark.parametrize("api", ["v2", "v3"])
def test_who_is_cancelled_while_connecting_asks_the_next_endpoint_first(
    etcd: PrivateEtcd, run: Runner, api: str
) -> None:
    async def main() -> None:
        with dropping("127.0.0.2") as port:
            store = open_store(api, f"http://127.0.0.2:{port}", etcd.url)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(dial.ENDPOINT_STAGGER_S / 2):
                    await store.network_config()
            # Within less than it takes to go on from the first one again.
            await finds(store, dial.ENDPOINT_STAGGER_S * 0.9)

    run(main())


@pytest.mark.parametrize("api", ["v2", "v3"])
def test_who_is_cancelled_before_an_answer_asks_the_next_endpoint_first(
    etcd: PrivateEtcd, run: Runner, api: str
) -> None:
    async def main() -> None:
        with hanging() as port:
            store = open_store(api, f"http://127.0.0.1:{port}", etcd.url)
            if api == "v2":  # v3 has gone on to the next one by then
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(1.5):
                        await store.network_config()
            await finds(store, 3.0)

    run(main())


@pytest.mark.parametrize("api", ["v2", "v3"])
def test_write_goes_on_from_an_endpoint_that_drops(
    etcd: PrivateEtcd, run: Runner, api: str
) -> None:
    """It cannot have run there."""
    from tundp.lease import codec
    from tundp.lease.model import LeaseAttributes

    key = codec.parse_key("10.5.9.0-24")
    value = codec.parse_value('{"PublicIP":"192.0.2.9"}')
    assert isinstance(value, LeaseAttributes)

    async def main() -> None:
        with dropping("127.0.0.2") as port:
            store = open_store(api, f"http://127.0.0.2:{port}", etcd.url)
            lease = await store.create(key, value, None)
            await store.delete(key, revision=lease.revision)
            await store.close()

    run(main())


@pytest.mark.parametrize("api", APIS)
def test_round_has_time_for_every_endpoint(api: str) -> None:
    one = open_store(api, "http://127.0.0.1:1")
    three = open_store(api, *(f"http://127.0.0.1:{number}" for number in (1, 2, 3)))
    assert one.round_s > dial.CONNECT_S
    assert three.round_s >= 3 * one.round_s


async def test_late_lookup_is_there_for_the_next_one(
    name_server: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two name servers is dead: each lookup takes longer than anybody waits."""
    import threading

    may_answer = threading.Event()
    asked: list[str] = []

    def slow(host: str, *_: Any, **__: Any) -> list[Any]:
        asked.append(host)
        may_answer.wait()
        return [(0, socket.SOCK_STREAM, 6, "", ("192.0.2.9", 0))]

    monkeypatch.setattr("tundp.store.names.socket.getaddrinfo", slow)
    names = Names()
    with pytest.raises(socket.gaierror):
        await names.addresses("etcd.test", 0.01)
    may_answer.set()
    lookup = names._lookups["etcd.test"]
    while not lookup._unread:
        await asyncio.sleep(0.01)
    assert await names.addresses("etcd.test", 0.0) == ("192.0.2.9",)
    assert len(asked) == 1
    names.close()


async def test_first_of_several_attempts_counts_and_the_others_are_closed() -> None:
    closed: list[str] = []

    async def attempt(name: str, after_s: float, error: Exception | None = None) -> str:
        await asyncio.sleep(after_s)
        if error is not None:
            raise error
        return name

    winner = await dial.first(
        [
            lambda: attempt("slow", 60),
            lambda: attempt("dead", 0, OSError("refused")),
            lambda: attempt("good", 0.01),
            lambda: attempt("never begun", 0),
        ],
        stagger_s=0.1,
        discard=closed.append,
    )
    assert (winner.number, winner.result) == (2, "good")
    assert isinstance(winner.failures[0], TimeoutError)
    assert str(winner.failures[1]) == "refused"
    with pytest.raises(dial.NoneSucceededError) as caught:
        await dial.first(
            [lambda: attempt("a", 0, OSError("a")), lambda: attempt("b", 0, OSError("b"))],
            stagger_s=60,
            discard=closed.append,
        )
    assert [str(failure) for failure in caught.value.failures] == ["a", "b"]
