"""Room for packets while nobody reads them: in a TUN's queue, and in a UDP socket's buffer.

A TUN's queue counts packets, whatever their size (IFLA_TXQLEN; drivers/net/tun.c, tun_net_xmit:
one more is dropped). A socket's buffer counts bytes, and not those of the datagram, but those of
the memory it lies in: skb->truesize, some hundred bytes more, rounded up to what the allocator or
the driver gives (net/ipv4/udp.c, __udp_enqueue_schedule_skb). So the charge is measured.

Cheap, synchronous looks at the network namespace of the calling process.
"""

from __future__ import annotations

import errno
import select
import socket
import struct
from collections.abc import Collection
from typing import Final

from tundp.errors import PlatformError
from tundp.linux import links, uapi
from tundp.linux.rtnl import RtnlSocket, decode_error

_LOOPBACK: Final = "127.0.0.1"
_ARRIVES_S: Final = 2.0
"""A datagram to ourselves is there when it is sent, but for a softirq put off on a busy machine."""
_CHARGE: Final = struct.Struct("=I")


def device_queue_len(index: int) -> int | None:
    """Packets that each queue of a link holds (IFLA_TXQLEN); None if there is no such link.

    PlatformError if the kernel refuses to tell.
    """
    if index <= 0:
        return None
    try:
        sock = RtnlSocket()
        try:
            (answer,) = sock.exchange([links.link_request(index)])
        finally:
            sock.close()
    except OSError as error:
        raise PlatformError(f"cannot look at link {index}: {error.strerror}", error.errno) from None
    if answer.kind == uapi.NLMSG_ERROR:
        code, reason = decode_error(answer.flags, answer.body)
        if code == errno.ENODEV:
            return None
        raise PlatformError(f"cannot look at link {index}: {reason}", code)
    link = links.decode_link(answer.body)
    return None if link is None else link.queue_len


def receive_buffer(socks: Collection[socket.socket]) -> int | None:
    """Bytes the smallest receive buffer of these sockets holds, as charged; None without one.

    What getsockopt(SO_RCVBUF) says is already twice what was asked for (socket(7)), and is the
    whole of what the kernel compares the charges with.
    """
    sizes = [each.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) for each in socks]
    return min(sizes, default=None)


def datagram_charge(payload_len: int) -> int:
    """Bytes of a receive buffer that one UDP datagram of `payload_len` takes on this kernel.

    Sends one to itself over loopback, and asks the socket (SO_MEMINFO, Linux 4.12). A datagram
    from a network card costs as much or more, by what memory its driver receives into.
    PlatformError if that cannot be, as with loopback down.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            sock.bind((_LOOPBACK, 0))
            sock.connect(sock.getsockname())
            sock.send(bytes(payload_len))
            if not select.select([sock], [], [], _ARRIVES_S)[0]:
                raise TimeoutError(errno.ETIMEDOUT, "the datagram does not arrive")
            words = sock.getsockopt(socket.SOL_SOCKET, uapi.SO_MEMINFO, _CHARGE.size)
    except OSError as error:
        raise PlatformError(
            f"cannot measure what a datagram takes of a buffer, over {_LOOPBACK}: {error.strerror}",
            error.errno,
        ) from None
    # SK_MEMINFO_RMEM_ALLOC is the first; as many are copied as there is room for.
    return int(_CHARGE.unpack(words)[uapi.SK_MEMINFO_RMEM_ALLOC])
