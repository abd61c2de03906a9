"""How long etcd's failures are felt: `python -m bench.outages`, on a private 3-member cluster.

Over both APIs, with stores as the daemon has them: after each failure the time until a
write goes through again, and until a store that follows has seen it. The cluster elects
after 0.5 s without its leader; etcd's default is 1 s. docs/failure-modes.md quotes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import time
import urllib.request
from collections.abc import AsyncIterator
from ipaddress import IPv4Address

from tundp.backoff import Backoff, Outage
from tundp.errors import StoreError
from tundp.lab.etcd import PrivateCluster
from tundp.lease import codec
from tundp.lease.model import Events, LeaseAttributes, LeaseKey, Snapshot
from tundp.lease.table import LeaseTable
from tundp.store.access import EtcdAccess
from tundp.store.base import Store
from tundp.store.etcd2 import Etcd2Store
from tundp.store.etcd3 import Etcd3Store
from tundp.store.follow import follow

BEHIND = 1_200
ONE = LeaseAttributes(public_ip=IPv4Address("192.0.2.1"))


def main() -> None:
    logging.basicConfig(level=logging.CRITICAL)
    logging.getLogger("etcd").setLevel(logging.CRITICAL)
    print(f"{'failure':<34}{'API':<5}{'write s':>9}{'seen s':>9}")
    for api in ("v3", "v2"):
        asyncio.run(run(api))


async def run(api: str) -> None:
    cluster = PrivateCluster(3)
    await cluster.start()
    writer = open_store(cluster, api)
    numbers = iter(range(1, 10_000))

    async def show(what: str) -> None:
        key = key_of(next(numbers))
        began = time.perf_counter()
        while True:
            try:
                await writer.create(key, ONE, None)
                break
            except StoreError:
                await asyncio.sleep(0.02)
        written = time.perf_counter() - began
        while key not in table.leases:
            await asyncio.sleep(0.005)
        print(f"{what:<34}{api:<5}{written:>9.2f}{time.perf_counter() - began:>9.2f}", flush=True)

    try:
        async with following(cluster, api) as table:
            await show("none")
            await (await cluster.leader()).stop(signal.SIGKILL)
            await show("leader killed")
            await cluster.start()
            await show("it is back")
            leader = await cluster.leader()
            os.kill(leader.pid, signal.SIGSTOP)
            await show("leader hangs (SIGSTOP)")
            os.kill(leader.pid, signal.SIGCONT)
            await asyncio.sleep(1)
            await show("it goes on")
            if api == "v3":
                await asyncio.to_thread(compact, cluster.urls[0], table.revision)
                await show("compacted under the watch")
        await catch_up(cluster, api)
    finally:
        await writer.close()
        await cluster.close()


async def catch_up(cluster: PrivateCluster, api: str) -> None:
    """A follower that was away for BEHIND events of one lease."""
    store, writer = open_store(cluster, api), open_store(cluster, api)
    revision = (await store.snapshot()).revision
    lease = await writer.create(key_of(9_999), ONE, None)
    for _ in range(BEHIND):
        lease = await writer.update(lease.key, ONE, None, revision=lease.revision)
    began = time.perf_counter()
    update: Snapshot | Events | None = None
    how = "every event"
    while revision < lease.revision:
        try:
            update = await store.wait(revision)
        except StoreError:
            how = "a snapshot"  # v2 keeps 1,000 events of all keys
            update = await store.snapshot()
        revision = update.revision
    took = time.perf_counter() - began
    print(f"{f'{BEHIND} events behind: {how}':<34}{api:<5}{'':>9}{took:>9.2f}", flush=True)
    await store.close()
    await writer.close()


@contextlib.asynccontextmanager
async def following(cluster: PrivateCluster, api: str) -> AsyncIterator[LeaseTable]:
    """A table kept up to date as the daemon keeps its own."""
    store = open_store(cluster, api)
    table = LeaseTable()

    async def watch() -> None:
        async for update in follow(store, Outage(logging.getLogger(), "store"), Backoff(0.2, 5.0)):
            table.apply(update)

    task = asyncio.ensure_future(watch())
    try:
        yield table
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await store.close()


def open_store(cluster: PrivateCluster, api: str) -> Store:
    access = EtcdAccess(endpoints=tuple(cluster.urls), prefix="/bench/network")
    return Etcd2Store(access) if api == "v2" else Etcd3Store(access)


def key_of(number: int) -> LeaseKey:
    return codec.parse_key(f"10.{number >> 8}.{number & 255}.0-24")


def compact(url: str, revision: int) -> None:
    body = json.dumps({"revision": revision, "physical": True}).encode()
    urllib.request.urlopen(f"{url}/v3/kv/compaction", body, timeout=5).close()


if __name__ == "__main__":
    main()
