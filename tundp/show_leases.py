"""What people read of leases: who has which subnet, and who had it when.

Everything here returns renderables; the command line prints them, with `crop=False`.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final

from rich.console import RenderableType
from rich.text import Text

from tundp.layout import Cell, Column, Grid, Line
from tundp.observe.leases import LeaseEvent, Leases
from tundp.printable import LINE_MAX, printable

SHOWN: Final = 20
"""Reasons for refusals that are printed."""


def lease_parts(answer: Leases) -> Iterator[RenderableType]:
    """Every lease, by subnet: who has it, and what comes of it."""
    columns = (
        Column(head="lease"),
        Column(head="PublicIP"),
        Column(head="is"),
        Column(head="node", spare=2),
        Column(head="host", spare=1),
        Column(head="TTL", is_right=True, spare=3),
        Column(head="revision", is_right=True, spare=2),
    )
    rows: list[list[Cell]] = [
        [
            each.key,
            str(each.public_ip),
            Text(each.state, {"own": "bold", "refused": "yellow"}.get(each.state, "")),
            each.node_id,
            each.host,
            "never expires"
            if each.is_reservation
            else ("" if each.ttl_s is None else f"{each.ttl_s:,} s"),
            str(each.revision),
        ]
        for each in answer.leases
    ]
    yield Grid(columns=columns, rows=rows or [["none", *[""] * (len(columns) - 1)]])
    for each in [each for each in answer.leases if each.reason][:SHOWN]:
        yield Line(Text.assemble(("refused:", "yellow"), f" {each.key} {each.reason}"))
    yield Line(Text(f"store revision {answer.revision}"))


def history_parts(answer: Leases) -> Iterator[RenderableType]:
    """What happened to leases, oldest first."""
    if answer.forgotten:
        yield Line(Text(f"{answer.forgotten:,} older events are kept no more", "yellow"))
    for event in answer.events:
        yield Line(Text(event_line(event)))


def event_line(event: LeaseEvent) -> str:
    """2026-08-14T09:01:02.345Z rev 42 moved 10.5.7.0-24: 192.0.2.9, before 192.0.2.7, in 1.2 ms."""
    at = datetime.fromtimestamp(event.at, tz=UTC).isoformat(timespec="milliseconds")
    text = f"{at.replace('+00:00', 'Z')} rev {event.revision} {event.kind}"
    text += f" {event.key}" if event.key else ""
    about = [str(event.public_ip)] if event.public_ip is not None else []
    if event.node_id:
        about.append(f"node {event.node_id}" + (f" ({event.host})" if event.host else ""))
    if event.before is not None and event.before != event.public_ip:
        about.append(f"before {event.before}")
    if event.node_before and event.node_before != event.node_id:
        about.append(f"before node {event.node_before}")
    about += filter(None, [event.text])
    if event.applied_ms is not None:
        about.append(f"in {event.applied_ms:.1f} ms")
    return printable(f"{text}: {', '.join(about)}" if about else text, LINE_MAX)
