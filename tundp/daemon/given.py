"""What the descriptor store had for this start, each looked at before it is believed.

A start never ends because of it: what is not what its name says, or belongs to other settings, is
closed, removed from the store, and named in one line of the log. A device or a port that no setting
asks for any more is gone before another is made.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from tundp.admin import leads_to_its_socket
from tundp.backend.base import Given
from tundp.choices import OnLeaseLost
from tundp.daemon.kept import Kept
from tundp.daemon.resources import Resources
from tundp.early import Start
from tundp.errors import TundpError
from tundp.linux import fd_store
from tundp.linux.tun_device import device_of, is_tun, remove_device
from tundp.settings.settings import Settings

_log = logging.getLogger(__name__)

_TUN, _UDP = fd_store.QUEUES


class _UnfitError(TundpError):
    """Why a descriptor is not used."""


def log_start(start: Start, settings: Settings) -> None:
    """Say whether packets flow already, and end that where the settings forbid it."""
    if start.workers is None:
        if start.descriptors:
            _log.info("no early start: %s", start.why_not)
        return
    if settings.on_lease_lost is OnLeaseLost.EXIT:
        start.workers.close()
        _log.info("no early start: --on-lease-lost=exit starts with none")
        return
    _log.info(
        "early start: %d packet threads carry packets by image %d",
        len(start.workers.threads),
        start.workers.generation,
    )


def resources_of(start: Start, settings: Settings, kept: Kept) -> Resources:
    """Everything given that fits these settings. All of it is owned by this from here on.

    `kept` forgets, and lets the store close, what does not. Blocks for a second at most, where the
    store is slow: before the event loop. The early start ends if it used what does not fit.
    """
    found, left = start.descriptors, dict(start.descriptors)

    def take(name: str, check: Callable[[int], None]) -> int | None:
        fd = left.pop(name, None)
        if fd is None:
            return None
        try:
            check(fd)
        except (_UnfitError, OSError) as error:
            _give_up(name, fd, str(error), kept)
            return None
        return fd

    image = take("image", _check_image)
    resources = Resources(kept=kept, lock=take("lock", lambda fd: _check_lock(fd, settings)))
    resources.admin = _socket(take("admin", lambda fd: _check_admin(fd, settings)))
    if "admin" in found and resources.admin is None:
        _remove_dead_path(settings.admin_socket)
    resources.health = _socket(take("health", lambda fd: _check_health(fd, settings)))
    resources.metrics = _socket(take("metrics", lambda fd: _check_metrics(fd, settings)))
    end_early = bool if start.workers is None else start.workers.close
    resources.backend = Given(
        tun_fds=_tuns(left, settings, kept, end_early),
        udp_socks=_udp(left, kept, end_early),
        forget=kept.forget,
        image_fd=image,
        early=start.workers,
    )
    if found:
        _log.info("going on with %s of the descriptor store", ", ".join(sorted(kept.names)) or "-")
    return resources


def _tuns(
    left: dict[str, int], settings: Settings, kept: Kept, end_early: Callable[[], object]
) -> tuple[int, ...]:
    """The queues of one device of the right name; none, and no such device, if any does not fit."""
    fds = fd_store.numbered(left, _TUN)
    try:
        names = set()
        for number, fd in enumerate(fds):
            if f"{_TUN}{number}" not in left:
                raise _UnfitError(f"there is no {_TUN}{number}")
            if not is_tun(fd):
                raise _UnfitError(f"{_TUN}{number} is {_what(fd)}, no TUN device")
            if (device := device_of(fd)) is None:
                raise _UnfitError("the device was deleted, or moved to another network namespace")
            names.add(device.name)
        pattern = re.escape(settings.tun_name).replace("%d", r"\d+")
        for name in names:
            if not re.fullmatch(pattern, name):
                raise _UnfitError(f"its name is {name}, --tun-name is {settings.tun_name}")
    except _UnfitError as error:
        end_early()
        deleted = next(filter(None, map(remove_device, fds)), "")
        _log.warning(
            "the TUN device of the descriptor store is not used: %s%s",
            error,
            f"; {deleted} deleted" if deleted else "",
        )
        for fd in fds:
            os.close(fd)
        kept.forget(_TUN)
        return ()
    return fds


def _udp(
    left: dict[str, int], kept: Kept, end_early: Callable[[], object]
) -> tuple[socket.socket, ...]:
    """Bound UDP sockets: the backend judges whether address, port and number are right."""
    fds = fd_store.numbered(left, _UDP)
    socks: list[socket.socket] = []
    try:
        for fd in fds:
            _require(_is_socket(fd), f"{_what(fd)}, no socket")
            sock = socket.socket(fileno=fd)
            socks.append(sock)
            if (sock.family, sock.type) != (socket.AF_INET, socket.SOCK_DGRAM):
                raise _UnfitError("one is no UDP socket over IPv4")
            _require(sock.getsockname()[1] != 0, "one is not bound")
    except (_UnfitError, OSError) as error:
        end_early()
        _log.warning("the UDP sockets of the descriptor store are not used: %s", error)
        for fd in fds[len(socks) :]:
            os.close(fd)
        for each in socks:
            each.close()
        kept.forget(_UDP)
        return ()
    for each in socks:
        each.setblocking(False)
    return tuple(socks)


def _check_lock(fd: int, settings: Settings) -> None:
    """A lock taken on the lock file of these settings: by this descriptor, or by it just now."""
    path = settings.instance.lock
    _require(stat.S_ISREG(os.fstat(fd).st_mode), f"it is {_what(fd)}, no file")
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(fd), os.lstat(path)):
            try:
                # Granted at once to whoever has it: the lock is the open file's (flock(2)).
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _UnfitError(f"another process holds {path}") from None
            return
    raise _UnfitError(f"it is not {path}")


def _check_image(fd: int) -> None:
    """Memory of a process; what is in it is judged by whoever reads it."""
    _require(stat.S_ISREG(os.fstat(fd).st_mode), f"it is {_what(fd)}, no memory file")


def _check_admin(fd: int, settings: Settings) -> None:
    path = settings.admin_socket
    name = _listening(fd, (socket.AF_UNIX,))
    _require(name == str(path), f"it listens on {name}, --admin-socket is {path}")
    _require(leads_to_its_socket(path), f"{path} was removed or replaced meanwhile")


def _check_health(fd: int, settings: Settings) -> None:
    wanted = (settings.healthz_ip, settings.healthz_port)
    _require(wanted[1] != 0, "--healthz-port is 0")
    _check_tcp(fd, wanted, "--healthz-ip and --healthz-port")


def _check_metrics(fd: int, settings: Settings) -> None:
    _require(settings.metrics_addr is not None, "there is no --metrics-addr")
    assert settings.metrics_addr is not None
    _check_tcp(fd, settings.metrics_addr, "--metrics-addr")


def _check_tcp(fd: int, wanted: tuple[str, int], flags: str) -> None:
    name = _listening(fd, (socket.AF_INET, socket.AF_INET6))
    _require(
        tuple(name[:2]) == wanted, f"it listens on {name[0]}:{name[1]}, {flags} say %s:%d" % wanted
    )


def _listening(fd: int, families: tuple[int, ...]) -> str | tuple[str, int]:
    """Where a stream socket of one of these families listens."""
    _require(_is_socket(fd), f"it is {_what(fd)}, no socket")
    with _borrowed(fd) as sock:
        is_listener = (
            sock.family in families
            and sock.type == socket.SOCK_STREAM
            and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        )
        _require(is_listener, "it is no listening socket of that kind")
        sock.setblocking(False)
        name: str | tuple[str, int] = sock.getsockname()
        return name


def _give_up(name: str, fd: int, why: str, kept: Kept) -> None:
    """Close it. Who asks a socket that listens is refused from now on, wherever copies are."""
    _log.warning("descriptor %s of the store is not used: %s", name, why)
    if _is_socket(fd):
        with contextlib.suppress(OSError), _borrowed(fd) as sock:
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                sock.shutdown(socket.SHUT_RDWR)
    os.close(fd)
    kept.forget(name)


def _remove_dead_path(path: Path) -> None:
    """Remove the path of a socket that listens no more, though copies of it may live on."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except OSError:
            return  # another daemon's, which is named when ours is opened


@contextlib.contextmanager
def _borrowed(fd: int) -> Iterator[socket.socket]:
    """A descriptor as a socket object, without closing it."""
    sock = socket.socket(fileno=fd)
    try:
        yield sock
    finally:
        sock.detach()


def _socket(fd: int | None) -> socket.socket | None:
    return None if fd is None else socket.socket(fileno=fd)


def _is_socket(fd: int) -> bool:
    return stat.S_ISSOCK(os.fstat(fd).st_mode)


def _what(fd: int) -> str:
    """What kind of thing a descriptor is of, as proc(5) names it."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError as error:
        return os.strerror(error.errno or errno.EIO)


def _require(what_holds: object, why: str) -> None:
    if not what_holds:
        raise _UnfitError(why)
