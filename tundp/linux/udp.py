"""The UDP socket of the underlay."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import struct
from ipaddress import IPv4Address
from typing import Final

from tundp.errors import PlatformError
from tundp.linux import uapi

_log = logging.getLogger(__name__)

RECEIVE_BUFFER_LEN: Final = 16 << 20
"""The kernel makes twice as much of it: 14,563 full-size datagrams, 1.4 s of 10,000 a second. Its
default of 208 KiB holds 92."""
SEND_BUFFER_LEN: Final = 1 << 20
"""16 super-packets: beyond that, hops get sockets of their own (engine/hop_slots.py)."""
SENDER_ADDRESS: Final = "127.0.130.133"
"""What senders are bound to: no datagram from the wire may have that destination (RFC 1122)."""

_MAX_MTU: Final = 0xFFFF
_MAX_PAYLOAD_LEN: Final = _MAX_MTU - 28
_EXTENDED_ERROR: Final = struct.Struct("=IB3xI4x")
"""linux/errqueue.h: struct sock_extended_err: ee_errno, ee_origin, ee_info."""
_QUEUE: Final = socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT


def open_udp(
    address: IPv4Address, port: int, *, is_shared: bool = False, is_one_of_many: bool = False
) -> socket.socket:
    """A non-blocking UDP socket bound to `address`:`port`, as flannel binds its own.

    IP_PMTUDISC_INTERFACE: a datagram larger than the device takes is refused with EMSGSIZE, and
    the engine answers with ICMP or fragments the inner packet. What ICMP errors, which anybody
    can forge, say of the path is ignored; DF is clear, so that a router with a narrower link
    fragments, as with flannel, until the path is measured (backend/udp/path_prober.py).
    SO_RXQ_OVFL reports what the socket had to drop.
    is_shared: others of ours shall join on the same port, each peer staying with one socket.
    is_one_of_many: this is one that joins.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.IPPROTO_IP, uapi.IP_MTU_DISCOVER, uapi.IP_PMTUDISC_INTERFACE)
        sock.setsockopt(socket.SOL_SOCKET, uapi.SO_RXQ_OVFL, 1)
        grow_buffers(sock)
        if is_one_of_many:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((str(address), port))
        # Only now may others of ours join: before, an address in use must be an error.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(is_shared))
    except OSError as error:
        sock.close()
        raise PlatformError(_explain(address, port, error), error.errno) from None
    return sock


def open_sender(port: int, buffer_len: int, *, is_probing: bool = False) -> socket.socket:
    """A non-blocking UDP socket that sends from `port` of our addresses, and receives nothing.

    Which address is said at each send (IP_PKTINFO: `source_control`). DF as with `open_udp`.
    is_probing: with DF (IP_PMTUDISC_PROBE), whatever is known of the path.
    buffer_len: SO_SNDBUF, of which the kernel makes twice as much. OSError.
    """
    discovery = uapi.IP_PMTUDISC_PROBE if is_probing else uapi.IP_PMTUDISC_INTERFACE
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        # FREEBIND: lo may be down. REUSEADDR: others of ours are bound there, too.
        sock.setsockopt(socket.IPPROTO_IP, uapi.IP_FREEBIND, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_IP, uapi.IP_MTU_DISCOVER, discovery)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_len)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        sock.bind((SENDER_ADDRESS, port))
    except OSError:
        sock.close()
        raise
    return sock


def grow_buffers(sock: socket.socket) -> None:
    """Give a socket the buffers of ours, as far as this process may; larger ones are left alone.

    Twice what net.core.rmem_max says is the most without CAP_NET_ADMIN. OSError.
    """
    for force, polite, length, limit in (
        (uapi.SO_RCVBUFFORCE, socket.SO_RCVBUF, RECEIVE_BUFFER_LEN, "net.core.rmem_max"),
        (uapi.SO_SNDBUFFORCE, socket.SO_SNDBUF, SEND_BUFFER_LEN, "net.core.wmem_max"),
    ):
        granted = _grow(sock, force, polite, length)
        if granted < length:
            _log.warning(
                "UDP buffer is %d bytes instead of %d: bursts will be lost; run as root or"
                " sysctl -w %s=%d",
                granted,
                length,
                limit,
                length,
            )


def granted_receive_buffer() -> int:
    """Bytes of the receive buffer a socket of ours would have, as SO_RCVBUF reads it back.

    Opens one and closes it again. PlatformError.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            _grow(sock, uapi.SO_RCVBUFFORCE, socket.SO_RCVBUF, RECEIVE_BUFFER_LEN)
            return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    except OSError as error:
        raise PlatformError(
            f"cannot try the size of a receive buffer: {error.strerror}", error.errno
        ) from None


def set_timestamps(sock: socket.socket, *, is_on: bool) -> None:
    """Switch receive timestamps of a socket. Kernels before 5.1 have none: nothing is stamped.

    Not by SO_TIMESTAMPNS: from then on the kernel stamps all packets of the host until the socket
    is freed, whatever is set later (__sock_set_timestamps and sock_disable_timestamp,
    net/core/sock.c).
    """
    flags = uapi.SOF_TIMESTAMPING_RX_SOFTWARE | uapi.SOF_TIMESTAMPING_SOFTWARE
    try:
        sock.setsockopt(socket.SOL_SOCKET, uapi.SO_TIMESTAMPING_NEW, flags if is_on else 0)
    except OSError as error:
        _log.debug("receive timestamps: %s", error)


def rebind(sock: socket.socket, new: socket.socket) -> None:
    """Replace the socket under `sock`'s descriptor by `new` (dup2); close `new`.

    Whoever watches the descriptor must begin again: an epoll set does not notice.
    """
    os.dup2(new.fileno(), sock.fileno(), inheritable=False)
    new.close()


def source_control(address: IPv4Address) -> list[tuple[int, int, bytes]]:
    """The control message that makes a send leave from `address` (struct in_pktinfo)."""
    # Any interface, the source address, and one that only receivers read.
    return [(socket.IPPROTO_IP, uapi.IP_PKTINFO, struct.pack("=i4s4x", 0, address.packed))]


def device_mtu(source: IPv4Address, destination: str, port: int = 9) -> int | None:
    """The MTU of the device datagrams to `destination` leave by, bytes; None without a route.

    Not IP_MTU, which is that of the path with what ICMP errors said of it. Sends nothing: a
    datagram no device takes is refused, and the error queue (IP_RECVERR) names the limit.
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.setsockopt(socket.IPPROTO_IP, uapi.IP_MTU_DISCOVER, uapi.IP_PMTUDISC_INTERFACE)
        probe.setsockopt(socket.IPPROTO_IP, uapi.IP_RECVERR, 1)
        probe.bind((str(source), 0))
        probe.connect((destination, port))
        try:
            # MSG_MORE: what the device does take waits for the rest of it, and is discarded.
            probe.send(bytes(_MAX_PAYLOAD_LEN), socket.MSG_MORE | socket.MSG_DONTWAIT)
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                return None
        else:
            return _MAX_MTU
        _, messages, _, _ = probe.recvmsg(0, socket.CMSG_SPACE(_EXTENDED_ERROR.size + 16), _QUEUE)
        for level, kind, data in messages:
            if (level, kind) == (socket.IPPROTO_IP, uapi.IP_RECVERR):
                code, origin, limit = _EXTENDED_ERROR.unpack_from(data)
                if (code, origin) == (errno.EMSGSIZE, uapi.SO_EE_ORIGIN_LOCAL):
                    return min(int(limit), _MAX_MTU)
    return None


def _grow(sock: socket.socket, force: int, polite: int, length: int) -> int:
    """Ask for a buffer of `length` bytes unless there is one; how many were granted."""
    # The kernel reports twice what was asked, its own bookkeeping included (socket(7)).
    if (there := sock.getsockopt(socket.SOL_SOCKET, polite) // 2) >= length:
        return there
    try:
        sock.setsockopt(socket.SOL_SOCKET, force, length)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, polite, length)
    return sock.getsockopt(socket.SOL_SOCKET, polite) // 2


def _explain(address: IPv4Address, port: int, error: OSError) -> str:
    where = f"cannot bind UDP {address}:{port}: {os.strerror(error.errno or 0)}"
    if error.errno == errno.EADDRINUSE:
        return (
            f"{where}; another flanneld or tundp has it (ss -ulpn 'sport = :{port}'):"
            " stop that one, or give this network its own Backend.Port"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{where}; no interface has this address now: choose one with --iface"
    return where
