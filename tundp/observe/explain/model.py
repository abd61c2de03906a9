"""What `tundp explain` is asked and answers, typed; `to_json` is its --json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, unique
from ipaddress import IPv4Address
from typing import Any, Final

from tundp.observe import codec

EXPLAIN_SCHEMA: Final = 1


@unique
class Ruling(Enum):
    """What one step says of the packet."""

    OK = "ok"
    """It passes."""
    NOTE = "note"
    """It passes; good to know."""
    WARN = "warn"
    """It passes, and something is wrong or lets others not pass."""
    DROP = "drop"
    """It ends here."""
    UNKNOWN = "unknown"
    """Could not be looked at, or not be judged."""


@unique
class Verdict(Enum):
    """What becomes of the packet."""

    DELIVERED = "delivered"
    """No step of this node drops it."""
    DROPPED = "dropped"
    UNKNOWN = "unknown"
    """No step drops it, but some could not be looked at or judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A packet nobody sends."""

    source: IPv4Address
    destination: IPv4Address
    proto: str = ""
    """`tcp`, `udp` or `icmp`; empty: each of them is tried."""
    port: int | None = None
    """The destination's."""
    size: int
    """Bytes of the inner packet, IPv4 header included."""
    dont_fragment: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One place the packet comes by."""

    id: str
    """Stable, for programs."""
    title: str
    ruling: Ruling
    evidence: str
    """What was seen."""
    command: str = ""
    """What mends it, or shows more of it: one line of shell for this host; empty if none does."""
    words: str = ""
    """What to do where no line of shell for this host does it: in the pod, at the peer, a flag."""
    reason: str = ""
    """The name of the drop reason that the packet would be counted under, if it is one."""

    @property
    def advice(self) -> str:
        """What to do, for people: the command, and what else there is to say."""
        return "; ".join(filter(None, (self.command, self.words)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """All steps of one packet, and what becomes of it."""

    schema: int = EXPLAIN_SCHEMA
    """Goes up when a member changes meaning, changes type or goes."""
    question: Question
    direction: str
    """`encap`, `decap`, `routed` (the overlay has no part in it) or `elsewhere` (not this node)."""
    leases_of: str
    """Where the lease table is from."""
    steps: Sequence[Step]
    verdict: Verdict
    summary: str
    """The verdict in a sentence."""
    command: str = ""
    """What mends the step that drops it, or shows more of it: one line of shell for this host."""
    words: str = ""
    """What else to do about it, as in its step; or where else to ask."""
    not_looked_at: Sequence[str] = ()
    """What else the packet depends on, and nobody can see from here."""

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return codec.to_json(self)
