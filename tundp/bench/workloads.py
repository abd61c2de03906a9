"""What is sent, and what of it is measured: one Workload a kind of traffic.

A measurement starts the traffic, lets it warm up, reads every counter, waits, and reads
them again: only what happened in between counts, and nothing starts or stops in it.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from tundp.bench.foreign import Foreign, foreign, processes
from tundp.bench.machine import CpuTimes, read_cpu
from tundp.bench.paths import Ground
from tundp.errors import LabError
from tundp.lab import generators
from tundp.lab.generators import Counted, Generator
from tundp.lab.lab import Host, finish
from tundp.observe.status import CountersStatus

PORT: Final = 5201
TCP_HEADERS_LEN: Final = 20 + 20 + 12
"""IPv4, TCP, and the timestamp option Linux always uses."""
UDP_HEADERS_LEN: Final = 28
LOSS_MAX: Final = 0.005
LOSS_STEPS: Final = 12
LOSS_PRECISION: Final = 1.04
RATE_MAX_PER_MS: Final = 2000
PERCENTILES: Final = (50.0, 90.0, 99.0, 99.9)

Values = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The counters at both ends of what is measured."""

    seconds: float
    cpu: CpuTimes
    """Without what others took."""
    foreign: Foreign
    counted: list[tuple[Counted, Counted]]
    """Per generator, before and after."""
    engines: list[tuple[CountersStatus, CountersStatus]]
    """Per daemon, before and after; a little wider than the rest, and only for ratios."""
    retransmits: int


class Workload(ABC):
    """One kind of traffic. `headline` is the value rows are compared by."""

    name: str
    label: str
    headline: str
    unit: str
    more_is_better = True

    async def measure(self, ground: Ground, *, warmup_s: float, seconds: float) -> Values:
        """Run it once; values by name, see docs/benchmarking.md."""
        data = generators.pattern()
        async with _running(self.start(ground, data)) as running:
            window = await _observe(ground, running, warmup_s=warmup_s, seconds=seconds)
            for generator in running:
                generator.check()
            values = self.evaluate(ground, window, running)
        values |= _costs(window)
        # What this row still has in its queues must not be the next row's burden.
        await ground.settle()
        return values

    def why_not(self, ground: Ground) -> str | None:
        """Why this traffic does not fit the path, or None if it does."""
        return None

    @abstractmethod
    def start(self, ground: Ground, data: Any) -> Iterator[Generator]:
        """The generators, in the order they must start; receivers first."""

    @abstractmethod
    def evaluate(self, ground: Ground, window: Window, running: list[Generator]) -> Values:
        """What this traffic says of the path."""


class TcpBulk(Workload):
    """TCP streams as fast as they go."""

    headline = "gbps"
    unit = "Gbit/s"

    def __init__(self, streams: int, *, is_reverse: bool = False) -> None:
        self.name = f"tcp{streams}" + ("-rev" if is_reverse else "")
        self.label = f"TCP, {streams} stream{'s' if streams > 1 else ''}" + (
            ", reverse" if is_reverse else ""
        )
        self._streams = streams
        self._is_reverse = is_reverse

    def start(self, ground: Ground, data: Any) -> Iterator[Generator]:
        """See Workload."""
        source, sink, address = _ends(ground, is_reverse=self._is_reverse)
        for number in range(self._streams):
            yield generators.stream_receiver(sink, address, PORT + number, data)
            yield generators.stream_sender(source, address, PORT + number, data)

    def evaluate(self, ground: Ground, window: Window, running: list[Generator]) -> Values:
        """See Workload. Packets are as many as MTU-size segments carry the payload."""
        receivers = window.counted[::2]
        received = sum(after.bytes - before.bytes for before, after in receivers)
        return {
            "gbps": received * 8 / window.seconds / 1e9,
            "corrupt": float(sum(after.corrupt for _, after in receivers)),
            "payload_bytes": float(received),
            "packets": received / (ground.mtu - TCP_HEADERS_LEN),
        }


class UdpFlood(Workload):
    """UDP datagrams of one size as fast as they go; goodput is what arrives."""

    headline = "kpps"
    unit = "kpps"

    def __init__(self, size: int) -> None:
        self.name = f"udp{size}"
        self.label = f"UDP {size} bytes, full rate"
        self._size = size

    def why_not(self, ground: Ground) -> str | None:
        """See Workload."""
        return _too_big(self._size, ground)

    def start(self, ground: Ground, data: Any) -> Iterator[Generator]:
        """See Workload."""
        yield from _udp_pair(ground, data, size=self._size, per_ms=0)

    def evaluate(self, ground: Ground, window: Window, running: list[Generator]) -> Values:
        """See Workload."""
        return _udp_values(window)


class UdpLossSearch(Workload):
    """The highest rate at which at most 0.5 % of the datagrams are lost."""

    headline = "kpps"
    unit = "kpps"

    def __init__(self, size: int) -> None:
        self.name = f"udp{size}-loss"
        self.label = f"UDP {size} bytes, at most 0.5 % lost"
        self._size = size
        self._per_ms = 0

    def why_not(self, ground: Ground) -> str | None:
        """See Workload."""
        return _too_big(self._size, ground)

    def start(self, ground: Ground, data: Any) -> Iterator[Generator]:
        """See Workload."""
        yield from _udp_pair(ground, data, size=self._size, per_ms=self._per_ms)

    def evaluate(self, ground: Ground, window: Window, running: list[Generator]) -> Values:
        """See Workload."""
        return _udp_values(window)

    async def measure(self, ground: Ground, *, warmup_s: float, seconds: float) -> Values:
        """See Workload. Bisects the rate; the values are those of the best rate that held."""
        low, high = 1.0, float(RATE_MAX_PER_MS)
        best: Values | None = None
        for _ in range(LOSS_STEPS):
            # In equal ratios: as fine for a slow path as for a fast one.
            self._per_ms = round((low * high) ** 0.5)
            values = await super().measure(ground, warmup_s=warmup_s, seconds=seconds)
            # A generator that cannot send so much has not tested so much.
            if values["loss"] <= LOSS_MAX and values["sent"] >= 0.9 * self._per_ms * 1e3 * seconds:
                low, best = float(self._per_ms), values
            else:
                high = float(self._per_ms)
            if high / low < LOSS_PRECISION:
                break
        # Not even a thousand a second held: that is a result too.
        return best or {**values, "kpps": 0.0, "gbps": 0.0}


class RequestResponse(Workload):
    """One request at a time; how long each answer takes."""

    headline = "p50_us"
    unit = "us"
    more_is_better = False

    def __init__(self, *, is_stream: bool, is_loaded: bool = False) -> None:
        kind = "tcp" if is_stream else "udp"
        self.name = f"{kind}_rr" + ("-load" if is_loaded else "")
        self.label = f"{kind.upper()} request/response" + (" under load" if is_loaded else "")
        self._is_stream = is_stream
        self._is_loaded = is_loaded

    def start(self, ground: Ground, data: Any) -> Iterator[Generator]:
        """See Workload. The load is one TCP stream the same way as the requests."""
        source, sink, address = _ends(ground)
        size = 16
        yield generators.answerer(sink, address, PORT, is_stream=self._is_stream, size=size)
        yield generators.requester(source, address, PORT, is_stream=self._is_stream, size=size)
        if self._is_loaded:
            yield generators.stream_receiver(sink, address, PORT + 1, data)
            yield generators.stream_sender(source, address, PORT + 1, data)

    def evaluate(self, ground: Ground, window: Window, running: list[Generator]) -> Values:
        """See Workload."""
        before, after = window.counted[1]
        samples_ns = running[1].samples_ns
        assert samples_ns is not None
        # The ring holds more than a window's worth; what is in the window lies together.
        index = np.arange(before.samples, after.samples) % len(samples_ns)
        values: Values = {
            "transactions_per_s": (after.messages - before.messages) / window.seconds,
            "lost_transactions": float(after.lost - before.lost),
        }
        if self._is_loaded:
            # The machine works for the load, so cost per request would mean nothing.
            load_before, load_after = window.counted[2]
            values["load_gbps"] = (load_after.bytes - load_before.bytes) * 8 / window.seconds / 1e9
        else:
            values["packets"] = 2.0 * (after.messages - before.messages)
        if len(index):
            times_us = samples_ns[index] / 1e3
            for percentile, value in zip(
                PERCENTILES, np.percentile(times_us, PERCENTILES), strict=True
            ):
                values[f"p{percentile:g}_us"] = float(value)
        return values


class ConnectRequestClose(Workload):
    """Connections made, used once and closed."""

    name = "tcp_crr"
    label = "TCP connect/request/close"
    headline = "transactions_per_s"
    unit = "1/s"

    def start(self, ground: Ground, data: Any) -> Iterator[Generator]:
        """See Workload."""
        source, sink, address = _ends(ground)
        yield generators.acceptor(sink, address, PORT)
        yield generators.connector(source, address, PORT)

    def evaluate(self, ground: Ground, window: Window, running: list[Generator]) -> Values:
        """See Workload."""
        before, after = window.counted[1]
        return {
            "transactions_per_s": (after.messages - before.messages) / window.seconds,
            "lost_transactions": float(after.lost - before.lost),
        }


WORKLOADS: Final[tuple[Workload, ...]] = (
    TcpBulk(1),
    TcpBulk(4),
    TcpBulk(1, is_reverse=True),
    TcpBulk(4, is_reverse=True),
    UdpFlood(64),
    UdpFlood(512),
    UdpFlood(1400),
    UdpLossSearch(64),
    UdpLossSearch(1400),
    RequestResponse(is_stream=True),
    RequestResponse(is_stream=False),
    RequestResponse(is_stream=True, is_loaded=True),
    ConnectRequestClose(),
)


def _ends(ground: Ground, *, is_reverse: bool = False) -> tuple[Host, Host, str]:
    left, right = ground.ends
    if is_reverse:
        return right, left, ground.addresses[0]
    return left, right, ground.addresses[1]


def _too_big(size: int, ground: Ground) -> str | None:
    if size + UDP_HEADERS_LEN <= ground.mtu:
        return None
    return f"{size} bytes do not fit its MTU of {ground.mtu}: it would fragment"


def _udp_pair(ground: Ground, data: Any, *, size: int, per_ms: int) -> Iterator[Generator]:
    source, sink, address = _ends(ground)
    run_id = generators.next_run()
    yield generators.datagram_receiver(sink, address, PORT, data, run_id=run_id, size=size)
    yield generators.datagram_sender(
        source, address, PORT, data, run_id=run_id, size=size, per_ms=per_ms
    )


def _udp_values(window: Window) -> Values:
    (received_before, received_after), (sent_before, sent_after) = window.counted
    sent = sent_after.messages - sent_before.messages
    received = received_after.messages - received_before.messages
    payload = received_after.bytes - received_before.bytes
    return {
        "kpps": received / window.seconds / 1e3,
        "gbps": payload * 8 / window.seconds / 1e9,
        "sent": float(sent),
        "loss": max(0.0, 1 - received / sent) if sent else 1.0,
        "corrupt": float(received_after.corrupt),
        "duplicates": float(received_after.duplicates),
        "reordered": float(received_after.reordered - received_before.reordered),
        "payload_bytes": float(payload),
        "packets": float(received),
    }


@contextlib.asynccontextmanager
async def _running(wanted: Iterator[Generator]) -> AsyncIterator[list[Generator]]:
    running: list[Generator] = []
    try:
        for generator in wanted:
            running.append(generator)
            # To its end: what is half started cannot be stopped.
            await finish(asyncio.to_thread(generator.start))
        yield running
    finally:
        for generator in running:
            generator.tell_to_stop()
        await finish(asyncio.to_thread(_stop_all, running))


def _stop_all(running: list[Generator]) -> None:
    stuck: list[LabError] = []
    # Senders first: a stream's receiver ends when the stream does.
    for generator in reversed(running):
        try:
            generator.stop()
        except LabError as error:
            stuck.append(error)
    if stuck:
        raise stuck[0]


async def _observe(
    ground: Ground, running: list[Generator], *, warmup_s: float, seconds: float
) -> Window:
    await asyncio.sleep(warmup_s)
    engines_before = await ground.counters()
    retransmits_before = await _retransmits(ground)
    others_before = processes()
    cpu_before = read_cpu()
    counted_before = [generator.counted() for generator in running]
    await asyncio.sleep(seconds)
    counted_after = [generator.counted() for generator in running]
    cpu = read_cpu().since(cpu_before)
    others = foreign(others_before, processes())
    retransmits = await _retransmits(ground) - retransmits_before
    engines_after = await ground.counters()
    return Window(
        seconds=cpu.at,
        cpu=cpu.without(others.user, others.system),
        foreign=others,
        counted=list(zip(counted_before, counted_after, strict=True)),
        engines=list(zip(engines_before, engines_after, strict=True)),
        retransmits=retransmits,
    )


async def _retransmits(ground: Ground) -> int:
    return sum([(await host.call(read_snmp))["Tcp"]["RetransSegs"] for host in ground.ends])


def read_snmp() -> dict[str, dict[str, int]]:
    """/proc/net/snmp of the calling thread's namespace."""
    found: dict[str, dict[str, int]] = {}
    names: list[str] = []
    for line in Path("/proc/thread-self/net/snmp").read_text(encoding="ascii").splitlines():
        group, _, rest = line.partition(": ")
        if rest[:1].isalpha():
            names = rest.split()
        else:
            found[group] = dict(zip(names, map(int, rest.split()), strict=True))
    return found


def _costs(window: Window) -> Values:
    """What every workload costs. Per packet needs `packets`, filled in by the caller's summary."""
    values: Values = {
        "busy_s": window.cpu.busy,
        "user_s": window.cpu.user,
        "system_s": window.cpu.system,
        "softirq_s": window.cpu.softirq,
        "steal_s": window.cpu.steal,
        "foreign_s": window.foreign.busy,
        "window_s": window.seconds,
        "context_switches": float(window.cpu.context_switches),
        "retransmits": float(window.retransmits),
    }
    if not window.engines:
        return values
    total: dict[str, float] = dict.fromkeys(
        ("syscalls", "wakeups", "crossings", "bytes", "overflows"), 0.0
    )
    calls: dict[str, tuple[float, float]] = {}
    for before, after in window.engines:
        for name, counter in (
            ("syscalls", "syscalls"),
            ("wakeups", "wakeups"),
            ("overflows", "socket_overflows"),
        ):
            total[name] += after.totals[counter] - before.totals[counter]
        for (direction, now), (_, then) in zip(after.directions, before.directions, strict=True):
            for name, moved, made in (
                ("reads", now.packets_in - then.packets_in, now.reads - then.reads),
                ("writes", now.packets_out - then.packets_out, now.writes - then.writes),
            ):
                total["crossings"] += made
                known = calls.get(f"{direction}_{name}", (0.0, 0.0))
                calls[f"{direction}_{name}"] = (known[0] + moved, known[1] + made)
            total["bytes"] += now.bytes_in - then.bytes_in + now.bytes_out - then.bytes_out
    forwarded = sum(
        after.encap.packets_out - before.encap.packets_out for before, after in window.engines
    )
    values["overflows"] = total["overflows"]
    if forwarded:
        values["syscalls_per_packet"] = total["syscalls"] / forwarded
        values["wakeups_per_packet"] = total["wakeups"] / forwarded
        values["crossings_per_packet"] = total["crossings"] / forwarded
        for name, (packet_count, call_count) in calls.items():
            if call_count:
                values[f"packets_per_{name}"] = packet_count / call_count
        carried = sum(
            after.encap.bytes_in - before.encap.bytes_in for before, after in window.engines
        )
        values["copied_per_byte"] = total["bytes"] / carried
    return values
