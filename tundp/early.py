"""The early start: packets flow before the daemon is there.

    exec -> begin: descriptors adopted, image read, C workers run
         -> imports, settings, sandbox (renew: threads with no rights but what it leaves)
         -> lease, leases, FIB, engine ready -> the backend ends the workers and attaches the engine

A start from descriptors of a predecessor finds the TUN's queues and the UDP sockets alive, with
packets in them, and an image of the FIB (engine/image.py). Python needs 40 ms to begin, what a
daemon is made of several hundred, the store as long as it takes. Here packets wait for the first.

Whatever does not fit means a normal start, and a line in the log that says why. Nothing here
raises: it runs before anybody could report it. Nothing here imports what takes long.
"""

from __future__ import annotations

import atexit
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from tundp.linux import fd_store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tundp.engine.image import Image
    from tundp.engine.native.early import EarlyWorkers

COMMAND: Final = "run"
_FLAG: Final = "on-lease-lost"
_IFREQ_LEN: Final = 40
_NAME_LEN: Final = 16
_IFF_UP: Final = 0x1
_IFF_VNET_HDR: Final = 0x4000
_TUNGETIFF: Final = 0x800454D2
_SIOCGIFFLAGS: Final = 0x8913
"""linux/if_tun.h, linux/sockios.h; linux/uapi.py has them all, and takes longer to import."""


class Start(NamedTuple):
    """What a process began with."""

    descriptors: dict[str, int]
    """Given by a predecessor, by name; owned by whoever has this."""
    workers: EarlyWorkers | None
    """Carry packets until somebody ends them."""
    why_not: str
    """Why there are none although descriptors were given; empty if there are, or none were."""


NOTHING: Final = Start({}, None, "")
"""No descriptors were given, or none were asked for."""
_begun: list[Start] = []


def begin(arguments: Sequence[str]) -> None:
    """Carry packets with what this process was given, if it is a daemon and was given enough.

    arguments: of the command line, without the program's name. `begun` tells what came of it.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or arguments[:1] != [COMMAND]:
        return
    descriptors = fd_store.taken(os.environ)
    if not descriptors:
        return
    workers, why_not = None, _exits_without_lease(arguments, os.environ)
    if not why_not:
        try:
            workers = _workers_of(descriptors)
        except Exception as error:  # noqa: BLE001  (a normal start follows, which says so)
            why_not = str(error) or repr(error)
    if workers is not None:
        # Before the interpreter frees what the threads use.
        atexit.register(workers.stop)
    _begun.append(Start(descriptors, workers, why_not))


def begun() -> Start:
    """What `begin` came to: the caller's from here on; nothing if it was not called, or before."""
    return _begun.pop() if _begun else NOTHING


def _exits_without_lease(arguments: Sequence[str], environ: Mapping[str, str]) -> str:
    """Why settings forbid a start without the store, as far as words tell; see daemon/process.py.

    A false alarm is a normal start.
    """
    words = [word for word in arguments if word.lstrip("-").startswith(_FLAG)]
    variable = _FLAG.replace("-", "_").upper()
    said = bool(words) and any(
        "exit" in word for word in arguments if word in words or not word.startswith("-")
    )
    said |= any(name.endswith(variable) and value == "exit" for name, value in environ.items())
    return "--on-lease-lost=exit starts with none" if said else ""


def _workers_of(descriptors: Mapping[str, int]) -> EarlyWorkers:
    """Running workers. Raises whatever keeps them from it, with words for the log."""
    from tundp.engine import image as images
    from tundp.engine.native.early import EarlyWorkers

    tun_fds = fd_store.in_order(descriptors, "tun-")
    udp_fds = fd_store.in_order(descriptors, "udp-")
    fd = descriptors.get("image")
    if fd is None or not tun_fds or not udp_fds:
        missing = {"an image": fd is not None, "a TUN": tun_fds, "a UDP socket": udp_fds}
        names = [name for name, is_there in missing.items() if not is_there]
        raise images.Unfit(f"the descriptors given lack {' and '.join(names)}")
    image = images.read(fd)
    check(image, tun_fds, udp_fds)
    workers = EarlyWorkers(image, tun_fds, udp_fds)
    try:
        workers.start()
    except BaseException:
        workers.close()
        raise
    return workers


def check(image: Image, tun_fds: Sequence[int], udp_fds: Sequence[int]) -> None:
    """Raise Unfit, with the reason, unless the image is of this tundp and these descriptors."""
    import tundp
    from tundp.engine.image import Unfit
    from tundp.engine.native.early import sizes

    about = image.about
    if about["version"] != tundp.__version__:
        raise Unfit(f"the image is of tundp {about['version']}, this is {tundp.__version__}")
    if about["why_not"]:
        raise Unfit(about["why_not"])
    if about["sizes"] != (here := sizes()):
        raise Unfit(f"the image's C structs are {about['sizes']}, here {here}")
    queues = about["queues"]
    if len(tun_fds) != queues or len(udp_fds) != queues:
        raise Unfit(
            f"the image is of {queues} queues, given are {len(tun_fds)} of the TUN and"
            f" {len(udp_fds)} sockets"
        )
    for fd in tun_fds:
        _check_tun(fd, about["tun"], has_vnet_header=about["has_vnet_header"])
    for fd in udp_fds:
        _check_socket(fd, about["address"], about["port"])
    _check_device(udp_fds[0], about["tun"])


def _check_tun(fd: int, name: str, *, has_vnet_header: bool) -> None:
    import fcntl

    from tundp.engine.image import Unfit

    request = bytearray(_IFREQ_LEN)
    try:
        fcntl.ioctl(fd, _TUNGETIFF, request)
    except OSError as error:
        raise Unfit(f"the TUN device {name} is gone: {error.strerror}") from None
    found = bytes(request[:_NAME_LEN]).partition(b"\0")[0].decode(errors="replace")
    (flags,) = struct.unpack_from("=H", request, _NAME_LEN)
    if found != name or bool(flags & _IFF_VNET_HDR) is not has_vnet_header:
        raise Unfit(f"the TUN device given is {found}, flags {flags:#x}, not the image's {name}")


def _check_device(sock_fd: int, name: str) -> None:
    """Whether the device is in the sockets' network namespace, and up (netdevice(7))."""
    import fcntl

    from tundp.engine.image import Unfit

    request = bytearray(name.encode()[: _NAME_LEN - 1].ljust(_IFREQ_LEN, b"\0"))
    try:
        fcntl.ioctl(sock_fd, _SIOCGIFFLAGS, request)
    except OSError as error:
        raise Unfit(f"the TUN device {name} is not here: {error.strerror}") from None
    if not struct.unpack_from("=H", request, _NAME_LEN)[0] & _IFF_UP:
        raise Unfit(f"the TUN device {name} is down")


def _check_socket(fd: int, address: str, port: int) -> None:
    import _socket

    from tundp.engine.image import Unfit

    sock = _socket.socket(fileno=fd)
    try:
        bound = sock.getsockname()
    finally:
        sock.detach()
    if tuple(bound) != (address, port):
        raise Unfit(f"a socket given is bound to {bound}, the image's to {address}:{port}")
