"""The TUN device: opened through python-pytun, read and written by file descriptor only.

pytun opens and names the device well; the rest of it does not serve a dataplane (its
descriptor leaks into children and blocks, EAGAIN is not BlockingIOError, each read
allocates, getters go by name and so break on rename), so the descriptor is taken over
at once and the object only keeps it open.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import pytun

from tundp.errors import FILES_STEP, PlatformError
from tundp.linux import uapi

DEVICE: Final = "/dev/net/tun"
IFNAMSIZ: Final = 16
"""Bytes of an interface name in `struct ifreq`, its NUL included (linux/if.h)."""
IFREQ_LEN: Final = 40
"""sizeof(struct ifreq) on 64-bit kernels; more than any other has (linux/if.h)."""


def require_device() -> None:
    """Raise PlatformError, with the fix, if no TUN can be opened here. Creates none."""
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        step = (
            "load the module (modprobe tun), or give the container the device"
            " (--device /dev/net/tun)"
        )
        if error.errno == errno.EMFILE:
            step = FILES_STEP
        raise PlatformError(
            f"cannot open {DEVICE}: {error.strerror}; {step}", error.errno
        ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class TunMode:
    """How a device is opened."""

    has_vnet_header: bool = False
    """Each packet is preceded by a vnet header; super-packets may be written."""
    wants_tso: bool = False
    """Receive TCP super-packets from it (TSO)."""
    wants_uso: bool = False
    """Receive UDP super-packets, too, if the kernel has USO."""
    queues: int = 1


class Tun:
    """An open TUN device: one `read` or `write` on a descriptor is one IP packet.

    fds: one per queue; `fd` is the first. has_vnet_header, has_tso and has_uso say what the
    kernel granted, knows_uso whether it takes UDP super-packets. The device, its addresses
    and routes vanish with the last descriptor: `close`.
    """

    def __init__(self, name: str, mode: TunMode | None = None) -> None:
        """Open `name`; a `%d` in it becomes the lowest free number. Non-blocking, close-on-exec."""
        mode = mode or TunMode()
        self.has_tso = self.has_uso = self.knows_uso = False
        self.has_vnet_header = mode.has_vnet_header
        self.name = name
        self.fds: tuple[int, ...] = ()
        self._devices: list[pytun.TunTapDevice] = []
        self._adopted: tuple[int, ...] = ()
        self._open(name, mode)
        if self.has_vnet_header:
            self._ask_offloads(mode)

    @classmethod
    def adopt(cls, fds: Sequence[int], mode: TunMode) -> Tun:
        """The TUN device whose queues' descriptors are `fds`, opened by another process.

        The descriptors are owned from here on, whether or not an error is raised. What a
        queue is (vnet header or not, multi-queue) belongs to its file and cannot be changed:
        PlatformError names the difference to `mode`; the offloads are asked for anew. One
        descriptor a queue, in the queues' order.
        """
        self = cls.__new__(cls)
        self._devices = []
        self._adopted = self.fds = tuple(fds)
        self.has_tso = self.has_uso = self.knows_uso = False
        self.has_vnet_header = mode.has_vnet_header
        try:
            found = [_ask_interface(fd) for fd in fds]
            self.name = _check_adopted(found, mode)
            for fd in fds:
                os.set_inheritable(fd, False)
                os.set_blocking(fd, False)
            _keep_from_others(fds[0])
            if self.has_vnet_header:
                self._ask_offloads(mode)
        except PlatformError:
            self.close()
            raise
        return self

    @property
    def fd(self) -> int:
        """The descriptor of the first queue, or -1 when closed."""
        return self.fds[0] if self.fds else -1

    @property
    def has_device(self) -> bool:
        """Whether the device still exists, in whatever network namespace (TUNGETIFF answers)."""
        try:
            _ask_interface(self.fd)
        except PlatformError:
            return False
        return True

    def ask_again(self, mode: TunMode) -> None:
        """Set the offloads anew: another process with the same device may have set others."""
        if self.has_vnet_header:
            self._ask_offloads(mode)

    def close(self) -> None:
        """Close the descriptors, and with them remove the device. Harmless when repeated."""
        self.fds = ()
        while self._devices:
            self._devices.pop().close()
        adopted, self._adopted = self._adopted, ()
        for fd in adopted:
            os.close(fd)

    def _open(self, name: str, mode: TunMode) -> None:
        flags = uapi.IFF_TUN | uapi.IFF_NO_PI
        if self.has_vnet_header:
            flags |= uapi.IFF_VNET_HDR
        if mode.queues > 1:
            flags |= uapi.IFF_MULTI_QUEUE
        self.name = name
        try:
            for queue in range(mode.queues):
                # IFF_TUN_EXCL on the first queue: without it an existing multi-queue device of
                # this name would be joined.
                only_ours = uapi.IFF_TUN_EXCL if mode.queues > 1 and queue == 0 else 0
                device = pytun.TunTapDevice(name=self.name, flags=flags | only_ours)
                self._devices.append(device)
                if queue == 0:
                    _keep_from_others(device.fileno())
                self.name = device.name
        except pytun.Error as error:
            self.close()
            raise PlatformError(_explain(name, error, mode.queues), error.errno) from None
        self.fds = tuple(device.fileno() for device in self._devices)
        for fd in self.fds:
            os.set_inheritable(fd, False)
            os.set_blocking(fd, False)

    def _ask_offloads(self, mode: TunMode) -> None:
        """Ask for what `mode` wants; what the kernel does not grant stays with the kernel."""
        tso = uapi.TUN_F_TSO4 | uapi.TUN_F_TSO6
        uso = uapi.TUN_F_USO4 | uapi.TUN_F_USO6
        self.knows_uso = self._set_offloads(uapi.TUN_F_CSUM | uso)
        self.has_uso = mode.wants_uso and self.knows_uso
        bits = (tso if mode.wants_tso else 0) | (uso if self.has_uso else 0)
        if mode.wants_tso and self._set_offloads(uapi.TUN_F_CSUM | uapi.TUN_F_TSO_ECN | bits):
            self.has_tso = True
            return
        self.has_tso = self._set_offloads(uapi.TUN_F_CSUM | bits if bits else 0) and mode.wants_tso

    def _set_offloads(self, bits: int) -> bool:
        try:
            for fd in self.fds:
                fcntl.ioctl(fd, uapi.TUNSETOFFLOAD, bits)
        except OSError:
            return False
        return True


def _keep_from_others(fd: int) -> None:
    """Make this process's user the owner of the device behind a descriptor.

    A device without an owner may be joined by anybody who can open /dev/net/tun, as long as it has
    room for one more queue (drivers/net/tun.c, tun_not_capable): to read what pods send, and to
    send in their names. PlatformError.
    """
    try:
        fcntl.ioctl(fd, uapi.TUNSETOWNER, os.geteuid())
    except OSError as error:
        raise PlatformError(
            f"cannot become the owner of a TUN device: {os.strerror(error.errno or 0)}", error.errno
        ) from None


def _ask_interface(fd: int) -> tuple[str, int]:
    """Name and IFF_* flags of the TUN device behind a descriptor (TUNGETIFF, linux/if_tun.h)."""
    request = bytearray(IFREQ_LEN)
    try:
        fcntl.ioctl(fd, uapi.TUNGETIFF, request)
    except OSError as error:
        raise PlatformError(
            f"descriptor {fd} is no TUN device: {os.strerror(error.errno or 0)}", error.errno
        ) from None
    name = bytes(request[:IFNAMSIZ]).partition(b"\0")[0].decode()
    return name, struct.unpack_from("=H", request, IFNAMSIZ)[0]


def _check_adopted(found: Sequence[tuple[str, int]], mode: TunMode) -> str:
    """The device's name; PlatformError if the descriptors are not what `mode` needs."""
    if len(found) != mode.queues:
        raise PlatformError(
            f"cannot adopt a TUN device with {len(found)} queues: {mode.queues} are wanted",
            errno.EINVAL,
        )
    names = {name for name, _ in found}
    if len(names) != 1:
        raise PlatformError(
            f"cannot adopt descriptors of several devices as one: {', '.join(sorted(names))}",
            errno.EINVAL,
        )
    (name,) = names
    for _, flags in found:
        for flag, wanted, what in (
            (uapi.IFF_TUN, True, "IP packets (IFF_TUN)"),
            (uapi.IFF_NO_PI, True, "packets without packet information (IFF_NO_PI)"),
            (uapi.IFF_VNET_HDR, mode.has_vnet_header, "vnet headers (IFF_VNET_HDR)"),
        ):
            if bool(flags & flag) is not wanted:
                raise PlatformError(
                    f"cannot adopt {name}: it {'has no' if wanted else 'has'} {what}, which"
                    " cannot be changed once a queue is open",
                    errno.EINVAL,
                )
    return name


def _explain(name: str, error: OSError, queues: int) -> str:
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno == errno.EMFILE:
        hint = FILES_STEP
    elif not os.path.exists(DEVICE):
        hint = f"{DEVICE} does not exist: load the tun module, or pass the device to the container"
    elif not os.access(DEVICE, os.R_OK | os.W_OK):
        hint = f"{DEVICE} may not be opened: run as root"
    elif os.geteuid() != 0 or reason == os.strerror(1):
        hint = "creating a TUN device needs CAP_NET_ADMIN: run as root"
    else:
        hint = "if another program holds a device of this name, stop it or pass --tun-name"
    if queues > 1 and error.errno == errno.EINVAL:
        hint += "; --workers=1 where there is no multi-queue (tundp probe tells)"
    return f"cannot open TUN device {name}: {reason}; {hint}"
