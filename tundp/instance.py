"""Which daemon of a host: everything whose name must differ between several of them.

Daemons of one host are told apart by --subnet-file, as flannel's are. The one with the default
subnet file has flannel's own names; another one's follow from its subnet file, so that two
daemons that differ in --subnet-file, and in nothing else, share no file, socket or chain.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SUBNET_FILE: Final = Path("/run/flannel/subnet.env")
RUN_DIRECTORY: Final = Path("/run/tundp")
_SOCKET_NAME_MAX: Final = 80
"""sockaddr_un has room for a path of 107 bytes; the end of a subnet file's name tells most."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One daemon of this host."""

    subnet_file: Path = SUBNET_FILE

    @property
    def name(self) -> str:
        """Unique on this host; empty for the daemon with the default subnet file."""
        if self.subnet_file == SUBNET_FILE:
            return ""
        return str(self.subnet_file.absolute()).strip("/").replace("-", "--").replace("/", "-")

    @property
    def admin_socket(self) -> Path:
        """The default of --admin-socket."""
        name = self.name[-_SOCKET_NAME_MAX:] if self.name else "admin"
        return RUN_DIRECTORY / f"{name}.sock"

    @staticmethod
    def recorder(admin_socket: Path) -> Path:
        """The flight recorder of the daemon with that admin socket, beside it."""
        return admin_socket.with_name(f"{admin_socket.name.removesuffix('.sock')}.blackbox")

    @property
    def lock(self) -> Path:
        """The file a running daemon holds a lock on."""
        return self.subnet_file.with_name(f".{self.subnet_file.name}.lock")

    @property
    def chain_suffix(self) -> str:
        """Ends the names of firewall chains and tables; short: a chain's has 28 characters."""
        return hashlib.sha256(self.name.encode()).hexdigest()[:8] if self.name else ""

    @property
    def lease_cache(self) -> str:
        """The name of the lease cache, a file in --state-dir."""
        return f"last-known-{self.name}.json" if self.name else "last-known.json"

    @property
    def node_id_suffix(self) -> str:
        """Ends the node id: each instance is a node of its own."""
        if not self.name:
            return ""
        return f"-{hashlib.sha256(f'tundp {self.name}'.encode()).hexdigest()[:4]}"
