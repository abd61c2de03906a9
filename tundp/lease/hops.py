"""Hop ids and FIB rows: the routing ledger's peers in numbers.

Each endpoint has a number, the same for all subnets that lead to it and across
generations of the FIB, so that engines keep what they learn and count per hop in arrays
that never move. The id of an endpoint that no lease leads to is kept for it: a peer that
comes back finds its id, path state and counters again. After KEPT_ENDPOINTS others the
id is given to a new endpoint, but never while a packet thread may still use a FIB in which
it stood for the old one (`note_seen`), and `RoutingDelta.hops_assigned` says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Network
from typing import Final

import numpy as np
import numpy.typing as npt

from tundp.lease.fib import FIRST_HOP_ID, HOP_DTYPE, HOP_STOCK, HOPS_MAX, row_of
from tundp.lease.model import Endpoint, Peer

KEPT_ENDPOINTS: Final = 256
"""Endpoints without a lease whose hop ids are kept for their return."""


@dataclass(slots=True)
class Hops:
    """Hop ids: which endpoint has which, and how many subnets lead there."""

    _ids: dict[Endpoint, int] = field(default_factory=dict)
    _counts: dict[Endpoint, int] = field(default_factory=dict)
    _stock: dict[Endpoint, int] = field(default_factory=dict)
    """How many of the subnets that lead to an endpoint have a stock flanneld's lease."""
    flag_changes: int = 0
    """How often an endpoint with an id got other flags."""
    _kept: dict[Endpoint, int] = field(default_factory=dict)
    """Endpoints no lease leads to, oldest first, and the generation that last had them."""
    _seen: int = 0
    _end: int = FIRST_HOP_ID
    _array: npt.NDArray[np.void] = field(default_factory=lambda: np.zeros(64, HOP_DTYPE))

    @property
    def view(self) -> npt.NDArray[np.void]:
        """HOP_DTYPE, indexed by hop id; valid until the next change."""
        return self._array[: self._end]

    def note_seen(self, generation: int) -> None:
        """No FIB older than `generation` is in use any more."""
        self._seen = max(self._seen, generation)

    @property
    def has_room(self) -> bool:
        """Whether an id is left for an endpoint that has none."""
        return self._end < HOPS_MAX or self._reusable(kept=0) is not None

    def is_full(self, endpoint: Endpoint) -> bool:
        """Whether `endpoint` would need an id, and none is left."""
        return endpoint not in self._ids and not self.has_room

    def take(self, endpoint: Endpoint, *, is_stock: bool = False) -> tuple[int, bool]:
        """The id for one subnet more; and whether it stood for another endpoint, or none, before.

        is_stock: a stock flanneld holds it. Each `take` wants a `release` with the same.
        """
        self._stock[endpoint] = self._stock.get(endpoint, 0) + is_stock
        self._counts[endpoint] = self._counts.get(endpoint, 0) + 1
        self._kept.pop(endpoint, None)
        known = self._ids.get(endpoint)
        if known is not None:
            self._write(endpoint)
            return known, False
        kept = KEPT_ENDPOINTS if self._end < HOPS_MAX else 0
        if (former := self._reusable(kept=kept)) is not None:
            del self._kept[former]
            hop_id = self._ids.pop(former)
        else:
            hop_id = self._end
            self._end += 1
            if hop_id == len(self._array):
                self._array = np.concatenate([self._array, np.zeros_like(self._array)])
        self._ids[endpoint] = hop_id
        self._write(endpoint)
        return hop_id, True

    def _write(self, endpoint: Endpoint) -> None:
        row = self._array[self._ids[endpoint]]
        flags = HOP_STOCK if self._stock[endpoint] else 0
        self.flag_changes += bool(row["address"]) and int(row["flags"]) != flags
        self._array[self._ids[endpoint]] = (int(endpoint.address), endpoint.port, flags)

    def release(self, endpoint: Endpoint, generation: int, *, is_stock: bool = False) -> None:
        """One subnet less leads to `endpoint`; FIBs up to `generation` may have it."""
        self._counts[endpoint] -= 1
        self._stock[endpoint] -= is_stock
        if self._counts[endpoint]:
            self._write(endpoint)
        if not self._counts[endpoint]:
            del self._counts[endpoint], self._stock[endpoint]
            self._kept[endpoint] = generation
            self._array[self._ids[endpoint]] = (0, 0, 0)

    def _reusable(self, *, kept: int) -> Endpoint | None:
        """The endpoint that gave its id up longest ago, if more than `kept` have."""
        if len(self._kept) <= kept:
            return None
        endpoint, generation = next(iter(self._kept.items()))
        return endpoint if generation < self._seen else None


@dataclass(slots=True)
class Rows:
    """The peers in numbers, a row each, in no order: what a FIB is made of in one go."""

    _array: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((64, 3), np.int64))
    _subnets: list[IPv4Network] = field(default_factory=list)
    _row_of: dict[IPv4Network, int] = field(default_factory=dict)

    @property
    def view(self) -> npt.NDArray[np.int64]:
        """int64, shape (peers, 3), as `fib.row_of` makes them; valid until the next change."""
        return self._array[: len(self._subnets)]

    def put(self, peer: Peer) -> None:
        """Add the peer's row, or overwrite it."""
        row = self._row_of.get(peer.subnet)
        if row is None:
            row = self._row_of[peer.subnet] = len(self._subnets)
            self._subnets.append(peer.subnet)
            if row == len(self._array):
                self._array = np.concatenate([self._array, np.zeros_like(self._array)])
        self._array[row] = row_of(peer)

    def remove(self, subnet: IPv4Network) -> None:
        """Remove a row; the last one takes its place."""
        row = self._row_of.pop(subnet)
        last = self._subnets.pop()
        if last != subnet:
            self._subnets[row] = last
            self._row_of[last] = row
            self._array[row] = self._array[len(self._subnets)]
