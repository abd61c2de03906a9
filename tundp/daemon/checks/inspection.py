"""What the checks of `tundp config check` share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from ipaddress import IPv4Network

from tundp.finding import Finding
from tundp.lease.model import Snapshot
from tundp.lease.network import (
    NetworkConfig,
)
from tundp.linux.iface import Interface
from tundp.linux.netlink import Netlink
from tundp.observe.status import Status
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
    status: Status | None = None
    """What the daemon on the admin socket says, if one answers."""
    network_config: NetworkConfig | None = None
    snapshot: Snapshot | None = None
    interface: Interface | None = None
    subnet: IPv4Network | None = None
    """This node's, or the one it would take, if that can be told."""

    @property
    def is_running(self) -> bool:
        """Whether a daemon answers on the admin socket."""
        return self.status is not None

    @property
    def node(self) -> Status | None:
        """What the daemon says if it is a node of the network that is checked."""
        status, config = self.status, self.network_config
        if status is None or config is None or status.network != config.network:
            return None
        return status


Check = Callable[[Inspection], AsyncIterator[Finding]]
