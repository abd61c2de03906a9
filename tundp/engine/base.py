"""What every engine offers, and the counters all of them keep.

Conservation, per direction and at any moment between two packets:

    packets_in == packets_out + sum(drops)

`encap` is TUN -> UDP and `decap` UDP -> TUN, in counters, logs and thread names alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from tundp.lease.fib import Fib
from tundp.linux.tun import Tun, TunMode
from tundp.wire.coalesce import Miss
from tundp.wire.drop import DropReason


@dataclass(slots=True)
class DirectionCounters:
    """One direction. Bytes are inner packets as they came in and as they went out."""

    packets_in: int = 0
    bytes_in: int = 0
    packets_out: int = 0
    bytes_out: int = 0
    reads: int = 0
    """TUN reads, or receives, that brought something."""
    writes: int = 0
    """Sends, or TUN writes, that took something."""
    super_in: int = 0
    """Reads that brought more than one packet."""
    super_out: int = 0
    """Writes that took more than one packet."""
    drops: list[int] = field(default_factory=lambda: [0] * len(DropReason))

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
        return {
            "packets_in": self.packets_in,
            "bytes_in": self.bytes_in,
            "packets_out": self.packets_out,
            "bytes_out": self.bytes_out,
            "reads": self.reads,
            "writes": self.writes,
            "super_in": self.super_in,
            "super_out": self.super_out,
            "drops": {r.label: self.drops[r] for r in DropReason if self.drops[r]},
        }


@dataclass(slots=True)
class Counters:
    """Everything an engine counts."""

    encap: DirectionCounters = field(default_factory=DirectionCounters)
    decap: DirectionCounters = field(default_factory=DirectionCounters)
    fragments_out: int = 0
    """Datagrams that carried a fragment we made of a packet too big for its path."""
    icmp_to_tun: int = 0
    """ICMP errors about packets from the TUN, written back to it."""
    icmp_to_peers: int = 0
    """ICMP errors about packets from a peer, sent as datagrams to the holder of the source."""
    icmp_rate_limited: int = 0
    """ICMP errors the rate limit held back."""
    icmp_undeliverable: int = 0
    """ICMP errors that could not be sent: no peer holds the source, or the kernel refused."""
    source_mismatches: int = 0
    """Datagrams delivered though their sender does not own the inner source (check: count)."""
    destination_mismatches: int = 0
    """Datagrams delivered though the inner destination is not this node's (check: count)."""
    socket_overflows: int = 0
    """Datagrams the kernel dropped because the UDP socket's buffer was full."""
    send_waits: int = 0
    """Times the UDP socket was full and reading the TUN paused. Nothing is lost by it."""
    syscalls: int = 0
    """System calls on the packet path: those that found nothing, and waiting, included."""
    wakeups: int = 0
    """Times the engine waited and was called back."""
    spins: int = 0
    """Times a worker polled before it slept."""
    spin_hits: int = 0
    """Times that paid off."""
    offload_fallbacks: int = 0
    """Super-packets the kernel refused, and whose packets then went one by one."""
    coalesce_misses: list[int] = field(default_factory=lambda: [0] * len(Miss))
    """Packets written alone, or beginning anew, by the reason for it."""
    errnos: dict[str, int] = field(default_factory=dict)
    """What the kernel refused on the packet path, by the error's name."""

    @property
    def is_conserved(self) -> bool:
        """Whether both directions are."""
        return self.encap.is_conserved and self.decap.is_conserved

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "encap": self.encap.as_dict(),
            "decap": self.decap.as_dict(),
            "fragments_out": self.fragments_out,
            "icmp_to_tun": self.icmp_to_tun,
            "icmp_to_peers": self.icmp_to_peers,
            "icmp_rate_limited": self.icmp_rate_limited,
            "icmp_undeliverable": self.icmp_undeliverable,
            "source_mismatches": self.source_mismatches,
            "destination_mismatches": self.destination_mismatches,
            "socket_overflows": self.socket_overflows,
            "send_waits": self.send_waits,
            "syscalls": self.syscalls,
            "wakeups": self.wakeups,
            "spins": self.spins,
            "spin_hits": self.spin_hits,
            "offload_fallbacks": self.offload_fallbacks,
            "coalesce_misses": {
                m.label: self.coalesce_misses[m] for m in Miss if self.coalesce_misses[m]
            },
            "errnos": dict(self.errnos),
            "conserved": self.is_conserved,
        }


class Dataplane(Protocol):
    """An engine. Called from the event loop's thread only; never blocks it for long.

    The engine borrows the TUN and the socket: whoever made them closes them, after
    `detach` or `stop`.
    """

    @property
    def name(self) -> str:
        """What `--engine` calls it."""
        ...

    @property
    def tun_mode(self) -> TunMode:
        """How the TUN it will be given must be opened."""
        ...

    def describe(self) -> str:
        """What it uses and what it does without, for the log and `tundp status`."""
        ...

    def attach(self, tun: Tun) -> None:
        """Begin to carry packets between `tun` and the socket; counters go on."""
        ...

    def detach(self) -> None:
        """Stop reading the current TUN, e.g. because it was deleted."""
        ...

    def rebound(self) -> None:
        """The sockets' descriptors lead to new sockets now; called while detached.

        The new ones are as `linux.udp.open_udp` makes them, maybe at another address. What
        was learnt of paths was the old address's, and is forgotten; counters go on.
        """
        ...

    def install(self, fib: Fib) -> None:
        """Consult `fib` from the next packet on."""
        ...

    async def tun_lost(self) -> None:
        """Returns when the attached TUN turns out to be deleted."""
        ...

    def counters(self) -> Counters:
        """The counters now; the caller must not change them."""
        ...

    def pulse(self) -> tuple[int, ...]:
        """Turns each running packet thread has made; () without one, and while detached.

        Asking has each of them make one more soon, however idle it is: a number that is the
        same a second later is that of a thread that is stuck.
        """
        ...

    def stop(self) -> None:
        """Detach from everything."""
        ...
