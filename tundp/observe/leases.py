"""Who has which subnet, and who had it: the answer of the admin socket to `tundp leases`, typed.

`to_json` and `from_json` are the wire format, `leases.schema.json` beside this file describes it.
LEASES_SCHEMA goes up when a member changes meaning, changes type or goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Final

from tundp.observe import codec
from tundp.observe.codec import Malformed

LEASES_SCHEMA: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRecord:
    """A lease as the store has it."""

    key: str
    """As the store spells it: 10.5.1.0-24."""
    subnet: IPv4Network
    public_ip: IPv4Address
    state: str
    """`own`, `peer`, or `refused`."""
    reason: str = ""
    """Why it is refused: no packets are sent to it."""
    node_id: str = ""
    """Of the node that wrote it; empty for stock flannel's."""
    host: str = ""
    """That node's host name."""
    backend_type: str = ""
    revision: int
    """The store's version of the entry."""
    is_reservation: bool = False
    """Whether it never expires."""
    ttl_s: int | None = None
    """Of our own lease the seconds left; of others those there were when the store last told of
    it, null where it does not say (etcd v3). Null for a reservation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseEvent:
    """Something that happened to a lease, or to the table of leases, since the daemon started."""

    number: int
    """Counts the events since the start."""
    at: float
    """When this node learnt of it, Unix time."""
    revision: int
    """The store's revision of the update that brought it."""
    kind: str
    """`come`, `moved` (another PublicIP or backend), `taken` (another node, the same PublicIP),
    `gone`, `refused`, `unreadable`; `snapshot` for the whole table, `more` for many at once."""
    key: str = ""
    public_ip: IPv4Address | None = None
    """Who has it now; of `gone` who had it."""
    before: IPv4Address | None = None
    """Who had it before."""
    node_id: str = ""
    host: str = ""
    node_before: str = ""
    """The node id that had it before."""
    text: str = ""
    """Why it is refused or unreadable; how many there were."""
    applied_ms: float | None = None
    """From the update to a table that packets go by; null for what moves no packet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leases:
    """Everything `tundp leases` shows."""

    schema: int = LEASES_SCHEMA
    """Goes up when a member changes meaning, changes type or goes."""
    revision: int
    """The store's revision of the table."""
    own_key: str
    leases: Sequence[LeaseRecord] = ()
    """By subnet; empty if only events were asked for."""
    events: Sequence[LeaseEvent] = ()
    """Oldest first."""
    next_number: int = 0
    """Ask for events from this number on for what comes after these."""
    forgotten: int = 0
    """Events since the start that are kept no more."""

    def to_json(self) -> dict[str, Any]:
        """The document the admin socket answers with."""
        return codec.to_json(self)

    @classmethod
    def from_json(cls, document: Any) -> Leases:
        """The reverse. Malformed, if the document is none of this schema."""
        if not isinstance(document, dict) or "schema" not in document:
            raise Malformed("these are no leases of a daemon")
        if document["schema"] != LEASES_SCHEMA:
            raise Malformed(
                f"the leases have schema {document['schema']}, and this tundp reads"
                f" {LEASES_SCHEMA}: the daemon is of another version"
            )
        return codec.from_json(cls, document)
