"""Probe the kernel's features for packet engines by using them; for `tundp probe`.

The TUN questions need a device. It is made in a network namespace of the probe's own,
so that nothing on the host sees it; where that is not allowed they stay unanswered.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from tundp.errors import PlatformError
from tundp.finding import Finding, Verdict
from tundp.linux import offload, uapi
from tundp.linux.offload import KernelOffloads, Offload
from tundp.linux.tun import Tun, TunMode
from tundp.linux.udp import RECEIVE_BUFFER_LEN

_IFREQ: Final = struct.Struct("16sH22x")


PROBE_SCHEMA: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """The answer of `tundp probe`."""

    schema: int = PROBE_SCHEMA
    kernel: str
    """The release of the running kernel, as `uname -r`."""
    machine: str
    cpus: int
    native: str
    """The build of the C module, or why there is none."""
    sums: tuple[str, ...]
    """The variants of the C module's checksum this CPU can run, best first."""
    findings: tuple[Finding, ...]
    not_asked: str | None
    """Why no TUN device was tried; None if one was."""
    engine: str
    why: str
    """Why `--engine=auto` means that engine here."""
    offloads: tuple[str, ...]
    missing: Mapping[str, str]
    """Each offload that is not used, and why."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        document = {each.name: getattr(self, each.name) for each in fields(self)}
        return document | {"findings": [finding.as_dict() for finding in self.findings]}


def feature(
    finding_id: str,
    title: str,
    *,
    is_there: bool,
    evidence: str,
    since: str,
    without: str,
    is_needed: bool = False,
) -> Finding:
    """Describe one thing a kernel may have.

    since: the first mainline Linux that has it. without: what is done without it.
    """
    missing = Verdict.FAIL if is_needed else Verdict.NOTE
    return Finding(
        id=finding_id,
        verdict=Verdict.OK if is_there else missing,
        title=title,
        evidence=evidence,
        meaning="" if is_there else without,
        facts={"since": since},
    )


def enter_private_namespace() -> str | None:
    """Give this process a network namespace of its own, loopback up; why not if not.

    For a short-lived process with one thread only: there is no way back.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(uapi.CLONE_NEWNET):
        return f"no network namespace of our own: {os.strerror(ctypes.get_errno())}"
    _set_up("lo")
    return None


def probe(kernel: KernelOffloads, *, may_make_device: bool) -> list[Finding]:
    """Findings of every feature an engine may use, in the order packets meet them."""
    return [
        *_tun_findings(offload.tun_features()),
        *(_device_findings() if may_make_device else ()),
        *_socket_findings(kernel, os.uname().release),
    ]


def _tun_findings(features: int) -> Iterator[Finding]:
    yield feature(
        "tun",
        "/dev/net/tun",
        is_there=bool(features),
        evidence=f"flags {features:#06x}" if features else "cannot be opened",
        since="2.4",
        without="nothing works: load the tun module, or pass the device to the container",
        is_needed=True,
    )
    yield feature(
        "vnet-header",
        "vnet header",
        is_there=bool(features & uapi.IFF_VNET_HDR),
        evidence="IFF_VNET_HDR: super-packets cross the TUN whole",
        since="2.6.27",
        without="engine mmsg: one packet per TUN read and write",
    )
    yield feature(
        "multi-queue",
        "multi-queue",
        is_there=bool(features & uapi.IFF_MULTI_QUEUE),
        evidence="IFF_MULTI_QUEUE: --workers above 1",
        since="3.8",
        without="one worker",
    )


def _socket_findings(kernel: KernelOffloads, release: str) -> Iterator[Finding]:
    why_no_batches = offload.why_no_batches()
    yield feature(
        "mmsg",
        "sendmmsg and recvmmsg",
        is_there=why_no_batches is None,
        evidence=why_no_batches or "many datagrams a system call",
        since="3.0",
        without="engine simple: one datagram a system call",
    )
    segment_defect = offload.udp_segment_defect(release)
    has_segment = Offload.UDP_SEGMENT not in kernel.missing
    yield feature(
        "udp-segment",
        "UDP_SEGMENT",
        is_there=has_segment,
        evidence=(
            f"up to {kernel.max_segments} datagrams a send"
            if has_segment
            else kernel.missing[Offload.UDP_SEGMENT]
        ),
        since="4.18 (128 a send since 6.9)",
        without=Offload.UDP_SEGMENT.meaning.without,
    )
    yield feature(
        "udp-segment-sound",
        "UDP_SEGMENT sound",
        is_there=segment_defect is None,
        evidence=segment_defect or f"Linux {release} is not among the defective ones",
        since="not 7.0 to 7.1.4",
        without="UDP_SEGMENT is left alone",
    )
    yield feature(
        "udp-gro",
        "UDP_GRO",
        is_there=Offload.UDP_GRO not in kernel.missing,
        evidence=kernel.missing.get(Offload.UDP_GRO, "datagrams of one peer come merged"),
        since="5.0 (5.12 to be asked for it)",
        without=Offload.UDP_GRO.meaning.without,
    )
    yield _forced_buffers()
    yield feature(
        "so-reuseport",
        "SO_REUSEPORT",
        is_there=hasattr(socket, "SO_REUSEPORT"),
        evidence="each worker a socket on the same port; a peer stays with one",
        since="3.9",
        without="one worker",
    )


def _device_findings() -> Iterator[Finding]:
    try:
        tun = Tun("probe%d", TunMode(has_vnet_header=True, wants_tso=True, wants_uso=True))
    except PlatformError as error:
        yield feature(
            "tun-device",
            "a TUN device",
            is_there=False,
            evidence=str(error),
            since="2.4",
            without="nothing works",
            is_needed=True,
        )
        return
    try:
        _set_up(tun.name)
        yield feature(
            "tun-tso",
            "TSO from the TUN",
            is_there=tun.has_tso,
            evidence=Offload.TUN_TSO.meaning.means,
            since=Offload.TUN_TSO.meaning.since,
            without=Offload.TUN_TSO.meaning.without,
        )
        yield feature(
            "tun-uso",
            "USO from the TUN",
            is_there=tun.has_uso,
            evidence=Offload.TUN_USO.meaning.means,
            since=Offload.TUN_USO.meaning.since,
            without=Offload.TUN_USO.meaning.without,
        )
        for kind, is_tcp, since in (("TCP", True, "2.6.27"), ("UDP", False, "6.2")):
            error_text = _write(tun.fd, _super_packet(is_tcp=is_tcp))
            yield feature(
                f"{kind.lower()}-super-packet",
                f"{kind} super-packet to the TUN",
                is_there=error_text is None,
                evidence=error_text or "taken whole",
                since=f"{since} (not 6.1.103, 6.6.44, 6.10.3)",
                without="one TUN write per packet, found out at the first refusal",
            )
    finally:
        tun.close()


def _forced_buffers() -> Finding:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, uapi.SO_RCVBUFFORCE, RECEIVE_BUFFER_LEN)
            why_not = None
        except OSError as error:
            why_not = os.strerror(error.errno or errno.EPERM)
    return feature(
        "so-rcvbufforce",
        "SO_RCVBUFFORCE",
        is_there=why_not is None,
        evidence=why_not
        or f"{RECEIVE_BUFFER_LEN >> 20} MiB socket buffers whatever net.core.rmem_max says",
        since="2.6.14 (CAP_NET_ADMIN)",
        without="bursts are lost beyond net.core.rmem_max",
    )


def _super_packet(*, is_tcp: bool) -> bytes:
    """Two segments of one byte with a TTL of 0: the kernel takes it and drops it in silence."""
    ip_proto, csum_offset, transport_len = (6, 16, 20) if is_tcp else (17, 6, 8)
    total_len = 20 + transport_len + 2
    addresses = bytes((192, 0, 2, 1, 192, 0, 2, 2))
    ip_header = struct.pack("!BBHHHBBH8s", 0x45, 0, total_len, 0, 0x4000, 0, ip_proto, 0, addresses)
    transport = bytearray(transport_len)
    if is_tcp:
        transport[12:14] = b"\x50\x10"
    else:
        transport[4:6] = (transport_len + 2).to_bytes(2, "big")
    gso_type = 1 if is_tcp else 5
    header = struct.pack("=BBHHHH", 1, gso_type, 20 + transport_len, 1, 20, csum_offset)
    return header + ip_header + bytes(transport) + b"\0\0"


def _write(fd: int, packet: bytes) -> str | None:
    try:
        os.write(fd, packet)
    except OSError as error:
        return os.strerror(error.errno or 0)
    return None


def _set_up(name: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, uapi.SIOCSIFFLAGS, _IFREQ.pack(name.encode(), uapi.IFF_UP))
