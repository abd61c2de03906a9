"""Lookups of host names that outlive, or fail behind, whoever asked for them."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tundp.errors import StoreUnavailable
from tundp.lab.etcd import PrivateEtcd
from tundp.store.access import EtcdAccess
from tundp.store.etcd3 import Etcd3Store
from tundp.store.names import Names

LONG_S = 60.0
getaddrinfo = socket.getaddrinfo


class NameServer:
    """What getaddrinfo asks: one answer after another, each when it is allowed to come."""

    def __init__(self) -> None:
        self.answers: list[list[str] | socket.gaierror] = []
        self.may_answer = threading.Event()
        self.asked = 0

    def getaddrinfo(self, host: str, *arguments: Any, **keywords: Any) -> list[Any]:
        if host != "etcd.test":
            return getaddrinfo(host, *arguments, **keywords)
        self.asked += 1
        assert self.may_answer.wait(LONG_S), "the test never let the name server answer"
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, socket.gaierror):
            raise answer
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in answer]


@pytest.fixture
def name_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[NameServer]:
    server = NameServer()
    server.may_answer.set()
    monkeypatch.setattr("tundp.store.names.socket.getaddrinfo", server.getaddrinfo)
    yield server
    server.may_answer.set()


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tundp.store.names.PATIENCE_S", 0.05)


async def test_ip_address_needs_no_lookup(name_server: NameServer) -> None:
    names = Names()
    assert await names.addresses("192.0.2.9", LONG_S) == ("192.0.2.9",)
    assert await names.addresses("2001:db8::9", LONG_S) == ("2001:db8::9",)
    assert name_server.asked == 0


async def test_all_addresses_in_order_each_once(name_server: NameServer) -> None:
    name_server.answers = [["192.0.2.9", "192.0.2.8", "192.0.2.9"]]
    names = Names()
    assert await names.addresses("etcd.test", LONG_S) == ("192.0.2.9", "192.0.2.8")
    names.close()


async def test_last_addresses_while_the_name_server_is_silent(name_server: NameServer) -> None:
    name_server.answers = [["192.0.2.9"]]
    names = Names()
    await names.addresses("etcd.test", LONG_S)
    name_server.may_answer.clear()
    assert await names.addresses("etcd.test", LONG_S) == ("192.0.2.9",)
    names.close()


async def test_last_addresses_when_the_name_server_fails_for_a_moment(
    name_server: NameServer,
) -> None:
    name_server.answers = [["192.0.2.9"], socket.gaierror(socket.EAI_AGAIN, "again")]
    names = Names()
    await names.addresses("etcd.test", LONG_S)
    assert await names.addresses("etcd.test", LONG_S) == ("192.0.2.9",)
    names.close()


async def test_name_that_is_gone_has_no_addresses(name_server: NameServer) -> None:
    name_server.answers = [["192.0.2.9"], socket.gaierror(socket.EAI_NONAME, "no such name")]
    names = Names()
    await names.addresses("etcd.test", LONG_S)
    with pytest.raises(socket.gaierror, match="no such name"):
        await names.addresses("etcd.test", LONG_S)
    names.close()


async def test_late_answer_serves_the_next_one_who_asks(name_server: NameServer) -> None:
    name_server.answers = [["192.0.2.9"]]
    name_server.may_answer.clear()
    names = Names()
    with pytest.raises(socket.gaierror, match=r"no name server answers for etcd\.test"):
        await names.addresses("etcd.test", 0.01)
    second = asyncio.ensure_future(names.addresses("etcd.test", LONG_S))
    await asyncio.sleep(0)
    name_server.may_answer.set()
    assert await second == ("192.0.2.9",)
    assert name_server.asked == 1
    names.close()


async def test_cancelled_waiter_leaves_the_lookup_to_the_others(name_server: NameServer) -> None:
    name_server.answers = [["192.0.2.9"]]
    name_server.may_answer.clear()
    names = Names()
    first, second = (asyncio.ensure_future(names.addresses("etcd.test", LONG_S)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    name_server.may_answer.set()
    assert await second == ("192.0.2.9",)
    assert name_server.asked == 1
    names.close()


async def test_first_address_of_a_name_takes_no_connection(name_server: NameServer) -> None:
    """The second one is tried within the time of the same request."""
    etcd = PrivateEtcd()
    await etcd.start()
    try:
        await etcd.put("/coreos.com/network/config", "{}", api="v3")
        port = int(etcd.url.rpartition(":")[2])
        with socket.socket() as full, socket.socket() as first:
            full.bind(("127.0.0.2", port))
            full.listen(0)
            first.connect(("127.0.0.2", port))  # fills the backlog: later SYNs are dropped
            name_server.answers = [["127.0.0.2", "127.0.0.1"]]
            store = Etcd3Store(
                EtcdAccess(endpoints=(f"http://etcd.test:{port}",), prefix="/coreos.com/network")
            )
            try:
                assert await store.network_config() == "{}"
            finally:
                await store.close()
    finally:
        await etcd.close()


async def test_every_address_is_named_when_none_answers(name_server: NameServer) -> None:
    name_server.answers = [["127.0.0.2", "255.255.255.255"]]
    with socket.socket() as unused:
        unused.bind(("127.0.0.2", 0))
        port = unused.getsockname()[1]
        store = Etcd3Store(EtcdAccess(endpoints=(f"http://etcd.test:{port}",), prefix="/x"))
        with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.2: connection refused, 255\.255"):
            await store.network_config()
        await store.close()
