"""What the checks of `tundp config check` share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from tundp.finding import Finding
from tundp.lease.model import Snapshot
from tundp.lease.network import (
    NetworkConfig,
)
from tundp.linux.iface import Interface
from tundp.linux.netlink import Netlink
from tundp.settings.settings import Settings
from tundp.store.base import Store


@dataclass(slots=True, kw_only=True)
class Inspection:
    """What checks share: the inputs, and what earlier checks found out."""

    settings: Settings
    store: Store
    netlink: Netlink
    whose: str
    """In words, whose settings these are."""
    is_running: bool = False
    """Whether a daemon answers on the admin socket."""
    network_config: NetworkConfig | None = None
    snapshot: Snapshot | None = None
    interface: Interface | None = None


Check = Callable[[Inspection], AsyncIterator[Finding]]
