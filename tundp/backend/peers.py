"""Questions to other nodes, and what came of them, as the daemon sees it.

A backend that can ask has `PeerTools`; wire/peer_message.py has what is said, and how.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from enum import Enum, unique
from ipaddress import IPv4Network
from typing import Generic, Protocol, TypeVar

from tundp.lease.model import Peer
from tundp.wire.peer_bodies import Hello, PeerRecord, Reaches

T_co = TypeVar("T_co", covariant=True)


@unique
class Outcome(Enum):
    """What became of a question; the value is its name in the answers of the admin socket."""

    ANSWER = "answer"
    """The node answered, if only to refuse."""
    UNREACHABLE = "protocol-unreachable"
    """Its kernel answered that it knows no such protocol: flanneld, or tundp without peer tools."""
    SILENCE = "silence"
    OFF = "off"
    """Peer tools are off on this node: nothing was asked."""
    NOT_SENT = "not-sent"
    """The question could not be sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked(Generic[T_co]):
    """What became of a question."""

    outcome: Outcome
    detail: str
    """The same in words, and why."""
    rtt_s: float | None = None
    """From the question to the answer, or to the kernel's refusal."""
    asked_ns: int = 0
    """Unix time of the question that was answered, by this node's clock."""
    answered_ns: int = 0
    """Unix time the answer was read."""
    answer: T_co | None = None
    """None without an answer, and if the node refused to give one: `detail` has its words."""


@dataclass(frozen=True, slots=True)
class Clock:
    """The other node's clock less this one's."""

    offset_ns: int
    error_ns: int
    """Half of what the question and its answer were on the way: the offset is within so much."""


def clock_of(asked: Asked[Hello]) -> Clock | None:
    """The offset as NTP estimates it (RFC 5905 section 8); None without an answer."""
    hello = asked.answer
    if hello is None:
        return None
    on_the_way = (asked.answered_ns - asked.asked_ns) - (hello.sent_ns - hello.received_ns)
    offset = (hello.received_ns - asked.asked_ns) + (hello.sent_ns - asked.answered_ns)
    return Clock(offset // 2, max(0, on_the_way) // 2)


@dataclass(frozen=True, slots=True)
class TraceBegun:
    """The other node shows packets from now on."""

    hello: Hello
    clock: Clock


@dataclass(frozen=True, slots=True)
class TraceLost:
    """So many of its records are lost so far. Comes once a second, too, as a sign of life."""

    count: int
    is_all: bool
    """Whether the other node had no more records when it was asked."""


@dataclass(frozen=True, slots=True)
class TraceEnded:
    """It shows none any more, or never did, and why."""

    outcome: Outcome
    text: str


TracePart = TraceBegun | TraceLost | TraceEnded | PeerRecord


class PeerTools(Protocol):
    """Who asks other nodes, and answers them."""

    @property
    def sent(self) -> int:
        """Messages sent so far, questions and answers: no engine counts them."""
        ...

    def find(self, subnet: IPv4Network) -> Peer | None:
        """The peer whose lease is, or covers, this subnet."""
        ...

    async def hello(self, peer: Peer) -> Asked[Hello]:
        """Ask who it is. TooBusy."""
        ...

    async def reach(self, peer: Peer, start: int) -> Asked[Reaches]:
        """Ask how it reaches the other peers, from an index on. TooBusy."""
        ...

    def trace(
        self, peer: Peer, packets: str, seconds: float | None
    ) -> AsyncGenerator[TracePart, None]:
        """What it sees of the packets that the two nodes exchange and a filter lets through.

        Ends after `seconds`, if any, with the last TraceEnded, and when closed.
        """
        ...
