"""The TUN device: opened through python-pytun, read and written by file descriptor only.

pytun opens and names the device well; the rest of it does not serve a dataplane (its
descriptor leaks into children and blocks, EAGAIN is not BlockingIOError, each read
allocates, getters go by name and so break on rename), so the descriptor is taken over
at once and the object only keeps it open.
"""

from __future__ import annotations

import os
from typing import Final

import pytun

from tundp.errors import PlatformError
from tundp.linux import uapi

DEVICE: Final = "/dev/net/tun"


class Tun:
    """An open TUN device: one `read` or `write` on `fd` is one IP packet, no header before it.

    The device, its addresses and routes vanish with the last descriptor: `close`.
    """

    def __init__(self, name: str) -> None:
        """Open `name`; a `%d` in it becomes the lowest free number. Non-blocking, close-on-exec."""
        try:
            self._device = pytun.TunTapDevice(name=name, flags=uapi.IFF_TUN | uapi.IFF_NO_PI)
        except pytun.Error as error:
            raise PlatformError(_explain(name, error), error.errno) from None
        self.fd: int = self._device.fileno()
        self.name: str = self._device.name
        os.set_inheritable(self.fd, False)
        os.set_blocking(self.fd, False)

    def close(self) -> None:
        """Close the descriptor, and with it remove the device. Harmless when repeated."""
        if self.fd >= 0:
            self.fd = -1
            self._device.close()


def _explain(name: str, error: OSError) -> str:
    reason = os.strerror(error.errno) if error.errno else str(error)
    if not os.path.exists(DEVICE):
        hint = f"{DEVICE} does not exist: load the tun module, or pass the device to the container"
    elif not os.access(DEVICE, os.R_OK | os.W_OK):
        hint = f"{DEVICE} may not be opened: run as root"
    elif os.geteuid() != 0 or reason == os.strerror(1):
        hint = "creating a TUN device needs CAP_NET_ADMIN: run as root"
    else:
        hint = "if another program holds a device of this name, stop it or pass --tun-name"
    return f"cannot open TUN device {name}: {reason}; {hint}"
