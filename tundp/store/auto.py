"""The API of etcd that holds the network config, found by looking: v3, or v2.

Both are asked once, until one has it. Where both do, v3 counts unless this node has its lease
in v2 alone, with a warning: a cluster between two flannels wants `--etcd-api=both`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from tundp.errors import ConfigNotFound, StoreUnavailable
from tundp.lease.model import Events, Lease, LeaseAttributes, LeaseKey, Snapshot
from tundp.store.base import Store, StoreWarning

_log = logging.getLogger(__name__)

V2: Final = "v2"
V3: Final = "v3"
SURE_AFTER: Final = 5
"""Looks at which only v2 answered, after which there is no v3 API (an etcd 2.x)."""
_TWO_CONFIGS: Final = StoreWarning(
    id="two-configs",
    evidence="there is a network config in etcd v3 and in v2: v3 counts, and nodes in v2 stay"
    " unseen",
    next_step="--etcd-api=both serves both, --etcd-api=v2 the other one; or delete the one that"
    " nobody uses",
)


_OURS_IN_V2: Final = StoreWarning(
    id="two-configs",
    evidence="there is a network config in etcd v3 and in v2: v2 counts, since this node's lease"
    " is there and not in v3; nodes in v3 stay unseen",
    next_step="--etcd-api=both serves both, --etcd-api=v3 the other one; or delete the one that"
    " nobody uses",
)


class AutoStore:
    """The Store behind `--etcd-api=auto`: one of two, from the first network config on.

    is_ours: whether a lease is this node's, from before: where both have a network config, that
    decides.
    """

    def __init__(
        self, v2: Store, v3: Store, *, is_ours: Callable[[Lease], bool] = lambda lease: False
    ) -> None:
        self._is_ours = is_ours
        self._candidates = {V2: v2, V3: v3}
        self._chosen: Store | None = None
        self.api = ""
        """`v2` or `v3`, empty until it is known."""
        self._v3_failures = 0
        self._own_warnings: tuple[StoreWarning, ...] = ()

    @property
    def description(self) -> str:
        """Where the leases live, for people."""
        if self._chosen is not None:
            return self._chosen.description
        return " or ".join(store.description for store in self._candidates.values())

    @property
    def warnings(self) -> tuple[StoreWarning, ...]:
        """Of the choice, and those of the chosen one, or of both as long as there is none."""
        theirs = [warning for store in self._open for warning in store.warnings]
        return (*self._own_warnings, *dict.fromkeys(theirs))

    @property
    def round_s(self) -> float:
        """See Store."""
        return max(store.round_s for store in self._open)

    async def choose_api(self, api: str) -> None:
        """See Store."""
        if self._chosen is None and api in self._candidates:
            self.api, self._chosen = api, self._candidates.pop(api)
            for other in self._candidates.values():
                await other.close()

    async def network_config(self) -> str:
        """See Store. Decides which API it is."""
        if self._chosen is not None:
            return await self._chosen.network_config()
        v2, v3 = await asyncio.gather(
            *(self._candidates[api].network_config() for api in (V2, V3)), return_exceptions=True
        )
        if isinstance(v3, str):
            if isinstance(v2, str):
                is_v2 = await self._is_ours_in_v2_alone()
                warning = _OURS_IN_V2 if is_v2 else _TWO_CONFIGS
                self._own_warnings = (warning,)
                _log.warning("%s; %s", warning.evidence, warning.next_step)
                if is_v2:
                    await self.choose_api(V2)
                    return v2
            await self.choose_api(V3)
            return v3
        if isinstance(v2, str):
            self._v3_failures += 1
            is_sure = isinstance(v3, ConfigNotFound) or (
                isinstance(v3, StoreUnavailable) and self._v3_failures >= SURE_AFTER
            )
            if is_sure:
                await self.choose_api(V2)
                return v2
            # It may have one, too, which would count: better a moment later than in the wrong one.
            raise v3
        if isinstance(v3, ConfigNotFound) and isinstance(v2, ConfigNotFound):
            raise ConfigNotFound(f"{v3}; nor is there one in v2: {v2}")
        # Where v2 is switched off its 404 tells nothing; what v3 says does.
        raise v3

    async def _is_ours_in_v2_alone(self) -> bool:
        """Whether this node's lease is in v2 and not in v3. StoreError if one does not answer."""
        v2, v3 = await asyncio.gather(*(self._candidates[api].snapshot() for api in (V2, V3)))
        return any(map(self._is_ours, v2.leases)) and not any(map(self._is_ours, v3.leases))

    async def snapshot(self) -> Snapshot:
        """See Store."""
        return await (await self._store()).snapshot()

    async def wait(self, after: int) -> Events | Snapshot:
        """See Store."""
        return await (await self._store()).wait(after)

    async def create(
        self, key: LeaseKey, attributes: LeaseAttributes, lease_ttl_s: int | None
    ) -> Lease:
        """See Store."""
        return await (await self._store()).create(key, attributes, lease_ttl_s)

    async def update(
        self,
        key: LeaseKey,
        attributes: LeaseAttributes,
        lease_ttl_s: int | None,
        *,
        revision: int,
    ) -> Lease:
        """See Store."""
        return await (await self._store()).update(key, attributes, lease_ttl_s, revision=revision)

    async def delete(self, key: LeaseKey, *, revision: int) -> None:
        """See Store."""
        await (await self._store()).delete(key, revision=revision)

    def reconnect(self) -> None:
        """See Store."""
        for store in self._open:
            store.reconnect()

    async def close(self) -> None:
        """See Store."""
        for store in self._open:
            await store.close()

    @property
    def _open(self) -> list[Store]:
        return [*self._candidates.values()] if self._chosen is None else [self._chosen]

    async def _store(self) -> Store:
        """The one, looked for now if it is not known yet: a start from memory did not look."""
        if self._chosen is None:
            await self.network_config()
        if self._chosen is None:
            raise StoreUnavailable("which API of etcd has the leases is not known yet")
        return self._chosen
