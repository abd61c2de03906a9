"""What every engine counts: one table, whose rows are the fields of the classes below.

This is the one place a counter is written: its name is the field, its row the meaning, whether
it means loss, and its metric. C reads it through native/include/tundp_tables.h, which
native/tables.py generates; status and metrics read `COUNTERS` and `DIRECTION_COUNTERS`.

Conservation, per direction and at any moment between two packets:

    packets_in == packets_out + sum(drops)

`encap` is TUN -> UDP and `decap` UDP -> TUN, in counters, logs and thread names alike.
Standard library and wire/ only: native/tables.py imports it before anything is built.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Final

from tundp.engine import latency
from tundp.wire.coalesce import Miss
from tundp.wire.drop import DropReason

_SPEC: Final = "spec"


@dataclass(frozen=True, slots=True, kw_only=True)
class CounterSpec:
    """One row of the table."""

    name: str
    """The attribute of Counters or DirectionCounters, and the key in JSON."""
    means: str
    """What one count stands for, without a stop."""
    metric: str | None
    """The Prometheus counter without its suffix `_total`; None if it is not exported."""
    is_loss: bool
    """Whether each count is a packet or datagram lost outside of the drop reasons."""
    is_notable: bool
    """Whether a count above 0 is worth an operator's attention."""


def _counter(
    means: str, *, metric: str | None = None, is_loss: bool = False, is_notable: bool = False
) -> Any:
    """A field that starts at 0. metric: its Prometheus name without the prefix `tundp_`."""
    spec = CounterSpec(
        name="",
        means=means,
        metric=f"tundp_{metric}" if metric else None,
        is_loss=is_loss,
        is_notable=is_loss or is_notable,
    )
    return field(default=0, metadata={_SPEC: spec})


@dataclass(slots=True)
class DirectionCounters:
    """One direction. Bytes are inner packets as they came in and as they went out."""

    packets_in: int = _counter("packets that came in", metric="packets")
    bytes_in: int = _counter("bytes of inner packets that came in")
    packets_out: int = _counter("packets that went out again", metric="forwarded_packets")
    bytes_out: int = _counter("bytes of inner packets that went out", metric="bytes")
    reads: int = _counter("TUN reads, or receives, that brought something")
    writes: int = _counter("sends, or TUN writes, that took something")
    super_in: int = _counter("reads that brought more than one packet")
    super_out: int = _counter("writes that took more than one packet")
    latency_ns: int = _counter("nanoseconds the packets of measured batches were in the engine")
    latency: list[int] = field(default_factory=lambda: [0] * latency.COUNT)
    """The packets of measured batches by the time they were in the engine (latency.py)."""
    drops: list[int] = field(default_factory=lambda: [0] * len(DropReason))
    """Packets dropped, by DropReason."""

    def add_latency(self, packets: int, elapsed_ns: int) -> None:
        """Count packets of a measured batch that were in the engine for so long."""
        self.latency[latency.bucket(elapsed_ns)] += packets
        self.latency_ns += packets * elapsed_ns

    @property
    def dropped(self) -> int:
        """Packets dropped for any reason."""
        return sum(self.drops)

    @property
    def is_conserved(self) -> bool:
        """Whether every packet that came in is accounted for."""
        return self.packets_in == self.packets_out + self.dropped

    def as_dict(self) -> dict[str, Any]:
        """For JSON; only reasons that occurred are listed."""
        return {spec.name: getattr(self, spec.name) for spec in DIRECTION_COUNTERS} | {
            "latency": list(self.latency),
            "drops": {r.label: self.drops[r] for r in DropReason if self.drops[r]},
        }


@dataclass(slots=True)
class Counters:
    """Everything an engine counts."""

    encap: DirectionCounters = field(default_factory=DirectionCounters)
    decap: DirectionCounters = field(default_factory=DirectionCounters)
    fragments_out: int = _counter(
        "datagrams that carried a fragment we made of a packet too big for its path",
        metric="fragments_out",
    )
    icmp_to_tun: int = _counter(
        "ICMP errors about packets from the TUN, written back to it", metric="icmp_to_tun"
    )
    icmp_to_peers: int = _counter(
        "ICMP errors about packets from a peer, sent as datagrams to the holder of the source",
        metric="icmp_to_peers",
    )
    icmp_rate_limited: int = _counter(
        "ICMP errors the rate limit held back", metric="icmp_rate_limited", is_notable=True
    )
    icmp_undeliverable: int = _counter(
        "ICMP errors that could not be sent: no peer holds the source, or the kernel refused",
        metric="icmp_undeliverable",
    )
    source_mismatches: int = _counter(
        "datagrams delivered though their sender does not own the inner source (check: count)",
        metric="source_mismatches",
        is_notable=True,
    )
    destination_mismatches: int = _counter(
        "datagrams delivered though the inner destination is not this node's (check: count)",
        metric="destination_mismatches",
        is_notable=True,
    )
    socket_overflows: int = _counter(
        "datagrams lost because the UDP socket's buffer was full",
        metric="socket_overflows",
        is_loss=True,
    )
    hop_sockets_opened: int = _counter(
        "times a hop got a send socket of its own, because the one all hops share was full",
        metric="hop_sockets_opened",
    )
    syscalls: int = _counter(
        "system calls on the packet path: those that found nothing, and waiting, included"
    )
    wakeups: int = _counter("times the engine waited and was called back")
    spins: int = _counter("times a worker polled before it slept")
    spin_hits: int = _counter("times polling before sleeping paid off")
    offload_fallbacks: int = _counter(
        "super-packets the kernel refused, and whose packets then went one by one",
        metric="offload_fallbacks",
        is_notable=True,
    )
    coalesce_misses: list[int] = field(default_factory=lambda: [0] * len(Miss))
    """Packets written alone, or beginning anew, by Miss."""
    errnos: dict[str, int] = field(default_factory=dict)
    """What the kernel refused on the packet path, by the error's name."""

    def add(self, other: Counters) -> None:
        """Add all of `other` to this."""
        for spec in COUNTERS:
            setattr(self, spec.name, getattr(self, spec.name) + getattr(other, spec.name))
        for direction, more in ((self.encap, other.encap), (self.decap, other.decap)):
            for spec in DIRECTION_COUNTERS:
                value = getattr(direction, spec.name) + getattr(more, spec.name)
                setattr(direction, spec.name, value)
            direction.latency = _sums(direction.latency, more.latency)
            direction.drops = _sums(direction.drops, more.drops)
        self.coalesce_misses = _sums(self.coalesce_misses, other.coalesce_misses)
        for name, count in other.errnos.items():
            self.errnos[name] = self.errnos.get(name, 0) + count

    @property
    def is_conserved(self) -> bool:
        """Whether both directions are."""
        return self.encap.is_conserved and self.decap.is_conserved

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "encap": self.encap.as_dict(),
            "decap": self.decap.as_dict(),
            **{spec.name: getattr(self, spec.name) for spec in COUNTERS},
            "coalesce_misses": {
                m.label: self.coalesce_misses[m] for m in Miss if self.coalesce_misses[m]
            },
            "errnos": dict(self.errnos),
            "conserved": self.is_conserved,
        }


def _sums(ours: list[int], theirs: list[int]) -> list[int]:
    return [a + b for a, b in zip(ours, theirs, strict=True)]


def _specs(counters: type) -> tuple[CounterSpec, ...]:
    return tuple(
        dataclasses.replace(each.metadata[_SPEC], name=each.name)
        for each in dataclasses.fields(counters)
        if _SPEC in each.metadata
    )


COUNTERS: Final = _specs(Counters)
"""The counters that are one number, in the order of the class."""
DIRECTION_COUNTERS: Final = _specs(DirectionCounters)
"""Likewise those of one direction; `drops` is counted by DropReason beside them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HopCounters:
    """What an engine has counted of one next hop since its id was assigned."""

    packets_out: int = 0
    """Packets sent to it: its share of encap.packets_out."""
    bytes_out: int = 0
    packets_in: int = 0
    """Packets received from it, whatever became of them: its share of decap.packets_in."""
    bytes_in: int = 0
    drops: int = 0
    """Packets to it or from it that were dropped, for whatever reason."""
    queue_full: int = 0
    """Those of them dropped as DropReason.HOP_QUEUE_FULL."""
    last_heard: float | None = None
    """Unix time of the last datagram from it, exact to some milliseconds; None never."""
    last_errno: str | None = None
    """Name of the errno of the last send to it the kernel refused; None never."""


HOP_SUMS: Final = ("packets_out", "bytes_out", "packets_in", "bytes_in", "drops", "queue_full")
"""Those of HopCounters that are numbers to add up."""
