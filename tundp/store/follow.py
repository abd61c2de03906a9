"""Follow a store: a snapshot, then events, and a new snapshot after events were compacted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator

from tundp.backoff import Backoff, Outage
from tundp.errors import Compacted, StoreError
from tundp.lease.model import Events, Snapshot
from tundp.store.base import Store

_log = logging.getLogger(__name__)


async def follow(
    store: Store, outage: Outage, backoff: Backoff
) -> AsyncGenerator[Snapshot | Events, None]:
    """Yield every update of the leases, in order, until cancelled. No error ends it.

    While the store is away nothing is yielded, so whoever consumes this keeps what it
    has: known peers stay reachable. `outage` tells whether it is away right now.
    """
    clock = asyncio.get_running_loop().time
    revision: int | None = None
    lost_count = 0
    while True:
        update: Snapshot | Events
        try:
            update = await (store.snapshot() if revision is None else store.wait(revision))
        except Compacted as error:
            _log.debug("%s: taking a snapshot: %s", store.description, error)
            revision = None
            lost_count += 1
            if lost_count > 1:
                # Snapshot and watch disagree, e.g. about a member that lags: no hot loop.
                outage.failed(error, now=clock())
                await asyncio.sleep(backoff.next_s())
            continue
        except StoreError as error:
            # A snapshot is the quickest way to know that the store is back.
            revision = None
            outage.failed(error, now=clock())
            await asyncio.sleep(backoff.next_s())
            continue
        if revision is not None:
            lost_count = 0
        if lost_count < 2:
            outage.ended(now=clock())
            backoff.reset()
        revision = update.revision
        yield update
