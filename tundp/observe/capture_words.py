"""What is said of a packet in a capture: its number, its route, why it was dropped."""

from __future__ import annotations

import errno
from functools import lru_cache
from ipaddress import IPv4Address
from typing import Final

from tundp.observe.events import Event, PeerName
from tundp.wire import ip
from tundp.wire.drop import DropReason

_CACHED: Final = 4096
"""Texts that are kept: making one costs more than all else of a packet."""
_OWNED_MAX: Final = 8
"""Subnets of one peer that are named."""


def label(event: Event, number: int | None = None) -> str:
    """`e0.77`: direction, worker and number of a packet; `d0.3..9` for those of one write."""
    first, last = event.record.packet_id, event.record.packet_id + event.record.more_ids
    start = f"{'e' if event.stage.is_encap else 'd'}{event.worker}."
    if number is not None or first == last:
        return f"{start}{first if number is None else number}"
    return f"{start}{first}..{last}"


def endpoint(event: Event) -> str:
    """Address and port of the other node; empty before the packet is routed."""
    return _endpoint_words(event.record.outer, event.record.port) if event.record.outer else ""


def drop_words(event: Event) -> str:
    """Why a packet was dropped, and what that means."""
    reason, record = event.reason or "", event.record
    refused = f" ({errno.errorcode.get(record.error, record.error)})" if record.error else ""
    where = f" {'to' if event.stage.is_encap else 'from'} {endpoint(event)}" * bool(record.outer)
    return f"DROP {reason}{refused}{where}: {meaning(reason)}{table_words(event)}"


def next_words(event: Event) -> str:
    """The end of a sentence on a drop: what to look at next; empty for what was not dropped."""
    reason = event.reason or ""
    return f". Next: {DropReason[reason.upper()].next_step}" if _is_known(reason) else ""


def meaning(reason: str) -> str:
    """What a reason means, as the end of a sentence."""
    if not _is_known(reason):
        return "a reason this version of tundp does not know"
    return DropReason[reason.upper()].means


def hop_words(event: Event) -> str:
    """`10.5.2.0/24 -> 192.0.2.2:8285`: the lease a packet goes by; empty before it is routed."""
    if event.peer is None or len(event.packet) < ip.MIN_HEADER_LEN:
        return endpoint(event)
    return _lease_words(event.peer, event.packet[16:20])


def owner_words(event: Event) -> str:
    """Whose datagram it is, as far as that is known by now."""
    if not event.record.hop:
        return ", no peer of this node"
    if event.peer is None or not event.peer.subnets:
        return ""
    return f", the node of {', '.join(map(str, event.peer.subnets[:_OWNED_MAX]))}"


def table_words(event: Event) -> str:
    """The forwarding table a packet met."""
    return f", FIB {event.record.generation}" if event.record.generation else ""


@lru_cache(_CACHED)
def _endpoint_words(address: int, port: int) -> str:
    return f"{IPv4Address(address)}:{port}"


@lru_cache(_CACHED)
def _lease_words(peer: PeerName, destination: bytes) -> str:
    subnet = peer.subnet_of(IPv4Address(destination))
    there = f"{peer.address}:{peer.port}"
    return f"{subnet} -> {there}" if subnet else there


def _is_known(reason: str) -> bool:
    """A daemon of another version may have reasons this one has not."""
    return reason.upper() in DropReason.__members__
