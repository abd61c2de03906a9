"""What `tundp matrix` finds: every peer as this node reaches it, and the peers among themselves.

`to_json` and `from_json` are the wire format, `matrix.schema.json` beside this file describes it.
MATRIX_SCHEMA goes up when a member changes meaning, changes type or goes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, unique
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Final

from tundp.observe import codec
from tundp.observe.codec import Malformed
from tundp.observe.ping import Answer

MATRIX_SCHEMA: Final = 1


@unique
class Cell(Enum):
    """What one node knows of another one's packets; the value is its name in JSON."""

    HEARD = "heard"
    """Packets come from it, or it answers echo requests."""
    SILENT = "silent"
    """It was sent packets, and nothing comes back."""
    UNKNOWN = "unknown"
    """Nothing was exchanged lately, or it was not asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """One cell of the grid: how the node of the row reaches the node of the column."""

    cell: Cell
    rtt_ms: float | None = None
    """Of the last echo request that was answered; null if that is not known."""
    path_mtu: int | None = None
    """Bytes of an inner packet; null: the device's MTU, or not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixNode:
    """A peer, as this node reaches it."""

    subnet: IPv4Network
    public_ip: IPv4Address
    port: int | None = None
    host: str = ""
    is_asked: bool = False
    """Whether there was time for all questions; false: what is null below is not known."""
    underlay_rtt_ms: float | None = None
    """ICMP echo to the PublicIP; null: no answer."""
    overlay_rtt_ms: float | None = None
    """ICMP echo to the TUN address through the overlay, the mean; null: no answer."""
    sent: int = 0
    """Echo requests through the overlay."""
    received: int = 0
    path_mtu: int | None = None
    """Bytes of the largest inner packet that pods are told to send; null: not known."""
    is_full_size_lost: bool = False
    """Whether packets of that size do not arrive, and small ones do."""
    control: Answer = Answer.NOT_ASKED
    """What the peer's daemon answered."""
    implementation: str = ""
    """`tundp 0.2.0`, `stock flanneld`; empty if that is not known."""
    is_heard: bool = False
    """Whether datagrams came from it while it was asked, of whatever kind."""

    @property
    def lost(self) -> int:
        """Echo requests through the overlay without an answer in time."""
        return self.sent - self.received

    @property
    def is_reached(self) -> bool:
        """Whether anything came back through the overlay."""
        return self.received > 0

    @property
    def urgency(self) -> int:
        """What is worst is the lowest: silent, not asked, large packets lost, loss, the others."""
        if not self.is_asked:
            return 1
        if not self.is_reached:
            return 0
        if self.is_full_size_lost:
            return 2
        return 3 if self.lost else 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixRow:
    """What one node says of the others."""

    subnet: IPv4Network
    is_told: bool
    why_not: str = ""
    """Why it does not tell."""
    reached: Mapping[str, Reached] = field(default_factory=dict)
    """By subnet; what is not there is not known."""


@unique
class MatrixOutcome(Enum):
    """What all peers come to; the value is its name in JSON."""

    OK = "ok"
    PARTLY = "partly"
    """Every peer answers, but packets are lost, or peers do not reach each other."""
    SILENT = "silent"
    """A peer does not answer through the overlay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """Everything `tundp matrix` shows."""

    schema: int = MATRIX_SCHEMA
    """Goes up when a member changes meaning, changes type or goes."""
    node: IPv4Network
    """This node's subnet."""
    public_ip: IPv4Address
    took_s: float
    peers: Sequence[MatrixNode] = ()
    """The worst first."""
    rows: Sequence[MatrixRow] = ()
    """This node's first, then by subnet."""
    sentences: Sequence[str] = ()
    """What of it somebody should look at."""
    notes: Sequence[str] = ()
    """What was not looked at, and why."""
    outcome: MatrixOutcome

    def to_json(self) -> dict[str, Any]:
        """The document `tundp matrix -o json` prints."""
        return codec.to_json(self)

    @classmethod
    def from_json(cls, document: Any) -> Matrix:
        """The reverse. Malformed, if the document is none of this schema."""
        if not isinstance(document, dict) or document.get("schema") != MATRIX_SCHEMA:
            raise Malformed(f"this is no answer of tundp matrix, schema {MATRIX_SCHEMA}")
        return codec.from_json(cls, document)


def own_row(node: IPv4Network, peers: Sequence[MatrixNode]) -> MatrixRow:
    """This node's row: what it measured itself."""
    reached = {}
    for peer in peers:
        if peer.is_reached:
            reached[str(peer.subnet)] = Reached(
                cell=Cell.HEARD, rtt_ms=peer.overlay_rtt_ms, path_mtu=peer.path_mtu
            )
        elif peer.is_asked:
            reached[str(peer.subnet)] = Reached(cell=Cell.SILENT)
    return MatrixRow(subnet=node, is_told=True, reached=reached)


def _of_leases(row: MatrixRow, places: Mapping[str, IPv4Address]) -> MatrixRow:
    """What a node says of others in the lease table: it may name any subnet, any number of them."""
    if row.reached.keys() <= places.keys():
        return row
    return replace(row, reached={to: row.reached[to] for to in row.reached if to in places})


def judged(
    node: IPv4Network,
    public_ip: IPv4Address,
    peers: Sequence[MatrixNode],
    rows: Sequence[MatrixRow],
    *,
    took_s: float,
    notes: Sequence[str] = (),
) -> Matrix:
    """The document of what was found: sorted, with sentences and outcome. rows: of the peers."""
    places = {str(node): public_ip} | {str(peer.subnet): peer.public_ip for peer in peers}
    known = [_of_leases(row, places) for row in sorted(rows, key=lambda row: row.subnet)]
    every = [own_row(node, peers), *known]
    one_way = _one_way(every)
    about_pairs = list(_about_pairs(every, one_way, places))
    outcome = MatrixOutcome.OK
    if about_pairs or any(peer.urgency < 4 for peer in peers):
        outcome = MatrixOutcome.PARTLY
    if any(peer.urgency == 0 for peer in peers):
        outcome = MatrixOutcome.SILENT
    return Matrix(
        node=node,
        public_ip=public_ip,
        took_s=round(took_s, 3),
        peers=sorted(peers, key=lambda peer: (peer.urgency, peer.subnet)),
        rows=every,
        sentences=[*_about_peers(peers), *about_pairs],
        notes=list(notes),
        outcome=outcome,
    )


def _about_peers(peers: Sequence[MatrixNode]) -> Iterator[str]:
    """A sentence for each peer that is in trouble, as this node sees it."""
    for peer in sorted(peers, key=lambda each: (each.urgency, each.subnet)):
        who = f"{peer.subnet} at {peer.public_ip}"
        match peer.urgency:
            case 0 if peer.is_heard:
                yield (
                    f"one way: datagrams of {who} arrive here, and nothing that is sent there is"
                    f" answered: tundp ping {peer.public_ip}"
                )
            case 0:
                host = (
                    "its host answers pings"
                    if peer.underlay_rtt_ms is not None
                    else ("its host does not answer pings either")
                )
                yield f"{who} does not answer, {host}: tundp ping {peer.public_ip}"
            case 2:
                yield (
                    f"{who} answers, but no packets of {peer.path_mtu} bytes:"
                    f" tundp ping {peer.public_ip}"
                )
            case 3:
                yield f"{who}: {peer.lost} of {peer.sent} echo requests lost"


def _one_way(rows: Sequence[MatrixRow]) -> list[tuple[str, str]]:
    """Pairs of which the first hears the second, and the second not the first; sorted."""
    cells = {(str(row.subnet), to): each.cell for row in rows for to, each in row.reached.items()}
    return sorted(
        (one, other)
        for (one, other), cell in cells.items()
        if cell is Cell.HEARD and cells.get((other, one)) is Cell.SILENT
    )


def _about_pairs(
    rows: Sequence[MatrixRow],
    one_way: Sequence[tuple[str, str]],
    places: Mapping[str, IPv4Address],
) -> Iterator[str]:
    """A sentence for each pair that peers say is broken, in one direction or both."""
    for one, other in one_way:
        yield (
            f"one way: {one} hears {other}, but {other} does not hear {one}: datagrams from"
            f" {places.get(one, one)} to {places.get(other, other)} are lost, or {one} answers no"
            f" echo requests: {_there(other, one, places)}"
        )
    silent = {
        (str(row.subnet), to)
        for row in rows[1:]
        for to, each in row.reached.items()
        if each.cell is Cell.SILENT
    }
    for one, other in sorted(silent - {(other, one) for one, other in one_way}):
        if (other, one) not in silent:
            yield f"{one} does not hear {other}: {_there(one, other, places)}"
        elif one < other:
            yield f"{one} and {other} do not hear each other: {_there(one, other, places)}"


def _there(one: str, other: str, places: Mapping[str, IPv4Address]) -> str:
    """What to type on the node `one` about `other`."""
    return f"on {places.get(one, one)}: tundp ping {places.get(other, other)}"
