"""Stories: what the daemon's stages and netfilter know of the same packet, put together.

Pure: times come with the records.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tundp.linux.nft_trace import Path, Step
from tundp.observe.trace import Trace, event_document, is_ipv4, lines
from tundp.wire import describe

HOLD_NS: Final = 250_000_000
"""A trace waits so long for netfilter's account of its packet."""


@dataclass(slots=True)
class Story:
    """A packet's trace, and its way through netfilter; at least one of them."""

    trace: Trace | None
    path: Path | None = None

    @property
    def is_dropped(self) -> bool:
        """Whether any packet of it was dropped, by whomever."""
        return (self.trace is not None and self.trace.is_dropped) or (
            self.path is not None and self.path.drop is not None
        )

    @property
    def packet(self) -> bytes:
        """Its first bytes, or what netfilter says of them."""
        if self.trace is not None:
            return self.trace.first.packet
        assert self.path is not None
        return self.path.header()


class Stories:
    """Joins traces with what netfilter says of the same packets, which comes a little later."""

    def __init__(self, *, has_paths: bool) -> None:
        """has_paths: whether netfilter is asked, so that a trace has to wait for it."""
        self._hold_ns = HOLD_NS if has_paths else 0
        self._waiting: deque[tuple[int, Story]] = deque()

    def add_trace(self, trace: Trace, now_ns: int) -> None:
        """A trace that is complete."""
        key = packet_key(trace.first.packet)
        for _, story in self._waiting:
            if story.trace is None and story.path is not None and story.path.key == key:
                story.trace = trace
                return
        self._waiting.append((now_ns + self._hold_ns, Story(trace)))

    def add_path(self, path: Path, now_ns: int) -> None:
        """A packet that left netfilter, or was dropped in it."""
        for _, story in self._waiting:
            if (
                story.path is None
                and story.trace is not None
                and packet_key(story.trace.first.packet) == path.key
            ):
                story.path = path
                return
        self._waiting.append((now_ns + self._hold_ns, Story(None, path)))

    def due(self, now_ns: int) -> Iterator[Story]:
        """Stories that need not wait any longer, but those of packets the engine never had."""
        while self._waiting and self._waiting[0][0] <= now_ns:
            story = self._waiting.popleft()[1]
            if story.trace is not None or story.is_dropped:
                yield story


def packet_key(packet: bytes) -> tuple[int, int, int] | None:
    """Source, destination and IP id; None if that is not there."""
    if not is_ipv4(packet):
        return None
    source, destination = (int.from_bytes(packet[at : at + 4], "big") for at in (12, 16))
    return source, destination, int.from_bytes(packet[4:6], "big")


# What people read


def story_lines(story: Story, number: int, node: str) -> Iterator[str]:
    """One story: the packet, its stages, and netfilter's part where it belongs."""
    trace, path = story.trace, story.path
    if trace is None:
        assert path is not None
        length = int(path.fields.get("length", "0"))
        yield f"#{number} {describe.packet(path.header(), length)}"
        yield from _path_lines(path, node)
        return
    head, *rest = lines(trace, number, node)
    yield head
    if path is not None and trace.first.stage.is_encap:
        yield from _path_lines(path, node)
    yield from rest
    if path is not None and not trace.first.stage.is_encap:
        yield from _path_lines(path, node)


def _path_lines(path: Path, node: str) -> Iterator[str]:
    start = f"  {node} {'':>9}  netfilter    "
    came = f"in by {path.fields['iif']}, " if "iif" in path.fields else ""
    if (step := path.drop) is not None:
        rule = f"handle {step.handle}: {step.text}" if step.handle is not None else "policy"
        yield f"{start}{came}DROP {step.where}, {rule}"
        yield f"    lets it pass: {step.mend}"
        return
    decided = [step for step in path.steps if step.verdict.startswith("accept")]
    by = ", ".join(dict.fromkeys(_accepted(step) for step in decided))
    yield f"{start}{came}accepted{f' by {by}' if by else ''}"


def _accepted(step: Step) -> str:
    rule = "policy" if step.handle is None else f"handle {step.handle}"
    return f"{step.where} {rule}"


# What programs read


def document(story: Story, number: int) -> Mapping[str, Any]:
    """One story, with every record of it; times are Unix nanoseconds."""
    trace, path = story.trace, story.path
    return {
        "number": number,
        "packet": describe.packet(story.packet, None if trace is None else _length(trace)),
        "is_complete": trace is not None and trace.is_complete,
        "is_dropped": story.is_dropped,
        "events": [] if trace is None else list(map(event_document, (trace.first, *trace.rest))),
        "netfilter": None if path is None else _path_document(path),
    }


def _length(trace: Trace) -> int:
    return trace.first.record.length


def _path_document(path: Path) -> Mapping[str, Any]:
    return {
        "unix_ns": path.began_ns,
        "fields": dict(path.fields),
        "dropped_by": None if path.drop is None else path.drop.where,
        "steps": [
            {
                "chain": step.where,
                "rule": step.text,
                "handle": step.handle,
                "verdict": step.verdict,
            }
            for step in path.steps
        ],
    }
