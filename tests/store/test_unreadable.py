"""Our own lease turned into something nobody can read: a conflict, looked at calmly."""

from __future__ import annotations

import asyncio
import json
import random
from ipaddress import IPv4Address
from pathlib import Path

from tests.wait import until
from tundp.backend.choose import parse_network_config
from tundp.lease.claim import LeaseState
from tundp.lease.model import LeaseAttributes, Snapshot
from tundp.store.file import FileStore
from tundp.subnet.claim_driver import Claim, ClaimSettings


class CountingStore(FileStore):
    """The file store, counting how often it is asked for everything."""

    snapshots = 0

    async def snapshot(self) -> Snapshot:
        self.snapshots += 1
        return await super().snapshot()


async def test_an_unreadable_entry_is_no_hot_loop_and_its_conflict_ends_with_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "leases.json"
    config = {"Network": "10.5.0.0/16"}
    path.write_text(json.dumps({"config": config, "leases": {}}))
    store = CountingStore(path)
    claim = Claim(
        store,
        ClaimSettings(
            network_config=parse_network_config(json.dumps(config), "test"),
            attributes=LeaseAttributes(public_ip=IPv4Address("192.0.2.1")),
            lease_ttl_s=3600,
            margin_s=60,
        ),
        rng=random.Random(1),
    )
    lease, _ = await claim.acquire()
    document = json.loads(path.read_text())
    document["leases"][str(lease.key)] = "nonsense"
    path.write_text(json.dumps(document))
    keeping = asyncio.create_task(claim.keep())
    try:
        claim.observe_unreadable("not an object")
        before = store.snapshots
        for _ in range(20):
            # Every update of anything tells again that the entry is still bad.
            claim.observe_unreadable("not an object")
            await asyncio.sleep(0.02)
        assert claim.state is LeaseState.CONFLICT
        assert store.snapshots - before <= 3
        del document["leases"][str(lease.key)]
        path.write_text(json.dumps(document))
        claim.observe(None)

        def is_held() -> bool:
            return claim.state is LeaseState.HELD

        await until(is_held)
        assert claim.lease.key == lease.key
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await store.close()
