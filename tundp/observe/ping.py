"""What `tundp ping` finds of one peer, layer by layer: typed, as JSON, and what it comes to.

`to_json` and `from_json` are the wire format, `ping.schema.json` beside this file describes it.
PING_SCHEMA goes up when a member changes meaning, changes type or goes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, unique
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Final

from tundp.choices import MtuOrigin
from tundp.observe import codec
from tundp.observe.codec import Malformed

PING_SCHEMA: Final = 1


@unique
class LayerId(Enum):
    """What of a peer is asked; the value is its name in JSON."""

    UNDERLAY = "underlay"
    """Its host's kernel, by ICMP echo to the PublicIP."""
    PORT = "port"
    """Its UDP port."""
    TUN = "tun"
    """Its kernel behind its daemon, by ICMP echo to its TUN address through the overlay."""
    CONTROL = "control"
    """Its daemon, by a question of protocol 253 through the overlay."""
    BRIDGE = "bridge"
    """The address its pods have as gateway, the subnet's first, by ICMP echo."""


@unique
class Answer(Enum):
    """What came back from one layer; the value is its name in JSON."""

    ANSWERED = "answered"
    SILENT = "silent"
    """Nothing, within the limit."""
    REFUSED = "refused"
    """ICMP port unreachable, by the peer's host."""
    PROHIBITED = "prohibited"
    """ICMP administratively prohibited: a firewall rejects."""
    UNREACHABLE = "unreachable"
    """ICMP unreachable otherwise, or this host's kernel has no way."""
    NOT_SENT = "not-sent"
    """This host's kernel refused to send."""
    STOCK = "stock"
    """ICMP protocol unreachable: the peer's kernel has the packet, and no tundp is behind it."""
    OFF = "off"
    """Not asked, since this node's peer tools are off."""
    NOT_ASKED = "not-asked"

    @property
    def is_trouble(self) -> bool:
        """Whether something that was asked gave no answer."""
        return self not in (Answer.ANSWERED, Answer.STOCK, Answer.OFF, Answer.NOT_ASKED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer of a peer, and what came back."""

    id: LayerId
    asked: str
    """What was asked: `ICMP echo 192.0.2.2`."""
    answer: Answer
    rtt_ms: float | None = None
    """Of the first answer."""
    evidence: str = ""
    """What was seen besides, or why it was not asked."""
    meaning: str = ""
    """What it means that it did not answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """ICMP echo requests to the peer's TUN address, a number of them in a row."""

    packet_len: int
    """Bytes, the inner IPv4 header included."""
    sent: int = 0
    received: int = 0
    rtt_min_ms: float | None = None
    rtt_avg_ms: float | None = None
    rtt_max_ms: float | None = None
    rtt_mdev_ms: float | None = None
    """Jitter: the standard deviation of the round-trip times, as ping's mdev."""

    @property
    def lost(self) -> int:
        """Requests without an answer in time."""
        return self.sent - self.received


@dataclass(frozen=True, slots=True, kw_only=True)
class PathSize:
    """Which inner packets arrive at the peer with DF set."""

    device_mtu: int
    """Bytes: the largest packet the TUN takes."""
    largest: int | None
    """Bytes of the largest echo request that was answered; null if none was."""
    tried: Sequence[int] = ()
    """Bytes of those that were sent, three times each at most, in order."""
    daemon_mtu: int | None = None
    """What this node's daemon tells pods of this path; null if the device's MTU."""
    daemon_origin: MtuOrigin | None = None

    @property
    def is_black_hole(self) -> bool:
        """Whether larger packets vanish than pods are told not to send."""
        told = self.device_mtu if self.daemon_mtu is None else self.daemon_mtu
        return self.largest is not None and self.largest < told


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """The peer's clock against this node's, from one question and its answer (RFC 5905 8)."""

    offset_s: float
    """Positive: the peer's is ahead."""
    error_s: float
    """At most so wrong: half of the round-trip time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PingedPeer:
    """Who was asked."""

    public_ip: IPv4Address
    subnet: IPv4Network | None = None
    """Null: no daemon is here that knows."""
    port: int | None = None
    host: str = ""
    """Host name, as its lease says."""
    implementation: str = ""
    """What answers there: `tundp 0.2.0`, `stock flanneld`; empty if that is not known."""


@unique
class Outcome(Enum):
    """What all layers come to; the value is its name in JSON."""

    OK = "ok"
    PARTLY = "partly"
    """The overlay answers, but not all that was asked, nor packets of every size."""
    OVERLAY = "overlay"
    """Nothing comes back through the overlay, or there is no daemon here to ask it by."""
    INTERRUPTED = "interrupted"
    """Ended before the overlay had time to answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Everything `tundp ping` shows."""

    schema: int = PING_SCHEMA
    """Goes up when a member changes meaning, changes type or goes."""
    node: str
    """This node's subnet; empty without a daemon."""
    daemon: str
    """Empty, or why this node's daemon could not be asked."""
    peer: PingedPeer
    layers: Sequence[Layer]
    series: Series | None = None
    """Null: not sent."""
    path: PathSize | None = None
    """Null: not measured."""
    clock: Clock | None = None
    """Null: no tundp answered."""
    outcome: Outcome
    conclusion: str
    """One sentence for all layers together."""
    next_step: str = ""
    """What to do about it; empty if nothing is to be done."""
    notes: Sequence[str] = field(default_factory=tuple)
    """What was not looked at, and why."""

    def layer(self, wanted: LayerId) -> Layer | None:
        """One of the layers; None if it is not among them."""
        return next((each for each in self.layers if each.id is wanted), None)

    def to_json(self) -> dict[str, Any]:
        """The document `tundp ping -o json` prints."""
        return codec.to_json(self)

    @classmethod
    def from_json(cls, document: Any) -> Ping:
        """The reverse. Malformed, if the document is none of this schema."""
        if not isinstance(document, dict) or document.get("schema") != PING_SCHEMA:
            raise Malformed(f"this is no answer of tundp ping, schema {PING_SCHEMA}")
        return codec.from_json(cls, document)


class RoundTrips:
    """The sums that minimum, mean, maximum and deviation of round-trip times are made of."""

    def __init__(self) -> None:
        self.sent = 0
        self._count = 0
        self._mean = self._squares = 0.0
        self._least, self._most = math.inf, 0.0

    def add(self, rtt_s: float | None) -> None:
        """One request: its round-trip time in seconds; None: lost (Welford's method)."""
        self.sent += 1
        if rtt_s is None:
            return
        value = rtt_s * 1e3
        self._count += 1
        before = value - self._mean
        self._mean += before / self._count
        self._squares += before * (value - self._mean)
        self._least, self._most = min(self._least, value), max(self._most, value)

    def series(self, packet_len: int) -> Series:
        """What they come to."""
        if not self._count:
            return Series(packet_len=packet_len, sent=self.sent)
        return Series(
            packet_len=packet_len,
            sent=self.sent,
            received=self._count,
            rtt_min_ms=round(self._least, 4),
            rtt_avg_ms=round(self._mean, 4),
            rtt_max_ms=round(self._most, 4),
            rtt_mdev_ms=round(math.sqrt(self._squares / self._count), 4),
        )
