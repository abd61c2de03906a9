"""A packet of the TUN, as the packets on the wire it stands for, from what a capture knows of it.

The vnet header is not recorded: only how many payload bytes each packet has. What else it said
follows from the packet, or the packet cannot be cut.
"""

from __future__ import annotations

from tundp.wire import ip, transport, vnet
from tundp.wire.drop import DropReason
from tundp.wire.segment import segment


def wire_packets(packet: memoryview, length: int, gso_size: int) -> list[bytearray] | None:
    """The packets a packet of the TUN stands for, every checksum completed; None if unknown.

    packet: from the IPv4 header on; length: of the whole, in bytes, of which `packet` must be all.
    gso_size: payload bytes of each packet but the last; 0 for a packet that stands for itself.
    """
    if len(packet) < length:
        return None
    if not gso_size:
        return [_with_sum(packet)]
    if len(packet) < ip.MIN_HEADER_LEN:
        return None
    header = ip.read(packet)
    is_tcp = header.ip_proto == transport.PROTO_TCP
    made = segment(
        vnet.VnetHeader(
            flags=vnet.NEEDS_CSUM,
            gso_type=vnet.GSO_TCPV4 if is_tcp else vnet.GSO_UDP_L4,
            gso_size=gso_size,
            csum_start=header.header_len,
            csum_offset=transport.checksum_off(header.ip_proto),
        ),
        packet,
    )
    return None if isinstance(made, DropReason) else made


def _with_sum(packet: memoryview) -> bytearray:
    """A packet whose checksum is completed if only the pseudo-header's is there.

    The kernel hands such packets over; the event has no mark of it. A wrong checksum stays.
    """
    whole = bytearray(packet)
    parsed = ip.parse(memoryview(whole))
    if isinstance(parsed, DropReason) or parsed.flags_offset & (ip.FLAG_MF | ip.OFFSET_MASK):
        return whole
    least = {
        transport.PROTO_TCP: transport.TCP_MIN_HEADER_LEN,
        transport.PROTO_UDP: transport.UDP_HEADER_LEN,
    }.get(parsed.ip_proto)
    start, end = parsed.header_len, parsed.total_len
    if least is None or end - start < least or end != len(whole):
        return whole
    at = start + transport.checksum_off(parsed.ip_proto)
    seed = transport.pseudo_sum(whole, end - start)
    if int.from_bytes(whole[at : at + 2], "big") == seed and not transport.is_valid(whole, start):
        transport.finish(whole, start, at, seed)
    return whole
