"""What the subnet manager says of the store and our lease."""

from __future__ import annotations

import random
import time
from ipaddress import IPv4Address
from pathlib import Path

from tests.lease_plane import Silent
from tundp.backend.choose import parse_network_config
from tundp.lease.model import LeaseAttributes
from tundp.store.file import FileStore
from tundp.subnet.manager import LeaseSettings, StoreSubnetManager

OFFER = LeaseAttributes(public_ip=IPv4Address("192.0.2.1"))


async def test_a_store_that_gave_the_lease_is_answering_before_its_first_update(
    tmp_path: Path,
) -> None:
    """A healthy start must not be reported as one from the lease cache."""
    path = tmp_path / "leases.json"
    path.write_text('{"config": {"Network": "10.5.0.0/16"}}\n')
    store = FileStore(path)
    manager = StoreSubnetManager(
        store,
        identity=None,
        parse=parse_network_config,
        lease=LeaseSettings(lease_ttl_s=600, margin_s=60),
        rng=random.Random(1),
    )
    before = time.time()
    try:
        config = await manager.network_config(Silent())
        acquired = await manager.acquire(config, OFFER, previous=None, progress=Silent())
        state = manager.state()
    finally:
        await manager.close()
    assert acquired.cache_age_s is None
    assert (state.is_answering, state.is_synced, state.age_s) == (True, True, 0)
    assert state.synced_at is not None
    assert before <= state.synced_at <= time.time()
