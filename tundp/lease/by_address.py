"""The keys of leases by their PublicIP: who is concerned when the way to an address changes."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address

from tundp.lease.model import LeaseKey


class KeysByAddress:
    """Adding, discarding and finding cost the same whatever the number of leases.

    An address nearly always has one lease; a set is made for the second one.
    """

    def __init__(self) -> None:
        self._keys: dict[IPv4Address, LeaseKey | set[LeaseKey]] = {}

    def add(self, address: IPv4Address, key: LeaseKey) -> None:
        """Note that the lease `key` has this PublicIP."""
        known = self._keys.setdefault(address, key)
        if isinstance(known, set):
            known.add(key)
        elif known != key:
            self._keys[address] = {known, key}

    def discard(self, address: IPv4Address, key: LeaseKey) -> None:
        """Note that the lease `key` has this PublicIP no more; or never had."""
        known = self._keys.get(address)
        if isinstance(known, set):
            known.discard(key)
            if not known:
                del self._keys[address]
        elif known == key:
            del self._keys[address]

    def of(self, address: IPv4Address) -> Iterable[LeaseKey]:
        """The keys of the leases with this PublicIP, in no order; a copy."""
        known = self._keys.get(address)
        if known is None:
            return ()
        return tuple(known) if isinstance(known, set) else (known,)
