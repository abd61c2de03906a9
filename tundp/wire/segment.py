"""Segmentation: from one read of the TUN to its packets, every checksum completed.

What the kernel's own segmentation does (net/ipv4/tcp_offload.c, udp_offload.c), so that
each packet on the wire is the one a sender without offloads would have made. Native
twin: native/src/segment.c.
"""

from __future__ import annotations

from tundp.wire import ip, transport, vnet
from tundp.wire.drop import DropReason
from tundp.wire.vnet import VnetHeader

_ONCE_AT_END = transport.FIN | transport.PSH


def segment(header: VnetHeader, packet: memoryview) -> list[bytearray] | DropReason:
    """The packets of one read, in order, every checksum completed; or the reason to drop it.

    packet: what followed the vnet header. A plain packet comes back alone and otherwise
    unchanged, whatever it holds: `ip.parse` is the judge of that. A super-packet that is
    not well-formed IPv4 is dropped as one packet.
    """
    if header.gso_type == vnet.GSO_NONE:
        return _finished(header, packet)
    if header.kind not in (vnet.GSO_TCPV4, vnet.GSO_TCPV6, vnet.GSO_UDP_L4):
        return DropReason.BAD_VNET_HEADER
    parsed = ip.parse(packet)
    if isinstance(parsed, DropReason):
        return parsed
    packet = packet[: parsed.total_len]
    is_tcp = header.kind == vnet.GSO_TCPV4
    ip_proto = transport.PROTO_TCP if is_tcp else transport.PROTO_UDP
    if (
        header.kind == vnet.GSO_TCPV6
        or parsed.ip_proto != ip_proto
        or parsed.flags_offset & (ip.FLAG_MF | ip.OFFSET_MASK)
        or not header.needs_checksum
        or header.gso_size == 0
        or header.csum_start != parsed.header_len
        or header.csum_offset != transport.checksum_off(ip_proto)
    ):
        return DropReason.BAD_VNET_HEADER
    inner = packet[parsed.header_len :]
    if len(inner) < (transport.TCP_MIN_HEADER_LEN if is_tcp else transport.UDP_HEADER_LEN):
        return DropReason.BAD_VNET_HEADER
    transport_len = transport.tcp_header_len(inner) if is_tcp else transport.UDP_HEADER_LEN
    if not transport.UDP_HEADER_LEN <= transport_len <= len(inner) or (
        is_tcp and transport_len < transport.TCP_MIN_HEADER_LEN
    ):
        return DropReason.BAD_VNET_HEADER
    return _split(header.gso_size, packet, parsed, transport_len, is_tcp=is_tcp)


def _finished(header: VnetHeader, packet: memoryview) -> list[bytearray] | DropReason:
    whole = bytearray(packet)
    if header.needs_checksum:
        field = header.csum_start + header.csum_offset
        if field + 2 > len(whole):
            return DropReason.BAD_VNET_HEADER
        seed = int.from_bytes(whole[field : field + 2], "big")
        transport.finish(whole, header.csum_start, field, seed)
    return [whole]


def _split(
    gso_size: int, packet: memoryview, parsed: ip.Ipv4Header, transport_len: int, *, is_tcp: bool
) -> list[bytearray]:
    start = parsed.header_len
    payload = packet[start + transport_len :]
    pieces = [payload[at : at + gso_size] for at in range(0, len(payload), gso_size)] or [payload]
    ip_proto = parsed.ip_proto
    seq_off = start + transport.TCP_SEQ_OFF
    flags_off = start + transport.TCP_FLAGS_OFF
    made = []
    for number, piece in enumerate(pieces):
        one = bytearray(packet[: start + transport_len]) + piece
        one[2:4] = len(one).to_bytes(2, "big")
        one[4:6] = (parsed.identification + number & 0xFFFF).to_bytes(2, "big")
        if is_tcp:
            seq = int.from_bytes(one[seq_off : seq_off + 4], "big") + number * gso_size
            one[seq_off : seq_off + 4] = (seq & 0xFFFFFFFF).to_bytes(4, "big")
            if number < len(pieces) - 1:
                one[flags_off] &= ~_ONCE_AT_END & 0xFF
            if number > 0:
                # RFC 3168: the sender says once that it halved its window.
                one[flags_off] &= ~transport.CWR & 0xFF
        else:
            length_off = start + transport.UDP_LEN_OFF
            one[length_off : length_off + 2] = (transport_len + len(piece)).to_bytes(2, "big")
        ip.store_checksum(one, start)
        transport.finish(
            one,
            start,
            start + transport.checksum_off(ip_proto),
            transport.pseudo_sum(one, len(one) - start),
        )
        made.append(one)
    return made
