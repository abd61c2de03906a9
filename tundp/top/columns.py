"""The tables of `tundp top`: the columns of each view, the order of rows, the text of a cell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, unique
from typing import Any, Final

from tundp.layout import Figure
from tundp.observe.top import DropRate, FlowRate, PeerRate, TopRound
from tundp.printable import LINE_MAX, printable

_TROUBLE: Final = ("silent", "refused")
_UNKNOWN: Final = "-"


@unique
class Shown(Enum):
    """Which table is shown."""

    PEERS = "peers"
    FLOWS = "flows"
    DROPS = "drops"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column."""

    id: str
    """What `--sort` calls it."""
    head: str
    value: Callable[[Any], Any]
    """What it is sorted by, the greatest first; of texts the first in the alphabet."""
    text: Callable[[Any], str] | None = None
    """What it shows; None: the value, as a figure."""
    spare: int = 0
    """What is left out first when there is no room: the highest. 0 is never left out."""
    is_text: bool = False
    """Whether its cells begin in line, and are sorted from A to Z."""
    ends: bool = False
    """Whether it is the last one, and takes what room is left, cut there."""

    def words(self, row: Row, *, is_exact: bool) -> str:
        """The cell of a row. is_exact: every digit of a figure, as programs want it."""
        if self.text is not None:
            return self.text(row)
        if isinstance(row, PeerRate) and not row.is_counted:
            return _UNKNOWN
        return (exact if is_exact else figure)(self.value(row))


def figure(value: float) -> str:
    """A rate to three digits: 0, <0.1, 0.4, 1,234, 12.3 k."""
    return _small(value) or Figure(round(value)).scaled


def exact(value: float) -> str:
    """The same for programs and pipes: every digit."""
    return _small(value) or f"{round(value):,}"


def _small(value: float) -> str:
    """A rate that is not nothing, and would be if it were rounded; else empty."""
    if 0 < value < 0.05:
        return "<0.1"
    return f"{value:.1f}" if 0 < value < 9.95 and round(value, 1) != round(value) else ""


def since(seconds: float | None) -> str:
    """A time span as people say it: 5s, 3m, 4h, 2d."""
    if seconds is None:
        return "never"
    for limit, unit, letter in ((120, 1, "s"), (7200, 60, "m"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{int(seconds / unit)}{letter}"
    return f"{int(seconds / 86400)}d"


def _rtt(peer: PeerRate) -> str:
    return "" if peer.rtt_ms is None else f"{peer.rtt_ms:.3g}ms"


def _subnet(peer: PeerRate) -> str:
    return peer.subnet if peer.subnets == 1 else f"{peer.subnet} +{peer.subnets - 1}"


def _endpoint(peer: PeerRate) -> str:
    return peer.public_ip if peer.port is None else f"{peer.public_ip}:{peer.port}"


def _place(address: str) -> tuple[int, ...]:
    """Where an address or a subnet stands among others."""
    try:
        return tuple(int(part) for part in address.replace("/", ".").split("."))
    except ValueError:
        return ()


def _end(address: str, port: int | None) -> str:
    return address if port is None else f"{address}:{port}"


def _rate(id: str, head: str, spare: int, value: Callable[[Any], float]) -> Column:  # noqa: A002
    return Column(id=id, head=head, spare=spare, value=value)


PEER_COLUMNS: Final = (
    Column(
        id="subnet",
        head="SUBNET",
        text=_subnet,
        value=lambda row: _place(row.subnet),
        is_text=True,
    ),
    Column(
        id="peer",
        head="PEER",
        text=_endpoint,
        value=lambda row: _place(row.public_ip),
        is_text=True,
        spare=5,
    ),
    Column(
        id="answers",
        head="ANSWERS",
        text=lambda row: {"answers": "yes"}.get(row.standing, row.standing),
        value=lambda row: (row.standing not in _TROUBLE, not row.standing, row.standing),
        is_text=True,
        spare=4,
    ),
    _rate("out-pps", "OUT p/s", 3, lambda row: row.packets_out_s),
    _rate("in-pps", "IN p/s", 3, lambda row: row.packets_in_s),
    _rate("out-bps", "OUT b/s", 0, lambda row: row.bits_out_s),
    _rate("in-bps", "IN b/s", 0, lambda row: row.bits_in_s),
    _rate("drops", "DROP/s", 1, lambda row: row.drops_s),
    Column(
        id="rtt",
        head="RTT",
        text=_rtt,
        value=lambda row: -1.0 if row.rtt_ms is None else row.rtt_ms,
        spare=7,
    ),
    Column(
        id="heard",
        head="HEARD",
        text=lambda row: since(row.heard_s) if row.is_counted else _UNKNOWN,
        value=lambda row: float("inf") if row.heard_s is None else row.heard_s,
        spare=6,
    ),
    Column(
        id="mtu",
        head="MTU",
        text=lambda row: _UNKNOWN if row.path_mtu is None else str(row.path_mtu),
        value=lambda row: -(row.path_mtu or 0),
        spare=8,
    ),
)
FLOW_COLUMNS: Final = (
    Column(
        id="local",
        head="LOCAL",
        text=lambda row: _end(row.local, row.local_port),
        value=lambda row: (_place(row.local), row.local_port or 0),
        is_text=True,
        spare=4,
    ),
    Column(
        id="remote",
        head="REMOTE",
        text=lambda row: _end(row.remote, row.remote_port),
        value=lambda row: (_place(row.remote), row.remote_port or 0),
        is_text=True,
    ),
    Column(
        id="protocol",
        head="PROTO",
        text=lambda row: row.protocol,
        value=lambda row: row.protocol,
        is_text=True,
        spare=5,
    ),
    Column(
        id="peer",
        head="PEER",
        text=lambda row: row.peer,
        value=lambda row: _place(row.peer),
        is_text=True,
        spare=6,
    ),
    _rate("out-pps", "OUT p/s", 3, lambda row: row.packets_out_s),
    _rate("in-pps", "IN p/s", 3, lambda row: row.packets_in_s),
    _rate("out-bps", "OUT b/s", 0, lambda row: row.bits_out_s),
    _rate("in-bps", "IN b/s", 0, lambda row: row.bits_in_s),
)
DROP_COLUMNS: Final = (
    Column(
        id="direction",
        head="WAY",
        text=lambda row: row.direction,
        value=lambda row: row.direction,
        is_text=True,
        spare=1,
    ),
    Column(
        id="reason",
        head="REASON",
        text=lambda row: row.reason,
        value=lambda row: row.reason,
        is_text=True,
    ),
    _rate("drops", "DROP/s", 0, lambda row: row.drops_s),
    _rate("total", "TOTAL", 2, lambda row: row.total),
    Column(
        id="next",
        head="NEXT STEP",
        text=lambda row: row.next_step,
        value=lambda row: row.next_step,
        is_text=True,
        spare=3,
        ends=True,
    ),
)
COLUMNS: Final[Mapping[Shown, Sequence[Column]]] = {
    Shown.PEERS: PEER_COLUMNS,
    Shown.FLOWS: FLOW_COLUMNS,
    Shown.DROPS: DROP_COLUMNS,
}
TRAFFIC: Final = "traffic"
"""What peers and flows are sorted by at first: bits in both directions, no column."""
FIRST_SORT: Final[Mapping[Shown, str]] = {
    Shown.PEERS: TRAFFIC,
    Shown.FLOWS: TRAFFIC,
    Shown.DROPS: "drops",
}

Row = PeerRate | FlowRate | DropRate


def sort_names(shown: Shown) -> tuple[str, ...]:
    """What the rows of a view can be sorted by."""
    names = tuple(column.id for column in COLUMNS[shown])
    return names if shown is Shown.DROPS else (TRAFFIC, *names)


def rows_of(found: TopRound, shown: Shown) -> Sequence[Row]:
    """The rows of a view, unsorted."""
    if shown is Shown.PEERS:
        return found.peers
    if shown is Shown.DROPS:
        return found.drops
    return () if found.flows is None else found.flows.rows


def sorted_rows(
    rows: Sequence[Row], shown: Shown, sort: str, *, is_reversed: bool = False
) -> Sequence[Row]:
    """The rows by a column: the busiest first, texts from A to Z; equal ones by the first column.

    is_reversed: the other way around.
    """
    # Peers come by subnet as they are.
    found = rows if shown is Shown.PEERS else sorted(rows, key=COLUMNS[shown][0].value)
    if sort == TRAFFIC:
        return sorted(
            found,
            key=lambda row: row.bits_out_s + row.bits_in_s,  # type: ignore[union-attr]
            reverse=not is_reversed,
        )
    column = next(each for each in COLUMNS[shown] if each.id == sort)
    return sorted(found, key=column.value, reverse=column.is_text == is_reversed)


def is_trouble(row: Row) -> bool:
    """Whether an operator should look at a row."""
    return isinstance(row, PeerRate) and row.standing in _TROUBLE


def fit_columns(
    columns: Sequence[Column], cells: Sequence[Sequence[str]], width: int | None
) -> tuple[list[int], list[int]]:
    """Which columns fit into `width` characters, and how wide each of these is.

    The ones that matter least are left out, those of no spare never.
    """
    kept = list(range(len(columns)))
    while True:
        widths = [_width(columns, cells, at) for at in kept]
        if width is None or sum(widths) + len(kept) - 1 <= width:
            return kept, widths
        spare = max(columns[at].spare for at in kept)
        if not spare:
            return kept, widths
        kept = [at for at in kept if columns[at].spare < spare]


_END_MIN: Final = 20
"""Characters below which the column that ends a line is left out."""


def _width(columns: Sequence[Column], cells: Sequence[Sequence[str]], at: int) -> int:
    head = len(columns[at].head)
    if columns[at].ends:
        return max(head, _END_MIN)
    return max(head, *(len(row[at]) for row in cells)) if cells else head


def cell(text: str, width: int, column: Column) -> str:
    """A cell in its place."""
    shown = printable(text, LINE_MAX)
    if column.ends:
        return shown
    return f"{shown:<{width}}" if column.is_text else f"{shown:>{width}}"
