"""One round of `tundp top`: what a daemon did between two looks at its counters.

Counts are exact differences of the daemon's counters, but for flows, which are added up from
event records (observe/events.py) and are an estimate once records are lost. Rates are a second's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from tundp.observe.codec import to_json

TOP_SCHEMA: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRate:
    """What was exchanged with the node at one endpoint. Bytes and bits are of inner packets."""

    subnet: str
    """The first subnet that leads there."""
    subnets: int = 1
    """How many subnets lead there: they have one set of counters."""
    public_ip: str
    port: int | None = None
    """Null for a backend without one."""
    standing: str = ""
    """Whether it answers, as in the status: `answers`, `one-way`, `silent`; empty: not asked."""
    is_counted: bool = True
    """False: the daemon counts no packets of this peer, and the figures mean nothing."""
    packets_out: int = 0
    """In this round; so are the next four."""
    packets_in: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    drops: int = 0
    """Packets for it that were dropped."""
    packets_out_s: float = 0.0
    packets_in_s: float = 0.0
    bits_out_s: float = 0.0
    bits_in_s: float = 0.0
    drops_s: float = 0.0
    rtt_ms: float | None = None
    """Of the last echo request it answered."""
    heard_s: float | None = None
    """Seconds since the last datagram from it; null for never."""
    path_mtu: int | None = None
    """Bytes of the largest inner packet that arrives there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowRate:
    """Packets of one protocol between two inner addresses and ports, in both directions."""

    protocol: str
    """`TCP`, `UDP`, `ICMP`, or its number; `not IPv4` for whatever is none."""
    local: str
    """Address on this node's side: source of what was read from the TUN."""
    local_port: int | None = None
    """Null for protocols without ports, and for fragments but the first."""
    remote: str
    remote_port: int | None = None
    peer: str = ""
    """Underlay address of the other node; empty if none has the remote address."""
    packets_out: int = 0
    """Seen in this round: read from the TUN, dropped ones included; bytes likewise."""
    packets_in: int = 0
    """Seen in this round: received from the other node, dropped ones included."""
    bytes_out: int = 0
    bytes_in: int = 0
    packets_out_s: float = 0.0
    """This and the next three count in what was lost, in proportion."""
    packets_in_s: float = 0.0
    bits_out_s: float = 0.0
    bits_in_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Flows:
    """The flows of a round, and how much of them was seen."""

    filter: str = ""
    """Canonical text; empty for every packet."""
    records: int = 0
    """Event records that were read in this round."""
    lost: int = 0
    """Event records that were lost meanwhile, as far as known: above 0 rates are estimates."""
    unlisted: int = 0
    """Packets of more flows than are told apart in a round."""
    error: str = ""
    """Why no events come; empty if they do."""
    seconds: float = 0.0
    """Length of the round for flows."""
    total: int = 0
    """Flows with packets in this round."""
    rows: Sequence[FlowRate] = ()
    """Flows idle in this round follow for a few rounds, with zeros."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DropRate:
    """Packets dropped for one reason in one direction."""

    direction: str
    reason: str
    count: int = 0
    """In this round."""
    total: int = 0
    """Since the daemon's start."""
    drops_s: float = 0.0
    next_step: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectionRate:
    """All packets of one direction: encap from the TUN, decap from the UDP socket."""

    direction: str
    packets_in: int = 0
    """Read or received in this round."""
    packets_out: int = 0
    """Sent or written in this round."""
    bytes_in: int = 0
    bytes_out: int = 0
    drops: int = 0
    packets_s: float = 0.0
    """Of packets_in."""
    bits_s: float = 0.0
    """Of bytes_in."""
    drops_s: float = 0.0
    reads_s: float = 0.0
    """Reads or receives that brought something."""
    writes_s: float = 0.0
    """Sends or writes that took something."""
    packets_per_read: float | None = None
    """Batch size; null without a read."""
    packets_per_write: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadRate:
    """CPU time of the daemon's threads of one kind, as parts of one CPU: 0.5 is half of one."""

    name: str
    """`packets`: the packet threads; `loop`: the event loop; `others`."""
    threads: int
    user: float
    system: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TopRound:
    """Everything `tundp top` shows of one round."""

    schema: int = TOP_SCHEMA
    version: str
    """Of the daemon."""
    node: str
    """PublicIP of the daemon's node; empty while it has none."""
    subnet: str = ""
    engine: str = ""
    """Empty for a backend that leaves packets to the kernel."""
    pid: int
    started_at: float
    """When the daemon started, Unix time."""
    at: float
    """When the round ended, by the daemon's clock, Unix time."""
    seconds: float
    """Length of the round; 0: there was no look before, so all counts and rates are 0."""
    interval_s: float
    """Time between two looks now: longer than asked for if the daemon needs long to answer."""
    restarted: bool = False
    """Whether another daemon answered than in the round before: counts begin anew."""
    peers_total: int = 0
    """Endpoints there are; `peers` may hold fewer of them."""
    silent_peers: int | None = None
    """Peers known not to answer; null for a backend that cannot tell."""
    directions: Sequence[DirectionRate] = ()
    syscalls_s: float = 0.0
    """Of the packet threads."""
    tun_queue_drops: int = 0
    """Packets the kernel dropped in this round, as the TUN's queue was full."""
    threads: Sequence[ThreadRate] = ()
    """Empty if the daemon's process cannot be seen from here."""
    peers: Sequence[PeerRate] = ()
    drops: Sequence[DropRate] = ()
    """Reasons that occurred since the daemon's start."""
    flows: Flows | None = None
    """Null while flows are not looked at."""
    notes: Sequence[str] = ()
    """What could not be looked at, and why."""

    @property
    def uptime_s(self) -> float:
        """How long the daemon has been running."""
        return self.at - self.started_at

    def to_json(self) -> dict[str, Any]:
        """The document of `tundp top -o json`."""
        return to_json(self)
