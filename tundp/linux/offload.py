"""Segmentation and receive offloads of TUN and UDP sockets, and detection of what this kernel has.

Asked by trying, never by version alone: distributions carry features back. The one
exception is a defect no local test shows (`udp_segment_defect`).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import socket
import struct
from dataclasses import dataclass
from typing import Final

from tundp.choices import Offload as Offload
from tundp.choices import OffloadMeaning as OffloadMeaning
from tundp.linux import uapi
from tundp.linux.tun import DEVICE

MOST_SEGMENTS: Final = 128
"""UDP_MAX_SEGMENTS since Linux 6.9 (include/linux/udp.h); 64 before."""
SAFE_SEGMENTS: Final = 63
"""Kernels with the limit of 64 counted the headers in, so that 64 full ones failed."""

ALL: Final = frozenset(Offload)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelOffloads:
    """The offloads available, and the reason for each that is not."""

    offloads: frozenset[Offload]
    max_segments: int
    missing: dict[Offload, str]


def find_offloads(disabled: frozenset[Offload] = frozenset()) -> KernelOffloads:
    """Probe this kernel. USO is requested here, but only granted when the TUN is opened.

    disabled: not to be used whatever the kernel says.
    """
    missing = dict.fromkeys(disabled, "switched off by --disable-offloads")
    why_no_header = _why_no_vnet_header()
    if why_no_header:
        for offload in ALL - {Offload.UDP_SEGMENT, Offload.UDP_GRO}:
            missing.setdefault(offload, why_no_header)
    max_segments = 1
    why_no_segment = udp_segment_defect(os.uname().release)
    if why_no_segment is None:
        max_segments, why_no_segment = _ask_udp_segment()
    if why_no_segment:
        missing.setdefault(Offload.UDP_SEGMENT, why_no_segment)
    why_no_gro = _why_no_udp_gro()
    if why_no_gro:
        missing.setdefault(Offload.UDP_GRO, why_no_gro)
    return KernelOffloads(
        offloads=ALL - missing.keys(),
        max_segments=1 if Offload.UDP_SEGMENT in missing else max_segments,
        missing=missing,
    )


def udp_segment_defect(release: str) -> str | None:
    """Why UDP_SEGMENT is not to be trusted on a kernel release, e.g. "7.1.3"; or None.

    Linux 7.0 to 7.1.4 mangles runs of equal datagrams on some drivers (commit b10b446,
    fixed by 78effd8 and 5f17ae0). It shows only behind a real network card.
    """
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release)
    if found is None:
        return None
    version = tuple(int(part or 0) for part in found.groups())
    if (7, 0, 0) <= version < (7, 1, 5):
        return f"Linux {release} mangles equal datagrams on some network cards"
    return None


def set_udp_gro(sock: socket.socket, *, is_on: bool) -> bool:
    """Switch UDP_GRO of a socket; whether it is on now. Kernels before 5.12 cannot tell: off."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_UDP, uapi.UDP_GRO, int(is_on))
        return bool(sock.getsockopt(socket.IPPROTO_UDP, uapi.UDP_GRO))
    return False


def why_no_batches() -> str | None:
    """Why this process cannot call sendmmsg(2) and recvmmsg(2); None if it can.

    Kernels may lack them (ENOSYS), seccomp filters of containers and units forbid them (EPERM).
    Both are called with no message at all, which does nothing.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for name, more in (("sendmmsg", ()), ("recvmmsg", (None,))):
            if getattr(libc, name)(sock.fileno(), None, 0, socket.MSG_DONTWAIT, *more) < 0:
                return f"{name}: {os.strerror(ctypes.get_errno())}"
    return None


def tun_features() -> int:
    """The IFF_ flags /dev/net/tun takes (TUNGETFEATURES); 0 if it cannot be asked."""
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        answer = fcntl.ioctl(fd, uapi.TUNGETFEATURES, struct.pack("=I", 0))
    except OSError:
        return 0
    finally:
        os.close(fd)
    return int.from_bytes(answer, "little" if struct.pack("=H", 1)[0] else "big")


def _why_no_vnet_header() -> str | None:
    features = tun_features()
    if features & uapi.IFF_VNET_HDR:
        return None
    return f"{DEVICE} {'has no vnet header' if features else 'cannot be asked'}"


def _ask_udp_segment() -> tuple[int, str | None]:
    """The number of datagrams of one UDP_SEGMENT send; the reason if it is one."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
    ):
        try:
            sender.setsockopt(socket.IPPROTO_UDP, uapi.UDP_SEGMENT, 1)
        except OSError as error:
            return 1, f"UDP_SEGMENT: {os.strerror(error.errno or 0)}"
        try:
            receiver.bind(("127.0.0.1", 0))
            sender.sendto(bytes(MOST_SEGMENTS), receiver.getsockname())
        except OSError:
            # EINVAL, the old limit; or no loopback here: the option is there all the same.
            return SAFE_SEGMENTS, None
    return MOST_SEGMENTS, None


def _why_no_udp_gro() -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return None if set_udp_gro(sock, is_on=True) else "UDP_GRO: not supported"
