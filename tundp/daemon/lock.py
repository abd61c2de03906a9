"""One daemon for each subnet.env: two would overwrite each other's, and share firewall chains.

The lock is the kernel's, on a file beside it, and goes with the process however it ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from pathlib import Path

from tundp.errors import SCARCE, PlatformError
from tundp.files import SMALL_LEN, open_file, open_folder, read_regular
from tundp.instance import Instance


def take_lock(instance: Instance) -> int | None:
    """Be the daemon of this subnet.env: a descriptor that holds the lock until it is closed.

    Whoever has a duplicate of it holds the lock, too. None where the lock file cannot be made:
    then there is no lock, and subnet.env cannot be written. PlatformError if another daemon
    has it, or if for lack of descriptors or memory nobody can tell.
    """
    try:
        os.close(open_folder(instance.lock.parent, makes=True))
        lock = open_file(instance.lock, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        if error.errno in SCARCE:
            raise _unknown(instance, error) from None
        return None
    if not _take(lock):
        os.close(lock)
        raise PlatformError(
            f"another tundp runs with --subnet-file {instance.subnet_file}: give each network"
            " of this host its own, such as --subnet-file=/run/flannel/blue.env; admin socket,"
            " firewall chains and node id follow from it",
            errno.EBUSY,
        )
    return lock


def is_running(instance: Instance) -> bool:
    """Whether a daemon of this subnet.env runs, be it hung. PlatformError if nobody can tell."""
    try:
        # Read only: a lock may be taken, and a file system that is read-only now may hold one.
        lock = open_file(instance.lock, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        # A link or something else in its place is no lock of ours.
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            return False
        raise _unknown(instance, error) from None
    try:
        return not _take(lock)
    except OSError as error:
        raise _unknown(instance, error) from None
    finally:
        os.close(lock)


def stamp(instance: Instance) -> None:
    """Record in the lock file that subnet.env, as it is now, was written by tundp.

    Whoever writes it anew makes another file (a rename), or another time of change.
    """
    with contextlib.suppress(OSError):
        text = json.dumps({"wrote": _fingerprint(instance.subnet_file)}) + "\n"
        lock = open_file(instance.lock, os.O_WRONLY)
        try:
            os.pwrite(lock, text.encode("ascii"), 0)
            os.ftruncate(lock, len(text))
        finally:
            os.close(lock)


def is_stamped(instance: Instance) -> bool | None:
    """Whether tundp wrote subnet.env as it is now; None if there is no stamp to tell."""
    try:
        wrote = json.loads(read_regular(instance.lock, most_len=SMALL_LEN, is_ours=True))["wrote"]
        return bool(wrote == _fingerprint(instance.subnet_file))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _unknown(instance: Instance, error: OSError) -> PlatformError:
    return PlatformError(
        f"cannot open {instance.lock}, which tells whether another tundp runs with this"
        f" --subnet-file: {error.strerror}",
        error.errno,
    )


def _fingerprint(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_ino, status.st_mtime_ns, status.st_size]


def _take(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
