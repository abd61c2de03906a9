"""The TUN device behind a descriptor somebody gave: which it is, and how to be rid of it.

A device lives as long as any descriptor of it does, also one in a store. Whoever has no use for
it removes the device itself: the copies of its descriptors then lead nowhere.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import struct
from dataclasses import dataclass

from tundp.linux import uapi
from tundp.linux.rtnl import Request, RtnlSocket, decode_error
from tundp.linux.tun import IFNAMSIZ, IFREQ_LEN


@dataclass(frozen=True, slots=True)
class TunDevice:
    """A device, and no other of the same name later."""

    name: str
    index: int


def is_tun(fd: int) -> bool:
    """Whether a descriptor is of /dev/net/tun, its device deleted or not."""
    try:
        status = os.fstat(fd)
        return stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(10, 200)
    except OSError:
        return False


def device_of(fd: int) -> TunDevice | None:
    """The device behind a descriptor (TUNGETIFF); None if it was deleted, or is no TUN device.

    None, too, if it is in another network namespace, where its name and index mean something else.
    """
    if not is_tun(fd):
        return None
    request = bytearray(IFREQ_LEN)
    try:
        fcntl.ioctl(fd, uapi.TUNGETIFF, request)
        name = bytes(request[:IFNAMSIZ]).partition(b"\0")[0].decode()
        if not _is_here(fd):
            return None
        return TunDevice(name, socket.if_nametoindex(name))
    except (OSError, UnicodeDecodeError):
        return None


def remove_device(fd: int) -> str:
    """Delete the device behind a descriptor, and its address and routes with it; its name.

    Empty if there is none any more, or if the kernel refuses. Blocks for the kernel alone.
    """
    device = device_of(fd)
    if device is None:
        return ""
    # struct ifinfomsg: family, type, index, flags, changed flags (linux/rtnetlink.h).
    body = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, device.index, 0, 0)
    with contextlib.suppress(OSError), contextlib.closing(RtnlSocket()) as rtnl:
        for answer in rtnl.exchange([Request(uapi.RTM_DELLINK, uapi.NLM_F_ACK, body)]):
            if answer.kind == uapi.NLMSG_ERROR and decode_error(answer.flags, answer.body)[0] == 0:
                return device.name
    return ""


def _is_here(fd: int) -> bool:
    """Whether the device is in the calling thread's network namespace; kernels < 5.2 do not say."""
    try:
        netns = fcntl.ioctl(fd, uapi.TUNGETDEVNETNS, 0)
    except OSError:
        return True
    try:
        return os.path.samestat(os.fstat(netns), os.stat("/proc/thread-self/ns/net"))
    except OSError:
        return True
    finally:
        os.close(netns)
