"""What many leases cost: `python -m bench.scale [COUNT ...]`, on a private etcd.

For each number of leases, over the v3 and the v2 API: how long from nothing to routes in
memory C reads, in how many requests; how long from a change in etcd to such routes; what
it takes in memory. Then how long a daemon takes from its start to the first packet
answered through it. Times depend on the machine; trust the ratios between rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import shutil
import statistics
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from tundp.backend.udp.config import udp_config
from tundp.backoff import Backoff, Outage
from tundp.engine.native.fib import NativeFib
from tundp.lab.etcd import PrivateEtcd
from tundp.lab.lab import Lab
from tundp.lab.overlay import OverlayLab, make_directory
from tundp.lab.traffic import ping
from tundp.lease import codec
from tundp.lease.model import Events, LeaseAttributes, LeaseKey, Snapshot
from tundp.lease.routing import Routing
from tundp.store.access import EtcdAccess
from tundp.store.base import Store
from tundp.store.etcd2 import Etcd2Store
from tundp.store.etcd3 import Etcd3Store
from tundp.store.follow import follow

COUNTS = (1_000, 10_000, 65_000)
EVENTS = 21
STARTS = 5
NETWORK = IPv4Network("10.0.0.0/8")
OWN = codec.parse_key("10.255.255.0-24")


def main() -> None:
    counts = [int(text) for text in sys.argv[1:]] or list(COUNTS)
    logging.basicConfig(level=logging.ERROR)
    asyncio.run(run(counts))


async def run(counts: list[int]) -> None:
    print(
        f"{'API':<4}{'leases':>8}{'sync s':>9}{'requests':>10}{'us/lease':>10}{'ratio':>7}"
        f"{'event ms':>10}{'max':>7}{'RSS MB':>8}"
    )
    for api, counted in (("v3", counts), ("v2", [count for count in counts if count <= 10_000])):
        first = None
        for count in counted:
            etcd = PrivateEtcd()
            await etcd.start()
            try:
                await fill(etcd, count, api)
                row = await measure(etcd, count, api)
            finally:
                await etcd.close()
            first = first or row["us"]
            print(
                f"{api:<4}{count:>8,}{row['sync']:>9.3f}{row['requests']:>10.0f}{row['us']:>10.1f}"
                f"{row['us'] / first:>6.2f}x{row['event']:>10.1f}{row['worst']:>7.1f}"
                f"{row['rss']:>8.0f}"
            )
    await starts()


async def fill(etcd: PrivateEtcd, count: int, api: str) -> None:
    """Write `count` leases; with v3 through stores side by side, which is what nodes do."""
    store = open_store(etcd, api)
    limit = asyncio.Semaphore(64)

    async def put(number: int) -> None:
        async with limit:
            await store.create(key_of(number), attributes_of(number), None)

    try:
        for start in range(0, count, 5_000):
            await asyncio.gather(*(put(n) for n in range(start, min(count, start + 5_000))))
    finally:
        await store.close()


def open_store(etcd: PrivateEtcd, api: str) -> Store:
    access = EtcdAccess(endpoints=(etcd.url,), prefix="/bench/network")
    return Etcd2Store(access) if api == "v2" else Etcd3Store(access)


def key_of(number: int) -> LeaseKey:
    return codec.parse_key(f"10.{number >> 8}.{number & 255}.0-24")


def attributes_of(number: int, shift: int = 0) -> LeaseAttributes:
    return LeaseAttributes(public_ip=IPv4Address(0xAC100000 + number + shift))


async def measure(etcd: PrivateEtcd, count: int, api: str) -> dict[str, float]:
    store = open_store(etcd, api)
    writer = open_store(etcd, api)
    routing = Routing(network=NETWORK, backend=udp_config(), own_key=OWN, own_addresses=[])
    kept = []

    def publish() -> None:
        kept.append(NativeFib(routing.fib()))
        del kept[:-2]

    before = requests_of(etcd, api)
    began = time.perf_counter()
    updates = follow(store, Outage(logging.getLogger("bench"), "store"), Backoff(0.1, 1.0))
    routing.apply(await anext(updates))
    publish()
    sync_s = time.perf_counter() - began
    requests = requests_of(etcd, api) - before
    assert len(routing.peers) == count, len(routing.peers)
    waits = []
    revisions = {lease.key: lease.revision for lease in routing.leases.values()}
    async with following(updates, routing, publish) as arrived:
        for number in range(EVENTS):
            key = key_of(number)
            await asyncio.sleep(0.05)
            arrived.clear()
            began = time.perf_counter()
            await writer.update(key, attributes_of(number, 1 << 18), None, revision=revisions[key])
            await arrived.wait()
            waits.append((time.perf_counter() - began) * 1000)
    await store.close()
    await writer.close()
    gc.collect()
    rss = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
    return {
        "sync": sync_s,
        "requests": requests,
        "us": sync_s / count * 1e6,
        "event": statistics.median(waits),
        "worst": max(waits),
        "rss": rss,
    }


@contextlib.asynccontextmanager
async def following(
    updates: AsyncIterator[Snapshot | Events], routing: Routing, publish: Callable[[], None]
) -> AsyncIterator[asyncio.Event]:
    """Apply updates to the ledger; the event is set after each change of routes."""
    arrived = asyncio.Event()

    async def watch() -> None:
        async for update in updates:
            if routing.apply(update).moves_packets:
                publish()
                arrived.set()

    task = asyncio.ensure_future(watch())
    try:
        yield arrived
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def requests_of(etcd: PrivateEtcd, api: str) -> float:
    """Requests the server has handled so far, by its own count."""
    with urllib.request.urlopen(f"{etcd.url}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    name = "grpc_server_handled_total{" if api == "v3" else "etcd_http_received_total{"
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


async def starts() -> None:
    """From `tundp run` to the first answer from another node through the overlay."""
    directory = make_directory()
    ready, first = [], []
    try:
        async with Lab("scale") as lab:
            overlay = OverlayLab(lab, directory)
            await overlay.build(2)
            await overlay.start_etcd({"Network": "10.5.0.0/16"})
            try:
                one, two = overlay.nodes[1], overlay.nodes[2]
                await overlay.start_daemon(two)
                await overlay.wait_ready([two])
                target = str(two.gateway.network.network_address)
                for _ in range(STARTS):
                    began = time.perf_counter()
                    await overlay.start_daemon(one)
                    await one.wait_for_peers(1)
                    ready.append(time.perf_counter() - began)
                    while await ping(one.host, target, timeout_s=0.05) is None:
                        pass
                    first.append(time.perf_counter() - began)
                    one.daemon.terminate()
                    await asyncio.to_thread(one.daemon.wait)
            finally:
                await overlay.etcd.close()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(
        f"\nstart, median of {STARTS}: {statistics.median(ready):.2f} s to a lease and a peer,"
        f" {statistics.median(first):.2f} s to the first answered packet"
        f" (at most {max(first):.2f} s)"
    )


if __name__ == "__main__":
    main()
