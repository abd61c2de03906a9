"""Following a store for ever: a snapshot, then events, and a snapshot again when they are lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

from tundp.backoff import Backoff, Outage
from tundp.errors import Compacted, StoreError
from tundp.lease.model import Events, Snapshot
from tundp.store.base import Store

_log = logging.getLogger(__name__)


async def follow(
    store: Store, outage: Outage, backoff: Backoff
) -> AsyncIterator[Snapshot | Events]:
    """Every update of the leases, in order, until cancelled. No error ends it.

    While the store is away nothing is yielded, so whoever consumes this keeps what it
    has: known peers stay reachable. `outage` tells whether it is away right now.
    """
    clock = asyncio.get_running_loop().time
    revision: int | None = None
    while True:
        update: Snapshot | Events
        try:
            update = await (store.snapshot() if revision is None else store.wait(revision))
        except Compacted as error:
            _log.debug("%s: taking a snapshot: %s", store.description, error)
            revision = None
            continue
        except StoreError as error:
            outage.failed(error, now=clock())
            await asyncio.sleep(backoff.next_s())
            continue
        outage.ended(now=clock())
        backoff.reset()
        revision = update.revision
        yield update
