"""What people read of `tundp ping`: the layers of a peer, and what they come to.

Everything here returns renderables; the command line prints them, with `crop=False`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from rich.console import RenderableType
from rich.text import Text

from tundp.layout import Cell, Column, Grid, Line
from tundp.observe.ping import (
    Answer,
    Clock,
    Layer,
    LayerId,
    Outcome,
    PathSize,
    Ping,
    PingedPeer,
    Series,
)
from tundp.printable import LINE_MAX, printable

_TITLES: Final = {
    LayerId.UNDERLAY: "underlay",
    LayerId.PORT: "UDP port",
    LayerId.TUN: "TUN (its kernel)",
    LayerId.CONTROL: "daemon",
    LayerId.BRIDGE: "pod bridge",
}
_COLOURS: Final = {
    Answer.ANSWERED: "green",
    Answer.STOCK: "green",
    Answer.OFF: "",
    Answer.NOT_ASKED: "yellow",
}
_WORDS: Final = {
    Answer.ANSWERED: "answers",
    Answer.SILENT: "no answer",
    Answer.NOT_SENT: "not sent",
    Answer.NOT_ASKED: "not asked",
    Answer.STOCK: "answers",
}
_OUTCOMES: Final = {
    Outcome.OK: ("ok:", "green"),
    Outcome.PARTLY: ("partly:", "yellow"),
    Outcome.OVERLAY: ("FAILS:", "red"),
    Outcome.INTERRUPTED: ("interrupted:", "yellow"),
}


def head_line(peer: PingedPeer) -> Line:
    """Who is asked."""
    name = f" ({peer.host})" if peer.host else ""
    port = "" if peer.port is None else f":{peer.port}"
    subnet = "" if peer.subnet is None else f"{peer.subnet} at "
    return Line(Text(f"{subnet}{peer.public_ip}{port}{name}"))


def layers_grid(layers: Sequence[Layer]) -> Grid:
    """A line a layer, from the underlay up."""
    columns = (
        Column(head="layer"),
        Column(head="asked"),
        Column(head="verdict"),
        Column(head="RTT", is_right=True),
        Column(head="", wraps=True),
    )
    rows: list[list[Cell]] = [
        [
            _TITLES[each.id],
            each.asked,
            Text(_WORDS.get(each.answer, each.answer.value), _colour(each)),
            "" if each.rtt_ms is None else milliseconds(each.rtt_ms),
            "; ".join(filter(None, (each.evidence, each.meaning))),
        ]
        for each in layers
    ]
    return Grid(columns=columns, rows=rows)


def _colour(layer: Layer) -> str:
    """A bridge that does not answer is no fault."""
    return _COLOURS.get(layer.answer, "yellow" if layer.id is LayerId.BRIDGE else "red")


def echo_line(number: int, to: str, rtt_ms: float | None, refusal: str = "") -> Line:
    """One echo request of a series, as it is decided."""
    if rtt_ms is not None:
        return Line(Text(f"{to}: seq {number} {milliseconds(rtt_ms)}"))
    return Line(Text(f"{to}: seq {number} {refusal or 'no answer'}", "yellow"))


def summary_parts(found: Ping) -> Iterator[RenderableType]:
    """Path, loss, times and clock; then one sentence for all, and what to do."""
    if found.path is not None:
        yield Line(Text(f"path  {_path(found.path)}"))
    if found.series is not None:
        yield Line(_series(found.series))
    if found.clock is not None:
        yield Line(Text(f"clock {clock_words(found.clock)}"))
    for note in found.notes:
        yield Line(Text(f"note  {printable(note, LINE_MAX)}"))
    mark, colour = _OUTCOMES[found.outcome]
    yield Line(Text.assemble((mark, colour), f" {found.conclusion}"))
    if found.next_step:
        yield Line(Text(f"  do: {found.next_step}"))


def _path(path: PathSize) -> str:
    if path.daemon_mtu is None:
        told = f"the device's MTU, {path.device_mtu}"
    else:
        by = "" if path.daemon_origin is None else f" ({path.daemon_origin.value})"
        told = f"{path.daemon_mtu}{by}, the device has {path.device_mtu}"
    if path.largest is None:
        return f"no packet of {path.tried[-1]} bytes or more arrives; pods are told {told}"
    if path.largest == path.device_mtu and path.daemon_mtu is None:
        return f"packets of {path.largest} bytes arrive with DF: all that the device takes"
    return f"packets of {path.largest} bytes arrive with DF, no larger ones; pods are told {told}"


def _series(series: Series) -> Text:
    text = Text("loss  ")
    text.append(f"{series.lost}/{series.sent}", "red" if series.lost else "green")
    text.append(f" of {series.packet_len} bytes")
    if series.rtt_avg_ms is not None:
        values = (series.rtt_min_ms, series.rtt_avg_ms, series.rtt_max_ms, series.rtt_mdev_ms)
        numbers = "/".join(f"{value:.3f}" for value in values if value is not None)
        text.append(f", RTT min/avg/max/mdev {numbers} ms")
    return text


def clock_words(clock: Clock) -> str:
    """`+0.12 ms (±0.20 ms)`: positive if the peer's clock is ahead."""
    return f"{clock.offset_s * 1e3:+,.2f} ms (±{clock.error_s * 1e3:,.2f} ms) against ours"


def milliseconds(value: float) -> str:
    """0.42 ms, 12.3 ms, 1,234 ms."""
    if value >= 100:
        return f"{value:,.0f} ms"
    return f"{value:.1f} ms" if value >= 10 else f"{value:.2f} ms"
