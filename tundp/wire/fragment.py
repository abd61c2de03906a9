"""IPv4 fragmentation of an inner packet (RFC 791 section 3.2), for paths narrower than the TUN.

flannel leaves this to the kernel, which fragments the *outer* datagram: twice the
datagrams, and a black hole wherever fragments are filtered. Fragmenting the inner
packet instead keeps every datagram whole and is what any router on the path would do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from tundp.wire import ip

_OPTION_END: Final = 0
_OPTION_NOP: Final = 1
_OPTION_COPIED: Final = 0x80


def fragment(packet: memoryview, header: ip.Ipv4Header, mtu: int) -> list[bytes]:
    """`packet` as fragments of at most `mtu` bytes, in order.

    `header` must be the header as it now stands in `packet` and `mtu` at least 68,
    which always leaves room for 8 bytes behind the longest header. A fragment may
    itself be fragmented: offset and MF continue from its own.
    """
    payload = packet[header.header_len : header.total_len]
    first_options = bytes(packet[ip.MIN_HEADER_LEN : header.header_len])
    later_options = copied_options(first_options)
    fragments = []
    taken = 0
    while taken < len(payload):
        options = later_options if taken else first_options
        room = (mtu - ip.MIN_HEADER_LEN - len(options)) // 8 * 8
        piece = payload[taken : taken + room]
        last = taken + len(piece) == len(payload)
        offset = header.fragment_offset + taken // 8
        more = header.flags_offset & ip.FLAG_MF if last else ip.FLAG_MF
        fragments.append(
            ip.build_header(
                payload_len=len(piece),
                source=header.source,
                destination=header.destination,
                ip_proto=header.ip_proto,
                ttl=header.ttl,
                tos=header.tos,
                identification=header.identification,
                flags_offset=more | offset,
                options=options,
            )
            + piece
        )
        taken += len(piece)
    return fragments


def copied_options(options: bytes) -> bytes:
    """The options every fragment repeats (their copied bit is set), padded to 4 bytes."""
    kept = b"".join(
        option for option in _each_option(options) if option and option[0] & _OPTION_COPIED
    )
    return kept + bytes(-len(kept) % 4)


def _each_option(options: bytes) -> Iterator[bytes]:
    # A malformed length ends the walk: what cannot be read cannot be repeated.
    at = 0
    while at < len(options) and options[at] != _OPTION_END:
        if options[at] == _OPTION_NOP:
            at += 1
            continue
        length = options[at + 1] if at + 1 < len(options) else 0
        if length < 2 or at + length > len(options):
            return
        yield options[at : at + length]
        at += length
