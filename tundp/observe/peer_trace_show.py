"""The other node's half of a trace, as people and programs read it. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tundp.observe.events import Event
from tundp.observe.peer_trace import Half, Joined, their_events
from tundp.observe.stories import story_lines
from tundp.observe.trace import Trace, event_document, next_step, runs, stage_line, went
from tundp.wire.event import Stage

# What people read


def joined_lines(joined: Joined, number: int, node: str) -> Iterator[str]:
    """A story with the other node's half where it belongs."""
    half, story = joined.half, joined.story
    if half is None:
        yield from story_lines(story, number, node)
        return
    assert story.trace is not None
    theirs, base_ns = list(their_events(half)), story.trace.first.time_ns
    if half.is_sender and theirs:
        base_ns = min(event.time_ns for event in theirs)
    head, *rest = story_lines(story, number, node, base_ns)
    yield head
    other = [*_their_lines(half, theirs, story.trace, base_ns), *_missing_lines(half)]
    yield from (*other, *rest) if half.is_sender else (*rest, *other)


def _missing_lines(half: Half) -> Iterator[str]:
    if missing := half.missing():
        yield f"  {half.view.node} {'':>9}  {missing}"


def _their_lines(half: Half, events: Sequence[Event], own: Trace, base_ns: int) -> Iterator[str]:
    begins = Stage.TUN_READ if half.is_sender else Stage.UDP_RECEIVE
    ordered = sorted(events, key=lambda event: (event.stage is not begins, event.time_ns))
    for run in runs(ordered):
        event = run[0]
        text = went(run)
        if event.stage is begins and not event.record.is_dropped:
            many = sum(each.record.packets for each in run)
            text = f"{many} packets" if many > 1 else ""
        crossed = _crossed_ns(half, event, own)
        text = ", ".join(filter(None, (text, _wire(crossed, half.view.error_ns))))
        yield stage_line(half.view.node, event.time_ns - base_ns, event, text)
        if step := next_step(event.reason):
            yield f"    next step: {step}"


def _crossed_ns(half: Half, event: Event, own: Trace) -> int | None:
    """How long a packet was between the nodes, at the stage of the other one that shows it."""
    if event.record.is_dropped:
        return None
    if half.is_sender and event.stage is Stage.UDP_SEND:
        return own.first.time_ns - event.time_ns
    if event.stage is Stage.UDP_RECEIVE:
        return event.time_ns - half.after_ns
    return None


def _wire(crossed_ns: int | None, error_ns: int) -> str:
    if crossed_ns is None:
        return ""
    return f"wire {crossed_ns / 1000:.0f}us (clock \N{PLUS-MINUS SIGN}{error_ns / 1000:.0f}us)"


# What programs read


def peer_document(half: Half | None) -> Mapping[str, Any] | None:
    """The other node's half; times are Unix nanoseconds of this node's clock."""
    if half is None:
        return None
    view, hello = half.view, half.view.hello
    events = sorted(their_events(half), key=lambda event: event.time_ns)
    return {
        "node": view.node,
        "state": view.state.value,
        "version": hello.get("version"),
        "clock_offset_s": hello.get("offset_s"),
        "clock_error_s": hello.get("error_s"),
        "packets": half.wanted,
        "missing": len(half.keys),
        "is_lost": half.is_lost,
        "detail": half.missing(),
        "events": [event_document(replace(each, peer=None)) for each in events],
    }
