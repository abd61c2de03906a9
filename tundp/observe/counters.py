"""What the counters of an engine mean, for metrics and `tundp status`.

A counter that is not described here is shown under its name all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class CounterText:
    """One counter, for people."""

    means: str
    """A sentence, as the HELP line of a metric has it."""
    is_trouble: bool = False
    """Whether an operator should see it whenever it is not 0."""
    by: str = "reason"
    """What it is broken down by, if it is: the label of its metric."""
    series: str = ""
    """The name of its metric, where that is not made of the counter's own."""


_TEXTS: Final[Mapping[str, CounterText]] = MappingProxyType(
    {
        "fragments_out": CounterText(means="Fragments sent for packets above a path MTU."),
        "icmp_to_tun": CounterText(means="ICMP errors written to the TUN."),
        "icmp_to_peers": CounterText(means="ICMP errors sent to peers."),
        "icmp_rate_limited": CounterText(
            means="ICMP errors held back by the rate limit.", is_trouble=True
        ),
        "icmp_undeliverable": CounterText(means="ICMP errors that could not be delivered."),
        "source_mismatches": CounterText(
            means="Datagrams delivered though their sender does not hold the lease of their"
            " source.",
            is_trouble=True,
        ),
        "destination_mismatches": CounterText(
            means="Datagrams delivered though their inner destination is not this node's.",
            is_trouble=True,
        ),
        "socket_overflows": CounterText(
            means="Datagrams lost because the UDP socket's buffer was full.", is_trouble=True
        ),
        "send_waits": CounterText(
            means="Times the UDP socket was full and reading the TUN paused."
        ),
        "syscalls": CounterText(means="System calls on the packet path, waiting included."),
        "wakeups": CounterText(means="Times the engine waited and was called back."),
        "spins": CounterText(means="Times a worker polled before it slept."),
        "spin_hits": CounterText(means="Times polling before sleeping found a packet."),
        "offload_fallbacks": CounterText(
            means="Super-packets the kernel refused, sent one by one instead.", is_trouble=True
        ),
        "coalesce_misses": CounterText(means="Packets written to the TUN alone, by the reason."),
        "errnos": CounterText(
            means="System calls of the packet path refused.",
            is_trouble=True,
            by="errno",
            series="tundp_kernel_refusals",
        ),
    }
)


def about(name: str) -> CounterText:
    """What is known of the counter `name`."""
    return _TEXTS.get(name) or CounterText(means=f"The engine's counter {name}.")
