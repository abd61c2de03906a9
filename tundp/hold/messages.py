"""The receiving end of sd_notify(3): a datagram socket, and who may be believed.

A message counts if the kernel says (SCM_CREDENTIALS, unix(7)) that the main process sent it, as
with systemd's NotifyAccess=main. Everybody else's is read and its descriptors are closed, no more.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from typing import Final, NamedTuple

LENGTH_MAX: Final = 4096
"""Bytes of a message, as systemd takes (NOTIFY_BUFFER_MAX)."""
FDS_MAX: Final = 253
"""SCM_MAX_FD: descriptors the kernel takes in one message."""
_CREDENTIALS: Final = struct.Struct("=iII")
"""struct ucred: pid, uid, gid."""
_ROOM: Final = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(FDS_MAX * 4)


class Message(NamedTuple):
    """One datagram; its descriptors are the reader's."""

    pid: int
    """The sender's, as this process sees it; 0 if it does not (another PID namespace)."""
    fields: dict[str, str]
    fds: tuple[int, ...]

    def close(self) -> None:
        """Close the descriptors."""
        for fd in self.fds:
            os.close(fd)


class NotifySocket:
    """A socket with a path, in a directory only this user may enter."""

    def __init__(self) -> None:
        """OSError if there is no place for it."""
        places = ("/run", os.environ.get("TMPDIR", "/tmp"))  # noqa: S108
        place = next((each for each in places if os.access(each, os.W_OK)), places[-1])
        self._folder = os.path.join(place, f"tundp-hold-{os.getpid()}")
        self._remove()  # of one that was killed and had our number
        os.mkdir(self._folder, 0o700)
        self.path = os.path.join(self._folder, "notify")
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._sock.bind(self.path)

    def fileno(self) -> int:
        """For poll(2)."""
        return self._sock.fileno()

    def receive(self) -> Message | None:
        """The next message; None if there is none. Never waits, whatever was sent."""
        try:
            data, controls, _, _ = self._sock.recvmsg(LENGTH_MAX, _ROOM, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            return None
        pid = 0
        fds = array.array("i")
        for level, kind, value in controls:
            if level != socket.SOL_SOCKET:
                continue
            if kind == socket.SCM_CREDENTIALS and len(value) >= _CREDENTIALS.size:
                pid = _CREDENTIALS.unpack_from(value)[0]
            elif kind == socket.SCM_RIGHTS:
                fds.frombytes(value[: len(value) - len(value) % fds.itemsize])
        return Message(pid, _fields(data), tuple(fds))

    def close(self) -> None:
        """Close it, and remove its path."""
        self._sock.close()
        self._remove()

    def _remove(self) -> None:
        for remove, path in ((os.unlink, f"{self._folder}/notify"), (os.rmdir, self._folder)):
            try:
                remove(path)
            except OSError:
                return


def tell(path: str, text: str) -> None:
    """Send a message to another such socket, if it takes it at once."""
    address = f"\0{path[1:]}" if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            sock.sendto(text.encode(errors="replace"), address)
    except OSError:
        return  # systemd notices by what does not come


def _fields(data: bytes) -> dict[str, str]:
    lines = data.decode(errors="replace").split("\n")
    return dict(line.split("=", 1) for line in lines if "=" in line)
