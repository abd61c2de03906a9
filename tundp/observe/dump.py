"""The status of peers for scripts: a line each, tab-separated, without units or separators.

The columns, their order and their meaning stay; new ones come last. The first line names them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from tundp.observe.status import PeerStatus, Status

COLUMNS: Final = {
    "subnet": "the peer's subnet",
    "public_ip": "where its packets go",
    "port": "UDP port; 0 for a backend without one",
    "standing": "`answers`, `one-way`, `waiting`, `unheard`, `silent`, `refused`; `-`: not asked",
    "last_heard": "Unix time of the last datagram from it; 0 for never",
    "rtt_us": "round-trip time of the last echo request that was answered; 0 for none",
    "packets_out": "sent to it",
    "packets_in": "received from it",
    "bytes_out": "of inner packets sent",
    "bytes_in": "of inner packets received",
    "drops": "packets to it or from it that were dropped",
    "path_mtu": "largest inner packet, bytes; 0 for the device's MTU",
    "mtu_origin": "`device`, `route`, `measured`; `-` for the device's MTU",
    "last_errno": "of the last send the kernel refused; `-` for none",
    "device": "what datagrams to it leave by; `-` for not looked up",
    "gateway": "through whom; `-` for none, or not looked up",
    "neighbour": "state of the next hop; `-` for none, or not looked up",
    "icmp": "what the last ICMP error said; `-` for none",
}


def lines(status: Status) -> Iterator[str]:
    """The line of names, then the peers by subnet."""
    yield "#" + "\t".join(COLUMNS)
    for peer in status.peers:
        yield "\t".join(map(str, _values(peer)))


def _values(peer: PeerStatus) -> list[str | int]:
    traffic, reach, path = peer.traffic, peer.reach, peer.path
    heard = 0 if traffic is None or traffic.last_heard is None else int(traffic.last_heard)
    rtt_ms = None if reach is None else reach.rtt_ms
    mtu = None if path is None else path.inner_mtu
    origin = None if path is None or mtu is None else path.mtu_origin
    icmp = None if reach is None else reach.icmp
    return [
        str(peer.subnet),
        str(peer.public_ip),
        peer.port or 0,
        "-" if reach is None else reach.standing,
        heard,
        0 if rtt_ms is None else max(1, round(rtt_ms * 1000)),
        *(
            (0, 0, 0, 0, 0)
            if traffic is None
            else (
                traffic.packets_out,
                traffic.packets_in,
                traffic.bytes_out,
                traffic.bytes_in,
                traffic.drops,
            )
        ),
        mtu or 0,
        "-" if origin is None else origin.value,
        (None if traffic is None else traffic.last_errno) or "-",
        (None if reach is None else reach.device) or "-",
        "-" if reach is None or reach.gateway is None else str(reach.gateway),
        (None if reach is None else reach.neighbour) or "-",
        "-" if icmp is None else icmp.text,
    ]
