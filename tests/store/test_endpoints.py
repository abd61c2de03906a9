"""Several endpoints: who is asked, what the log says of it, and how all of them failed."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from tests.store.support import Runner, outcome
from tundp.errors import StoreUnavailable
from tundp.lab.etcd import PrivateEtcd
from tundp.store.access import EtcdAccess, parse_endpoints
from tundp.store.base import Store
from tundp.store.endpoints import Endpoints
from tundp.store.etcd2 import Etcd2Store
from tundp.store.etcd3 import Etcd3Store

ONE, TWO = parse_endpoints(["http://192.0.2.1:2379", "http://192.0.2.2:2379"])
CONFIG = "/coreos.com/network/config"


def test_each_endpoint_is_tried_once() -> None:
    endpoints = Endpoints([ONE, TWO], "etcd")
    attempts = endpoints.attempts(once=False)
    asked = []
    while attempts.may_go_on:
        asked.append(endpoints.current)
        attempts.failed(endpoints.current, "timed out", may_have_run=True)
        endpoints.rotate()
    assert asked == [ONE, TWO]
    assert str(attempts.error()) == (
        "etcd does not answer: http://192.0.2.1:2379: timed out; http://192.0.2.2:2379: timed out"
    )


@pytest.mark.parametrize(("may_have_run", "goes_on"), [(True, False), (False, True)])
def test_what_must_not_run_twice_goes_on_only_where_it_cannot_have_run(
    may_have_run: bool, goes_on: bool
) -> None:
    attempts = Endpoints([ONE, TWO], "etcd").attempts(once=True)
    attempts.failed(ONE, "closed", may_have_run=may_have_run)
    assert attempts.may_go_on is goes_on


def test_a_change_is_logged_once_and_a_long_outage_not_at_all(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    endpoints = Endpoints([ONE, TWO], "etcd v3")
    for _ in range(3):
        endpoints.answered(ONE)
    for _ in range(10):
        for endpoint in (ONE, TWO):
            endpoints.failed(endpoint, "connection refused")
            endpoints.rotate()
    assert not caplog.records
    for _ in range(3):
        endpoints.answered(TWO)
    assert caplog.messages == [
        "etcd v3: http://192.0.2.2:2379 answers, in place of http://192.0.2.1:2379"
        " (connection refused)"
    ]


@pytest.mark.parametrize("make", [Etcd2Store, Etcd3Store])
def test_stores_say_that_another_endpoint_answers(
    start_etcd: Callable[..., PrivateEtcd],
    run: Runner,
    make: Callable[[EtcdAccess], Store],
    caplog: pytest.LogCaptureFixture,
) -> None:
    etcds = [start_etcd(), start_etcd()]
    api = "v2" if make is Etcd2Store else "v3"
    caplog.set_level(logging.INFO)

    async def main() -> None:
        for etcd in etcds:
            await etcd.put(CONFIG, "{}", api=api)
        access = EtcdAccess(
            endpoints=tuple(etcd.url for etcd in etcds), prefix="/coreos.com/network"
        )
        store = make(access)
        assert await store.network_config() == "{}"
        await etcds[0].stop()
        # A request the old connection breaks under may fail; the next one may not.
        await outcome(store.network_config())
        assert await store.network_config() == "{}"
        said = [record.message for record in caplog.records if " in place of " in record.message]
        assert len(said) == 1
        assert said[0].startswith(f"etcd {api}: {etcds[1].url} answers, in place of {etcds[0].url}")
        await etcds[1].stop()
        result = await outcome(store.network_config())
        assert isinstance(result, StoreUnavailable)
        assert all(etcd.url in str(result) for etcd in etcds)
        await store.close()

    run(main())
