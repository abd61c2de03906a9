"""What people read of chaos: `tundp chaos`, and its lines in status and drops."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.text import Text

from tundp.layout import Line
from tundp.observe.status import ChaosStatus, Status

STOP = "tundp chaos stop"


def chaos_parts(found: Sequence[ChaosStatus], now: float) -> Iterator[RenderableType]:
    """A line for each peer that is or was impaired, those of now first."""
    if not any(each.is_active for each in found):
        yield Line(Text("nothing is impaired"))
    for each in found:
        yield chaos_line(each, now)


def chaos_line(chaos: ChaosStatus, now: float) -> Line:
    """One peer: what is done to its packets, for how long yet, what became of them."""
    if chaos.is_active:
        head = ("chaos", "red")
        end = f"{max(0.0, chaos.ends_at - now):.0f} s left, {STOP} ends it"
    else:
        head = ("chaos, ended", "yellow")
        at = time.strftime("%H:%M:%S", time.localtime(chaos.ended_at))
        end = f"from {time.strftime('%H:%M:%S', time.localtime(chaos.since))} to {at}"
        end += f", {chaos.why_ended}"
    return Line(
        Text.assemble(
            head,
            f" to {chaos.who}: {chaos.impairment}; seed {chaos.seed}; {end}; ",
            f"{balance_words(chaos)}",
        )
    )


def now_lines(status: Status) -> Iterator[Line]:
    """A line for each peer whose packets are impaired now."""
    for chaos in status.chaos_now:
        yield chaos_line(chaos, status.started_at + status.uptime_s)


def balance_words(chaos: ChaosStatus) -> str:
    """Every datagram by what became of it."""
    counts = chaos.counts
    into = f"{counts.get('received', 0):,} given"
    if own := counts.get("own", 0):
        into += f" ({own:,} of them echo requests of tundp's)"
    if doubled := counts.get("duplicated", 0):
        into += f" + {doubled:,} copies"
    gone = {
        "lost": "lost",
        "too_big": "too big",
        "overflow": "overflowed",
        "refused": "refused by the kernel",
        "foreign": "from another address",
        "waiting": "waiting",
    }
    parts = [f"{counts.get('sent', 0):,} sent"]
    parts += [f"{counts[name]:,} {word}" for name, word in gone.items() if counts.get(name)]
    marks = [
        f"{counts[name]:,} {name}"
        for name in ("corrupted", "delayed", "reordered")
        if counts.get(name)
    ]
    text = f"{into} = {' + '.join(parts)}"
    if not chaos.conserved:
        text += ": VIOLATED"
    return f"{text}; {', '.join(marks)}" if marks else text
