"""What the daemons are held to while they are attacked; pure where it can be."""

from __future__ import annotations

import asyncio
import http.client
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench.hostile import memory
from bench.hostile.common import HEALTH_PORT, HONEST, Score
from tundp.admin import fetch_document
from tundp.errors import PlatformError
from tundp.lab.overlay import LabNode
from tundp.lab.traffic import PingStream
from tundp.observe.health import LAG_MAX_S

MB: Final = 1 << 20
SAMPLE_S: Final = 2.0
ANSWER_S: Final = 2.0
"""A status must be there within this, less what this program's own event loop was late."""
GROWTH_BYTES: Final = 8 << 20
GROWTH_SHARE: Final = 0.12
"""Of memory after the warm-up third: the larger of the two is allowed, over the whole run."""
SHORT_S: Final = 900.0
"""Runs shorter than this are still warming up for the most part: SHORT_GROWTH_BYTES are allowed.
Measured in an hour: 25 MB in the first six minutes, at most 1.5 MB in the last forty. Before malloc
and connections were bounded it was up to 27 MB in 400 s, in steps (linux/heap.py)."""
SHORT_GROWTH_BYTES: Final = 24 << 20
LOG_BYTES_S: Final = 4096.0
LOG_FIRST_BYTES: Final = 64 << 10
"""Of any log: each kind of line may come a few times at once before it is held back."""
FDS: Final = 12
THREADS: Final = 12
STALL: Final = re.compile(
    rb"event loop was late by (?P<late>\d+) ms, (?P<waited>\d+|not known how much)"
)
"""daemon/stall_watch.py's words."""
BAD_LINE: Final = re.compile(
    rb"Traceback|\bbug\b|please report|never awaited|\bexception was never", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at one daemon's process; bytes and numbers."""

    at: float
    rss: int
    fds: int
    threads: int
    places: Mapping[str, int] = field(default_factory=dict)
    """Of `rss`, by memory.places."""


@dataclass(slots=True)
class Watched:
    """What is known of one daemon."""

    node: LabNode
    pid: int
    samples: list[Sample] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    overflows: int = 0
    looked_at: float = 0.0
    slowest_s: float = 0.0
    unanswered: int = 0
    silent_probes: int = 0
    dead_probes: int = 0
    starved_probes: int = 0
    """Those that found an event loop late, which had been ready and had no processor."""
    last_stall: str = ""
    """What the daemon's log said last of a late event loop."""
    document: dict[str, Any] = field(default_factory=dict)
    log_at: int = 0


def had_no_processor(line: str) -> bool:
    """Whether a late event loop would have been in time with a processor of its own."""
    found = STALL.search(line.encode())
    if found is None or not found["waited"].isdigit():
        return False
    return int(found["late"]) - int(found["waited"]) < LAG_MAX_S * 1000


class Judge:
    """Looks at every daemon each SAMPLE_S; `faults` is what was found, each text once."""

    def __init__(self, score: Score, nodes: Sequence[LabNode]) -> None:
        self.score = score
        self.began = time.monotonic()
        self.watched = [Watched(node, node.daemon.pid) for node in nodes]
        self.faults: dict[str, str] = {}
        """By kind and node: the first of each."""
        self.late_s = 0.0
        self.looks = 0
        self.slack = 1.0
        """Factor of ANSWER_S, for a machine that is busy with something else."""

    def found(self, kind: str, detail: str) -> None:
        """Note a fault; the first of its kind counts."""
        if kind not in self.faults:
            at = time.monotonic() - self.began
            self.faults[kind] = f"{detail} (at {at:.0f} s)"
            print(f"FAULT {kind}: {self.faults[kind]}", flush=True)

    async def own_lateness(self) -> None:
        """How late this program's event loop is, since somebody last asked."""
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.05)
            self.late_s = max(self.late_s, time.monotonic() - began - 0.05)

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            for watched in self.watched:
                await self.look(watched)
            self.looks += 1
            await asyncio.sleep(SAMPLE_S)

    async def look(self, watched: Watched) -> None:
        """Everything of one daemon, now."""
        name = f"node{watched.node.number}"
        code = watched.node.daemon.poll()
        if code is not None:
            self.found(f"{name} ended", f"exit code {code}\n{watched.node.log_tail()}")
            return
        watched.samples.append(sample(watched.pid))
        self.read_log(watched)
        await self.probe(watched)
        before = time.monotonic()
        document = await self.ask(watched)
        if document is None:
            return
        watched.document = document
        counters = document["counters"]
        for direction in ("encap", "decap"):
            if (wrong := unbalanced(counters[direction])) is not None:
                self.found(f"{name} {direction} balance", wrong)
        now = flat(counters)
        for key in fallen(watched.counters, now):
            self.found(f"{name} counter fell", f"{key}: {watched.counters[key]} to {now.get(key)}")
        watched.counters = now
        queue = document["kernel"]["tun_queue_drops"] or 0
        overflows = now["socket_overflows"] + queue
        if overflows != watched.overflows and watched in self.watched[:HONEST]:
            # Lost since the last look, which began at most so long ago.
            since = watched.looked_at - SAMPLE_S
            why = f"a full queue was counted at {name}"
            self.score.windows.append((since, time.monotonic(), why))
            watched.overflows = overflows
        watched.looked_at = before

    async def probe(self, watched: Watched) -> None:
        """What a kubelet asks: alive, and answering one time of two while crowds connect."""
        name = f"node{watched.node.number}"
        try:
            status, body = await watched.node.get(HEALTH_PORT, "/healthz?verbose")
        except (OSError, http.client.HTTPException) as error:
            watched.silent_probes += 1
            if watched.silent_probes > 1 * self.slack:
                self.found(f"{name} healthz silent", f"{watched.silent_probes} times: {error!r}")
            return
        watched.silent_probes = 0
        if status == 200:
            watched.last_stall = ""
        else:
            self.read_log(watched)
            if "event-loop failed" in body and had_no_processor(watched.last_stall):
                watched.starved_probes += 1
                return
            watched.dead_probes += 1
            if watched.dead_probes > self.slack - 1:
                self.found(f"{name} healthz {status}", f"{body}\n{watched.last_stall}")

    async def ask(self, watched: Watched) -> dict[str, Any] | None:
        """The status; a fault if it takes longer than ANSWER_S."""
        name = f"node{watched.node.number}"
        self.late_s = 0.0
        began = time.monotonic()
        why = ""
        limit_s = ANSWER_S * self.slack
        while time.monotonic() - began < limit_s * 2:
            try:
                async with asyncio.timeout(limit_s * 4):
                    document = await fetch_document(watched.node.admin_socket)
            except (PlatformError, TimeoutError) as error:  # its backlog is full: once more
                why = str(error) or "no answer"
                watched.unanswered += 1
                await asyncio.sleep(0.05)
                continue
            took = time.monotonic() - began
            watched.slowest_s = max(watched.slowest_s, took)
            if took - self.late_s > limit_s:
                self.found(
                    f"{name} slow status", f"{took:.1f} s, we were {self.late_s:.1f} s late {why}"
                )
            return document
        self.found(f"{name} no status", why)
        return None

    def read_log(self, watched: Watched) -> None:
        """New lines of the log: none may speak of a bug."""
        with watched.node.log_path.open("rb") as log:
            log.seek(watched.log_at)
            new = log.read()
        end = new.rfind(b"\n") + 1
        watched.log_at += end
        for line in new[:end].splitlines():
            if STALL.search(line):
                watched.last_stall = line.decode(errors="replace")
            if BAD_LINE.search(line):
                text = line[:300].decode(errors="replace")
                self.found(f"node{watched.node.number} log: {text[24:90]}", text)

    def judge_at_the_end(self, *, seconds: float) -> list[str]:
        """Memory, descriptors, threads and logs over the whole run: a line a daemon, for people."""
        lines = []
        for watched in self.watched:
            if len(watched.samples) < 3:
                self.found(f"node{watched.node.number} samples", "fewer than three")
            else:
                lines.append(self._judge_one(watched, seconds))
        return lines

    def _judge_one(self, watched: Watched, seconds: float) -> str:
        name = f"node{watched.node.number}"
        slope, ends = growth(watched.samples)
        first, last = watched.samples[0], watched.samples[-1]
        after = steady(watched.samples)[0]
        bound = allowed_growth(after.rss, seconds)
        sockets = (watched.document.get("engine") or {}).get("hop_sockets", 0)
        log_len = watched.node.log_path.stat().st_size
        fds = f"{first.fds} -> {last.fds}, {sockets} of them of hops"
        threads = f"{first.threads} -> {last.threads}"
        grown = (
            f"{after.rss >> 20} -> {last.rss >> 20} MB, growth {ends / MB:+.1f} MB by ends, "
            f"{slope / MB:+.1f} MB by slope, bound {bound / MB:.0f} MB"
        )
        if max(slope, ends) > bound:
            self.found(f"{name} memory", grown)
        if last.fds - sockets > first.fds + FDS:
            self.found(f"{name} descriptors", fds)
        if last.threads > first.threads + THREADS:
            self.found(f"{name} threads", threads)
        if log_len > LOG_FIRST_BYTES + LOG_BYTES_S * seconds:
            self.found(f"{name} log", f"{log_len} bytes in {seconds:.0f} s")
        return (
            f"{name}: memory {grown}; descriptors {fds}; threads {threads}; slowest status "
            f"{watched.slowest_s:.2f} s, {watched.unanswered} asked again, "
            f"{watched.starved_probes} times late for want of a processor; "
            f"log {log_len / seconds:.0f} B/s; MB each tenth: {tenths(watched.samples)}; "
            f"by place: {memory.change(after.places, last.places)}"
        )


class HonestPings(PingStream):
    """A stream that knows when each request that was lost left."""

    def losses(self) -> list[float]:
        """Event loop times, which are monotonic ones."""
        return [at for number, at in enumerate(self._sent_at) if number not in self._answered]

    def sent_times(self) -> list[float]:
        """When each request left."""
        return list(self._sent_at)


def unbalanced(direction: Mapping[str, Any]) -> str | None:
    """How packets in, out and dropped disagree; None if they do not."""
    dropped = sum(direction["drops"].values())
    if direction["packets_in"] == direction["packets_out"] + dropped:
        return None
    return f"{direction['packets_in']} in, {direction['packets_out']} out, {dropped} dropped"


def flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, int]:
    """Every number of a nested document, by its path."""
    found: dict[str, int] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, int) and not isinstance(value, bool):
            found[prefix + key] = value
    return found


def fallen(before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    """Counters that are lower than they were, or gone."""
    return [key for key, value in before.items() if after.get(key, -1) < value]


def steady(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Those after the warm-up, the first third."""
    return samples[len(samples) // 3 :]


def growth(samples: Sequence[Sample]) -> tuple[float, float]:
    """Bytes of memory gained after the warm-up: by the slope over it, and by its two ends.

    An end is the median of a sixth of the samples; the slope is that of Theil and Sen, the
    median over pairs, which single peaks do not move.
    """
    rest = list(steady(samples))
    rest = rest[:: max(1, len(rest) // 200)] if len(rest) > 400 else rest
    sixth = max(1, len(rest) // 6)
    ends = statistics.median(s.rss for s in rest[-sixth:]) - statistics.median(
        s.rss for s in rest[:sixth]
    )
    slopes = [
        (b.rss - a.rss) / (b.at - a.at)
        for number, a in enumerate(rest)
        for b in rest[number + 1 :]
        if b.at > a.at
    ]
    slope = statistics.median(slopes) * (rest[-1].at - rest[0].at) if slopes else 0.0
    return slope, ends


def tenths(samples: Sequence[Sample]) -> list[int]:
    """Megabytes of memory at ten moments of the run."""
    return [each.rss // MB for each in samples[:: max(1, len(samples) // 10)]]


def allowed_growth(rss: int, seconds: float) -> float:
    """Bytes of memory a daemon may gain in a run of so many seconds."""
    if seconds < SHORT_S:
        return SHORT_GROWTH_BYTES
    return max(GROWTH_BYTES, rss * GROWTH_SHARE)


def sample(pid: int) -> Sample:
    """Memory, descriptors and threads of a process, from /proc."""
    values = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return Sample(
        time.monotonic(),
        int(values["VmRSS"].split()[0]) << 10,
        sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()),
        int(values["Threads"]),
        memory.places(pid),
    )
