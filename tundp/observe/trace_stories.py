"""Stories: traces joined with netfilter's account of the same packets. Pure: times are given."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Final

from tundp.linux.nft_trace import Path
from tundp.observe.trace import Story, Trace, packet_key

HOLD_NS: Final = 250_000_000
"""A trace waits so long for netfilter's account of its packet."""
WAITING_MAX: Final = 4096
"""Stories that wait for their other part, at most: a second of netfilter's part at bulk traffic
would be a hundred thousand."""


_Key = tuple[int, int, int] | None


class Stories:
    """Joins traces with what netfilter says of the same packets, which comes a little later.

    At most WAITING_MAX wait: where more come, the oldest are due before their time.
    """

    def __init__(self, *, has_paths: bool) -> None:
        """has_paths: whether netfilter is asked, so that a trace has to wait for it."""
        self._hold_ns = HOLD_NS if has_paths else 0
        self._waiting: deque[tuple[int, Story]] = deque()
        self._traces: dict[_Key, deque[Story]] = {}
        """Those that wait for netfilter's part, by packet, oldest first."""
        self._paths: dict[_Key, deque[Story]] = {}
        """Those that wait for the engine's part."""

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def add_trace(self, trace: Trace, now_ns: int) -> None:
        """A trace that is complete."""
        key = packet_key(trace.first.packet)
        if (story := _taken(self._paths, key)) is not None:
            story.trace = trace
            return
        story = Story(trace)
        self._traces.setdefault(key, deque()).append(story)
        self._waiting.append((now_ns + self._hold_ns, story))

    def add_path(self, path: Path, now_ns: int) -> None:
        """A packet that left netfilter, or was dropped in it."""
        if (story := _taken(self._traces, path.key)) is not None:
            story.path = path
            return
        story = Story(None, path)
        self._paths.setdefault(path.key, deque()).append(story)
        self._waiting.append((now_ns + self._hold_ns, story))

    def due(self, now_ns: int) -> Iterator[Story]:
        """Stories that need not wait any longer, but those of packets the engine never had."""
        while self._waiting and (self._waiting[0][0] <= now_ns or len(self._waiting) > WAITING_MAX):
            story = self._waiting.popleft()[1]
            # Of one packet's stories with the same part missing, the oldest is due first.
            if story.path is None and story.trace is not None:
                _taken(self._traces, packet_key(story.trace.first.packet))
            elif story.trace is None and story.path is not None:
                _taken(self._paths, story.path.key)
            if story.trace is not None or story.is_dropped:
                yield story


def _taken(stories: dict[_Key, deque[Story]], key: _Key) -> Story | None:
    """The oldest story of a packet, which is removed; None if there is none."""
    queue = stories.get(key)
    if queue is None:
        return None
    story = queue.popleft()
    if not queue:
        del stories[key]
    return story
