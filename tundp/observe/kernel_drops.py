"""What the kernel dropped around the daemon: names, meanings and next steps of its counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from tundp.observe.status import Status


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelDrop:
    """What the kernel dropped around the daemon."""

    name: str
    count: int
    is_ours: bool
    """Whether only the overlay's packets are counted, since the daemon's start; else everybody's
    of this network namespace, since that was made (of the host: since boot)."""
    means: str
    next_step: str


_OURS: Final = {
    "tun_queue_full": (
        "packets routed into the TUN while its queue was full, before encap",
        "more is sent than the engine takes in: top -H, tundp status",
    ),
    "socket_overflows": (
        "datagrams the UDP socket's buffer had no room for, before decap",
        "more is received than the engine takes in: top -H; raise net.core.rmem_max",
    ),
}
_NAMESPACE: Final = {
    "nf_conntrack.drop": (
        "packets dropped since the connection table was full or took no entry",
        "raise net.netfilter.nf_conntrack_max, or exempt the overlay's UDP port (notrack)",
    ),
    "nf_conntrack.early_drop": (
        "connections forgotten early to make room for others",
        "raise net.netfilter.nf_conntrack_max",
    ),
    "nf_conntrack.insert_failed": (
        "packets dropped since another of the same flow was first in the connection table",
        "usual for a few UDP queries sent at once from one port; else conntrack -S",
    ),
    "Ip.InHdrErrors": ("IP packets with a broken header, or TTL exceeded", "nstat -az 'Ip*'"),
    "Ip.InAddrErrors": (
        "IP packets for an address this host is not, not forwarded",
        "ip route get",
    ),
    "Ip.InDiscards": ("sound IP packets dropped on input for want of memory", "free -m"),
    "Ip.OutDiscards": ("sound IP packets dropped on output", "tc -s qdisc; ip neigh"),
    "Ip.OutNoRoutes": ("IP packets of this host without a route", "ip route get <destination>"),
    "Ip.ReasmFails": (
        "fragments that were never put together: some were lost, or came too late",
        "datagrams are fragmented on the way: tundp status, path MTU",
    ),
    "Ip.FragFails": ("IP packets that had to be fragmented and might not be", "tracepath <peer>"),
    "IpExt.InNoRoutes": ("forwarded IP packets without a route", "ip route get <destination>"),
    "IpExt.InTruncatedPkts": (
        "IP packets shorter than their header says",
        "something on the path cuts packets: compare the MTU of both nodes",
    ),
    "IpExt.InCsumErrors": ("IP packets with a wrong header checksum", "ethtool -k <uplink>"),
    "Udp.RcvbufErrors": (
        "datagrams a UDP socket's buffer had no room for; socket_overflows are ours of them",
        "ss -uamn shows whose",
    ),
    "Udp.SndbufErrors": ("datagrams a UDP socket had no room to send", "ss -uamn"),
    "Udp.InCsumErrors": (
        "datagrams with a wrong UDP checksum",
        "corruption, or a checksum offload that was never finished: ethtool -k <uplink>",
    ),
    "Udp.MemErrors": ("datagrams dropped for want of memory for UDP", "sysctl net.ipv4.udp_mem"),
}
KERNEL_NAMES: Final = tuple(_NAMESPACE)
"""Counts of the namespace that may be packets of the overlay."""


def kernel_drops(status: Status, namespace: Mapping[str, int]) -> Iterator[KernelDrop]:
    """The counts above 0: the overlay's own from the status, then the namespace's.

    namespace: see linux.kernel_counts.
    """
    totals = {} if status.counters is None else status.counters.totals
    ours = {
        "tun_queue_full": (status.kernel.tun_queue_drops if status.kernel else 0) or 0,
        "socket_overflows": totals.get("socket_overflows", 0),
    }
    for counts, table in ((ours, _OURS), (namespace, _NAMESPACE)):
        for name, (means, next_step) in table.items():
            if count := counts.get(name, 0):
                yield KernelDrop(
                    name=name,
                    count=count,
                    is_ours=table is _OURS,
                    means=means,
                    next_step=next_step,
                )
