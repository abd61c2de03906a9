"""The header before each packet of a TUN opened with IFF_VNET_HDR (linux/virtio_net.h).

    byte  0       1         2..3      4..5      6..7        8..9
          flags   gso_type  hdr_len   gso_size  csum_start  csum_offset

Ten bytes, integers in host order (no TUNSETVNETLE). A super-packet is one IP packet with
the payload of many: `gso_size` bytes of it belong to each. hdr_len is a hint about the
kernel's buffers and is never believed on read. Native twin: struct tundp_vnet.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

LEN: Final = 10

NEEDS_CSUM: Final = 1
"""VIRTIO_NET_HDR_F_NEEDS_CSUM: the field holds the pseudo-header's sum, not inverted."""

GSO_NONE: Final = 0
GSO_TCPV4: Final = 1
GSO_TCPV6: Final = 4
GSO_UDP_L4: Final = 5
GSO_ECN: Final = 0x80
"""A qualifier of the TCP types: the super-packet carries CWR."""

_HEADER: Final = struct.Struct("=BBHHHH")


class VnetHeader(NamedTuple):
    """The six fields; integers in host order, lengths and offsets in bytes."""

    flags: int = 0
    gso_type: int = GSO_NONE
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0

    @property
    def needs_checksum(self) -> bool:
        """The checksum at csum_start + csum_offset is still to be finished."""
        return bool(self.flags & NEEDS_CSUM)

    @property
    def kind(self) -> int:
        """gso_type without the ECN qualifier."""
        return self.gso_type & ~GSO_ECN

    def pack(self) -> bytes:
        """The ten bytes."""
        return _HEADER.pack(*self)


def parse(data: bytes | bytearray | memoryview) -> VnetHeader:
    """The header at the start of `data`, which has at least LEN bytes."""
    return VnetHeader._make(_HEADER.unpack_from(data))
